// SPDX-License-Identifier: GPL-2.0-or-later
//! `matryoshka bench`: starts nested stacks, has their payloads measure one configuration of the
//! module after the other, and reports.
//!
//! All configurations of one stack are measured in one boot of it, stock first and stock again last:
//! what differs between two rows of a run is the module and nothing else, and that the first and
//! the last agree says that nothing else drifted.

pub mod args;
pub mod compare;
pub mod host;
pub mod plan;
pub mod probe;
pub mod progress;
pub mod report;
pub mod session;
pub mod table;

use std::process::ExitCode;

pub use args::BenchArgs;

/// How a benchmark can end, as exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// Everything asked for was measured, and agrees with what it was compared with.
    Ok = 0,
    /// Something failed, or differs.
    Failed = 1,
    /// The arguments contradict each other.
    Usage = 2,
    /// This host cannot run it.
    Unfit = 3,
    /// The module is needed and not there.
    NoModule = 4,
    /// A guest crashed or did not end in time.
    Guest = 5,
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> ExitCode {
        ExitCode::from(code as u8)
    }
}

/// What went wrong: the exit status and what to say.
#[derive(Debug)]
pub struct Failure(pub Code, pub String);

impl From<vmm::Error> for Failure {
    fn from(error: vmm::Error) -> Failure {
        let code = match error {
            vmm::Error::Module(_) => Code::NoModule,
            vmm::Error::Kvm { .. } => Code::Failed,
            _ => Code::Unfit,
        };
        Failure(code, error.to_string())
    }
}

/// Runs the subcommand to its exit status, having said on standard error what went wrong.
pub fn run(args: BenchArgs) -> ExitCode {
    let result = if args.test {
        probe::run(&args)
    } else if args.profile.is_some() {
        session::profile(&args)
    } else {
        session::run(&args)
    };
    match result {
        Ok(code) => code.into(),
        Err(Failure(code, why)) => {
            eprintln!("matryoshka: {why}");
            code.into()
        }
    }
}
