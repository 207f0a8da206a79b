// SPDX-License-Identifier: GPL-2.0-or-later
//! The results as data: schema 1 of out/bench.json.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

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
    /// Writes it, one row a line, so that a recorded file can be read in a diff. A file that is there is replaced when the new one
    /// is whole.
    pub fn write(&self, file: &Path) -> Result<(), String> {
        let why = |error: &dyn std::fmt::Display| format!("{}: {error}", file.display());
        let text = self.to_json().map_err(|error| why(&error))?;
        replace(file, text.as_bytes()).map_err(|error| why(&error))
    }

    /// Whether [`Report::write`] will be able to write this file, as far as can be told before there is anything to write.
    pub fn can_write(file: &Path) -> Result<(), String> {
        let part = place(file).and_then(|place| match place {
            Place::Open => Ok(()),
            Place::Name { part, .. } => fresh(&part).and_then(|_| fs::remove_file(part)),
        });
        part.map_err(|error| {
            let file = file.display();
            format!("{file} cannot be written: {error}; name a place that can be")
        })
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

/// How a file comes to its contents.
enum Place {
    /// It is no file but a terminal, a pipe or the like: by writing to it.
    Open,
    /// By another one, `part`, which then gets its name.
    Name { part: PathBuf, name: PathBuf },
}

/// Makes the directory of `file` if there is none, and finds out what `file` is.
fn place(file: &Path) -> io::Result<Place> {
    let parent = |file: &Path| match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    fs::create_dir_all(parent(file))?;
    let name = match fs::metadata(file) {
        Ok(data) if data.is_dir() => return Err(io::ErrorKind::IsADirectory.into()),
        Ok(data) if !data.is_file() => return Ok(Place::Open),
        // A link stays one.
        Ok(_) => fs::canonicalize(file)?,
        Err(_) => file.to_owned(),
    };
    let Some(last) = name.file_name() else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let own = format!(".{}.{}.part", last.to_string_lossy(), std::process::id());
    let part = parent(&name).join(own);
    Ok(Place::Name { part, name })
}

/// Makes a file anew, and follows no link.
fn fresh(part: &Path) -> io::Result<File> {
    // A process of that number may have been interrupted.
    let _ = fs::remove_file(part);
    File::create_new(part)
}

/// Gives the file these contents, at once.
fn replace(file: &Path, bytes: &[u8]) -> io::Result<()> {
    let (part, name) = match place(file)? {
        Place::Open => return fs::write(file, bytes),
        Place::Name { part, name } => (part, name),
    };
    let written = fresh(&part).and_then(|mut new| {
        if let Ok(old) = fs::metadata(&name) {
            new.set_permissions(old.permissions())?;
        }
        new.write_all(bytes)?;
        new.sync_all()?;
        fs::rename(&part, &name)
    });
    if written.is_err() {
        // What is said is why it could not be written.
        let _ = fs::remove_file(&part);
    }
    written
}

fn lines(rows: &[Row]) -> serde_json::Result<String> {
    let rows: Result<Vec<_>, _> = rows.iter().map(serde_json::to_string).collect();
    Ok(format!("[\n {}\n]", rows?.join(",\n ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(tag: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("mtk-report-{tag}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn a_file_is_replaced_as_a_whole() {
        let dir = directory("replace");
        let (file, link) = (dir.join("new/counts.json"), dir.join("link"));
        replace(&file, b"one").unwrap();
        let old = File::open(&file).unwrap();
        std::os::unix::fs::symlink("new/counts.json", &link).unwrap();
        replace(&link, b"two").unwrap();
        assert_eq!(io::read_to_string(old).unwrap(), "one");
        assert_eq!(fs::read(&file).unwrap(), b"two");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_dir(dir.join("new")).unwrap().count(), 1);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn what_cannot_be_written_is_known_early() {
        let dir = directory("early");
        let file = dir.join("new/counts.json");
        Report::can_write(&file).unwrap();
        assert_eq!(fs::read_dir(dir.join("new")).unwrap().count(), 0);
        fs::write(&file, "kept").unwrap();
        Report::can_write(&file).unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"kept");
        Report::can_write(Path::new("/dev/null")).unwrap();
        for bad in [
            file.join("in-a-file"),
            dir.join("new"),
            "/proc/x.json".into(),
        ] {
            let why = Report::can_write(&bad).unwrap_err();
            assert!(why.contains("cannot be written"), "{why}");
        }
        fs::remove_dir_all(dir).unwrap();
    }
}
