// SPDX-License-Identifier: GPL-2.0-or-later
//! `matryoshka save` and `matryoshka restore`: a running stack, with everything inside it, into a file and back, on this host
//! or another one, whether the module is loaded there or not.

use std::io::IsTerminal;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use vmm::door::{self, Door};
use vmm::files::Files;
use vmm::stack::{self, Local};
use vmm::Error;

use crate::nest;
use crate::term::Raw;
use crate::{complain, Code};

const SAVE_EXAMPLES: &str = "Examples:
  matryoshka nest --depth 1 --args tests=turns &  a stack that runs ...
  matryoshka save stack                           ... goes into a file, and ends
  matryoshka restore stack                        it goes on where it was
  matryoshka save --pid 4711 stack                if several stacks run

The file holds the guest's memory: whoever can read it can read that. Pages of zeros take no room.
If the file cannot be written, the stack goes on and nothing is left of the file.";

/// Save a running stack into a file and end it
#[derive(Args, Debug)]
#[command(after_help = SAVE_EXAMPLES)]
pub struct SaveArgs {
    /// File to make; it must not exist
    file: PathBuf,

    /// Process that runs the stack (`matryoshka nest` or `restore`), if there are several
    #[arg(long, value_name = "PID")]
    pid: Option<u32>,
}

/// Go on with a stack that was saved
///
/// The host may be another one than it was saved on, with the module or without, if its processor has
/// what the stack's first guest was promised. The file stays; it can be restored again.
#[derive(Args, Debug)]
pub struct RestoreArgs {
    /// What `matryoshka save` made
    file: PathBuf,

    /// Give up after this many seconds
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,

    /// Print the innermost level's lines without their level, and nobody else's
    #[arg(long)]
    plain: bool,
}

/// A bar on a terminal for what takes long.
struct Bar(ProgressBar);

impl Bar {
    fn new(what: &'static str) -> Bar {
        let bar = match std::io::stderr().is_terminal() {
            true => ProgressBar::new(0),
            false => ProgressBar::hidden(),
        };
        let style = "{msg} {bar:30} {bytes} of {total_bytes}, {eta} left";
        bar.set_style(ProgressStyle::with_template(style).expect("a constant template"));
        bar.set_message(what);
        Bar(bar)
    }

    fn at(&self, done: u64, all: u64) {
        self.0.set_length(all);
        self.0.set_position(done);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// Which process to ask. That none runs is nothing that other arguments would help against.
fn choose(named: Option<u32>, running: &[u32]) -> Result<u32, (Code, String)> {
    match (named, running) {
        (Some(pid), _) => Ok(pid),
        (None, [pid]) => Ok(*pid),
        (None, []) => {
            let why = "no stack runs here that can be saved; start one: matryoshka nest";
            Err((Code::Failed, why.into()))
        }
        (None, several) => {
            let pids: Vec<_> = several.iter().map(u32::to_string).collect();
            let why = format!(
                "several stacks run here; say which with --pid: {}",
                pids.join(", ")
            );
            Err((Code::Usage, why))
        }
    }
}

/// The status for a stack that was not saved: what was named wrongly, the file or with --pid the process, is the user's to mend.
fn not_saved(e: &Error, named: Option<u32>, running: &[u32]) -> Code {
    match (e, named) {
        (Error::Usage(_), _) => Code::Usage,
        (_, Some(pid)) if !running.contains(&pid) => Code::Usage,
        _ => Code::Failed,
    }
}

/// Runs the subcommand.
pub fn save(args: SaveArgs) -> ExitCode {
    let running = door::running();
    let pid = match choose(args.pid, &running) {
        Ok(pid) => pid,
        Err((code, why)) => {
            complain(why);
            return code.into();
        }
    };
    let bar = Bar::new("saving");
    let saved = std::path::absolute(&args.file)
        .map_err(Error::file(&args.file))
        .and_then(|file| door::save(pid, &file, |done, all| bar.at(done, all)));
    drop(bar);
    match saved {
        Ok(()) => {
            let size = std::fs::metadata(&args.file).map(|file| {
                use std::os::unix::fs::MetadataExt;
                format!(" ({} on disk)", HumanBytes(file.blocks() * 512))
            });
            println!(
                "saved{}; go on with it: matryoshka restore {}",
                size.unwrap_or_default(),
                args.file.display()
            );
            Code::Ok.into()
        }
        Err(e) => {
            complain(format!("not saved: {e}"));
            not_saved(&e, args.pid, &running).into()
        }
    }
}

/// Opens the door for `save`, or says why there is none; a stack runs without as well.
pub fn door() -> Option<Arc<Door>> {
    match Door::open() {
        Ok(door) => Some(Arc::new(door)),
        Err(e) => {
            complain(format!("this stack cannot be saved: {e}"));
            None
        }
    }
}

/// Runs the subcommand.
pub fn restore(args: RestoreArgs) -> ExitCode {
    match go_on(&args) {
        Ok(outcome) => nest::ended(outcome.exit),
        Err(e) => {
            complain(&e);
            match &e {
                // What is wrong is the file that was named, not this host.
                Error::Image { path, .. } | Error::File { path, .. } if *path == args.file => {
                    Code::Usage.into()
                }
                e => Code::from(e).into(),
            }
        }
    }
}

fn go_on(args: &RestoreArgs) -> Result<stack::Outcome, Error> {
    let local = Local {
        limit: args.timeout.map(Duration::from_secs),
        door: door(),
        ..Local::default()
    };
    let bar = Bar::new("reading");
    let stopped = stack::read(&args.file, &local, |done, all| bar.at(done, all))?;
    drop(bar);
    let stdin = std::io::stdin();
    let interactive = stopped.spec.interactive();
    let raw = match interactive {
        true => Raw::new(stdin.as_raw_fd()),
        false => None,
    };
    let mut host = nest::Host::restored(&stopped.handler, stopped.spec.depth, args.plain)?;
    let files = Files::chosen(None, None);
    let terminal = interactive.then(|| stdin.as_raw_fd());
    let outcome = stopped.go_on(&files, terminal, &mut host);
    drop(raw);
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_only_stack_needs_no_name() {
        assert_eq!(choose(None, &[7]), Ok(7));
        assert_eq!(choose(Some(3), &[7, 8]), Ok(3));
        let (code, why) = choose(None, &[7, 8]).unwrap_err();
        assert!(code == Code::Usage && why.contains("--pid: 7, 8"));
        let (code, why) = choose(None, &[]).unwrap_err();
        assert!(code == Code::Failed && why.contains("matryoshka nest"));
    }

    #[test]
    fn a_wrong_name_is_a_wrong_argument() {
        let (name, other) = (Error::Usage(String::new()), Error::Stack(String::new()));
        assert_eq!(not_saved(&name, None, &[7]), Code::Usage);
        assert_eq!(not_saved(&other, Some(1), &[7]), Code::Usage);
        assert_eq!(not_saved(&other, Some(7), &[7]), Code::Failed);
        assert_eq!(not_saved(&other, None, &[7]), Code::Failed);
    }
}
