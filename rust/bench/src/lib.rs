// SPDX-License-Identifier: GPL-2.0-or-later
//! `matryoshka bench`: starts nested stacks, has their payloads measure one configuration of the
//! module after the other, and reports.
//!
//! All configurations of one stack are measured in one boot of it, stock first and stock again last:
//! what differs between two rows of a run is the module and nothing else, and that the first and
//! the last agree says that nothing else drifted.

pub mod args;
pub mod boot;
pub mod code;
pub mod compare;
pub mod fuzz;
pub mod host;
pub mod plan;
pub mod probe;
pub mod progress;
pub mod report;
pub mod session;
pub mod table;

use std::process::ExitCode;

pub use args::BenchArgs;
pub use code::Code;

/// What went wrong: the exit status and what to say.
#[derive(Debug)]
pub struct Failure(pub Code, pub String);

impl From<vmm::Error> for Failure {
    fn from(error: vmm::Error) -> Failure {
        Failure(Code::from(&error), error.to_string())
    }
}

/// What can be wrong with the arguments, looked at before anything is done.
fn check(args: &BenchArgs) -> Result<(), Failure> {
    args.check().map_err(|why| Failure(Code::Usage, why))?;
    Ok(args.files().check()?)
}

/// Runs the subcommand to its exit status, having said on standard error what went wrong.
pub fn run(args: BenchArgs) -> ExitCode {
    let result = if let Err(failure) = check(&args) {
        Err(failure)
    } else if args.test && args.tests == "fuzz" {
        fuzz::run(&args)
    } else if args.test {
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
