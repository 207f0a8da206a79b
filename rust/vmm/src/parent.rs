// SPDX-License-Identifier: GPL-2.0
//! The other end of the control device: what a tool that runs inside one of our
//! guests says to the VMM that runs it.

use std::arch::asm;

use crate::control::{COMMAND, CONSOLE, DONE, END, FIRST, RAW};
use crate::{Error, Result};

/// Access to the parent's control device.
///
/// I/O permission belongs to a thread and is inherited by the threads it makes
/// afterwards, so open this before starting any.
#[derive(Debug, Clone, Copy)]
pub struct Parent(());

impl Parent {
    /// Asks for the device's ports. That this process runs in one of our guests is
    /// the caller's knowledge (the kernel command line says so); elsewhere the
    /// ports may belong to somebody else.
    pub fn open() -> Result<Parent> {
        // SAFETY: ioperm only changes this thread's I/O permission bitmap.
        let r = unsafe { libc::ioperm(FIRST.into(), (END - FIRST).into(), 1) };
        if r != 0 {
            return Err(Error::os(
                "ioperm (the guest kernel needs CONFIG_X86_IOPL_IOPERM)",
            ));
        }
        Ok(Parent(()))
    }

    /// Sends console text, one exit for all of it.
    pub fn text(&self, text: &str) {
        out_string(CONSOLE, text.as_bytes());
    }

    /// Sends raw bytes for L0's standard output.
    pub fn raw(&self, bytes: &[u8]) {
        out_string(RAW, bytes);
    }

    /// Asks for the next command.
    pub fn command(&self) -> u32 {
        let word: u32;
        // SAFETY: the port is ours (`open`), reading it touches no memory.
        unsafe {
            asm!("in eax, dx", in("dx") COMMAND, out("eax") word, options(nomem, nostack, preserves_flags));
        }
        word
    }

    /// Ends this machine with an exit status. It does not return when there is
    /// a VMM of ours below.
    pub fn done(&self, status: u32) {
        // SAFETY: the port is ours (`open`), writing it touches no memory.
        unsafe {
            asm!("out dx, eax", in("dx") DONE, in("eax") status, options(nomem, nostack, preserves_flags));
        }
    }
}

/// `rep outsb` of all bytes to `port`.
fn out_string(port: u16, bytes: &[u8]) {
    // SAFETY: the instruction reads exactly `bytes`; the port is ours, as only a
    // `Parent` gets here. The direction flag is clear by the ABI.
    unsafe {
        asm!(
            "rep outsb",
            in("dx") port,
            inout("rsi") bytes.as_ptr() => _,
            inout("rcx") bytes.len() => _,
            options(readonly, nostack, preserves_flags)
        );
    }
}
