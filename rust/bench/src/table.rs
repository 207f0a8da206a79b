// SPDX-License-Identifier: GPL-2.0-or-later
//! The results for a person.

use std::fmt::Write;

use protocol::Op;

use crate::compare::title;
use crate::report::{Report, Row};

/// The table: each operation's configurations under each other, with what part of stock they cost.
pub fn table(report: &Report) -> String {
    let mut text = String::new();
    let unit = &report.unit;
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "{unit} per operation (touch: per page); kernel {}",
        report.kernel
    );
    let _ = writeln!(
        text,
        "{:<23} {:>5}  {:<6} {:>12} {:>12} {:>9} {:>9}",
        "operation", "depth", "config", "minimum", "median", "L0 exits", "of stock"
    );
    let mut rows: Vec<&Row> = report.rows.iter().collect();
    rows.sort_by_key(|row| row.order());
    let mut last = None;
    for row in &rows {
        let same = |other: &&&Row| {
            (&other.op, other.depth, &other.pattern) == (&row.op, row.depth, &row.pattern)
        };
        let stock = rows
            .iter()
            .find(|other| same(other) && other.config == "stock");
        let head = (row.op.clone(), row.depth, row.pattern.clone());
        let new = last.as_ref() != Some(&head);
        let (name, depth) = match new {
            true => (name(row), row.depth.to_string()),
            false => (String::new(), String::new()),
        };
        last = Some(head);
        let _ = writeln!(
            text,
            "{name:<23} {depth:>5}  {:<6} {:>12} {:>12} {:>9} {:>9}",
            row.config,
            grouped(row.instructions.min),
            grouped(row.instructions.median),
            row.l0_exits.map_or("-".into(), exits),
            match stock {
                Some(stock) if stock.config != row.config => ratio(row, stock),
                _ => String::new(),
            }
        );
    }
    text
}

/// One line about the resident memory of L0's VMM: how much, and the row that is furthest from stock's among
/// those whose guest has known one configuration only (with `separate` all have).
pub fn resident(report: &Report, separate: bool) -> String {
    let mib = |kib: u64| kib as f64 / 1024.0;
    let known = || report.rows.iter().filter_map(|row| row.resident_kib);
    let (Some(least), Some(most)) = (known().min(), known().max()) else {
        return "resident memory of the host's VMM: unknown".into();
    };
    let mut text = format!(
        "resident memory of the host's VMM after each: {:.1} to {:.1} MiB",
        mib(least),
        mib(most)
    );
    // The first stack of a run has 15 to 30 MiB less than any later one, whatever its configuration, so that of stock's
    // two the one that is nearer counts.
    let off = |row: &Row| {
        let now = row.resident_kib? as f64;
        let stock = report.rows.iter().chain(&report.stock_again);
        stock
            .filter(|other| {
                other.config == "stock"
                    && (&other.op, other.depth, &other.pattern)
                        == (&row.op, row.depth, &row.pattern)
            })
            .filter_map(|other| {
                let then = other.resident_kib? as f64;
                Some(100.0 * (now - then) / then.max(1.0))
            })
            .min_by(|a, b| a.abs().total_cmp(&b.abs()))
    };
    let furthest = report
        .rows
        .iter()
        .filter(|row| row.config != "stock" && (separate || row.op == Op::Boot.name()))
        .filter_map(|row| Some((off(row)?, row)))
        .max_by(|(a, _), (b, _)| a.abs().total_cmp(&b.abs()));
    if let Some((off, row)) = furthest {
        let _ = write!(text, "; furthest from stock: {off:+.2} % ({})", title(row));
    }
    text
}

fn name(row: &Row) -> String {
    match row.pattern.as_deref() {
        None | Some("sequential") => row.op.clone(),
        Some(pattern) => format!("{} {}", row.op, &pattern[..pattern.len().min(6)]),
    }
}

fn exits(exits: f64) -> String {
    match exits.fract() == 0.0 {
        true => format!("{exits:.0}"),
        false => format!("{exits:.3}"),
    }
}

fn ratio(row: &Row, stock: &Row) -> String {
    match stock.instructions.min {
        0 if row.instructions.min == 0 => "100.0 %".into(),
        0 => "-".into(),
        least => format!(
            "{:.1} %",
            100.0 * row.instructions.min as f64 / least as f64
        ),
    }
}

/// Thousands apart from each other.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_set_apart() {
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (435_663, "435,663"),
            (28_000_000, "28,000,000"),
        ] {
            assert_eq!(grouped(number), text);
        }
    }
}
