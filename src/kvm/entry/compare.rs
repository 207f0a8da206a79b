// SPDX-License-Identifier: GPL-2.0
//! Mode `check`: what the stock function has left against what `enter` would have left.

use super::*;

impl Vcpu {
    /// Whether the stock function has left what `enter` would have left; else the first field of the VMCS that differs, or a
    /// small number for something of KVM's own.
    #[cold]
    pub(crate) fn compare_entry(self, m: Vmcs12, e: &Entry) -> Result<(), u64> {
        let mut differs = None;
        let mut check = |same: bool, what: u64| {
            if !same && differs.is_none() {
                differs = Some(what);
            }
        };
        self.entry_fields(m, e, |field, value| {
            // SAFETY: vmcs02 is current, as it is after nested_vmx_enter_non_root_mode().
            check(unsafe { vmx::vmread(field) } == Some(value), field);
        });
        if e.dirty {
            self.compare_dirty(m, e, &mut check);
        }
        let vmx = self.raw();
        let state = Self::entry_state(m, e);
        let (dr7, tsc_offset) = (self.entry_dr7(m, e), self.entry_tsc_offset(m, e));
        // SAFETY: By the invariants of `Vcpu` all of this is this thread's.
        unsafe {
            let shadow = &raw const (*vmx).nested.vmcs02.controls_shadow;
            // Where there is no page the stock function does without what wants it.
            let but = |value: u32, pages: u32| value & !pages;
            check(
                but((*shadow).pin ^ e.controls.pin, POSTED_INTERRUPTS) == 0,
                PIN_BASED_VM_EXEC_CONTROL,
            );
            check(
                but(
                    (*shadow).exec ^ e.controls.primary,
                    TPR_SHADOW | MSR_BITMAPS,
                ) == 0,
                CPU_BASED_VM_EXEC_CONTROL,
            );
            check(
                (*shadow).secondary_exec == e.controls.secondary,
                SECONDARY_VM_EXEC_CONTROL,
            );
            check(
                (*shadow).vm_entry & !EFER_ENTRY == e.controls.entry,
                VM_ENTRY_CONTROLS,
            );
            check(
                (*shadow).vm_exit & !EFER_EXIT == e.controls.exit,
                VM_EXIT_CONTROLS,
            );
            let nested = &raw const (*vmx).nested;
            check(
                e.debugctl
                    .is_none_or(|d| (*nested).pre_vmenter_debugctl == d)
                    && (!e.clear_bndcfgs || (*nested).pre_vmenter_bndcfgs == 0)
                    && (*nested).pre_vmenter_cr3 as u64 == e.cr3,
                1,
            );
            check(
                !(*nested).pi_pending
                    && (*nested).posted_intr_nv == state.vector
                    && (*nested).vmcs02.nmi_known_unmasked == state.unmasked_nmi,
                2,
            );
            check(
                self.guest_mode()
                    && (*vmx).vcpu.stat.guest_mode == 1
                    && (*vmx).rflags == state.rflags
                    && !(*vmx).vt.emulation_required,
                3,
            );
            let arch = &raw const (*vmx).vcpu.arch;
            check(
                (*arch).dr7 as u64 == dr7
                    && ((*arch).switch_db_regs & BP_ENABLED != 0) == (dr7 & BREAKPOINTS != 0),
                4,
            );
            check((*arch).cr0_guest_owned_bits as u64 == e.owned_cr0, 5);
            check(
                (*arch).tsc_offset == tsc_offset
                    && (*arch).tsc_scaling_ratio == (*arch).l1_tsc_scaling_ratio,
                6,
            );
            let mmu = if e.has_ept() {
                &raw const (*arch).guest_mmu
            } else {
                &raw const (*arch).root_mmu
            };
            check(
                core::ptr::eq((*arch).mmu, mmu)
                    && (!e.has_ept() || self.guest_mmu_roles() == e.derived.roles),
                7,
            );
            check(
                (*arch).cr0 as u64 == e.derived.cr0
                    && (*arch).cr4 as u64 == e.derived.cr4
                    && (*arch).cr3 == state.cr3
                    && state.pat.is_none_or(|pat| (*arch).pat == pat)
                    && (*arch).efer == e.efer,
                8,
            );
            check(
                (*arch).regs[bindings::MTK_REG_RSP as usize] == state.rsp
                    && (*arch).rip == state.rip,
                9,
            );
            let available = (&raw const (*arch).regs_avail).cast::<u32>().read();
            let dirty = (&raw const (*arch).regs_dirty).cast::<u32>().read();
            check(available & AVAILABLE == AVAILABLE && dirty == DIRTY, 10);
            check(
                match state.vpid {
                    Some(vpid) => (*nested).last_vpid == vpid,
                    None => (*vmx).vcpu.requests & FLUSH_GUEST != 0,
                },
                11,
            );
        }
        differs.map_or(Ok(()), Err)
    }
}
