// SPDX-License-Identifier: GPL-2.0-or-later
//! The lines a payload prints, and reading them back on L0.
//!
//! Results travel as text through the console port of every level, mixed with whatever else those
//! levels print, so each starts with a mark and says all of itself.

use core::fmt;

use crate::command::Config;
use crate::op::{Op, Pattern};

/// Start of every line that is meant for a program.
pub const MARK: &str = "MTK ";

/// The result of one operation in one round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// What was measured.
    pub op: Op,
    /// The level that executed it.
    pub depth: u32,
    /// The level of the payload.
    pub level: u32,
    /// How the module was set.
    pub config: Config,
    /// The round's number, as the command gave it.
    pub round: u16,
    /// Order of the pages, for touch operations.
    pub pattern: Option<Pattern>,
    /// Least ticks; for touch operations per page, of the best pass.
    pub min: u64,
    /// Median of the ticks.
    pub median: u64,
    /// Most ticks.
    pub max: u64,
    /// Undisturbed samples; for touch operations pages of all passes.
    pub n: u32,
    /// Samples set aside.
    pub disturbed: u32,
    /// Most ticks of any sample, those set aside included.
    pub worst: u64,
    /// Thousandths of an exit into L0 per operation; `None` where exits cannot be counted.
    pub exits_milli: Option<u64>,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pattern = self.pattern.map_or("-", Pattern::name);
        write!(
            f,
            "{MARK}row op={} depth={} level={} config={} round={} pattern={pattern} min={} median={} \
             max={} n={} disturbed={} worst={} exits_milli=",
            self.op.name(),
            self.depth,
            self.level,
            self.config.name(),
            self.round,
            self.min,
            self.median,
            self.max,
            self.n,
            self.disturbed,
            self.worst
        )?;
        match self.exits_milli {
            Some(exits) => write!(f, "{exits}"),
            None => f.write_str("-"),
        }
    }
}

/// The boot of a Linux guest, from its first instruction to its init, as its VMM has measured it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boot {
    /// The level that booted.
    pub depth: u32,
    /// Ticks of its VMM's TSC.
    pub ticks: u64,
    /// Exits into L0; `None` where they cannot be counted.
    pub exits: Option<u64>,
}

impl fmt::Display for Boot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{MARK}boot depth={} ticks={} exits=",
            self.depth, self.ticks
        )?;
        match self.exits {
            Some(exits) => write!(f, "{exits}"),
            None => f.write_str("-"),
        }
    }
}

/// A line of the payload, as L0 sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line<'a> {
    /// A result.
    Row(Row),
    /// An operation is starting (for the progress display).
    Start(Op),
    /// A Linux guest is up.
    Boot(Boot),
    /// A line of the correctness log, without mark.
    Test(&'a str),
    /// Something that tests measured, which varies: no part of the log.
    Note(&'a str),
    /// Something went wrong; the text says what.
    Error(&'a str),
    /// A marked line that this version does not know, or cannot read.
    Unknown(&'a str),
    /// Not for a program.
    Text(&'a str),
}

impl<'a> Line<'a> {
    /// Reads a line without its line end. The mark is also found behind other text, since a level's
    /// kernel may have printed part of a line before.
    pub fn parse(line: &'a str) -> Line<'a> {
        let line = line.trim_end_matches(['\r', '\n']);
        let Some((_, marked)) = line.split_once(MARK) else {
            return Line::Text(line);
        };
        let (kind, rest) = marked.split_once(' ').unwrap_or((marked, ""));
        match kind {
            "row" => parse_row(rest).map_or(Line::Unknown(line), Line::Row),
            "start" => Op::from_name(rest).map_or(Line::Unknown(line), Line::Start),
            "boot" => parse_boot(rest).map_or(Line::Unknown(line), Line::Boot),
            "test" => Line::Test(rest),
            "note" => Line::Note(rest),
            "error" => Line::Error(rest),
            _ => Line::Unknown(line),
        }
    }
}

/// The value of `key` in words `key=value`.
fn word<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.split_ascii_whitespace().find_map(|word| {
        let (name, value) = word.split_once('=')?;
        (name == key).then_some(value)
    })
}

fn parse_boot(text: &str) -> Option<Boot> {
    Some(Boot {
        depth: word(text, "depth")?.parse().ok()?,
        ticks: word(text, "ticks")?.parse().ok()?,
        exits: match word(text, "exits")? {
            "-" => None,
            number => Some(number.parse().ok()?),
        },
    })
}

fn parse_row(text: &str) -> Option<Row> {
    let value = |key: &str| word(text, key);
    let number = |key: &str| value(key)?.parse::<u64>().ok();
    let small = |key: &str| value(key)?.parse::<u32>().ok();
    Some(Row {
        op: Op::from_name(value("op")?)?,
        depth: small("depth")?,
        level: small("level")?,
        config: Config::from_name(value("config")?)?,
        round: value("round")?.parse().ok()?,
        pattern: match value("pattern")? {
            "-" => None,
            name => Some(Pattern::from_name(name)?),
        },
        min: number("min")?,
        median: number("median")?,
        max: number("max")?,
        n: small("n")?,
        disturbed: small("disturbed")?,
        worst: number("worst")?,
        exits_milli: match value("exits_milli")? {
            "-" => None,
            _ => Some(number("exits_milli")?),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::format;

    fn row() -> Row {
        Row {
            op: Op::TouchCold,
            depth: 2,
            level: 2,
            config: Config::L0,
            round: 3,
            pattern: Some(Pattern::Strided),
            min: 1,
            median: 2,
            max: 3,
            n: 4,
            disturbed: 5,
            worst: 6,
            exits_milli: Some(1125),
        }
    }

    #[test]
    fn a_row_is_read_back() {
        let text = format!("{}\r\n", row());
        assert_eq!(Line::parse(&text), Line::Row(row()));
        let none = Row {
            exits_milli: None,
            pattern: None,
            ..row()
        };
        assert_eq!(Line::parse(&format!("[    0.1] {none}")), Line::Row(none));
    }

    #[test]
    fn a_damaged_row_is_not_a_row() {
        let text = format!("{}", row());
        for end in 0..text.len() - "=1125".len() {
            assert!(
                !matches!(Line::parse(&text[..end]), Line::Row(_)),
                "{}",
                &text[..end]
            );
        }
    }

    #[test]
    fn other_lines_keep_their_text() {
        assert_eq!(Line::parse("hello"), Line::Text("hello"));
        assert_eq!(Line::parse("MTK test vmxon: ok"), Line::Test("vmxon: ok"));
        assert_eq!(Line::parse("MTK error no VMX"), Line::Error("no VMX"));
        assert_eq!(Line::parse("MTK start cpuid"), Line::Start(Op::Cpuid));
        assert_eq!(Line::parse("MTK future x"), Line::Unknown("MTK future x"));
    }

    #[test]
    fn boots_are_read_back() {
        for exits in [None, Some(7)] {
            let boot = Boot {
                depth: 2,
                ticks: 12,
                exits,
            };
            assert_eq!(Line::parse(&format!("{boot}")), Line::Boot(boot));
        }
        assert!(matches!(
            Line::parse("MTK boot depth=2 ticks=x exits=-"),
            Line::Unknown(_)
        ));
    }
}
