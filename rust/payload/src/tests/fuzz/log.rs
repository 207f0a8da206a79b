// SPDX-License-Identifier: GPL-2.0-or-later
//! What a program saw: a sum over all of it, four bits of the sum before each operation, and each value in words when the
//! program is shown.

use super::super::model::fold;

/// The log of one program.
pub struct Log {
    program: u64,
    at: usize,
    sum: u64,
    /// Four bits of the sum before each operation, so that two lines tell in which one they part.
    steps: u128,
    shown: bool,
}

impl Log {
    /// An empty one. With `shown` everything that is noted is printed.
    pub fn new(program: u64, shown: bool) -> Log {
        Log {
            program,
            at: 0,
            sum: program,
            steps: 0,
            shown,
        }
    }

    /// The operations are counted, so that a line names the one that it belongs to.
    pub fn begin(&mut self, at: usize) {
        self.at = at;
        self.steps = self.steps << 4 | u128::from(self.sum >> 60);
    }

    /// Notes some values.
    pub fn note(&mut self, what: &str, values: &[u64]) {
        for &value in values {
            self.sum = fold(self.sum, value);
        }
        if self.shown {
            super::super::log!("fuzz {}/{} {}: {:x?}", self.program, self.at, what, values);
        }
    }

    /// What is done, which is the same whatever comes of it: in words only.
    pub fn does(&self, what: &str, values: &[u64]) {
        if self.shown {
            super::super::log!(
                "fuzz {}/{} does {} {:x?}",
                self.program,
                self.at,
                what,
                values
            );
        }
    }

    /// The sum.
    pub fn sum(&self) -> u64 {
        self.sum
    }

    /// A digit for each operation, the last for what is noted at the end.
    pub fn steps(&self) -> u128 {
        self.steps
    }
}
