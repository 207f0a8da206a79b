// SPDX-License-Identifier: GPL-2.0-or-later
//! Are these the counts of last time?

use crate::report::{Counts, Report, Row};

/// What a comparison found.
#[derive(Debug, Default, PartialEq)]
pub struct Comparison {
    /// Rows within the tolerance.
    pub same: usize,
    /// A line for each that is not.
    pub differences: Vec<String>,
    /// Names of recorded rows that were asked for and not measured now.
    pub lost: Vec<String>,
    /// Names of recorded rows that were not asked for.
    pub missing: Vec<String>,
    /// Names of rows measured now that were not recorded.
    pub new: Vec<String>,
    /// What is counted now and what was, if that is not the same.
    pub units: Option<String>,
}

impl Comparison {
    /// Whether all that was asked for is as recorded, and anything was.
    pub fn agrees(&self) -> bool {
        self.same > 0 && self.differences.is_empty() && self.lost.is_empty() && self.units.is_none()
    }
}

/// Counts are those of one kernel: an error if the record is another's.
pub fn same_kernel(then: &Report, kernel: &str) -> Result<(), String> {
    match then.kernel == kernel {
        true => Ok(()),
        false => Err(format!(
            "the record is of kernel {}, and this is {kernel}: record it anew (--record)",
            then.kernel
        )),
    }
}

/// A count may always differ by this much: below it a per cent is less than one instruction.
const SLACK: u64 = 2;

/// How `row` is called in a message.
pub fn title(row: &Row) -> String {
    let pattern = row
        .pattern
        .as_deref()
        .map(|pattern| format!(" {pattern}"))
        .unwrap_or_default();
    format!("{}{pattern} at depth {}, {}", row.op, row.depth, row.config)
}

/// Per cent by which `now` is off `then`; nothing if it is by no more than `slack` instructions.
fn off(now: u64, then: u64, slack: u64) -> f64 {
    if now.abs_diff(then) <= slack {
        return 0.0;
    }
    100.0 * (now as f64 - then as f64) / (then.max(1) as f64)
}

/// The difference between two measurements of the same, if it is over `tolerance` per cent of the
/// minimum and over `slack` instructions, or over as much of the exits.
pub fn difference(now: &Row, then: &Row, tolerance: f64, slack: u64) -> Option<String> {
    let Counts { min, .. } = now.instructions;
    let before = then.instructions.min;
    let instructions = off(min, before, slack);
    if instructions.abs() > tolerance {
        return Some(format!(
            "{}: {min} against {before} ({instructions:+.2} %)",
            title(now)
        ));
    }
    let (exits, before) = (now.l0_exits?, then.l0_exits?);
    let apart = (exits - before).abs();
    (apart > before * tolerance / 100.0 && apart > 0.002)
        .then(|| format!("{}: {exits} exits into L0 against {before}", title(now)))
}

/// Compares what was measured with what was recorded; `asked` says which rows there should be. Without any tolerance there is no
/// slack either.
pub fn compare(
    now: &Report,
    then: &Report,
    asked: impl Fn(&Row) -> bool,
    tolerance: f64,
) -> Comparison {
    let mut result = Comparison::default();
    if now.unit != then.unit {
        result.units = Some(format!("{} now, {} in the record", now.unit, then.unit));
    }
    let slack = if tolerance > 0.0 { SLACK } else { 0 };
    for row in &now.rows {
        match then.rows.iter().find(|old| old.key() == row.key()) {
            None => result.new.push(title(row)),
            Some(old) => match difference(row, old, tolerance, slack) {
                None => result.same += 1,
                Some(line) => result.differences.push(line),
            },
        }
    }
    for old in &then.rows {
        if now.rows.iter().all(|row| row.key() != old.key()) {
            match asked(old) {
                true => result.lost.push(title(old)),
                false => result.missing.push(title(old)),
            }
        }
    }
    result
}
