// SPDX-License-Identifier: GPL-2.0-or-later
//! Whole lines to the VMM through its mailbox: one exit each, so that a line cannot be torn and costs
//! little even where an exit costs millions of instructions.

use core::fmt;

use protocol::ports;

use crate::cpu;

/// A line being built in the mailbox. Longer ones are cut.
struct Line {
    used: usize,
}

impl Line {
    fn push(&mut self, byte: u8) {
        let at = ports::MAILBOX as usize + self.used;
        // SAFETY: the mailbox is a page that the VMM keeps for this, identity-mapped; `used` stays below its
        // size, because `write_str` leaves room for the line end.
        unsafe { (at as *mut u8).write_volatile(byte) };
        self.used += 1;
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = ports::MAILBOX_SIZE - 1 - self.used;
        for &byte in text.as_bytes().iter().take(room) {
            // A line end inside would tear the line.
            self.push(if byte == b'\n' { b' ' } else { byte });
        }
        Ok(())
    }
}

/// Formats and sends one line.
pub fn send(arguments: fmt::Arguments<'_>) {
    let mut line = Line { used: 0 };
    // Writing to the mailbox cannot fail.
    let _ = fmt::write(&mut line, arguments);
    line.push(b'\n');
    cpu::out32(ports::TEXT, line.used as u32);
}

/// Sends a line that a program reads.
#[macro_export]
macro_rules! line {
    ($format:literal $($arguments:tt)*) => {
        $crate::console::send(format_args!(concat!("MTK ", $format) $($arguments)*))
    };
}

/// Sends a line that says what went wrong.
#[macro_export]
macro_rules! error {
    ($format:literal $($arguments:tt)*) => {
        $crate::line!("error {}", format_args!($format $($arguments)*))
    };
}
