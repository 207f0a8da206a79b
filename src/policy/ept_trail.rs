// SPDX-License-Identifier: GPL-2.0
//! The way through EPT12 to the last-level entry of an address, remembered.
//!
//! What is remembered is where the entries above the last level are in the VMM's memory, and that they were found good. Each of them is
//! read anew each time, so that nothing is taken for granted about who may have written to them.

use super::ept::{ADDRESS, EXEC, LARGE, READ, USER_EXEC, WRITE};

/// Levels above the last one, at most.
const UPPER: usize = 4;

/// What a walk depends on beside the entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Start {
    /// A number that changes with the memory slots.
    pub memory: u64,
    /// L1's EPTP.
    pub eptp: u64,
    /// What `is_reserved` follows from.
    pub rules: [u64; 2],
}

/// A walk that ended in a last-level table, and what it read on the way.
#[derive(Clone, Copy, Debug)]
pub struct Trail {
    start: Start,
    /// The address without what chooses an entry of the table; all ones for no trail.
    region: u64,
    /// The entries above: place and contents. Those of four levels are followed by the last one again.
    entries: [(u64, u64); UPPER],
    /// The place of the table.
    table: u64,
}

/// Where in a table of this level the entry is that translates `gpa`.
fn offset(gpa: u64, level: u32) -> u64 {
    (gpa >> (12 + 9 * (level - 1)) & 511) * 8
}

impl Trail {
    /// None was made.
    pub const NONE: Trail = Trail {
        start: Start {
            memory: 0,
            eptp: 0,
            rules: [0; 2],
        },
        region: u64::MAX,
        entries: [(0, 0); UPPER],
        table: 0,
    };

    /// The entry of EPT12 that a walk for `gpa` ends with: that of the last level, or one above that is not present. `None` where it
    /// ends in another way: at a large page, at an entry for which `is_reserved` says yes (given its level), or at what cannot be
    /// read. `place` says where a guest-physical address is, and `read` what eight bytes at a place are.
    #[inline(always)]
    pub fn entry(
        &mut self,
        start: Start,
        gpa: u64,
        is_reserved: impl Fn(u64, u32) -> bool,
        place: impl FnMut(u64) -> Option<u64>,
        read: impl Fn(u64) -> Option<u64>,
    ) -> Option<u64> {
        let holds = |&(place, value): &(u64, u64)| read(place) == Some(value);
        let [a, b, c, d] = &self.entries;
        let is_known = self.region == gpa >> 21
            && self.start == start
            && holds(a)
            && holds(b)
            && holds(c)
            && (c == d || holds(d));
        if is_known {
            read(self.table | offset(gpa, 1))
        } else {
            self.walk(start, gpa, is_reserved, place, read)
        }
    }

    /// Makes the walk.
    #[inline(never)]
    fn walk(
        &mut self,
        start: Start,
        gpa: u64,
        is_reserved: impl Fn(u64, u32) -> bool,
        mut place: impl FnMut(u64) -> Option<u64>,
        read: impl Fn(u64) -> Option<u64>,
    ) -> Option<u64> {
        self.region = u64::MAX;
        // Bits 5:3 are the number of levels, less one (SDM volume 3, table 26-9).
        let levels = (start.eptp >> 3 & 7) as u32 + 1;
        if !(4..=5).contains(&levels) {
            return None;
        }
        let mut table = start.eptp & ADDRESS;
        for (nth, level) in (2..=levels).rev().enumerate() {
            let here = place(table)? | offset(gpa, level);
            let entry = read(here)?;
            if entry & (READ | WRITE | EXEC | USER_EXEC) == 0 {
                return Some(entry);
            }
            // With the last right alone it depends on mode-based execute control whether it is present.
            let is_present = entry & (READ | WRITE | EXEC) != 0;
            if !is_present || entry & LARGE != 0 || is_reserved(entry, level) {
                return None;
            }
            for e in self.entries.iter_mut().skip(nth) {
                *e = (here, entry);
            }
            table = entry & ADDRESS;
        }
        self.table = place(table)?;
        self.start = start;
        self.region = gpa >> 21;
        read(self.table | offset(gpa, 1))
    }
}
