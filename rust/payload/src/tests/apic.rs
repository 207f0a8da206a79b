// SPDX-License-Identifier: GPL-2.0-or-later
//! The payload's local APIC in x2APIC mode, for tests that have interrupts wait in it.

use super::log;
use crate::cpu::{cpuid, rdmsr, wrmsr};

const IA32_APIC_BASE: u32 = 0x1b;
/// Enabled, in x2APIC mode.
const X2APIC: u64 = 3 << 10;

/// Registers in that mode (SDM volume 3, table 12-6).
pub const ID: u32 = 0x802;
pub const TPR: u32 = 0x808;
pub const PPR: u32 = 0x80a;
pub const EOI: u32 = 0x80b;
pub const SPURIOUS: u32 = 0x80f;
pub const ISR: u32 = 0x810;
pub const IRR: u32 = 0x820;
pub const ICR: u32 = 0x830;
pub const SELF_IPI: u32 = 0x83f;

/// Reads a register.
pub fn read(register: u32) -> u64 {
    rdmsr(register).unwrap_or(u64::MAX)
}

/// Writes a register.
pub fn write(register: u32, value: u64) {
    // SAFETY: registers of the local APIC, while the payload takes no interrupt and no NMI.
    if let Err(fault) = unsafe { wrmsr(register, value) } {
        log!("APIC register {:#x}: FAIL: {}", register, fault);
    }
}

/// The APIC is on, in x2APIC mode, until this is dropped.
pub struct Enabled(u64);

impl Enabled {
    /// Turns it on; `None` if the processor has no x2APIC.
    pub fn new() -> Option<Enabled> {
        if cpuid(1, 0).2 & 1 << 21 == 0 {
            return None;
        }
        let before = read(IA32_APIC_BASE);
        write(IA32_APIC_BASE, before | X2APIC);
        write(SPURIOUS, 0x1ff);
        Some(Enabled(before))
    }
}

impl Drop for Enabled {
    fn drop(&mut self) {
        write(TPR, 0);
        // There is no way back from x2APIC mode but through none.
        write(IA32_APIC_BASE, self.0 & !X2APIC);
        write(IA32_APIC_BASE, self.0);
    }
}
