// SPDX-License-Identifier: GPL-2.0-or-later
//! The control device: how what runs in a machine talks to the VMM that runs it.
//!
//! The ports and their meaning are [`protocol::ports`].

pub use protocol::ports::{
    touch, COMMAND, CONSOLE, DONE, END, FIRST, MAILBOX, MAILBOX_SIZE, NOP, RAW, TEXT, TOUCH,
    TOUCH_BASE, TOUCH_PAGES, UP,
};
