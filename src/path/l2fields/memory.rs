// SPDX-License-Identifier: GPL-2.0
//! What is kept for one vCPU to serve its L2, and the copies between KVM's copy of L2's shadow VMCS and the
//! one that the processor uses.

use super::copies::{Key, Known};
use crate::{
    alloc, bindings,
    kvm::{
        fields::{Class, Number, FIELDS},
        guest_memory::{GuestMemory, Window},
        region::{self, Current, Region, Shadow},
        shadow_page::ShadowPage,
        vmcs02::Bitmaps,
        vmx, Vcpu,
    },
    path::{
        fields::{
            extension::drops_reserved,
            lists::{for_each_width, Bitmap, List, Part, Use},
        },
        Counters,
    },
    policy::{
        learn::{Config, Learner},
        masks::Words,
        set::Set,
    },
};
use kernel::{new_spinlock, prelude::*, sync::SpinLock};
use pin_init::{init_from_closure, Init};

/// Most fields that are served.
pub(super) const BUDGET: u8 = 96;
/// Most words of a bitmap that can have one of them: every width and type has few.
const WORDS: usize = 32;

type Fields = List<{ BUDGET as usize }>;

/// The pages that the processor uses, and the lists of what they carry. Pinned: vmcs02 has the addresses.
#[pin_data]
pub(super) struct Tables {
    vmread: Bitmap,
    vmwrite: Bitmap,
    shadow: ShadowPage,
    fields: Fields,
    masks: Words<WORDS>,
    /// Whether the processor drops the reserved bits of access rights as KVM does.
    drops_reserved: Option<bool>,
    /// The fields can be read and written in the region of the shadow VMCS.
    in_region: bool,
    /// L2 may have run with the shadow VMCS since it was last cleared.
    active: bool,
    /// Taken to keep preemption off; never contended.
    #[pin]
    quiet: SpinLock<()>,
}

fn all_exit() -> impl Init<Bitmap> {
    // SAFETY: All of the page is written.
    unsafe {
        init_from_closure(|slot: *mut Bitmap| {
            slot.cast::<u8>()
                .write_bytes(0xff, core::mem::size_of::<Bitmap>());
            Ok(())
        })
    }
}

impl Tables {
    /// Allocates. May sleep.
    ///
    /// # Safety
    ///
    /// The CPU is in VMX root operation; `like` is a shadow VMCS of KVM's.
    unsafe fn new(like: *const bindings::vmcs) -> Result<Pin<KBox<Self>>> {
        // SAFETY: By this function's contract.
        let shadow = unsafe { ShadowPage::new(like)? };
        alloc::VCPU.gate()?;
        KBox::pin_init(
            pin_init!(Self {
                vmread <- all_exit(),
                vmwrite <- all_exit(),
                shadow,
                fields: List::EMPTY,
                masks: Words::new(),
                drops_reserved: None,
                in_region: false,
                active: false,
                quiet <- new_spinlock!(()),
            }),
            GFP_KERNEL_ACCOUNT | __GFP_NOWARN,
        )
    }
}

/// Most that is allocated for one vCPU, in bytes as the allocator rounds them.
pub(in crate::path) const MOST: usize =
    core::mem::size_of::<Tables>().next_power_of_two() + crate::kvm::guest_memory::PAGE;

/// What is kept for one vCPU.
pub(crate) struct Memory {
    pub(super) learner: Learner,
    tables: Option<Pin<KBox<Tables>>>,
    /// The learned set is not what the tables say.
    pub(super) stale: bool,
    /// vmcs02 uses the tables; the shadow VMCS has what L2 wrote last.
    serving: bool,
    /// What is known of KVM's copy of L2's shadow VMCS.
    pub(super) known: Known,
    /// The memory slot that had L1's bitmaps, and the generation of slots then.
    slot: (u64, Window),
    /// With this key `write_ahead` has written what L2 wrote, for the exit that is being made.
    pub(super) written_ahead: Option<Key>,
}

impl Memory {
    pub(crate) const NEW: Memory = Memory {
        learner: Learner::new(Config::new(BUDGET)),
        tables: None,
        stale: true,
        serving: false,
        known: Known::new(),
        slot: (0, Window::EMPTY),
        written_ahead: None,
    };

    /// Whether the processor serves L2 now.
    pub(super) fn is_serving(&self) -> bool {
        self.serving
    }

    /// Makes tables if there are none. May sleep.
    pub(super) fn make_tables(&mut self, vcpu: Vcpu) -> bool {
        if self.tables.is_none() {
            let Some(like) = vcpu.shadow_vmcs01() else {
                return false;
            };
            // SAFETY: In a handler of an exit the CPU is in VMX root operation.
            self.tables = unsafe { Tables::new(like) }.ok();
            self.stale = true;
        }
        self.tables.is_some()
    }

    /// Whether the processor can serve the field at all.
    pub(super) fn may_serve(&self, number: Number) -> bool {
        let Some(field) = FIELDS.get(number as usize) else {
            return false;
        };
        match field.class {
            Class::Seen => false,
            // Found out when the first field is served.
            Class::AccessRights | Class::LateAccessRights => self
                .tables
                .as_ref()
                .is_some_and(|t| t.drops_reserved == Some(true)),
            _ => true,
        }
    }

    /// Makes lists and masks what the learned set says.
    #[cold]
    fn rebuild(&mut self, vcpu: Vcpu) {
        let Some(tables) = self.tables.as_mut() else {
            return;
        };
        // SAFETY: Nothing is moved out.
        let t = unsafe { tables.as_mut().get_unchecked_mut() };
        for m in t.masks.iter() {
            for bitmap in [&mut t.vmread, &mut t.vmwrite] {
                bitmap.word(m.index).into_iter().for_each(|w| *w = u64::MAX);
            }
        }
        t.fields.clear();
        t.masks.clear();
        for (number, field) in (0..).zip(FIELDS) {
            // L2 may write what KVM lets it write (handle_vmwrite()).
            let written = field.class != Class::ExitInformation || vcpu.may_write_any_field();
            if self.learner.learned().has(number) && t.fields.push(number, field, Use::Learned) {
                t.masks.insert(field.encoding, field.has_high(), written);
            }
        }
        let guard = t.quiet.lock();
        let mut numbers = Set::EMPTY;
        t.fields.all().for_each(|e| numbers.insert(e.number));
        // SAFETY: Nothing is served while lists change, so what this shadow VMCS holds is of no use; the vCPU is loaded in
        // all handlers that come here.
        t.in_region = unsafe { region::prove(t.shadow.as_ptr(), vcpu.loaded_vmcs(), &numbers) };
        drop(guard);
        self.stale = false;
    }

    /// L2 has been entered by L1: has the processor serve it. May sleep. `announced`: VMPTRLD or VMCLEAR was executed since L2 last
    /// ran, see `kvm::region`.
    ///
    /// # Safety
    ///
    /// After nested_vmx_run(), with vmcs02 loaded and KVM's SRCU lock held; `l1` is what L1 asks for.
    pub(super) unsafe fn serve(&mut self, vcpu: Vcpu, l1: Bitmaps, announced: bool) {
        if self.stale {
            self.rebuild(vcpu);
        }
        if self.learner.learned().is_empty() {
            return;
        }
        let Some(tables) = self.tables.as_mut() else {
            return;
        };
        // SAFETY: Nothing is moved out.
        let t = unsafe { tables.as_mut().get_unchecked_mut() };
        let generation = vcpu.slots_generation();
        let slot = match generation {
            Some(now) if now == self.slot.0 => self.slot.1,
            _ => Window::EMPTY,
        };
        // SAFETY: By this function's contract; memory slots are those that they were.
        let mut memory = unsafe { GuestMemory::with_slot(vcpu, slot) };
        let mut readable = true;
        for m in t.masks.iter() {
            let mut merge = |bitmap: &mut Bitmap, gpa: u64, mask: u64| {
                let theirs = memory.read_u64(gpa.wrapping_add(u64::from(m.index) * 8));
                readable &= theirs.is_some();
                let theirs = theirs.unwrap_or(u64::MAX);
                bitmap
                    .word(m.index)
                    .into_iter()
                    .for_each(|w| *w = theirs | !mask);
            };
            merge(&mut t.vmread, l1.vmread, m.read);
            merge(&mut t.vmwrite, l1.vmwrite, m.write);
        }
        if let Some(now) = generation {
            self.slot = (now, memory.slot());
        }
        // A bitmap that cannot be read has every access exit to L1 on stock, unless it can be read by then: KVM looks on each access.
        if !readable {
            return;
        }
        // SAFETY: By this function's contract, preemption being off inside.
        let refused = unsafe { fill(t, vcpu, announced) };
        let Some(refused) = refused else {
            let guard = t.quiet.lock();
            let at = |bitmap: &Bitmap| vmx::physical(core::ptr::from_ref(bitmap).cast());
            // SAFETY: As above; the tables are not dropped while `serving`.
            unsafe { vcpu.serve_l2(t.shadow.as_ptr(), at(&t.vmread), at(&t.vmwrite)) };
            drop(guard);
            t.active = true;
            self.serving = true;
            return;
        };
        // The processor has no such field and KVM emulates it: L2 runs on stock code this time.
        self.learner.bar(refused);
        self.stale = true;
    }

    /// Brings KVM's copy of L2's shadow VMCS up to date. The one that L2 used stays as it was: `go_on` or `stop` follows.
    ///
    /// # Safety
    ///
    /// vmcs02 is loaded on this CPU by the current task.
    pub(super) unsafe fn save(&mut self, vcpu: Vcpu) {
        if self.written_ahead.is_some() {
            return;
        }
        let (Some(tables), Some(base), true) =
            (self.tables.as_mut(), vcpu.shadow_vmcs12(), self.serving)
        else {
            return;
        };
        // SAFETY: Nothing is moved out.
        let t = unsafe { tables.as_mut().get_unchecked_mut() };
        let known = &mut self.known;
        let guard = t.quiet.lock();
        let page = t.shadow.as_ptr();
        let shadow = vmx::physical(page.cast());
        // SAFETY: By this function's contract; the loaded VMCS is made current again.
        unsafe {
            if t.in_region {
                // Nothing of it is anywhere else, so `stop` may let go of it.
                t.active = false;
                copy_out(&t.fields, Region::new(page), base, known);
            } else {
                if vmx::load_shadow(shadow) {
                    copy_out(&t.fields, Current, base, known);
                    if !vcpu.clears_with_loaded(page) {
                        vmx::vmclear(shadow);
                    }
                }
                vmx::vmptrld(vcpu.loaded_vmcs());
            }
        }
        drop(guard);
    }

    /// See `l2fields::write_ahead`.
    ///
    /// # Safety
    ///
    /// As for `save`, with KVM's SRCU lock held, in KVM_RUN.
    #[cfg(MTK_GVA_WALK)]
    pub(super) unsafe fn write_ahead(&mut self, vcpu: Vcpu) -> bool {
        // SAFETY: By this function's contract.
        unsafe {
            self.save(vcpu);
            self.written_ahead = super::copies::write_ahead(vcpu, &mut self.known);
        }
        if self.written_ahead.is_none() {
            self.go_on();
        }
        self.written_ahead.is_some()
    }

    /// L2 goes on after `save` with what it was served.
    pub(super) fn go_on(&mut self) {
        if let (Some(t), true) = (self.tables.as_mut(), self.serving) {
            // SAFETY: Nothing is moved out.
            unsafe { t.as_mut().get_unchecked_mut() }.active = true;
        }
    }

    /// L2 is not served any more; `save` has been called if its shadow VMCS still matters.
    ///
    /// # Safety
    ///
    /// The vCPU is loaded on this CPU by the current task.
    pub(super) unsafe fn stop(&mut self, vcpu: Vcpu) {
        let (Some(t), true) = (&self.tables, self.serving) else {
            return;
        };
        let guard = t.quiet.lock();
        // SAFETY: By this function's contract, preemption being off.
        let done =
            unsafe { vcpu.with_vmcs02(|| vcpu.stop_serving_l2(t.shadow.as_ptr(), t.active)) };
        drop(guard);
        self.serving = done.is_none();
    }

    /// Mode `check`: tries whether the processor would give L2 what KVM's copy has; L2 itself is left alone.
    ///
    /// # Safety
    ///
    /// As for `save`.
    #[allow(clippy::useless_conversion, reason = "one text for three widths")]
    pub(super) unsafe fn compare(&mut self, vcpu: Vcpu, count: &Counters) {
        if self.stale {
            self.rebuild(vcpu);
        }
        let (Some(tables), Some(base)) = (self.tables.as_mut(), vcpu.shadow_vmcs12()) else {
            return;
        };
        // SAFETY: Nothing is moved out.
        let t = unsafe { tables.as_mut().get_unchecked_mut() };
        // SAFETY: By this function's contract.
        if let Some(refused) = unsafe { fill(t, vcpu, true) } {
            self.learner.bar(refused);
            self.stale = true;
            return;
        }
        count.checked.bump();
        let guard = t.quiet.lock();
        // SAFETY: As in `save`.
        unsafe {
            let shadow = vmx::physical(t.shadow.as_ptr().cast());
            if vmx::load_shadow(shadow) {
                for_each_width!(t.fields, Part::All, |e: Word| {
                    let value = vmx::vmread(u64::from(e.encoding)).unwrap_or_default();
                    let stock = base.add(e.offset as usize).cast::<Word>().read_unaligned();
                    if value as Word != stock {
                        super::report(count, e.number, value, u64::from(stock));
                    }
                });
                vmx::vmclear(shadow);
            }
            vmx::vmptrld(vcpu.loaded_vmcs());
        }
        drop(guard);
    }
}

/// From the shadow VMCS that the processor uses to KVM's copy of L2's.
///
/// # Safety
///
/// What `from` asks for; `base` is a vmcs12, and `fields` have offsets of its fields with their widths.
#[inline(always)]
unsafe fn copy_out<S: Shadow>(fields: &Fields, from: S, base: *mut u8, known: &mut Known) {
    // SAFETY: By this function's contract.
    unsafe {
        for_each_width!(fields, Part::All, |e: Word| {
            if let Some(value) = from.read::<Word>(e.encoding, e.offset) {
                let field = base.add(e.offset as usize).cast::<Word>();
                if field.read_unaligned() != value {
                    field.write_unaligned(value);
                    known.change(e.offset, core::mem::size_of::<Word>() as u16);
                }
            }
        });
    }
}

/// The other way round. Returns a field that the processor does not have.
///
/// # Safety
///
/// As for `copy_out`.
#[inline(always)]
unsafe fn copy_in<S: Shadow>(fields: &Fields, base: *const u8, to: S) -> Option<Number> {
    let mut refused = None;
    // SAFETY: By this function's contract.
    unsafe {
        for_each_width!(fields, Part::All, |e: Word| {
            let from = base.add(e.offset as usize).cast::<Word>();
            if !to.write(e.encoding, e.offset, from.read_unaligned()) {
                refused = Some(e.number);
            }
        });
    }
    refused
}

/// KVM's copy of L2's shadow VMCS to the one that the processor uses, which is clear before and afterwards, or in its region.
/// Returns a field that the processor does not have.
///
/// # Safety
///
/// The vCPU is loaded on this CPU by the current task.
unsafe fn fill(t: &mut Tables, vcpu: Vcpu, announced: bool) -> Option<Number> {
    let base = vcpu.shadow_vmcs12()?;
    let mut refused = None;
    let guard = t.quiet.lock();
    // SAFETY: As in `Memory::save`.
    unsafe {
        let page = t.shadow.as_ptr();
        let shadow = vmx::physical(page.cast());
        let in_region = t.in_region && t.drops_reserved.is_some();
        if in_region && (announced || vmx::vmclear(shadow)) {
            refused = copy_in(&t.fields, base, Region::new(page));
        } else {
            if vmx::load_shadow(shadow) {
                if t.drops_reserved.is_none() {
                    t.drops_reserved = Some(drops_reserved());
                }
                refused = copy_in(&t.fields, base, Current);
                vmx::vmclear(shadow);
            }
            vmx::vmptrld(vcpu.loaded_vmcs());
        }
    }
    drop(guard);
    refused
}
