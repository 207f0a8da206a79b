// SPDX-License-Identifier: GPL-2.0-or-later
//! `matryoshka status` and `matryoshka set`: the module through sysfs.

use clap::Args;
use comfy_table::{presets, CellAlignment, Table};
use serde_json::json;
use vmm::module::{Module, PathStatus};
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
    /// Path, or `all` for the mode of every path that works on this kernel
    path: String,
    /// off, on or check; or the name of a knob
    mode_or_knob: String,
    /// The knob's new value
    value: Option<String>,
}

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
    complain(e);
    Code::Failed
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
    let mut text: Vec<String> = attributes
        .iter()
        .map(|(k, v)| format!("{k}: {v}"))
        .collect();
    text.push(String::new());
    text.push(path_table(&paths).to_string());
    Ok(text.join("\n"))
}

/// A table with a row for each path and a column for each of their values.
fn path_table(paths: &[PathStatus]) -> Table {
    let mut columns: Vec<&str> = Vec::new();
    for key in paths.iter().flat_map(|p| p.values.keys()) {
        if !columns.contains(&key.as_str()) {
            columns.push(key);
        }
    }
    let mut t = table();
    t.set_header(
        ["path", "mode", "state"]
            .into_iter()
            .chain(columns.iter().copied()),
    );
    for p in paths {
        let values = columns.iter().map(|c| match p.values.get(*c) {
            // Some attributes have a line for each of several things.
            Some(v) => v.replace('\n', ", "),
            None => "-".into(),
        });
        t.add_row(
            [p.name.clone(), p.mode.clone(), p.state.clone()]
                .into_iter()
                .chain(values),
        );
    }
    for c in t.column_iter_mut().skip(3) {
        c.set_cell_alignment(CellAlignment::Right);
    }
    t
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
        None if ["off", "on", "check"].contains(&args.mode_or_knob.as_str()) => {
            ("mode", args.mode_or_knob.as_str())
        }
        None => {
            complain(format!(
                "{:?} is no mode (off, on, check); if it is a knob of the path, its value is missing",
                args.mode_or_knob
            ));
            return Code::Usage;
        }
    };
    let done = match (args.path.as_str(), attribute) {
        ("all", "mode") => module.set_all(value),
        ("all", _) => {
            complain("knobs belong to one path; `all` takes a mode only");
            return Code::Usage;
        }
        (path, attribute) => module.set(path, attribute, value),
    };
    match done {
        Ok(()) => Code::Ok,
        Err(e) => failed(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn table_has_a_column_for_every_value() {
        let p = |name: &str, values: &[(&str, &str)]| PathStatus {
            name: name.into(),
            mode: "on".into(),
            state: "ready".into(),
            values: values
                .iter()
                .map(|(k, v)| (k.to_string(), v.to_string()))
                .collect::<BTreeMap<_, _>>(),
        };
        let t = path_table(&[p("a", &[("taken", "12")]), p("b", &[("knob", "3")])]).to_string();
        let lines: Vec<&str> = t.lines().collect();
        assert_eq!(
            lines[0].split_whitespace().collect::<Vec<_>>(),
            ["path", "mode", "state", "taken", "knob"]
        );
        assert_eq!(
            lines[1].split_whitespace().collect::<Vec<_>>(),
            ["a", "on", "ready", "12", "-"]
        );
        assert_eq!(
            lines[2].split_whitespace().collect::<Vec<_>>(),
            ["b", "on", "ready", "-", "3"]
        );
    }
}
