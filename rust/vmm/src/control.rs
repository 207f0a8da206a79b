// SPDX-License-Identifier: GPL-2.0
//! The control device: how what runs in a machine talks to the VMM that runs it.
//!
//! The ports and their meaning are [`protocol::ports`]; this adds one of the
//! tool's own.

pub use protocol::ports::{
    touch, COMMAND, CONSOLE, DONE, END, FIRST, NOP, TOUCH, TOUCH_BASE, TOUCH_PAGES,
};

/// Raw bytes for L0's standard output, 8-bit OUT: what an interactive console in
/// an inner guest writes, passed up without cutting it into lines.
pub const RAW: u16 = 0x4D01;

const _: () = assert!(RAW > FIRST && RAW < END);
