// SPDX-License-Identifier: GPL-2.0-or-later
//! Which stacks to start and how many samples to take, so that a run ends while somebody is waiting.

use protocol::{op, Op, OpSpec, Pattern};

use crate::report::Row;

/// What one level more multiplies a cost by, roughly (measured: 16 to 20).
const PER_LEVEL: f64 = 18.0;
/// The same for the touch of a page, part of which is work of the levels above.
const PER_LEVEL_TOUCH: f64 = 8.0;
/// Instructions that the samples of one operation may take in one round.
const BUDGET: f64 = 100e6;
/// Fewest and most samples. What the module learns, it puts to the test now and then, for some hundred switches in all:
/// with as many samples both what a test costs and what it spares are seen in each run, and the minimum is the same.
const SAMPLES: (f64, f64) = (9.0, 400.0);
/// Pages of a pass by default, where it costs what is reasonable: four tables of the last level.
const PAGES: u32 = 2048;
/// Fewest pages of a pass by default.
const FEWEST_PAGES: u32 = 128;
/// Instructions that the passes of a touch operation may take in one round.
const TOUCH_BUDGET: f64 = 1e9;
/// Fewest and most passes of a touch operation, beside one that does not count. A pass at depth 3 differs from the next by
/// two per cent; so does a short one that the host's timer happens to interrupt.
const PASSES: (f64, f64) = (3.0, 8.0);
/// Instructions that all passes may take where they are more than the fewest.
const MORE_PASSES: f64 = 200e6;

/// How much of each operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Amount {
    /// Multiplies the number of samples or passes.
    pub scale: f64,
    /// Pages of a pass, if it is not for us to choose.
    pub pages: Option<u32>,
}

impl Default for Amount {
    fn default() -> Amount {
        Amount {
            scale: 1.0,
            pages: None,
        }
    }
}

/// Pages of a pass: as many as the fewest passes can afford.
fn pages(op: Op, level: u32) -> u32 {
    let affordable = TOUCH_BUDGET / (cost(op, level) * PASSES.0);
    let mut pages = PAGES;
    while pages > FEWEST_PAGES && pages as f64 > affordable {
        pages /= 2;
    }
    pages
}

/// What an operation cost stock at the payload's level 1, in retired instructions: only for choosing
/// sample counts and for the progress display.
fn cost(op: Op, level: u32) -> f64 {
    let base = match op {
        Op::Hypercall => 26_000.0,
        Op::HypercallLean => 23_000.0,
        Op::HypercallEpt => 16_000.0,
        Op::KvmHypercall => 1_400.0,
        Op::Cpuid => 1_200.0,
        Op::Pio => 8_300.0,
        // Without an exit at level 1, one into L0 at level 2.
        Op::VmreadShadowed => 110.0,
        Op::VmreadUnshadowed | Op::VmwriteUnshadowed => 1_500.0,
        Op::VmptrldSame => 3_000.0,
        Op::VmptrldSwitch => 6_500.0,
        Op::VmclearVmptrld => 9_800.0,
        Op::Phases | Op::PhasesShort => 45_000.0 * f64::from(op.phase().unwrap_or(0) * op::PHASES),
        Op::TouchWarm | Op::TouchLarge => 2_000.0,
        Op::TouchReflected => 23_000.0,
        Op::TouchUnmapped => 3_700.0,
        Op::TouchCold => 8_600.0,
        // No payload's: see `boot`.
        Op::Boot => 0.0,
    };
    let per_level = match op.is_touch() {
        true => PER_LEVEL_TOUCH,
        false => PER_LEVEL,
    };
    base * per_level.powi(level as i32 - 1)
}

/// What one stack is to measure.
#[derive(Clone, Debug, PartialEq)]
pub struct Stack {
    /// Level of the payload.
    pub level: u32,
    /// Operations and sample counts.
    pub specs: Vec<OpSpec>,
    /// Instructions that one round takes, roughly.
    pub cost: f64,
}

impl Stack {
    /// The payload's argument.
    pub fn args(&self) -> String {
        let items: Vec<_> = self.specs.iter().map(OpSpec::to_string).collect();
        format!("ops={}", items.join(","))
    }

    /// Whether such a row is among what it measures, in whatever configuration.
    pub fn measures(&self, row: &Row) -> bool {
        self.specs.iter().any(|spec| {
            spec.op.name() == row.op
                && spec.op.depth(self.level) == row.depth
                && spec.pattern.map(Pattern::name) == row.pattern.as_deref()
        })
    }
}

/// The stacks for `ops` executed at `depths`. An operation of the payload's child executes one level
/// deeper than the payload. There is no child at depth 1, so there `hypercall` is the payload's own
/// hypercall to KVM.
pub fn stacks(ops: &[Op], depths: &[u32], patterns: &[Pattern], amount: Amount) -> Vec<Stack> {
    let mut stacks: Vec<Stack> = Vec::new();
    for &depth in depths {
        for &op in ops.iter().filter(|&&op| op != Op::Boot) {
            let op = if depth == 1 && op == Op::Hypercall {
                Op::KvmHypercall
            } else {
                op
            };
            let Some(level) = depth.checked_sub(op.depth(0)).filter(|&level| level > 0) else {
                continue;
            };
            // Too long for deeper levels, and nothing is learned there in another way.
            if level > 1 && op.phase().is_some() {
                continue;
            }
            let at = stacks
                .iter()
                .position(|stack| stack.level == level)
                .unwrap_or_else(|| {
                    stacks.push(Stack {
                        level,
                        specs: Vec::new(),
                        cost: 0.0,
                    });
                    stacks.len() - 1
                });
            for spec in specs(op, level, patterns, amount) {
                if !stacks[at].specs.contains(&spec) {
                    // One pass of touches does not count.
                    let passes = spec.passes + u32::from(op.is_touch());
                    stacks[at].cost += cost(op, level) * spec.count as f64 * passes as f64;
                    stacks[at].specs.push(spec);
                }
            }
        }
    }
    stacks.sort_by_key(|stack| stack.level);
    for stack in &mut stacks {
        stack.specs.sort_by_key(|spec| (spec.op, spec.pattern));
    }
    stacks
}

fn specs(op: Op, level: u32, patterns: &[Pattern], amount: Amount) -> Vec<OpSpec> {
    let Amount {
        scale,
        pages: wanted,
    } = amount;
    if !op.is_touch() {
        let affordable = BUDGET / cost(op, level);
        let count = (affordable.clamp(SAMPLES.0, SAMPLES.1) * scale).clamp(1.0, 4096.0);
        return vec![OpSpec {
            op,
            pattern: None,
            count: count as u32,
            passes: 1,
        }];
    }
    let pages = wanted.unwrap_or_else(|| pages(op, level));
    let affordable = MORE_PASSES / (cost(op, level) * pages as f64);
    let passes = (affordable.clamp(PASSES.0, PASSES.1) * scale).max(1.0) as u32;
    let spec = |&pattern| OpSpec {
        op,
        pattern: Some(pattern),
        count: pages,
        passes,
    };
    patterns.iter().map(spec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_execute_one_level_deeper() {
        let stacks = stacks(
            &[Op::Hypercall, Op::Cpuid],
            &[1, 2, 3],
            &[],
            Amount::default(),
        );
        let levels: Vec<_> = stacks
            .iter()
            .map(|stack| {
                (
                    stack.level,
                    stack.specs.iter().map(|s| s.op).collect::<Vec<_>>(),
                )
            })
            .collect();
        assert_eq!(
            levels,
            [
                (1, vec![Op::Hypercall, Op::KvmHypercall, Op::Cpuid]),
                (2, vec![Op::Hypercall, Op::Cpuid]),
                (3, vec![Op::Cpuid]),
            ]
        );
    }

    #[test]
    fn deeper_takes_fewer_samples() {
        let stacks = stacks(&[Op::Cpuid], &[1, 2, 3, 4], &[], Amount::default());
        let counts: Vec<_> = stacks.iter().map(|stack| stack.specs[0].count).collect();
        assert!(counts.is_sorted_by(|a, b| a >= b), "{counts:?}");
        assert!(counts[3] >= 9);
    }

    #[test]
    fn touches_come_in_every_pattern() {
        let stacks = stacks(&[Op::TouchCold], &[2], &Pattern::EVERY, Amount::default());
        assert_eq!(stacks[0].specs.len(), Pattern::EVERY.len());
        assert!(stacks[0].specs.iter().all(|spec| spec.count == PAGES));
        assert!(stacks[0].specs.iter().all(|spec| spec.passes >= 2));
    }

    #[test]
    fn deeper_touches_fewer_pages() {
        let every = stacks(
            &[Op::TouchCold],
            &[1, 2, 3, 4],
            &[Pattern::Sequential],
            Amount::default(),
        );
        let counts: Vec<_> = every.iter().map(|stack| stack.specs[0].count).collect();
        assert_eq!(counts, [2048, 2048, 512, 128]);
        let amount = Amount {
            pages: Some(64),
            ..Amount::default()
        };
        let chosen = stacks(&[Op::TouchCold], &[3], &[Pattern::Sequential], amount);
        assert_eq!(chosen[0].specs[0].count, 64);
    }

    #[test]
    fn what_is_measured_is_known_before() {
        let patterns = [Pattern::Sparse];
        let ops = [Op::Hypercall, Op::TouchCold];
        let stacks = stacks(&ops, &[1, 2], &patterns, Amount::default());
        let measured = |op: Op, depth, pattern: Option<Pattern>| {
            let row = Row {
                op: op.name().into(),
                depth,
                config: "stock".into(),
                pattern: pattern.map(|pattern| pattern.name().into()),
                instructions: Default::default(),
                l0_exits: None,
                disturbed: 0,
                resident_kib: None,
            };
            stacks.iter().any(|stack| stack.measures(&row))
        };
        assert!(measured(Op::KvmHypercall, 1, None) && measured(Op::Hypercall, 2, None));
        assert!(!measured(Op::Hypercall, 1, None) && !measured(Op::Cpuid, 2, None));
        assert!(measured(Op::TouchCold, 2, Some(Pattern::Sparse)));
        assert!(!measured(Op::TouchCold, 2, Some(Pattern::Random)));
        assert!(!measured(Op::TouchCold, 3, Some(Pattern::Sparse)));
    }

    #[test]
    fn boots_are_not_the_payloads() {
        assert_eq!(stacks(&[Op::Boot], &[2], &[], Amount::default()), []);
    }
}
