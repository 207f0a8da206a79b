// SPDX-License-Identifier: GPL-2.0-or-later
//! `matryoshka nest`: a stack of machines with a real KVM at every level.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use bench::args::{parse_config, CONFIGURATIONS};
use clap::Args;
use protocol::{Boot, Command, Config, Line};
use serde::{Deserialize, Serialize};
use vmm::files::Files;
use vmm::machine::Exit;
use vmm::memory::{LEAST_MIB, MOST_MIB};
use vmm::stack::{self, Handler, Inner, Local, Spec, MAX_DEPTH, TOUCH_PAGES};
use vmm::Error;

use crate::term::Raw;
use crate::transport;
use crate::{complain, Code};

const EXAMPLES: &str = "Examples:
  matryoshka nest --depth 2                        the payload as L2, under KVM in L1's Linux
  matryoshka nest --depth 3 --config stock,l0      two rounds of it as L3: without and with the module
  matryoshka nest --depth 2 --linux -- uname -a    a command in a Linux that is L2
  matryoshka nest --depth 1 --linux                a shell in L1; Ctrl-A x ends it

Every level between is the same trimmed Linux with this same program as its init. Lines are
printed with the level they come from. Ctrl-C ends everything; nothing is left behind.";

fn help() -> String {
    format!("{EXAMPLES}\n\n{CONFIGURATIONS}\n\n`matryoshka bench --help` lists operations and patterns.")
}

/// Start a stack of nested machines.
#[derive(Args, Debug)]
#[command(after_help = help())]
pub struct NestArgs {
    /// The innermost level: 1 is a guest of this host, 2 a guest of that
    #[arg(long, short, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=MAX_DEPTH as i64))]
    depth: u32,

    /// Run Linux at the innermost level instead of the payload: COMMAND there, or a shell
    #[arg(long, conflicts_with_all = ["payload", "args", "config"])]
    linux: bool,

    /// Command for --linux
    #[arg(last = true, value_name = "COMMAND", requires = "linux")]
    command: Vec<String>,

    /// Bare-metal payload (64-bit ELF at 1 MiB) [default: /lib/matryoshka/payload]
    #[arg(long, value_name = "FILE")]
    payload: Option<PathBuf>,

    /// What the payload is to do: ops=ITEM,... with OP:SAMPLES or TOUCH/PATTERN:PAGESxPASSES as items,
    /// or tests=GROUP,... (Documentation/testing.md)
    #[arg(
        long,
        default_value = "ops=cpuid:20,hypercall:20",
        value_name = "WORDS"
    )]
    args: String,

    /// Rounds of the payload, each with the module set so at every level: stock, idle, l0, all,
    /// check. Without it one round with the module as it is
    #[arg(long, value_delimiter = ',', value_name = "CONFIG,...", value_parser = parse_config)]
    config: Vec<Config>,

    /// Set a knob of the module wherever a configuration has it loaded; may be given again
    #[arg(long = "set", value_name = "PATH/KNOB=VALUE")]
    knobs: Vec<vmm::module::Knob>,

    /// vCPUs of each Linux level
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=vmm::machine::MAX_CPUS as i64))]
    cpus: u8,

    /// Memory of an innermost Linux in MiB; the levels around it get what they need
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(LEAST_MIB..=MOST_MIB))]
    memory: Option<u64>,

    /// Pages of 4 KiB in the payload's touch region
    #[arg(long, default_value_t = TOUCH_PAGES, value_name = "PAGES")]
    touch_pages: u32,

    /// Save and restore L1 into a new VM again and again, at points that SEED decides: for tests
    #[arg(long, value_name = "SEED", conflicts_with = "cpus")]
    shuffle: Option<u64>,

    /// Give up after this many seconds
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,

    /// Directory with the guests' kernel (vmlinux, bzImage or vmlinuz) and its modules
    /// [default: /lib/matryoshka/guest]
    #[arg(long, value_name = "DIR")]
    guest: Option<PathBuf>,

    /// More words for the guest kernels' command lines
    #[arg(long, default_value = "", value_name = "WORDS")]
    append: String,

    /// Slow the clocks of the guests' kernels by this factor, or as far as they bear, so that their timer ticks come
    /// less often [default: 1, in stacks of five levels and more 9]
    #[arg(long, value_name = "FACTOR", value_parser = clap::value_parser!(u32).range(1..))]
    slow_ticks: Option<u32>,

    /// Put a file of this host into an innermost Linux
    #[arg(long, value_name = "SRC=DST", value_parser = parse_file, requires = "linux")]
    file: Vec<(PathBuf, String)>,

    /// Print the innermost level's lines without their level, and nobody else's
    #[arg(long)]
    plain: bool,

    /// Each level reports the exits of its guest; twice, and guest kernels say everything
    #[arg(long, short, action = clap::ArgAction::Count)]
    verbose: u8,
}

fn parse_file(s: &str) -> Result<(PathBuf, String), String> {
    match s.split_once('=') {
        Some((src, dst)) if !src.is_empty() && dst.starts_with('/') => Ok((src.into(), dst.into())),
        _ => Err("SRC=DST with DST an absolute path".into()),
    }
}

/// Where the busybox for an innermost Linux comes from.
const BUSYBOX: [&str; 3] = [
    "/bin/busybox",
    "/usr/bin/busybox",
    "/lib/matryoshka/busybox",
];

impl NestArgs {
    fn spec(&self) -> Spec {
        let inner = if self.linux {
            Inner::Linux {
                command: self.command.clone(),
            }
        } else {
            Inner::Payload {
                args: self.args.clone(),
            }
        };
        Spec {
            cpus: self.cpus,
            touch_pages: self.touch_pages,
            memory_mib: self.memory,
            verbose: self.verbose,
            append: self.append.clone(),
            slow_ticks: vmm::clock::factor(self.slow_ticks, self.depth),
            config: self.config.first().map(|&first| first as u8),
            knobs: self.knobs.clone(),
            ..Spec::new(self.depth, inner)
        }
    }

    fn files(&self) -> Files {
        Files::chosen(self.guest.as_deref(), self.payload.as_deref())
    }

    /// The additional files of an innermost Linux: a shell above all.
    fn extra(&self) -> Result<Vec<(PathBuf, String)>, Error> {
        if !self.linux {
            return Ok(Vec::new());
        }
        let mut extra = self.file.clone();
        match BUSYBOX.iter().find(|p| Path::new(p).is_file()) {
            Some(p) => extra.push((p.into(), "/bin/busybox".into())),
            None if self.command.is_empty() => {
                return Err(Error::Stack(
                    "a shell in a guest needs a static busybox: install busybox-static".into(),
                ))
            }
            None => {}
        }
        Ok(extra)
    }
}

/// What L0 does for a stack that only runs.
pub struct Host {
    rounds: std::vec::IntoIter<u32>,
    /// Whether the user named configurations; otherwise the module stays as it is.
    set: bool,
    depth: u32,
    plain: bool,
    verbose: bool,
}

/// What of it goes into a file with the stack.
#[derive(Default, Serialize, Deserialize)]
struct SavedHost {
    rounds: Vec<u32>,
    set: bool,
    plain: bool,
    verbose: bool,
}

impl Host {
    /// As it was saved; `plain` in addition to what it was then.
    pub fn restored(saved: &serde_json::Value, depth: u32, plain: bool) -> vmm::Result<Host> {
        let saved = SavedHost::deserialize(saved)
            .map_err(|e| Error::Stack(format!("what the tool saved of itself is unusable: {e}")))?;
        Ok(Host {
            rounds: saved.rounds.into_iter(),
            set: saved.set,
            depth,
            plain: saved.plain || plain,
            verbose: saved.verbose,
        })
    }
}

impl Handler for Host {
    fn save(&mut self) -> serde_json::Value {
        let saved = SavedHost {
            rounds: self.rounds.as_slice().to_vec(),
            set: self.set,
            plain: self.plain,
            verbose: self.verbose,
        };
        serde_json::to_value(saved).unwrap_or_default()
    }

    fn next_command(&mut self) -> u32 {
        self.rounds.next().unwrap_or(Command::End.encode())
    }

    fn apply(&mut self, round: Config, level: u32, file: &Path) -> vmm::Result<()> {
        if self.set {
            vmm::module::apply(round, level, file)?;
        }
        Ok(())
    }

    fn console_line(&mut self, level: u32, line: &str) {
        if let Line::Boot(boot) = Line::parse(line) {
            // The only sign of progress while a deep stack starts.
            if !self.plain {
                eprintln!(
                    "matryoshka: L{level}'s Linux is up{}",
                    boot_cost(boot, self.verbose)
                );
            }
            return;
        }
        if !self.plain {
            println!("L{level}| {line}");
        } else if level == self.depth {
            println!("{line}");
        }
    }

    fn raw(&mut self, bytes: &[u8]) {
        let mut out = std::io::stdout();
        // Nowhere to complain to when the terminal is gone.
        let _ = out.write_all(bytes).and_then(|()| out.flush());
    }
}

/// What boot figures say to a human: nothing, or ticks and exits into L0.
fn boot_cost(boot: Boot, verbose: bool) -> String {
    let ticks = boot.ticks;
    match (verbose, boot.exits) {
        (false, _) => String::new(),
        (true, None) => format!(" after {ticks} ticks"),
        (true, Some(exits)) => format!(" after {ticks} ticks and {exits} exits into L0"),
    }
}

/// Runs the subcommand.
pub fn run(args: NestArgs) -> ExitCode {
    let spec = args.spec();
    let started = Instant::now();
    let outcome = start(&args, &spec);
    match outcome {
        Err(e) => {
            complain(&e);
            Code::from(&e).into()
        }
        Ok(o) => {
            if args.verbose > 0 {
                eprintln!(
                    "matryoshka: L1 ended after {:.1} s; {}",
                    started.elapsed().as_secs_f64(),
                    init_stats(&o)
                );
            }
            ended(o.exit)
        }
    }
}

/// The exit status that stands for how a stack ended.
pub fn ended(exit: Exit) -> ExitCode {
    match exit {
        Exit::Done(0) => Code::Ok.into(),
        Exit::Saved => {
            eprintln!("matryoshka: the stack was saved");
            Code::Ok.into()
        }
        Exit::Done(status) => ExitCode::from(u8::try_from(status).unwrap_or(1)),
        bad => {
            complain(format!("L1 {bad}"));
            Code::Guest.into()
        }
    }
}

fn init_stats(o: &stack::Outcome) -> String {
    crate::init::stats_line(&o.stats)
}

fn start(args: &NestArgs, spec: &Spec) -> vmm::Result<stack::Outcome> {
    let (sources, places) = args.extra()?.into_iter().unzip();
    let files = args.files().with_extra(sources);
    files.check()?;
    nested_on(spec.depth)?;
    let spec = &Spec {
        extra: places,
        exit_counter: vmm::backdoor::present(),
        ..spec.clone()
    };
    if spec.slow_ticks > 1 && !args.plain {
        eprintln!(
            "matryoshka: the guests' clocks are slowed by up to {} (--slow-ticks 1 leaves them)",
            spec.slow_ticks
        );
    }
    let set = !args.config.is_empty();
    let rounds: Vec<u32> = if set {
        args.config.clone()
    } else {
        vec![Config::Stock]
    }
    .into_iter()
    .enumerate()
    .map(|(i, config)| {
        let round = i as u16;
        match args.args.starts_with("tests=") {
            true => Command::Test { config, round },
            false => Command::Run { config, round },
        }
        .encode()
    })
    .collect();
    let mut host = Host {
        rounds: rounds.into_iter(),
        set,
        depth: spec.depth,
        plain: args.plain,
        verbose: args.verbose > 0,
    };
    let stdin = std::io::stdin();
    let raw = if spec.interactive() {
        Raw::new(stdin.as_raw_fd())
    } else {
        None
    };
    let local = Local {
        terminal: spec.interactive().then(|| stdin.as_raw_fd()),
        limit: args.timeout.map(Duration::from_secs),
        door: transport::door(),
        shuffle: args.shuffle,
        ..Local::default()
    };
    let outcome = stack::run(spec, &files, local, &mut host);
    drop(raw);
    if let (Some(_), Ok(outcome)) = (args.shuffle, &outcome) {
        eprintln!("{}", outcome.shuffles);
    }
    outcome
}

/// Depth 2 and more, and payloads that are hypervisors themselves, need nested VMX.
fn nested_on(depth: u32) -> vmm::Result<()> {
    let nested = std::fs::read_to_string("/sys/module/kvm_intel/parameters/nested");
    match nested.as_deref().map(str::trim) {
        Ok("Y" | "1") | Err(_) => Ok(()),
        Ok(_) if depth < 2 => Ok(()),
        Ok(_) => Err(Error::Stack(
            "nested VMX is off on this host: reload KVM with it\n  modprobe -r kvm_intel && modprobe kvm_intel \
             nested=1"
                .into(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        nest: NestArgs,
    }

    fn parse(words: &[&str]) -> Result<NestArgs, String> {
        Cli::try_parse_from(std::iter::once(&"nest").chain(words))
            .map(|c| c.nest)
            .map_err(|e| e.to_string())
    }

    #[test]
    fn arguments_become_a_spec() {
        let a = parse(&["--depth", "3", "--config", "stock,l0", "--cpus", "2"]).unwrap();
        assert_eq!(a.config, [Config::Stock, Config::L0]);
        let s = a.spec();
        assert_eq!((s.depth, s.cpus, s.level), (3, 2, 0));
        let a = parse(&["--linux", "--", "uname", "-a"]).unwrap();
        assert_eq!(
            a.spec().inner,
            Inner::Linux {
                command: vec!["uname".into(), "-a".into()]
            }
        );
        assert!(parse(&["--linux"]).unwrap().spec().interactive());
    }

    #[test]
    fn boot_figures_are_readable() {
        let boot = |exits| Boot {
            depth: 1,
            ticks: 12,
            exits,
        };
        assert_eq!(
            boot_cost(boot(Some(3)), true),
            " after 12 ticks and 3 exits into L0"
        );
        assert_eq!(boot_cost(boot(None), true), " after 12 ticks");
        assert_eq!(boot_cost(boot(Some(3)), false), "");
    }

    #[test]
    fn wrong_arguments_are_refused() {
        for words in [
            &["--depth", "0"][..],
            &["--depth", "99"],
            &["--config", "sotck"],
            &["--", "uname"],
            &["--linux", "--payload", "x"],
            &["--linux", "--file", "a=b"],
            &["--linux", "--memory", "0"],
            &["--linux", "--memory", "18446744073709551615"],
        ] {
            assert!(parse(words).is_err(), "{words:?}");
        }
        assert!(parse(&["--config", "sotck"])
            .unwrap_err()
            .contains("stock, idle, l0, all, check"));
    }
}
