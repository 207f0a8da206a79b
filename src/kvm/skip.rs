// SPDX-License-Identifier: GPL-2.0
//! On to the instruction behind one that has exited and was carried out.

use super::{
    fields::encoding::{GUEST_INTERRUPTIBILITY_INFO, GUEST_RIP, VM_EXIT_INSTRUCTION_LEN},
    vcpu::read,
    vmx, Vcpu,
};
use crate::{bindings, policy::registers::RFLAGS_TF};

/// Blocking by STI and by MOV SS, in the interruptibility state (SDM volume 3, table 26-3).
const BLOCKING: u64 = 3;

impl Vcpu {
    /// kvm_skip_emulated_instruction() behind an instruction of 64-bit mode, if nobody steps through instructions or counts them.
    /// `false`: nothing has changed. `rflags` are the guest's.
    #[inline(always)]
    pub(super) fn skip_plainly(self, rflags: u64) -> bool {
        // SAFETY: In a handler of an exit the exited VMCS is current; every processor has these fields.
        let vmread = |field| unsafe { vmx::vmread_basic(field) };
        let len = vmread(VM_EXIT_INSTRUCTION_LEN);
        if len == 0 || rflags & RFLAGS_TF != 0 || self.counts_instructions() {
            return false;
        }
        let rip = if self.register_is_available(bindings::MTK_REG_RIP) {
            read!(self, vcpu.arch.rip) as u64
        } else {
            vmread(GUEST_RIP)
        };
        self.set_rip(rip.wrapping_add(len));
        let state = vmread(GUEST_INTERRUPTIBILITY_INFO);
        if state & BLOCKING != 0 {
            // SAFETY: As vmx_set_interrupt_shadow() does.
            unsafe { vmx::vmwrite_basic(GUEST_INTERRUPTIBILITY_INFO, state & !BLOCKING) };
        }
        true
    }

    /// Whether a counter of the guest counts retired instructions, see kvm_pmu_instruction_retired().
    #[inline(always)]
    pub(super) fn counts_instructions(self) -> bool {
        // Bit n is counter n.
        let counters = read!(self, vcpu.arch.pmu.pmc_counting_instructions);
        counters.iter().any(|&word| word != 0)
    }

    /// `kvm_rip_write()`.
    #[inline(always)]
    fn set_rip(self, rip: u64) {
        const RIP: u32 = 1 << bindings::MTK_REG_RIP;
        // SAFETY: By the invariants of `Vcpu` only this thread uses KVM's cache of registers. As for its type, see
        // `register_is_available`.
        unsafe {
            let arch = &raw mut (*self.raw()).vcpu.arch;
            (*arch).rip = rip as usize;
            for set in [
                (&raw mut (*arch).regs_avail).cast::<u32>(),
                (&raw mut (*arch).regs_dirty).cast::<u32>(),
            ] {
                set.write(set.read() | RIP);
            }
        }
    }
}
