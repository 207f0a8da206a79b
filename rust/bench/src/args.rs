// SPDX-License-Identifier: GPL-2.0-or-later
//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use protocol::{Config, Op, Pattern};
use vmm::files::Files;
use vmm::stack::{Inner, Local, Spec, MAX_DEPTH, TOUCH_PAGES};

use crate::plan::Amount;

/// What the configurations are, and what they do to this host.
pub const CONFIGURATIONS: &str =
    "Configurations: stock (module not loaded), idle (loaded, every path off), l0 (every path on in
L0), all (on at every level), check (every path in L0 compares itself with the stock code). They
load, unload and set this host's module, which serves all its guests; modes and knobs are not put
back afterwards. Needs root.";

const EXAMPLES: &str = "Examples:
  matryoshka bench                                    depths 1 to 3, stock against the module
  matryoshka bench --depth 2 --ops hypercall,cpuid    two operations executed by L2
  matryoshka bench --depth 2 --ops touch_warm,touch_cold --config stock,l0
                                                      first touches, in every order
  matryoshka bench --depth 2,3 --ops boot --config stock,l0,all
                                                      a Linux guest from its first instruction to init
  matryoshka bench --depth 2 --ops touch_cold --config stock,all --set direct/populate=16
                                                      ... with a knob set at every level
  matryoshka bench --record counts.json               keep the counts ...
  matryoshka bench --compare counts.json              ... and fail if they are others later
  matryoshka bench --test --depth 1 --log out         the payload's correctness tests instead

Depth is the level that executes an operation. Counts are retired instructions of all levels
together on the laboratory's emulator, and cycles on a real machine.";

/// What an operation is, in a line of help.
const fn about(op: Op) -> &'static str {
    match op {
        Op::Hypercall => "VMCALL of the payload's child; HOST_RSP and HOST_RIP written each time",
        Op::HypercallLean => "the same, but only GUEST_RIP is read and written",
        Op::HypercallEpt => "the lean one with EPT, VPID and unrestricted guest, as KVM has it",
        Op::KvmHypercall => "VMCALL to the payload's parent, which answers in its kernel",
        Op::Cpuid => "CPUID, answered by the parent's kernel",
        Op::Pio => "OUT to a port that the parent's VMM handles in user space",
        Op::VmreadShadowed => "VMREAD of GUEST_RIP, which stock KVM shadows",
        Op::VmreadUnshadowed => "VMREAD of GUEST_ES_SELECTOR, which it does not",
        Op::VmwriteUnshadowed => "VMWRITE of GUEST_ES_SELECTOR",
        Op::VmptrldSame => "VMPTRLD of the VMCS that is current already",
        Op::VmptrldSwitch => "VMPTRLD of the other one of two VMCSs, both launched",
        Op::VmclearVmptrld => "VMCLEAR of the current VMCS and VMPTRLD of it again",
        Op::Phases => "4 phases of 256 lean hypercalls, each with other unshadowed fields",
        Op::PhasesShort => "the same with 32 hypercalls in a phase",
        Op::TouchWarm => "child's first touch of pages that the payload's EPT maps, L0 has backed",
        Op::TouchLarge => "the same with pages of 2 MiB in the payload's EPT, and small ones in L0",
        Op::TouchReflected => {
            "child's first touch of pages that the payload maps on each EPT violation"
        }
        Op::TouchUnmapped => "payload's first touch of pages that its VMM has populated",
        Op::TouchCold => "payload's first touch of pages that its VMM has not backed",
        Op::Boot => "a Linux guest from its first instruction to its init",
    }
}

fn help() -> String {
    let mut help = format!("{EXAMPLES}\n\n{CONFIGURATIONS}\n\nOperations:");
    for op in Op::EVERY {
        help += &format!("\n  {:18}  {}", op.name(), about(op));
    }
    help
}

/// Which random programs are run if nobody says.
const SEED: u64 = 1;
/// How many.
const PROGRAMS: u64 = 1000;
/// From which one on.
const FIRST: u64 = 0;

/// Measure operations of nested guests, with and without the module
#[derive(Args, Clone, Debug)]
#[command(after_help = help())]
pub struct BenchArgs {
    /// Levels that execute the operations
    #[arg(long, visible_alias = "depths", value_delimiter = ',', default_value = "1,2,3",
        value_parser = clap::value_parser!(u32).range(1..=MAX_DEPTH as i64), value_name = "DEPTH,...")]
    pub depth: Vec<u32>,

    /// Configurations of the module, in the order to measure them
    #[arg(long, visible_alias = "configs", value_delimiter = ',', default_value = "stock,idle,l0",
        value_parser = parse_config, value_name = "CONFIG,...")]
    pub config: Vec<Config>,

    /// Operations of the list below, or `every`
    #[arg(long, value_delimiter = ',', value_parser = parse_ops, value_name = "OP,...",
        default_value = "hypercall,cpuid,vmread_unshadowed,vmptrld_switch,touch_cold")]
    pub ops: Vec<Ops>,

    /// Orders in which touch operations visit their pages: sequential, random, strided, and sparse
    /// (every 8th page of a region as much larger)
    #[arg(long, value_delimiter = ',', default_value = "sequential,random,strided",
        value_parser = parse_pattern, value_name = "PATTERN,...")]
    pub pattern: Vec<Pattern>,

    /// Pages that a touch operation visits in each pass [default: 2048, at depths where that takes long fewer]
    #[arg(long, value_name = "PAGES", value_parser = clap::value_parser!(u32).range(8..=TOUCH_PAGES as i64))]
    pub pages: Option<u32>,

    /// Multiply the number of samples (of touch operations: of passes)
    #[arg(long, default_value_t = 1.0, value_parser = parse_scale, value_name = "FACTOR")]
    pub scale: f64,

    /// Boot a stack of its own for each configuration, so that the host's resident memory can be compared: a
    /// guest gives back nothing of what another configuration made it use
    #[arg(long)]
    pub separate: bool,

    /// Write the results here as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,

    /// Write the counts here, to compare with later
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,

    /// Compare with counts recorded before on the same kernel; exit 1 if a row differs by more than the tolerance, if one that
    /// is recorded and asked for was not measured, or if nothing could be compared
    #[arg(long, value_name = "FILE")]
    pub compare: Option<PathBuf>,

    /// Per cent by which a count may differ from the recorded one; with 0 not even by one or two instructions
    #[arg(long, default_value_t = 1.0, value_parser = parse_tolerance, value_name = "PERCENT")]
    pub tolerance: f64,

    /// Run the payload's correctness tests in each configuration instead, at one depth, and compare
    /// their logs with the first configuration's
    #[arg(long, conflicts_with_all = ["record", "compare", "json", "profile", "separate"])]
    pub test: bool,

    /// Groups of tests for --test
    #[arg(
        long,
        requires = "test",
        default_value = "all",
        value_name = "GROUP,..."
    )]
    pub tests: String,

    /// Directory for the logs of --test, one file for each configuration
    #[arg(long, requires = "test", value_name = "DIR")]
    pub log: Option<PathBuf>,

    /// With --test: save L1 and go on in a new VM, again and again at points that this number decides
    #[arg(long, requires = "test", value_name = "SEED")]
    pub shuffle: Option<u64>,

    /// With --shuffle: keep VM and vCPU, but reset the vCPU in between
    #[arg(long, requires = "shuffle")]
    pub reset: bool,

    /// With --test: give the payload a second processor, for the group `pair`
    #[arg(long, requires = "test")]
    pub pair: bool,

    /// With --test: give the payload four processors, for the group `ept_crowd`
    #[arg(long, requires = "test", conflicts_with_all = ["pair", "shuffle"])]
    pub crowd: bool,

    /// With --test: move L1's vCPUs across this host's processors all the time
    #[arg(long, requires = "test")]
    pub roam: bool,

    /// With --test: make, move and delete a memory slot beside L1's memory all the time, and fork
    #[arg(long, requires = "test", conflicts_with = "shuffle")]
    pub churn: bool,

    /// With --test: hand out the pages that the tests are about through userfaultfd (--depth 1)
    #[arg(long, requires = "test")]
    pub userfaultfd: bool,

    /// With --tests fuzz: what the random programs begin with
    #[arg(long, requires = "test", default_value_t = SEED, value_name = "NUMBER")]
    pub seed: u64,

    /// With --tests fuzz: how many programs; above 500 in batches of one size, so that it may be a few more
    #[arg(long, requires = "test", default_value_t = PROGRAMS, value_name = "NUMBER",
        value_parser = clap::value_parser!(u64).range(1..))]
    pub programs: u64,

    /// With --tests fuzz: number of the first program
    #[arg(long, requires = "test", default_value_t = FIRST, value_name = "NUMBER")]
    pub first: u64,

    /// With --tests fuzz: log all that this program sees
    #[arg(long, requires = "test", value_name = "PROGRAM")]
    pub show: Option<u64>,

    /// With --show: leave out the operations whose bits are set
    #[arg(long, requires = "show", default_value = "0", value_parser = parse_mask, value_name = "HEX")]
    pub without: u64,

    /// With --tests fuzz: leave out what a program that differs can do without
    #[arg(long, requires = "test")]
    pub minimize: bool,

    /// With --tests fuzz: run `l0` a second time, with one call in so many sent to the stock code
    #[arg(long, requires = "test", default_value_t = 0, value_name = "EVERY")]
    pub detour: u32,

    /// Do this operation once between the emulator's profile marks, at one depth and in one
    /// configuration (see scripts/profile)
    #[arg(long, value_name = "OP", value_parser = parse_op, conflicts_with_all = ["json", "record", "compare"])]
    pub profile: Option<Op>,

    /// Set a knob of the module wherever a configuration has it loaded; may be given again
    #[arg(long = "set", value_name = "PATH/KNOB=VALUE")]
    pub knobs: Vec<vmm::module::Knob>,

    /// Slow the clocks of the guests' kernels by this factor, or as far as they bear, so that their timer ticks come
    /// less often [default: 1, in stacks of five levels and more 9]
    #[arg(long, value_name = "FACTOR", value_parser = clap::value_parser!(u32).range(1..))]
    pub slow_ticks: Option<u32>,

    /// Bare-metal payload [default: /lib/matryoshka/payload]
    #[arg(long, value_name = "FILE")]
    pub payload: Option<PathBuf>,

    /// Directory with the guests' kernel and its modules [default: /lib/matryoshka/guest]
    #[arg(long, value_name = "DIR")]
    pub guest: Option<PathBuf>,

    /// Give a stack up after this many seconds (of this host's clock)
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,

    /// Also print what the levels' kernels print
    #[arg(long, short)]
    pub verbose: bool,
}

/// One word of --ops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ops {
    /// All there are.
    Every,
    /// This one.
    One(Op),
}

impl BenchArgs {
    /// What an option says although it has nothing to say it of.
    pub fn check(&self) -> Result<(), String> {
        let fuzz = self.test && self.tests == "fuzz";
        let of_fuzz = self.show.is_some() || self.minimize || self.detour > 0;
        let numbers = (self.seed, self.programs, self.first) != (SEED, PROGRAMS, FIRST);
        if !fuzz && (of_fuzz || numbers) {
            let options = "--seed, --programs, --first, --show, --minimize and --detour";
            return Err(format!("{options} are for --tests fuzz alone"));
        }
        if fuzz && (self.pair || self.crowd) {
            return Err("the programs of --tests fuzz run on one processor".into());
        }
        if self.userfaultfd && self.depths() != [1] {
            return Err("--userfaultfd is for the payload of this host's guest: --depth 1".into());
        }
        let most = TOUCH_PAGES / Pattern::SPARSE;
        if self.pattern.contains(&Pattern::Sparse) && self.pages.is_some_and(|pages| pages > most) {
            return Err(format!(
                "the pattern sparse visits one page in {} of {TOUCH_PAGES}: --pages {most} at most",
                Pattern::SPARSE
            ));
        }
        Ok(())
    }

    /// The operations, each once, in the order of a report.
    pub fn operations(&self) -> Vec<Op> {
        let every = self.ops.contains(&Ops::Every);
        Op::EVERY
            .into_iter()
            .filter(|op| every || self.ops.contains(&Ops::One(*op)))
            .collect()
    }

    /// How much of each operation.
    pub fn amount(&self) -> Amount {
        Amount {
            scale: self.scale,
            pages: self.pages,
        }
    }

    /// The depths, each once, upwards.
    pub fn depths(&self) -> Vec<u32> {
        let mut depths = self.depth.clone();
        depths.sort_unstable();
        depths.dedup();
        depths
    }

    /// By how much the clocks of such a stack are slower.
    pub fn slow_ticks(&self, depth: u32) -> u32 {
        vmm::clock::factor(self.slow_ticks, depth)
    }

    /// A stack of `depth` levels around `inner`, with what holds for all stacks.
    pub fn spec(&self, depth: u32, inner: Inner) -> Spec {
        Spec {
            knobs: self.knobs.clone(),
            slow_ticks: self.slow_ticks(depth),
            ..Spec::new(depth, inner)
        }
    }

    /// What a stack is made of.
    pub fn files(&self) -> Files {
        Files::chosen(self.guest.as_deref(), self.payload.as_deref())
    }

    /// L0's options of a stack.
    pub fn local(&self) -> Local {
        Local {
            limit: self.timeout.map(Duration::from_secs),
            shuffle: self.shuffle,
            reset: self.reset,
            roam: self.roam,
            churn: self.churn,
            missing: self.userfaultfd,
            ..Local::default()
        }
    }
}

fn names<'a>(names: impl Iterator<Item = &'a str>) -> String {
    format!("one of {}", names.collect::<Vec<_>>().join(", "))
}

/// Reads the name of a configuration.
pub fn parse_config(text: &str) -> Result<Config, String> {
    Config::from_name(text).ok_or_else(|| names(Config::EVERY.iter().map(|config| config.name())))
}

fn parse_op(text: &str) -> Result<Op, String> {
    Op::from_name(text).ok_or_else(|| names(Op::EVERY.iter().map(|op| op.name())))
}

fn parse_ops(text: &str) -> Result<Ops, String> {
    match text {
        "every" => Ok(Ops::Every),
        _ => parse_op(text).map(Ops::One),
    }
}

fn parse_pattern(text: &str) -> Result<Pattern, String> {
    Pattern::from_name(text)
        .ok_or_else(|| names(Pattern::EVERY.iter().map(|pattern| pattern.name())))
}

fn parse_mask(text: &str) -> Result<u64, String> {
    u64::from_str_radix(text, 16).map_err(|why| why.to_string())
}

fn parse_scale(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number > 0.0 => Ok(number),
        _ => Err("a number above 0".into()),
    }
}

fn parse_tolerance(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number >= 0.0 => Ok(number),
        _ => Err("a number, 0 or above".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        bench: BenchArgs,
    }

    /// Whether both clap and [`BenchArgs::check`] take these words.
    fn good(words: &str) -> bool {
        let words = std::iter::once("bench").chain(words.split_whitespace());
        Cli::try_parse_from(words).is_ok_and(|cli| cli.bench.check().is_ok())
    }

    #[test]
    fn no_option_is_ignored() {
        for words in [
            "",
            "--test --depth 1 --tests exits --userfaultfd",
            "--test --depth 1 --tests fuzz --programs 20 --detour 3 --minimize",
            "--profile cpuid --depth 2 --config l0",
            "--pattern sparse,random --pages 2048",
            "--pages 4096",
            "--compare x --tolerance 0",
        ] {
            assert!(good(words), "{words}");
        }
        for words in [
            "--tests exits",
            "--test --tests exits --programs 20",
            "--test --detour 3",
            "--test --tests fuzz --pair",
            "--test --depth 2 --userfaultfd",
            "--profile cpuid --json x",
            "--profile cpuid --record x",
            "--profile cpuid --compare x",
            "--pattern sparse --pages 4096",
            "--compare x --tolerance -1",
        ] {
            assert!(!good(words), "{words}");
        }
    }

    #[test]
    fn help_has_every_operation_in_a_line() {
        let help = help();
        for op in Op::EVERY {
            let line = format!("\n  {:18}  {}", op.name(), about(op));
            assert!(help.contains(&line) && line.len() <= 100, "{line}");
        }
        assert!(Config::EVERY
            .iter()
            .all(|c| CONFIGURATIONS.contains(c.name())));
    }
}
