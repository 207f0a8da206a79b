// SPDX-License-Identifier: GPL-2.0
//! KVM's copy of the shadow VMCS that L1 gave L2 (`nested.cached_shadow_vmcs12`), and the page that it is a copy of.
//!
//! nested_cache_shadow_vmcs12() fetches it with kvm_read_guest_cached() when L1 enters L2, and
//! nested_flush_cached_shadow_vmcs12() writes it back with kvm_write_guest_cached() when L2 exits to L1.

use super::{
    guest_memory::{copy_from_host, copy_to_host, GuestMemory, PAGE},
    vcpu::read,
    Vcpu,
};
use crate::bindings;
use core::{mem::offset_of, ops::Range};

/// How much is copied: all that KVM keeps.
pub(crate) const LEN: usize = bindings::MTK_VMCS12_SIZE as usize;
/// No field ends behind this offset.
pub(crate) const FIELDS_END: u16 =
    core::mem::size_of::<bindings::vmcs12>().next_multiple_of(8) as u16;
const _: () = assert!(LEN == PAGE && core::mem::size_of::<bindings::vmcs12>() <= LEN);

/// The address of the vCPU whose `nested.shadow_vmcs12_cache` this is, if it is one: only arithmetic, which says nothing
/// about what is there. KVM passes a vCPU's cache on the vCPU's own thread only.
#[inline(always)]
pub(crate) fn owner_of(cache: usize) -> *mut bindings::kvm_vcpu {
    let offset = offset_of!(bindings::vcpu_vmx, nested.shadow_vmcs12_cache);
    cache.wrapping_sub(offset) as *mut _
}

impl Vcpu {
    /// The address of the page that KVM copies, next or last (`shadow_vmcs12_cache.gpa`).
    #[inline(always)]
    pub(crate) fn shadow_page_address(self) -> u64 {
        read!(self, nested.shadow_vmcs12_cache.gpa)
    }

    /// Where the VMM has that page. `None` if KVM has to find it first, if it has none, or if somebody logs writes
    /// to it; the same for as long as memory slots are. KVM's SRCU lock is held.
    pub(crate) fn shadow_page_host(self) -> Option<usize> {
        let (slot, host) = self.shadow_cache()?;
        // kvm_slot_dirty_track_enabled(): else mark_page_dirty_in_slot() does nothing.
        let unlogged = slot.flags & bindings::KVM_MEM_LOG_DIRTY_PAGES == 0;
        unlogged.then_some(host)
    }

    /// Where the VMM has the page at this address, if KVM has found it already. KVM's SRCU lock is held.
    pub(crate) fn shadow_page_at(self, address: u64) -> Option<usize> {
        let (_, host) = self.shadow_cache()?;
        (self.shadow_page_address() == address).then_some(host)
    }

    /// What kvm_gfn_to_hva_cache_init() has found, if that still holds.
    fn shadow_cache<'a>(self) -> Option<(&'a bindings::kvm_memory_slot, usize)> {
        let cache = read!(self, nested.shadow_vmcs12_cache);
        // kvm_is_error_hva(): it has failed, and has left the address of the page before.
        if self.slots_generation() != Some(cache.generation) || (cache.hva as isize) < 0 {
            return None;
        }
        // SAFETY: The function found this slot, memory slots being what they are now, and the lock keeps it alive.
        let slot = unsafe { cache.memslot.as_ref() }?;
        Some((slot, cache.hva))
    }

    /// Writes these bytes of the copy to the page. `false` if the stock code has to write all of it; some may be written
    /// then. May sleep.
    ///
    /// # Safety
    ///
    /// In the handler of kvm_write_guest_cached() for this vCPU's copy, or where L2 is about to exit to L1, in KVM_RUN: KVM's SRCU lock is held, and the task
    /// has the VMM's address space.
    pub(crate) unsafe fn write_shadow_page(self, bytes: Range<usize>) -> bool {
        let (Some(copy), Some(host)) = (self.shadow_vmcs12(), self.shadow_page_host()) else {
            return false;
        };
        // SAFETY: KVM's copy is as long as that, and this thread alone writes it.
        let copy = unsafe { core::slice::from_raw_parts(copy, LEN) };
        let Some(changed) = copy.get(bytes.clone()) else {
            return false;
        };
        let to = host.wrapping_add(bytes.start) as u64;
        // SAFETY: A part of the copy.
        unsafe { copy_to_host(to, changed.as_ptr(), changed.len()) }
    }

    /// Reads these bytes of the copy from the page. `false` if the stock code has to read all of it; some may have been read
    /// then. May sleep.
    ///
    /// # Safety
    ///
    /// In the handler of kvm_read_guest_cached() for this vCPU's copy, or where L1 is about to enter L2, otherwise as for `write_shadow_page`.
    pub(crate) unsafe fn read_shadow_page(self, bytes: Range<usize>) -> bool {
        let (Some(copy), Some(host)) = (self.shadow_vmcs12(), self.shadow_page_host()) else {
            return false;
        };
        // SAFETY: KVM's copy is as long as that, and this thread alone reads and writes it.
        let copy = unsafe { core::slice::from_raw_parts_mut(copy, LEN) };
        let from = host.wrapping_add(bytes.start) as u64;
        let Some(stale) = copy.get_mut(bytes) else {
            return false;
        };
        // SAFETY: A part of the copy.
        unsafe { copy_from_host(from, stale.as_mut_ptr(), stale.len()) }
    }

    /// Whether the page holds what the copy does but for these bytes; `None` if it cannot be read. May sleep.
    ///
    /// # Safety
    ///
    /// As for `write_shadow_page`, or in the handler of kvm_read_guest_cached().
    #[cold]
    pub(crate) unsafe fn compare_shadow_page(self, but: Range<usize>) -> Option<bool> {
        let copy = self.shadow_vmcs12()?;
        // SAFETY: As above.
        let copy = unsafe { core::slice::from_raw_parts(copy, LEN) };
        // SAFETY: By this function's contract.
        let mut memory = unsafe { GuestMemory::new(self) };
        let page = memory.page(self.shadow_page_address())?;
        let mut same = true;
        for (index, ours) in copy.chunks_exact(8).enumerate() {
            let theirs = page.read_u64(index)?.to_le_bytes();
            same &= ours
                .iter()
                .zip(theirs)
                .enumerate()
                .all(|(at, (a, b))| *a == b || but.contains(&(index * 8 + at)));
        }
        Some(same)
    }
}
