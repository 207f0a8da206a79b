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

/// Boots a stack of `depth` once for each of `configs`, and stock once more at the end if there are
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
        progress.boot(depth, args.slow_ticks(depth));
        progress.round(depth, config);
        progress.operation(Op::Boot);
        let row = once(args, depth, config, progress)?;
        match is_again {
            true => again.push(row),
            false => rows.push(row),
        }
        progress.advance(weight(depth));
    }
    Ok(())
}

/// What a boot of a stack costs, as weight for the progress display: measured, in instructions.
pub fn weight(depth: u32) -> f64 {
    0.5e9 * 3f64.powi(depth as i32 - 1)
}

fn once(args: &BenchArgs, depth: u32, config: Config, progress: &Progress) -> Result<Row, Failure> {
    let spec = Spec {
        config: Some(config as u8),
        exit_counter: vmm::backdoor::present(),
        ..args.spec(depth, Inner::Boot)
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
    let Some(boot) = booting.boot else {
        return Err(Failure(
            crate::Code::Guest,
            format!("L{depth}'s Linux ended without saying that it had booted"),
        ));
    };
    Ok(Row {
        op: Op::Boot.name().into(),
        depth,
        config: config.name().into(),
        pattern: None,
        instructions: Counts {
            min: boot.ticks,
            median: boot.ticks,
            max: boot.ticks,
            n: 1,
            worst: boot.ticks,
        },
        l0_exits: boot.exits.map(|exits| exits as f64),
        disturbed: 0,
        resident_kib: booting.resident_kib,
    })
}
