// SPDX-License-Identifier: GPL-2.0-or-later
//! Writing an initramfs: the "newc" cpio format, unpacked
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::fs;
use std::path::Path;

use crate::{Error, Result};

const S_IFDIR: u32 = 0o040000;
const S_IFREG: u32 = 0o100000;
const S_IFLNK: u32 = 0o120000;
const S_IFCHR: u32 = 0o020000;

/// An archive being written into memory.
#[derive(Debug, Default)]
pub struct Archive {
    out: Vec<u8>,
    inodes: u32,
    dirs: std::collections::BTreeSet<String>,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory and those above it, once each.
    pub fn dir(&mut self, path: &str) {
        let path = path.trim_matches('/');
        if path.is_empty() || self.dirs.contains(path) {
            return;
        }
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.dir(parent);
        }
        self.dirs.insert(path.to_owned());
        self.entry(path, S_IFDIR | 0o755, &[], (0, 0));
    }

    /// Adds a file with these bytes. `mode` is its permission bits.
    pub fn file(&mut self, path: &str, mode: u32, data: &[u8]) {
        let path = self.place(path);
        self.entry(&path, S_IFREG | (mode & 0o7777), data, (0, 0));
    }

    /// Adds a copy of the file `src`, with its permission bits.
    pub fn copy(&mut self, path: &str, src: &Path) -> Result<()> {
        use std::os::unix::fs::PermissionsExt;
        let data = fs::read(src).map_err(Error::file(src))?;
        let mode = fs::metadata(src)
            .map_err(Error::file(src))?
            .permissions()
            .mode();
        self.file(path, mode, &data);
        Ok(())
    }

    /// Adds a symbolic link to `target`.
    pub fn link(&mut self, path: &str, target: &str) {
        let path = self.place(path);
        self.entry(&path, S_IFLNK | 0o777, target.as_bytes(), (0, 0));
    }

    /// Adds a character device.
    pub fn device(&mut self, path: &str, major: u32, minor: u32) {
        let path = self.place(path);
        self.entry(&path, S_IFCHR | 0o600, &[], (major, minor));
    }

    /// Ends the archive and gives its bytes.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[], (0, 0));
        self.out
    }

    /// Makes the directories above `path` and strips its leading slash.
    fn place(&mut self, path: &str) -> String {
        let path = path.trim_start_matches('/');
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.dir(parent);
        }
        path.to_owned()
    }

    fn entry(&mut self, name: &str, mode: u32, data: &[u8], dev: (u32, u32)) {
        self.inodes += 1;
        let links = if mode & S_IFDIR != 0 && mode & S_IFREG != S_IFREG {
            2
        } else {
            1
        };
        let fields = [
            self.inodes,
            mode,
            0, // uid
            0, // gid
            links,
            0, // mtime: nothing here depends on the hour it was made
            data.len() as u32,
            0,
            0,
            dev.0,
            dev.1,
            name.len() as u32 + 1,
            0,
        ];
        self.out.reserve(data.len() + name.len() + 128);
        self.out.extend_from_slice(b"070701");
        for f in fields {
            self.out.extend_from_slice(format!("{f:08X}").as_bytes());
        }
        self.out.extend_from_slice(name.as_bytes());
        self.out.push(0);
        self.pad();
        self.out.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        while self.out.len() % 4 != 0 {
            self.out.push(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads an archive back: (name, mode, data) of each entry.
    fn unpack(b: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let hex = |at: usize| {
            u32::from_str_radix(std::str::from_utf8(&b[at..at + 8]).unwrap(), 16).unwrap()
        };
        let (mut at, mut out) = (0, Vec::new());
        while at < b.len() {
            assert_eq!(&b[at..at + 6], b"070701");
            let (mode, size, namelen) =
                (hex(at + 14), hex(at + 54) as usize, hex(at + 94) as usize);
            let name = String::from_utf8(b[at + 110..at + 110 + namelen - 1].to_vec()).unwrap();
            let data = (at + 110 + namelen).next_multiple_of(4);
            out.push((name, mode, b[data..data + size].to_vec()));
            at = (data + size).next_multiple_of(4);
        }
        out
    }

    #[test]
    fn reads_back() {
        let mut a = Archive::new();
        a.file("/lib/a/b", 0o755, b"hello");
        a.file("/lib/a/c", 0o644, b"");
        a.link("init", "/lib/a/b");
        a.device("dev/console", 5, 1);
        let e = unpack(&a.finish());
        let names: Vec<&str> = e.iter().map(|x| x.0.as_str()).collect();
        assert_eq!(
            names,
            [
                "lib",
                "lib/a",
                "lib/a/b",
                "lib/a/c",
                "init",
                "dev",
                "dev/console",
                "TRAILER!!!"
            ]
        );
        assert_eq!(e[2], ("lib/a/b".into(), 0o100755, b"hello".to_vec()));
        assert_eq!(e[0].1, 0o040755);
        assert_eq!(e[4].2, b"/lib/a/b");
    }

    #[test]
    fn a_missing_source_is_named() {
        let e = Archive::new()
            .copy("x", Path::new("/nonexistent/file"))
            .unwrap_err();
        assert!(e.to_string().contains("/nonexistent/file"));
    }
}
