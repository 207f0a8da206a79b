// SPDX-License-Identifier: GPL-2.0-or-later
//! `matryoshka watch`: the counters, live.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;
use vmm::module::PathStatus;

use crate::status::{failed, module, table};
use crate::Code;

/// Show how fast the module's counters move, until Ctrl-C.
#[derive(Args, Debug)]
pub struct WatchArgs {
    /// Seconds between two looks
    #[arg(long, short, default_value_t = 1.0, value_name = "SECONDS", value_parser = seconds)]
    interval: f64,

    /// End after this many looks
    #[arg(long, short = 'n', value_name = "LOOKS")]
    count: Option<u64>,

    /// Print one line of JSON for each look
    #[arg(long)]
    json: bool,
}

fn seconds(s: &str) -> Result<f64, String> {
    match s.parse::<f64>() {
        Ok(v) if (0.1..=3600.0).contains(&v) => Ok(v),
        _ => Err("0.1 to 3600 seconds".into()),
    }
}

/// Every counter by path and name.
type Counters = BTreeMap<(String, String), u64>;

/// The counters: values that are numbers and nobody's to set, and the fallbacks of all reasons together.
fn counters(paths: &[PathStatus]) -> Counters {
    let fallbacks = |text: &str| {
        let count = |line: &str| line.split_whitespace().nth(1)?.parse::<u64>().ok();
        text.lines().filter_map(count).sum()
    };
    paths
        .iter()
        .flat_map(|p| p.values.iter().map(move |(k, v)| (p, k, v)))
        .filter(|(p, k, _)| !p.knobs.contains(*k))
        .filter_map(|(p, k, v)| {
            let count = match k.as_str() {
                "fallbacks" => fallbacks(v),
                _ => v.parse().ok()?,
            };
            Some(((p.name.clone(), k.clone()), count))
        })
        .collect()
}

/// The mode of a path.
fn mode<'a>(paths: &'a [PathStatus], name: &str) -> &'a str {
    let path = paths.iter().find(|p| p.name == name);
    path.map_or("", |p| p.mode.as_str())
}

/// Events per second between two looks; a counter that went back began anew.
fn rates(before: &Counters, now: &Counters, seconds: f64) -> BTreeMap<(String, String), f64> {
    now.iter()
        .map(|(k, &n)| {
            let was = before.get(k).copied().filter(|&w| w <= n).unwrap_or(0);
            (k.clone(), (n - was) as f64 / seconds)
        })
        .collect()
}

/// Runs `watch`.
pub fn run(args: WatchArgs) -> Code {
    let module = match module() {
        Ok(m) => m,
        Err(code) => return code,
    };
    let mut before: Option<(Counters, Instant)> = None;
    let mut looks = 0;
    loop {
        let paths = match module.paths() {
            Ok(p) => p,
            Err(e) => return failed(e),
        };
        let now = (counters(&paths), Instant::now());
        if let Some((was, at)) = &before {
            let r = rates(was, &now.0, (now.1 - *at).as_secs_f64());
            show(&paths, &now.0, &r, args.json);
            looks += 1;
            if args.count.is_some_and(|n| looks >= n) {
                return Code::Ok;
            }
        }
        before = Some(now);
        std::thread::sleep(Duration::from_secs_f64(args.interval));
    }
}

fn show(
    paths: &[PathStatus],
    now: &Counters,
    rates: &BTreeMap<(String, String), f64>,
    as_json: bool,
) {
    if as_json {
        let rows: Vec<_> = now
            .iter()
            .map(|(k, n)| {
                let mode = mode(paths, &k.0);
                json!({"path": k.0, "mode": mode, "counter": k.1, "value": n, "per_second": rates.get(k)})
            })
            .collect();
        println!("{}", json!({ "schema": 1, "counters": rows }));
        return;
    }
    let mut t = table();
    t.set_header(["path", "mode", "counter", "value", "per second"]);
    for (k, n) in now {
        let rate = rates.get(k).copied().unwrap_or(0.0);
        t.add_row([
            k.0.clone(),
            mode(paths, &k.0).into(),
            k.1.clone(),
            n.to_string(),
            format!("{rate:.1}"),
        ]);
    }
    if std::io::stdout().is_terminal() {
        print!("\x1b[H\x1b[2J");
    }
    println!("{t}\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_survive_a_restart_of_the_counter() {
        let k = |s: &str| ("p".to_owned(), s.to_owned());
        let before = Counters::from([(k("a"), 10), (k("b"), 100)]);
        let now = Counters::from([(k("a"), 30), (k("b"), 4), (k("c"), 2)]);
        let r = rates(&before, &now, 2.0);
        assert_eq!((r[&k("a")], r[&k("b")], r[&k("c")]), (10.0, 2.0, 1.0));
    }

    #[test]
    fn knobs_are_no_counters_and_fallbacks_are_one() {
        let values = [
            ("taken", "5"),
            ("window", "32"),
            ("fallbacks", "new 2\nchanged 40\n"),
            ("pinned", "none"),
        ];
        let path = PathStatus {
            name: "p".into(),
            mode: "check".into(),
            state: "active".into(),
            values: values.map(|(k, v)| (k.into(), v.into())).into(),
            knobs: ["window", "pinned"].map(String::from).into(),
        };
        let k = |s: &str| ("p".to_owned(), s.to_owned());
        let paths = [path];
        assert_eq!(
            counters(&paths),
            Counters::from([(k("fallbacks"), 42), (k("taken"), 5)])
        );
        assert_eq!((mode(&paths, "p"), mode(&paths, "q")), ("check", ""));
    }

    #[test]
    fn interval_has_bounds() {
        assert!(seconds("0").is_err() && seconds("x").is_err() && seconds("1e9").is_err());
        assert_eq!(seconds("0.5"), Ok(0.5));
    }
}
