// SPDX-License-Identifier: GPL-2.0-or-later
//! The operation `boot`: a Linux guest from its first instruction to its init.
//!
//! A guest boots once, so each configuration has a stack of its own, and each level of the modules is set
//! before it starts the next one. The guest that is measured is the innermost.

use protocol::{Boot, Command, Config, Line, Op};
use vmm::stack::{self, Handler, Inner, Spec};

use crate::args::BenchArgs;
use crate::progress::Progress;
use crate::report::{Counts, Row};
use crate::session::ended_well;
use crate::{host, Failure};

/// Boots of which a row is made.
const BOOTS: usize = 3;

/// What L0 does while a stack boots.
struct Booting<'a> {
    depth: u32,
    boot: Option<Boot>,
    resident_kib: Option<u64>,
    progress: &'a Progress,
    verbose: bool,
}

impl Handler for Booting<'_> {
    fn next_command(&mut self) -> u32 {
        Command::End.encode()
    }

    fn console_line(&mut self, level: u32, line: &str) {
        match Line::parse(line) {
            Line::Boot(boot) if boot.depth == self.depth => {
                self.resident_kib = host::resident_kib();
                self.boot = Some(boot);
            }
            Line::Boot(_) => {}
            _ if self.verbose => self.progress.print(&format!("L{level}| {line}")),
            _ => {}
        }
    }
}

/// Boots a stack of `depth` some times for each of `configs`, and stock again at the end if there are
/// others: the rows, and stock's second one.
pub fn boots(
    args: &BenchArgs,
    depth: u32,
    progress: &mut Progress,
    rows: &mut Vec<Row>,
    again: &mut Vec<Row>,
) -> Result<(), Failure> {
    let repeat = args.config.contains(&Config::Stock) && args.config.len() > 1;
    let last = repeat.then_some((Config::Stock, true));
    let first = args.config.iter().map(|&config| (config, false));
    for (config, is_again) in first.chain(last) {
        progress.round(depth, config);
        progress.operation(Op::Boot);
        let mut measured = Vec::new();
        for _ in 0..BOOTS {
            measured.push(once(args, depth, config, progress)?);
            progress.advance(weight(depth) / BOOTS as f64);
        }
        let row = row(depth, config, measured);
        match is_again {
            true => again.push(row),
            false => rows.push(row),
        }
    }
    Ok(())
}

/// What the boots of a row cost, as weight for the progress display: measured, in instructions.
pub fn weight(depth: u32) -> f64 {
    BOOTS as f64 * 0.5e9 * 3f64.powi(depth as i32 - 1)
}

/// The row of some boots, and the host's resident memory after the last.
fn row(depth: u32, config: Config, mut boots: Vec<(Boot, Option<u64>)>) -> Row {
    let resident_kib = boots.last().and_then(|(_, resident)| *resident);
    boots.sort_by_key(|(boot, _)| boot.ticks);
    let ticks = |at: usize| boots.get(at).map_or(0, |(boot, _)| boot.ticks);
    let last = boots.len().saturating_sub(1);
    Row {
        op: Op::Boot.name().into(),
        depth,
        config: config.name().into(),
        pattern: None,
        instructions: Counts {
            min: ticks(0),
            median: ticks(boots.len() / 2),
            max: ticks(last),
            n: boots.len() as u32,
            worst: ticks(last),
        },
        l0_exits: boots.first().and_then(|(boot, _)| Some(boot.exits? as f64)),
        disturbed: 0,
        resident_kib,
    }
}

fn once(
    args: &BenchArgs,
    depth: u32,
    config: Config,
    progress: &Progress,
) -> Result<(Boot, Option<u64>), Failure> {
    let spec = Spec {
        config: Some(config as u8),
        exit_counter: vmm::backdoor::present(),
        knobs: args.knobs.clone(),
        ..Spec::new(depth, Inner::Boot)
    };
    let mut booting = Booting {
        depth,
        boot: None,
        resident_kib: None,
        progress,
        verbose: args.verbose,
    };
    let outcome = stack::run(&spec, &args.files(), args.local(), &mut booting)?;
    ended_well(depth, &outcome.exit)?;
    let boot = booting.boot.ok_or_else(|| {
        let what = format!("L{depth}'s Linux ended without saying that it had booted");
        Failure(crate::Code::Guest, what)
    })?;
    Ok((boot, booting.resident_kib))
}
