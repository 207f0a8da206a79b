// SPDX-License-Identifier: GPL-2.0
//! The guest pages that a vmcs12 names and the processor uses while L2 runs: APIC-access page, virtual-APIC page,
//! posted-interrupt descriptor, and the bitmap of MSRs.
//!
//! `nested_get_vmcs12_pages()` pins the first three for as long as L2 runs, and reads the fourth.

use super::{
    fields::encoding::{
        APIC_ACCESS_ADDR, CPU_BASED_VM_EXEC_CONTROL, POSTED_INTR_DESC_ADDR, VIRTUAL_APIC_PAGE_ADDR,
    },
    guest_memory::GuestMemory,
    vcpu::read,
    vmcs12::field,
    vmx, Vcpu, Vmcs12,
};
use crate::{
    bindings,
    hook::CallId,
    policy::{
        controls::{
            pin::POSTED_INTERRUPTS,
            primary::{MSR_BITMAPS, TPR_SHADOW},
            secondary::{
                APIC_REGISTER_VIRT, EPT, INTERRUPT_DELIVERY, VIRTUALIZE_APIC_ACCESSES,
                VIRTUALIZE_X2APIC,
            },
        },
        msr_bitmap::{
            self, X2apic, MERGED, MERGED_WORDS, X2APIC_READS, X2APIC_WORDS, X2APIC_WRITES,
        },
        registers::EFER_LMA,
    },
};

/// KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS.
const UPDATE_IN_PROGRESS: u64 = 1 << 63;

const PAGE_MASK: u64 = 0xfff;

/// The uses that a vmcs12 has for a pinned page.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    /// `apic_access_page_map`.
    ApicAccess,
    /// `virtual_apic_map`.
    VirtualApic,
    /// `pi_desc_map`.
    PostedInterrupts,
}

/// All of them, in the order in which KVM maps them.
pub(crate) const USES: [Use; 3] = [Use::ApicAccess, Use::VirtualApic, Use::PostedInterrupts];

/// For each of [`USES`] the page that a vmcs12 names (guest-physical address, with the offset in the page for the
/// descriptor), if it does.
pub(crate) type Wanted = [Option<u64>; USES.len()];

/// When a translation of a guest-physical address was looked up. A later one with the same stamp gives the same page:
/// memory slots are the same, and the VMM's mapping of none of them has changed in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    generation: u64,
    invalidations: usize,
}

/// A guest page that KVM pinned, `struct kvm_host_map`. It stays pinned until `release` or `give`; dropped, it stays so
/// for good.
#[derive(Clone, Copy)]
pub(crate) struct HostMap(bindings::kvm_host_map);

impl HostMap {
    /// None, and not to be released.
    pub(crate) const NONE: Self = Self(bindings::kvm_host_map {
        pinned_page: core::ptr::null_mut(),
        page: core::ptr::null_mut(),
        hva: core::ptr::null_mut(),
        pfn: 0,
        gfn: 0,
        writable: false,
    });

    /// Whether `other` pins the same page at the same place.
    #[inline(always)]
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        core::ptr::eq(self.0.pinned_page, other.0.pinned_page) && self.0.gfn == other.0.gfn
    }

    /// Number of the guest's page frame.
    #[inline(always)]
    pub(crate) fn gfn(&self) -> u64 {
        self.0.gfn
    }

    /// Number of the host's page frame.
    #[inline(always)]
    pub(crate) fn pfn(&self) -> u64 {
        self.0.pfn
    }
}

impl Vcpu {
    /// The stamp of a look-up that begins now. `None` in system-management mode, which has memory slots of its own,
    /// and while slots or the VMM's mappings of them are being changed.
    ///
    /// KVM's SRCU lock is held.
    #[inline(always)]
    pub(crate) fn memory_stamp(self) -> Option<Stamp> {
        let generation = self.slots_generation()?;
        let kvm = read!(self, vcpu.kvm);
        // SAFETY: A vCPU's VM outlives it. The words change under other locks, so each is read in one go. The compiler
        // keeps the order, and so does the processor (kvm_mmu_invalidate_end() counts first and then ends).
        let (in_progress, invalidations) = unsafe {
            (
                (&raw const (*kvm).mmu_invalidate_in_progress).read_volatile(),
                (&raw const (*kvm).mmu_invalidate_seq).read_volatile(),
            )
        };
        let settled = in_progress == 0 && generation & UPDATE_IN_PROGRESS == 0;
        settled.then_some(Stamp {
            generation,
            invalidations,
        })
    }

    /// The vCPU's thread is in KVM_RUN, where KVM holds its SRCU lock but while the vCPU sleeps or the guest runs.
    #[inline(always)]
    pub(crate) fn is_in_run(self) -> bool {
        read!(self, vcpu.wants_to_run)
    }

    /// Whether memory slots are those that they were at `stamp`.
    pub(crate) fn has_slots_of(self, stamp: Stamp) -> bool {
        self.memory_stamp()
            .is_some_and(|now| now.generation == stamp.generation)
    }

    /// Whether nested_get_vmcs12_pages() has nothing to look up for this vmcs12.
    #[inline(always)]
    pub(crate) fn wants_no_page(self, m: Vmcs12) -> bool {
        m.primary_controls() & (TPR_SHADOW | MSR_BITMAPS) == 0
            && m.pin_controls() & POSTED_INTERRUPTS == 0
            && m.secondary_controls() & VIRTUALIZE_APIC_ACCESSES == 0
    }

    /// The pages that nested_get_vmcs12_pages() maps for this vmcs12. `None` for what is out of the ordinary.
    #[inline(always)]
    pub(crate) fn wanted_pages(self, m: Vmcs12) -> Option<Wanted> {
        let primary = m.primary_controls();
        let secondary = m.secondary_controls();
        // Else KVM may load PDPTRs from memory first.
        let long = read!(self, vcpu.arch.efer) & EFER_LMA != 0;
        let plain = (long || secondary & EPT != 0)
            && !self.evmcs_is_mapped()
            // Which stock unpins first.
            && !self.has_pinned_pages();
        plain.then(|| {
            let virtual_interrupts = m.pin_controls() & POSTED_INTERRUPTS != 0;
            [
                (secondary & VIRTUALIZE_APIC_ACCESSES != 0).then(|| field!(m, apic_access_addr)),
                (primary & TPR_SHADOW != 0).then(|| field!(m, virtual_apic_page_addr)),
                virtual_interrupts.then(|| field!(m, posted_intr_desc_addr)),
            ]
        })
    }

    fn map(self, use_: Use) -> *mut bindings::kvm_host_map {
        // SAFETY: Only addresses are taken.
        unsafe {
            let nested = &raw mut (*self.raw()).nested;
            match use_ {
                Use::ApicAccess => &raw mut (*nested).apic_access_page_map,
                Use::VirtualApic => &raw mut (*nested).virtual_apic_map,
                Use::PostedInterrupts => &raw mut (*nested).pi_desc_map,
            }
        }
    }

    /// The page that KVM has pinned for this use now; `None` if it has none, or one that is no page of the host's.
    #[inline(always)]
    pub(crate) fn pinned_page(self, use_: Use) -> Option<HostMap> {
        // SAFETY: By the invariants of `Vcpu`; plain words.
        let map = unsafe { self.map(use_).read() };
        let pinned = !map.hva.is_null() && !map.pinned_page.is_null() && map.writable;
        pinned.then_some(HostMap(map))
    }

    /// Whether the pages that KVM has pinned for each use are these, and no others.
    #[cfg(MTK_GVA_WALK)]
    #[inline(always)]
    pub(crate) fn pins_nothing_but(self, pages: [Option<&HostMap>; USES.len()]) -> bool {
        let pins = |use_: Use, page: Option<&HostMap>| {
            let map = self.map(use_);
            // SAFETY: By the invariants of `Vcpu`; plain words.
            unsafe {
                match page {
                    Some(page) => {
                        !(*map).hva.is_null()
                            && (*map).writable
                            && core::ptr::eq((*map).pinned_page, page.0.pinned_page)
                            && (*map).gfn == page.0.gfn
                    }
                    None => (*map).hva.is_null(),
                }
            }
        };
        let [first, second, third] = pages;
        pins(Use::ApicAccess, first)
            && pins(Use::VirtualApic, second)
            && pins(Use::PostedInterrupts, third)
    }

    /// Whether KVM has pinned any.
    #[inline(always)]
    pub(crate) fn has_pinned_pages(self) -> bool {
        USES.iter()
            // SAFETY: By the invariants of `Vcpu`; a plain word.
            .any(|&use_| unsafe { !(*self.map(use_)).hva.is_null() })
    }

    /// Takes the page that `pinned_page` has just found from KVM, which forgets it without unpinning it.
    ///
    /// # Safety
    ///
    /// L2 has exited: vmcs02 is not run before nested_get_vmcs12_pages() is called again.
    #[inline(always)]
    pub(crate) unsafe fn take_page(self, use_: Use) {
        let map = self.map(use_);
        // SAFETY: As kvm_vcpu_unmap() leaves it, to which nothing remains to do.
        unsafe {
            (&raw mut (*map).hva).write(core::ptr::null_mut());
            (&raw mut (*map).page).write(core::ptr::null_mut());
            (&raw mut (*map).pinned_page).write(core::ptr::null_mut());
        }
    }

    /// Gives a pinned page to KVM, and its address to vmcs02, as nested_get_vmcs12_pages() does for the page at
    /// `address`.
    ///
    /// # Safety
    ///
    /// In the handler of nested_get_vmcs12_pages(), with vmcs02 loaded; KVM has no page for this use, and the caller
    /// has no use of `map` any more. `address` is in the page that `map` pins, by a look-up that would find it again.
    #[inline(always)]
    pub(crate) unsafe fn give_page(self, use_: Use, map: &HostMap, address: u64) {
        let physical = map.0.pfn << 12;
        // SAFETY: By this function's contract.
        unsafe {
            self.map(use_).write(map.0);
            match use_ {
                Use::ApicAccess => vmx::vmwrite_basic(APIC_ACCESS_ADDR, physical),
                Use::VirtualApic => vmx::vmwrite_basic(VIRTUAL_APIC_PAGE_ADDR, physical),
                Use::PostedInterrupts => {
                    let offset = address & PAGE_MASK;
                    (&raw mut (*self.raw()).nested.pi_desc)
                        .write(map.0.hva.cast::<u8>().add(offset as usize).cast());
                    vmx::vmwrite_basic(POSTED_INTR_DESC_ADDR, physical + offset);
                }
            }
        }
    }

    /// `kvm_vcpu_unmap()`: marks the page dirty and unpins it.
    ///
    /// # Safety
    ///
    /// KVM's SRCU lock is held, the vCPU is loaded by the current task, and the caller has no use of `map` any more.
    pub(crate) unsafe fn release_page(self, mut map: HostMap) {
        // SAFETY: By this function's contract, with a map that __kvm_vcpu_map() made.
        unsafe { CallId::UNMAP.call([self.key(), (&raw mut map.0) as usize]) };
    }

    /// Whether the guest's page is in a slot whose writes nobody logs, so that there is nothing to mark when KVM lets
    /// go of it. True for as long as memory slots are the same. KVM's SRCU lock is held.
    pub(crate) fn is_unlogged(self, gfn: u64) -> bool {
        // SAFETY: As KVM itself calls it, under its SRCU lock, which keeps the slot alive.
        let slot = unsafe {
            CallId::GFN_TO_MEMSLOT
                .call([self.key(), gfn as usize])
                .and_then(|slot| (slot as *const bindings::kvm_memory_slot).as_ref())
        };
        slot.is_some_and(|slot| slot.flags & bindings::KVM_MEM_LOG_DIRTY_PAGES == 0)
    }

    /// Whether KVM's bitmap of vmcs02 lets nothing pass but what `write_msr_bitmap` may.
    #[cold]
    pub(crate) fn msr_bitmap_is_plain(self) -> bool {
        let Some((bitmap, _)) = self.msr_bitmaps() else {
            return false;
        };
        // SAFETY: A whole page, by `msr_bitmaps`.
        msr_bitmap::is_closed_elsewhere(|index| unsafe { bitmap.add(index).read() })
    }

    /// KVM's bitmaps of vmcs02 and vmcs01, whole pages.
    #[inline(always)]
    fn msr_bitmaps(self) -> Option<(*mut u64, *const u64)> {
        let vmcs02 = read!(self, nested.vmcs02.msr_bitmap).cast::<u64>();
        let vmcs01 = read!(self, vmcs01.msr_bitmap).cast::<u64>();
        (!vmcs02.is_null() && !vmcs01.is_null()).then_some((vmcs02, vmcs01.cast_const()))
    }

    /// Makes the bitmap of vmcs02 what L1's bitmap, which is read now, and vmcs01's say. `whole`: the rest of the bitmap,
    /// too, which may have been the stock code's. Returns whether L1 uses a bitmap at all. `None` if KVM has none, or
    /// L1's cannot be read: what is to happen then is the stock code's to say, which writes every word again that may
    /// be written here. May sleep.
    ///
    /// # Safety
    ///
    /// In the handler of nested_get_vmcs12_pages().
    #[inline(always)]
    pub(crate) unsafe fn merge_msr_bitmap(
        self,
        m: Vmcs12,
        memory: &mut GuestMemory,
        whole: bool,
    ) -> Option<bool> {
        if m.primary_controls() & MSR_BITMAPS == 0 {
            return Some(false);
        }
        let (bitmap, _) = self.msr_bitmaps()?;
        // SAFETY: A whole page, which only this thread writes and no processor uses before vmcs02 runs.
        unsafe {
            if whole {
                bitmap.write_bytes(0xff, msr_bitmap::WORDS);
            }
            self.merge(m, memory, |index, word| bitmap.add(index).write(word))?;
            (&raw mut (*self.raw()).nested.force_msr_bitmap_recalc).write(false);
        }
        Some(true)
    }

    /// Each word of the bitmap of vmcs02 that is not always all ones.
    #[inline(always)]
    fn merge(
        self,
        m: Vmcs12,
        memory: &mut GuestMemory,
        mut f: impl FnMut(usize, u64),
    ) -> Option<()> {
        let (_, vmcs01) = self.msr_bitmaps()?;
        let page = memory.page(field!(m, msr_bitmap))?;
        for entry in &MERGED {
            // SAFETY: A whole page, which only this thread writes; every index of the table is within it.
            let ours = unsafe { vmcs01.add(entry.index).read() };
            f(entry.index, entry.word(page.read_u64(entry.index)?, ours));
        }
        let secondary = m.secondary_controls();
        if secondary & VIRTUALIZE_X2APIC == 0 {
            (0..X2APIC_WORDS).for_each(|n| f(X2APIC_READS + n, u64::MAX));
            f(X2APIC_WRITES, u64::MAX);
            return Some(());
        }
        let x2apic = X2apic {
            registers: secondary & APIC_REGISTER_VIRT != 0,
            delivery: secondary & INTERRUPT_DELIVERY != 0,
        };
        for n in 0..X2APIC_WORDS {
            f(
                X2APIC_READS + n,
                x2apic.reads(n, page.read_u64(X2APIC_READS + n)?),
            );
        }
        f(
            X2APIC_WRITES,
            x2apic.first_writes(page.read_u64(X2APIC_WRITES)?),
        );
        Some(())
    }

    /// Has the processor use the bitmap of vmcs02, or not.
    ///
    /// # Safety
    ///
    /// In the handler of nested_get_vmcs12_pages(), with vmcs02 loaded; to use it, after `merge_msr_bitmap`.
    #[inline(always)]
    pub(crate) unsafe fn use_msr_bitmap(self, used: bool) {
        let was = read!(self, nested.vmcs02.controls_shadow.exec);
        let now = if used {
            was | MSR_BITMAPS
        } else {
            was & !MSR_BITMAPS
        };
        if now != was {
            // SAFETY: By this function's contract; as exec_controls_setbit() and exec_controls_clearbit() do.
            unsafe {
                vmx::vmwrite_basic(CPU_BASED_VM_EXEC_CONTROL, u64::from(now));
                (&raw mut (*self.raw()).nested.vmcs02.controls_shadow.exec).write(now);
            }
        }
    }

    /// The first word in which KVM's bitmap of vmcs02 is not `merged`.
    pub(crate) fn compare_msr_bitmap(self, merged: &MsrBitmap) -> Option<usize> {
        let (bitmap, _) = self.msr_bitmaps()?;
        // SAFETY: As above; each index is one of `merge`'s.
        let is = |&(index, word): &(usize, u64)| unsafe { bitmap.add(index).read() } == word;
        merged
            .0
            .iter()
            .find(|entry| !is(entry))
            .map(|&(index, _)| index)
    }
}

/// The words of an MSR bitmap that are not always all ones, each with its number.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct MsrBitmap([(usize, u64); MERGED_WORDS + X2APIC_WORDS + 1]);

impl MsrBitmap {
    /// What `merge_msr_bitmap` would write now; `None` if it would write nothing.
    pub(crate) fn merge(vcpu: Vcpu, m: Vmcs12, memory: &mut GuestMemory) -> Option<Self> {
        if m.primary_controls() & MSR_BITMAPS == 0 {
            return None;
        }
        let mut words = [(0, 0); MERGED_WORDS + X2APIC_WORDS + 1];
        let mut next = words.iter_mut();
        vcpu.merge(m, memory, |index, word| {
            next.next()
                .into_iter()
                .for_each(|slot| *slot = (index, word));
        })?;
        Some(Self(words))
    }
}
