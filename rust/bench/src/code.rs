// SPDX-License-Identifier: GPL-2.0-or-later
//! How the tool ends: the one home of its exit statuses.

use std::process::ExitCode;

/// An exit status; the numbers are part of the tool's interface (see [`HELP`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// All well; a benchmark agrees with what it was compared with.
    Ok = 0,
    /// Something failed that has no number of its own, or a measurement differs.
    Failed = 1,
    /// Wrong arguments (clap's own number), some that contradict each other, or one that names what is not there.
    Usage = 2,
    /// This host is not fit: no KVM, no nesting, files missing.
    Unfit = 3,
    /// The module is not loaded, or cannot be.
    NoModule = 4,
    /// A guest crashed, reset itself or ran out of time.
    Guest = 5,
}

/// What `--help` says of them.
pub const HELP: &str = "Exit status:
  0  all well
  1  something failed; with nest: or the status that the innermost level ended with
  2  wrong arguments: also a file or a name in them that is not there, or of the wrong kind
  3  this host is not fit (no /dev/kvm, no nested VMX, files missing): see `matryoshka doctor`
  4  the module is not loaded, or cannot be loaded
  5  a guest crashed, reset itself or did not end in time";

impl From<Code> for ExitCode {
    fn from(code: Code) -> ExitCode {
        ExitCode::from(code as u8)
    }
}

impl From<&vmm::Error> for Code {
    fn from(error: &vmm::Error) -> Code {
        match error {
            vmm::Error::Usage(_) => Code::Usage,
            vmm::Error::Module(_) => Code::NoModule,
            vmm::Error::Kvm { .. } | vmm::Error::Setting(_) => Code::Failed,
            _ => Code::Unfit,
        }
    }
}
