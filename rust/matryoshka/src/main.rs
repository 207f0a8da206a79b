// SPDX-License-Identifier: GPL-2.0-or-later
//! matryoshka: starts nested stacks, tunes the module and reads its counters.
//!
//! One static program for every place: on the host it is the command, and as
//! PID 1 of a guest it is the init of a level of a stack.

mod doctor;
mod init;
mod nest;
mod status;
mod term;
mod watch;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// How the tool ends; the numbers are part of its interface (see --help).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// All well.
    Ok = 0,
    /// Something failed that has no number of its own.
    Failed = 1,
    /// Wrong arguments (clap's own number).
    Usage = 2,
    /// This host is not fit: no KVM, no nesting, files missing.
    Unfit = 3,
    /// The module is not loaded, or cannot be.
    NoModule = 4,
    /// A guest crashed, reset itself or ran out of time.
    Guest = 5,
}

impl From<Code> for ExitCode {
    fn from(c: Code) -> ExitCode {
        ExitCode::from(c as u8)
    }
}

const CODES: &str = "Exit status:
  0  all well
  1  something failed; with nest: or the status that the innermost level ended with
  2  wrong arguments
  3  this host is not fit (no /dev/kvm, no nested VMX, files missing): see `matryoshka doctor`
  4  the module is not loaded, or cannot be loaded
  5  a guest crashed, reset itself or did not end in time";

#[derive(Parser)]
#[command(name = "matryoshka", version, after_help = CODES, max_term_width = 100)]
/// Cheap nested virtualization at every depth: starts stacks of virtual machines inside virtual
/// machines, tunes the Matryoshka kernel module and reads its counters.
///
/// The host is level 0 (L0), its guest L1, the guest of that L2, and so on. Begin with `matryoshka
/// doctor`; it says whether this host can do it and what to do if not.
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Nest(nest::NestArgs),
    Status(status::StatusArgs),
    Set(status::SetArgs),
    Watch(watch::WatchArgs),
    Doctor(doctor::DoctorArgs),
    Bench(bench::BenchArgs),
}

fn main() -> ExitCode {
    if std::process::id() == 1 {
        init::main();
    }
    // A reader that goes away (`matryoshka status | head`) ends us quietly, as any
    // Unix program, instead of with a panic in print!.
    // SAFETY: sets a signal's disposition to its default before any thread exists.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    match Cli::parse().command {
        Command::Nest(a) => nest::run(a),
        Command::Status(a) => status::status(a).into(),
        Command::Set(a) => status::set(a).into(),
        Command::Watch(a) => watch::run(a).into(),
        Command::Doctor(a) => doctor::run(a).into(),
        Command::Bench(a) => bench::run(a),
    }
}

/// Says what went wrong, on standard error.
pub fn complain(e: impl std::fmt::Display) {
    eprintln!("matryoshka: {e}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_documents_exit_codes() {
        let help = Cli::command().render_long_help().to_string();
        assert!(help.contains("Exit status:"));
    }
}
