// SPDX-License-Identifier: GPL-2.0-or-later
//! The results as data: schema 1 of out/bench.json.

use std::fs;
use std::path::Path;

use protocol::{Config, Op, Pattern};
use serde::{Deserialize, Serialize};

/// Version of the JSON's layout.
pub const SCHEMA: u32 = 1;

/// A whole run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Release of L0's kernel.
    pub kernel: String,
    /// The emulator, or `none`.
    pub emulator: String,
    /// Model name of L0's processor.
    pub cpu_model: String,
    /// What is counted.
    pub unit: String,
    /// One for each operation, depth, pattern and configuration.
    pub rows: Vec<Row>,
    /// Stock, measured a second time at the end of each stack.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stock_again: Vec<Row>,
}

/// One result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Name of the operation.
    pub op: String,
    /// The level that executed it.
    pub depth: u32,
    /// Name of the configuration.
    pub config: String,
    /// Order of the pages, for touch operations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pattern: Option<String>,
    /// Counts per operation; per page for touch operations.
    pub instructions: Counts,
    /// Exits into L0 per operation; absent where they cannot be counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub l0_exits: Option<f64>,
    /// Samples set aside because something else fell into them.
    #[serde(default)]
    pub disturbed: u32,
    /// Resident memory of L0's VMM in KiB after this was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resident_kib: Option<u64>,
}

/// Minimum, median and maximum of the undisturbed samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Least.
    pub min: u64,
    /// Median.
    pub median: u64,
    /// Most.
    pub max: u64,
    /// Samples; pages of all passes for touch operations.
    pub n: u32,
    /// Most of any sample, the disturbed included.
    #[serde(default)]
    pub worst: u64,
}

/// What names a row.
pub type Key<'a> = (&'a str, u32, Option<&'a str>, &'a str);

impl Row {
    /// What names it: operation, depth, pattern, configuration.
    pub fn key(&self) -> Key<'_> {
        (&self.op, self.depth, self.pattern.as_deref(), &self.config)
    }

    /// Order of a report.
    pub fn order(&self) -> impl Ord {
        let pattern = self.pattern.as_deref().and_then(Pattern::from_name);
        (
            Op::from_name(&self.op),
            self.depth,
            pattern,
            Config::from_name(&self.config),
        )
    }
}

impl From<&protocol::Row> for Row {
    fn from(row: &protocol::Row) -> Row {
        Row {
            op: row.op.name().into(),
            depth: row.depth,
            config: row.config.name().into(),
            pattern: row.pattern.map(|pattern| pattern.name().into()),
            instructions: Counts {
                min: row.min,
                median: row.median,
                max: row.max,
                n: row.n,
                worst: row.worst,
            },
            l0_exits: row.exits_milli.map(|milli| milli as f64 / 1000.0),
            disturbed: row.disturbed,
            resident_kib: None,
        }
    }
}

impl Report {
    /// Writes it, one row a line, so that a recorded file can be read in a diff.
    pub fn write(&self, file: &Path) -> Result<(), String> {
        let why = |error: &dyn std::fmt::Display| format!("{}: {error}", file.display());
        let text = self.to_json().map_err(|error| why(&error))?;
        if let Some(directory) = file
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
        {
            fs::create_dir_all(directory).map_err(|error| why(&error))?;
        }
        fs::write(file, text).map_err(|error| why(&error))
    }

    /// The JSON text.
    pub fn to_json(&self) -> serde_json::Result<String> {
        let head = Report {
            rows: Vec::new(),
            stock_again: Vec::new(),
            ..self.clone()
        };
        let head = serde_json::to_string(&head)?;
        let mut text = head.strip_suffix("[]}").unwrap_or(&head).to_owned();
        text.push_str(&lines(&self.rows)?);
        if !self.stock_again.is_empty() {
            text.push_str(",\n\"stock_again\":");
            text.push_str(&lines(&self.stock_again)?);
        }
        text.push_str("}\n");
        Ok(text)
    }

    /// Reads one back.
    pub fn read(file: &Path) -> Result<Report, String> {
        let why = |error: &dyn std::fmt::Display| format!("{}: {error}", file.display());
        let text = fs::read_to_string(file).map_err(|error| why(&error))?;
        let report: Report = serde_json::from_str(&text).map_err(|error| why(&error))?;
        match report.schema {
            SCHEMA => Ok(report),
            other => Err(why(&format!(
                "schema {other}; this program knows {SCHEMA}: record it anew"
            ))),
        }
    }
}

fn lines(rows: &[Row]) -> serde_json::Result<String> {
    let rows: Result<Vec<_>, _> = rows.iter().map(serde_json::to_string).collect();
    Ok(format!("[\n {}\n]", rows?.join(",\n ")))
}
