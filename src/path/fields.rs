// SPDX-License-Identifier: GPL-2.0
//! Learned fields: the VMCS fields that this L1 reads and writes again and again are shadowed, so
//! that its VMREADs and VMWRITEs of them do not leave it (SDM volume 3, 26.10 and 32.3).
//!
//! Stock KVM shadows a fixed list for everybody. Here each vCPU has VMREAD and VMWRITE bitmaps of
//! its own: the stock list and what `policy::learn` found to pay. The shadow VMCS carries the
//! learned fields as well, so the two copies between it and vmcs12 are made here, as long as a vCPU
//! is *extended*:
//!
//! - nested_sync_vmcs12_to_shadow(): vmcs12 is up to date. The set may change only here.
//! - copy_shadow_to_vmcs12(): the shadow VMCS is up to date. KVM calls it wherever anything is
//!   about to look at vmcs12 while L1 runs: VMLAUNCH and VMRESUME, VMPTRLD, VMCLEAR, VMXOFF and
//!   KVM_GET_NESTED_STATE. So nothing more is needed to keep others from seeing stale fields.
//!
//! What a VMWRITE exit of the stock code would have done beside the write is made up for in the
//! second: if a learned field has changed, the guest state that KVM left in vmcs02 is fetched and
//! vmcs12 marked dirty, so that vmcs02 is prepared in full.
//!
//! `kvm::fields` says for each field whether and when it may be learned. Those that KVM leaves in
//! vmcs02 are fetched before each copy to the shadow VMCS while one of them is learned.

use super::{Counters, Path};
use crate::{
    bindings,
    hook::{self, Attached, CallId, Continuation, HookId, InFlight, Verdict},
    kvm::{
        fields::{self, Class, Field, Number, FIELDS},
        thread, vmx, Vcpu, Vmcs12,
    },
    policy::{
        learn::{Learner, Set},
        mode::Mode,
    },
    state,
};
use core::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use kernel::{c_str, current, new_spinlock, prelude::*, sync::SpinLock};
use pin_init::{init_from_closure, Init};

/// This path's number in `PATHS`.
const NUMBER: usize = 1;

/// Most fields that are shadowed beside the stock list.
const BUDGET: u8 = 96;
/// Room for the stock lists, of each width; stock KVM has 38 fields in all.
const STOCK: usize = 32;
/// Room for learned fields, of each width.
const LEARNED: usize = BUDGET as usize;

pub(super) const PATH: Path = Path {
    name: c_str!("fields"),
    about: c_str!("VMCS fields that L1 uses often are shadowed"),
    hooks: &[
        HookId::COPY_SHADOW,
        HookId::SYNC_SHADOW,
        HookId::HANDLE_VMREAD,
        HookId::HANDLE_VMWRITE,
    ],
    calls: &[
        CallId::VCPU_LOAD,
        CallId::VCPU_PUT,
        CallId::WAKE_UP,
        CallId::LOAD_VMCS,
        CallId::SYNC_RARE,
        CallId::FIELD_OFFSET,
    ],
    drain: Some(drain),
    reasons: &["no_state", "unknown_field", "never", "learning", "evmcs"],
};

/// Why an access of L1 was left to the stock code; names in `PATH.reasons`.
#[derive(Clone, Copy)]
enum Reason {
    /// No memory or no room for the vCPU's state.
    NoState,
    /// L1 named a field that vmcs12 does not have.
    UnknownField,
    /// A field whose access must be seen.
    Never,
    /// A field that is not, or not yet, worth shadowing.
    Learning,
    /// L1 uses an enlightened VMCS.
    Evmcs,
}

/// A page that the processor reads: one bit for each field encoding, set if the access exits.
#[repr(C, align(4096))]
struct Bitmap([u64; 512]);

impl Bitmap {
    fn set(&mut self, field: &Field, exits: bool) {
        let mut one = |encoding: u16| {
            if let Some(word) = self.0.get_mut(encoding as usize / 64) {
                let bit = 1 << (encoding % 64);
                *word = if exits { *word | bit } else { *word & !bit };
            }
        };
        one(field.encoding);
        if field.has_high() {
            one(field.encoding | 1);
        }
    }

    /// Makes the bits of `field` what they are in `other`.
    fn copy(&mut self, field: &Field, other: &Bitmap) {
        self.set(field, other.has(field));
    }

    fn has(&self, field: &Field) -> bool {
        let word = self
            .0
            .get(field.encoding as usize / 64)
            .copied()
            .unwrap_or(0);
        word >> (field.encoding % 64) & 1 != 0
    }

    fn clear_bits(&self) -> usize {
        self.0.iter().map(|w| w.count_zeros() as usize).sum()
    }
}

/// One field to copy, with all that the copy needs in one word.
#[derive(Clone, Copy)]
struct Entry {
    encoding: u16,
    offset: u16,
    number: Number,
    /// A change marks vmcs12 dirty.
    matters: bool,
}

/// Lists of fields to copy, one for each width, so that the copies have nothing to decide.
struct List<const N: usize> {
    entries: [[Entry; N]; 3],
    lens: [usize; 3],
}

impl<const N: usize> List<N> {
    const EMPTY: Self = Self {
        entries: [[Entry {
            encoding: 0,
            offset: 0,
            number: 0,
            matters: false,
        }; N]; 3],
        lens: [0; 3],
    };

    fn clear(&mut self) {
        self.lens = [0; 3];
    }

    /// Appends a field; `false` if there is no room for it.
    fn push(&mut self, number: Number, field: &Field) -> bool {
        let class = match field.width() {
            2 => 0,
            4 => 1,
            _ => 2,
        };
        let (Some(entries), Some(len)) = (self.entries.get_mut(class), self.lens.get_mut(class))
        else {
            return false;
        };
        let Some(slot) = entries.get_mut(*len) else {
            return false;
        };
        *slot = Entry {
            encoding: field.encoding,
            offset: field.offset,
            number,
            matters: field.class.matters_to_vmcs02(),
        };
        *len += 1;
        true
    }

    /// The fields of one width: 0 for 16 bits, 1 for 32, 2 for 64.
    #[inline(always)]
    fn of<const CLASS: usize>(&self) -> &[Entry] {
        self.entries[CLASS]
            .get(..self.lens[CLASS])
            .unwrap_or_default()
    }
}

/// Calls a copying function for each width of a list.
macro_rules! for_each_width {
    ($list:expr, |$entry:ident: $ty:ident| $body:expr) => {{
        for $entry in $list.of::<0>() {
            type $ty = u16;
            $body
        }
        for $entry in $list.of::<1>() {
            type $ty = u32;
            $body
        }
        for $entry in $list.of::<2>() {
            type $ty = u64;
            $body
        }
    }};
}

/// What an extended vCPU needs beside what is learned. Pinned: the processor holds the bitmaps'
/// addresses.
#[pin_data]
struct Extension {
    vmread: Bitmap,
    vmwrite: Bitmap,
    /// Addresses of the stock bitmaps, to go back to.
    stock_vmread: u64,
    stock_vmwrite: u64,
    /// Fields that the stock code shadows, for writing too and for reading only.
    stock_rw: List<STOCK>,
    stock_ro: List<STOCK>,
    /// Learned fields that are in the shadow VMCS now.
    learned: List<LEARNED>,
    /// One of the learned fields must be fetched from vmcs02.
    late: bool,
    /// Whether the processor drops the reserved bits of access rights as KVM does; `None` before it
    /// was tried.
    drops_reserved: Option<bool>,
    /// Taken to keep preemption off; never contended.
    #[pin]
    quiet: SpinLock<()>,
}

/// Tries whether VMWRITE drops the reserved bits of access rights, leaving those that
/// `handle_vmwrite()` leaves. GUEST_ES_AR_BYTES stands for all of them.
///
/// # Safety
///
/// A shadow VMCS that is about to be filled is current.
unsafe fn drops_reserved() -> bool {
    const GUEST_ES_AR_BYTES: u64 = 0x4814;
    // SAFETY: By this function's contract.
    unsafe {
        vmx::vmwrite(GUEST_ES_AR_BYTES, u64::from(u32::MAX))
            && vmx::vmread(GUEST_ES_AR_BYTES) == Some(0x1f0ff)
    }
}

fn copy_of(bitmap: u64) -> impl Init<Bitmap> {
    let from = vmx::virtual_address(bitmap).cast::<Bitmap>();
    // SAFETY: KVM's own bitmap: a whole page in the direct map, constant since kvm_intel's init and
    // never freed while it is loaded. The slot is a whole page as well, and fully written.
    unsafe {
        init_from_closure(move |slot: *mut Bitmap| {
            core::ptr::copy_nonoverlapping(from, slot, 1);
            Ok(())
        })
    }
}

impl Extension {
    /// Reads the stock bitmaps off vmcs01, which must be current. `Ok(None)` if they are not what
    /// the field table can explain: then this kernel shadows something that we do not know.
    fn new(vcpu: Vcpu) -> Result<Option<Pin<KBox<Self>>>> {
        // SAFETY: `vcpu` is in a handler with vmcs01 current.
        let addresses = unsafe {
            (
                vmx::vmread(vmx::VMREAD_BITMAP),
                vmx::vmread(vmx::VMWRITE_BITMAP),
            )
        };
        let (Some(stock_vmread), Some(stock_vmwrite)) = addresses else {
            return Ok(None);
        };
        let _ = vcpu;
        let mut ext = KBox::pin_init(
            pin_init!(Self {
                vmread <- copy_of(stock_vmread),
                vmwrite <- copy_of(stock_vmwrite),
                stock_vmread,
                stock_vmwrite,
                stock_rw: List::EMPTY,
                stock_ro: List::EMPTY,
                learned: List::EMPTY,
                late: false,
                drops_reserved: None,
                quiet <- new_spinlock!(()),
            }),
            GFP_KERNEL_ACCOUNT | __GFP_NOWARN,
        )?;
        // SAFETY: Nothing is moved out.
        let this = unsafe { ext.as_mut().get_unchecked_mut() };
        let (mut reads, mut writes, mut room) = (0, 0, true);
        for (number, field) in (0..).zip(FIELDS) {
            let bits = if field.has_high() { 2 } else { 1 };
            if !this.vmwrite.has(field) {
                room &= this.stock_rw.push(number, field);
                writes += bits;
            } else if !this.vmread.has(field) {
                room &= this.stock_ro.push(number, field);
            }
            if !this.vmread.has(field) {
                reads += bits;
            }
        }
        let explained = this.vmread.clear_bits() == reads && this.vmwrite.clear_bits() == writes;
        Ok((explained && room).then_some(ext))
    }
}

/// What another thread may know about a vCPU.
pub(crate) struct Shared {
    /// vmcs01 has our bitmaps and the shadow VMCS the learned fields.
    extended: AtomicBool,
    /// The thread that ran the vCPU last, by its number in the initial namespace.
    thread: AtomicI32,
}

impl Shared {
    pub(crate) const fn new() -> Self {
        Self {
            extended: AtomicBool::new(false),
            thread: AtomicI32::new(0),
        }
    }

    fn is_extended(&self) -> bool {
        self.extended.load(Ordering::Relaxed)
    }
}

/// What is kept for one vCPU.
pub(crate) struct Memory {
    learner: Learner,
    extension: Option<Pin<KBox<Extension>>>,
    /// The stock bitmaps could not be explained: nothing is ever learned.
    unfit: bool,
    /// The learned set is not what the lists and bitmaps say.
    stale: bool,
    /// The bitmaps were made in mode `check`, so that vmcs12 has what L1 writes to learned fields,
    /// whatever the mode is by now.
    checking: bool,
    /// In mode `check`: fields that L1 wrote since the last copy, which the shadow VMCS lacks.
    written: Set,
}

impl Memory {
    pub(crate) const NEW: Memory = Memory {
        learner: Learner::new(BUDGET),
        extension: None,
        unfit: false,
        stale: true,
        checking: false,
        written: Set::EMPTY,
    };

    /// shadow VMCS to vmcs12. Returns whether a learned field has changed.
    ///
    /// # Safety
    ///
    /// The vCPU is loaded on this CPU with preemption off and its shadow VMCS is up to date.
    #[inline]
    #[allow(clippy::useless_conversion, reason = "one text for three widths")]
    unsafe fn save(&mut self, vcpu: Vcpu, vmcs12: Vmcs12, count: &Counters) -> bool {
        let (Some(ext), Some(shadow)) = (self.extension.as_ref(), vcpu.shadow_vmcs()) else {
            return false;
        };
        let base = vmcs12.as_ptr().cast_mut().cast::<u8>();
        let mut changed = false;
        // SAFETY: By this function's contract; the loaded VMCS is made current again below, as in
        // KVM's own copy_shadow_to_vmcs12(). Entries have offsets of fields of vmcs12 with their
        // widths.
        unsafe {
            if !vmx::vmptrld(shadow) {
                return false;
            }
            for_each_width!(ext.stock_rw, |e: Word| {
                if let Some(value) = vmx::vmread(u64::from(e.encoding)) {
                    base.add(e.offset as usize)
                        .cast::<Word>()
                        .write_unaligned(value as Word);
                }
            });
            for_each_width!(ext.learned, |e: Word| {
                let at = base.add(e.offset as usize).cast::<Word>();
                if let Some(value) = vmx::vmread(u64::from(e.encoding)) {
                    let old = at.read_unaligned();
                    if value as Word != old {
                        if !self.checking {
                            changed |= e.matters;
                            at.write_unaligned(value as Word);
                        } else if !self.written.has(e.number) {
                            report(count, e, value, u64::from(old));
                        }
                    }
                }
            });
            vmx::vmclear(shadow);
            vmx::vmptrld(vcpu.loaded_vmcs());
        }
        if self.checking {
            count.checked.bump();
        }
        changed
    }

    /// vmcs12 to shadow VMCS, with the fields that are learned now.
    ///
    /// # Safety
    ///
    /// As for `save`, with vmcs01 current and vmcs12 up to date.
    #[inline]
    #[allow(clippy::useless_conversion, reason = "one text for three widths")]
    unsafe fn restore(&mut self, vcpu: Vcpu, vmcs12: Vmcs12, check: bool, shared: &Shared) {
        if self.stale || self.checking != check {
            self.rebuild(check);
        }
        let (Some(ext), Some(shadow)) = (self.extension.as_mut(), vcpu.shadow_vmcs()) else {
            return;
        };
        // SAFETY: Nothing is moved out.
        let ext = unsafe { ext.as_mut().get_unchecked_mut() };
        if ext.late {
            // SAFETY: By this function's contract vmcs01 is loaded and preemption off.
            unsafe { vcpu.fetch_late_fields() };
        }
        let base = vmcs12.as_ptr().cast::<u8>();
        let mut refused = None;
        // SAFETY: By this function's contract, and as in `save`.
        unsafe {
            if !vmx::vmptrld(shadow) {
                return;
            }
            if ext.drops_reserved.is_none() {
                ext.drops_reserved = Some(drops_reserved());
            }
            for_each_width!(ext.stock_rw, |e: Word| {
                let value = base.add(e.offset as usize).cast::<Word>().read_unaligned();
                vmx::vmwrite(u64::from(e.encoding), u64::from(value));
            });
            for_each_width!(ext.stock_ro, |e: Word| {
                let value = base.add(e.offset as usize).cast::<Word>().read_unaligned();
                vmx::vmwrite(u64::from(e.encoding), u64::from(value));
            });
            for_each_width!(ext.learned, |e: Word| {
                let value = base.add(e.offset as usize).cast::<Word>().read_unaligned();
                if !vmx::vmwrite(u64::from(e.encoding), u64::from(value)) {
                    refused = Some(e.number);
                }
            });
            vmx::vmclear(shadow);
            vmx::vmptrld(vcpu.loaded_vmcs());
        }
        if let Some(number) = refused {
            // The processor has no such field and KVM emulates it. Its bits must be set again
            // before L1 runs; more such fields show one after another.
            self.learner.bar(number);
            self.stale = true;
            // SAFETY: As this call; each round bars a field, so it ends.
            return unsafe { self.restore(vcpu, vmcs12, check, shared) };
        }
        self.written = Set::EMPTY;
        shared.thread.store(current!().pid(), Ordering::Relaxed);
        if !shared.is_extended() {
            let at = |bitmap: &Bitmap| vmx::physical(core::ptr::from_ref(bitmap).cast());
            // SAFETY: By this function's contract vmcs01 is current again; the bitmaps live as long
            // as the extension, which is not dropped while `extended`.
            unsafe {
                vmx::vmwrite(vmx::VMREAD_BITMAP, at(&ext.vmread));
                vmx::vmwrite(vmx::VMWRITE_BITMAP, at(&ext.vmwrite));
            }
            shared.extended.store(true, Ordering::Relaxed);
        }
    }

    /// Makes lists and bitmaps what the learned set says.
    #[cold]
    fn rebuild(&mut self, check: bool) {
        let Some(ext) = self.extension.as_mut() else {
            return;
        };
        // SAFETY: Nothing is moved out.
        let ext = unsafe { ext.as_mut().get_unchecked_mut() };
        let stock = |physical| vmx::virtual_address(physical).cast::<Bitmap>();
        // SAFETY: KVM's own bitmaps, as in `copy_of`.
        let (stock_vmread, stock_vmwrite) =
            unsafe { (&*stock(ext.stock_vmread), &*stock(ext.stock_vmwrite)) };
        for e in Iterator::chain(
            Iterator::chain(ext.learned.of::<0>().iter(), ext.learned.of::<1>()),
            ext.learned.of::<2>(),
        ) {
            if let Some(field) = FIELDS.get(e.number as usize) {
                ext.vmread.copy(field, stock_vmread);
                ext.vmwrite.copy(field, stock_vmwrite);
            }
        }
        ext.learned.clear();
        ext.late = false;
        for (number, field) in (0..).zip(FIELDS) {
            if self.learner.learned().has(number) && ext.learned.push(number, field) {
                ext.late |= field.class.is_late();
                // In mode `check` L1's accesses go where the stock code has them go.
                if !check {
                    ext.vmread.set(field, false);
                    ext.vmwrite.set(field, false);
                }
            }
        }
        self.stale = false;
        self.checking = check;
    }

    /// Brings vmcs12 up to date, so that the next entry of L1 copies it to the shadow VMCS.
    ///
    /// # Safety
    ///
    /// The vCPU is loaded on this CPU with vmcs01.
    unsafe fn make_vmcs12_newer(&mut self, vcpu: Vcpu, count: &Counters) {
        if vcpu.vmcs12_is_newer() {
            return;
        }
        let Some(vmcs12) = vcpu.vmcs12() else { return };
        // SAFETY: By this function's contract.
        unsafe { self.save_quietly(vcpu, vmcs12, count) };
        vcpu.set_vmcs12_newer(true);
    }

    /// As `save`, with preemption off meanwhile, and with what follows from a change.
    ///
    /// # Safety
    ///
    /// The vCPU is loaded on this CPU with vmcs01 and its shadow VMCS is up to date.
    #[inline]
    unsafe fn save_quietly(&mut self, vcpu: Vcpu, vmcs12: Vmcs12, count: &Counters) {
        let Some(ext) = self.extension.as_ref() else {
            return;
        };
        let quiet: *const SpinLock<()> = &ext.quiet;
        // SAFETY: The extension is not dropped while the guard lives; `save` uses other fields.
        let guard = unsafe { &*quiet }.lock();
        // SAFETY: By this function's contract, preemption being off.
        unsafe {
            if self.save(vcpu, vmcs12, count) && vcpu.fetch_late_fields() {
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
    unsafe fn withdraw(&mut self, vcpu: Vcpu, count: &Counters, shared: &Shared) {
        if !shared.is_extended() {
            return;
        }
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
                vmx::vmwrite(vmx::VMREAD_BITMAP, vmread)
                    && vmx::vmwrite(vmx::VMWRITE_BITMAP, vmwrite)
            })
        };
        drop(guard);
        if done == Some(true) {
            self.extension = None;
            self.stale = true;
            self.learner = Learner::new(BUDGET);
            shared.extended.store(false, Ordering::Release);
        }
    }
}

static REPORTED: AtomicBool = AtomicBool::new(false);

#[cold]
fn report(counters: &Counters, entry: &Entry, shadow: u64, vmcs12: u64) {
    counters.mismatches.bump();
    let name = FIELDS.get(entry.number as usize).map_or("?", |f| f.name);
    if !REPORTED.swap(true, Ordering::Relaxed) {
        pr_warn!(
            "fields: {} ({:#x}) would read {:#x} from the shadow VMCS, vmcs12 has {:#x}\n",
            name,
            entry.encoding,
            shadow,
            vmcs12
        );
    }
}

fn fall_back(counters: &Counters, reason: Reason) {
    if let Some(count) = counters.fallbacks.get(reason as usize) {
        count.bump();
    }
}

/// Handler of copy_shadow_to_vmcs12(): the shadow VMCS is up to date.
#[no_mangle]
extern "C" fn mtk_on_copy_shadow(vmx: *mut bindings::vcpu_vmx, cont: Continuation) -> Verdict {
    let _ = cont;
    // SAFETY: The hooked function's own argument; kvm_vcpu is the first member of vcpu_vmx.
    let vcpu = unsafe { Vcpu::from_hook(vmx.cast()) };
    let mode = super::mode(NUMBER);
    let handled = state::with(vcpu, |local, counters| {
        let memory = &mut local.fields;
        let extended = counters.fields.is_extended() && vcpu.vmcs01_is_loaded();
        let vmcs12 = vcpu.vmcs12().filter(|_| extended)?;
        let count = counters.path::<NUMBER>();
        // SAFETY: KVM is about to do the same, at the same place.
        unsafe { memory.save_quietly(vcpu, vmcs12, count) };
        count.taken.bump();
        Some(())
    });
    match handled {
        Some(Some(())) => return Verdict::handled(0),
        _ if mode != Mode::Off && vcpu.vmcs01_is_loaded() => make_room(vcpu, HookId::COPY_SHADOW),
        _ => {}
    }
    Verdict::STOCK
}

/// Handler of nested_sync_vmcs12_to_shadow(): vmcs12 is up to date, L1 is about to run, preemption
/// is off. The only place where the set of fields changes.
#[no_mangle]
extern "C" fn mtk_on_sync_shadow(vcpu: *mut bindings::kvm_vcpu, _cont: Continuation) -> Verdict {
    // SAFETY: The hooked function's own argument.
    let vcpu = unsafe { Vcpu::from_hook(vcpu) };
    let mode = super::mode(NUMBER);
    let handled = state::with(vcpu, |local, counters| {
        let memory = &mut local.fields;
        let vmcs12 = vcpu.vmcs12()?;
        memory.extension.as_ref()?;
        if vcpu.evmcs_is_mapped() || !vcpu.vmcs01_is_loaded() {
            return None;
        }
        if mode == Mode::Off {
            // Being given back: vmcs12 is up to date, so this is as good a place as any. Going on
            // to the stock copy while extended would leave old values in the learned fields.
            // SAFETY: L1 is about to run here, so the vCPU is loaded by this task.
            unsafe { memory.withdraw(vcpu, counters.path::<NUMBER>(), &counters.fields) };
            return None;
        }
        memory.stale |= memory.learner.switched();
        // SAFETY: KVM is about to do the same, at the same place, with vmcs01 current.
        unsafe { memory.restore(vcpu, vmcs12, mode == Mode::Check, &counters.fields) };
        vcpu.set_vmcs12_newer(false);
        Some(())
    });
    match handled {
        Some(Some(())) => Verdict::handled(0),
        _ => Verdict::STOCK,
    }
}

/// Makes the vCPU's extension, which the next copy from vmcs12 puts to use. May sleep.
#[cold]
fn make_room(vcpu: Vcpu, hook: HookId) {
    let section = InFlight::enter(hook);
    let made = state::ensure(vcpu, &section)
        && match state::with(vcpu, |local, _| {
            local.fields.unfit || local.fields.extension.is_some()
        }) {
            Some(true) => true,
            _ => match Extension::new(vcpu) {
                Ok(extension) => {
                    state::with(vcpu, |local, _| {
                        local.fields.unfit = extension.is_none();
                        local.fields.extension = extension;
                        local.fields.stale = true;
                    });
                    true
                }
                Err(_) => false,
            },
        };
    if !made {
        super::count_stateless(NUMBER, Reason::NoState as usize);
    }
}

/// Whether KVM lets L1 use the field on this host, at the place where we expect it.
fn kvm_knows(number: Number) -> bool {
    let Some(field) = FIELDS.get(number as usize) else {
        return false;
    };
    // SAFETY: A pure function of a number.
    let offset = unsafe { CallId::FIELD_OFFSET.call([field.encoding as usize, 0, 0]) };
    offset.is_some_and(|o| o as i16 == field.offset as i16)
}

/// L1 has executed VMREAD or VMWRITE of a field that is not shadowed.
fn accessed(raw: *mut bindings::kvm_vcpu, write: bool) {
    // SAFETY: The hooked function's own argument.
    let vcpu = unsafe { Vcpu::from_hook(raw) };
    let mode = super::mode(NUMBER);
    if mode == Mode::Off || vcpu.guest_mode() || vcpu.current_vmptr() == u64::MAX {
        return;
    }
    // SAFETY: In a handler of an exit, the exited VMCS is current.
    let Some(info) = (unsafe { vmx::vmread(vmx::VMX_INSTRUCTION_INFO) }) else {
        return;
    };
    // Register 2 names the field (SDM table 29-14).
    let Some(encoding) = vcpu.gpr((info >> 28 & 0xf) as usize) else {
        return;
    };

    let room = state::with(vcpu, |local, counters| {
        let count = counters.path::<NUMBER>();
        let memory = &mut local.fields;
        let Some(number) = fields::by_encoding(encoding) else {
            fall_back(count, Reason::UnknownField);
            return true;
        };
        if vcpu.evmcs_is_mapped() || vcpu.shadow_vmcs().is_none() {
            fall_back(count, Reason::Evmcs);
            return true;
        }
        let Some(class) = FIELDS.get(number as usize).map(|f| f.class) else {
            return true;
        };
        let drops_reserved = || {
            memory
                .extension
                .as_ref()
                .is_some_and(|e| e.drops_reserved == Some(true))
        };
        let may_be_learned = match class {
            _ if memory.unfit => false,
            Class::Plain | Class::Late => true,
            Class::AccessRights | Class::LateAccessRights => drops_reserved(),
            Class::ExitInformation => vcpu.may_write_any_field(),
            Class::Seen => false,
        };
        if !may_be_learned {
            fall_back(count, Reason::Never);
            return memory.unfit || memory.extension.is_some();
        }
        if write {
            memory.written.insert(number);
        }
        fall_back(count, Reason::Learning);
        if memory.learner.touched(number, class.is_late()) {
            memory.stale = true;
            if !kvm_knows(number) {
                memory.learner.bar(number);
                return true;
            }
            // Without an extension the shadow VMCS has what the stock code put there, and the copy
            // that makes vmcs12 newer is the stock code's to make: wait for the next switch.
            if memory.extension.is_some() && counters.fields.is_extended() {
                // SAFETY: L1 has exited, so vmcs01 is loaded and the shadow VMCS up to date.
                unsafe { memory.make_vmcs12_newer(vcpu, count) };
            }
        }
        memory.extension.is_some()
    });
    if room != Some(true) {
        make_room(
            vcpu,
            if write {
                HookId::HANDLE_VMWRITE
            } else {
                HookId::HANDLE_VMREAD
            },
        );
    }
}

/// Handler of handle_vmread(): learns, and lets the stock function run.
#[no_mangle]
extern "C" fn mtk_on_handle_vmread(vcpu: *mut bindings::kvm_vcpu, _cont: Continuation) -> Verdict {
    accessed(vcpu, false);
    Verdict::STOCK
}

/// Handler of handle_vmwrite(): learns, and lets the stock function run.
#[no_mangle]
extern "C" fn mtk_on_handle_vmwrite(vcpu: *mut bindings::kvm_vcpu, _cont: Continuation) -> Verdict {
    accessed(vcpu, true);
    Verdict::STOCK
}

fn withdraw(vcpu: Vcpu) {
    state::with(vcpu, |local, counters| {
        let count = counters.path::<NUMBER>();
        // SAFETY: The vCPU is loaded on this CPU by this task, by the callers.
        unsafe { local.fields.withdraw(vcpu, count, &counters.fields) };
    });
}

/// Handler of vmx_prepare_switch_to_guest(), attached only while vCPUs are given back: a vCPU that
/// is about to run does it itself.
#[no_mangle]
extern "C" fn mtk_on_enter_guest(vcpu: *mut bindings::kvm_vcpu, _cont: Continuation) -> Verdict {
    if super::mode(NUMBER) == Mode::Off {
        // SAFETY: The hooked function's own argument.
        withdraw(unsafe { Vcpu::from_hook(vcpu) });
    }
    Verdict::STOCK
}

/// Rounds of about a millisecond after which a vCPU that sleeps in KVM_RUN is woken.
const PATIENCE: u32 = 50;

/// Gives every vCPU back to the stock code. A vCPU that runs does it on its next entry (a tick of
/// the host is enough to bring it there); one that is out of KVM_RUN is done here, under its mutex;
/// one that sleeps inside is sent out, as by a signal, and its VMM sees EINTR.
fn drain() {
    let mut any = false;
    state::for_each_vcpu(|_, counters| any |= counters.fields.is_extended());
    if !any {
        return;
    }
    let mut entry = [const { None }; hook::COUNT];
    match Attached::attach(HookId::ENTER_GUEST) {
        Ok(attached) => entry[0] = Some(attached),
        Err(_) => {
            pr_warn!("fields: cannot hook the guest's entry; waiting for vCPUs to leave KVM_RUN\n")
        }
    }
    let mut rounds = 0u32;
    loop {
        let mut left = 0;
        state::for_each_vcpu(|raw, counters| {
            if !counters.fields.is_extended() {
                return;
            }
            let mutex = Vcpu::mutex(raw);
            // SAFETY: The vCPU cannot be freed: its state is dropped first, which waits for us.
            if unsafe { bindings::mutex_trylock(mutex) } == 0 {
                left += 1;
                if rounds >= PATIENCE {
                    thread::interrupt(counters.fields.thread.load(Ordering::Relaxed));
                    // SAFETY: As above; wakes the vCPU's thread if it sleeps in kvm_vcpu_block().
                    unsafe { CallId::WAKE_UP.call([raw as usize, 0, 0]) };
                }
                return;
            }
            // SAFETY: The mutex is held, as for an ioctl on the vCPU, which loads it the same way.
            unsafe {
                let args = [raw as usize, 0, 0];
                if CallId::VCPU_LOAD.call(args).is_some() {
                    withdraw(Vcpu::from_hook(raw));
                    CallId::VCPU_PUT.call(args);
                }
                bindings::mutex_unlock(mutex);
            }
            left += usize::from(counters.fields.is_extended());
        });
        if left == 0 {
            break;
        }
        rounds = rounds.saturating_add(1);
        // SAFETY: Process context.
        unsafe { bindings::msleep(1) };
    }
    hook::detach(&mut entry);
}
