// SPDX-License-Identifier: GPL-2.0
//! KVM's vCPU, as a handler on its own thread sees it.

use super::{
    fields::{encoding::*, for_each_late},
    vmx, Vmcs12,
};
use crate::{
    bindings,
    hook::CallId,
    policy::{
        registers::{CR0_PE, CR4_LA57, HF_GUEST, RFLAGS_VM},
        segments::{self, Inputs},
    },
};
use core::sync::atomic::{AtomicU64, Ordering};

/// KVM_DEBUGREG_BP_ENABLED, in `switch_db_regs`.
pub(super) const BP_ENABLED: u32 = 1;

// `to_vmx()` is a container_of(); the views below rely on it being a cast.
const _: () = assert!(core::mem::offset_of!(bindings::vcpu_vmx, vcpu) == 0);

/// A vCPU inside one of its hooked functions.
///
/// # Invariants
///
/// The pointer is to a live `struct kvm_vcpu` whose mutex the current task holds or that nobody else can reach any more, so
/// that fields that only the vCPU's thread changes stay put. It is the first member of a `struct vcpu_vmx`, unless `is_vmx()`
/// says no; then only `key()` is used. Where KVM has loaded the vCPU, the VMCS that `loaded_vmcs` names is current on this CPU.
#[derive(Clone, Copy)]
pub(crate) struct Vcpu(*mut bindings::vcpu_vmx);

macro_rules! read {
    ($self:expr, $($path:tt)+) => {
        // SAFETY: By the invariants of `Vcpu`.
        unsafe { (&raw const (*$self.raw()).$($path)+).read() }
    };
}

pub(super) use read;

/// `vcpu->mutex`, which a thread holds for each ioctl on the vCPU, held by this one.
pub(crate) struct Held(*mut kernel::bindings::mutex);

impl Held {
    /// Takes it if nobody has it.
    ///
    /// # Safety
    ///
    /// The vCPU is not freed before the result is dropped.
    pub(crate) unsafe fn try_take(vcpu: *mut bindings::kvm_vcpu) -> Option<Self> {
        // SAFETY: By this function's contract. The kernel crate's helper, since with lockdep this is a macro in C.
        unsafe {
            let mutex = (&raw mut (*vcpu).mutex).cast();
            // Made only if it is held: dropping it unlocks.
            (kernel::bindings::mutex_trylock(mutex) != 0).then(|| Held(mutex))
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: Taken by `try_take`, by this thread: a raw pointer is not `Send`.
        unsafe { kernel::bindings::mutex_unlock(self.0) };
    }
}

impl Vcpu {
    /// Views the vCPU that KVM passed to a hooked function.
    ///
    /// # Safety
    ///
    /// `ptr` is the vCPU that a hooked function of kvm or kvm_intel got, and the view is used only in its handler. Where vCPUs
    /// of TDX guests pass as well, nothing but `key()` and `is_vmx()` is used before `is_vmx()`, or `state::with()`, which finds
    /// nothing for them, has said that it is none.
    #[inline(always)]
    pub(crate) unsafe fn from_hook(ptr: *mut bindings::kvm_vcpu) -> Self {
        // INVARIANT: By this function's contract, and kvm_vcpu is the first member of vcpu_vmx.
        Self(ptr.cast())
    }

    /// KVM's structure, which the type's invariants are about.
    #[inline(always)]
    pub(super) fn raw(self) -> *mut bindings::vcpu_vmx {
        self.0
    }

    /// The address, as the key of the module's own state.
    #[inline(always)]
    pub(crate) fn key(self) -> usize {
        self.0 as usize
    }

    /// `kvm_make_request()`, of a bit of `vcpu->requests`.
    #[inline(always)]
    pub(super) fn request(self, bit: u64) {
        // SAFETY: By the invariants of `Vcpu`; other threads make requests as well, with locked instructions.
        let requests = unsafe { AtomicU64::from_ptr(&raw mut (*self.0).vcpu.requests) };
        requests.fetch_or(bit, Ordering::Release);
    }

    /// Has the TLB flushed, before the guest runs, of what it holds by the EPT in use: `KVM_REQ_TLB_FLUSH_CURRENT`.
    #[cold]
    pub(crate) fn request_tlb_flush(self) {
        self.request(1 << bindings::MTK_REQ_TLB_FLUSH_CURRENT);
    }

    /// Whether this is a `struct vcpu_vmx`: TDX guests have another one, and pass some of KVM's hooked functions, too.
    pub(crate) fn is_vmx(self) -> bool {
        let kvm = read!(self, vcpu.kvm);
        // SAFETY: A vCPU's VM outlives it; the type is set when it is made.
        u32::from(unsafe { (*kvm).arch.vm_type }) != bindings::MTK_TDX_VM
    }

    /// `vmx->nested.current_vmptr`: the guest-physical address of the current vmcs12, all ones for
    /// none.
    #[inline(always)]
    pub(crate) fn current_vmptr(self) -> u64 {
        read!(self, nested.current_vmptr)
    }

    /// Whether Hyper-V's enlightened VMCS is on for this vCPU.
    #[inline(always)]
    pub(crate) fn enlightened_vmcs(self) -> bool {
        #[cfg(CONFIG_KVM_HYPERV)]
        {
            read!(self, nested.enlightened_vmcs_enabled)
        }
        #[cfg(not(CONFIG_KVM_HYPERV))]
        {
            false
        }
    }

    /// `vcpu->arch.nested_run_pending != 0`: a VMLAUNCH or VMRESUME of L1 is being carried out.
    #[inline(always)]
    pub(crate) fn nested_run_pending(self) -> bool {
        u32::from(read!(self, vcpu.arch.nested_run_pending)) != 0
    }

    /// `is_guest_mode()`: an L2 (or deeper) guest runs on this vCPU.
    #[inline(always)]
    pub(crate) fn guest_mode(self) -> bool {
        u64::from(read!(self, vcpu.arch.hflags)) & HF_GUEST != 0
    }

    /// `vcpu->arch.efer`.
    #[cfg(MTK_GVA_WALK)]
    #[inline(always)]
    pub(crate) fn efer(self) -> u64 {
        read!(self, vcpu.arch.efer)
    }

    /// CR4.LA57 as the guest has it now; KVM never lets the guest own this bit, so the copy in
    /// `vcpu->arch` is right.
    #[inline(always)]
    pub(crate) fn cr4_la57(self) -> bool {
        read!(self, vcpu.arch.cr4) as u64 & CR4_LA57 != 0
    }

    /// `kvm->arch.disabled_quirks`, which user space may change at any time.
    #[inline(always)]
    pub(crate) fn disabled_quirks(self) -> u64 {
        let kvm = read!(self, vcpu.kvm);
        // SAFETY: A vCPU's VM outlives it; the field is read in one go, as KVM does.
        unsafe { (&raw const (*kvm).arch.disabled_quirks).read_volatile() }
    }

    /// Basic exit reason of the last VM exit (SDM appendix C).
    #[inline(always)]
    pub(crate) fn exit_reason(self) -> u16 {
        self.full_exit_reason() as u16
    }

    /// The exit reason with all its modifiers (SDM volume 3, 26.9.1).
    #[inline(always)]
    pub(crate) fn full_exit_reason(self) -> u32 {
        // SAFETY: By the invariants of `Vcpu`; `exit_reason` is a union of plain integers.
        unsafe { (&raw const (*self.0).vt.exit_reason).cast::<u32>().read() }
    }

    /// Whether the last exit was a VMLAUNCH or VMRESUME.
    #[inline(always)]
    pub(crate) fn enters_l2(self) -> bool {
        const VMLAUNCH: u16 = 20;
        const VMRESUME: u16 = 24;
        matches!(self.exit_reason(), VMLAUNCH | VMRESUME)
    }

    /// The vCPU's cached vmcs12; `None` while L1 is not in VMX operation.
    #[inline(always)]
    pub(crate) fn vmcs12(self) -> Option<Vmcs12> {
        let ptr = read!(self, nested.cached_vmcs12);
        // SAFETY: KVM's own pointer, which only this thread changes.
        (!ptr.is_null()).then(|| unsafe { Vmcs12::from_hook(ptr) })
    }

    /// Whether KVM's code has vmcs01 current, not vmcs02.
    #[inline(always)]
    pub(crate) fn vmcs01_is_loaded(self) -> bool {
        // SAFETY: Only the address is taken.
        let vmcs01 = unsafe { &raw const (*self.0).vmcs01 };
        core::ptr::eq(read!(self, loaded_vmcs), vmcs01)
    }

    /// Physical address of the VMCS that KVM's code has current.
    #[inline(always)]
    pub(crate) fn loaded_vmcs(self) -> u64 {
        let loaded = read!(self, loaded_vmcs);
        // SAFETY: KVM's own pointer to one of the vCPU's two `loaded_vmcs`.
        vmx::physical(unsafe { (*loaded).vmcs }.cast())
    }

    /// Whether KVM clears this shadow VMCS together with the VMCS that it has current, whatever makes that one leave this
    /// CPU (`loaded_vmcs_clear()`). One that is only read then need not be cleared: it was active before.
    #[inline(always)]
    pub(crate) fn clears_with_loaded(self, shadow: *const bindings::vmcs) -> bool {
        let loaded = read!(self, loaded_vmcs);
        // SAFETY: KVM's own pointer to one of the vCPU's two `loaded_vmcs`.
        unsafe { (*loaded).launched && core::ptr::eq((*loaded).shadow_vmcs, shadow) }
    }

    /// Physical address of vmcs01's shadow VMCS; `None` without VMCS shadowing or outside VMX
    /// operation.
    #[inline(always)]
    pub(crate) fn shadow_vmcs(self) -> Option<u64> {
        let shadow = read!(self, vmcs01.shadow_vmcs);
        (!shadow.is_null()).then(|| vmx::physical(shadow.cast()))
    }

    /// Runs `f` with vmcs01 current, whichever is now.
    ///
    /// # Safety
    ///
    /// Preemption is off and the vCPU is loaded on this CPU.
    pub(crate) unsafe fn with_vmcs01<R>(self, f: impl FnOnce() -> R) -> Option<R> {
        // SAFETY: Only addresses are taken.
        let vmcs01 = unsafe { &raw mut (*self.0).vmcs01 };
        // SAFETY: By this function's contract.
        unsafe { self.with_vmcs(vmcs01, f) }
    }

    /// Runs `f` with vmcs02 current, whichever is now.
    ///
    /// # Safety
    ///
    /// As for `with_vmcs01`; L1 is in VMX operation.
    pub(crate) unsafe fn with_vmcs02<R>(self, f: impl FnOnce() -> R) -> Option<R> {
        // SAFETY: Only addresses are taken.
        let vmcs02 = unsafe { &raw mut (*self.0).nested.vmcs02 };
        // SAFETY: By this function's contract.
        unsafe { self.with_vmcs(vmcs02, f) }
    }

    /// Whether KVM left guest state in vmcs02, see `fetch_late_fields`.
    #[inline(always)]
    pub(crate) fn has_late_fields(self) -> bool {
        read!(self, nested.need_sync_vmcs02_to_vmcs12_rare)
    }

    /// What `copy_vmcs02_to_vmcs12_rare()` does: brings the guest state that KVM left in vmcs02
    /// (class `Late` of the field table) into vmcs12. `false` if it could not be done.
    ///
    /// # Safety
    ///
    /// Preemption is off, the vCPU is loaded on this CPU with vmcs01, as in KVM's function.
    pub(crate) unsafe fn fetch_late_fields(self) -> bool {
        if !self.has_late_fields() {
            return true;
        }
        let vmcs12 = read!(self, nested.cached_vmcs12);
        let call = || {
            // SAFETY: vmcs02 is current and the arguments are KVM's own.
            unsafe { CallId::SYNC_RARE.call([self.0 as usize, vmcs12 as usize, 0]) }
        };
        // SAFETY: By this function's contract.
        unsafe { self.with_vmcs02(call) }.flatten().is_some()
    }

    /// `fetch_late_fields` while vmcs02 is loaded; KVM still believes them to be there, see `have_late_fields`.
    ///
    /// # Safety
    ///
    /// vmcs02 is current, with preemption off or as in KVM's own code that reads it.
    #[inline(always)]
    pub(crate) unsafe fn read_late_fields(self, m: Vmcs12) {
        let vmcs12 = m.as_ptr().cast_mut().cast::<u8>();
        for_each_late(|field| {
            // SAFETY: By this function's contract, of fields that every processor has.
            let value = unsafe { vmx::vmread_basic(u64::from(field.encoding)) };
            let at = vmcs12.wrapping_add(usize::from(field.offset));
            // SAFETY: A field of KVM's vmcs12, which this thread alone reads and writes.
            unsafe {
                match field.width() {
                    2 => at.cast::<u16>().write_unaligned(value as u16),
                    4 => at.cast::<u32>().write_unaligned(value as u32),
                    _ => at.cast::<u64>().write_unaligned(value),
                }
            }
        });
    }

    /// Tells KVM that vmcs12 has what it left in vmcs02.
    #[inline(always)]
    pub(crate) fn have_late_fields(self) {
        // SAFETY: By the invariants of `Vcpu`; this thread alone reads and writes it.
        unsafe {
            (&raw mut (*self.0).nested.need_sync_vmcs02_to_vmcs12_rare).write(false);
        }
    }

    /// A number that stands for the values that vmcs12 has of them.
    pub(crate) fn sum_of_late_fields(m: Vmcs12) -> u64 {
        let (vmcs12, mut sum) = (m.as_ptr().cast::<u8>(), 0u64);
        for_each_late(|field| {
            let at = vmcs12.wrapping_add(usize::from(field.offset));
            // SAFETY: As above.
            let value = unsafe {
                match field.width() {
                    2 => u64::from(at.cast::<u16>().read_unaligned()),
                    4 => u64::from(at.cast::<u32>().read_unaligned()),
                    _ => at.cast::<u64>().read_unaligned(),
                }
            };
            sum = (sum ^ value)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(23);
        });
        sum
    }

    /// Makes one of the vCPU's VMCSs current the way KVM does where it needs the other one for a
    /// moment, runs `f`, and goes back.
    ///
    /// # Safety
    ///
    /// Preemption is off, the vCPU is loaded on this CPU, and `vmcs` is one of its two.
    unsafe fn with_vmcs<R>(
        self,
        vmcs: *mut bindings::loaded_vmcs,
        f: impl FnOnce() -> R,
    ) -> Option<R> {
        let was = read!(self, loaded_vmcs);
        if core::ptr::eq(was, vmcs) {
            return Some(f());
        }
        // SAFETY: `was` is the VMCS that is loaded on this very CPU.
        let cpu = unsafe { (*was).cpu };
        let load = |vmcs| {
            // SAFETY: By this function's contract; only this thread changes `loaded_vmcs`.
            unsafe {
                (&raw mut (*self.0).loaded_vmcs).write(vmcs);
                CallId::LOAD_VMCS.call([self.0 as usize, cpu as usize, 0])
            }
        };
        if load(vmcs).is_none() {
            // Not found: nothing was loaded, so the old one is still current.
            // SAFETY: As above.
            unsafe { (&raw mut (*self.0).loaded_vmcs).write(was) };
            return None;
        }
        let result = f();
        load(was);
        Some(result)
    }

    /// `vmx->nested.dirty_vmcs12 = true`: L1 has changed a field that only a full preparation of
    /// vmcs02 looks at.
    pub(crate) fn mark_vmcs12_dirty(self) {
        // SAFETY: By the invariants of `Vcpu`.
        unsafe { (&raw mut (*self.0).nested.dirty_vmcs12).write(true) };
    }

    /// Whether vmcs12 is to be copied to the shadow VMCS before L1 runs again, so that vmcs12 and
    /// not the shadow VMCS is up to date.
    pub(crate) fn vmcs12_is_newer(self) -> bool {
        read!(self, nested.need_vmcs12_to_shadow_sync)
    }

    /// Sets what `vmcs12_is_newer` tells.
    pub(crate) fn set_vmcs12_newer(self, newer: bool) {
        // SAFETY: By the invariants of `Vcpu`.
        unsafe { (&raw mut (*self.0).nested.need_vmcs12_to_shadow_sync).write(newer) };
    }

    /// `nested_cpu_has_vmwrite_any_field()`: L1 may VMWRITE exit information (IA32_VMX_MISC bit 29).
    pub(crate) fn may_write_any_field(self) -> bool {
        const VMWRITE_ANY_FIELD: u32 = 1 << 29;
        read!(self, nested.msrs.misc_low) & VMWRITE_ANY_FIELD != 0
    }

    /// Whether L1 uses Hyper-V's enlightened VMCS right now.
    pub(crate) fn evmcs_is_mapped(self) -> bool {
        #[cfg(CONFIG_KVM_HYPERV)]
        {
            // evmptr_is_valid(): neither EVMPTR_INVALID (-1) nor EVMPTR_MAP_PENDING (-2).
            read!(self, nested.hv_evmcs_vmptr) < u64::MAX - 1
        }
        #[cfg(not(CONFIG_KVM_HYPERV))]
        {
            false
        }
    }

    /// A general-purpose register of the guest. `None` for RSP, which KVM may not have read yet.
    #[inline(always)]
    pub(crate) fn gpr(self, number: usize) -> Option<u64> {
        if number == bindings::MTK_REG_RSP as usize || number >= 16 {
            return None;
        }
        Some(read!(self, vcpu.arch.regs[number]) as u64)
    }

    pub(super) fn register_is_available(self, reg: u32) -> bool {
        // `regs_avail` is a `u32` up to 7.2 and a bitmap of longs since; the low word is the same.
        // SAFETY: By the invariants of `Vcpu`; all registers asked for are below 32.
        let low: u32 = unsafe {
            (&raw const (*self.0).vcpu.arch.regs_avail)
                .cast::<u32>()
                .read()
        };
        low & (1 << (reg & 31)) != 0
    }

    pub(super) fn mark_register_available(self, reg: u32) {
        // SAFETY: By the invariants of `Vcpu` only this thread writes the field; see above for its
        // type.
        unsafe {
            let low = (&raw mut (*self.0).vcpu.arch.regs_avail).cast::<u32>();
            low.write(low.read() | 1 << (reg & 31));
        }
    }

    /// Whether the guest is in plain protected mode: CR0.PE set, RFLAGS.VM clear, no real-mode
    /// emulation. `None` if the VMCS could not be read.
    pub(crate) fn plain_protected_mode(self) -> Option<bool> {
        if read!(self, rmode.vm86_active) != 0 || read!(self, vcpu.arch.cr0) as u64 & CR0_PE == 0 {
            return Some(false);
        }
        Some(self.rflags()? & RFLAGS_VM == 0)
    }

    /// `vmx_get_rflags()` for a guest that KVM does not emulate real mode for. `None` if the VMCS could not be read.
    #[inline(always)]
    pub(super) fn rflags(self) -> Option<u64> {
        if self.register_is_available(bindings::MTK_REG_RFLAGS) {
            Some(read!(self, rflags) as u64)
        } else {
            // SAFETY: By the invariants of `Vcpu` the right VMCS is current.
            unsafe { vmx::vmread(GUEST_RFLAGS) }
        }
    }

    /// Whether selectors and access rights of all segments are these: `segments() == Some(*known)` in fewer
    /// instructions where KVM's cache has either all or none of them, and `false` elsewhere.
    #[inline(always)]
    pub(crate) fn segments_are(self, known: &Inputs) -> bool {
        if !self.register_is_available(bindings::MTK_REG_SEGMENTS) {
            self.mark_register_available(bindings::MTK_REG_SEGMENTS);
            // SAFETY: By the invariants of `Vcpu` only this thread uses the cache.
            unsafe { (&raw mut (*self.0).segment_cache.bitmask).write(0) };
        }
        // SAFETY: As above, for as long as `cache` is used here.
        let cache = unsafe { &mut (*self.0).segment_cache };
        let mut differs = 0;
        macro_rules! each {
            ($cache:expr, $known:expr, $failed:expr, $($index:literal)*) => {$({
                let seg = &mut $cache.seg[$index];
                $failed(&mut seg.selector, &mut seg.ar, $index);
                differs |= segments::word(seg.selector, seg.ar) ^ $known.0[$index];
            })*};
        }
        if cache.bitmask & SEG_SELECTORS_AND_RIGHTS == SEG_SELECTORS_AND_RIGHTS {
            let cached = |_: &mut u16, _: &mut u32, _: usize| ();
            each!(cache, known, cached, 0 1 2 3 4 5 6 7);
        } else if cache.bitmask == 0 {
            // SAFETY: By the invariants of `Vcpu` the right VMCS is current. If none is, this one says so.
            if unsafe { vmx::vmread(SELECTOR[0]) }.is_none() {
                return false;
            }
            let read = |selector: &mut u16, ar: &mut u32, index: usize| {
                // SAFETY: As above; every processor has these fields.
                unsafe {
                    *selector = vmx::vmread_basic(SELECTOR[index]) as u16;
                    *ar = vmx::vmread_basic(ACCESS_RIGHTS[index]) as u32;
                }
            };
            each!(cache, known, read, 0 1 2 3 4 5 6 7);
            cache.bitmask = SEG_SELECTORS_AND_RIGHTS;
        } else {
            return false;
        }
        differs == 0
    }

    /// Selector and access rights of all segments, out of KVM's segment cache where it has them and
    /// out of the VMCS (and into the cache, as KVM does) where not. `None` if the VMCS could not be
    /// read.
    pub(crate) fn segments(self) -> Option<Inputs> {
        if !self.register_is_available(bindings::MTK_REG_SEGMENTS) {
            self.mark_register_available(bindings::MTK_REG_SEGMENTS);
            // SAFETY: By the invariants of `Vcpu` only this thread uses the cache.
            unsafe { (&raw mut (*self.0).segment_cache.bitmask).write(0) };
        }
        // SAFETY: As above, for as long as `cache` is used here.
        let cache = unsafe { &mut (*self.0).segment_cache };
        let mut inputs = Inputs::default();
        let words = inputs.0.iter_mut().zip(cache.seg.iter_mut());
        for (index, (word, seg)) in words.enumerate() {
            let sel_bit = 1u32 << (index * SEG_FIELD_NR + SEG_FIELD_SEL);
            let ar_bit = 1u32 << (index * SEG_FIELD_NR + SEG_FIELD_AR);
            if cache.bitmask & sel_bit == 0 {
                // SAFETY: By the invariants of `Vcpu` the right VMCS is current.
                seg.selector = unsafe { vmx::vmread(SELECTOR[index])? } as u16;
                cache.bitmask |= sel_bit;
            }
            if cache.bitmask & ar_bit == 0 {
                // SAFETY: By the invariants of `Vcpu` the right VMCS is current.
                seg.ar = unsafe { vmx::vmread(ACCESS_RIGHTS[index])? } as u32;
                cache.bitmask |= ar_bit;
            }
            *word = segments::word(seg.selector, seg.ar);
        }
        Some(inputs)
    }
}

/// The fields with the selector of each segment, in the order of `policy::segments`. The VMCS has LDTR before TR.
const SELECTOR: [u64; segments::COUNT] = [
    GUEST_ES_SELECTOR,
    GUEST_CS_SELECTOR,
    GUEST_SS_SELECTOR,
    GUEST_DS_SELECTOR,
    GUEST_FS_SELECTOR,
    GUEST_GS_SELECTOR,
    GUEST_TR_SELECTOR,
    GUEST_LDTR_SELECTOR,
];

/// Those with the access rights, in the same order.
const ACCESS_RIGHTS: [u64; segments::COUNT] = [
    GUEST_ES_AR_BYTES,
    GUEST_CS_AR_BYTES,
    GUEST_SS_AR_BYTES,
    GUEST_DS_AR_BYTES,
    GUEST_FS_AR_BYTES,
    GUEST_GS_AR_BYTES,
    GUEST_TR_AR_BYTES,
    GUEST_LDTR_AR_BYTES,
];

/// The bits of selector and access rights of every segment in `segment_cache.bitmask`.
const SEG_SELECTORS_AND_RIGHTS: u32 = {
    let (mut bits, mut i) = (0, 0);
    while i < segments::COUNT {
        bits |= 1 << (i * SEG_FIELD_NR + SEG_FIELD_SEL) | 1 << (i * SEG_FIELD_NR + SEG_FIELD_AR);
        i += 1;
    }
    bits
};

const SEG_FIELD_SEL: usize = bindings::segment_cache_field_SEG_FIELD_SEL as usize;
const SEG_FIELD_AR: usize = bindings::segment_cache_field_SEG_FIELD_AR as usize;
const SEG_FIELD_NR: usize = bindings::segment_cache_field_SEG_FIELD_NR as usize;

// The order that `policy::segments` is written in.
const _: () = {
    assert!(bindings::VCPU_SREG_ES == 0 && bindings::VCPU_SREG_CS == 1);
    assert!(bindings::VCPU_SREG_SS == 2 && bindings::VCPU_SREG_DS == 3);
    assert!(bindings::VCPU_SREG_FS == 4 && bindings::VCPU_SREG_GS == 5);
    assert!(bindings::VCPU_SREG_TR == 6 && bindings::VCPU_SREG_LDTR == 7);
    assert!(segments::COUNT * SEG_FIELD_NR <= 32);
};
