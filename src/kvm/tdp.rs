// SPDX-License-Identifier: GPL-2.0
//! The table that KVM itself makes for a guest, its TDP MMU, and faults on it.

use super::{
    ept02::{mark_accessed, shadow_page, ADDRESS, ENTRIES, HUGE, PRESENT},
    host_pages::Pages,
    mmu_lock::Moment,
    vcpu::read,
    vmx, Vcpu,
};
use crate::{bindings, hook::CallId};
use core::sync::atomic::{AtomicU64, Ordering};
use kernel::sync::rcu;

/// A copy of `struct kvm_page_fault`, as kvm_tdp_page_fault() gets it, to ask for other pages in the same way.
pub(crate) struct Fault(bindings::kvm_page_fault);

impl Fault {
    /// # Safety
    ///
    /// `ptr` is the argument of kvm_tdp_page_fault(), which is yet to run.
    pub(crate) unsafe fn copy(ptr: *const bindings::kvm_page_fault) -> Self {
        // SAFETY: By this function's contract; plain data.
        Self(unsafe { ptr.read() })
    }

    /// The page of an access to one that is not there at all, of ordinary memory: in a slot without any flag (no logging
    /// of writes, not read-only, no memory file of the guest's own) of an ordinary VM. `None` for other faults.
    ///
    /// # Safety
    ///
    /// As for `copy`.
    #[inline(always)]
    pub(crate) unsafe fn plain_page(ptr: *const bindings::kvm_page_fault) -> Option<u64> {
        // SAFETY: By this function's contract; only this thread uses it.
        let fault = unsafe { &*ptr };
        if fault.prefetch || fault.present || fault.rsvd || fault.is_private {
            return None;
        }
        // SAFETY: KVM's own pointer to a slot, alive under KVM's SRCU lock, which the caller of the handler holds.
        let slot = unsafe { fault.slot.as_ref() }?;
        (slot.flags == 0).then_some(fault.gfn)
    }

    /// Those of `count` pages that are `distance` and more after the fault's which the host has in memory for writing, from the
    /// first on, as far as the slot goes. Does not sleep.
    pub(crate) fn look_up(&self, distance: u64, count: usize) -> Pages {
        let (address, left) = self.place(distance);
        Pages::look_up(address, count.min(left))
    }

    /// The same, and the host gets those that it does not have. May sleep.
    pub(crate) fn populate(&self, distance: u64, count: usize) -> Pages {
        let (address, left) = self.place(distance);
        Pages::populate(address, count.min(left))
    }

    /// Where the VMM has the page that is `distance` after the fault's, and how many are left in the slot from there on.
    fn place(&self, distance: u64) -> (usize, usize) {
        // SAFETY: As in `plain_page`.
        let Some(slot) = (unsafe { self.0.slot.as_ref() }) else {
            return (0, 0);
        };
        let offset = (self.0.gfn.wrapping_sub(slot.base_gfn)).wrapping_add(distance);
        let left = (slot.npages as u64).saturating_sub(offset);
        let address = slot.userspace_addr.wrapping_add((offset as usize) << 12);
        (address, left as usize)
    }

    /// Has KVM map pages that are `distance` and more after the fault's, looked up after `since`, as it does itself once it has the
    /// page of a fault (kvm_tdp_mmu_page_fault()). Gives up, also when somebody waits for the lock. Returns how many are mapped now.
    /// May sleep.
    ///
    /// They are in the fault's own last-level table, where KVM has just decided for a page of 4 KiB, so that is what they are.
    pub(crate) fn map(&self, vcpu: Vcpu, distance: u64, pages: Pages, since: Moment) -> usize {
        // For the tables, should somebody take this one away.
        if !vcpu.refill_mmu_caches(false) {
            return 0;
        }
        let lock = vcpu.share_mmu();
        let rcu = rcu::read_lock();
        let first = self.0.gfn.wrapping_add(distance);
        let Some(table) = vcpu
            .tdp_table(&rcu, self.0.gfn)
            .filter(|_| !lock.has_invalidated(since))
        else {
            return 0;
        };
        pages.map_each(|n, page| {
            let gfn = first.wrapping_add(n as u64);
            if gfn / ENTRIES as u64 != self.0.gfn / ENTRIES as u64 || n != 0 && lock.is_contended()
            {
                return false;
            }
            let mut mapped = table.is_present(gfn);
            if !mapped {
                let mut fault = bindings::kvm_page_fault {
                    addr: self
                        .0
                        .addr
                        .wrapping_add((gfn.wrapping_sub(self.0.gfn)) << 12),
                    gfn,
                    prefetch: true,
                    max_level: 1,
                    pfn: page.frame(),
                    map_writable: true,
                    refcounted_page: core::ptr::null_mut(),
                    ..self.0
                };
                let args = [vcpu.key(), (&raw mut fault) as usize];
                // SAFETY: As kvm_tdp_mmu_page_fault() calls it, under the lock and after the same check for invalidations, with a page
                // that is referenced. The copy was taken before the function changed it.
                let ret = unsafe { CallId::TDP_MMU_MAP.call(args) };
                let done = [
                    bindings::MTK_RET_PF_FIXED as i32,
                    bindings::MTK_RET_PF_SPURIOUS as i32,
                ];
                mapped = ret.is_some_and(|r| done.contains(&(r as i32)));
            }
            if mapped && super::runs_on_hypervisor() {
                table.mark_accessed(gfn);
            }
            mapped
        })
    }
}

/// A last-level table of the TDP MMU. Entries may change under it at any time.
///
/// # Invariants
///
/// The table is alive as long as the RCU lock is held, `rcu`.
pub(crate) struct Table<'r> {
    _rcu: &'r rcu::Guard,
    entries: *const AtomicU64,
}

impl Vcpu {
    /// The last-level table for `page`; `None` if there is none or another kind of MMU is in use.
    pub(crate) fn tdp_table<'r>(self, rcu: &'r rcu::Guard, page: u64) -> Option<Table<'r>> {
        let mmu = read!(self, vcpu.arch.mmu);
        // SAFETY: KVM's own pointer to one of the vCPU's MMUs.
        let (root, role) = unsafe { ((*mmu).root.hpa, (*mmu).root_role.__bindgen_anon_1) };
        let top = role.level();
        if root == u64::MAX
            || !(4..=5).contains(&top)
            || role.direct() == 0
            || role.ad_disabled() != 0
        {
            return None;
        }
        let sp = shadow_page(root);
        // SAFETY: `root_to_sp()`; a root that is in use stays. The page of zeroes has none.
        let sp = unsafe { sp.as_ref() }.filter(|sp| sp.tdp_mmu_page)?;
        // `is_obsolete_sp()`.
        // SAFETY: Plain data.
        if unsafe { sp.role.__bindgen_anon_1 }.invalid() != 0 {
            return None;
        }
        let mut table = root;
        for level in (2..=top).rev() {
            let index = (page >> (9 * (level - 1))) as usize % ENTRIES;
            // SAFETY: `table` is a page of entries of the TDP MMU, which frees them after a grace period.
            let entry = unsafe { entry_of(table, index).load(Ordering::Acquire) };
            if entry & PRESENT == 0 || entry & HUGE != 0 {
                return None;
            }
            table = entry & ADDRESS;
        }
        // INVARIANT: Found under the RCU lock.
        Some(Table {
            _rcu: rcu,
            entries: vmx::virtual_address(table).cast(),
        })
    }
}

/// # Safety
///
/// `table` is the physical address of a page of entries that outlives `'a`; `index` is below 512.
unsafe fn entry_of<'a>(table: u64, index: usize) -> &'a AtomicU64 {
    // SAFETY: By this function's contract; the processor and KVM change entries atomically.
    unsafe { &*vmx::virtual_address(table).cast::<AtomicU64>().add(index) }
}

impl Table<'_> {
    /// The entry for a page.
    pub(super) fn entry(&self, page: u64) -> &AtomicU64 {
        // SAFETY: By the invariants of `Table`.
        unsafe { &*self.entries.add(page as usize % ENTRIES) }
    }

    /// Whether the guest has the page.
    pub(crate) fn is_present(&self, page: u64) -> bool {
        self.entry(page).load(Ordering::Relaxed) & PRESENT != 0
    }

    /// Sets the accessed flag of a page that is there, as the processor does at any time.
    pub(crate) fn mark_accessed(&self, page: u64) {
        mark_accessed(self.entry(page));
    }
}
