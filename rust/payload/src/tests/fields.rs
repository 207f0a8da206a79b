// SPDX-License-Identifier: GPL-2.0-or-later
//! Every field: what a fresh VMCS holds, what writing does to it, and that each VMCS keeps its own.

use super::bed::{calls, Bed};
use super::log;
use crate::vmx::field::{
    is_64_bit, EVERY, GUEST_LINEAR_ADDRESS, GUEST_PHYSICAL_ADDRESS, VMX_INSTRUCTION_INFO,
};
use crate::vmx::ops::{vmclear, vmptrld, vmread, vmwrite, VmxError};
use crate::vmx::{self, setup::Features};

/// Values that tell widths and reserved bits apart.
const PATTERNS: [u64; 4] = [0, u64::MAX, 0x5555_5555_5555_5555, 0xaaaa_aaaa_aaaa_aaaa];

/// The group.
pub fn run() -> Result<(), VmxError> {
    let region = vmx::new_region();
    vmclear(region)?;
    vmptrld(region)?;
    for &(encoding, name) in EVERY {
        one(encoding, name);
        if is_64_bit(encoding) {
            one(encoding | 1, name);
        }
    }
    vmclear(region)?;
    own_values()?;
    after_exit()
}

fn one(encoding: u32, name: &str) {
    let fresh = vmread(encoding);
    let mut written = [Ok(()); PATTERNS.len()];
    let mut read = [Ok(0); PATTERNS.len()];
    for (at, pattern) in PATTERNS.into_iter().enumerate() {
        written[at] = vmwrite(encoding, pattern);
        read[at] = vmread(encoding);
    }
    let _ = vmwrite(encoding, 0);
    match (fresh, written[0]) {
        (Err(error), _) => log!("fields/{:#06x} {}: {}", encoding, name, error),
        (Ok(fresh), Err(error)) => {
            log!(
                "fields/{:#06x} {}: {:#x}, vmwrite: {}",
                encoding,
                name,
                fresh,
                error
            )
        }
        (Ok(fresh), Ok(())) => {
            let [zero, ones, fives, tens] = read.map(|value| value.unwrap_or(0xdead));
            log!(
                "fields/{:#06x} {}: {:#x}, then {:#x} {:#x} {:#x} {:#x}",
                encoding,
                name,
                fresh,
                zero,
                ones,
                fives,
                tens
            )
        }
    }
}

/// A number that belongs to a field and a VMCS.
fn mark(encoding: u32, vmcs: u64) -> u64 {
    (encoding as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ vmcs.wrapping_mul(0x2545_f491_4f6c_dd1d)
}

/// Two VMCSs keep their own values while they take turns, and through VMCLEAR.
fn own_values() -> Result<(), VmxError> {
    let regions = [vmx::new_region(), vmx::new_region()];
    for (number, region) in regions.into_iter().enumerate() {
        vmclear(region)?;
        vmptrld(region)?;
        for &(encoding, _) in EVERY {
            let _ = vmwrite(encoding, mark(encoding, number as u64));
        }
    }
    for clear in [false, true] {
        let mut sums = [0u64; 2];
        for (sum, region) in sums.iter_mut().zip(regions) {
            if clear {
                vmclear(region)?;
            }
            vmptrld(region)?;
            for &(encoding, _) in EVERY {
                let value = vmread(encoding).unwrap_or(1);
                *sum = sum.rotate_left(5).wrapping_add(value);
            }
        }
        log!(
            "fields/own values, cleared {}: {:#x} {:#x}",
            clear as u8,
            sums[0],
            sums[1]
        );
    }
    regions.into_iter().try_for_each(vmclear)
}

/// What a VMCS holds after its child has run.
fn after_exit() -> Result<(), VmxError> {
    let mut bed = Bed::new("fields");
    for (name, features) in [("basic", Features::default()), ("modern", bed.modern())] {
        bed.prepare(features, calls)?;
        for _ in 0..3 {
            bed.good(name)?;
        }
        // A VMCALL leaves no address and no information about operands: these keep whatever an earlier
        // exit, of anybody's, put there.
        const STALE: [u32; 3] = [
            GUEST_LINEAR_ADDRESS,
            GUEST_PHYSICAL_ADDRESS,
            VMX_INSTRUCTION_INFO,
        ];
        for &(encoding, field) in EVERY
            .iter()
            .filter(|(encoding, _)| !STALE.contains(encoding))
        {
            if let Ok(value) = vmread(encoding) {
                log!("fields/{} after exits {}: {:#x}", name, field, value);
            }
        }
    }
    Ok(())
}
