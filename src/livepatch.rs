// SPDX-License-Identifier: GPL-2.0
//! Livepatches of KVM.
//!
//! A path does in one piece what stock code does in many functions, and a patch of one of those would not be called. Which functions a
//! patch is of is nowhere to be asked, so while there is one of kvm or kvm_intel all paths are off (`control`). Livepatches are listed below
//! /sys/kernel/livepatch, each with a directory for each module that it changes (Documentation/ABI/testing/sysfs-kernel-livepatch).

use crate::kfile;
use core::fmt;
use kernel::{c_str, str::CStr};

/// Bytes of a module's name with its NUL (`MODULE_NAME_LEN`).
const LENGTH: usize = 56;
/// Most livepatches that are looked at; with more, KVM counts as patched. Their makers have each replace the one before.
const MOST: usize = 16;

/// The name of a livepatch.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Name {
    bytes: [u8; LENGTH],
    length: usize,
}

impl Name {
    /// A patch that was not found here, and is known by ftrace.
    pub(crate) const UNKNOWN: Name = Name {
        bytes: [0; LENGTH],
        length: 0,
    };

    fn new(name: &[u8]) -> Self {
        let mut this = Self::UNKNOWN;
        this.length = name.len().min(LENGTH);
        for (to, from) in this.bytes.iter_mut().zip(name) {
            *to = *from;
        }
        this
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or(&[])
    }

    /// Whether the patch says of itself that it changes `module`.
    fn changes(&self, module: &str) -> bool {
        let mut path = [0; 128];
        let parts = [
            b"/sys/kernel/livepatch/".as_slice(),
            self.bytes(),
            b"/",
            module.as_bytes(),
        ];
        for (to, from) in path.iter_mut().zip(parts.iter().copied().flatten()) {
            *to = *from;
        }
        CStr::from_bytes_until_nul(&path).is_ok_and(kfile::exists)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match core::str::from_utf8(self.bytes()) {
            Ok(name) if !name.is_empty() => f.write_str(name),
            _ => f.write_str("?"),
        }
    }
}

/// A livepatch that changes KVM, if there is one. Process context; reads directories.
pub(crate) fn of_kvm() -> Option<Name> {
    let (mut names, mut count) = ([Name::UNKNOWN; MOST], 0);
    let found = kfile::list(c_str!("/sys/kernel/livepatch"), &mut |name| {
        if !name.starts_with(b".") {
            if let Some(to) = names.get_mut(count) {
                *to = Name::new(name);
            }
            count += 1;
        }
    });
    // A kernel without livepatches does not have the directory.
    found.ok()?;
    if count > MOST {
        return Some(Name::new(b"one of too many"));
    }
    let names = names.iter().take(count).copied();
    names
        .into_iter()
        .find(|name| name.changes("kvm") || name.changes("kvm_intel"))
}
