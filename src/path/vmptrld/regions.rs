// SPDX-License-Identifier: GPL-2.0
//! The VMCSs of L1 that are not current and are kept loaded all the same.

use super::{roots::OldRoots, Shared};
use crate::{
    alloc, bindings,
    kvm::{
        guest_memory::{SrcuGuard, PAGE},
        nested::Pages,
        shadow_page::ShadowPage,
        vmx, Vcpu,
    },
    path::{fields, CounterSet, Counters},
    policy::operand::Trail,
};
use core::sync::atomic::Ordering;
use kernel::prelude::*;

/// How many VMCSs are kept beside the current one: a KVM in the middle of a stack alternates between two
/// for each vCPU that it runs here, and a shadow VMCS.
pub(super) const SLOTS: usize = 8;

/// Most that is allocated for one vCPU, in bytes.
pub(in crate::path) const MOST: usize = SLOTS * 2 * PAGE;

/// `INVALID_GPA`: no VMCS.
pub(super) const NONE: u64 = u64::MAX;

/// Pages for one VMCS that are ours and not KVM's.
pub(super) struct Owned(Pages);

impl Owned {
    /// Allocates a pair as `enter_vmx_operation()` does. May sleep.
    ///
    /// # Safety
    ///
    /// The CPU is in VMX root operation. `like` is a shadow VMCS of KVM's.
    unsafe fn new(like: *const bindings::vmcs) -> Result<Self> {
        alloc::VCPU.gate()?;
        let vmcs12 = KBox::<[u64; PAGE / 8]>::new_uninit(GFP_KERNEL_ACCOUNT | __GFP_NOWARN)?;
        // SAFETY: By this function's contract.
        let shadow = unsafe { ShadowPage::new(like)? };
        let vmcs12 = KBox::into_raw(vmcs12).cast::<bindings::vmcs12>();
        // SAFETY: A whole page.
        unsafe { vmcs12.cast::<u8>().write_bytes(0, PAGE) };
        let pages = Pages {
            vmcs12,
            shadow: shadow.as_ptr(),
        };
        core::mem::forget(shadow);
        Ok(Self(pages))
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: Allocated by `new`, or by KVM in the same way (kzalloc() of a page for vmcs12, a page for
        // the shadow VMCS), and nobody else's. A shadow VMCS here is clear.
        unsafe {
            drop(KBox::from_raw(self.0.vmcs12.cast::<[u64; PAGE / 8]>()));
            drop(ShadowPage::from_raw(self.0.shadow));
        }
    }
}

struct Region {
    pages: Option<Owned>,
    /// The shadow VMCS has what L1 wrote last and vmcs12 has not.
    shadow_newer: bool,
    used: u64,
}

impl Region {
    const EMPTY: Region = Region {
        pages: None,
        shadow_newer: false,
        used: 0,
    };
}

/// The VMCSs that one vCPU keeps. At most [`SLOTS`] pairs of pages are ever allocated for it.
///
/// # Invariants
///
/// No slot has the vCPU's current VMCS, two slots never have the same, and none has a shadow VMCS of L1's,
/// for KVM reads those from guest memory. Shadow VMCSs of slots are clear.
pub(crate) struct Regions {
    /// Guest-physical address of the VMCS in each slot; [`NONE`] in one that waits for one.
    vmptrs: [u64; SLOTS],
    slots: [Region; SLOTS],
    /// How many slots have a VMCS.
    held: usize,
    /// The slot that was used last. An L1 that goes back and forth finds there what it wants.
    last: usize,
    clock: u64,
    /// Mode `check`: the slots are copies of what is in guest memory, to compare with it.
    pub(super) images: bool,
    /// The roots that the guest's MMU has are older than the current VMCS, see [`super::roots`].
    pub(in crate::path) roots: OldRoots,
    /// Where the last operand was found.
    pub(super) trail: Trail,
    /// Where the last descriptor of an INVEPT or INVVPID was.
    pub(super) descriptor: Trail,
}

/// What copying between a shadow VMCS and its vmcs12 takes.
pub(super) struct Copier<'a> {
    pub(super) vcpu: Vcpu,
    pub(super) fields: &'a mut fields::Memory,
    pub(super) count: &'a Counters,
}

impl<'a> Copier<'a> {
    pub(super) fn new(
        vcpu: Vcpu,
        fields: &'a mut fields::Memory,
        counters: &'a CounterSet,
    ) -> Self {
        Self {
            vcpu,
            fields,
            count: counters.path::<{ fields::NUMBER }>(),
        }
    }

    /// # Safety
    ///
    /// The vCPU is loaded by this task, and the shadow VMCS of `pages` is the newer.
    unsafe fn settle(&mut self, pages: Pages) {
        // SAFETY: By this function's contract.
        unsafe { self.fields.save_aside(self.vcpu, pages, self.count) };
    }
}

impl Regions {
    pub(crate) const NEW: Regions = Regions {
        vmptrs: [NONE; SLOTS],
        slots: [Region::EMPTY; SLOTS],
        held: 0,
        last: 0,
        clock: 0,
        images: false,
        roots: OldRoots::NONE,
        trail: Trail::NONE,
        descriptor: Trail::NONE,
    };

    /// Whether a VMCS that is not kept has a place to go to: `make_room` has nothing to allocate or write then.
    pub(super) fn has_room(&self) -> bool {
        let mut both = self.vmptrs.iter().zip(&self.slots);
        both.any(|(&vmptr, slot)| vmptr == NONE && slot.pages.is_some())
    }

    /// The slot that has this VMCS.
    #[inline(always)]
    pub(super) fn position(&self, vmptr: u64) -> Option<usize> {
        if vmptr == NONE {
            return None;
        }
        if self.vmptrs.get(self.last) == Some(&vmptr) {
            return Some(self.last);
        }
        self.vmptrs.iter().position(|&v| v == vmptr)
    }

    /// Puts a VMCS, or none, into a slot.
    #[inline(always)]
    fn set_vmptr(&mut self, at: usize, vmptr: u64) {
        if let Some(v) = self.vmptrs.get_mut(at) {
            self.held = self.held + usize::from(vmptr != NONE) - usize::from(*v != NONE);
            *v = vmptr;
        }
    }

    /// The pages of a slot.
    pub(super) fn pages(&self, at: usize) -> Option<Pages> {
        Some(self.slots.get(at)?.pages.as_ref()?.0)
    }

    /// Tells other threads whether guest memory lacks something that is here.
    pub(super) fn publish(&self, shared: &Shared) {
        let holding = self.held != 0 || self.roots.are_kept();
        if shared.holding.load(Ordering::Relaxed) != holding {
            shared.holding.store(holding, Ordering::Release);
        }
    }

    /// A slot with pages and without a VMCS; the VMCS that was not used longest goes if there is none.
    /// `None` without memory. May sleep.
    ///
    /// # Safety
    ///
    /// In a handler of an exit of L1 with VMCS shadowing in use.
    pub(super) unsafe fn make_room(&mut self, copier: &mut Copier<'_>) -> Option<usize> {
        let mut both = self.vmptrs.iter().zip(&self.slots);
        if let Some(at) = both.position(|(&v, s)| v == NONE && s.pages.is_some()) {
            return Some(at);
        }
        if let Some(at) = self.slots.iter().position(|s| s.pages.is_none()) {
            let like = copier.vcpu.pages()?.shadow;
            // SAFETY: By this function's contract.
            let pages = unsafe { Owned::new(like) }.ok()?;
            self.slots.get_mut(at)?.pages = Some(pages);
            return Some(at);
        }
        let oldest = self.slots.iter().enumerate().min_by_key(|(_, s)| s.used);
        let at = oldest?.0;
        // SAFETY: By this function's contract.
        unsafe { self.evict(at, copier, &SrcuGuard::take(copier.vcpu)) };
        Some(at)
    }

    /// Makes the VMCS at `vmptr`, whose pages slot `at` has, the one that KVM's pages are, and keeps
    /// the current one in its place. What stock VMPTRLD does to the vCPU is done.
    ///
    /// # Safety
    ///
    /// In a handler of VMPTRLD by L1, while the vCPU is extended and not in mode `check`; `vmptr` is
    /// not current.
    #[inline(always)]
    pub(super) unsafe fn swap(
        &mut self,
        at: usize,
        vmptr: u64,
        copier: &mut Copier<'_>,
    ) -> Option<()> {
        let vcpu = copier.vcpu;
        let (was, old) = (vcpu.pages()?, vcpu.current_vmptr());
        let for_memory = vcpu.vmcs12()?.is_shadow();
        copier.fields.forget_entry();
        self.clock += 1;
        let slot = self.slots.get_mut(at)?;
        if old != NONE && vcpu.has_late_fields() {
            copier.fields.quietly(|| {
                // SAFETY: vmcs01 is current by this function's contract, and preemption is off here.
                unsafe { vcpu.fetch_late_fields() }
            })?;
        }
        let new = slot.pages.take()?.into_pages();
        let newer = old != NONE && !vcpu.vmcs12_is_newer();
        // Preemption may be on, as in handle_vmptrld(). If the vCPU moves to another CPU before the VMCLEAR, KVM clears the
        // old shadow VMCS on the CPU that it leaves; afterwards it is active nowhere. The new one is not before L1 runs. On
        // a processor that is a KVM it is in its region in any case.
        // SAFETY: vmcs01 is current by this function's contract; the pages are this vCPU's by the type's invariants.
        unsafe {
            if old != NONE {
                vcpu.drop_current_vmptr(false);
            }
            if !copier.fields.are_in_region() {
                vmx::vmclear(vmx::physical(was.shadow.cast()));
            }
            vcpu.set_pages(new);
            vcpu.set_current_vmptr(vmptr, slot.shadow_newer);
        }
        slot.shadow_newer = newer;
        slot.pages = Some(Owned(was));
        slot.used = self.clock;
        self.last = at;
        self.set_vmptr(at, old);
        if old != NONE {
            self.roots.keep(vcpu);
            if for_memory {
                // SAFETY: By this function's contract.
                unsafe { self.evict(at, copier, &SrcuGuard::take(vcpu)) };
            }
        }
        Some(())
    }

    /// Brings the vmcs12 of every slot up to date, because what the shadow VMCSs carry is about to change.
    ///
    /// # Safety
    ///
    /// The vCPU is loaded on this CPU by this task.
    pub(crate) unsafe fn settle(
        &mut self,
        vcpu: Vcpu,
        fields: &mut fields::Memory,
        count: &Counters,
    ) {
        let mut copier = Copier {
            vcpu,
            fields,
            count,
        };
        for slot in self.slots.iter_mut().filter(|s| s.shadow_newer) {
            if let Some(pages) = &slot.pages {
                // SAFETY: By this function's contract.
                unsafe { copier.settle(pages.0) };
            }
            slot.shadow_newer = false;
        }
    }

    /// Writes a slot's VMCS back to guest memory and forgets it, but not its pages. May sleep.
    ///
    /// # Safety
    ///
    /// The vCPU is loaded by this task, which has its VMM's address space.
    pub(super) unsafe fn evict(&mut self, at: usize, copier: &mut Copier<'_>, srcu: &SrcuGuard) {
        let images = self.images;
        let (Some(slot), Some(&vmptr)) = (self.slots.get_mut(at), self.vmptrs.get(at)) else {
            return;
        };
        if let (Some(pages), false) = (&slot.pages, images || vmptr == NONE) {
            // SAFETY: By this function's contract; a whole page.
            unsafe {
                if slot.shadow_newer {
                    copier.settle(pages.0);
                }
                // What cannot be written is lost, as in nested_release_vmcs12().
                srcu.write_page(vmptr, pages.0.vmcs12.cast());
            }
        }
        self.forget(at);
    }

    /// As `evict`, for all.
    ///
    /// # Safety
    ///
    /// As for `evict`.
    pub(super) unsafe fn evict_all(&mut self, copier: &mut Copier<'_>) {
        if self.held == 0 {
            return;
        }
        let srcu = SrcuGuard::take(copier.vcpu);
        for at in 0..SLOTS {
            // SAFETY: By this function's contract.
            unsafe { self.evict(at, copier, &srcu) };
        }
    }

    /// Mode `check`: keeps a copy of a VMCS as it is about to be written to guest memory.
    ///
    /// # Safety
    ///
    /// As for `make_room`; `vmcs12` is a whole page.
    pub(super) unsafe fn keep_image(
        &mut self,
        vmptr: u64,
        vmcs12: *const bindings::vmcs12,
        copier: &mut Copier<'_>,
    ) {
        let at = match self.position(vmptr) {
            Some(at) => Some(at),
            // SAFETY: By this function's contract.
            None => unsafe { self.make_room(copier) },
        };
        let Some(slot) = at.and_then(|at| self.slots.get_mut(at)) else {
            return;
        };
        if let Some(pages) = &slot.pages {
            // SAFETY: Both are whole pages.
            unsafe {
                core::ptr::copy_nonoverlapping(vmcs12.cast::<u8>(), pages.0.vmcs12.cast(), PAGE)
            };
            self.clock += 1;
            slot.used = self.clock;
            at.into_iter().for_each(|at| self.set_vmptr(at, vmptr));
        }
    }

    /// Mode `check`: takes the copy of a VMCS out and compares it with another. `None` if there is none.
    ///
    /// # Safety
    ///
    /// `vmcs12` is a whole page.
    pub(super) unsafe fn compare_image(
        &mut self,
        vmptr: u64,
        vmcs12: *const bindings::vmcs12,
    ) -> Option<bool> {
        let at = self.position(vmptr)?;
        let image = self.pages(at)?.vmcs12;
        self.forget(at);
        // SAFETY: Both are whole pages.
        let page = |p: *const bindings::vmcs12| unsafe {
            core::slice::from_raw_parts(p.cast::<u8>(), PAGE)
        };
        Some(page(image) == page(vmcs12))
    }

    /// Forgets a slot, without writing it.
    pub(super) fn forget(&mut self, at: usize) {
        if let Some(slot) = self.slots.get_mut(at) {
            slot.shadow_newer = false;
        }
        self.set_vmptr(at, NONE);
    }
}

impl Owned {
    fn into_pages(self) -> Pages {
        let pages = self.0;
        core::mem::forget(self);
        pages
    }
}
