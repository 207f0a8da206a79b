// SPDX-License-Identifier: GPL-2.0
//! VMX instructions (SDM volume 3, chapter 32).
//!
//! A reboot or kexec that does not wait for tasks turns VMX operation off under them, on each CPU by an interrupt
//! (`kvm_shutdown()`), and each of these instructions is an invalid opcode from then on. As in KVM's own (`vmx_asm1()`) execution goes on behind it then,
//! as if it had failed; what the guest sees of it does not matter any more, but an Oops in the middle of a reboot does.

use crate::bindings;
use core::{
    arch::asm,
    sync::atomic::{AtomicBool, Ordering},
};
use kernel::prelude::*;

// The exception table says so: where it may happen, where to go on, and that this is all (EX_TYPE_DEFAULT).
const _: () = assert!(bindings::MTK_EX_TYPE_DEFAULT == 1);

/// An instruction that does nothing where it is an invalid opcode.
macro_rules! forgiven {
    ($instruction:literal) => {
        concat!(
            "2: ",
            $instruction,
            "\n3:\n",
            ".pushsection __ex_table, \"a\"\n",
            ".balign 4\n",
            ".long 2b - .\n",
            ".long 3b - .\n",
            ".long 1\n",
            ".popsection"
        )
    };
}

/// Physical address of something in the kernel's direct map (`__pa()`).
pub(crate) fn physical(ptr: *const core::ffi::c_void) -> u64 {
    // SAFETY: Set early in boot and constant since.
    let base = unsafe { bindings::page_offset_base };
    (ptr as u64).wrapping_sub(base as u64)
}

/// The other way round (`__va()`).
pub(crate) fn virtual_address(physical: u64) -> *mut u8 {
    // SAFETY: As above.
    let base = unsafe { bindings::page_offset_base };
    physical.wrapping_add(base as u64) as *mut u8
}

/// VMWRITE to the current VMCS; `false` on VMfail.
///
/// # Safety
///
/// As for [`vmread`], and the value is one that KVM's own code could write there.
#[inline(always)]
pub(crate) unsafe fn vmwrite(field: u64, value: u64) -> bool {
    let failed: u8;
    // SAFETY: By this function's contract, or without effect; it changes RFLAGS and the VMCS.
    unsafe {
        asm!(
            "stc",
            forgiven!("vmwrite {field}, {value}"),
            "setbe {failed}",
            field = in(reg) field,
            value = in(reg) value,
            failed = out(reg_byte) failed,
            options(nostack),
        );
    }
    failed == 0
}

/// VMPTRLD of the VMCS at a physical address; `false` on VMfail.
///
/// # Safety
///
/// As for [`vmread`]; preemption is off, and the VMCS that KVM believes current is loaded again
/// before it is back on.
#[inline(always)]
pub(crate) unsafe fn vmptrld(physical: u64) -> bool {
    let failed: u8;
    // SAFETY: By this function's contract.
    unsafe {
        asm!(
            "stc",
            forgiven!("vmptrld qword ptr [{p}]"),
            "setbe {failed}",
            p = in(reg) &physical,
            failed = out(reg_byte) failed,
            options(nostack),
        );
    }
    failed == 0
}

/// VMPTRLD of a shadow VMCS, which only a broken machine refuses: that is reported once.
///
/// # Safety
///
/// As for [`vmptrld`].
#[inline(always)]
pub(crate) unsafe fn load_shadow(physical: u64) -> bool {
    // SAFETY: By this function's contract.
    let loaded = unsafe { vmptrld(physical) };
    if !loaded {
        report(physical);
    }
    loaded
}

#[cold]
fn report(physical: u64) {
    static REPORTED: AtomicBool = AtomicBool::new(false);
    if !REPORTED.swap(true, Ordering::Relaxed) {
        pr_warn!(
            "VMPTRLD of the shadow VMCS at {physical:#x} failed; its vCPU goes back to stock KVM\n"
        );
    }
}

/// VMCLEAR of the VMCS at a physical address; `false` on VMfail.
///
/// # Safety
///
/// As for [`vmptrld`].
#[inline(always)]
pub(crate) unsafe fn vmclear(physical: u64) -> bool {
    let failed: u8;
    // SAFETY: By this function's contract.
    unsafe {
        asm!(
            "stc",
            forgiven!("vmclear qword ptr [{p}]"),
            "setbe {failed}",
            p = in(reg) &physical,
            failed = out(reg_byte) failed,
            options(nostack),
        );
    }
    failed == 0
}

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
    // SAFETY: By this function's contract, or without effect; it changes RFLAGS and `value`.
    unsafe {
        asm!(
            "stc",
            forgiven!("vmread {value}, {field}"),
            "setbe {failed}",
            field = in(reg) field,
            value = out(reg) value,
            failed = out(reg_byte) failed,
            options(nostack, nomem),
        );
    }
    (failed == 0).then_some(value)
}

/// VMREAD of a field that every processor has, without asking whether it worked.
///
/// # Safety
///
/// As for [`vmread`]; a VMCS is current. Where that is broken the value is of no use, and nothing worse.
#[inline(always)]
pub(crate) unsafe fn vmread_basic(field: u64) -> u64 {
    let mut value = 0;
    // SAFETY: By this function's contract, or without effect; it changes RFLAGS and `value`.
    unsafe {
        asm!(
            forgiven!("vmread {value}, {field}"),
            field = in(reg) field,
            value = inout(reg) value,
            options(nostack, nomem),
        );
    }
    value
}

/// VMREAD of a field that was read or written before, without asking whether it worked.
///
/// # Safety
///
/// As for [`vmread`]; a VMCS is current that has the field.
#[inline(always)]
pub(crate) unsafe fn vmread_present(field: u64) -> u64 {
    let value;
    // SAFETY: By this function's contract, or without effect; it changes RFLAGS and `value`.
    unsafe {
        asm!(
            forgiven!("vmread {value}, {field}"),
            field = in(reg) field,
            value = out(reg) value,
            options(nostack, nomem),
        );
    }
    value
}

/// VMWRITE of a field that this processor has, without asking whether it worked.
///
/// # Safety
///
/// As for [`vmwrite`].
#[inline(always)]
pub(crate) unsafe fn vmwrite_basic(field: u64, value: u64) {
    // SAFETY: By this function's contract, or without effect; it changes RFLAGS and the VMCS.
    unsafe {
        asm!(
            forgiven!("vmwrite {field}, {value}"),
            field = in(reg) field,
            value = in(reg) value,
            options(nostack),
        );
    }
}

/// INVVPID of this type (SDM volume 3, 32.3); `false` on VMfail, which a type that the processor lacks is.
///
/// # Safety
///
/// As for [`vmread`]; the processor has INVVPID.
#[inline(always)]
pub(crate) unsafe fn invvpid(kind: u64, vpid: u16, linear: u64) -> bool {
    let descriptor = [u64::from(vpid), linear];
    let failed: u8;
    // SAFETY: By this function's contract, or without effect; it reads the descriptor and changes RFLAGS.
    unsafe {
        asm!(
            "stc",
            forgiven!("invvpid {kind}, xmmword ptr [{descriptor}]"),
            "setbe {failed}",
            kind = in(reg) kind,
            descriptor = in(reg) &descriptor,
            failed = out(reg_byte) failed,
            options(nostack),
        );
    }
    failed == 0
}

/// INVVPID of all contexts (type 2): nothing tagged with any VPID but 0 is left in this CPU's TLB. `false` on VMfail.
///
/// # Safety
///
/// As for [`invvpid`].
pub(crate) unsafe fn invvpid_all() -> bool {
    // SAFETY: By this function's contract.
    unsafe { invvpid(2, 0, 0) }
}

/// RDPKRU: the rights by protection keys that are in force.
///
/// # Safety
///
/// CR4.PKE is on.
#[inline(always)]
pub(crate) unsafe fn rdpkru() -> u32 {
    let pkru: u32;
    // SAFETY: By this function's contract; ECX is 0 as the instruction wants it.
    unsafe { asm!("rdpkru", in("ecx") 0, out("eax") pkru, out("edx") _, options(nomem, nostack)) };
    pkru
}

/// RDMSR.
///
/// # Safety
///
/// The processor has the register.
pub(crate) unsafe fn rdmsr(register: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: By this function's contract RDMSR does not fault.
    unsafe {
        asm!(
            "rdmsr",
            in("ecx") register,
            out("eax") low,
            out("edx") high,
            options(nostack, nomem, preserves_flags),
        );
    }
    u64::from(high) << 32 | u64::from(low)
}

/// The time-stamp counter, without waiting for what comes before.
#[inline(always)]
pub(crate) fn rdtsc() -> u64 {
    // SAFETY: Every 64-bit processor has it, and the kernel may use it.
    unsafe { core::arch::x86_64::_rdtsc() }
}
