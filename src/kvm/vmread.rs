// SPDX-License-Identifier: GPL-2.0
//! A VMREAD of L1 that exits, in the plain case: from a 64-bit supervisor, into a register.

use super::{
    fields::{
        encoding::{GUEST_CS_AR_BYTES, GUEST_SS_AR_BYTES},
        Field,
    },
    vcpu::read,
    vmx, Vcpu, Vmcs12,
};
use crate::policy::registers::EFER_LMA;

/// VMX_AR_L_MASK: 64-bit code.
const AR_L: u64 = 1 << 13;
/// VMX_AR_DPL of SS, the privilege level.
const AR_DPL: u64 = 3 << 5;
/// In the instruction information (SDM table 29-14): the operand is a register, its number from bit 3 on.
const TO_REGISTER: u64 = 1 << 10;
const REGISTER: u32 = 3;

/// What handle_vmread() is about to put where.
#[derive(Clone, Copy)]
pub(crate) struct Read {
    register: usize,
    value: u64,
}

impl Vcpu {
    /// What the VMREAD of this field does that has just exited, with this instruction information. `None` if it is not the
    /// plain case.
    ///
    /// `field` was named by its encoding for full access, KVM knows it, and vmcs12 has its value.
    #[inline(always)]
    pub(crate) fn plan_vmread(self, m: Vmcs12, field: &Field, info: u64) -> Option<Read> {
        let register = (info >> REGISTER & 0xf) as usize;
        // RSP has a place of its own, in the VMCS.
        self.gpr(register)?;
        // SAFETY: In a handler of an exit the exited VMCS is current; every processor has these fields.
        let (cs, ss) = unsafe {
            (
                vmx::vmread_basic(GUEST_CS_AR_BYTES),
                vmx::vmread_basic(GUEST_SS_AR_BYTES),
            )
        };
        let plain = info & TO_REGISTER != 0
            && read!(self, vcpu.arch.efer) & EFER_LMA != 0
            && cs & AR_L != 0
            && ss & AR_DPL == 0;
        let at = m.as_ptr().cast::<u8>().wrapping_add(field.offset as usize);
        plain.then(|| {
            // SAFETY: By the invariants of `Vmcs12`; the table has a field of that width there.
            let value = unsafe {
                match field.width() {
                    2 => u64::from(at.cast::<u16>().read_unaligned()),
                    4 => u64::from(at.cast::<u32>().read_unaligned()),
                    _ => at.cast::<u64>().read_unaligned(),
                }
            };
            Read { register, value }
        })
    }

    /// Does it, all of what handle_vmread() would do. Returns what that returns; `None` if KVM's functions are missing.
    ///
    /// Must not be called within `state::with`, see `vm_succeed`.
    #[inline(always)]
    pub(crate) fn finish_vmread(self, read: Read) -> Option<usize> {
        let handled = self.vm_succeed()?;
        // SAFETY: By the invariants of `Vcpu`; `plan_vmread` has checked the number. No register but RSP and RIP is
        // kept anywhere else, so there is nothing to mark.
        unsafe { (*self.raw()).vcpu.arch.regs[read.register & 0xf] = read.value as usize };
        Some(handled)
    }

    /// Whether it was done so.
    #[cold]
    pub(crate) fn has_read(self, read: Read) -> bool {
        self.gpr(read.register) == Some(read.value)
    }
}
