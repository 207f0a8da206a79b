// SPDX-License-Identifier: GPL-2.0-or-later
//! `matryoshka bench --test`: the payload's correctness tests in each configuration, and whether their
//! logs agree. A log says what a guest could see; two configurations must not differ in a byte of it.

use std::collections::VecDeque;
use std::fs;

use protocol::{Command, Config, Line};
use vmm::stack::{self, Handler, Inner, Spec};

use crate::args::BenchArgs;
use crate::progress::Progress;
use crate::session::{ended_well, need_module};
use crate::{Code, Failure};

/// Most differing lines that are shown of one configuration.
const SHOWN: usize = 20;

/// The log of one configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// How the module was set.
    pub config: Config,
    /// The payload's lines.
    pub lines: Vec<String>,
}

struct Probe {
    level: u32,
    rounds: VecDeque<Config>,
    logs: Vec<Log>,
    errors: Vec<String>,
    verbose: bool,
    progress: Progress,
}

impl Probe {
    /// Says where the tests are: at which group, and how far through what the first configuration logged.
    fn show(&mut self, text: &str) {
        let group = text.split(['/', ':', ' ']).next().unwrap_or(text);
        self.progress.part(group);
        if let [first, .., _] = &self.logs[..] {
            self.progress.advance(1.0 / first.lines.len().max(1) as f64);
        }
    }
}

impl Handler for Probe {
    fn next_command(&mut self) -> u32 {
        if self.logs.len() == 1 {
            self.progress.advance(1.0);
        }
        let Some(config) = self.rounds.pop_front() else {
            return Command::End.encode();
        };
        self.progress.round(self.level, config);
        self.logs.push(Log {
            config,
            lines: Vec::new(),
        });
        Command::Test {
            config,
            round: self.logs.len() as u16 - 1,
        }
        .encode()
    }

    fn console_line(&mut self, level: u32, line: &str) {
        match Line::parse(line) {
            Line::Test(text) if level == self.level => {
                self.show(text);
                match self.logs.last_mut() {
                    Some(log) => log.lines.push(text.to_owned()),
                    None => self
                        .errors
                        .push(format!("a test line before any test: {text}")),
                }
            }
            Line::Note(text) if level == self.level => {
                let config = self.logs.last().map_or("", |log| log.config.name());
                self.progress.print(&format!("{config}: {text}"));
            }
            Line::Error(what) => self.errors.push(what.to_owned()),
            _ if self.verbose => self.progress.print(&format!("L{level}| {line}")),
            _ => {}
        }
    }
}

/// The first lines in which `log` is not `first`, each as (what the first has, what this has).
pub fn differences<'a>(
    first: &'a Log,
    log: &'a Log,
) -> impl Iterator<Item = (Option<&'a str>, Option<&'a str>)> {
    let longest = first.lines.len().max(log.lines.len());
    (0..longest).filter_map(|at| {
        let (one, other) = (first.lines.get(at), log.lines.get(at));
        (one != other).then_some((one.map(String::as_str), other.map(String::as_str)))
    })
}

/// Runs the tests.
pub fn run(args: &BenchArgs) -> Result<Code, Failure> {
    let [level] = args.depths()[..] else {
        return Err(Failure(
            Code::Usage,
            "--test wants one --depth: the payload's level".into(),
        ));
    };
    need_module(args)?;
    let mut probe = Probe {
        level,
        rounds: args.config.iter().copied().collect(),
        logs: Vec::new(),
        errors: Vec::new(),
        verbose: args.verbose,
        progress: Progress::new(args.config.len() as f64),
    };
    probe.progress.boot(level, args.slow_ticks(level));
    let cpus = match (args.crowd, args.pair) {
        (true, _) => 4,
        (_, true) => 2,
        _ => 1,
    };
    let words = format!("tests={};cpus={cpus}", args.tests);
    let spec = Spec {
        // As the first round has it: a deep stack on stock KVM takes long to boot.
        config: args.config.first().map(|&first| first as u8),
        ..args.spec(level, Inner::Payload { args: words })
    };
    let outcome = stack::run(&spec, &args.files(), args.local(), &mut probe)?;
    drop(probe.progress);
    if let Some(directory) = &args.log {
        for log in &probe.logs {
            let file = directory.join(format!("{}.log", log.config.name()));
            let text: String = log
                .lines
                .iter()
                .flat_map(|line| [line.as_str(), "\n"])
                .collect();
            fs::create_dir_all(directory)
                .and_then(|()| fs::write(&file, text))
                .map_err(|error| Failure(Code::Failed, format!("{}: {error}", file.display())))?;
        }
    }
    if args.shuffle.is_some() {
        println!("{}", outcome.shuffles);
    }
    if args.roam {
        println!("moved {} times", outcome.moves);
    }
    if args.churn {
        println!("churned {} times", outcome.churns);
    }
    if args.userfaultfd {
        println!("handed out {} pages", outcome.given);
    }
    for error in &probe.errors {
        eprintln!("matryoshka: L{level}: {error}");
    }
    ended_well(level, &outcome.exit)?;
    let agree = say(&probe.logs);
    let all = probe.rounds.is_empty() && probe.errors.is_empty();
    Ok(if agree && all { Code::Ok } else { Code::Failed })
}

/// Prints how the logs compare. False if one differs from the first, or says that a test failed.
fn say(logs: &[Log]) -> bool {
    let Some(first) = logs.first() else {
        return false;
    };
    let mut good = !first.lines.is_empty();
    for log in logs {
        let failed = log
            .lines
            .iter()
            .filter(|line| line.contains("FAIL"))
            .count();
        let differ = differences(first, log).count();
        println!(
            "{:<6} {} results, {failed} failed, {differ} differ from {}",
            log.config.name(),
            log.lines.len(),
            first.config.name()
        );
        for (one, other) in differences(first, log).take(SHOWN) {
            println!("  {}: {}", first.config.name(), one.unwrap_or("(nothing)"));
            println!("  {}: {}", log.config.name(), other.unwrap_or("(nothing)"));
        }
        for line in log
            .lines
            .iter()
            .filter(|line| line.contains("FAIL"))
            .take(SHOWN)
        {
            println!("  {line}");
        }
        good &= failed == 0 && differ == 0;
    }
    good
}
