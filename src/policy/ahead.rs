// SPDX-License-Identifier: GPL-2.0
//! How many pages after a fault are mapped along with it, where nothing can be learned from accessed flags.
//!
//! Only faults that follow on one another count: each doubles the number, any other fault starts anew with none.
//! So a guest that touches its memory in any other order never pays for pages that it does not want. Where the VMM
//! turns out not to have populated the next page, some faults are left alone before it is looked for again (`pause`).

use super::pause::Pause;

/// Entries in a table.
const TABLE: u64 = 512;
/// Base-2 logarithm of one more than the most pages at once.
const MAX: u8 = 7;
/// Most pages at once.
pub const MOST: u16 = (1 << MAX) - 1;

/// What is known about a vCPU's faults.
#[derive(Debug)]
pub struct Ahead {
    /// The page after the last that was mapped.
    next: u64,
    log2: u8,
    /// Faults to leave alone.
    pause: Pause,
}

impl Default for Ahead {
    fn default() -> Self {
        Self::new()
    }
}

impl Ahead {
    /// Nothing yet.
    pub const fn new() -> Self {
        Self {
            next: u64::MAX,
            log2: 0,
            pause: Pause::new(),
        }
    }

    /// The guest has faulted on `page` (its address, shifted by 12). Returns whether it follows on the fault before, so
    /// that `count` is to be asked; if not, there is nothing to do.
    #[inline]
    pub fn follows(&mut self, page: u64) -> bool {
        let follows = page == self.next && self.pause.is_over();
        if !follows {
            self.pause.pass();
            self.log2 = 0;
            self.next = page.wrapping_add(1);
        }
        follows
    }

    /// Whether `follows` has said yes of `page`, the last fault.
    pub fn is_next(&self, page: u64) -> bool {
        page == self.next
    }

    /// How many pages after `page`, of which `follows` has said yes, are to be mapped: all in the same last-level table
    /// and not more than `most`.
    pub fn count(&mut self, page: u64, most: u16) -> u16 {
        self.log2 = (self.log2 + 1).min(MAX);
        let left = TABLE - 1 - page % TABLE;
        let count = ((1u64 << self.log2) - 1).min(left).min(u64::from(most));
        self.next = page.wrapping_add(1 + count);
        count as u16
    }

    /// Only `count` pages were mapped of those that `count` said.
    pub fn stopped(&mut self, page: u64, count: u16) {
        self.next = page.wrapping_add(1 + u64::from(count));
        if count > 0 {
            self.pause.found();
        }
    }

    /// None of the pages that `count` said was there to be mapped.
    pub fn missed(&mut self) {
        self.pause.missed();
    }
}
