// SPDX-License-Identifier: GPL-2.0-or-later
//! What the levels of a nested stack say to each other.
//!
//! The VMM of a level, the payload it runs and the benchmark on L0 are three programs that meet only
//! through I/O ports, one structure in memory and lines of text. All three take them from here, so
//! that none can drift from the others.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod backdoor;
pub mod command;
pub mod info;
pub mod line;
pub mod op;
pub mod ports;
pub mod stats;

pub use command::{Command, Config};
pub use info::PayloadInfo;
pub use line::{Boot, Line, Row};
pub use op::{Op, OpSpec, Pattern};
pub use stats::{Sample, Summary};
