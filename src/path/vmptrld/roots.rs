// SPDX-License-Identifier: GPL-2.0
//! The roots of EPT02 stay where VMPTRLD and VMCLEAR of L1 would have KVM drop all of them.
//!
//! KVM keeps up to four roots for a vCPU's EPT12s, and finds the one for an EPT pointer again. When L1 makes another VMCS
//! current stock drops them all, so that the next entry looks its root up anew: allocates, brings tables that L1 may have written without KVM
//! noticing (*unsync*) up to date, and flushes, for a KVM that is a guest by an INVEPT that exits. A hypervisor that goes back and forth
//! between VMCSs pays for that on every switch.
//!
//! Here they stay. What L1 could tell by is that tables are brought up to date; so the first time after such a VMPTRLD that a root is
//! put to use (nested_ept_new_eptp()), that is done (kvm_mmu_sync_roots()). It does not flush for everything that it takes away (a
//! right to execute, say: that is L1's to INVEPT), which on stock the flush that follows does, so where there are unsync tables one is asked for
//! here. Otherwise there is nothing to flush: whoever takes something out of EPT02 does. INVEPT and whatever else makes roots invalid finds them
//! at KVM's own places.
//!
//! They are dropped when the vCPU leaves KVM_RUN, when VMX operation ends, when stock code carries out a VMPTRLD or VMCLEAR, and when
//! the path is switched off.

use crate::{
    hook::{CallId, HookId, InFlight},
    kvm::Vcpu,
    state,
};

/// How many roots KVM keeps: the one in use and `KVM_MMU_NUM_PREV_ROOTS`.
const ROOTS: usize = 4;
/// How often L1's EPT is put to use without a VMPTRLD before old roots are given up.
const PATIENCE: u32 = 64;
/// No root.
const NONE: u64 = u64::MAX;

/// What is known of the roots that were kept.
pub(crate) struct OldRoots {
    /// There are some which stock would have dropped.
    kept: bool,
    /// Those that were put to use since, by physical address. They are up to date, as far as stock's are.
    renewed: [u64; ROOTS],
    next: usize,
    /// How often L1's EPT was put to use since.
    uses: u32,
}

impl OldRoots {
    pub(super) const NONE: OldRoots = OldRoots {
        kept: false,
        renewed: [NONE; ROOTS],
        next: 0,
        uses: 0,
    };

    /// Whether there are any, and `renew` has to be called when the vCPU's EPT12 has been put to use.
    #[inline(always)]
    pub(in crate::path) fn are_kept(&self) -> bool {
        self.kept
    }

    /// Whether `keep` has roots to drop, and may sleep.
    #[inline(always)]
    pub(super) fn would_drop(vcpu: Vcpu) -> bool {
        vcpu.has_guest_mmu_roots() && !HookId::NEW_EPTP.is_attached()
    }

    /// Another VMCS becomes current, or none. May sleep.
    #[inline(always)]
    pub(super) fn keep(&mut self, vcpu: Vcpu) {
        if !vcpu.has_guest_mmu_roots() {
            *self = Self::NONE;
        } else if HookId::NEW_EPTP.is_attached() {
            *self = Self {
                kept: true,
                ..Self::NONE
            };
        } else {
            self.drop_all(vcpu);
            vcpu.free_guest_mmu_roots();
        }
    }

    /// Drops those that were kept, as stock had done before. May sleep.
    pub(super) fn drop_all(&mut self, vcpu: Vcpu) {
        if self.kept {
            *self = Self::NONE;
            vcpu.free_guest_mmu_roots();
        }
    }

    /// Whether this root can be put to use without anything to be done about it (`renew`) that takes locks.
    #[cfg(MTK_GVA_WALK)]
    #[inline(always)]
    pub(in crate::path) fn can_use(&self, vcpu: Vcpu, root: u64) -> bool {
        !self.kept
            || self.uses < PATIENCE - 1
                && (self.renewed.contains(&root) || !vcpu.has_unsync_tables())
    }

    /// It is put to use. Without unsync tables there is nothing to bring up to date.
    #[cfg(MTK_GVA_WALK)]
    #[inline(always)]
    pub(in crate::path) fn note_use(&mut self, root: u64) {
        if self.kept {
            self.put_to_use(root);
        }
    }

    /// This root is put to use. Whether it may be older than the last VMPTRLD.
    #[inline(always)]
    fn put_to_use(&mut self, root: u64) -> bool {
        self.uses += 1;
        let old = !self.renewed.contains(&root);
        if old {
            if let Some(place) = self.renewed.get_mut(self.next) {
                *place = root;
            }
            self.next = (self.next + 1) % ROOTS;
        }
        old
    }

    /// An L1 that stays with one VMCS for so long is not going to want old roots: those that were not put to use go, and with
    /// them the care for them.
    #[cold]
    fn give_up(&mut self, vcpu: Vcpu) {
        vcpu.free_previous_roots(|root| !self.renewed.contains(&root));
        *self = Self::NONE;
    }
}

/// The vCPU's EPT12 has been put to use. May sleep, which the section of nested_ept_new_eptp() allows.
pub(in crate::path) fn renew(vcpu: Vcpu, _section: &InFlight) {
    let Some(root) = vcpu.guest_mmu_root() else {
        // KVM is going to make one.
        return;
    };
    let old = state::with(vcpu, |local, counters| {
        let roots = &mut local.regions.roots;
        let old = roots.kept && roots.put_to_use(root);
        if roots.uses >= PATIENCE {
            roots.give_up(vcpu);
            local.regions.publish(&counters.vmptrld);
        }
        old
    });
    if old == Some(true) {
        let flush = vcpu.has_unsync_tables();
        // SAFETY: L2 is being entered on this thread, with KVM's SRCU lock held; `arch.mmu` is the guest's MMU.
        unsafe { CallId::SYNC_ROOTS.call([vcpu.key()]) };
        if flush {
            vcpu.request_tlb_flush();
        }
    }
}
