// SPDX-License-Identifier: GPL-2.0-or-later
//! What holds for any samples, rows and reports, not only for those of one machine.

use bench::compare::{compare, difference, same_kernel};
use bench::report::{Counts, Report, Row, SCHEMA};
use proptest::prelude::*;
use protocol::{stats, Config, Line, Op, OpSpec, Pattern, Sample};

fn samples() -> impl Strategy<Value = Vec<Sample>> {
    let sample = (1u64..1 << 40, 0u64..6).prop_map(|(ticks, exits)| Sample { ticks, exits });
    prop::collection::vec(sample, 1..200)
}

fn payload_row() -> impl Strategy<Value = protocol::Row> {
    let names = (
        prop::sample::select(&Op::EVERY[..]),
        prop::sample::select(&Config::EVERY[..]),
        prop::option::of(prop::sample::select(&Pattern::EVERY[..])),
    );
    let numbers = (
        any::<[u64; 4]>(),
        any::<[u32; 4]>(),
        any::<u16>(),
        any::<Option<u64>>(),
    );
    (names, numbers).prop_map(
        |((op, config, pattern), (wide, small, round, exits_milli))| protocol::Row {
            op,
            depth: small[0],
            level: small[1],
            config,
            round,
            pattern,
            min: wide[0],
            median: wide[1],
            max: wide[2],
            n: small[2],
            disturbed: small[3],
            worst: wide[3],
            exits_milli,
        },
    )
}

fn row(min: u64, exits: Option<f64>) -> Row {
    Row {
        op: "cpuid".into(),
        depth: 1,
        config: "stock".into(),
        pattern: None,
        instructions: Counts {
            min,
            median: min,
            max: min,
            n: 1,
            worst: min,
        },
        l0_exits: exits,
        disturbed: 0,
        resident_kib: None,
    }
}

fn report(rows: Vec<Row>) -> Report {
    Report {
        schema: SCHEMA,
        kernel: "k".into(),
        emulator: "e".into(),
        cpu_model: "\"quoted\"".into(),
        unit: "u".into(),
        rows,
        stock_again: Vec::new(),
    }
}

proptest! {
    #[test]
    fn a_summary_is_ordered_and_loses_no_sample(mut set in samples(), ticks in 0u64..1000) {
        let count = set.len();
        let largest = set.iter().map(|sample| sample.ticks).max().unwrap();
        let summary = stats::summarize(&mut set, Sample { ticks, exits: 0 });
        prop_assert!(summary.min <= summary.median && summary.median <= summary.max);
        prop_assert!(summary.max <= summary.worst);
        prop_assert_eq!(summary.worst, largest.saturating_sub(ticks));
        prop_assert_eq!((summary.n + summary.disturbed) as usize, count);
        prop_assert!(summary.n >= 1);
    }

    #[test]
    fn the_order_of_samples_does_not_matter(set in samples(), seed in any::<u64>()) {
        let mut one = set.clone();
        let mut other = set;
        let turn = (seed % other.len() as u64) as usize;
        other.rotate_left(turn);
        let none = Sample::default();
        prop_assert_eq!(stats::summarize(&mut one, none), stats::summarize(&mut other, none));
    }

    #[test]
    fn a_few_interrupts_change_nothing(ticks in 1u64..1 << 30, extra in 1u64..1 << 30,
                                       disturbed in 1usize..10) {
        let clean = vec![Sample { ticks, exits: 4 }; 21];
        let mut noisy = clean.clone();
        noisy.extend(vec![Sample { ticks: ticks + extra, exits: 5 }; disturbed]);
        let a = stats::summarize(&mut clean.clone(), Sample::default());
        let b = stats::summarize(&mut noisy, Sample::default());
        prop_assert_eq!((a.min, a.median, a.max, a.n), (b.min, b.median, b.max, b.n));
        prop_assert_eq!(b.disturbed as usize, disturbed);
    }

    #[test]
    fn every_row_survives_the_console(row in payload_row(), noise in "[ -~]{0,40}") {
        prop_assume!(!noise.contains("MTK "));
        let line = format!("{noise}{row}\r");
        prop_assert_eq!(Line::parse(&line), Line::Row(row));
    }

    #[test]
    fn no_line_upsets_the_parser(line in "\\PC*") {
        let _ = Line::parse(&line);
        let _ = Line::parse(&format!("MTK {line}"));
        let _ = Line::parse(&format!("MTK row {line}"));
        let _ = OpSpec::parse(&line);
    }

    #[test]
    fn a_report_is_read_back(rows in prop::collection::vec(payload_row(), 0..20)) {
        let before = report(rows.iter().map(Row::from).collect());
        let after: Report = serde_json::from_str(&before.to_json().unwrap()).unwrap();
        prop_assert_eq!(after.rows.len(), before.rows.len());
        for (a, b) in after.rows.iter().zip(&before.rows) {
            prop_assert_eq!(a.key(), b.key());
            prop_assert_eq!(a.instructions, b.instructions);
        }
        prop_assert_eq!(after.cpu_model, before.cpu_model);
    }

    #[test]
    fn what_is_equal_never_differs(min in any::<u64>(), exits in prop::option::of(0f64..1e6)) {
        prop_assert_eq!(difference(&row(min, exits), &row(min, exits), 1e-9, 2), None);
    }

    #[test]
    fn over_the_tolerance_is_told(min in 1000u64..1 << 40, percent in 2u64..50) {
        let slower = row(min + min * percent / 100 + 1, None);
        prop_assert!(difference(&slower, &row(min, None), 1.0, 2).is_some());
        prop_assert_eq!(difference(&slower, &row(min, None), 100.0, 2), None);
        let all = |_: &Row| true;
        let found = compare(&report(vec![slower]), &report(vec![row(min, None)]), all, 1.0);
        prop_assert_eq!((found.same, found.differences.len()), (0, 1));
        prop_assert!(!found.agrees());
    }

    #[test]
    fn without_tolerance_one_is_too_much(min in 1u64..1 << 40) {
        let (then, all) = (report(vec![row(min, None)]), |_: &Row| true);
        prop_assert!(compare(&then, &then, all, 0.0).agrees());
        let more = report(vec![row(min + 1, None)]);
        prop_assert!(!compare(&more, &then, all, 0.0).agrees());
    }
}

#[test]
fn rows_that_only_one_side_has_are_named() {
    let mut deeper = row(5, None);
    deeper.depth = 2;
    let (now, then) = (report(vec![deeper.clone()]), report(vec![row(5, None)]));
    let found = compare(&now, &then, |row| row.depth == 2, 1.0);
    assert_eq!(found.missing, ["cpuid at depth 1, stock"]);
    assert_eq!(found.new, ["cpuid at depth 2, stock"]);
    assert!(found.differences.is_empty() && found.lost.is_empty());
    assert!(!found.agrees(), "nothing matched");

    // With something that matches it is enough, unless the other one had been asked for.
    let now = report(vec![row(5, None)]);
    let then = report(vec![row(5, None), deeper]);
    assert!(compare(&now, &then, |row| row.depth == 1, 1.0).agrees());
    let found = compare(&now, &then, |_| true, 1.0);
    assert_eq!(found.lost, ["cpuid at depth 2, stock"]);
    assert!(!found.agrees());
}

#[test]
fn only_the_same_is_compared() {
    let then = report(vec![row(5, None)]);
    let mut now = then.clone();
    now.unit = "other".into();
    let found = compare(&now, &then, |_| true, 1.0);
    assert!(!found.agrees());
    assert_eq!(found.units.as_deref(), Some("other now, u in the record"));
    assert!(same_kernel(&then, "k").is_ok());
    assert!(same_kernel(&then, "other")
        .unwrap_err()
        .contains("--record"));
}
