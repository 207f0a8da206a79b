// SPDX-License-Identifier: GPL-2.0-or-later
//! A stack of machines: what runs at which level, and how the same files nest
//! themselves.
//!
//! Level 0 is the host. Levels 1 to depth-1 are Linux guests whose init is the same
//! tool; each runs the VMM for the next. The innermost level, depth, is a payload
//! or a last Linux. What to do travels in a file in each level's initramfs, so
//! that every level gets exactly the same words.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kvm_ioctls::Kvm;
use protocol::{Boot, Command, Config as Round, PayloadInfo};
use serde::{Deserialize, Serialize};

use crate::console::untag;
use crate::cpio::Archive;
use crate::device::{Host, Source};
use crate::door::Door;
use crate::files::{Files, DIR};
use crate::machine::{self, Exit, Machine};
use crate::memory::{Memory, PAGE};
use crate::module::Knob;
use crate::payload::PAYLOAD_MIB;
use crate::{backdoor, boot, clock, module, mptable, payload, shuffle, Error, Result};

/// The most levels. Each one costs sixteen times the one before, so nobody gets
/// near it; it keeps a slip of the finger from filling memory.
pub const MAX_DEPTH: u32 = 9;
/// Where a guest finds its [`Spec`].
pub const SPEC_FILE: &str = "/lib/matryoshka/stack.json";
/// Pages of the touch region by default: 64 MiB.
pub const TOUCH_PAGES: u32 = 16384;
/// Memory of an innermost Linux by default, in MiB.
const LINUX_MIB: u64 = 192;
/// What a trimmed Linux level needs for itself, in MiB.
const LEVEL_MIB: u64 = 96;

/// What runs at the innermost level.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Inner {
    /// The bare-metal payload with these arguments ([`PayloadInfo::args`]).
    Payload {
        /// Words `key=value`.
        args: String,
    },
    /// Linux; it runs a command, or an interactive shell if there is none.
    Linux {
        /// Program and arguments.
        command: Vec<String>,
    },
    /// Linux that ends as soon as its init runs, for measuring how it boots.
    Boot,
}

/// What to do, as every level is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// The level of the VMM that reads this; 0 is the host.
    pub level: u32,
    /// The innermost level, 1 to [`MAX_DEPTH`].
    pub depth: u32,
    /// What runs there.
    pub inner: Inner,
    /// vCPUs of each Linux level.
    pub cpus: u8,
    /// Pages in a payload's touch region.
    pub touch_pages: u32,
    /// Memory of the innermost Linux in MiB, if not the default.
    pub memory_mib: Option<u64>,
    /// 1: each level reports the exits of its guest; 2: guest kernels say everything
    /// on their consoles too, which costs many more.
    pub verbose: u8,
    /// More words for the guest kernels' command lines.
    pub append: String,
    /// By how much their clocks are slower, see [`clock`].
    #[serde(default)]
    pub slow_ticks: u32,
    /// The emulator's exit counter is there ([`backdoor::present`] on L0).
    pub exit_counter: bool,
    /// Where in an innermost Linux the additional files go ([`Files::extra`]).
    pub extra: Vec<String>,
    /// How every level sets its module before it starts its machine: the number of a
    /// [`Config`](protocol::Config). Without it modules are set when a command says so, and the stack boots on stock KVM, which
    /// takes long if it is deep.
    #[serde(default)]
    pub config: Option<u8>,
    /// Knobs of the module, set at every level that has it loaded, whenever its modes are.
    #[serde(default)]
    pub knobs: Vec<Knob>,
}

impl Spec {
    /// A stack of `depth` levels around `inner`, everything else by default.
    pub fn new(depth: u32, inner: Inner) -> Spec {
        Spec {
            level: 0,
            depth,
            inner,
            cpus: 1,
            touch_pages: TOUCH_PAGES,
            memory_mib: None,
            verbose: 0,
            append: String::new(),
            slow_ticks: clock::factor(None, depth),
            exit_counter: false,
            extra: Vec::new(),
            config: None,
            knobs: Vec::new(),
        }
    }

    /// The host knows how fast the TSC is, and puts into the command lines of all levels what makes their clocks slow.
    fn with_clock(&self, kvm: &Kvm) -> Result<Spec> {
        let mut spec = self.clone();
        if self.level == 0 && self.runs_linux() {
            if let Some(words) = clock::slowed(kvm, self.slow_ticks)? {
                spec.append = format!("{} {words}", spec.append).trim().to_owned();
            }
        }
        Ok(spec)
    }

    /// Whether the machine this level runs is a Linux.
    fn runs_linux(&self) -> bool {
        self.level + 1 < self.depth || !matches!(self.inner, Inner::Payload { .. })
    }

    /// vCPUs of the machine this level runs. A payload has as many as its arguments say (`cpus=`).
    fn cpus_inside(&self) -> u8 {
        match &self.inner {
            _ if self.runs_linux() => self.cpus,
            Inner::Payload { args } => args
                .split([' ', ';'])
                .find_map(|word| word.strip_prefix("cpus=")?.parse().ok())
                .unwrap_or(1),
            _ => 1,
        }
    }

    /// Whether the innermost level is a shell at a terminal.
    pub fn interactive(&self) -> bool {
        matches!(&self.inner, Inner::Linux { command } if command.is_empty())
    }

    /// Whether the guest that this is for has a device that interrupts: a terminal on
    /// COM1, or whatever somebody may do with a Linux of their own.
    fn wants_interrupts(&self) -> bool {
        self.interactive() || self.level == self.depth && self.inner != Inner::Boot
    }

    fn check(&self) -> Result<()> {
        if self.depth == 0 || self.depth > MAX_DEPTH {
            return Err(Error::Stack(format!(
                "depth {}; 1 to {MAX_DEPTH} are possible",
                self.depth
            )));
        }
        if self.level >= self.depth {
            return Err(Error::Stack(format!(
                "level {} of a stack of {}",
                self.level, self.depth
            )));
        }
        Ok(())
    }
}

/// What a stack needs from whoever runs a level of it. On L0 that is `nest` or
/// `bench`; in between it is the tool as init, which asks its own parent.
pub trait Handler: Send {
    /// The next command word for the payload ([`Command::encode`]).
    fn next_command(&mut self) -> u32 {
        Command::End.encode()
    }

    /// Sets this level's module for a round. The default does, from `file`.
    fn apply(&mut self, round: Round, level: u32, file: &Path) -> Result<()> {
        module::apply(round, level, file)
    }

    /// A line of console text that came from `level`.
    fn console_line(&mut self, level: u32, line: &str);

    /// Raw bytes of an interactive console.
    fn raw(&mut self, _bytes: &[u8]) {}

    /// What the handler needs to go on with the stack in another process.
    fn save(&mut self) -> serde_json::Value {
        serde_json::Value::Null
    }
}

/// How a level's machine ended.
#[derive(Debug)]
pub struct Outcome {
    /// The end of the machine that this level ran.
    pub exit: Exit,
    /// KVM's statistics of it.
    pub stats: BTreeMap<String, u64>,
    /// How often it was replaced by a new one.
    pub shuffles: shuffle::Counts,
    /// How often a vCPU of it was moved to another processor.
    pub moves: u64,
    /// How often the spare memory slot of this level's machine changed.
    pub churns: u64,
    /// Pages that this level handed out through userfaultfd.
    pub given: u64,
}

/// Options that are this level's alone.
#[derive(Debug, Clone, Default)]
pub struct Local {
    /// The terminal of an interactive stack.
    pub terminal: Option<RawFd>,
    /// Give up after this time.
    pub limit: Option<Duration>,
    /// Save and restore this level's machine at points that this seed decides ([`shuffle`]).
    pub shuffle: Option<u64>,
    /// Into the same one, after a reset.
    pub reset: bool,
    /// Move this level's vCPUs across its processors all the time.
    pub roam: bool,
    /// Change memory slots and the host's page tables beside the guest all the time.
    pub churn: bool,
    /// Hand out the pages of the touch region through userfaultfd.
    pub missing: bool,
    /// Where another process may ask for the stack to be saved.
    pub door: Option<Arc<Door>>,
}

impl Local {
    /// What it says of a machine; the rest is by default.
    fn config(&self) -> machine::Config {
        machine::Config {
            limit: self.limit,
            shuffle: self.shuffle,
            reset: self.reset,
            roam: self.roam,
            churn: self.churn,
            missing: self.missing,
            door: self.door.clone(),
            ..machine::Config::default()
        }
    }
}

/// A stack as it goes into a file, beside its machine.
#[derive(Serialize, Deserialize)]
struct Saved {
    spec: Spec,
    handler: serde_json::Value,
}

/// Runs the machine of `spec.level`+1, with everything inside it, to its end.
///
/// # Errors
/// [`Error::Usage`] for what the user has to mend in what they asked for, any other for this level.
pub fn run(spec: &Spec, files: &Files, local: Local, handler: &mut dyn Handler) -> Result<Outcome> {
    spec.check()?;
    if let Some(config) = spec.config.and_then(Round::from_u8) {
        handler.apply(config, spec.level, &files.module_here())?;
        module::tune(&spec.knobs)?;
    }
    let kvm = Machine::open_kvm()?;
    let spec = &spec.with_clock(&kvm)?;
    let config = machine::Config {
        cpus: spec.cpus_inside(),
        all_begin: !spec.runs_linux(),
        missing: local.missing && !spec.runs_linux(),
        pit: spec.runs_linux(),
        terminal: if spec.runs_linux() {
            local.terminal
        } else {
            None
        },
        // In the levels between the escape is just two more characters.
        escape: spec.level == 0,
        ..local.config()
    };
    let (mem, entry) = if spec.runs_linux() {
        let next = Spec {
            level: spec.level + 1,
            ..spec.clone()
        };
        let initramfs = initramfs(&next, files).map_err(|e| files.blame(e))?;
        let mem = Memory::new(memory_mib(&next, files), 0)?;
        let mptable = mptable::build(spec.cpus, next.wants_interrupts());
        let entry = boot::load_linux(&mem, files.kernel()?, &initramfs, &cmdline(&next), &mptable)
            .map_err(|e| files.blame(e))?;
        (mem, entry)
    } else {
        let Inner::Payload { args } = &spec.inner else {
            return Err(Error::Stack("no payload to run".into()));
        };
        let mem = Memory::new(PAYLOAD_MIB, spec.touch_pages)?;
        let info = PayloadInfo::new(spec.level + 1, PAYLOAD_MIB << 20, spec.touch_pages, args)
            .ok_or_else(|| Error::Usage(format!("payload arguments of {} bytes", args.len())))?;
        let entry = payload::load_payload(&mem, files.payload()?, info.as_bytes())
            .map_err(|e| files.blame(e))?;
        (mem, entry)
    };
    let machine = Machine::new(&kvm, config, mem, &entry)?;
    go(machine, spec, files.module_here(), handler)
}

/// A stack that was read from a file.
pub struct Stopped {
    machine: Machine,
    /// What it is.
    pub spec: Spec,
    /// What the handler had to say ([`Handler::save`]).
    pub handler: serde_json::Value,
}

/// Reads the stack that was saved in `file`. `progress` gets bytes done and in all.
pub fn read(file: &Path, local: &Local, progress: impl FnMut(u64, u64)) -> Result<Stopped> {
    let kvm = Machine::open_kvm()?;
    let config = machine::Config {
        escape: true,
        ..local.config()
    };
    let (machine, owner) = Machine::restore(&kvm, config, file, progress)?;
    let saved: Saved = serde_json::from_value(owner).map_err(|e| Error::Image {
        path: file.to_owned(),
        what: format!("is no stack of this version: {e}"),
    })?;
    saved.spec.check()?;
    Ok(Stopped {
        machine,
        spec: saved.spec,
        handler: saved.handler,
    })
}

impl Stopped {
    /// Runs it from where it was to its end; `terminal` is that of an interactive stack.
    pub fn go_on(
        mut self,
        files: &Files,
        terminal: Option<RawFd>,
        handler: &mut dyn Handler,
    ) -> Result<Outcome> {
        self.machine.set_terminal(terminal);
        go(self.machine, &self.spec, files.module_here(), handler)
    }
}

fn go(
    machine: Machine,
    spec: &Spec,
    module: PathBuf,
    handler: &mut dyn Handler,
) -> Result<Outcome> {
    let mut level = Level {
        spec,
        module,
        handler,
        failed: None,
        started: (0, 0),
    };
    let report = machine.run(&mut level)?;
    match level.failed {
        Some(e) => Err(e),
        None => Ok(Outcome {
            exit: report.exit,
            stats: report.stats,
            shuffles: report.shuffles,
            moves: report.moves,
            churns: report.churns,
            given: report.given,
        }),
    }
}

/// Stands between a machine and the handler of its level.
struct Level<'a> {
    spec: &'a Spec,
    module: PathBuf,
    handler: &'a mut dyn Handler,
    failed: Option<Error>,
    /// Ticks and exits at the guest's first instruction.
    started: (u64, u64),
}

impl Level<'_> {
    /// Ticks of this level's TSC and exits into L0 (0 where nobody counts them).
    fn now(&self) -> (u64, u64) {
        let exits = if self.spec.exit_counter {
            // SAFETY: L0 has asked whether the counter is there, and it is.
            unsafe { backdoor::exits() }
        } else {
            0
        };
        (backdoor::ticks(), exits)
    }
}

impl Host for Level<'_> {
    fn started(&mut self) {
        self.started = self.now();
    }

    fn up(&mut self) {
        let ((ticks, exits), (from, exits_from)) = (self.now(), self.started);
        let level = self.spec.level + 1;
        let boot = Boot {
            depth: level,
            ticks: ticks - from,
            exits: self.spec.exit_counter.then(|| exits - exits_from),
        };
        self.handler.console_line(level, &boot.to_string());
    }

    fn line(&mut self, source: Source, line: &str) {
        let own = self.spec.level + 1;
        // The tool in a Linux guest says itself which level a line is from.
        match (source, self.spec.runs_linux(), untag(line)) {
            (Source::Control, true, Some((level, text))) => self.handler.console_line(level, text),
            _ => self.handler.console_line(own, line),
        }
    }

    fn raw(&mut self, bytes: &[u8]) {
        self.handler.raw(bytes);
    }

    fn save(&mut self) -> serde_json::Value {
        let saved = Saved {
            spec: self.spec.clone(),
            handler: self.handler.save(),
        };
        serde_json::to_value(saved).unwrap_or_default()
    }

    fn command(&mut self) -> u32 {
        let word = self.handler.next_command();
        let Some(round) = Command::decode(word).ok().and_then(Command::config) else {
            return word;
        };
        let applied = self.handler.apply(round, self.spec.level, &self.module);
        match applied.and_then(|()| module::tune(&self.spec.knobs)) {
            Ok(()) => word,
            Err(e) => {
                // A round in the wrong configuration is worse than none.
                self.failed = Some(e);
                Command::End.encode()
            }
        }
    }
}

/// The kernel command line of the guest that `next` is for.
pub fn cmdline(next: &Spec) -> String {
    let mut words = vec![
        // Each character on the console is an exit or three. `quiet` comes first, as a
        // console prints what was allowed by the time it appeared.
        match (next.interactive(), next.verbose) {
            (true, _) => "quiet console=ttyS0",
            (false, 2..) => "earlyprintk=serial,0x3f8,115200,keep",
            (false, _) => "quiet earlyprintk=serial,0x3f8,115200,keep",
        }
        .to_owned(),
        // A panic ends the machine at once, by the port that needs no waiting.
        "panic=-1 reboot=p".into(),
        // The VMM says how fast the TSC is, and it does not drift here.
        "tsc=reliable no_timer_check clocksource=tsc nowatchdog".into(),
        "nokaslr audit=0 cryptomgr.notests".into(),
        // The early console drives COM1 by itself; probing it costs a hundred exits.
        format!("8250.nr_uarts={}", u8::from(next.wants_interrupts())),
        "i8042.noaux i8042.nokbd random.trust_cpu=on rcupdate.rcu_expedited=1".into(),
        format!("mtk.level={} mtk.depth={}", next.level, next.depth),
    ];
    if !next.append.is_empty() {
        words.push(next.append.clone());
    }
    words.join(" ")
}

/// Makes the initramfs of the guest that `next` is for.
fn initramfs(next: &Spec, files: &Files) -> Result<Vec<u8>> {
    let mut a = Archive::new();
    for d in ["proc", "sys", "dev", "tmp", "bin"] {
        a.dir(d);
    }
    // Without a terminal there is no console to open, which the kernel complains about
    // on the early console, an exit for each letter.
    match next.wants_interrupts() {
        true => a.device("dev/console", 5, 1),
        false => a.file("dev/console", 0o600, b""),
    }
    a.device("dev/null", 1, 3);
    a.copy("init", files.tool())?;
    a.link("bin/matryoshka", "/init");
    let spec = serde_json::to_vec(next).map_err(|e| Error::Stack(format!("stack file: {e}")))?;
    a.file(SPEC_FILE, 0o644, &spec);
    let innermost = next.level == next.depth;
    let more = !innermost && next.runs_linux();
    for (name, src) in files.for_guest(more, innermost, &next.inner)? {
        a.copy(&name, &src)?;
    }
    for (i, (src, dst)) in files.extra.iter().zip(&next.extra).enumerate() {
        match innermost {
            true => a.copy(dst, src)?,
            false => a.copy(&format!("{DIR}/extra/{i}"), src)?,
        }
    }
    Ok(a.finish())
}

/// Memory in MiB of the guest that `next` is for: what it needs itself, its
/// initramfs twice (packed and unpacked), and everything inside it.
fn memory_mib(next: &Spec, files: &Files) -> u64 {
    if next.level == next.depth {
        return match next.inner {
            Inner::Payload { .. } => {
                PAYLOAD_MIB + ((u64::from(next.touch_pages) * PAGE as u64) >> 20)
            }
            Inner::Linux { .. } | Inner::Boot => next.memory_mib.unwrap_or(LINUX_MIB),
        };
    }
    let inside = memory_mib(
        &Spec {
            level: next.level + 1,
            ..next.clone()
        },
        files,
    );
    let files = files.total_mib();
    (LEVEL_MIB + 2 * files + inside).next_multiple_of(32)
}

/// Reads the [`Spec`] that this guest was given.
pub fn read_spec(path: &Path) -> Result<Spec> {
    let f = File::open(path).map_err(Error::file(path))?;
    serde_json::from_reader(f).map_err(|e| Error::Image {
        path: path.to_owned(),
        what: format!("is no stack file: {e}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(level: u32, depth: u32) -> Spec {
        Spec {
            level,
            ..Spec::new(
                depth,
                Inner::Payload {
                    args: "ops=cpuid:60 tests=all".into(),
                },
            )
        }
    }

    #[derive(Default)]
    struct Record {
        lines: Vec<(u32, String)>,
        word: u32,
        fail: bool,
        applied: Vec<(Round, u32)>,
    }

    impl Handler for Record {
        fn next_command(&mut self) -> u32 {
            self.word
        }
        fn apply(&mut self, round: Round, level: u32, _: &Path) -> Result<()> {
            self.applied.push((round, level));
            if self.fail {
                return Err(Error::Module("no".into()));
            }
            Ok(())
        }
        fn console_line(&mut self, level: u32, line: &str) {
            self.lines.push((level, line.into()));
        }
    }

    #[test]
    fn the_spec_survives_the_initramfs() {
        let s = spec(1, 3);
        let json = serde_json::to_vec(&s).unwrap();
        assert_eq!(serde_json::from_slice::<Spec>(&json).unwrap(), s);
    }

    #[test]
    fn lines_carry_their_level() {
        let mut r = Record::default();
        for (s, source, line) in [
            (spec(0, 3), Source::Control, "L3| hello"),
            (spec(0, 3), Source::Serial, "L3| boot"),
            (spec(2, 3), Source::Control, "L9| payload text"),
        ] {
            Level {
                spec: &s,
                module: PathBuf::new(),
                handler: &mut r,
                failed: None,
                started: (0, 0),
            }
            .line(source, line);
        }
        let want = [(3, "hello"), (1, "L3| boot"), (3, "L9| payload text")];
        assert_eq!(r.lines, want.map(|(l, t)| (l, t.to_owned())));
    }

    #[test]
    fn a_round_that_cannot_be_set_is_not_run() {
        let word = Command::Run {
            config: Round::All,
            round: 4,
        }
        .encode();
        let s = spec(1, 3);
        let mut r = Record {
            word,
            ..Default::default()
        };
        assert_eq!(
            Level {
                spec: &s,
                module: PathBuf::new(),
                handler: &mut r,
                failed: None,
                started: (0, 0),
            }
            .command(),
            word
        );
        assert_eq!(r.applied, [(Round::All, 1)]);
        r.fail = true;
        let mut l = Level {
            spec: &s,
            module: PathBuf::new(),
            handler: &mut r,
            failed: None,
            started: (0, 0),
        };
        assert_eq!(l.command(), 0);
        assert!(l.failed.is_some());
    }

    #[test]
    fn depth_is_checked() {
        assert!(spec(0, 0).check().is_err());
        assert!(spec(0, MAX_DEPTH + 1).check().is_err());
        assert!(spec(3, 3).check().is_err());
        assert!(spec(2, 3).check().is_ok());
    }

    #[test]
    fn command_line_fits_and_names_the_level() {
        let c = cmdline(&spec(2, 3));
        assert!(c.len() < boot::CMDLINE_MAX);
        assert!(c.contains("mtk.level=2 mtk.depth=3"));
        assert!(!c.contains("console=ttyS0"));
        let shell = Spec::new(2, Inner::Linux { command: vec![] });
        assert!(cmdline(&shell).contains("console=ttyS0"));
    }
}
