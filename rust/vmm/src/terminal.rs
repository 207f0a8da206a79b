// SPDX-License-Identifier: GPL-2.0-or-later
//! What is typed at a terminal on its way to COM1.

use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use crate::machine::Shared;

/// The status of a machine that was ended from the terminal: as of a program that
/// was ended by SIGINT.
pub(crate) const STATUS: u32 = 130;

/// The escape character of a terminal, Ctrl-A.
const ESCAPE: u8 = 1;

/// Looks for the escape in what is typed.
#[derive(Default)]
pub(crate) struct Escape {
    seen: bool,
}

impl Escape {
    /// Gives what is to be passed on, or nothing when the machine is to end.
    fn filter(&mut self, typed: &[u8]) -> Option<Vec<u8>> {
        let mut out = Vec::with_capacity(typed.len());
        for &b in typed {
            match (std::mem::take(&mut self.seen), b) {
                (false, ESCAPE) => self.seen = true,
                (true, b'x' | b'X') => return None,
                (true, b) if b != ESCAPE => out.extend([ESCAPE, b]),
                (_, b) => out.push(b),
            }
        }
        Some(out)
    }
}

/// Feeds what is typed at `fd` to COM1 until the machine is over. True when the
/// escape was typed.
pub(crate) fn read(fd: RawFd, escape: &mut Option<Escape>, shared: &Shared<'_>) -> bool {
    let mut buf = [0u8; 64];
    loop {
        if !wait_for(fd, &shared.over) {
            return false;
        }
        // SAFETY: reads at most the buffer's length into the buffer.
        let n = unsafe { libc::read(fd, buf.as_mut_ptr().cast(), buf.len()) };
        if n <= 0 {
            return false;
        }
        let typed = match escape {
            None => buf[..n as usize].to_vec(),
            Some(e) => match e.filter(&buf[..n as usize]) {
                Some(typed) => typed,
                None => return true,
            },
        };
        let mut rest = &typed[..];
        while !rest.is_empty() {
            let taken = shared.bus().type_in(rest);
            rest = &rest[taken..];
            if taken == 0 {
                // The guest has not read its 64 bytes yet.
                std::thread::sleep(Duration::from_millis(10));
                if shared.stopped() {
                    return false;
                }
            }
        }
    }
}

/// Waits until `fd` is readable; false when `over` is.
pub(crate) fn wait_for(fd: RawFd, over: &EventFd) -> bool {
    let poll = |fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut polls = [poll(fd), poll(over.as_raw_fd())];
    // SAFETY: the array is ours and its length is the one given.
    unsafe { libc::poll(polls.as_mut_ptr(), 2, -1) >= 0 && polls[1].revents == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_escape_is_found_across_reads() {
        let mut e = Escape::default();
        assert_eq!(e.filter(b"ab\x01"), Some(b"ab".to_vec()));
        assert_eq!(e.filter(b"x"), None);
    }

    #[test]
    fn other_uses_of_the_escape_character_pass() {
        let mut e = Escape::default();
        assert_eq!(e.filter(b"\x01\x01"), Some(b"\x01".to_vec()));
        assert_eq!(e.filter(b"\x01c"), Some(b"\x01c".to_vec()));
        assert_eq!(e.filter(b"x"), Some(b"x".to_vec()));
    }
}
