// SPDX-License-Identifier: GPL-2.0
//! Between a vCPU's shadow VMCS and vmcs12: when to copy which way, and the lists and bitmaps that say what is copied and what exits, which
//! are made, put in place and taken away here. The copies themselves are in `super::copies`.

use super::{
    copies::Found,
    extension::drops_reserved,
    lists::{Bitmap, Part, Use},
    memory::{Late, Memory, Shared},
    BUDGET,
};
use crate::{
    kvm::{
        fields::{
            encoding::{VMREAD_BITMAP, VMWRITE_BITMAP},
            FIELDS,
        },
        nested::Pages,
        region::{self, Current, Present, Region},
        vmx, Vcpu, Vmcs12,
    },
    path::{vmptrld::Regions, Counters},
    policy::{
        learn::{Config, Learner},
        set::Set,
    },
};
use core::sync::atomic::{AtomicBool, Ordering};
use kernel::{prelude::*, sync::SpinLock};

#[cold]
fn report_late(count: &Counters) {
    static REPORTED: AtomicBool = AtomicBool::new(false);
    count.mismatches.bump();
    if !REPORTED.swap(true, Ordering::Relaxed) {
        pr_warn!("fields: guest state in vmcs02 was not yet what KVM fetches when L2 exited\n");
    }
}

impl Memory {
    /// L2 has exited to L1, so KVM has executed VMPTRLD of vmcs01 when L1 runs again. A processor that is a KVM takes that, as it
    /// takes any VMPTRLD or VMCLEAR, for the word that VMCS regions may have changed.
    ///
    /// What L1 is going to look for in vmcs12 is read while vmcs02 is still loaded, for getting there later takes two VMPTRLDs.
    ///
    /// # Safety
    ///
    /// vmcs02 is loaded, in the handler of sync_vmcs02_to_vmcs12().
    #[inline(always)]
    pub(in crate::path) unsafe fn left_l2(&mut self, vcpu: Vcpu) {
        self.announced = true;
        self.late = Late::Unread;
        let late = self.extension.as_ref().is_some_and(|ext| ext.late);
        if let Some(m) = vcpu.vmcs12().filter(|_| late && !vcpu.evmcs_is_mapped()) {
            // SAFETY: By this function's contract.
            unsafe { vcpu.read_late_fields(m) };
            self.late = if self.checking {
                Late::Compare(Vcpu::sum_of_late_fields(m))
            } else {
                Late::Read
            };
        }
    }

    /// Has the guest state in vmcs12 that KVM leaves in vmcs02.
    ///
    /// # Safety
    ///
    /// Preemption is off, vmcs01 is loaded, and L2 has not run since `left_l2`.
    #[inline(always)]
    unsafe fn get_late_fields(&mut self, vcpu: Vcpu, m: Vmcs12, count: &Counters) {
        let late = core::mem::replace(&mut self.late, Late::Unread);
        if !vcpu.has_late_fields() {
            return;
        }
        if late == Late::Read {
            vcpu.have_late_fields();
            return;
        }
        // SAFETY: By this function's contract.
        let fetched = unsafe { vcpu.fetch_late_fields() };
        if let Late::Compare(sum) = late {
            if fetched && sum != Vcpu::sum_of_late_fields(m) {
                report_late(count);
            }
        }
    }

    /// As `save`, for a VMCS of L1 that is not current but kept.
    ///
    /// # Safety
    ///
    /// The vCPU is loaded on this CPU by the current task, and the shadow VMCS of `pages` is newer than
    /// the vmcs12 and has the fields that are learned now.
    pub(crate) unsafe fn save_aside(&mut self, vcpu: Vcpu, pages: Pages, count: &Counters) {
        let Some(ext) = self.extension.as_ref() else {
            return;
        };
        let quiet: *const SpinLock<()> = &ext.quiet;
        // SAFETY: As in `save_quietly`.
        let guard = unsafe { &*quiet }.lock();
        // SAFETY: By this function's contract, preemption being off.
        unsafe { self.save(vcpu, pages, count) };
        drop(guard);
    }

    /// shadow VMCS to vmcs12. Returns whether a learned field has changed.
    ///
    /// Only read, and active before, vmcs01's shadow VMCS need not be cleared: it stays where L1 had it, and the next copy
    /// to it finds it there. Nor need it be before it is read in its region, see `kvm::region`.
    ///
    /// # Safety
    ///
    /// The vCPU is loaded on this CPU with preemption off and the shadow VMCS is up to date.
    #[inline]
    pub(super) unsafe fn save(&mut self, vcpu: Vcpu, pages: Pages, count: &Counters) -> bool {
        let Some(ext) = self.extension.as_ref() else {
            return false;
        };
        let shadow = vmx::physical(pages.shadow.cast());
        let (base, checking) = (pages.vmcs12.cast::<u8>(), self.checking);
        self.entered_with = core::ptr::null();
        self.late = Late::Unread;
        // SAFETY: By this function's contract; the loaded VMCS is made current again below, as in
        // KVM's own copy_shadow_to_vmcs12().
        let found = unsafe {
            if ext.in_region {
                let region = Region::new(pages.shadow);
                if checking {
                    ext.compare_out(region, base, &self.written, count);
                    Found::default()
                } else {
                    ext.copy_out(region, base)
                }
            } else if vmx::load_shadow(shadow) {
                let found = if checking {
                    ext.compare_out(Current, base, &self.written, count);
                    Found::default()
                } else if ext.present {
                    ext.copy_out(Present, base)
                } else {
                    ext.copy_out_slowly(base)
                };
                if !vcpu.clears_with_loaded(pages.shadow) {
                    vmx::vmclear(shadow);
                }
                vmx::vmptrld(vcpu.loaded_vmcs());
                found
            } else {
                // Nothing here works any more: the next switch gives the vCPU back.
                self.unfit = true;
                return false;
            }
        };
        if checking {
            count.checked.bump();
        }
        // Each took a VMWRITE that did not exit. Reads, and further writes, leave no trace.
        count.saved_exits.add(found.saved);
        found.changed()
    }

    /// Finds out what has to be tried on the processor, once.
    ///
    /// # Safety
    ///
    /// As for `restore`.
    #[inline(always)]
    pub(super) unsafe fn explore(&mut self, vcpu: Vcpu) {
        if self
            .extension
            .as_ref()
            .is_some_and(|ext| ext.drops_reserved.is_none())
        {
            // SAFETY: By this function's contract.
            unsafe { self.try_rights(vcpu) };
        }
    }

    /// # Safety
    ///
    /// As for `restore`.
    #[cold]
    unsafe fn try_rights(&mut self, vcpu: Vcpu) {
        let (Some(ext), Some(page)) = (self.extension.as_mut(), vcpu.shadow_vmcs01()) else {
            return;
        };
        let shadow = vmx::physical(page.cast());
        // SAFETY: By this function's contract; vmcs12 is up to date, so that the shadow VMCS is about to be filled. Nothing is moved out.
        unsafe {
            if vmx::load_shadow(shadow) {
                ext.as_mut().get_unchecked_mut().drops_reserved = Some(drops_reserved());
                vmx::vmclear(shadow);
                vmx::vmptrld(vcpu.loaded_vmcs());
                self.rules = 0;
            } else {
                self.unfit = true;
            }
        }
    }

    /// vmcs12 to shadow VMCS, with the fields that are learned now.
    ///
    /// # Safety
    ///
    /// As for `save`, with vmcs01 current and vmcs12 up to date.
    #[inline(always)]
    pub(super) unsafe fn restore(
        &mut self,
        vcpu: Vcpu,
        vmcs12: Vmcs12,
        check: bool,
        shared: &Shared,
        count: &Counters,
    ) {
        // SAFETY: By this function's contract; each round but the last takes fields out.
        while unsafe { self.restore_once(vcpu, vmcs12, check, shared, count) } {}
    }

    /// One round of it. Returns whether there has to be another, because the processor lacks some of the fields.
    ///
    /// # Safety
    ///
    /// As for `restore`.
    #[inline(always)]
    unsafe fn restore_once(
        &mut self,
        vcpu: Vcpu,
        vmcs12: Vmcs12,
        check: bool,
        shared: &Shared,
        count: &Counters,
    ) -> bool {
        let entered_with = core::mem::replace(&mut self.entered_with, core::ptr::null());
        let rebuilt = self.must_rebuild(check);
        if rebuilt {
            self.rebuild(check);
            shared.learned.publish(&self.shadowed());
        }
        if self.extension.as_ref().is_some_and(|ext| ext.late) {
            // SAFETY: By this function's contract vmcs01 is loaded and preemption off.
            unsafe { self.get_late_fields(vcpu, vmcs12, count) };
        }
        let (Some(ext), Some(page)) = (self.extension.as_mut(), vcpu.shadow_vmcs01()) else {
            return false;
        };
        // SAFETY: Nothing is moved out.
        let ext = unsafe { ext.as_mut().get_unchecked_mut() };
        let shadow = vmx::physical(page.cast());
        let base = vmcs12.as_ptr().cast::<u8>();
        if rebuilt {
            // SAFETY: By this function's contract; the shadow VMCS is about to be filled.
            ext.in_region = unsafe { region::prove(page, vcpu.loaded_vmcs(), &ext.copied()) };
            ext.present = false;
        }
        let mut part = Part::All;
        if !rebuilt && entered_with == page.cast_const() {
            part = Part::Returned;
        }
        let mut refused = None;
        // SAFETY: By this function's contract, and as in `save`.
        unsafe {
            if ext.in_region && (self.announced || vmx::vmclear(shadow)) {
                if check && part == Part::Returned {
                    ext.compare_kept(base, Region::new(page), &self.written, count);
                    part = Part::All;
                }
                ext.copy_in(base, Region::new(page), part);
            } else if vmx::load_shadow(shadow) {
                if check && part == Part::Returned {
                    ext.compare_kept(base, Current, &self.written, count);
                    part = Part::All;
                }
                if ext.present {
                    ext.copy_in(base, Present, part);
                } else {
                    let put = ext.copy_in_slowly(base, part);
                    refused = (!put.refused.is_empty()).then_some(put.refused);
                    ext.present = part == Part::All && refused.is_none() && !put.lacks_other;
                }
                vmx::vmclear(shadow);
                vmx::vmptrld(vcpu.loaded_vmcs());
            } else {
                self.unfit = true;
                return false;
            }
        }
        // L1 is about to run with it.
        self.announced = false;
        if let Some(refused) = refused {
            // The processor has no such fields and KVM emulates them. Their bits must be set again before L1 runs.
            for number in refused.iter() {
                self.learner.bar(number);
                if let Some(all) = &mut self.beginning {
                    all.remove(number);
                }
            }
            self.stale = true;
            return true;
        }
        self.written = Set::EMPTY;
        shared.note_thread();
        if !shared.is_extended() {
            let at = |bitmap: &Bitmap| vmx::physical(core::ptr::from_ref(bitmap).cast());
            // SAFETY: By this function's contract vmcs01 is current again; the bitmaps live as long
            // as the extension, which is not dropped while `extended`.
            unsafe {
                vmx::vmwrite(VMREAD_BITMAP, at(&ext.vmread));
                vmx::vmwrite(VMWRITE_BITMAP, at(&ext.vmwrite));
            }
            shared.extended.store(true, Ordering::Relaxed);
        }
        false
    }

    /// Whether lists and bitmaps differ from what the learned set says.
    pub(super) fn must_rebuild(&self, check: bool) -> bool {
        self.stale || self.checking != check
    }

    /// Makes lists and bitmaps what the learned set says. Nothing that is newer than its vmcs12 may be in any
    /// shadow VMCS.
    #[cold]
    pub(super) fn rebuild(&mut self, check: bool) {
        let shadowed = self.shadowed();
        let Some(ext) = self.extension.as_mut() else {
            return;
        };
        // SAFETY: Nothing is moved out.
        let ext = unsafe { ext.as_mut().get_unchecked_mut() };
        let stock = |physical| vmx::virtual_address(physical).cast::<Bitmap>();
        // SAFETY: KVM's own bitmaps, as in `copy_of`.
        let (stock_vmread, stock_vmwrite) =
            unsafe { (&*stock(ext.stock_vmread), &*stock(ext.stock_vmwrite)) };
        ext.fields.clear();
        ext.late = false;
        // In mode `check` L1's accesses go where the stock code has them go.
        ext.left_out = if check {
            Set::EMPTY
        } else {
            ext.optional.without(self.stock.learned())
        };
        let all = |learned: &Set| {
            let mut numbers = (0..).zip(FIELDS).filter(|(_, f)| f.is_segment());
            numbers.all(|(number, _)| learned.has(number))
        };
        ext.segments = !check && all(&shadowed);
        for (number, field) in (0..).zip(FIELDS) {
            let reads = !stock_vmread.has(field);
            let writes = !stock_vmwrite.has(field);
            let left_out = ext.left_out.has(number);
            let learned = shadowed.has(number)
                && (!writes || left_out)
                && (ext.segments && field.is_segment()
                    || ext.fields.push(number, field, Use::Learned));
            if !learned && reads && !left_out {
                let how = if writes { Use::Stock } else { Use::StockRead };
                ext.fields.push(number, field, how);
            }
            ext.late |= learned && field.class.is_late();
            let served = learned && !check;
            ext.vmread.set(field, !served && (left_out || !reads));
            ext.vmwrite.set(field, !served && (left_out || !writes));
        }
        self.stale = false;
        self.checking = check;
    }

    /// Brings vmcs12 up to date, so that the next entry of L1 copies it to the shadow VMCS.
    ///
    /// # Safety
    ///
    /// The vCPU is loaded on this CPU with vmcs01.
    pub(crate) unsafe fn make_vmcs12_newer(&mut self, vcpu: Vcpu, count: &Counters) {
        if vcpu.vmcs12_is_newer() {
            return;
        }
        let Some(pages) = vcpu.pages() else { return };
        // SAFETY: By this function's contract.
        unsafe { self.save_quietly(vcpu, pages, count) };
        vcpu.set_vmcs12_newer(true);
    }

    /// As `save`, with preemption off meanwhile, and with what follows from a change.
    ///
    /// # Safety
    ///
    /// The vCPU is loaded on this CPU with vmcs01 and its shadow VMCS is up to date.
    #[inline]
    pub(super) unsafe fn save_quietly(&mut self, vcpu: Vcpu, pages: Pages, count: &Counters) {
        let Some(ext) = self.extension.as_ref() else {
            return;
        };
        let quiet: *const SpinLock<()> = &ext.quiet;
        // SAFETY: The extension is not dropped while the guard lives; `save` uses other fields.
        let guard = unsafe { &*quiet }.lock();
        // SAFETY: By this function's contract, preemption being off.
        unsafe {
            let changed = self.save(vcpu, pages, count);
            // Stock takes the PDPTEs from a vmcs12 only if a field that it does not shadow was written since, be it with
            // the same value; a write of a learned field leaves no trace then. Always taking them is what the SDM wants.
            let pdptes = !self.checking
                && Vmcs12::from_hook(pages.vmcs12).has_pae_paging()
                && !self.shadowed().is_empty();
            if (changed || pdptes) && vcpu.fetch_late_fields() {
                vcpu.mark_vmcs12_dirty();
            }
        }
        drop(guard);
    }

    /// Gives the vCPU back to the stock code.
    ///
    /// # Safety
    ///
    /// The vCPU is loaded on this CPU by the current task.
    pub(super) unsafe fn withdraw(
        &mut self,
        vcpu: Vcpu,
        regions: &mut Regions,
        count: &Counters,
        shared: &Shared,
    ) {
        if !shared.is_extended() {
            return;
        }
        // SAFETY: By this function's contract.
        unsafe { regions.settle(vcpu, self, count) };
        if vcpu.vmcs01_is_loaded() && vcpu.current_vmptr() != u64::MAX {
            // SAFETY: By this function's contract.
            unsafe { self.make_vmcs12_newer(vcpu, count) };
        }
        let Some(ext) = self.extension.as_ref() else {
            return;
        };
        let quiet: *const SpinLock<()> = &ext.quiet;
        let (vmread, vmwrite) = (ext.stock_vmread, ext.stock_vmwrite);
        // SAFETY: As in `save_quietly`.
        let guard = unsafe { &*quiet }.lock();
        // SAFETY: vmcs01 is current inside, and these are the addresses that KVM itself wrote.
        let done = unsafe {
            vcpu.with_vmcs01(|| {
                vmx::vmwrite(VMREAD_BITMAP, vmread) && vmx::vmwrite(VMWRITE_BITMAP, vmwrite)
            })
        };
        drop(guard);
        if done == Some(true) {
            self.extension = None;
            self.stale = true;
            self.learner = Learner::new(Config::new(BUDGET));
            self.rules = 0;
            shared.learned.publish(self.learner.learned());
            shared.extended.store(false, Ordering::Release);
        }
    }
}
