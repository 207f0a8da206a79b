// SPDX-License-Identifier: GPL-2.0
//! Several entries of EPT02 made at once, as kvm_mmu_prefetch_sptes() makes them: its own steps in its own order, of which the
//! one that matters is KVM's mmu_set_spte(). What is saved is what can be had for several pages together: the slot, the
//! look-up of the host's pages, and letting go of them.

use super::{
    ept02::{Leaf, Translation, ENTRIES, PREFETCH},
    host_pages::{Pages, BATCH},
    host_tables::{self, Frames},
};
use crate::{bindings, hook::CallId};

impl Leaf<'_> {
    /// Maps the pages from `gfn` of L1's memory at `index` and after, as many as the host has in memory, writable, from the first
    /// on, at most [`BATCH`]. Returns how many that is. Entries are made "not accessed".
    ///
    /// # Safety
    ///
    /// The entries are empty, no more than `spare_rmap_entries()`, and no addresses are being invalidated.
    pub(crate) unsafe fn map(&self, index: usize, count: usize, to: Translation) -> usize {
        if count > BATCH || index + count > ENTRIES {
            return 0;
        }
        if !CallId::SET_SPTE.is_available() {
            return self.map_by_stock(index, count, to);
        }
        let key = self.vcpu().key();
        // SAFETY: As KVM itself calls it, under its SRCU lock, which keeps the slot alive.
        let slot = unsafe {
            CallId::GFN_TO_MEMSLOT
                .call([key, to.gfn as usize])
                .and_then(|slot| (slot as *const bindings::kvm_memory_slot).as_ref())
        };
        // gfn_to_memslot_dirty_bitmap() and kvm_prefetch_pages().
        let mut unfit = bindings::MTK_MEMSLOT_INVALID as u32 | bindings::KVM_MEM_READONLY;
        if to.access & u64::from(bindings::MTK_ACC_WRITE) != 0 {
            unfit |= bindings::KVM_MEM_LOG_DIRTY_PAGES;
        }
        let Some(slot) = slot.filter(|slot| slot.flags & unfit == 0) else {
            return 0;
        };
        let offset = to.gfn.wrapping_sub(slot.base_gfn);
        let left = (slot.npages as u64).saturating_sub(offset);
        let address = slot.userspace_addr.wrapping_add((offset as usize) << 12);
        let (slot, count) = (core::ptr::from_ref(slot) as usize, count.min(left as usize));
        let set = |n: usize, frame: u64| {
            let (entry, gfn) = (self.pointer(index + n) as usize, to.gfn as usize + n);
            let (access, frame) = (to.access as usize, frame as usize);
            // SAFETY: By the invariants of `Leaf`: as kvm_mmu_prefetch_sptes() calls it, under the lock, with a page that stays
            // meanwhile; the null pointer says that there is no fault.
            unsafe { CallId::SET_SPTE.call([key, slot, entry, access, gfn, frame, 0]) };
        };
        // SAFETY: By the invariants of `Leaf` and this function's contract; a slot's address is one of user space.
        let frames = unsafe { Frames::look_up(address, count) };
        let mut done = 0;
        for &frame in frames.as_slice() {
            set(done, frame);
            // SAFETY: The lock is held.
            unsafe { host_tables::mark_dirty(frame) };
            done += 1;
        }
        if done == count {
            return done;
        }
        let pages = Pages::look_up(address.wrapping_add(done << 12), count - done);
        let found = pages.map_each(|n, page| {
            set(done + n, page.frame());
            true
        });
        done + found
    }

    /// The same with kvm_mmu_prefetch_sptes() itself, on a kernel where mmu_set_spte() cannot be called.
    #[cold]
    fn map_by_stock(&self, index: usize, count: usize, to: Translation) -> usize {
        let mut done = 0;
        while done < count {
            let (first, ask) = (index + done, (count - done).min(PREFETCH));
            let gfn = to.gfn.wrapping_add(done as u64);
            self.prefetch(first, ask, Translation { gfn, ..to });
            let mapped = (first..first + ask).take_while(|&i| self.is_present(i));
            let mapped = mapped.count();
            done += mapped;
            if mapped < ask {
                break;
            }
        }
        done
    }
}
