// SPDX-License-Identifier: GPL-2.0
//! The table that KVM itself makes for a guest, its TDP MMU, and faults on it.

use super::{
    ept02::{mark_accessed, shadow_page, ADDRESS, ENTRIES, HUGE, PRESENT},
    vcpu::read,
    vmx, Vcpu,
};
use crate::{bindings, hook::CallId};
use core::sync::atomic::{AtomicU64, Ordering};
use kernel::sync::rcu;

/// FOLL_WRITE of the kernel's get_user_pages().
const FOLL_WRITE: u32 = bindings::MTK_FOLL_WRITE;

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

    /// Guest-physical address, shifted by 12.
    pub(crate) fn page(&self) -> u64 {
        self.0.gfn
    }

    /// The page of an access to one that is not there at all, of ordinary memory: in a slot without any flag (no logging
    /// of writes, not read-only, no memory file of the guest's own). `None` for other faults.
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

    /// How many of `count` pages after the fault's the host has in memory for writing, from the first on, as far
    /// as the slot goes. Does not sleep.
    pub(crate) fn backed(&self, count: usize) -> usize {
        self.get(0, count, |address, count, pages| {
            // SAFETY: The address is checked by the function; there is room for as many pages.
            let got =
                unsafe { bindings::get_user_pages_fast_only(address, count, FOLL_WRITE, pages) };
            got as isize
        })
    }

    /// Has the host get `count` more pages after the first `backed`, as far as the slot goes. Returns how many there
    /// are now in all. May sleep.
    pub(crate) fn populate(&self, backed: usize, count: usize) -> usize {
        backed
            + self.get(backed, count, |address, count, pages| {
                // SAFETY: As above; the current task has the VMM's address space.
                unsafe {
                    bindings::get_user_pages_unlocked(address, count as usize, pages, FOLL_WRITE)
                }
            })
    }

    /// Counts the pages that `how` finds, and gives them back; `skip` more pages after the fault's.
    fn get(
        &self,
        skip: usize,
        count: usize,
        how: impl Fn(usize, i32, *mut *mut bindings::page) -> isize,
    ) -> usize {
        const MOST: usize = 16;
        // SAFETY: As in `plain_page`.
        let Some(slot) = (unsafe { self.0.slot.as_ref() }) else {
            return 0;
        };
        let offset = (self.0.gfn.wrapping_sub(slot.base_gfn)).wrapping_add(1 + skip as u64);
        let left = (slot.npages as u64).saturating_sub(offset);
        let count = (count as u64).min(left) as usize;
        let start = slot.userspace_addr.wrapping_add((offset as usize) << 12);
        let mut found = 0;
        while found < count {
            let mut pages = [core::ptr::null_mut(); MOST];
            let ask = (count - found).min(MOST);
            let got = how(
                start.wrapping_add(found << 12),
                ask as i32,
                pages.as_mut_ptr(),
            );
            let got = usize::try_from(got).unwrap_or(0).min(ask);
            if got != 0 {
                // SAFETY: These references were taken just above.
                unsafe {
                    bindings::release_pages(
                        bindings::release_pages_arg {
                            pages: pages.as_mut_ptr(),
                        },
                        got as i32,
                    );
                }
            }
            found += got;
            if got < ask {
                break;
            }
        }
        found
    }

    /// Asks KVM for the page that is `distance` after the fault's, ahead of any access. Returns whether it is mapped
    /// now. May sleep.
    ///
    /// # Safety
    ///
    /// In the handler of kvm_tdp_page_fault() that the fault is of, and the page is in the same slot.
    pub(crate) unsafe fn ask_for(&self, vcpu: Vcpu, distance: u64) -> bool {
        let mut fault = bindings::kvm_page_fault {
            addr: self.0.addr.wrapping_add(distance << 12),
            gfn: self.0.gfn.wrapping_add(distance),
            prefetch: true,
            ..self.0
        };
        // SAFETY: As KVM's own kvm_tdp_page_prefault() calls it; the copy was taken before the function changed it.
        let ret = unsafe { CallId::TDP_PAGE_FAULT.call([vcpu.key(), (&raw mut fault) as usize]) };
        let mapped = [
            bindings::MTK_RET_PF_FIXED as i32,
            bindings::MTK_RET_PF_SPURIOUS as i32,
        ];
        ret.is_some_and(|r| mapped.contains(&(r as i32)))
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
        if !unsafe { sp.as_ref() }.is_some_and(|sp| sp.tdp_mmu_page) {
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
    fn entry(&self, page: u64) -> &AtomicU64 {
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
