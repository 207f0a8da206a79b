// SPDX-License-Identifier: GPL-2.0
//! Pages of the VMM's memory, looked up several at a time to be mapped for a guest.

use crate::{bindings, hook::CallId};
use core::{
    mem::MaybeUninit,
    sync::atomic::{AtomicU64, Ordering},
};

/// Most pages at once.
pub(crate) const BATCH: usize = 16;

const RESERVED: u64 = 1 << bindings::MTK_PG_RESERVED;
const DIRTY: u64 = 1 << bindings::MTK_PG_DIRTY;

// A page's flags are its first word.
const _: () = assert!(core::mem::offset_of!(bindings::page, flags) == 0);

/// A page of the host.
///
/// # Invariants
///
/// The caller has a reference to it.
#[derive(Clone, Copy)]
pub(crate) struct Page(*mut bindings::page);

impl Page {
    /// `page_to_pfn()`.
    #[inline(always)]
    pub(crate) fn frame(self) -> u64 {
        // SAFETY: By the invariants an element of the array at `vmemmap_base`, which is constant.
        unsafe {
            self.0
                .offset_from(bindings::vmemmap_base as *const bindings::page) as u64
        }
    }

    /// SetPageDirty(), as kvm_release_page_dirty() does it: the guest may write to the page without the host's being told. `false`,
    /// and nothing, for a part of a larger page (a *tail*), whose flags are elsewhere.
    #[inline(always)]
    fn mark_dirty(self) -> bool {
        // The first word has the flags, the second, in its lowest bit, says whether it is a tail.
        // SAFETY: By the invariants; the kernel changes both atomically.
        let (flags, head) = unsafe {
            (
                AtomicU64::from_ptr(self.0.cast()),
                AtomicU64::from_ptr(self.0.cast::<u64>().add(1)),
            )
        };
        if head.load(Ordering::Relaxed) & 1 != 0 {
            return false;
        }
        if flags.load(Ordering::Relaxed) & (RESERVED | DIRTY) == 0 {
            flags.fetch_or(DIRTY, Ordering::Relaxed);
        }
        true
    }
}

/// Pages that lie side by side in the VMM's memory, each of which may be written.
///
/// # Invariants
///
/// The first `count` are there, each with a reference that is ours.
pub(crate) struct Pages {
    pages: [MaybeUninit<*mut bindings::page>; BATCH],
    count: usize,
}

impl Pages {
    /// Those from an address of the VMM on that the host has in memory, at most `count` and [`BATCH`], from the first on. Does not
    /// sleep.
    #[inline(always)]
    pub(crate) fn look_up(address: usize, count: usize) -> Self {
        Self::get(count, |count, pages| {
            // SAFETY: The address is checked by the function; there is room for as many pages.
            unsafe {
                bindings::get_user_pages_fast_only(address, count, bindings::MTK_FOLL_WRITE, pages)
                    as isize
            }
        })
    }

    /// The same, and the host gets those that it does not have. May sleep.
    pub(crate) fn populate(address: usize, count: usize) -> Self {
        Self::get(count, |count, pages| {
            // SAFETY: As above; the current task has the VMM's address space.
            unsafe {
                bindings::get_user_pages_unlocked(
                    address,
                    count as usize,
                    pages,
                    bindings::MTK_FOLL_WRITE,
                )
            }
        })
    }

    #[inline(always)]
    fn get(count: usize, how: impl FnOnce(i32, *mut *mut bindings::page) -> isize) -> Self {
        let mut pages = [MaybeUninit::uninit(); BATCH];
        let ask = count.min(BATCH);
        let got = how(ask as i32, pages.as_mut_ptr().cast());
        // INVARIANT: As both functions say.
        Self {
            pages,
            count: usize::try_from(got).unwrap_or(0).min(ask),
        }
    }

    /// How many.
    #[inline(always)]
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Calls `map` for one after the other, and notes that the guest may write to it, until `map` says that it has not mapped one.
    /// Returns how many it has mapped, and lets go of all.
    #[inline(always)]
    pub(crate) fn map_each(mut self, mut map: impl FnMut(usize, Page) -> bool) -> usize {
        let (count, mut kept, mut mapped) = (self.count, 0, 0);
        for n in 0..count {
            let Some(raw) = self.pages.get(n) else { break };
            // SAFETY: By the invariants of `Pages`.
            // INVARIANT: As above; it is given up below at the earliest.
            let page = Page(unsafe { raw.assume_init() });
            if mapped == n && map(n, page) {
                mapped += 1;
                if !page.mark_dirty() {
                    // SAFETY: The reference is ours, and is given up.
                    unsafe { CallId::RELEASE_DIRTY.call([page.0 as usize]) };
                    continue;
                }
            }
            if let Some(place) = self.pages.get_mut(kept) {
                place.write(page.0);
                kept += 1;
            }
        }
        // INVARIANT: The others have been given up.
        self.count = kept;
        mapped
    }
}

impl Drop for Pages {
    #[inline(always)]
    fn drop(&mut self) {
        if self.count == 0 {
            return;
        }
        // SAFETY: By the invariants of `Pages`.
        unsafe {
            bindings::release_pages(
                bindings::release_pages_arg {
                    pages: self.pages.as_mut_ptr().cast(),
                },
                self.count as i32,
            );
        }
    }
}
