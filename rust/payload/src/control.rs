// SPDX-License-Identifier: GPL-2.0-or-later
//! The control device of the VMM.

use protocol::{ports, Command};

use crate::cpu;

/// How the payload ends.
#[derive(Clone, Copy)]
#[repr(u32)]
pub enum Exit {
    /// All that was asked for was done.
    Success = 0,
    /// Something was measured or asked for that could not be; the lines before say what.
    Failed = 1,
    /// An exception or a panic.
    Fault = 2,
    /// The VMM does not speak this protocol.
    Protocol = 3,
    /// There is no VMX to be had.
    NoVmx = 4,
}

/// Waits for the next command. `Err` is a word that is none.
pub fn next_command() -> Result<Command, u32> {
    Command::decode(cpu::in32(ports::COMMAND))
}

/// Asks for the touch region's first `pages` pages to be dropped, or dropped and backed anew.
pub fn touch(what: u8, pages: u32) {
    cpu::out32(ports::TOUCH, ports::touch::word(what, pages));
}

/// Has the log of writes compared with what was written to the first `pages` pages of the touch region since they
/// were looked at last: how many changed pages it lacks, and how many it has.
pub fn compare(pages: u32) -> (u32, u32) {
    touch(ports::touch::COMPARE, pages);
    let found = cpu::in32(ports::TOUCH);
    (found & 0xffff, found >> 16)
}

/// Has EPT02 compared with EPT12, where there is a module that can: what is wrong, and how many entries were seen.
pub fn walk() -> (u32, u32) {
    touch(ports::touch::WALK, 0);
    let found = cpu::in32(ports::TOUCH);
    (found & 0xffff, found >> 16)
}

/// Ends the payload.
pub fn done(exit: Exit) -> ! {
    loop {
        cpu::out32(ports::DONE, exit as u32);
    }
}
