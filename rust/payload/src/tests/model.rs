// SPDX-License-Identifier: GPL-2.0-or-later
//! What fields of several VMCSs must hold, kept beside them: a lost or misplaced write is named with its
//! field, and not only seen in a sum.

use super::log;
use crate::memory;
use crate::vmx;
use crate::vmx::field::{is_64_bit, EVERY, VM_INSTRUCTION_ERROR};
use crate::vmx::ops::{vmclear, vmptrld, vmread, vmwrite, VmxError};

/// Discrepancies that are named; more are only counted.
const NAMED: u32 = 12;

/// A stream of numbers that is the same in every run.
#[derive(Clone, Copy)]
pub struct Numbers(u64);

impl Numbers {
    /// The stream of that seed.
    pub fn new(seed: u64) -> Numbers {
        Numbers(seed ^ 0x9e37_79b9_7f4a_7c15)
    }

    /// The next number (xorshift64*).
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// The next number below `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 33) as usize % limit
    }
}

/// Adds a value to a sum in which the order counts.
pub fn fold(sum: u64, value: u64) -> u64 {
    (sum.rotate_left(7) ^ value).wrapping_mul(0x0000_0100_0000_01b3)
}

/// The sum of a page's words.
pub fn page_sum(page: u64) -> u64 {
    (0..memory::PAGE / 8).fold(0, |sum, word| {
        // SAFETY: a page of ours; a VMCS region is memory like any other once it is clear.
        fold(sum, unsafe {
            ((page + word * 8) as *const u64).read_volatile()
        })
    })
}

/// Fields of several VMCSs.
pub struct Model {
    group: &'static str,
    /// The bits of each field that VMWRITE keeps, 0 if it cannot be written.
    kept: &'static mut [u64],
    /// What each field of each VMCS holds.
    values: &'static mut [u64],
    wrong: u32,
}

impl Model {
    /// A model of `count` VMCSs, all fields of which are 0. Uses a VMCS of its own to see what can be
    /// written; none is current afterwards.
    pub fn new(group: &'static str, count: usize) -> Result<Model, VmxError> {
        let kept: &mut [u64] = memory::slice(EVERY.len());
        let region = vmx::new_region();
        vmclear(region)?;
        vmptrld(region)?;
        for (kept, &(encoding, _)) in kept.iter_mut().zip(EVERY) {
            // Failing instructions change this one.
            if encoding != VM_INSTRUCTION_ERROR && vmwrite(encoding, u64::MAX).is_ok() {
                *kept = vmread(encoding)?;
            }
        }
        vmclear(region)?;
        Ok(Model {
            group,
            kept,
            values: memory::slice(EVERY.len() * count),
            wrong: 0,
        })
    }

    /// Can that field, by its place in [`EVERY`], be written?
    pub fn writable(&self, at: usize) -> bool {
        self.kept[at] != 0
    }

    /// Writes a field of the current VMCS, which is number `vmcs`; 64-bit fields now and then by their high
    /// half alone.
    pub fn write(&mut self, vmcs: usize, at: usize, value: u64) -> Result<(), VmxError> {
        if !self.writable(at) {
            return Ok(());
        }
        let (encoding, _) = EVERY[at];
        let slot = &mut self.values[vmcs * EVERY.len() + at];
        if is_64_bit(encoding) && value & 3 == 0 {
            vmwrite(encoding | 1, value >> 32)?;
            *slot = *slot & 0xffff_ffff | value & self.kept[at] & 0xffff_ffff << 32;
        } else {
            vmwrite(encoding, value)?;
            *slot = value & self.kept[at];
        }
        Ok(())
    }

    /// Somebody else has written `value` to a field of VMCS `vmcs`, by either of its encodings.
    pub fn written(&mut self, vmcs: usize, at: usize, encoding: u64, value: u64) {
        let slot = &mut self.values[vmcs * EVERY.len() + at];
        *slot = match encoding & 1 {
            1 => *slot & 0xffff_ffff | value << 32 & self.kept[at],
            _ => value & self.kept[at],
        };
    }

    /// What VMCS `vmcs` must hold in a field.
    pub fn expected(&self, vmcs: usize, at: usize) -> u64 {
        self.values[vmcs * EVERY.len() + at]
    }

    /// VMCS `to` holds what `from` does.
    pub fn copy(&mut self, from: usize, to: usize) {
        let n = EVERY.len();
        self.values.copy_within(from * n..(from + 1) * n, to * n);
    }

    /// Reads a field of the current VMCS, which must be what was written; gives what it is.
    pub fn check(&mut self, vmcs: usize, at: usize, when: &str) -> u64 {
        if !self.writable(at) {
            return 0;
        }
        let (encoding, name) = EVERY[at];
        let expected = self.expected(vmcs, at);
        let found = vmread(encoding);
        if found == Ok(expected) {
            return expected;
        }
        self.wrong += 1;
        if self.wrong <= NAMED {
            let (error, found) = match found {
                Ok(found) => (None, found),
                Err(error) => (Some(error), 0),
            };
            log!(
                "{}/{}: FAIL: VMCS {} {:#06x} {}: {:#x} instead of {:#x}{}",
                self.group,
                when,
                vmcs,
                encoding,
                name,
                found,
                expected,
                Because(error)
            );
        }
        found.unwrap_or(1)
    }

    /// Reads every field of the current VMCS that can be written; gives their sum.
    pub fn check_all(&mut self, vmcs: usize, when: &str) -> u64 {
        (0..EVERY.len()).fold(0, |sum, at| fold(sum, self.check(vmcs, at, when)))
    }

    /// How many fields were not what they must be.
    pub fn wrong(&self) -> u32 {
        self.wrong
    }
}

/// An error behind a value, if there was one.
struct Because(Option<VmxError>);

impl core::fmt::Display for Because {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match &self.0 {
            Some(error) => write!(f, " ({error})"),
            None => Ok(()),
        }
    }
}
