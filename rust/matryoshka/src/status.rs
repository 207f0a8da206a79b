// SPDX-License-Identifier: GPL-2.0-or-later
//! `matryoshka status` and `matryoshka set`: the module through sysfs.

use std::collections::BTreeMap;

use clap::Args;
use comfy_table::{presets, CellAlignment, Table};
use serde_json::json;
use vmm::module::{Module, PathStatus, Settled};
use vmm::Error;

use crate::{complain, Code};

/// Show the module: version, whether it fits this kernel, and its paths with their modes and
/// counters.
#[derive(Args, Debug)]
pub struct StatusArgs {
    /// Print JSON instead of tables
    #[arg(long)]
    json: bool,
}

const SET_EXAMPLES: &str = "Examples:
  matryoshka set checks on          the path `checks` does the work
  matryoshka set checks check       stock KVM does, and the path's answer is compared with it
  matryoshka set all off            stock behaviour everywhere
  matryoshka set fields window 16   a knob of a path; `matryoshka status` lists them";

/// Set a path's mode, or one of its knobs.
#[derive(Args, Debug)]
#[command(after_help = SET_EXAMPLES)]
pub struct SetArgs {
    /// Path, or `all` for the mode of every path that can work here
    path: String,
    /// off, on or check; or the name of a knob
    mode_or_knob: String,
    /// The knob's new value
    value: Option<String>,
}

/// The modes of a path.
const MODES: [&str; 3] = ["off", "on", "check"];

/// The module, or the message for its absence.
pub fn module() -> Result<Module, Code> {
    let m = Module::default();
    if m.present() {
        return Ok(m);
    }
    complain(
        "the module is not loaded: /sys/kernel/matryoshka is not there\n  load it with `modprobe matryoshka` (or \
         insmod matryoshka.ko); `matryoshka doctor` says whether this kernel can take it",
    );
    Err(Code::NoModule)
}

/// An error from sysfs: what it says, and the status it ends with.
pub fn failed(e: Error) -> Code {
    let code = match e {
        Error::Usage(_) => Code::Usage,
        _ => Code::Failed,
    };
    complain(e);
    code
}

/// Runs `status`.
pub fn status(args: StatusArgs) -> Code {
    let module = match module() {
        Ok(m) => m,
        Err(code) => return code,
    };
    match show(&module, args.json) {
        Ok(text) => {
            println!("{text}");
            Code::Ok
        }
        Err(e) => failed(e),
    }
}

fn show(module: &Module, as_json: bool) -> vmm::Result<String> {
    let attributes = module.attributes()?;
    let paths = module.paths()?;
    if as_json {
        let v = json!({ "schema": 1, "module": attributes, "paths": paths });
        return serde_json::to_string_pretty(&v).map_err(|e| Error::Module(e.to_string()));
    }
    let mut text = module_lines(&attributes);
    text.push(String::new());
    text.push(path_table(&paths).to_string());
    let more: Vec<String> = paths.iter().filter_map(path_line).collect();
    if !more.is_empty() {
        text.push(String::new());
        text.extend(more);
    }
    Ok(text.join("\n"))
}

/// What the module says of itself, for humans: a table of all hooks with their addresses is nothing for them.
fn module_lines(attributes: &BTreeMap<String, String>) -> Vec<String> {
    attributes
        .iter()
        .filter(|(name, _)| *name != "hooks")
        .map(|(name, value)| {
            match (
                name.as_str(),
                &value.split_whitespace().collect::<Vec<_>>()[..],
            ) {
                ("vcpus", [count, bytes, most]) => {
                    format!("vcpus: {count} vCPUs, {bytes} bytes each, at most {most}")
                }
                _ => format!("{name}: {value}"),
            }
        })
        .collect()
}

/// The counters that every path has.
const COUNTERS: [&str; 4] = ["taken", "checked", "mismatches", "saved_exits"];

/// A table with a row for each path and a column for each counter.
fn path_table(paths: &[PathStatus]) -> Table {
    let mut t = table();
    t.set_header(["path", "mode", "state"].into_iter().chain(COUNTERS));
    for p in paths {
        let values = COUNTERS.map(|c| p.values.get(c).map_or("-", String::as_str));
        t.add_row([&*p.name, &*p.mode, &*p.state].into_iter().chain(values));
    }
    for c in t.column_iter_mut().skip(3) {
        c.set_cell_alignment(CellAlignment::Right);
    }
    t
}

/// Why a path left calls to the stock code, as far as it did, counters that it alone has, and how its knobs are set; nothing if
/// there is nothing to say.
fn path_line(p: &PathStatus) -> Option<String> {
    let reasons = p.values.get("fallbacks").map_or("", String::as_str);
    let reasons: Vec<&str> = reasons.lines().filter(|l| !l.ends_with(" 0")).collect();
    let others = |knobs: bool| -> Vec<String> {
        p.values
            .iter()
            .filter(|(name, _)| *name != "fallbacks" && !COUNTERS.contains(&name.as_str()))
            .filter(|(name, _)| p.knobs.contains(*name) == knobs)
            .map(|(name, value)| match value.as_str() {
                "" => format!("{name} none"),
                value => format!("{name} {}", value.replace('\n', " ")),
            })
            .collect()
    };
    let (counters, knobs) = (others(false), others(true));
    let mut parts = Vec::new();
    if !reasons.is_empty() {
        parts.push(format!("fallbacks {}", reasons.join(", ")));
    }
    if !counters.is_empty() {
        parts.push(format!("counters {}", counters.join(", ")));
    }
    if !knobs.is_empty() {
        parts.push(format!("knobs {}", knobs.join(", ")));
    }
    (!parts.is_empty()).then(|| format!("{}: {}", p.name, parts.join("; ")))
}

/// A table in the tool's style.
pub fn table() -> Table {
    let mut t = Table::new();
    t.load_preset(presets::NOTHING);
    t
}

/// Runs `set`.
pub fn set(args: SetArgs) -> Code {
    let module = match module() {
        Ok(m) => m,
        Err(code) => return code,
    };
    let (attribute, value) = match &args.value {
        Some(v) => (args.mode_or_knob.as_str(), v.as_str()),
        None if MODES.contains(&args.mode_or_knob.as_str()) => ("mode", args.mode_or_knob.as_str()),
        None => {
            complain(format!(
                "{:?} is no mode (off, on, check); if it is a knob of the path, its value is missing",
                args.mode_or_knob
            ));
            return Code::Usage;
        }
    };
    match (args.path.as_str(), attribute) {
        ("all", "mode") if MODES.contains(&value) => match module.set_all(value) {
            Ok(settled) => all_set(&settled),
            Err(e) => failed(e),
        },
        ("all", "mode") => {
            complain(format!("{value:?} is no mode (off, on, check)"));
            Code::Usage
        }
        ("all", _) => {
            complain("knobs belong to one path; `all` takes a mode only");
            Code::Usage
        }
        (path, attribute) => match module.set(path, attribute, value) {
            Ok(()) => Code::Ok,
            Err(e) => failed(e),
        },
    }
}

/// Says which paths have not taken a mode, and whether that is a failure.
fn all_set(settled: &Settled) -> Code {
    for why in &settled.refused {
        complain(why);
    }
    let what = if settled.taken > 0 { "note: " } else { "" };
    for why in &settled.unable {
        complain(format!("{what}{why}"));
    }
    match settled.good() {
        true => Code::Ok,
        false => Code::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(name: &str, values: &[(&str, &str)]) -> PathStatus {
        PathStatus {
            name: name.into(),
            mode: "on".into(),
            state: "ready".into(),
            values: map(values),
            knobs: ["pinned", "window"].map(String::from).into(),
        }
    }

    fn map(values: &[(&str, &str)]) -> BTreeMap<String, String> {
        let own = |(k, v): &(&str, &str)| (k.to_string(), v.to_string());
        values.iter().map(own).collect()
    }

    #[test]
    fn table_has_a_column_for_every_counter() {
        let all = [("taken", "12"), ("checked", "3"), ("window", "32")];
        let t = path_table(&[path("a", &all), path("b", &[("saved_exits", "4")])]).to_string();
        let rows: Vec<Vec<&str>> = t.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(rows[0][..3], ["path", "mode", "state"]);
        assert_eq!(rows[0][3..], COUNTERS);
        assert_eq!(rows[1], ["a", "on", "ready", "12", "3", "-", "-"]);
        assert_eq!(rows[2], ["b", "on", "ready", "-", "-", "-", "4"]);
    }

    #[test]
    fn a_path_says_only_what_there_is_to_say() {
        let fallbacks = ("fallbacks", "dirty 0\nevents 10\nother 3");
        let p = path(
            "a",
            &[
                ("taken", "1"),
                fallbacks,
                ("pinned", ""),
                ("reentered", "7"),
                ("window", "32"),
            ],
        );
        let line =
            "a: fallbacks events 10, other 3; counters reentered 7; knobs pinned none, window 32";
        assert_eq!(path_line(&p).as_deref(), Some(line));
        assert_eq!(
            path_line(&path("b", &[("taken", "1"), ("fallbacks", "")])),
            None
        );
    }

    #[test]
    fn all_is_well_if_the_rest_cannot_work_here() {
        let settled = |taken, unable, refused| Settled {
            taken,
            unable: vec![String::new(); unable],
            refused: vec![String::new(); refused],
        };
        assert_eq!(all_set(&settled(2, 0, 0)), Code::Ok);
        assert_eq!(all_set(&settled(1, 1, 0)), Code::Ok);
        assert_eq!(all_set(&settled(0, 2, 0)), Code::Failed);
        assert_eq!(all_set(&settled(1, 0, 1)), Code::Failed);
    }

    #[test]
    fn humans_get_no_addresses() {
        let lines = module_lines(&map(&[
            ("hooks", "kvm f known off 0 0x0"),
            ("vcpus", "2 4096 65536"),
            ("version", "0.1.0"),
        ]));
        assert_eq!(
            lines,
            [
                "vcpus: 2 vCPUs, 4096 bytes each, at most 65536",
                "version: 0.1.0"
            ]
        );
    }
}
