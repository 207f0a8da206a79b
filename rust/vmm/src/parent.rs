// SPDX-License-Identifier: GPL-2.0-or-later
//! The other end of the control device: what a tool that runs inside one of our
//! guests says to the VMM that runs it.

use std::arch::asm;
use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::ptr::null_mut;

use crate::control::{COMMAND, DONE, END, FIRST, MAILBOX, MAILBOX_SIZE, RAW, TEXT, UP};
use crate::{Error, Result};

/// Access to the parent's control device.
///
/// I/O permission belongs to a thread and is inherited by the threads it makes
/// afterwards, so open this before starting any.
#[derive(Debug, Clone, Copy)]
pub struct Parent {
    mailbox: *mut u8,
}

// SAFETY: the mapping is of the whole process and lasts as long as it does.
unsafe impl Send for Parent {}
// SAFETY: bytes are only written to the mailbox; two threads at once could mix up a
// line of text, nothing else, and the VMM calls its handler under a lock.
unsafe impl Sync for Parent {}

impl Parent {
    /// Asks for the device's ports and maps its mailbox. That this process runs in
    /// one of our guests is the caller's knowledge (it is PID 1 with a stack file);
    /// elsewhere ports and page may belong to somebody else. Needs /dev mounted.
    pub fn open() -> Result<Parent> {
        // SAFETY: ioperm only changes this thread's I/O permission bitmap.
        let r = unsafe { libc::ioperm(FIRST.into(), (END - FIRST).into(), 1) };
        if r != 0 {
            return Err(Error::os(
                "ioperm (the guest kernel needs CONFIG_X86_IOPL_IOPERM)",
            ));
        }
        let path = Path::new("/dev/mem");
        let mem = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(Error::file(path))?;
        // SAFETY: a new mapping at an address of the kernel's choice. The page is not
        // part of the memory the guest kernel uses (boot::e820 leaves it out).
        let page = unsafe {
            libc::mmap(
                null_mut(),
                MAILBOX_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                mem.as_raw_fd(),
                MAILBOX as libc::off_t,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(Error::os("mapping the mailbox from /dev/mem"));
        }
        Ok(Parent {
            mailbox: page.cast(),
        })
    }

    /// Says that this machine's init runs.
    pub fn up(&self) {
        out(UP, 0);
    }

    /// Sends a line of console text.
    pub fn line(&self, line: &str) {
        self.send(TEXT, format!("{line}\n").as_bytes());
    }

    /// Sends raw bytes for L0's standard output.
    pub fn raw(&self, bytes: &[u8]) {
        self.send(RAW, bytes);
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
        out(DONE, status);
    }

    /// Passes bytes through the mailbox, one exit for each full page.
    fn send(&self, port: u16, bytes: &[u8]) {
        for chunk in bytes.chunks(MAILBOX_SIZE) {
            // SAFETY: the mailbox is a mapping of MAILBOX_SIZE bytes and no Rust object
            // lies in it, so nothing overlaps the source.
            unsafe {
                self.mailbox
                    .copy_from_nonoverlapping(chunk.as_ptr(), chunk.len())
            };
            out(port, chunk.len() as u32);
        }
    }
}

/// OUT of a word to one of the device's ports. The VMM may read the mailbox
/// meanwhile, so the compiler must have written it: no `nomem`.
fn out(port: u16, word: u32) {
    // SAFETY: the port is ours, as only a `Parent` gets here.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") word, options(nostack, preserves_flags));
    }
}
