// SPDX-License-Identifier: GPL-2.0
//! Before an entry: whether it is one that `enter` can make, what vmcs02 is entered with, and what the stock function made of the same
//! the last time.

use super::*;
use crate::policy::{
    controls::{primary::CR3_LOAD_EXITING, secondary::MBEC, vm_entry::LOAD_DEBUG},
    entry::Inputs,
    registers::CR0_PG,
};

/// KVM_NESTED_RUN_PENDING: L1 has executed VMLAUNCH or VMRESUME; user space has not touched anything since.
const RUN_PENDING: u8 = 1;
/// What of EPTP the role of the guest's MMU follows from: the length of the walk, and accessed and dirty flags.
const EPTP_MODE: u64 = 0x7f;

const FLUSH_CURRENT: u64 = 1 << bindings::MTK_REQ_TLB_FLUSH_CURRENT;

impl Vmcs12 {
    #[inline(always)]
    fn controls(self) -> Controls {
        Controls {
            pin: self.pin_controls(),
            primary: self.primary_controls(),
            secondary: self.secondary_controls(),
            entry: field!(self, vm_entry_controls) as u32,
            exit: 0,
        }
    }
}

impl Vcpu {
    /// What L2 is entered with, if nothing about it is out of the ordinary. `bitmap`: vmcs02 gets a bitmap of MSRs. `derived`:
    /// `would_derive` has said yes to it.
    ///
    /// # Safety
    ///
    /// vmcs01 is current.
    #[inline(always)]
    pub(crate) unsafe fn plan_entry(
        self,
        m: Vmcs12,
        derived: &Derived,
        bitmap: bool,
    ) -> Option<Entry> {
        let wanted = m.controls();
        let inputs = Inputs {
            wanted,
            msr_count: field!(m, vm_entry_msr_load_count),
            cr0: field!(m, guest_cr0),
            cr4: field!(m, guest_cr4),
            efer: field!(m, guest_ia32_efer),
            rflags: field!(m, guest_rflags),
            dr7: field!(m, guest_dr7),
            tsc_multiplier: field!(m, tsc_multiplier),
            timer: field!(m, vmx_preemption_timer_value),
            l1_efer: read!(self, vcpu.arch.efer),
        };
        let efer = inputs.efer()?;
        let hflags = u64::from(read!(self, vcpu.arch.hflags));
        let ours = Controls {
            pin: read!(self, vmcs01.controls_shadow.pin),
            primary: read!(self, vmcs01.controls_shadow.exec),
            secondary: read!(self, vmcs01.controls_shadow.secondary_exec),
            entry: read!(self, vmcs01.controls_shadow.vm_entry),
            exit: read!(self, vmcs01.controls_shadow.vm_exit),
        };
        // SAFETY: Only an address is taken.
        let root_mmu = unsafe { &raw mut (*self.raw()).vcpu.arch.root_mmu };
        let plain = self.vmcs01_is_loaded()
            && hflags & HF_GUEST == 0
            && read!(self, vcpu.arch.nested_run_pending) == RUN_PENDING
            && read!(self, nested.vmcs02_initialized)
            && !self.evmcs_is_mapped()
            && !self.has_hyperv()
            && read!(self, vcpu.requests) & (FLUSH_CURRENT | FLUSH_GUEST) == 0
            // User space has breakpoints in the guest.
            && read!(self, vcpu.guest_debug) == 0
            && read!(self, rmode.vm86_active) == 0
            && !self.has_cet()
            && read!(self, vcpu.arch.cr0) as u64 & CR0_PG != 0
            && ours.primary & CR3_LOAD_EXITING == 0
            && core::ptr::eq(read!(self, vcpu.arch.mmu), root_mmu)
            && field!(m, guest_ia32_debugctl) == 0
            && field!(m, guest_cr3) & read!(self, vcpu.arch.reserved_gpa_bits) == 0;
        if !plain {
            return None;
        }
        let dirty = read!(self, nested.dirty_vmcs12);
        if dirty && !self.can_enter_dirty(m, &wanted) {
            return None;
        }
        let controls = ours.merge(&wanted, bitmap, derived.emulates_umip())?;
        let paging = Key::new(
            inputs.cr0,
            inputs.cr4,
            efer,
            hflags | HF_GUEST,
            wanted.secondary & EPT != 0,
        )?;
        // SAFETY: By this function's contract.
        let vmread = |field| unsafe { vmx::vmread_basic(field) };
        let clear_bndcfgs = ours.entry & LOAD_BNDCFGS != 0 && wanted.entry & LOAD_BNDCFGS == 0;
        // L1 uses MPX.
        if clear_bndcfgs && vmread(GUEST_BNDCFGS) != 0 {
            return None;
        }
        let owned = u64::from(bindings::MTK_HOST_OWNED_DEBUGCTL);
        Some(Entry {
            controls,
            wanted,
            efer,
            derived: *derived,
            cr3: if self.register_is_available(bindings::MTK_REG_CR3) {
                read!(self, vcpu.arch.cr3) as u64
            } else {
                vmread(GUEST_CR3)
            },
            debugctl: (wanted.entry & LOAD_DEBUG == 0)
                .then(|| vmread(GUEST_IA32_DEBUGCTL) & !owned),
            owned_cr0: read!(self, vcpu.arch.cr0_guest_owned_bits) as u64
                & !field!(m, cr0_guest_host_mask),
            paging,
            clear_bndcfgs,
            dirty,
        })
    }

    /// Whether what the stock function made the last time is what it would make now.
    #[inline(always)]
    pub(crate) fn would_derive(self, m: Vmcs12, known: &Derived) -> bool {
        known.cr0 == field!(m, guest_cr0)
            && known.cr4 == field!(m, guest_cr4)
            && known.wanted_exceptions == field!(m, exception_bitmap)
            && known.no_xfd_exits == read!(self, vcpu.arch.xfd_no_write_intercept)
            && known.ept_mode == Self::ept_mode(m)
            && (known.ept_mode == 0 || known.roles == self.guest_mmu_roles())
    }

    /// What the stock function has just made; `None` while user space debugs the guest, with exceptions of its own that KVM has exit. (That
    /// it has stopped is said by KVM_SET_GUEST_DEBUG, which does not pass through kvm_arch_vcpu_ioctl().)
    ///
    /// # Safety
    ///
    /// vmcs02 is current, L2 was entered.
    pub(crate) unsafe fn derived(self, m: Vmcs12) -> Option<Derived> {
        if read!(self, vcpu.guest_debug) != 0 {
            return None;
        }
        // SAFETY: By this function's contract.
        let vmread = |field| unsafe { vmx::vmread(field) };
        Some(Derived {
            cr0: field!(m, guest_cr0),
            guest_cr0: vmread(GUEST_CR0)?,
            cr4: field!(m, guest_cr4),
            guest_cr4: vmread(GUEST_CR4)?,
            wanted_exceptions: field!(m, exception_bitmap),
            no_xfd_exits: read!(self, vcpu.arch.xfd_no_write_intercept),
            exceptions: vmread(EXCEPTION_BITMAP)?,
            ept_mode: Self::ept_mode(m),
            roles: self.guest_mmu_roles(),
        })
    }

    /// Whether vmcs02 gets a bitmap of MSRs, L1's being in memory.
    pub(crate) fn uses_msr_bitmap(self, m: Vmcs12) -> bool {
        m.primary_controls() & MSR_BITMAPS != 0
    }

    /// Everything that the mode of the guest's MMU follows from and that L1 can change (`nested_ept_new_eptp()`); 0 without
    /// EPT, which has a length of the walk.
    #[inline(always)]
    pub(crate) fn ept_mode(m: Vmcs12) -> u64 {
        let secondary = m.secondary_controls();
        if secondary & EPT == 0 {
            return 0;
        }
        u64::from(secondary & (EPT | MBEC)) << 8 | field!(m, ept_pointer) & EPTP_MODE
    }

    /// The modes for which kvm_init_shadow_ept_mmu() has prepared, in which case it changes nothing but the root.
    #[inline(always)]
    pub(super) fn guest_mmu_roles(self) -> (u64, u32) {
        // SAFETY: Unions of plain integers; by the invariants of `Vcpu` this thread's.
        unsafe {
            let arch = &raw const (*self.raw()).vcpu.arch;
            (
                (&raw const (*arch).ngpa_walk.cpu_role).cast::<u64>().read(),
                (&raw const (*arch).guest_mmu.root_role)
                    .cast::<u32>()
                    .read(),
            )
        }
    }

    /// `to_hv_vcpu()`: Hyper-V's interface was used.
    #[inline(always)]
    pub(crate) fn has_hyperv(self) -> bool {
        #[cfg(CONFIG_KVM_HYPERV)]
        {
            !read!(self, vcpu.arch.hyperv).is_null()
        }
        #[cfg(not(CONFIG_KVM_HYPERV))]
        {
            false
        }
    }
}
