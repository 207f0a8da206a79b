// SPDX-License-Identifier: GPL-2.0-or-later
//! `matryoshka bench --test --tests fuzz`: random programs of the payload in each configuration, in batches. A program
//! whose sums differ is run again with its whole log, alone if it differs alone, and made smaller if asked for.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use protocol::{Command, Config, Line};
use vmm::module::{self, Module};
use vmm::stack::{self, Handler, Inner};

use crate::args::BenchArgs;
use crate::session::{ended_well, need_module};
use crate::{Code, Failure};

/// Most programs between two changes of configuration.
const BATCH: u64 = 500;
/// Most operations of a program.
const OPERATIONS: u32 = 28;
/// Differences to collect before giving up.
const MOST: usize = 8;
/// Lines of a log that are shown before the one that differs.
const BEFORE: usize = 12;

/// How the module is while a batch runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Way {
    config: Config,
    /// One call in so many goes to the stock code; 0 for none.
    detour: u32,
}

impl Way {
    fn name(self) -> String {
        match self.detour {
            0 => self.config.name().to_owned(),
            every => format!("{} with a detour in {every}", self.config.name()),
        }
    }
}

/// What the payload is asked to run, see its `fuzz::Request`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Request {
    seed: u64,
    first: u64,
    count: u64,
    show: Option<u64>,
    without: u64,
}

impl Request {
    fn words(&self) -> String {
        let (seed, first, count) = (self.seed, self.first, self.count);
        let mut words = format!("tests=fuzz;fuzz={seed}:{first}:{count}");
        if let Some(show) = self.show {
            words += &format!(":{show}:{:x}", self.without);
        }
        words
    }
}

/// A line that is another one in another way.
struct Difference {
    batch: u16,
    way: Way,
    program: Option<u64>,
    lines: [String; 2],
}

/// Runs batches in every way and keeps the logs of the one at hand.
struct Run<'a> {
    level: u32,
    ways: &'a [Way],
    /// Batches, from the first on.
    batches: u16,
    per_batch: u64,
    seed: u64,
    rounds: VecDeque<(u16, Way)>,
    at: Option<(u16, Way)>,
    logs: BTreeMap<Way, Vec<String>>,
    /// Those of the last batch that was compared.
    last: BTreeMap<Way, Vec<String>>,
    /// Programs whose sums differ.
    differs: Vec<Difference>,
    mismatches: u64,
    /// What a program says cannot be, whatever others say.
    failed: Vec<String>,
    errors: Vec<String>,
    done: u64,
    started: Instant,
    quiet: bool,
    verbose: bool,
}

impl<'a> Run<'a> {
    fn new(args: &BenchArgs, ways: &'a [Way], batches: u16, per_batch: u64, quiet: bool) -> Self {
        let mut rounds = VecDeque::new();
        for batch in 0..batches {
            // Every other batch the other way round: the module is loaded and unloaded half as often.
            let round = |&way| (batch, way);
            match batch % 2 {
                0 => rounds.extend(ways.iter().map(round)),
                _ => rounds.extend(ways.iter().rev().map(round)),
            }
        }
        Run {
            level: args.depths()[0],
            ways,
            batches,
            per_batch,
            seed: args.seed,
            rounds,
            at: None,
            logs: BTreeMap::new(),
            last: BTreeMap::new(),
            differs: Vec::new(),
            mismatches: 0,
            failed: Vec::new(),
            errors: Vec::new(),
            done: 0,
            started: Instant::now(),
            quiet,
            verbose: args.verbose,
        }
    }

    /// The batch at hand has been run in every way: compares, says how far we are.
    fn compare(&mut self, batch: u16) {
        let logs = std::mem::take(&mut self.logs);
        for &way in &self.ways[1..] {
            let (Some(first), Some(log)) = (logs.get(&self.ways[0]), logs.get(&way)) else {
                continue;
            };
            let longest = first.len().max(log.len());
            for at in (0..longest).filter(|&at| first.get(at) != log.get(at)) {
                let (first, log) = (first.get(at), log.get(at));
                let program = first.or(log).and_then(|line| program(line));
                if self.differs.len() == MOST || self.differs.iter().any(|d| d.program == program) {
                    break;
                }
                let text = |line: Option<&String>| line.map_or("(nothing)".into(), String::clone);
                self.differs.push(Difference {
                    batch,
                    way,
                    program,
                    lines: [text(first), text(log)],
                });
            }
        }
        self.last = logs;
        self.done += self.per_batch;
        if !self.quiet {
            let all = u64::from(self.batches) * self.per_batch;
            let took = self.started.elapsed();
            let left = took.mul_f64((all - self.done) as f64 / self.done as f64);
            eprintln!(
                "fuzz: {} of {all} programs in {} ways, {} left",
                self.done,
                self.ways.len(),
                clock(left)
            );
        }
    }
}

fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    format!("{}:{:02}", seconds / 60, seconds % 60)
}

impl Handler for Run<'_> {
    fn next_command(&mut self) -> u32 {
        if let Some((batch, way)) = self.at.take() {
            if way.config == Config::Check {
                self.mismatches += mismatches();
            }
            if self.rounds.front().is_none_or(|&(next, _)| next != batch) {
                self.compare(batch);
            }
        }
        let stop = self.differs.len() == MOST
            || self.failed.len() == MOST
            || self.mismatches > 0
            || !self.errors.is_empty();
        let Some((batch, way)) = self.rounds.pop_front().filter(|_| !stop) else {
            return Command::End.encode();
        };
        self.at = Some((batch, way));
        self.logs.insert(way, Vec::new());
        Command::Test {
            config: way.config,
            round: batch,
        }
        .encode()
    }

    fn apply(&mut self, config: Config, level: u32, file: &Path) -> vmm::Result<()> {
        module::apply(config, level, file)?;
        let Some((batch, way)) = self.at else {
            return Ok(());
        };
        let knob = Path::new(module::SYSFS).join("detour");
        if config == Config::Stock || !knob.exists() {
            return Ok(());
        }
        let seed = (self.seed as u32).wrapping_add(batch.into());
        fs::write(&knob, format!("{} {seed}", way.detour)).map_err(vmm::Error::file(&knob))
    }

    fn console_line(&mut self, level: u32, line: &str) {
        match (Line::parse(line), self.at) {
            (Line::Test(text), Some((_, way))) if level == self.level => {
                if text.contains(": FAIL: ") && self.failed.len() < MOST {
                    self.failed.push(format!("{}: {text}", way.name()));
                }
                self.logs.entry(way).or_default().push(text.to_owned());
            }
            (Line::Error(what), _) => self.errors.push(what.to_owned()),
            _ if self.verbose => println!("L{level}| {line}"),
            _ => {}
        }
    }
}

/// What the module's paths found to differ in mode check.
fn mismatches() -> u64 {
    let count = |path: &module::PathStatus| path.values.get("mismatches")?.parse::<u64>().ok();
    let paths = Module::default().paths().unwrap_or_default();
    paths.iter().filter_map(count).sum()
}

/// Boots a stack that runs something.
fn boot(args: &BenchArgs, request: Request, run: &mut Run<'_>) -> Result<(), Failure> {
    let spec = args.spec(
        run.level,
        Inner::Payload {
            args: request.words(),
        },
    );
    let outcome = stack::run(&spec, &args.files(), args.local(), run)?;
    for error in &run.errors {
        eprintln!("matryoshka: L{}: {error}", run.level);
    }
    if let Err(failure) = ended_well(run.level, &outcome.exit) {
        let last = run.at.and_then(|(_, way)| run.logs.get(&way)?.last());
        eprintln!(
            "matryoshka: it was {}, and said last: {}",
            run.at.map(|(_, way)| way.name()).unwrap_or_default(),
            last.map_or("nothing", String::as_str)
        );
        return Err(failure);
    }
    Ok(())
}

/// How many batches, and how many programs in each: the payload knows one size only, so they may be a few more than asked for,
/// but fewer than there are batches. `None`: too many to be numbered.
fn batches(programs: u64) -> Option<(u16, u64)> {
    let batches = programs.div_ceil(BATCH).max(1);
    let per_batch = programs.div_ceil(batches);
    Some((u16::try_from(batches).ok()?, per_batch))
}

/// Runs the programs.
pub fn run(args: &BenchArgs) -> Result<Code, Failure> {
    let [_] = args.depths()[..] else {
        let why = "--test wants one --depth: the payload's level";
        return Err(Failure(Code::Usage, why.into()));
    };
    need_module(args)?;
    let mut ways: Vec<Way> = Vec::new();
    for &config in &args.config {
        ways.push(Way { config, detour: 0 });
        if config == Config::L0 && args.detour > 0 {
            let detour = args.detour;
            ways.push(Way { config, detour });
        }
    }
    let (batches, per_batch) = batches(args.programs).ok_or_else(|| {
        let most = BATCH * u64::from(u16::MAX);
        Failure(Code::Usage, format!("--programs: at most {most} at once"))
    })?;
    if batches > 1 && u64::from(batches) * per_batch != args.programs {
        eprintln!(
            "fuzz: {} programs were asked for: {batches} batches of {per_batch} are {}",
            args.programs,
            u64::from(batches) * per_batch
        );
    }
    let request = Request {
        seed: args.seed,
        first: args.first,
        count: per_batch,
        show: args.show,
        without: args.without,
    };
    let mut all = Run::new(args, &ways, batches, per_batch, args.show.is_some());
    boot(args, request, &mut all)?;
    if let Some(directory) = &args.log {
        // The last batch's logs: those of a program that was asked for, or that differ.
        let write = |way: &Way, log: &[String]| {
            fs::create_dir_all(directory)?;
            let name = match way.detour {
                0 => format!("{}.log", way.config.name()),
                _ => "detour.log".into(),
            };
            fs::write(directory.join(name), log.join("\n") + "\n")
        };
        let kept = all.last.iter().try_for_each(|(way, log)| write(way, log));
        kept.map_err(|why| Failure(Code::Failed, format!("{}: {why}", directory.display())))?;
    }
    if all.mismatches > 0 {
        println!(
            "mode check found {} mismatches: see the kernel's log",
            all.mismatches
        );
        return Ok(Code::Failed);
    }
    for line in &all.failed {
        println!("{line}");
    }
    println!(
        "fuzz: seed {}, programs {} to {} in {} ways, {} differ, {} failed",
        args.seed,
        args.first,
        args.first + all.done.max(1) - 1,
        ways.len(),
        all.differs.len(),
        all.failed.len()
    );
    for found in &all.differs {
        println!("{} differs from {}:", found.way.name(), ways[0].name());
        println!("  {}\n  {}", found.lines[0], found.lines[1]);
        if let Some(before) = parted(&found.lines) {
            println!("  they part {before} operations before the end");
        }
        if let (Some(program), None) = (found.program, args.show) {
            let first = args.first + u64::from(found.batch) * per_batch;
            explain(args, [ways[0], found.way], first, program)?;
        }
    }
    let good = all.differs.is_empty() && all.failed.is_empty() && all.errors.is_empty();
    Ok(match good && all.done > 0 {
        true => Code::Ok,
        false => Code::Failed,
    })
}

/// The program's number in a line of its.
fn program(line: &str) -> Option<u64> {
    let rest = line.strip_prefix("fuzz ")?;
    let end = rest.find(|c: char| !c.is_ascii_digit())?;
    rest[..end].parse().ok()
}

/// How many operations before the end of their program two lines part, by the digits for each operation; 0 for what is noted at the
/// end.
fn parted(lines: &[String; 2]) -> Option<usize> {
    let digits = |line: &String| -> Option<Vec<u8>> {
        Some(line.split_whitespace().nth(3)?.bytes().rev().collect())
    };
    let (one, other) = (digits(&lines[0])?, digits(&lines[1])?);
    let differs = |(a, b): (&u8, &u8)| a != b;
    let last = one.iter().zip(&other).rposition(differs);
    Some(last.map_or(0, |at| at + 1))
}

/// What two ways of one program have seen.
type Logs = (Vec<String>, Vec<String>);

/// Runs a program that differs again, with its log, and says where the logs part.
fn explain(args: &BenchArgs, ways: [Way; 2], first: u64, program: u64) -> Result<(), Failure> {
    let try_one = |first: u64, without: u64| -> Result<Option<Logs>, Failure> {
        let request = Request {
            seed: args.seed,
            first,
            count: program + 1 - first,
            show: Some(program),
            without,
        };
        let mut run = Run::new(args, &ways, 1, request.count, true);
        boot(args, request, &mut run)?;
        let differ = !run.differs.is_empty();
        let mut log = |way| run.last.remove(way).unwrap_or_default();
        Ok(differ.then(|| (log(&ways[0]), log(&ways[1]))))
    };
    // Alone, or with as few before it as that takes.
    let mut before = 0;
    let (first, mut logs) = loop {
        let from = (program - before.min(program)).max(first);
        eprintln!("fuzz: program {program} again, from {from} on");
        if let Some(logs) = try_one(from, 0)? {
            break (from, logs);
        }
        if from == first {
            println!("program {program} does not differ when its batch runs again");
            return Ok(());
        }
        before = (before * 4).max(8);
    };
    let mut without = 0u64;
    if args.minimize {
        for at in 0..OPERATIONS {
            let fewer = without | (1 << at);
            if let Some(found) = try_one(first, fewer)? {
                (without, logs) = (fewer, found);
            }
        }
    }
    let (one, other) = logs;
    let at = one.iter().zip(&other).take_while(|(a, b)| a == b).count();
    for line in &one[at.saturating_sub(BEFORE)..at] {
        println!("  {line}");
    }
    for (way, log) in ways.iter().zip([&one, &other]) {
        println!(
            "{}: {}",
            way.name(),
            log.get(at).map_or("(nothing)", |line| line)
        );
    }
    println!(
        "again: --seed {} --first {first} --programs {} --show {program} --without {without:x}",
        args.seed,
        program + 1 - first
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_tell_where_they_part() {
        let line = |sum: &str, steps: &str| format!("fuzz 7: {sum} {steps}");
        let lines = |a: String, b: String| parted(&[a, b]);
        assert_eq!(lines(line("1", "0abc"), line("2", "0abc")), Some(0));
        assert_eq!(lines(line("1", "0abc"), line("2", "0abd")), Some(1));
        assert_eq!(lines(line("1", "0abc"), line("2", "0b7d")), Some(3));
        assert_eq!(lines("(nothing)".into(), line("2", "0")), None);
    }

    #[test]
    fn a_request_is_what_the_payload_reads() {
        let mut request = Request {
            seed: 7,
            first: 10,
            count: 5,
            show: None,
            without: 0,
        };
        assert_eq!(request.words(), "tests=fuzz;fuzz=7:10:5");
        request.show = Some(12);
        request.without = 0x21;
        assert_eq!(request.words(), "tests=fuzz;fuzz=7:10:5:12:21");
    }

    #[test]
    fn batches_are_of_one_size() {
        let all = [
            (1, 1, 1),
            (500, 1, 500),
            (700, 2, 350),
            (1000, 2, 500),
            (1001, 3, 334),
        ];
        for (programs, number, each) in all {
            assert_eq!(batches(programs), Some((number, each)));
        }
        assert_eq!(batches(u64::MAX), None);
    }

    #[test]
    fn programs_have_numbers() {
        assert_eq!(program("fuzz 12: 00ff"), Some(12));
        assert_eq!(program("fuzz 3/4 exit: [1]"), Some(3));
        assert_eq!(program("instructions/x"), None);
    }
}
