// SPDX-License-Identifier: GPL-2.0
//! Pages of a hypervisor that KVM keeps it from writing to although they are no tables.
//!
//! KVM shadows a guest's page tables and has it exit when it writes to one. Where the table lies in a large page of the TDP MMU,
//! the right to write is taken from all of that page, and the first write to any of it splits it. From then on each of
//! the 511 others faults when it is written to, for no reason: KVM gives the right back, to that one.
//!
//! Here the others get it at once, as fast_page_fault() gives it, with an exchange of the entry, and where KVM's own
//! mmu_try_to_unsync_pages() says, asked as for a prefetch, that nothing shadows the page but what is out of sync already.

use super::{
    ept02::{ENTRIES, PRESENT},
    mmu_lock::Moment,
    tdp::Table,
    vcpu::read,
    Vcpu,
};
use crate::{
    bindings,
    hook::CallId,
    policy::ept::{ACCESSED, DIRTY, WRITE},
};
use core::{ops::Range, sync::atomic::Ordering};
use kernel::sync::rcu;

/// The host lets KVM write (`shadow_host_writable_mask`).
const HOST_WRITABLE: u64 = bindings::mtk_spte_write_MTK_SPTE_HOST_WRITABLE as u64;
/// Set where KVM's own tables do not forbid writing (`shadow_mmu_writable_mask`), as make_spte() sets it.
const MMU_WRITABLE: u64 = bindings::mtk_spte_write_MTK_SPTE_MMU_WRITABLE as u64;
/// How accessed and dirty flags are used, 0: as the processor does (`SPTE_TDP_AD_MASK`).
const AD_MASK: u64 = bindings::mtk_spte_write_MTK_SPTE_AD_MASK as u64;

/// Most entries that are looked at while the lock is held.
const HOLD: usize = 64;

/// A write to a page that is there and may not be written to, in a slot without any flag (no logging of writes, not read-only, no
/// memory file of the guest's own).
///
/// # Invariants
///
/// `slot` is KVM's own pointer, and KVM's SRCU lock is held: the slot stays in force, and so does what is in it.
pub(crate) struct Write {
    gfn: u64,
    slot: *const bindings::kvm_memory_slot,
}

/// What an entry is expected to become, as of a moment.
#[derive(Clone, Copy)]
pub(crate) struct Expected(u64, Moment);

/// What stock KVM made of it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Just that.
    Same,
    /// Something else.
    Other,
    /// The host has invalidated something meanwhile, or the page has become a table: nothing to compare.
    Gone,
}

impl Write {
    /// `None` for other faults.
    ///
    /// # Safety
    ///
    /// `ptr` is the argument of kvm_tdp_page_fault(), which is yet to run, and this is used up before its caller returns.
    #[inline(always)]
    pub(crate) unsafe fn from_hook(ptr: *const bindings::kvm_page_fault) -> Option<Self> {
        // SAFETY: By this function's contract; only this thread uses it.
        let fault = unsafe { &*ptr };
        if !fault.present || !fault.write || fault.prefetch || fault.rsvd || fault.is_private {
            return None;
        }
        // SAFETY: KVM's own pointer to a slot, alive under KVM's SRCU lock, which the caller of the handler holds.
        let slot = unsafe { fault.slot.as_ref() }?;
        // Without it nothing in the slot was ever shadowed. KVM makes it for the slots that are in force when a VM first
        // has shadow pages; one that is just being replaced would be asked for it in vain.
        let is_tracked = !slot.arch.gfn_write_track.is_null();
        // INVARIANT: As above.
        (slot.flags == 0 && is_tracked).then_some(Self {
            gfn: fault.gfn,
            slot,
        })
    }

    /// Gives back the right to write to the other pages of the same last-level table. Returns to how many; `None` if not even some
    /// could be looked at.
    pub(crate) fn give_back(&self, vcpu: Vcpu) -> Option<usize> {
        let mut given = None;
        for first in (0..ENTRIES).step_by(HOLD) {
            let Some(some) = self.give_back_some(vcpu, first..first + HOLD) else {
                break;
            };
            given = Some(given.unwrap_or(0) + some);
        }
        given
    }

    /// The same for some entries of the table, in one hold of the lock; `None` if there is no such table or somebody waits.
    fn give_back_some(&self, vcpu: Vcpu, indices: Range<usize>) -> Option<usize> {
        let lock = vcpu.share_mmu();
        let rcu = rcu::read_lock();
        if lock.is_contended() {
            return None;
        }
        let table = vcpu.tdp_table(&rcu, self.gfn)?;
        let first = self.gfn / ENTRIES as u64 * ENTRIES as u64;
        let mut given = 0;
        for index in indices {
            let gfn = first + index as u64;
            let entry = table.entry(gfn);
            let old = entry.load(Ordering::Relaxed);
            let Some(new) = self.with_write(vcpu, gfn, old) else {
                continue;
            };
            // What has changed it meanwhile is right, too: the page faults once more.
            let done = entry.compare_exchange(old, new, Ordering::Release, Ordering::Relaxed);
            given += usize::from(done.is_ok());
        }
        Some(given)
    }

    /// What make_spte() would make of the entry `old` for a write; `None` if the guest has no page there, may write already, or must
    /// not. `mmu_lock` is held.
    #[inline]
    fn with_write(&self, vcpu: Vcpu, gfn: u64, old: u64) -> Option<u64> {
        if old & (PRESENT | HOST_WRITABLE | WRITE | AD_MASK) != PRESENT | HOST_WRITABLE {
            return None;
        }
        // SAFETY: By the invariants.
        let (base, count) = unsafe { ((*self.slot).base_gfn, (*self.slot).npages as u64) };
        if gfn.wrapping_sub(base) >= count {
            return None;
        }
        let (synchronizing, prefetch) = (0, 1);
        let args = [
            read!(vcpu, vcpu.kvm) as usize,
            self.slot as usize,
            gfn as usize,
            synchronizing,
            prefetch,
        ];
        // SAFETY: As make_spte() calls it, under the lock, for a page of the slot. For a prefetch it changes nothing and
        // takes no lock.
        let ret = unsafe { CallId::TRY_TO_UNSYNC.call(args) };
        (ret.map(|r| r as i32) == Some(0)).then_some(old | WRITE | MMU_WRITABLE | DIRTY)
    }

    /// What the fault's own entry is expected to become; `None` if KVM has to decide that or there is no last-level table yet.
    pub(crate) fn expected(&self, vcpu: Vcpu) -> Option<Expected> {
        let now = vcpu.now();
        let _lock = vcpu.share_mmu();
        let rcu = rcu::read_lock();
        let table = vcpu.tdp_table(&rcu, self.gfn)?;
        let old = table.entry(self.gfn).load(Ordering::Relaxed);
        if old & MMU_WRITABLE != 0 {
            // What fast_page_fault() makes writable it does not mark dirty.
            return None;
        }
        let new = self.with_write(vcpu, self.gfn, old)?;
        Some(Expected(new, now))
    }

    /// What has become of it, once KVM has served the fault.
    pub(crate) fn outcome(&self, vcpu: Vcpu, expected: Expected) -> Outcome {
        let lock = vcpu.share_mmu();
        let rcu = rcu::read_lock();
        let now = vcpu
            .tdp_table(&rcu, self.gfn)
            .map_or(0, |table: Table<'_>| {
                table.entry(self.gfn).load(Ordering::Relaxed)
            });
        // A write that was served leaves the right to write, unless somebody has made a table of the page since.
        let is_table = now & WRITE == 0 && self.with_write(vcpu, self.gfn, now).is_none();
        if now & PRESENT == 0 || is_table || lock.has_invalidated(expected.1) {
            Outcome::Gone
        } else if (now ^ expected.0) & !ACCESSED == 0 {
            Outcome::Same
        } else {
            Outcome::Other
        }
    }

    /// Frame of the page.
    pub(crate) fn page(&self) -> u64 {
        self.gfn
    }
}
