// SPDX-License-Identifier: GPL-2.0
//! The VPIDs (SDM volume 3, 30.1) with which a vCPU runs.
//!
//! KVM has two for a vCPU: `vmx->vpid` for L1, and for an L2 to which L1 gives none; `nested.vpid02` for an L2 to which L1 gives one.

use super::{fields::encoding::VIRTUAL_PROCESSOR_ID, vcpu::read, vmcs12::field, vmx, Vcpu, Vmcs12};
use crate::{hook::CallId, policy::controls::secondary::VPID};
use core::sync::atomic::{AtomicU32, Ordering};

/// IA32_VMX_EPT_VPID_CAP (SDM appendix A.10).
const IA32_VMX_EPT_VPID_CAP: u32 = 0x48c;
/// In it: INVVPID, and its type 2, all contexts.
const INVVPID_ALL: u64 = 1 << 32 | 1 << 42;

/// One of a vCPU's two VPIDs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tag {
    /// `vmx->vpid`.
    L1,
    /// `vmx->nested.vpid02`.
    L2,
}

impl Vmcs12 {
    /// `nested_cpu_has_vpid()`.
    #[inline(always)]
    fn has_vpid(self) -> bool {
        self.secondary_controls() & VPID != 0
    }
}

impl Vcpu {
    /// Whether the VPID in vmcs12 is not 0.
    #[inline(always)]
    pub(crate) fn names_vpid(self) -> bool {
        self.vmcs12()
            .is_some_and(|m| field!(m, virtual_processor_id) != 0)
    }

    /// A VPID of the vCPU; 0 if it has none.
    #[inline(always)]
    pub(crate) fn vpid(self, tag: Tag) -> u16 {
        match tag {
            Tag::L1 => read!(self, vpid) as u16,
            Tag::L2 => read!(self, nested.vpid02),
        }
    }

    /// Has KVM use another VPID, which is written to no VMCS.
    ///
    /// # Safety
    ///
    /// It was allocated by `allocate_vpid()`, and so was the old one, which becomes the caller's as this becomes KVM's.
    #[inline(always)]
    pub(crate) unsafe fn set_vpid(self, tag: Tag, vpid: u16) {
        // SAFETY: By the invariants of `Vcpu` only this thread changes them.
        unsafe {
            match tag {
                Tag::L1 => (&raw mut (*self.raw()).vpid).write(vpid.into()),
                Tag::L2 => (&raw mut (*self.raw()).nested.vpid02).write(vpid),
            }
        }
    }

    /// Which VPID L2 runs with, or would: prepare_vmcs02_early_rare() and nested_get_vpid02().
    #[inline(always)]
    fn tag_of_l2(self) -> Tag {
        let own = self.vmcs12().is_some_and(Vmcs12::has_vpid) && self.vpid(Tag::L2) != 0;
        if own {
            Tag::L2
        } else {
            Tag::L1
        }
    }

    /// Which VPID the guest runs with that is about to run: `vmx_get_current_vpid()`.
    #[inline(always)]
    pub(crate) fn current_tag(self) -> Tag {
        if self.guest_mode() {
            self.tag_of_l2()
        } else {
            Tag::L1
        }
    }

    /// Writes the VPID that KVM means to the current VMCS.
    ///
    /// # Safety
    ///
    /// The vCPU is loaded on this CPU with VPIDs in use, and the current VMCS is what the guest is about to run on.
    #[inline(always)]
    pub(crate) unsafe fn write_current_vpid(self) {
        let vpid = self.vpid(self.current_tag());
        // SAFETY: By this function's contract, and as prepare_vmcs02_early_rare() and init_vmcs() do.
        unsafe { vmx::vmwrite_basic(VIRTUAL_PROCESSOR_ID, vpid.into()) };
    }

    /// Whether the current VMCS has the VPID that KVM means.
    ///
    /// # Safety
    ///
    /// As for `write_current_vpid`.
    pub(crate) unsafe fn has_current_vpid(self) -> bool {
        let vpid = self.vpid(self.current_tag());
        // SAFETY: By this function's contract.
        unsafe { vmx::vmread_basic(VIRTUAL_PROCESSOR_ID) == u64::from(vpid) }
    }

    /// Writes the VPIDs that KVM means to vmcs01 and, in VMX operation, or if SMM has interrupted that, vmcs02.
    ///
    /// # Safety
    ///
    /// Preemption is off and the vCPU is loaded on this CPU, with VPIDs in use.
    pub(crate) unsafe fn write_both_vpids(self) {
        let write = |tag| {
            let vpid = self.vpid(tag);
            // SAFETY: By this function's contract; as in `write_current_vpid`.
            move || unsafe { vmx::vmwrite_basic(VIRTUAL_PROCESSOR_ID, vpid.into()) }
        };
        let interrupted = read!(self, nested.smm.vmxon);
        // SAFETY: By this function's contract.
        unsafe {
            self.with_vmcs01(write(Tag::L1));
            if self.vmxon() || interrupted {
                // For another vmcs12 than the last, or a changed one, KVM writes the field anew before it is used.
                self.with_vmcs02(write(self.tag_of_l2()));
            }
        }
    }
}

/// Whether the processor flushes all VPIDs at once.
///
/// # Safety
///
/// kvm_intel uses EPT or VPIDs, so that the processor has the register.
pub(crate) unsafe fn can_flush_all() -> bool {
    // SAFETY: By this function's contract.
    let cap = unsafe { vmx::rdmsr(IA32_VMX_EPT_VPID_CAP) };
    cap & INVVPID_ALL == INVVPID_ALL
}

/// How many VPIDs the module has taken beyond those that KVM means to have.
static TAKEN: AtomicU32 = AtomicU32::new(0);
/// As many of the 65,535 as it may take: a vCPU for which KVM finds none runs without.
const MOST_TAKEN: u32 = 1 << 14;

/// Takes a VPID that nobody has: `allocate_vpid()`. `None` if there is none left, or none for us.
pub(crate) fn allocate() -> Option<u16> {
    if TAKEN.fetch_add(1, Ordering::Relaxed) < MOST_TAKEN {
        // SAFETY: Takes a spinlock and a bit of KVM's bitmap.
        let vpid = unsafe { CallId::ALLOCATE_VPID.call([]) }.map_or(0, |vpid| vpid as u32);
        let vpid = u16::try_from(vpid).ok().filter(|&vpid| vpid != 0);
        if vpid.is_some() {
            return vpid;
        }
    }
    TAKEN.fetch_sub(1, Ordering::Relaxed);
    None
}

/// Gives one back: `free_vpid()`.
///
/// # Safety
///
/// It came from `allocate`, or from KVM in exchange, and no VMCS has it.
pub(crate) unsafe fn free(vpid: u16) {
    // SAFETY: By this function's contract.
    unsafe { CallId::FREE_VPID.call([vpid.into()]) };
    TAKEN.fetch_sub(1, Ordering::Relaxed);
}
