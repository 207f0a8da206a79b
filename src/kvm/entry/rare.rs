// SPDX-License-Identifier: GPL-2.0
//! What vmcs02 gets besides when L1 has changed a field that KVM does not look at on every entry, or enters another vmcs12 than the last
//! (`dirty_vmcs12`): prepare_vmcs02_early_rare() and prepare_vmcs02_rare().

use super::*;
use crate::{layout, policy::controls::secondary::XSAVES};
use core::sync::atomic::AtomicBool;

/// KVM gives L2 VPIDs, and has no page fault of a guest's exit for its own purposes (`vmx_need_pf_intercept()`).
static ABLE: AtomicBool = AtomicBool::new(false);

/// Reads what this needs to know about kvm_intel, each time it has been loaded.
pub(crate) fn prepare() {
    let able = layout::module_flag("kvm_intel", "vpid")
        && !layout::module_flag("kvm_intel", "allow_smaller_maxphyaddr");
    ABLE.store(able, Ordering::Relaxed);
}

impl Vcpu {
    /// Whether `rare_fields` has all that the stock functions write: not where lists of MSRs are stored or MPX is used.
    #[inline(always)]
    pub(super) fn can_enter_dirty(self, m: Vmcs12, wanted: &Controls) -> bool {
        ABLE.load(Ordering::Relaxed)
            && field!(m, vm_exit_msr_store_count) == 0
            && (wanted.entry & LOAD_BNDCFGS == 0 || field!(m, guest_bndcfgs) == 0)
    }

    /// CR4 bits that L2 owns (`set_cr4_guest_host_mask()`).
    #[inline(always)]
    fn owned_cr4(self, m: Vmcs12) -> u64 {
        u64::from(bindings::MTK_POSSIBLE_CR4_GUEST_BITS)
            & !(read!(self, vcpu.arch.cr4_guest_rsvd_bits) as u64)
            & !field!(m, cr4_guest_host_mask)
    }

    /// Every field of vmcs02 that is written besides.
    #[inline(always)]
    fn rare_fields(self, m: Vmcs12, e: &Entry, mut f: impl FnMut(u64, u64)) {
        f(VMCS_LINK_POINTER, u64::MAX);
        let vpid02 = read!(self, nested.vpid02);
        let vpid = if e.wanted.secondary & VPID != 0 && vpid02 != 0 {
            vpid02
        } else {
            read!(self, vpid) as u16
        };
        f(VIRTUAL_PROCESSOR_ID, u64::from(vpid));
        // The fields of one kind follow on one another in this order, in steps of two.
        macro_rules! segment {
            ($at:literal, $selector:ident, $limit:ident, $rights:ident, $base:ident) => {
                f(GUEST_ES_SELECTOR + 2 * $at, field!(m, $selector));
                f(GUEST_ES_LIMIT + 2 * $at, field!(m, $limit));
                f(GUEST_ES_AR_BYTES + 2 * $at, field!(m, $rights));
                f(GUEST_ES_BASE + 2 * $at, field!(m, $base));
            };
        }
        segment!(
            0,
            guest_es_selector,
            guest_es_limit,
            guest_es_ar_bytes,
            guest_es_base
        );
        segment!(
            1,
            guest_cs_selector,
            guest_cs_limit,
            guest_cs_ar_bytes,
            guest_cs_base
        );
        segment!(
            2,
            guest_ss_selector,
            guest_ss_limit,
            guest_ss_ar_bytes,
            guest_ss_base
        );
        segment!(
            3,
            guest_ds_selector,
            guest_ds_limit,
            guest_ds_ar_bytes,
            guest_ds_base
        );
        segment!(
            4,
            guest_fs_selector,
            guest_fs_limit,
            guest_fs_ar_bytes,
            guest_fs_base
        );
        segment!(
            5,
            guest_gs_selector,
            guest_gs_limit,
            guest_gs_ar_bytes,
            guest_gs_base
        );
        segment!(
            6,
            guest_ldtr_selector,
            guest_ldtr_limit,
            guest_ldtr_ar_bytes,
            guest_ldtr_base
        );
        segment!(
            7,
            guest_tr_selector,
            guest_tr_limit,
            guest_tr_ar_bytes,
            guest_tr_base
        );
        f(GUEST_GDTR_LIMIT, field!(m, guest_gdtr_limit));
        f(GUEST_IDTR_LIMIT, field!(m, guest_idtr_limit));
        f(GUEST_GDTR_BASE, field!(m, guest_gdtr_base));
        f(GUEST_IDTR_BASE, field!(m, guest_idtr_base));
        f(GUEST_SYSENTER_CS, field!(m, guest_sysenter_cs));
        f(
            GUEST_PENDING_DBG_EXCEPTIONS,
            field!(m, guest_pending_dbg_exceptions),
        );
        f(GUEST_SYSENTER_ESP, field!(m, guest_sysenter_esp));
        f(GUEST_SYSENTER_EIP, field!(m, guest_sysenter_eip));
        if e.wanted.entry & LOAD_BNDCFGS != 0 {
            f(GUEST_BNDCFGS, field!(m, guest_bndcfgs));
        }
        if e.wanted.secondary & XSAVES != 0 {
            f(XSS_EXIT_BITMAP, field!(m, xss_exit_bitmap));
        }
        f(
            PAGE_FAULT_ERROR_CODE_MASK,
            field!(m, page_fault_error_code_mask),
        );
        f(
            PAGE_FAULT_ERROR_CODE_MATCH,
            field!(m, page_fault_error_code_match),
        );
        // Without virtual-interrupt delivery nobody looks at them, and L1 cannot turn that on without more of this.
        if e.controls.secondary & INTERRUPT_DELIVERY != 0 {
            f(EOI_EXIT_BITMAP0, field!(m, eoi_exit_bitmap0));
            f(EOI_EXIT_BITMAP1, field!(m, eoi_exit_bitmap1));
            f(EOI_EXIT_BITMAP2, field!(m, eoi_exit_bitmap2));
            f(EOI_EXIT_BITMAP3, field!(m, eoi_exit_bitmap3));
        }
        f(
            VM_EXIT_MSR_STORE_COUNT,
            u64::from(read!(self, msr_autostore.nr)),
        );
        f(
            VM_EXIT_MSR_LOAD_COUNT,
            u64::from(read!(self, msr_autoload.host.nr)),
        );
        f(
            VM_ENTRY_MSR_LOAD_COUNT,
            u64::from(read!(self, msr_autoload.guest.nr)),
        );
        f(CR4_GUEST_HOST_MASK, !self.owned_cr4(m));
    }

    /// The fields that are written besides, if they are. What follows may still be left to the stock function, which writes them
    /// again.
    ///
    /// # Safety
    ///
    /// As for `enter`, before it.
    #[inline(always)]
    pub(crate) unsafe fn enter_dirty(self, m: Vmcs12, e: &Entry) {
        if !e.dirty {
            return;
        }
        self.rare_fields(m, e, |field, value| {
            // SAFETY: By this function's contract vmcs02 is current, and these are the values that KVM would write.
            unsafe { vmx::vmwrite_basic(field, value) };
        });
        // vmx_segment_cache_clear().
        // SAFETY: By the invariants of `Vcpu` the cache is this thread's.
        unsafe { (*self.raw()).segment_cache.bitmask = 0 };
    }

    /// What else the stock functions do.
    ///
    /// # Safety
    ///
    /// As for `enter`, in it.
    #[inline(always)]
    pub(super) unsafe fn finish_dirty(self, m: Vmcs12) {
        let owned = self.owned_cr4(m);
        // SAFETY: By the invariants of `Vcpu` all of this is this thread's.
        unsafe {
            let vmx = self.raw();
            (*vmx).nested.tsc_autostore_slot = -1;
            (*vmx).nested.dirty_vmcs12 = false;
            (*vmx).vcpu.arch.cr4_guest_owned_bits = owned as usize;
        }
    }

    /// As `compare_entry`, for what is written besides.
    #[cold]
    pub(super) fn compare_dirty(self, m: Vmcs12, e: &Entry, mut check: impl FnMut(bool, u64)) {
        self.rare_fields(m, e, |field, value| {
            // SAFETY: vmcs02 is current, as it is after nested_vmx_enter_non_root_mode().
            check(unsafe { vmx::vmread(field) } == Some(value), field);
        });
        check(
            read!(self, nested.tsc_autostore_slot) == -1
                && !read!(self, nested.dirty_vmcs12)
                && read!(self, vcpu.arch.cr4_guest_owned_bits) as u64 == self.owned_cr4(m),
            12,
        );
    }
}
