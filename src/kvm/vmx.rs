// SPDX-License-Identifier: GPL-2.0
//! VMX instructions (SDM volume 3, chapter 31).

use core::arch::asm;

/// Encoding of the guest's RFLAGS (SDM appendix B.4.3).
pub(crate) const GUEST_RFLAGS: u64 = 0x6820;

/// VMREAD of the current VMCS. `None` on VMfail: no current VMCS, or no such field.
///
/// # Safety
///
/// The CPU is in VMX root operation and does not leave it meanwhile: true in KVM's code between
/// vcpu_load() and vcpu_put().
#[inline(always)]
pub(crate) unsafe fn vmread(field: u64) -> Option<u64> {
    let value: u64;
    let failed: u8;
    // SAFETY: By this function's contract VMREAD does not fault; it changes RFLAGS and `value`.
    unsafe {
        asm!(
            "vmread {value}, {field}",
            "setbe {failed}",
            field = in(reg) field,
            value = out(reg) value,
            failed = out(reg_byte) failed,
            options(nostack, nomem),
        );
    }
    (failed == 0).then_some(value)
}
