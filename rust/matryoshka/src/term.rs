// SPDX-License-Identifier: GPL-2.0-or-later
//! A terminal in raw mode, put back when done.

use std::os::fd::RawFd;

/// While this lives the terminal hands on every byte as it is typed.
pub struct Raw {
    fd: RawFd,
    before: libc::termios,
}

impl Raw {
    /// Switches `fd`; `None` when it is no terminal.
    pub fn new(fd: RawFd) -> Option<Raw> {
        // SAFETY: an all-zero termios is a valid value to be overwritten, and both
        // calls only touch it and the terminal.
        unsafe {
            let mut before: libc::termios = std::mem::zeroed();
            if libc::tcgetattr(fd, &mut before) != 0 {
                return None;
            }
            let mut raw = before;
            libc::cfmakeraw(&mut raw);
            (libc::tcsetattr(fd, libc::TCSANOW, &raw) == 0).then(|| Raw { fd, before })
        }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // SAFETY: restores what tcgetattr gave for this descriptor.
        unsafe { libc::tcsetattr(self.fd, libc::TCSANOW, &self.before) };
    }
}
