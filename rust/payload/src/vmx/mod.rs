// SPDX-License-Identifier: GPL-2.0-or-later
//! VMX as the payload uses it: root operation, one child at a time.

pub mod beside;
pub mod child;
pub mod ept;
pub mod exit;
pub mod field;
pub mod ops;
pub mod setup;

use core::cell::Cell;

use crate::cpu;
use crate::memory;

/// IA32_FEATURE_CONTROL.
const FEATURE_CONTROL: u32 = 0x3a;
/// Lock bit, and VMXON outside SMX operation.
const VMX_ENABLED: u64 = 1 << 0 | 1 << 2;
/// CR4.VMXE.
pub const CR4_VMXE: u64 = 1 << 13;

/// The VMX capability MSRs.
pub mod msr {
    /// Revision identifier and region size.
    pub const BASIC: u32 = 0x480;
    /// Exit controls, with what was fixed in the first processors.
    pub const EXIT_CTLS: u32 = 0x483;
    /// Entry controls, likewise.
    pub const ENTRY_CTLS: u32 = 0x484;
    /// Bits that must be 1 in CR0.
    pub const CR0_FIXED0: u32 = 0x486;
    /// Bits that may be 1 in CR0.
    pub const CR0_FIXED1: u32 = 0x487;
    /// Bits that must be 1 in CR4.
    pub const CR4_FIXED0: u32 = 0x488;
    /// Bits that may be 1 in CR4.
    pub const CR4_FIXED1: u32 = 0x489;
    /// EPT and VPID capabilities.
    pub const EPT_VPID_CAP: u32 = 0x48c;
    /// Pin-based controls, without what was fixed in the first processors.
    pub const TRUE_PINBASED_CTLS: u32 = 0x48d;
    /// Processor-based controls, likewise.
    pub const TRUE_PROCBASED_CTLS: u32 = 0x48e;
}

struct Regions {
    revision: Cell<u32>,
    vmxon: Cell<u64>,
}

// SAFETY: one CPU, no interrupts, no threads.
unsafe impl Sync for Regions {}

static REGIONS: Regions = Regions {
    revision: Cell::new(0),
    vmxon: Cell::new(0),
};

/// The VMCS revision identifier.
pub fn revision() -> u32 {
    REGIONS.revision.get()
}

/// Address of the VMXON region.
pub fn vmxon_region() -> u64 {
    REGIONS.vmxon.get()
}

/// A fresh region with the revision identifier in place.
pub fn new_region() -> u64 {
    let region = memory::pages(1);
    // SAFETY: a page of ours.
    unsafe { *(region as *mut u32) = revision() };
    region
}

/// Reads a capability MSR that must be there.
pub fn capability(msr: u32) -> u64 {
    cpu::rdmsr(msr).unwrap_or(0)
}

/// Prepares the processor and enters VMX root operation. The error says what is missing.
pub fn init() -> Result<(), &'static str> {
    enable()?;
    REGIONS
        .revision
        .set(capability(msr::BASIC) as u32 & 0x7fff_ffff);
    REGIONS.vmxon.set(new_region());
    ops::vmxon(vmxon_region()).map_err(|_| "VMXON failed")
}

/// Makes VMXON possible on this processor.
pub fn enable() -> Result<(), &'static str> {
    if cpu::cpuid(1, 0).2 & 1 << 5 == 0 {
        return Err(
            "no VMX at this level: the level above must load kvm_intel with nested=1 \
                    and its VMM must pass CPUID.1:ECX.VMX on",
        );
    }
    let control = cpu::rdmsr(FEATURE_CONTROL).map_err(|_| "IA32_FEATURE_CONTROL cannot be read")?;
    if control & VMX_ENABLED != VMX_ENABLED {
        // SAFETY: enables VMXON; a locked register faults and is reported.
        unsafe { cpu::wrmsr(FEATURE_CONTROL, control | VMX_ENABLED) }
            .map_err(|_| "IA32_FEATURE_CONTROL is locked with VMX off")?;
    }
    // SAFETY: VMX asks for protection, paging and NE on, which they are, and VMXE.
    unsafe {
        cpu::write_cr0(cpu::cr0() & capability(msr::CR0_FIXED1) | capability(msr::CR0_FIXED0));
        cpu::write_cr4(
            cpu::cr4() & capability(msr::CR4_FIXED1) | capability(msr::CR4_FIXED0) | CR4_VMXE,
        );
    }
    Ok(())
}
