// SPDX-License-Identifier: GPL-2.0
//! The vCPU's local APIC, when nothing is pending in it.

use super::{fields::encoding::GUEST_INTR_STATUS, vcpu::read, vmx, Vcpu};
use crate::bindings;

/// MSR_IA32_APICBASE_ENABLE.
const APICBASE_ENABLE: u64 = 1 << 11;
/// POSTED_INTR_ON: an interrupt has been posted.
const OUTSTANDING: u64 = 1 << 0;

/// Offsets of registers (SDM table 12-1).
const APIC_TASKPRI: usize = 0x80;
const APIC_PROCPRI: usize = 0xa0;
const APIC_ISR: usize = 0x100;
const APIC_IRR: usize = 0x200;

/// A local APIC that KVM emulates.
///
/// # Invariants
///
/// A whole `struct kvm_lapic` of the vCPU that it was taken from, which outlives the handler, with a page of registers.
#[derive(Clone, Copy)]
struct Lapic(*const bindings::kvm_lapic);

impl Lapic {
    fn of(vcpu: Vcpu) -> Option<Self> {
        let apic = read!(vcpu, vcpu.arch.apic);
        // INVARIANT: KVM makes and frees the two together with the vCPU.
        (!apic.is_null()).then_some(Self(apic))
    }

    /// A register. Interrupts come from other threads, so each is read in one go.
    #[inline(always)]
    fn register(self, offset: usize) -> u32 {
        // SAFETY: By the type's invariants; all offsets here are within the page and aligned.
        unsafe {
            (*self.0)
                .regs
                .cast::<u8>()
                .add(offset)
                .cast::<u32>()
                .read_volatile()
        }
    }

    /// Whether none of the 256 bits from a register on is set.
    #[inline(always)]
    fn is_clear(self, first: usize) -> bool {
        let mut bits = 0;
        for n in 0..8 {
            bits |= self.register(first + 0x10 * n);
        }
        bits == 0
    }

    #[inline(always)]
    fn is_apicv_active(self) -> bool {
        // SAFETY: By the type's invariants.
        unsafe { (*self.0).apicv_active }
    }

    /// No interrupt is in service, and PPR is what `__apic_update_ppr()` would make of TPR.
    #[inline(always)]
    fn is_idle(self) -> bool {
        // SAFETY: By the type's invariants.
        let scans = unsafe { (*self.0).highest_isr_cache == -1 };
        scans
            && self.is_clear(APIC_ISR)
            && self.register(APIC_PROCPRI) == self.register(APIC_TASKPRI) & 0xff
    }
}

impl Vcpu {
    /// Whether `vmx_sync_pir_to_irr()` would find no interrupt and change nothing: none is posted, none requested, and
    /// vmcs01 requests none of the processor (RVI).
    ///
    /// The APIC is not a TDX guest's, and the vCPU is loaded.
    #[inline(always)]
    pub(crate) fn requests_no_interrupt(self) -> bool {
        Lapic::of(self).is_some_and(|apic| self.requests_none(apic))
    }

    #[inline(always)]
    fn requests_none(self, apic: Lapic) -> bool {
        // SAFETY: By the invariants of `Vcpu`. In this order, as in the stock function: whoever posts sets the bit last.
        let control = unsafe {
            (&raw const (*self.raw()).vt.pi_desc.__bindgen_anon_1.control).read_volatile()
        };
        if control & OUTSTANDING != 0 || !apic.is_clear(APIC_IRR) {
            return false;
        }
        if self.guest_mode() || !apic.is_apicv_active() {
            return true;
        }
        // SAFETY: In the handler of a function that reads the field itself then.
        let status = unsafe { vmx::vmread_basic(GUEST_INTR_STATUS) };
        // RVI is the low byte.
        status & 0xff == 0
    }

    /// Whether `kvm_apic_has_interrupt()` would find none and change nothing.
    ///
    /// The vCPU is loaded.
    #[inline(always)]
    pub(crate) fn has_no_interrupt(self) -> bool {
        let Some(apic) = Lapic::of(self) else {
            return false;
        };
        // SAFETY: By the invariants of `Lapic`.
        let protected = unsafe { (*apic.0).guest_apic_protected };
        !protected
            && read!(self, vcpu.arch.apic_base) & APICBASE_ENABLE != 0
            && apic.is_idle()
            && self.requests_none(apic)
    }

    /// `kvm_apic_has_pending_init_or_sipi()`.
    #[cfg(MTK_GVA_WALK)]
    #[inline(always)]
    pub(crate) fn has_init_or_sipi(self) -> bool {
        // SAFETY: By the invariants of `Lapic`. Other threads set the bits, so they are read in one go.
        Lapic::of(self).is_some_and(|apic| unsafe {
            (&raw const (*apic.0).pending_events).read_volatile() != 0
        })
    }
}
