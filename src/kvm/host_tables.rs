// SPDX-License-Identifier: GPL-2.0
//! The host's own page tables, for frames of the VMM's memory that a guest is about to be given.
//!
//! KVM's get_user_pages_fast_only() walks the tables for each run of pages and takes a reference to each, which is given back as soon as
//! the entry of the guest's table is made: what keeps a page afterwards is the MMU notifier alone. The same notifier keeps
//! it before: whoever takes a page away, or any right to it, begins with mmu_notifier_invalidate_range_start(), and that waits for `mmu_lock`. So what
//! is found in the tables under the lock, while no invalidation is in progress, stays until the lock is given up. (This is the second
//! of the two ways that KVM's comment on host_pfn_mapping_level() names, which walks the tables in the same manner.)

use super::{host_pages::BATCH, vmx};
use crate::{
    bindings,
    policy::{
        operand::{ADDRESS, LARGE},
        registers::{CR4_LA57, CR4_PKE, RFLAGS_IF},
    },
};
use core::{
    arch::asm,
    mem::{offset_of, MaybeUninit},
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

/// Entries in a table.
const ENTRIES: usize = 512;
/// Bits of an entry (SDM volume 3, table 5-20): present, writable, for user space.
const NEEDED: u64 = 0b111;
/// What must not be set at the last level: `_PAGE_SPECIAL`, a frame without a `struct page` of its own, and a protection key.
const UNFIT: u64 = bindings::MTK_PTE_SPECIAL as u64 | 0xf << 59;

/// A page of the kernel's (`struct page`), as far as it is read here: a page's flags are its first word, and the second, in its lowest
/// bit, says whether it is a part of a larger one (a *tail*).
const MAPPING: usize = offset_of!(bindings::page, __bindgen_anon_1.__bindgen_anon_1.mapping);
/// `FOLIO_MAPPING_ANON`: memory of a process, and nothing else's.
const ANON: u64 = bindings::MTK_MAPPING_ANON as u64;
const RESERVED: u64 = 1 << bindings::MTK_PG_RESERVED;
const DIRTY: u64 = 1 << bindings::MTK_PG_DIRTY;

/// Frames of pages that lie side by side in the VMM's memory.
pub(super) struct Frames {
    frames: [MaybeUninit<u64>; BATCH],
    count: usize,
}

/// Interrupts of this processor off, so that no table is freed (`mmu_gather` waits for an interrupt that it sends).
struct Quiet(u64);

impl Quiet {
    #[inline(always)]
    fn begin() -> Self {
        let flags;
        // SAFETY: Saves RFLAGS and clears IF, which `drop` restores. Nothing else is touched.
        unsafe { asm!("pushfq", "pop {}", "cli", out(reg) flags) };
        Self(flags)
    }
}

impl Drop for Quiet {
    #[inline(always)]
    fn drop(&mut self) {
        if self.0 & RFLAGS_IF != 0 {
            // SAFETY: Interrupts were on before.
            unsafe { asm!("sti") };
        }
    }
}

/// Whether the protection key 0, which all but a few pages have, lets this task write (`__pkru_allows_pkey()`).
#[inline(always)]
fn key_0_is_open(cr4: u64) -> bool {
    // SAFETY: CR4.PKE is on where this is executed.
    cr4 & CR4_PKE == 0 || unsafe { vmx::rdpkru() } & 0b11 == 0
}

impl Frames {
    /// Those from `address` on, at most `count`, [`BATCH`] and as many as one table has, from the first on, that get_user_pages_fast_only()
    /// would get for writing: ordinary pages of 4 KiB of the process's own. All others are left to it.
    ///
    /// # Safety
    ///
    /// The current task has the VMM's address space, in which the address is one of user space; it holds `mmu_lock`, no invalidation is in
    /// progress, and what is returned is used before the lock is given up.
    #[inline(always)]
    pub(super) unsafe fn look_up(address: usize, count: usize) -> Self {
        let mut out = Self {
            frames: [MaybeUninit::uninit(); BATCH],
            count: 0,
        };
        let (cr3, cr4): (u64, u64);
        // SAFETY: Reads registers.
        unsafe {
            asm!("mov {}, cr3", "mov {}, cr4", out(reg) cr3, out(reg) cr4, options(nomem, nostack))
        };
        if !key_0_is_open(cr4) {
            return out;
        }
        let top = if cr4 & CR4_LA57 != 0 { 5 } else { 4 };
        let first = (address >> 12) % ENTRIES;
        let range = first..(first + count.min(BATCH)).min(ENTRIES);
        let quiet = Quiet::begin();
        let mut table = cr3 & ADDRESS;
        for level in (2..=top).rev() {
            let index = address >> (12 + 9 * (level - 1)) & (ENTRIES - 1);
            // SAFETY: A table of the address space that the task has, which stays while interrupts are off.
            let entry = unsafe { entry(table, index) };
            if entry & NEEDED != NEEDED || entry & LARGE != 0 {
                return out;
            }
            table = entry & ADDRESS;
        }
        // SAFETY: As above.
        unsafe { out.take(table, range) };
        drop(quiet);
        out
    }

    /// # Safety
    ///
    /// `table` is a last-level table, which stays; the range is within.
    #[inline(always)]
    unsafe fn take(&mut self, table: u64, range: Range<usize>) {
        for (index, frame) in range.zip(&mut self.frames) {
            // SAFETY: By this function's contract.
            let entry = unsafe { entry(table, index) };
            if entry & (NEEDED | UNFIT) != NEEDED {
                break;
            }
            // SAFETY: A page that is present and not special has a `struct page`.
            if !unsafe { is_plain((entry & ADDRESS) >> 12) } {
                break;
            }
            frame.write((entry & ADDRESS) >> 12);
            self.count += 1;
        }
    }

    /// They.
    #[inline(always)]
    pub(super) fn as_slice(&self) -> &[u64] {
        // SAFETY: `take` has written as many.
        unsafe { core::slice::from_raw_parts(self.frames.as_ptr().cast(), self.count) }
    }
}

/// # Safety
///
/// `table` is the physical address of a page of entries, which stays; `index` is below 512.
#[inline(always)]
unsafe fn entry(table: u64, index: usize) -> u64 {
    // SAFETY: By this function's contract; the processor and the kernel change entries atomically.
    unsafe {
        AtomicU64::from_ptr(vmx::virtual_address(table).cast::<u64>().add(index))
            .load(Ordering::Relaxed)
    }
}

/// # Safety
///
/// The frame has a `struct page`, `offset` is of a word of it.
#[inline(always)]
unsafe fn page_word<'a>(frame: u64, offset: usize) -> &'a AtomicU64 {
    // SAFETY: By this function's contract; an element of the array at `vmemmap_base`, which is constant. The kernel changes it atomically.
    unsafe {
        let page = (bindings::vmemmap_base as *mut bindings::page).add(frame as usize);
        AtomicU64::from_ptr(page.byte_add(offset).cast())
    }
}

/// Whether a page is a process's own, so neither a device's nor secret memory, and not a part of a larger one.
///
/// # Safety
///
/// The frame has a `struct page`.
#[inline(always)]
unsafe fn is_plain(frame: u64) -> bool {
    // SAFETY: By this function's contract.
    let (second, mapping) = unsafe { (page_word(frame, 8), page_word(frame, MAPPING)) };
    second.load(Ordering::Relaxed) & 1 == 0 && mapping.load(Ordering::Relaxed) & ANON != 0
}

/// SetPageDirty(), as kvm_release_page_dirty() does it: the guest may write to the page without the host's being told.
///
/// # Safety
///
/// The frame is of `Frames`, under the same hold of the lock.
#[inline(always)]
pub(super) unsafe fn mark_dirty(frame: u64) {
    // SAFETY: By this function's contract.
    let flags = unsafe { page_word(frame, 0) };
    if flags.load(Ordering::Relaxed) & (RESERVED | DIRTY) == 0 {
        flags.fetch_or(DIRTY, Ordering::Relaxed);
    }
}
