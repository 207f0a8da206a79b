// SPDX-License-Identifier: GPL-2.0-or-later
//! One run: the stacks one after the other, each with all its rounds.

use std::collections::VecDeque;
use std::path::Path;

use protocol::{Command, Config, Line, Op};
use vmm::machine::Exit;
use vmm::stack::{self, Handler, Inner, Spec};

use crate::args::BenchArgs;
use crate::compare::{self, Comparison};
use crate::plan::{self, Stack};
use crate::progress::Progress;
use crate::report::{Report, Row, SCHEMA};
use crate::table::{resident, table};
use crate::{boot, host, Code, Failure};

/// How far stock at the end of a stack may be off stock at its start, in per cent, before it is said.
const DRIFT: f64 = 1.0;
/// Instructions by which stock may differ all the same: from one round of a boot to the next its shortest operations
/// move by this order (23 of the 2,214 of vmread_shadowed at depth 2), which is over a per cent of so few.
const DRIFT_SLACK: u64 = 32;
/// As `DRIFT`, for touches of memory: each level takes pages from its allocator and has tables of earlier passes that it still
/// shadows, and no round finds either as the last one did.
const DRIFT_TOUCH: f64 = 3.0;

/// A round of a stack.
#[derive(Clone, Copy, Debug)]
struct Round {
    config: Config,
    number: u16,
}

/// What L0 does while a stack runs.
pub struct Session<'a> {
    level: u32,
    rounds: VecDeque<Round>,
    current: Option<Round>,
    /// Number of the round that measures stock again.
    again: Option<u16>,
    weight: f64,
    progress: &'a mut Progress,
    verbose: bool,
    /// Results of the rounds.
    pub rows: Vec<Row>,
    /// Results of stock, measured again.
    pub repeated: Vec<Row>,
    /// What the payload complained of.
    pub errors: Vec<String>,
    /// Exits could be counted, so this is the laboratory's emulator.
    pub counted: bool,
}

impl<'a> Session<'a> {
    /// For one stack; `weight` is what a round of it costs.
    pub fn new(
        level: u32,
        configs: &[Config],
        weight: f64,
        progress: &'a mut Progress,
        verbose: bool,
    ) -> Self {
        let mut rounds: VecDeque<Round> = configs
            .iter()
            .zip(0..)
            .map(|(&config, number)| Round { config, number })
            .collect();
        let again = (configs.contains(&Config::Stock) && configs.len() > 1).then(|| {
            let number = rounds.len() as u16;
            rounds.push_back(Round {
                config: Config::Stock,
                number,
            });
            number
        });
        Session {
            level,
            rounds,
            current: None,
            again,
            weight,
            progress,
            verbose,
            rows: Vec::new(),
            repeated: Vec::new(),
            errors: Vec::new(),
            counted: false,
        }
    }

    /// Takes in a line of the payload.
    pub fn take(&mut self, line: &str) {
        match Line::parse(line) {
            Line::Row(row) => {
                self.counted |= row.exits_milli.is_some();
                let rows = match self.again == Some(row.round) {
                    true => &mut self.repeated,
                    false => &mut self.rows,
                };
                // The payload waits until its line has been taken.
                rows.push(Row {
                    resident_kib: host::resident_kib(),
                    ..Row::from(&row)
                });
            }
            Line::Start(op) => self.progress.operation(op),
            Line::Error(what) => {
                let at = self.current.map_or("start", |round| round.config.name());
                self.errors.push(format!("L{} ({at}): {what}", self.level));
            }
            Line::Unknown(line) if line.contains("MTK hello") || line.contains("MTK tests") => {}
            Line::Boot(_) => {}
            Line::Test(text) | Line::Note(text) | Line::Unknown(text) | Line::Text(text) => {
                self.progress.print(&format!("L{}| {text}", self.level));
            }
        }
    }
}

impl Handler for Session<'_> {
    fn next_command(&mut self) -> u32 {
        if self.current.is_some() {
            self.progress.advance(self.weight);
        }
        self.current = self.rounds.pop_front();
        let Some(Round { config, number }) = self.current else {
            return Command::End.encode();
        };
        self.progress.round(self.level, config);
        Command::Run {
            config,
            round: number,
        }
        .encode()
    }

    fn console_line(&mut self, level: u32, line: &str) {
        if level == self.level {
            self.take(line);
        } else if self.verbose {
            self.progress.print(&format!("L{level}| {line}"));
        }
    }

    fn apply(&mut self, config: Config, level: u32, file: &Path) -> vmm::Result<()> {
        vmm::module::apply(config, level, file)
    }
}

/// Says how a stack ended that did not end well.
pub fn ended_well(level: u32, exit: &Exit) -> Result<(), Failure> {
    match exit {
        Exit::Done(0) => Ok(()),
        // The payload said why itself.
        Exit::Done(1) => Ok(()),
        Exit::Done(status) => Err(Failure(
            Code::Guest,
            format!("the payload at level {level} ended with {status}"),
        )),
        bad => Err(Failure(Code::Guest, format!("stack of {level}: L1 {bad}"))),
    }
}

/// What a boot of a stack costs, as weight for the progress display: measured, in instructions.
fn boot_weight(level: u32) -> f64 {
    match level {
        1 => 20e6,
        _ => 1.2e9 * 2.5f64.powi(level as i32 - 2),
    }
}

/// The benchmark.
pub fn run(args: &BenchArgs) -> Result<Code, Failure> {
    let wrong = |why| Failure(Code::Usage, why);
    let recorded = args.compare.as_deref().map(Report::read).transpose();
    let recorded = recorded.map_err(wrong)?;
    if let Some(recorded) = &recorded {
        compare::same_kernel(recorded, &host::kernel()).map_err(wrong)?;
    }
    let stacks = plan::stacks(
        &args.operations(),
        &args.depths(),
        &args.pattern,
        args.amount(),
    );
    let boots = match args.operations().contains(&Op::Boot) {
        true => args.depths(),
        false => Vec::new(),
    };
    if stacks.is_empty() && boots.is_empty() {
        return Err(Failure(
            Code::Usage,
            "none of these operations exists at these depths".into(),
        ));
    }
    need_module(args)?;
    for file in [&args.json, &args.record].into_iter().flatten() {
        Report::can_write(file).map_err(wrong)?;
    }
    let rounds = args.config.len() as f64 + 1.0;
    let total = stacks.iter().map(|stack| stack.cost * rounds).sum::<f64>()
        + turns(args, &stacks)
            .map(|(stack, ..)| boot_weight(stack.level))
            .sum::<f64>();
    let total_boots: f64 = boots.iter().map(|&depth| boot::weight(depth)).sum();
    let mut progress = Progress::new(total + total_boots * rounds);
    let mut report = Report {
        schema: SCHEMA,
        kernel: host::kernel(),
        emulator: String::new(),
        cpu_model: host::cpu_model(),
        unit: String::new(),
        rows: Vec::new(),
        stock_again: Vec::new(),
    };
    let (mut errors, mut counted, mut stopped) = (Vec::new(), false, None);
    for (stack, configs, again) in turns(args, &stacks) {
        progress.boot(stack.level, args.slow_ticks(stack.level));
        let mut session = Session::new(
            stack.level,
            configs,
            stack.cost,
            &mut progress,
            args.verbose,
        );
        let end = one_stack(args, stack, configs.first(), &mut session);
        let rows = match again {
            true => &mut report.stock_again,
            false => &mut report.rows,
        };
        rows.append(&mut session.rows);
        report.stock_again.append(&mut session.repeated);
        errors.append(&mut session.errors);
        counted |= session.counted;
        if let Err(failure) = end {
            stopped = Some(failure);
            break;
        }
        progress.advance(boot_weight(stack.level));
    }
    for &depth in &boots {
        if stopped.is_some() {
            break;
        }
        let (rows, again) = (&mut report.rows, &mut report.stock_again);
        if let Err(failure) = boot::boots(args, depth, &mut progress, rows, again) {
            stopped = Some(failure);
        }
    }
    counted |= report.rows.iter().any(|row| row.l0_exits.is_some());
    drop(progress);
    report.emulator = host::emulator(counted).into();
    report.unit = if counted {
        "retired instructions"
    } else {
        "TSC cycles"
    }
    .into();
    report.rows.sort_by_key(Row::order);
    report.stock_again.sort_by_key(Row::order);
    // What was measured before a stack went wrong is still true.
    print!("{}", table(&report));
    println!("{}", resident(&report, args.separate));
    for error in &errors {
        eprintln!("matryoshka: {error}");
    }
    if let Some(failure) = stopped {
        // A record is of a whole run.
        if let Some(Err(why)) = args.json.as_deref().map(|file| report.write(file)) {
            eprintln!("matryoshka: {why}");
        }
        return Err(failure);
    }
    let drifted = drift(&report);
    for file in [&args.json, &args.record].into_iter().flatten() {
        report
            .write(file)
            .map_err(|why| Failure(Code::Failed, why))?;
    }
    let asked = |row: &Row| {
        let boot = row.op == Op::Boot.name() && boots.contains(&row.depth);
        (boot || stacks.iter().any(|stack| stack.measures(row)))
            && args.config.iter().any(|config| config.name() == row.config)
    };
    let differs = recorded.is_some_and(|recorded| {
        let comparison = compare::compare(&report, &recorded, asked, args.tolerance);
        say(&comparison, args.tolerance);
        !comparison.agrees()
    });
    Ok(if errors.is_empty() && !differs && !drifted {
        Code::Ok
    } else {
        Code::Failed
    })
}

/// The stacks to boot, with what is to be measured in each, and whether that is stock once more: all
/// configurations in one boot, or each in its own.
fn turns<'a>(
    args: &'a BenchArgs,
    stacks: &'a [Stack],
) -> impl Iterator<Item = (&'a Stack, &'a [Config], bool)> {
    stacks.iter().flat_map(|stack| {
        let whole = (!args.separate).then_some((stack, &args.config[..], false));
        let each = args.config.chunks(1).filter(|_| args.separate);
        let stock = &[Config::Stock][..];
        let repeat = args.separate && args.config.len() > 1 && args.config.contains(&stock[0]);
        whole
            .into_iter()
            .chain(each.map(move |config| (stack, config, false)))
            .chain(repeat.then_some((stack, stock, true)))
    })
}

/// Boots a stack, with the modules as the `first` configuration has them: on stock KVM a deep one takes long.
fn one_stack(
    args: &BenchArgs,
    stack: &Stack,
    first: Option<&Config>,
    session: &mut Session<'_>,
) -> Result<(), Failure> {
    let spec = Spec {
        config: first.map(|&first| first as u8),
        ..args.spec(stack.level, Inner::Payload { args: stack.args() })
    };
    let outcome = stack::run(&spec, &args.files(), args.local(), session)?;
    ended_well(stack.level, &outcome.exit)
}

/// Says which rows of stock were others at the end. True if any was by more than [`DRIFT`].
fn drift(report: &Report) -> bool {
    let mut any = false;
    for again in &report.stock_again {
        let Some(first) = report.rows.iter().find(|row| row.key() == again.key()) else {
            continue;
        };
        let most = match Op::from_name(&first.op).is_some_and(Op::is_touch) {
            true => DRIFT_TOUCH,
            false => DRIFT,
        };
        if let Some(line) = compare::difference(again, first, most, DRIFT_SLACK) {
            eprintln!("matryoshka: stock at the end is not stock at the start: {line}");
            any = true;
        }
    }
    if !any && !report.stock_again.is_empty() {
        println!(
            "stock measured again at the end agrees within {DRIFT} % ({DRIFT_TOUCH} % for touches)"
        );
    }
    any
}

/// Prints a comparison.
fn say(comparison: &Comparison, tolerance: f64) {
    if let Some(units) = &comparison.units {
        println!("cannot be compared: {units}");
    }
    for title in &comparison.lost {
        println!("differs: {title}: recorded and asked for, but not measured");
    }
    for line in &comparison.differences {
        println!("differs: {line}");
    }
    for title in &comparison.missing {
        println!("recorded but not asked for now: {title}");
    }
    for title in &comparison.new {
        println!("not recorded: {title}");
    }
    let (same, other) = (comparison.same, comparison.differences.len());
    println!("compared with the record: {same} within {tolerance} %, {other} not");
    if same + other == 0 {
        println!("nothing that was measured is in the record");
    }
}

/// A configuration with the module needs its file, and it is kinder to say so before the first boot.
pub fn need_module(args: &BenchArgs) -> Result<(), Failure> {
    let file = args.files().module_here();
    let needed = args.config.iter().find(|&&config| config != Config::Stock);
    match needed {
        Some(config) if !file.is_file() && !vmm::module::Module::default().present() => {
            Err(Failure(
                Code::NoModule,
                format!(
                    "configuration {} needs the module, and {} is not there\n  {}; or measure `--config stock` alone",
                    config.name(),
                    file.display(),
                    vmm::module::GET_IT,
                ),
            ))
        }
        _ => Ok(()),
    }
}

/// One operation between the profiler's marks.
pub fn profile(args: &BenchArgs) -> Result<Code, Failure> {
    let (Some(op), [depth], [config]) = (args.profile, &args.depths()[..], &args.config[..]) else {
        let why = "--profile wants one --depth and one --config";
        return Err(Failure(Code::Usage, why.into()));
    };
    let stacks = plan::stacks(&[op], &[*depth], &args.pattern, plan::Amount::default());
    let Some(stack) = stacks.first() else {
        let name = op.name();
        return Err(Failure(
            Code::Usage,
            format!("{name} is not executed at depth {depth}"),
        ));
    };
    let mut host = Profiling {
        level: stack.level,
        command: Some(*config),
        failed: false,
    };
    let args_text = format!("profile={}", stack.specs[0].op.name());
    let spec = Spec {
        config: Some(*config as u8),
        ..args.spec(stack.level, Inner::Payload { args: args_text })
    };
    let outcome = stack::run(&spec, &args.files(), args.local(), &mut host)?;
    ended_well(stack.level, &outcome.exit)?;
    Ok(if host.failed { Code::Failed } else { Code::Ok })
}

struct Profiling {
    level: u32,
    command: Option<Config>,
    failed: bool,
}

impl Handler for Profiling {
    fn next_command(&mut self) -> u32 {
        match self.command.take() {
            Some(config) => Command::Profile { config, round: 0 }.encode(),
            None => Command::End.encode(),
        }
    }

    fn console_line(&mut self, level: u32, line: &str) {
        if level != self.level {
            return;
        }
        match Line::parse(line) {
            Line::Error(what) => {
                self.failed = true;
                eprintln!("matryoshka: L{level}: {what}");
            }
            Line::Start(op) => eprintln!("profiling {} from L{level}", op.name()),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::Op;

    fn line(config: Config, round: u16) -> String {
        let row = protocol::Row {
            op: Op::Cpuid,
            depth: 2,
            level: 2,
            config,
            round,
            pattern: None,
            min: 1,
            median: 1,
            max: 1,
            n: 1,
            disturbed: 0,
            worst: 1,
            exits_milli: Some(1000),
        };
        row.to_string()
    }

    #[test]
    fn stock_comes_first_and_again_last() {
        let mut progress = Progress::new(1.0);
        let configs = [Config::Stock, Config::L0];
        let mut session = Session::new(2, &configs, 1.0, &mut progress, false);
        let mut visited = Vec::new();
        while let Ok(command) = Command::decode(session.next_command()) {
            let Command::Run { config, round } = command else {
                break;
            };
            visited.push(config);
            session.console_line(2, &line(config, round));
            session.console_line(1, &line(config, round));
        }
        assert_eq!(visited, [Config::Stock, Config::L0, Config::Stock]);
        let configs: Vec<_> = session.rows.iter().map(|row| row.config.as_str()).collect();
        assert_eq!(configs, ["stock", "l0"]);
        assert_eq!(session.repeated.len(), 1);
        assert!(session.counted);
    }

    #[test]
    fn complaints_are_kept_with_their_place() {
        let mut progress = Progress::new(1.0);
        let mut session = Session::new(3, &[Config::L0], 1.0, &mut progress, false);
        session.next_command();
        session.take("MTK error cpuid: #UD");
        assert_eq!(session.errors, ["L3 (l0): cpuid: #UD"]);
        assert_eq!(Command::decode(session.next_command()), Ok(Command::End));
    }

    #[test]
    fn only_a_payload_that_says_so_ended_well() {
        assert!(ended_well(1, &Exit::Done(0)).is_ok());
        let Err(Failure(code, why)) = ended_well(2, &Exit::Reset) else {
            panic!("a reset")
        };
        assert_eq!(code, Code::Guest);
        assert!(why.contains("stack of 2"), "{why}");
    }
}
