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
mod transport;
mod watch;

use std::path::Path;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use vmm::stack::SPEC_FILE;

pub use bench::Code;

#[derive(Parser)]
#[command(name = "matryoshka", version, after_help = bench::code::HELP, max_term_width = 100)]
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
    Save(transport::SaveArgs),
    Restore(transport::RestoreArgs),
    Status(status::StatusArgs),
    Set(status::SetArgs),
    Watch(watch::WatchArgs),
    Doctor(doctor::DoctorArgs),
    Bench(bench::BenchArgs),
}

fn main() -> ExitCode {
    // In a container the command may be PID 1 as well; a level of a stack has been told what to do.
    if std::process::id() == 1 && Path::new(SPEC_FILE).exists() {
        init::main();
    }
    // A reader that goes away (`matryoshka status | head`) ends us quietly, as any
    // Unix program, instead of with a panic in print!.
    // SAFETY: sets a signal's disposition to its default before any thread exists.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    match Cli::parse().command {
        Command::Nest(a) => nest::run(a),
        Command::Save(a) => transport::save(a),
        Command::Restore(a) => transport::restore(a),
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
