// SPDX-License-Identifier: GPL-2.0-or-later
//! Console text on its way up: bytes become lines, lines carry their level.

use std::io::{self, Write};

/// A line longer than this is cut into several, so that a guest cannot make the
/// VMM hold arbitrary amounts of text.
const LINE_MAX: usize = 4096;

/// Collects bytes into lines.
#[derive(Debug, Default)]
pub struct Lines {
    buf: Vec<u8>,
}

impl Lines {
    /// Takes bytes and calls `line` for each line they complete, without its end.
    pub fn push(&mut self, bytes: &[u8], mut line: impl FnMut(&str)) {
        for &b in bytes {
            if b == b'\n' || self.buf.len() >= LINE_MAX {
                self.flush(&mut line);
            }
            if b != b'\n' && b != b'\r' {
                self.buf.push(b);
            }
        }
    }

    /// What has no end yet.
    pub(crate) fn rest(&self) -> &[u8] {
        &self.buf
    }

    /// Hands on what is left without an end of line.
    pub fn flush(&mut self, mut line: impl FnMut(&str)) {
        if !self.buf.is_empty() {
            line(&String::from_utf8_lossy(&self.buf));
            self.buf.clear();
        }
    }
}

/// Puts the level in front of a line for its way up.
pub fn tag(level: u32, line: &str) -> String {
    format!("L{level}| {line}")
}

/// Takes a level off a line again: the level and the text, or nothing when the
/// line carries none.
pub fn untag(line: &str) -> Option<(u32, &str)> {
    let (level, text) = line.strip_prefix('L')?.split_once("| ")?;
    Some((level.parse().ok()?, text))
}

/// A writer that is always satisfied and keeps what it got, for the serial port.
#[derive(Debug, Default, Clone)]
pub struct Collected(pub Vec<u8>);

impl Write for Collected {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collect(chunks: &[&str]) -> Vec<String> {
        let (mut l, mut out) = (Lines::default(), Vec::new());
        for c in chunks {
            l.push(c.as_bytes(), |s| out.push(s.to_owned()));
        }
        l.flush(|s| out.push(s.to_owned()));
        out
    }

    #[test]
    fn lines_come_out_whole() {
        assert_eq!(collect(&["a\r\nb", "c\n", "d"]), ["a", "bc", "d"]);
        assert_eq!(collect(&[&"x".repeat(LINE_MAX + 1)]).len(), 2);
    }

    #[test]
    fn tags_come_off_again() {
        assert_eq!(untag(&tag(3, "hello | you")), Some((3, "hello | you")));
        assert_eq!(untag("L| x"), None);
        assert_eq!(untag("plain"), None);
        assert_eq!(untag("Lx| y"), None);
    }
}
