// SPDX-License-Identifier: GPL-2.0
//! KVM's vCPU, as a handler on its own thread sees it.

use super::vmx;
use crate::{
    bindings,
    policy::segments::{self, Inputs},
};

/// X86_CR0_PE.
const CR0_PE: usize = 1 << 0;
/// X86_CR4_LA57: linear addresses have 57 bits.
const CR4_LA57: usize = 1 << 12;
/// X86_EFLAGS_VM: virtual-8086 mode.
const RFLAGS_VM: u64 = 1 << 17;

// `to_vmx()` is a container_of(); the views below rely on it being a cast.
const _: () = assert!(core::mem::offset_of!(bindings::vcpu_vmx, vcpu) == 0);

/// A vCPU inside one of its hooked functions.
///
/// # Invariants
///
/// The pointer is to a live `struct vcpu_vmx` whose mutex the current task holds, so that fields
/// that only the vCPU's thread changes stay put; the VMCS that `loaded_vmcs` names is current on
/// this CPU whenever KVM's own code could VMREAD.
#[derive(Clone, Copy)]
pub(crate) struct Vcpu(*mut bindings::vcpu_vmx);

macro_rules! read {
    ($self:expr, $($path:tt)+) => {
        // SAFETY: By the invariants of `Vcpu`.
        unsafe { (&raw const (*$self.0).$($path)+).read() }
    };
}

impl Vcpu {
    /// Views the vCPU that KVM passed to a hooked function.
    ///
    /// # Safety
    ///
    /// `ptr` is the `struct kvm_vcpu *` argument of a hooked function of kvm_intel that runs with
    /// the vCPU loaded, and the view is used only in its handler.
    #[inline(always)]
    pub(crate) unsafe fn from_hook(ptr: *mut bindings::kvm_vcpu) -> Self {
        // INVARIANT: By this function's contract, and kvm_vcpu is the first member of vcpu_vmx.
        Self(ptr.cast())
    }

    /// The address, as the key of the module's own state.
    #[inline(always)]
    pub(crate) fn key(self) -> usize {
        self.0 as usize
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
        read!(self, vcpu.arch.nested_run_pending) as u8 != 0
    }

    /// `is_guest_mode()`: an L2 (or deeper) guest runs on this vCPU.
    #[inline(always)]
    pub(crate) fn guest_mode(self) -> bool {
        const HF_GUEST_MASK: u32 = 1 << 0;
        read!(self, vcpu.arch.hflags) & HF_GUEST_MASK != 0
    }

    /// CR4.LA57 as the guest has it now; KVM never lets the guest own this bit, so the copy in
    /// `vcpu->arch` is right.
    #[inline(always)]
    pub(crate) fn cr4_la57(self) -> bool {
        read!(self, vcpu.arch.cr4) & CR4_LA57 != 0
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
        // SAFETY: By the invariants of `Vcpu`; `exit_reason` is a union of plain integers.
        let full: u32 = unsafe { (&raw const (*self.0).vt.exit_reason).cast::<u32>().read() };
        full as u16
    }

    fn register_is_available(self, reg: u32) -> bool {
        // `regs_avail` is a `u32` up to 7.2 and a bitmap of longs since; the low word is the same.
        // SAFETY: By the invariants of `Vcpu`; all registers asked for are below 32.
        let low: u32 = unsafe {
            (&raw const (*self.0).vcpu.arch.regs_avail)
                .cast::<u32>()
                .read()
        };
        low & (1 << (reg & 31)) != 0
    }

    fn mark_register_available(self, reg: u32) {
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
        if read!(self, rmode.vm86_active) != 0 || read!(self, vcpu.arch.cr0) & CR0_PE == 0 {
            return Some(false);
        }
        let rflags = if self.register_is_available(bindings::MTK_REG_RFLAGS) {
            read!(self, rflags) as u64
        } else {
            // SAFETY: By the invariants of `Vcpu` the right VMCS is current.
            unsafe { vmx::vmread(vmx::GUEST_RFLAGS)? }
        };
        Some(rflags & RFLAGS_VM == 0)
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
                seg.selector = unsafe { vmx::vmread(segments::SELECTOR[index])? } as u16;
                cache.bitmask |= sel_bit;
            }
            if cache.bitmask & ar_bit == 0 {
                // SAFETY: By the invariants of `Vcpu` the right VMCS is current.
                seg.ar = unsafe { vmx::vmread(segments::ACCESS_RIGHTS[index])? } as u32;
                cache.bitmask |= ar_bit;
            }
            *word = segments::word(seg.selector, seg.ar);
        }
        Some(inputs)
    }
}

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
