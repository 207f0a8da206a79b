// SPDX-License-Identifier: GPL-2.0
//! EPT02, KVM's shadow of the table EPT12 that L1 made for L2, down at its last level.
//!
//! Nothing here writes an entry: that is left to KVM's own mmu_set_spte() (`super::batch`), which keeps the reverse map, dirty
//! logging and write protection right. What is here finds out where it may be asked to.

use super::{guest_memory::PAGE, mmu_lock, vcpu::read, vmx, Vcpu};
use crate::{
    bindings,
    hook::CallId,
    policy::{
        ept::{Rights, ACCESSED},
        registers::HF_SMM,
    },
};
use core::{
    marker::PhantomData,
    mem::MaybeUninit,
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

pub(super) use crate::policy::ept::ADDRESS;

/// Entries in a table.
pub(crate) const ENTRIES: usize = 512;
/// Most pages that kvm_mmu_prefetch_sptes() takes at once (`PTE_PREFETCH_NUM`).
pub(crate) const PREFETCH: usize = 8;

/// An entry that leads somewhere (`SPTE_MMU_PRESENT_MASK`).
pub(super) const PRESENT: u64 = bindings::MTK_SPTE_PRESENT as u64;
/// An entry above the last level that maps a large page (`PT_PAGE_SIZE_MASK`).
pub(super) const HUGE: u64 = bindings::MTK_SPTE_HUGE as u64;
/// An entry that KVM has emptied (`SHADOW_NONPRESENT_VALUE`).
const NONPRESENT: u64 = bindings::MTK_SPTE_NONPRESENT as u64;
const LEVEL_BITS: u32 = 9;
const PAGE_SHIFT: u32 = 12;

/// The page-fault handler's account of a fault, `struct kvm_page_fault`.
#[derive(Clone, Copy)]
pub(crate) struct PageFault {
    /// Guest-physical address in L2.
    pub(crate) gpa: u64,
    /// KVM asks for the page ahead of any access.
    pub(crate) prefetch: bool,
    /// What kind of access it was, as in a page fault's error code (`PFERR_…_MASK`).
    #[cfg_attr(not(MTK_GVA_WALK), expect(dead_code))]
    pub(crate) error_code: u64,
    /// Level of the entry that was made, 1 for a page of 4 KiB.
    pub(crate) level: u8,
    /// EPT12 and the host have a large page there, of which a part was mapped because L2 executes in it
    /// (`disallowed_hugepage_adjust()`).
    pub(crate) is_split: bool,
}

impl PageFault {
    /// # Safety
    ///
    /// `ptr` is the argument of the page-fault handler that runs or has just run.
    pub(crate) unsafe fn from_hook(ptr: *const bindings::kvm_page_fault) -> Self {
        // SAFETY: By this function's contract it is KVM's own structure, which only this thread uses.
        let fault = unsafe { &*ptr };
        Self {
            gpa: fault.addr,
            prefetch: fault.prefetch,
            error_code: fault.error_code,
            level: fault.goal_level,
            is_split: fault.req_level > fault.goal_level,
        }
    }
}

/// `kvm->mmu_lock`, held for writing: no table of EPT02 changes, and none of those of EPT12 that KVM write-protects.
///
/// Code that holds it does not sleep and holds it for a bounded number of entries.
pub(crate) struct MmuLock {
    vcpu: Vcpu,
    kvm: *mut bindings::kvm,
}

impl Vcpu {
    /// Takes the lock.
    pub(crate) fn lock_mmu(self) -> MmuLock {
        let kvm = read!(self, vcpu.kvm);
        // SAFETY: A vCPU's VM outlives it, and no caller holds the lock.
        unsafe { bindings::_raw_write_lock(&raw mut (*kvm).mmu_lock) };
        MmuLock { vcpu: self, kvm }
    }

    /// How many reverse-map entries KVM can make without allocating, which it must not under the lock.
    pub(crate) fn spare_rmap_entries(self) -> usize {
        usize::try_from(read!(self, vcpu.arch.mmu_pte_list_desc_cache.nobjs)).unwrap_or(0)
    }

    /// `mmu_topup_memory_caches()`: makes sure of at least 8 more, and of what new tables take; `shadow`: of a shadow of the
    /// guest's own. May sleep.
    pub(crate) fn refill_mmu_caches(self, shadow: bool) -> bool {
        // SAFETY: In a handler of an exit, as KVM calls it.
        let ret = unsafe { CallId::TOPUP_MMU_CACHES.call([self.key(), usize::from(shadow)]) };
        ret.is_some_and(|r| r as i32 == 0)
    }

    /// Whether L2 runs on a shadow of EPT12: the MMU in use is the one for guests and its root is a table of its own.
    pub(crate) fn uses_ept02(self) -> bool {
        // SAFETY: Only an address is taken.
        let guest_mmu = unsafe { &raw mut (*self.raw()).vcpu.arch.guest_mmu };
        self.guest_mode() && core::ptr::eq(read!(self, vcpu.arch.mmu), guest_mmu)
    }

    /// `is_smm()`. Memory slots are others there.
    pub(crate) fn in_smm(self) -> bool {
        u64::from(read!(self, vcpu.arch.hflags)) & HF_SMM != 0
    }

    /// Address bits that the guest's processor does not have.
    #[inline(always)]
    pub(crate) fn reserved_gpa_bits(self) -> u64 {
        read!(self, vcpu.arch.reserved_gpa_bits)
    }

    /// Whether this is its VM's only vCPU.
    pub(crate) fn is_alone(self) -> bool {
        let kvm = read!(self, vcpu.kvm);
        // SAFETY: A vCPU's VM outlives it; a plain word that only grows.
        unsafe { (&raw const (*kvm).online_vcpus.counter).read_volatile() == 1 }
    }

    /// The root of EPT12 that the current EPT02 is for (`mmu->root.pgd`); 0 if there is no EPT02.
    pub(crate) fn ept12_root(self) -> u64 {
        if !self.uses_ept02() || read!(self, vcpu.arch.guest_mmu.root.hpa) == u64::MAX {
            return 0;
        }
        read!(self, vcpu.arch.guest_mmu.root.pgd)
    }
}

impl Drop for MmuLock {
    fn drop(&mut self) {
        // SAFETY: Taken in `lock_mmu`.
        unsafe { bindings::_raw_write_unlock(&raw mut (*self.kvm).mmu_lock) };
    }
}

impl MmuLock {
    /// Whether addresses are being invalidated by the host's memory management right now. If not, whatever is mapped
    /// under this hold of the lock will be found by an invalidation that starts later.
    pub(crate) fn is_invalidating(&self) -> bool {
        // SAFETY: A vCPU's VM outlives it; the field is read under the lock, as KVM does.
        unsafe { (&raw const (*self.kvm).mmu_invalidate_in_progress).read() != 0 }
    }

    /// Whether somebody waits for the lock (`rwlock_is_contended()`).
    pub(crate) fn is_contended(&self) -> bool {
        // SAFETY: A vCPU's VM outlives it.
        unsafe { mmu_lock::is_contended(self.kvm) }
    }

    fn is_obsolete(&self, sp: *const bindings::kvm_mmu_page) -> bool {
        // SAFETY: A shadow page in use stays while the lock is held; its VM as well.
        unsafe {
            let generation = (&raw const (*self.kvm).arch.mmu_valid_gen).read();
            (*sp).role.__bindgen_anon_1.invalid() != 0
                || (*sp).__bindgen_anon_1.mmu_valid_gen != generation
        }
    }

    /// The last-level table of EPT02 that translates `gpa`; `None` if there is none, a large page is in its place,
    /// or KVM is about to throw the tables away.
    pub(crate) fn leaf(&self, gpa: u64) -> Option<Leaf<'_>> {
        let mmu = read!(self.vcpu, vcpu.arch.mmu);
        // SAFETY: KVM's own pointer to one of the vCPU's MMUs.
        let (root, role) = unsafe { ((*mmu).root.hpa, (*mmu).root_role.__bindgen_anon_1) };
        let top = role.level();
        if root == u64::MAX || !(4..=5).contains(&top) {
            return None;
        }
        // A root that is the page of zeroes (`kvm_mmu_is_dummy_root()`) has no entry, and so no leaf.
        let mut table = root;
        let mut level = top;
        while level > 1 {
            let shift = PAGE_SHIFT + LEVEL_BITS * (level - 1);
            let index = (gpa >> shift) as usize % ENTRIES;
            // SAFETY: `table` is a page of entries that KVM allocated: the root, or what a present entry points to.
            let entry = unsafe {
                vmx::virtual_address(table)
                    .cast::<u64>()
                    .add(index)
                    .read_volatile()
            };
            if entry & PRESENT == 0 || entry & HUGE != 0 {
                return None;
            }
            table = entry & ADDRESS;
            level -= 1;
        }
        let sp = shadow_page(table);
        if sp.is_null() {
            return None;
        }
        let entries = vmx::virtual_address(table).cast::<u64>();
        // SAFETY: `sptep_to_sp()` of a page that EPT02 points to, alive under the lock.
        let page = unsafe { &*sp };
        // SAFETY: The bits are plain data.
        let role = unsafe { page.role.__bindgen_anon_1 };
        if page.tdp_mmu_page
            || page.spt != entries
            || page.shadowed_translation.is_null() == (role.direct() == 0)
            || role.level() != 1
            || role.ad_disabled() != 0
            || role.guest_mode() == 0
            || role.smm() != 0
            || self.is_obsolete(sp)
        {
            return None;
        }
        Some(Leaf {
            lock: PhantomData,
            vcpu: self.vcpu,
            entries,
            translations: page.shadowed_translation,
            gfn: page.gfn,
            unsync: page.unsync,
            granted: u64::from(role.access()),
        })
    }
}

/// `to_shadow_page()`: what KVM keeps about the page of entries at this physical address.
pub(super) fn shadow_page(table: u64) -> *mut bindings::kvm_mmu_page {
    let number = (table >> PAGE_SHIFT) as usize;
    // SAFETY: Set early in boot and constant since; the page is KVM's and so has a `struct page`.
    unsafe {
        let page = (bindings::vmemmap_base as *const bindings::page).add(number);
        (&raw const (*page).__bindgen_anon_1.__bindgen_anon_1.private).read() as *mut _
    }
}

/// Sets the accessed flag of an entry that is present, as the processor does at any time.
pub(super) fn mark_accessed(entry: &AtomicU64) {
    let old = entry.load(Ordering::Relaxed);
    if old & PRESENT != 0 && old & ACCESSED == 0 {
        // If it has changed meanwhile, the flag may stay clear.
        let _ = entry.compare_exchange(old, old | ACCESSED, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// A table of EPT02 with entries for pages of 4 KiB that shadows one of EPT12, or a large page of EPT12 (KVM calls it
/// direct).
///
/// # Invariants
///
/// The lock is held: entries are alive, `translations` has as many or is null for a direct table, and what they were
/// made of stays.
pub(crate) struct Leaf<'l> {
    lock: PhantomData<&'l MmuLock>,
    vcpu: Vcpu,
    entries: *mut u64,
    translations: *mut u64,
    /// Frame of L1's memory where the table is that is shadowed, or the first one that a direct table maps.
    gfn: u64,
    /// L1 may write to that table without KVM's knowing; what is here may be stale until L1 flushes.
    unsync: bool,
    /// Rights that the upper levels of EPT12 grant, as `ACC_…_MASK`.
    granted: u64,
}

/// What an entry was made of: KVM's own record of the outcome of its walk of EPT12.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Translation {
    /// Page frame in L1's memory.
    pub(crate) gfn: u64,
    /// Rights, as `ACC_…_MASK`.
    pub(crate) access: u64,
}

impl Leaf<'_> {
    /// The vCPU that holds the lock.
    #[inline(always)]
    pub(super) fn vcpu(&self) -> Vcpu {
        self.vcpu
    }

    /// Where the entry is.
    #[inline(always)]
    pub(super) fn pointer(&self, index: usize) -> *mut u64 {
        self.entries.wrapping_add(index % ENTRIES)
    }

    /// See the field.
    pub(crate) fn granted(&self) -> u64 {
        self.granted
    }

    /// The first frame of what a direct table maps; `None` if it shadows a table.
    pub(crate) fn large_page(&self) -> Option<u64> {
        self.translations.is_null().then_some(self.gfn)
    }

    /// See the field.
    pub(crate) fn is_unsync(&self) -> bool {
        self.unsync
    }

    fn entry(&self, index: usize) -> u64 {
        // SAFETY: By the invariants of `Leaf`; the index is reduced to the table's size. The processor may set A and D.
        unsafe { self.entries.add(index % ENTRIES).read_volatile() }
    }

    /// Whether L2 has a page here.
    pub(crate) fn is_present(&self, index: usize) -> bool {
        self.entry(index) & PRESENT != 0
    }

    /// The rights that L2 has here, in KVM's numbers; `None` if it has no page.
    pub(crate) fn rights(&self, index: usize, numbers: &Rights) -> Option<u64> {
        let entry = self.entry(index);
        (entry & PRESENT != 0).then(|| numbers.of(entry))
    }

    /// Whether nothing is here, neither a page nor a mark for MMIO.
    pub(crate) fn is_empty(&self, index: usize) -> bool {
        self.entry(index) == NONPRESENT
    }

    /// Whether L2 has used the page here (bit 8, accessed; SDM volume 3, 30.3.5).
    pub(crate) fn is_accessed(&self, index: usize) -> bool {
        self.is_present(index) && self.entry(index) & ACCESSED != 0
    }

    /// Sets the accessed flag of a page that L2 has.
    pub(crate) fn mark_accessed(&self, index: usize) {
        // SAFETY: By the invariants of `Leaf`.
        mark_accessed(unsafe { &*self.entries.add(index % ENTRIES).cast::<AtomicU64>() });
    }

    /// What the entry was made of; means something while it is present.
    pub(crate) fn translation(&self, index: usize) -> Translation {
        if self.translations.is_null() {
            return Translation {
                gfn: self.gfn + (index % ENTRIES) as u64,
                access: self.granted,
            };
        }
        // SAFETY: By the invariants of `Leaf`.
        let word = unsafe { self.translations.add(index % ENTRIES).read() };
        Translation {
            gfn: word >> PAGE_SHIFT,
            access: word & (PAGE as u64 - 1),
        }
    }

    /// Reads the entries of the table of EPT12 that are in `range`, at most `N`, without sleeping; `None` if they cannot
    /// be read now, or there is no table.
    #[inline(always)]
    pub(crate) fn read_ept12<'b, const N: usize>(
        &self,
        range: Range<usize>,
        buffer: &'b mut [MaybeUninit<u64>; N],
    ) -> Option<&'b [u64]> {
        let count = range.len();
        if range.end > ENTRIES || self.translations.is_null() {
            return None;
        }
        let first = (self.gfn << PAGE_SHIFT) + range.start as u64 * 8;
        self.vcpu.read_entries(first, buffer.get_mut(..count)?)
    }

    /// `kvm_mmu_prefetch_sptes()`: maps the pages from `gfn` of L1's memory at `index` and after, as many as the host
    /// has in memory, writable, from the first on. Entries are made "not accessed". At most [`PREFETCH`].
    ///
    /// Must not be called with more entries than `spare_rmap_entries()`, nor while addresses are being invalidated.
    pub(crate) fn prefetch(&self, index: usize, count: usize, to: Translation) -> bool {
        if count > PREFETCH || index + count > ENTRIES {
            return false;
        }
        // SAFETY: By the invariants of `Leaf`: as in KVM's ept_prefetch_gpte(), under the lock.
        let ret = unsafe {
            CallId::PREFETCH_SPTES.call([
                self.vcpu.key(),
                to.gfn as usize,
                self.entries.add(index) as usize,
                count,
                to.access as usize,
            ])
        };
        // The function returns a bool, in AL.
        ret.is_some_and(|r| r as u8 != 0)
    }
}
