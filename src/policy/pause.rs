// SPDX-License-Identifier: GPL-2.0
//! How many occasions are left alone after one that was of no use: one, and twice as many each further time, up to [`LONGEST`].

/// Most occasions that are left alone.
pub const LONGEST: u16 = 16;

/// What is known about earlier occasions.
#[derive(Debug, Default)]
pub struct Pause {
    /// Occasions to leave alone.
    left: u16,
    /// How many were left alone last.
    last: u16,
}

impl Pause {
    /// No occasion yet.
    pub const fn new() -> Self {
        Self { left: 0, last: 0 }
    }

    /// Whether the next occasion is to be used.
    #[inline]
    pub fn is_over(&self) -> bool {
        self.left == 0
    }

    /// An occasion was left alone.
    #[inline]
    pub fn pass(&mut self) {
        self.left = self.left.saturating_sub(1);
    }

    /// An occasion was of use.
    #[inline]
    pub fn found(&mut self) {
        self.last = 0;
    }

    /// An occasion was of none.
    pub fn missed(&mut self) {
        self.last = self.last.saturating_mul(2).clamp(1, LONGEST);
        self.left = self.last;
    }
}
