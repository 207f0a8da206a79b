// SPDX-License-Identifier: GPL-2.0-or-later
//! The control device: how what runs in a machine talks to the VMM that runs it.
//!
//! The ports and their meaning are [`protocol::ports`].

pub use protocol::ports::{
    touch, COMMAND, CONSOLE, DONE, END, FIRST, GIVE_WORK, MAILBOX, MAILBOX_SIZE, NEXT_WORK, NOP,
    RAW, TEXT, TOUCH, TOUCH_BASE, TOUCH_PAGES, UP,
};
