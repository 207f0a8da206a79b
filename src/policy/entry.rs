// SPDX-License-Identifier: GPL-2.0
//! What an L2 in 64-bit mode is entered with (SDM volume 3, 28.3.2: loading guest state), and the controls that KVM merges
//! out of L1's wishes and its own.

use super::{
    controls::{
        pin::{POSTED_INTERRUPTS, PREEMPTION_TIMER},
        primary::{
            CR8_EXITING, INTERRUPT_WINDOW, IO_BITMAPS, MSR_BITMAPS, NMI_WINDOW, TPR_SHADOW,
            UNCONDITIONAL_IO,
        },
        secondary::{
            APIC_REGISTER_VIRT, DESCRIPTOR_TABLES, ENCLS, INTERRUPT_DELIVERY, INVPCID, MBEC, PML,
            RDTSCP, TSC_SCALING, UNRESTRICTED_GUEST, USER_WAIT, VIRTUALIZE_APIC_ACCESSES,
            VIRTUALIZE_X2APIC, VMCS_SHADOWING, VM_FUNCTIONS, XSAVES,
        },
        vm_entry::{IA32E_MODE, LOAD_CET, LOAD_EFER, LOAD_PERF_GLOBAL_CTRL},
        vm_exit,
    },
    registers::{CR4_PAE, LONG_MODE, PROTECTED_AND_PAGED, RFLAGS_VM},
};

/// The VM-execution, VM-entry and VM-exit controls of one VMCS (SDM volume 3, 26.6 to 26.8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Controls {
    /// Pin-based.
    pub pin: u32,
    /// Primary processor-based.
    pub primary: u32,
    /// Secondary processor-based; of vmcs12 those in force.
    pub secondary: u32,
    /// VM-entry.
    pub entry: u32,
    /// VM-exit. Those of vmcs12 are emulated and matter to nothing here.
    pub exit: u32,
}

/// Secondary controls that KVM takes from vmcs12 alone.
const L1_ALONE: u32 = VIRTUALIZE_APIC_ACCESSES
    | DESCRIPTOR_TABLES
    | RDTSCP
    | VIRTUALIZE_X2APIC
    | APIC_REGISTER_VIRT
    | INTERRUPT_DELIVERY
    | INVPCID
    | VM_FUNCTIONS
    | XSAVES
    | MBEC
    | USER_WAIT;

/// A TSC multiplier that changes nothing: the number has 48 fractional bits.
const UNSCALED: u64 = 1 << 48;

/// What decides how L2 is entered: fields of vmcs12, and of L1 its EFER.
#[derive(Clone, Copy, Debug)]
pub struct Inputs {
    /// The controls of vmcs12.
    pub wanted: Controls,
    /// VM-entry MSR-load count.
    pub msr_count: u64,
    /// Guest CR0.
    pub cr0: u64,
    /// Guest CR4.
    pub cr4: u64,
    /// Guest IA32_EFER.
    pub efer: u64,
    /// Guest RFLAGS.
    pub rflags: u64,
    /// Guest DR7.
    pub dr7: u64,
    /// TSC multiplier.
    pub tsc_multiplier: u64,
    /// VMX-preemption timer-value.
    pub timer: u64,
    /// L1's IA32_EFER.
    pub l1_efer: u64,
}

impl Inputs {
    /// The IA32_EFER of L2. `None` for what is out of the ordinary: an L2 or an L1 that is not in 64-bit mode, a list of MSRs to
    /// load, CET, performance counters, TSC scaling, a timer that has run down already.
    #[inline(always)]
    pub const fn efer(&self) -> Option<u64> {
        const STOCK: u32 = LOAD_PERF_GLOBAL_CTRL | LOAD_CET;
        // `nested_vmx_calc_efer()`.
        let efer = if self.wanted.entry & LOAD_EFER != 0 {
            self.efer
        } else if self.wanted.entry & IA32E_MODE != 0 {
            self.l1_efer | LONG_MODE
        } else {
            0
        };
        let plain = self.wanted.entry & STOCK == 0
            && (self.wanted.secondary & TSC_SCALING == 0 || self.tsc_multiplier == UNSCALED)
            && self.msr_count == 0
            && efer & LONG_MODE == LONG_MODE
            && self.l1_efer & LONG_MODE == LONG_MODE
            && self.cr0 & PROTECTED_AND_PAGED == PROTECTED_AND_PAGED
            && self.cr4 & CR4_PAE != 0
            && self.rflags & RFLAGS_VM == 0
            && self.dr7 >> 32 == 0
            && (self.wanted.pin & PREEMPTION_TIMER == 0 || self.timer != 0);
        if plain {
            Some(efer)
        } else {
            None
        }
    }
}

impl Controls {
    /// The controls of vmcs02: `self` are those of vmcs01 and so KVM's own, `wanted` those of vmcs12. `bitmap`: vmcs02 has
    /// a bitmap of MSRs. `umip`: KVM emulates CR4.UMIP for L2. The bits that follow from EFER are not set. `None` if KVM has more to
    /// do, for ENCLS.
    #[inline(always)]
    pub const fn merge(&self, wanted: &Controls, bitmap: bool, umip: bool) -> Option<Controls> {
        let mut pin = self.pin | (wanted.pin & !PREEMPTION_TIMER);
        if wanted.pin & POSTED_INTERRUPTS == 0 {
            pin &= !POSTED_INTERRUPTS;
        }
        let mut primary =
            self.primary & !(INTERRUPT_WINDOW | NMI_WINDOW | TPR_SHADOW) | wanted.primary;
        if primary & TPR_SHADOW == 0 {
            primary |= CR8_EXITING;
        }
        primary = (primary | UNCONDITIONAL_IO) & !(IO_BITMAPS | MSR_BITMAPS);
        if bitmap {
            primary |= MSR_BITMAPS;
        }
        let mut secondary = self.secondary & !L1_ALONE | wanted.secondary;
        secondary &= !(PML | VMCS_SHADOWING);
        if wanted.secondary & UNRESTRICTED_GUEST == 0 {
            secondary &= !UNRESTRICTED_GUEST;
        }
        if umip {
            secondary |= DESCRIPTOR_TABLES;
        }
        if secondary & ENCLS != 0 {
            return None;
        }
        Some(Controls {
            pin,
            primary,
            secondary,
            entry: (self.entry | wanted.entry & !LOAD_PERF_GLOBAL_CTRL) & !(IA32E_MODE | LOAD_EFER),
            exit: self.exit & !vm_exit::LOAD_EFER,
        })
    }
}

/// What L2 reads in CR0 or CR4 (`nested_read_cr0()`): L1's shadow where L1 owns the bit.
#[inline(always)]
pub const fn read_shadow(value: u64, mask: u64, shadow: u64) -> u64 {
    value & !mask | shadow & mask
}
