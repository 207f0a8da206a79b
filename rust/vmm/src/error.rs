// SPDX-License-Identifier: GPL-2.0-or-later
//! What can go wrong, each with the cause and the next step.

use std::io;
use std::path::{Path, PathBuf};

/// An error of the VMM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// /dev/kvm cannot be opened.
    #[error("cannot open /dev/kvm: {source}{}", no_kvm_hint(source))]
    NoKvm {
        /// Why not.
        source: io::Error,
    },
    /// The kernel speaks another version of the KVM API than 12.
    #[error("KVM API version {0} instead of 12: this kernel is too old or too strange")]
    ApiVersion(i32),
    /// A KVM request failed.
    #[error("KVM: {what}: {source}")]
    Kvm {
        /// The ioctl.
        what: &'static str,
        /// What the kernel answered.
        source: io::Error,
    },
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file is there but is not what it should be.
    #[error("{}: {what}", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// Guest memory cannot be had, or is too small for what must go into it.
    #[error("guest memory: {0}")]
    Memory(String),
    /// A stack cannot be made as asked.
    #[error("{0}")]
    Stack(String),
    /// The module could not be loaded or unloaded.
    #[error("module: {0}")]
    Module(String),
    /// The module is there and does not take a setting.
    #[error("module: {0}")]
    Setting(String),
    /// What the user named is not there, of the wrong kind, or more than there can be.
    #[error("{0}")]
    Usage(String),
    /// Something about this process or its parent machine.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// The result of everything here.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Wraps the answer of a kvm-ioctls call.
    pub(crate) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
        move |e| Error::Kvm {
            what,
            source: io::Error::from_raw_os_error(e.errno()),
        }
    }

    /// Wraps an I/O error about `path`.
    pub fn file(path: &Path) -> impl FnOnce(io::Error) -> Error + '_ {
        move |source| Error::File {
            path: path.to_owned(),
            source,
        }
    }

    /// Wraps the last OS error.
    pub(crate) fn os(what: &'static str) -> Error {
        Error::Os {
            what,
            source: io::Error::last_os_error(),
        }
    }
}

/// What to do about a missing or closed /dev/kvm.
fn no_kvm_hint(e: &io::Error) -> &'static str {
    match e.raw_os_error() {
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => {
            "\n  no KVM here: load it (modprobe kvm_intel), or see `matryoshka doctor` for whether this \
             CPU has VMX at all"
        }
        Some(libc::EACCES | libc::EPERM) => {
            "\n  KVM is there but not for you: join the group that owns it (usually kvm), or run as root"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_kvm_names_the_next_step() {
        let e = Error::NoKvm {
            source: io::Error::from_raw_os_error(libc::ENOENT),
        };
        assert!(e.to_string().contains("modprobe kvm_intel"));
        let e = Error::NoKvm {
            source: io::Error::from_raw_os_error(libc::EACCES),
        };
        assert!(e.to_string().contains("group"));
    }
}
