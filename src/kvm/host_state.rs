// SPDX-License-Identifier: GPL-2.0
//! What load_vmcs12_host_state() changes when L1 is in 64-bit mode and KVM uses EPT and unrestricted guest.

use super::{
    fields::encoding::*,
    vcpu::{read, BP_ENABLED},
    vmcs12::field,
    vmx, Vcpu, Vmcs12,
};
use crate::{
    bindings,
    hook::CallId,
    policy::{
        controls::{primary::MSR_BITMAPS, secondary::DESCRIPTOR_TABLES},
        host_state::{self, Inputs, Plan},
        registers::{CR0_PG, CR4_IN_CPUID},
    },
};

/// Segments as the VMCS has them: the fields of one kind follow on one another in this order, in steps of two.
const ES: u64 = 0;
const CS: u64 = 1;
const SS: u64 = 2;
const DS: u64 = 3;
const FS: u64 = 4;
const GS: u64 = 5;
const LDTR: u64 = 6;
const TR: u64 = 7;

/// GUEST_INTR_STATE_STI and GUEST_INTR_STATE_MOV_SS.
const BLOCKING: u64 = 3;

const RSP: u32 = 1 << bindings::MTK_REG_RSP;
const RIP: u32 = 1 << bindings::MTK_REG_RIP;
const RFLAGS: u32 = 1 << bindings::MTK_REG_RFLAGS;
const CR0: u32 = 1 << bindings::MTK_REG_CR0;
const CR3: u32 = 1 << bindings::MTK_REG_CR3;
const CR4: u32 = 1 << bindings::MTK_REG_CR4;
/// Registers that are in KVM's cache afterwards.
const AVAILABLE: u32 = RSP | RIP | RFLAGS | CR0 | CR3 | CR4;
/// Those of them that go into the VMCS before L1 runs.
const DIRTY: u32 = RSP | RIP | CR3;

/// What vmx_set_cr0() and vmx_set_cr4() made of L1's host CR0 and CR4 when they were last loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ControlRegisters {
    cr0: u64,
    cr4: u64,
    guest_cr0: u64,
    guest_cr4: u64,
    cr0_owned: u64,
    emulates_umip: bool,
}

impl Vcpu {
    /// The inputs of the decision.
    #[inline(always)]
    pub(crate) fn host_state_inputs(self, m: Vmcs12) -> Inputs {
        Inputs {
            controls: field!(m, vm_exit_controls),
            msr_count: field!(m, vm_exit_msr_load_count),
            cr0: field!(m, host_cr0),
            cr4: field!(m, host_cr4),
            efer: field!(m, host_ia32_efer),
            guest_efer: read!(self, vcpu.arch.efer),
        }
    }

    /// Whether the vCPU itself is in a state in which `load_host_state` does what load_vmcs12_host_state() would.
    #[inline(always)]
    pub(crate) fn can_load_host_state(self, m: Vmcs12, known: &ControlRegisters) -> bool {
        self.vmcs01_is_loaded() && !self.guest_mode() && self.will_load_host_state(m, known)
    }

    /// The same while L2 has not been left yet.
    #[inline(always)]
    pub(crate) fn will_load_host_state(self, m: Vmcs12, known: &ControlRegisters) -> bool {
        !self.evmcs_is_mapped()
            // CPL and CR4 of L1 do not come into it; L2's paging does (enter_lmode() and exit_lmode()).
            && read!(self, vcpu.arch.cr0) as u64 & CR0_PG != 0
            && read!(self, rmode.vm86_active) == 0
            // User space has breakpoints in the guest.
            && read!(self, vcpu.guest_debug) == 0
            && !self.has_cet()
            && field!(m, host_cr3) & read!(self, vcpu.arch.reserved_gpa_bits) == 0
            && known.cr0 == field!(m, host_cr0)
            && known.cr4 == field!(m, host_cr4)
            && known.emulates_umip == self.emulates_umip()
    }

    /// `guest_cpu_cap_has()` of X86_FEATURE_SHSTK or X86_FEATURE_IBT.
    #[inline(always)]
    pub(super) fn has_cet(self) -> bool {
        const fn word(feature: u32) -> usize {
            feature as usize / 32
        }
        let (shstk, ibt) = (bindings::MTK_FEATURE_SHSTK, bindings::MTK_FEATURE_IBT);
        let (a, b) = (
            read!(self, vcpu.arch.cpu_caps[word(shstk)]),
            read!(self, vcpu.arch.cpu_caps[word(ibt)]),
        );
        a & 1 << (shstk % 32) | b & 1 << (ibt % 32) != 0
    }

    /// Whether the host's own IA32_DEBUGCTL has one of the bits that the guest runs with and shall not see.
    #[inline(always)]
    pub(crate) fn host_owns_debugctl(self) -> bool {
        read!(self, vcpu.arch.host_debugctl) & u64::from(bindings::MTK_HOST_OWNED_DEBUGCTL) != 0
    }

    /// Lets L1's reads of IA32_DEBUGCTL pass, or has them exit as on stock. Returns whether they pass: not if the
    /// VMM's filter of MSRs is against it.
    ///
    /// # Safety
    ///
    /// On the vCPU's thread. While they pass, the register is to have what KVM would give.
    pub(crate) unsafe fn pass_debugctl_reads(self, pass: bool) -> bool {
        const MSR_TYPE_R: usize = 1;
        const WORD: usize = bindings::MTK_MSR_DEBUGCTL as usize / 64;
        const BIT: u64 = 1 << (bindings::MTK_MSR_DEBUGCTL % 64);
        let msr = bindings::MTK_MSR_DEBUGCTL as usize;
        let args = [self.key(), msr, MSR_TYPE_R, usize::from(!pass)];
        // SAFETY: By this function's contract; KVM calls it so for other MSRs.
        let called = unsafe { CallId::SET_INTERCEPT.call(args) }.is_some();
        let bitmap = read!(self, vmcs01.msr_bitmap).cast::<u64>();
        called
            && pass
            && !bitmap.is_null()
            && read!(self, vmcs01.controls_shadow.exec) & MSR_BITMAPS != 0
            // SAFETY: A whole page, which only this thread changes.
            && unsafe { bitmap.add(WORD).read() } & BIT == 0
    }

    #[inline(always)]
    fn emulates_umip(self) -> bool {
        read!(self, vmcs01.controls_shadow.secondary_exec) & DESCRIPTOR_TABLES != 0
    }

    /// What the stock function has just made of vmcs12's host CR0 and CR4.
    pub(crate) fn loaded_control_registers(self, m: Vmcs12) -> Option<ControlRegisters> {
        // SAFETY: vmcs01 is current, as it is after load_vmcs12_host_state().
        let vmread = |field| unsafe { vmx::vmread(field) };
        Some(ControlRegisters {
            cr0: field!(m, host_cr0),
            cr4: field!(m, host_cr4),
            guest_cr0: vmread(GUEST_CR0)?,
            guest_cr4: vmread(GUEST_CR4)?,
            cr0_owned: read!(self, vcpu.arch.cr0_guest_owned_bits) as u64,
            emulates_umip: self.emulates_umip(),
        })
    }

    /// Every field of vmcs01 that is written, with its value.
    #[inline(always)]
    fn host_fields(
        self,
        m: Vmcs12,
        plan: Plan,
        known: &ControlRegisters,
        mut f: impl FnMut(u64, u64),
    ) {
        f(CR0_READ_SHADOW, known.cr0);
        f(GUEST_CR0, known.guest_cr0);
        f(CR4_READ_SHADOW, known.cr4);
        f(GUEST_CR4, known.guest_cr4);
        f(GUEST_RFLAGS, host_state::RFLAGS);
        f(GUEST_SYSENTER_CS, field!(m, host_ia32_sysenter_cs));
        f(GUEST_SYSENTER_ESP, field!(m, host_ia32_sysenter_esp));
        f(GUEST_SYSENTER_EIP, field!(m, host_ia32_sysenter_eip));
        f(GUEST_IDTR_BASE, field!(m, host_idtr_base));
        f(GUEST_GDTR_BASE, field!(m, host_gdtr_base));
        f(GUEST_IDTR_LIMIT, host_state::TABLE_LIMIT);
        f(GUEST_GDTR_LIMIT, host_state::TABLE_LIMIT);
        if plan.clear_bndcfgs {
            f(GUEST_BNDCFGS, 0);
        }
        if plan.load_pat {
            f(GUEST_IA32_PAT, field!(m, host_ia32_pat));
        }
        let mut segment = |which: u64, selector: u64, base: u64, limit: u64, rights: u64| {
            f(GUEST_ES_SELECTOR + 2 * which, selector);
            f(GUEST_ES_BASE + 2 * which, base);
            f(GUEST_ES_LIMIT + 2 * which, limit);
            f(GUEST_ES_AR_BYTES + 2 * which, rights);
        };
        let mut flat = |which, selector, base, rights| {
            segment(which, selector, base, host_state::FLAT, rights);
        };
        flat(CS, field!(m, host_cs_selector), 0, host_state::CS_RIGHTS);
        flat(DS, field!(m, host_ds_selector), 0, host_state::DATA_RIGHTS);
        flat(ES, field!(m, host_es_selector), 0, host_state::DATA_RIGHTS);
        flat(SS, field!(m, host_ss_selector), 0, host_state::DATA_RIGHTS);
        let (fs, gs) = (field!(m, host_fs_base), field!(m, host_gs_base));
        flat(FS, field!(m, host_fs_selector), fs, host_state::DATA_RIGHTS);
        flat(GS, field!(m, host_gs_selector), gs, host_state::DATA_RIGHTS);
        segment(
            TR,
            field!(m, host_tr_selector),
            field!(m, host_tr_base),
            host_state::TSS_LIMIT,
            host_state::TR_RIGHTS,
        );
        segment(LDTR, 0, 0, 0, host_state::LDTR_RIGHTS);
        f(GUEST_DR7, host_state::DR7);
        f(
            GUEST_IA32_DEBUGCTL,
            read!(self, vcpu.arch.host_debugctl) & u64::from(bindings::MTK_HOST_OWNED_DEBUGCTL),
        );
    }

    /// Does what load_vmcs12_host_state() does, but for EFER (`EferState::apply`) and what follows for the MMU: the
    /// description of the guest's paging, the root for the new CR3 and flushes of the TLB.
    ///
    /// # Safety
    ///
    /// In the handler of load_vmcs12_host_state(), `can_load_host_state` has just said yes, and `plan` and `known`
    /// are for this vmcs12; KVM uses EPT and unrestricted guest.
    #[inline(always)]
    pub(crate) unsafe fn load_host_state(self, m: Vmcs12, plan: Plan, known: &ControlRegisters) {
        self.host_fields(m, plan, known, |field, value| {
            // SAFETY: By this function's contract vmcs01 is current, and these are the values that KVM would write.
            unsafe { vmx::vmwrite_basic(field, value) };
        });
        // SAFETY: As above.
        let (blocking, mask) = unsafe {
            (
                vmx::vmread_basic(GUEST_INTERRUPTIBILITY_INFO),
                vmx::vmread_basic(CR4_GUEST_HOST_MASK),
            )
        };
        if blocking & BLOCKING != 0 {
            // SAFETY: As above.
            unsafe { vmx::vmwrite(GUEST_INTERRUPTIBILITY_INFO, blocking & !BLOCKING) };
        }
        let (rsp, rip) = (field!(m, host_rsp), field!(m, host_rip));
        let (cr3, pat) = (field!(m, host_cr3), field!(m, host_ia32_pat));
        let vmx = self.raw();
        // SAFETY: By the invariants of `Vcpu` these are this thread's.
        unsafe {
            let arch = &raw mut (*vmx).vcpu.arch;
            (*arch).regs[bindings::MTK_REG_RSP as usize] = rsp as usize;
            (*arch).rip = rip as usize;
            (*arch).cr0_guest_owned_bits = known.cr0_owned as usize;
            (*arch).cr0 = known.cr0 as usize;
            (*arch).cr4_guest_owned_bits = !mask as usize;
            if ((*arch).cr4 as u64 ^ known.cr4) & CR4_IN_CPUID != 0 {
                (*arch).cpuid_dynamic_bits_dirty = true;
            }
            (*arch).cr4 = known.cr4 as usize;
            (*arch).cr3 = cr3 as usize;
            // nested_ept_uninit_mmu_context().
            (*arch).mmu = &raw mut (*arch).root_mmu;
            #[cfg(not(MTK_GVA_WALK))]
            {
                (*arch).walk_mmu = &raw mut (*arch).root_mmu;
            }
            if plan.load_pat {
                (*arch).pat = pat;
            }
            // No breakpoint is enabled in this DR7.
            (*arch).dr7 = host_state::DR7 as usize;
            (*arch).switch_db_regs &= !BP_ENABLED;
            (*vmx).rflags = host_state::RFLAGS as usize;
            (*vmx).segment_cache.bitmask = 0;
            (*vmx).vt.emulation_required = false;
            let available = (&raw mut (*arch).regs_avail).cast::<u32>();
            available.write(available.read() | AVAILABLE);
            let dirty = (&raw mut (*arch).regs_dirty).cast::<u32>();
            dirty.write(dirty.read() | DIRTY);
        }
    }

    /// Whether the stock function has left what `load_host_state` would have left; else the first field of
    /// the VMCS that differs, or 0 for something of KVM's own.
    pub(crate) fn compare_host_state(
        self,
        m: Vmcs12,
        plan: Plan,
        known: &ControlRegisters,
    ) -> Result<(), u64> {
        let mut differs = None;
        self.host_fields(m, plan, known, |field, value| {
            // SAFETY: vmcs01 is current, as it is after load_vmcs12_host_state().
            if differs.is_none() && unsafe { vmx::vmread(field) } != Some(value) {
                differs = Some(field);
            }
        });
        if let Some(field) = differs {
            return Err(field);
        }
        // SAFETY: As above.
        let (blocking, mask) = unsafe {
            (
                vmx::vmread(GUEST_INTERRUPTIBILITY_INFO),
                vmx::vmread(CR4_GUEST_HOST_MASK),
            )
        };
        // SAFETY: Only an address is taken.
        let root_mmu = unsafe { &raw mut (*self.raw()).vcpu.arch.root_mmu };
        // SAFETY: The registers are the low word of either type.
        let (available, dirty) = unsafe {
            let arch = &raw const (*self.raw()).vcpu.arch;
            (
                (&raw const (*arch).regs_avail).cast::<u32>().read(),
                (&raw const (*arch).regs_dirty).cast::<u32>().read(),
            )
        };
        let same = blocking.is_some_and(|blocking| blocking & BLOCKING == 0)
            && mask == Some(!(read!(self, vcpu.arch.cr4_guest_owned_bits) as u64))
            && read!(self, vcpu.arch.efer) == plan.efer
            && read!(self, vcpu.arch.regs[bindings::MTK_REG_RSP as usize]) as u64
                == field!(m, host_rsp)
            && read!(self, vcpu.arch.rip) as u64 == field!(m, host_rip)
            && read!(self, vcpu.arch.cr0_guest_owned_bits) as u64 == known.cr0_owned
            && read!(self, vcpu.arch.cr0) as u64 == known.cr0
            && read!(self, vcpu.arch.cr4) as u64 == known.cr4
            && read!(self, vcpu.arch.cr3) as u64 == field!(m, host_cr3)
            && core::ptr::eq(read!(self, vcpu.arch.mmu), root_mmu)
            && (!plan.load_pat || read!(self, vcpu.arch.pat) == field!(m, host_ia32_pat))
            && read!(self, vcpu.arch.dr7) as u64 == host_state::DR7
            && read!(self, vcpu.arch.switch_db_regs) & BP_ENABLED == 0
            && read!(self, rflags) as u64 == host_state::RFLAGS
            && !read!(self, vt.emulation_required)
            && available & AVAILABLE == AVAILABLE
            && dirty & DIRTY == DIRTY
            && self.emulates_umip() == known.emulates_umip;
        if same {
            Ok(())
        } else {
            Err(0)
        }
    }
}
