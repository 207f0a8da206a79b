// SPDX-License-Identifier: GPL-2.0
//! All tables that KVM keeps of a VM's EPT12s, for a reader who wants to see them all.
//!
//! KVM finds a shadow page by a hash of the frame where the guest has the table. The buckets are walked in their order,
//! so that the lock can be given up at any point: what exists all the while is seen.

use super::{
    ept02::{shadow_page, ADDRESS, ENTRIES, HUGE, PRESENT},
    srcu::ReadLock,
    vcpu::read,
    Vcpu,
};
use crate::{bindings, hook::CallId, policy::reach::Place};
use core::{
    marker::PhantomData,
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

/// Entries that are looked at under one hold of the lock.
pub(crate) const CHUNK: usize = 64;
/// Buckets that are looked into under one hold of the lock.
const BUCKETS_AT_ONCE: usize = 512;
const BUCKETS: usize = bindings::MTK_MMU_HASH;

/// A VM.
///
/// # Invariants
///
/// The VM stays while this is in use.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Vm {
    kvm: *mut bindings::kvm,
    reserved: u64,
}

// SAFETY: All that is done with the pointer is done under the VM's own locks.
unsafe impl Send for Vm {}
// SAFETY: As above.
unsafe impl Sync for Vm {}

impl Vm {
    /// The VM of a vCPU on whose thread we are.
    pub(crate) fn of(vcpu: Vcpu) -> Self {
        Self {
            kvm: read!(vcpu, vcpu.kvm),
            reserved: vcpu.reserved_gpa_bits(),
        }
    }

    /// # Safety
    ///
    /// The vCPU, and so its VM, stays while what this returns is in use.
    pub(crate) unsafe fn from_raw(vcpu: *mut bindings::kvm_vcpu) -> Self {
        // SAFETY: By this function's contract; the first never changes, the second is a plain word.
        let (kvm, reserved) = unsafe {
            (
                (&raw const (*vcpu).kvm).read(),
                (&raw const (*vcpu).arch.reserved_gpa_bits).read_volatile(),
            )
        };
        Self { kvm, reserved }
    }

    /// Whether it is the same VM.
    pub(crate) fn is(self, other: Vm) -> bool {
        core::ptr::eq(self.kvm, other.kvm)
    }

    /// Address bits that the guest's processor does not have.
    pub(crate) fn reserved_gpa_bits(self) -> u64 {
        self.reserved
    }

    /// The address space of its VMM.
    pub(crate) fn mm(self) -> *mut bindings::mm_struct {
        // SAFETY: By the invariants of `Vm`; constant.
        unsafe { (*self.kvm).mm }
    }

    /// Takes the locks under which tables and slots stay as they are.
    ///
    /// # Safety
    ///
    /// The current task has the VMM's address space. It does not hold `mmu_lock`.
    pub(crate) unsafe fn lock(&self) -> Tables<'_> {
        // SAFETY: By the invariants of `Vm`.
        let srcu = unsafe { ReadLock::take(self.kvm) };
        // SAFETY: As above, and by this function's contract.
        unsafe { bindings::_raw_write_lock(&raw mut (*self.kvm).mmu_lock) };
        // INVARIANT: Both are held until `drop`.
        Tables {
            vm: self,
            _srcu: srcu,
        }
    }
}

/// The shadow pages of a VM.
///
/// # Invariants
///
/// `mmu_lock` is held for writing, so that no table changes but for accessed and dirty flags and rights that
/// fast_page_fault() restores, and KVM's SRCU lock, so that slots stay. The current task has the VMM's address space.
pub(crate) struct Tables<'v> {
    vm: &'v Vm,
    _srcu: ReadLock,
}

impl Drop for Tables<'_> {
    fn drop(&mut self) {
        // SAFETY: Taken in `lock`.
        unsafe { bindings::_raw_write_unlock(&raw mut (*self.vm.kvm).mmu_lock) };
    }
}

/// How far a walk has come.
#[derive(Default)]
pub(crate) struct Cursor {
    bucket: usize,
    /// Table in the bucket.
    nth: usize,
    /// Entry in the table.
    entry: usize,
}

impl Cursor {
    /// Leaves out the rest of the table of which some entries came last.
    pub(crate) fn leave_table(&mut self) {
        if self.entry != 0 {
            self.entry = 0;
            self.nth += 1;
        }
    }
}

/// What is next in a walk.
pub(crate) enum Next<'l> {
    /// These entries of a table.
    Entries(Table<'l>, Range<usize>),
    /// Nothing yet: give up the lock and go on.
    Later,
    /// Nothing more.
    End,
}

impl Tables<'_> {
    /// Whether the host is invalidating addresses, so that what it has where may change.
    pub(crate) fn is_invalidating(&self) -> bool {
        // SAFETY: By the invariants of `Vm` and `Tables`.
        unsafe { (&raw const (*self.vm.kvm).mmu_invalidate_in_progress).read() != 0 }
    }

    /// The entries that come next.
    pub(crate) fn next(&self, cursor: &mut Cursor) -> Next<'_> {
        // SAFETY: By the invariants of `Vm`. KVM makes the hash once, with a release.
        let hash = unsafe { (*self.vm.kvm).arch.mmu_page_hash };
        if hash.is_null() {
            return Next::End;
        }
        let end = cursor.bucket + BUCKETS_AT_ONCE;
        while cursor.bucket < BUCKETS.min(end) {
            if let Some(table) = self.nth(hash, cursor.bucket, cursor.nth) {
                let first = cursor.entry;
                cursor.entry += CHUNK;
                if cursor.entry >= ENTRIES {
                    cursor.entry = 0;
                    cursor.nth += 1;
                }
                return Next::Entries(table, first..(first + CHUNK).min(ENTRIES));
            }
            cursor.bucket += 1;
            (cursor.nth, cursor.entry) = (0, 0);
        }
        if cursor.bucket < BUCKETS {
            Next::Later
        } else {
            Next::End
        }
    }

    /// The table of this number in a bucket.
    fn nth(&self, hash: *mut bindings::hlist_head, bucket: usize, nth: usize) -> Option<Table<'_>> {
        // SAFETY: The hash has `BUCKETS` heads, and under the lock its lists stay as they are.
        let mut node = unsafe { (*hash.add(bucket)).first };
        for _ in 0..nth {
            // SAFETY: As above; a node of the list.
            node = unsafe { node.as_ref() }?.next;
        }
        if node.is_null() {
            return None;
        }
        let offset = core::mem::offset_of!(bindings::kvm_mmu_page, hash_link);
        // SAFETY: A node of the list is in a shadow page.
        Some(unsafe { self.table(node.byte_sub(offset).cast()) })
    }

    /// # Safety
    ///
    /// `page` is a shadow page in use.
    unsafe fn table(&self, page: *const bindings::kvm_mmu_page) -> Table<'_> {
        // SAFETY: By this function's contract; it stays under the lock.
        let page = unsafe { &*page };
        // SAFETY: Under the lock.
        let generation = unsafe { (&raw const (*self.vm.kvm).arch.mmu_valid_gen).read() };
        // SAFETY: Plain data.
        let obsolete = unsafe { page.__bindgen_anon_1.mmu_valid_gen } != generation;
        Table {
            lock: PhantomData,
            page,
            obsolete,
        }
    }

    /// The table that an entry of another one leads to.
    pub(crate) fn child(&self, entry: u64) -> Option<Table<'_>> {
        let page = shadow_page(entry & ADDRESS);
        // SAFETY: `spte_to_child_sp()`: what a present entry leads to is in use.
        (!page.is_null()).then(|| unsafe { self.table(page) })
    }

    /// The ordinary memory slot of a frame; `None` if it is in none.
    pub(crate) fn slot(&self, gfn: u64) -> Option<Slot> {
        // SAFETY: As KVM itself calls it, under its SRCU lock.
        let slot = unsafe { CallId::VM_GFN_TO_MEMSLOT.call([self.vm.kvm as usize, gfn as usize]) }?;
        // SAFETY: A slot that KVM names is alive under that lock.
        let slot = unsafe { (slot as *const bindings::kvm_memory_slot).as_ref() }?;
        let offset = gfn.wrapping_sub(slot.base_gfn);
        let logs = slot.flags & bindings::KVM_MEM_LOG_DIRTY_PAGES != 0;
        let in_log = (logs && !slot.dirty_bitmap.is_null()).then(|| {
            // SAFETY: The log has a bit for each page of the slot; KVM sets and clears bits atomically.
            let word = unsafe {
                AtomicU64::from_ptr(slot.dirty_bitmap.cast::<u64>().add(offset as usize / 64))
                    .load(Ordering::Relaxed)
            };
            word >> (offset % 64) & 1 != 0
        });
        Some(Slot {
            address: slot.userspace_addr.wrapping_add((offset as usize) << 12),
            read_only: slot.flags & bindings::KVM_MEM_READONLY != 0,
            moving: slot.flags as usize & bindings::MTK_MEMSLOT_INVALID != 0,
            private: i64::from(slot.id) >= bindings::MTK_USER_MEM_SLOTS as i64,
            in_log,
        })
    }

    /// Reads entries of the guest's table at frame `gfn`, without sleeping. `false` if they cannot be read now.
    pub(crate) fn read_guest(&self, gfn: u64, range: &Range<usize>, to: &mut [u64; CHUNK]) -> bool {
        let Some(slot) = self.slot(gfn).filter(|slot| !slot.moving) else {
            return false;
        };
        let from = slot.address.wrapping_add(range.start * 8);
        let bytes = range.len().min(CHUNK) * 8;
        // SAFETY: There is room for as much; the function checks the address.
        unsafe {
            bindings::copy_from_user_nofault(to.as_mut_ptr().cast(), from as *const _, bytes) == 0
        }
    }

    /// The host's frame at an address of the VMM; `None` if that cannot be told without sleeping.
    pub(crate) fn frame(&self, address: usize, writable: bool) -> Option<u64> {
        let flags = if writable {
            bindings::MTK_FOLL_WRITE
        } else {
            0
        };
        let mut page = core::ptr::null_mut();
        // SAFETY: The function checks the address; there is room for one page.
        let got = unsafe { bindings::get_user_pages_fast_only(address, 1, flags, &mut page) };
        if got != 1 {
            return None;
        }
        // SAFETY: `page_to_pfn()`: an element of the array at `vmemmap_base`; the reference was taken just above.
        unsafe {
            let frame = page.offset_from(bindings::vmemmap_base as *const bindings::page);
            bindings::release_pages(bindings::release_pages_arg { pages: &mut page }, 1);
            Some(frame as u64)
        }
    }
}

/// A memory slot, as far as one frame goes.
pub(crate) struct Slot {
    /// Where the VMM has the frame.
    pub(crate) address: usize,
    /// The VMM allows no writes.
    pub(crate) read_only: bool,
    /// It is being moved or deleted.
    pub(crate) moving: bool,
    /// It is KVM's own.
    pub(crate) private: bool,
    /// Whether the frame is in the log of writes; `None` if there is none.
    pub(crate) in_log: Option<bool>,
}

/// A shadow page.
///
/// # Invariants
///
/// It stays while the lock is held, and so do its entries.
pub(crate) struct Table<'l> {
    lock: PhantomData<&'l ()>,
    page: &'l bindings::kvm_mmu_page,
    obsolete: bool,
}

impl Table<'_> {
    /// Whether it shadows a table of EPT12, or (`direct`) a large page of one, and is in use. (Every vCPU that still
    /// has one that is obsolete leaves it before it enters its guest.)
    pub(crate) fn is_of_ept02(&self) -> bool {
        // SAFETY: Plain data.
        let role = unsafe { self.page.role.__bindgen_anon_1 };
        !self.page.tdp_mmu_page
            && !self.obsolete
            && role.guest_mode() != 0
            && role.smm() == 0
            && role.invalid() == 0
            && role.passthrough() == 0
            && role.has_4_byte_gpte() == 0
    }

    /// Level, 1 to 5.
    pub(crate) fn level(&self) -> u32 {
        // SAFETY: Plain data.
        unsafe { self.page.role.__bindgen_anon_1 }.level()
    }

    /// Frame of the table of EPT12, or the first frame of what a direct table maps; and the rights that came down to it.
    pub(crate) fn place(&self) -> Place {
        // SAFETY: Plain data.
        let role = unsafe { self.page.role.__bindgen_anon_1 };
        Place {
            gfn: self.page.gfn,
            access: u64::from(role.access()),
        }
    }

    /// Everything that the table is a shadow of, as one word.
    pub(crate) fn role(&self) -> u32 {
        // SAFETY: Plain data.
        unsafe { self.page.role.word }
    }

    /// Whether it maps a part of a large page, and has no table of EPT12.
    pub(crate) fn is_direct(&self) -> bool {
        // SAFETY: Plain data.
        unsafe { self.page.role.__bindgen_anon_1 }.direct() != 0
    }

    /// Whether EPTP12 has accessed and dirty flags on.
    pub(crate) fn has_flags(&self) -> bool {
        // SAFETY: Plain data.
        unsafe { self.page.role.__bindgen_anon_1 }.ad_disabled() == 0
    }

    /// Whether L1 has turned mode-based execute control on.
    pub(crate) fn has_user_exec(&self) -> bool {
        // SAFETY: Plain data.
        unsafe { self.page.role.__bindgen_anon_1 }.cr4_smep() != 0
    }

    /// Whether L1 may write to its table without KVM's knowing: what is here may be old until L1 flushes.
    pub(crate) fn is_unsync(&self) -> bool {
        self.page.unsync
    }

    /// The entry of this number if it is present.
    pub(crate) fn entry(&self, index: usize) -> Option<u64> {
        // SAFETY: By the invariants of `Table`; a page of entries.
        let entry = unsafe { self.page.spt.add(index % ENTRIES).read_volatile() };
        (entry & PRESENT != 0).then_some(entry)
    }

    /// Whether a present entry maps a page.
    pub(crate) fn maps_page(&self, entry: u64) -> bool {
        self.level() == 1 || entry & HUGE != 0
    }

    /// KVM's record of what an entry for a page was made of; `None` where it has none.
    pub(crate) fn record(&self, index: usize) -> Option<Place> {
        let translations = self.page.shadowed_translation;
        if translations.is_null() {
            return None;
        }
        // SAFETY: By the invariants of `Table`; as many words as entries.
        let word = unsafe { translations.add(index % ENTRIES).read() };
        Some(Place {
            gfn: word >> 12,
            access: word & 0xfff,
        })
    }
}
