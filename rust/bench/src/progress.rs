// SPDX-License-Identifier: GPL-2.0-or-later
//! Progress of a run: a bar on a terminal, and a line for each step elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use protocol::{Config, Op};

/// How long a log is left without a line while a round goes on. Whoever waits for it (the lab ends an emulated host that
/// is silent for long) sees that it moves; a round that is over sooner costs the log one line.
const QUIET: Duration = Duration::from_secs(1);

/// Steps are weighted with what they are expected to cost, so that the estimate of the time left holds
/// for a run whose last steps take longest.
pub struct Progress {
    bar: ProgressBar,
    terminal: bool,
    total: f64,
    done: f64,
    at: String,
    said: Instant,
}

impl Progress {
    /// For steps of `total` weight.
    pub fn new(total: f64) -> Progress {
        let terminal = std::io::stderr().is_terminal();
        let bar = if terminal {
            ProgressBar::new(1000)
        } else {
            ProgressBar::hidden()
        };
        let style = "{bar:30} {percent:>3} % {elapsed}, {eta} left  {msg}";
        bar.set_style(ProgressStyle::with_template(style).expect("a constant template"));
        Progress {
            bar,
            terminal,
            total: total.max(1.0),
            done: 0.0,
            at: String::new(),
            said: Instant::now(),
        }
    }

    /// A stack is about to boot, whose clocks are slowed by as much.
    pub fn boot(&mut self, level: u32, slow_ticks: u32) {
        let slow = match slow_ticks {
            0 | 1 => String::new(),
            factor => format!(", clocks slowed by up to {factor}"),
        };
        self.say(format!("booting a stack of {level}{slow}"));
    }

    /// A round begins.
    pub fn round(&mut self, level: u32, config: Config) {
        self.at = format!("L{level} {}", config.name());
        self.say(self.at.clone());
    }

    /// An operation begins. Only a terminal is told: lines for each would be noise in a log.
    pub fn operation(&mut self, op: Op) {
        self.bar.set_message(format!("{}: {}", self.at, op.name()));
    }

    /// A part of a round begins, which may be short: a log is told of one now and then.
    pub fn part(&mut self, name: &str) {
        if self.terminal || self.said.elapsed() >= QUIET {
            self.say(format!("{}: {name}", self.at));
        }
    }

    /// A step of that weight is over.
    pub fn advance(&mut self, weight: f64) {
        self.done += weight;
        self.bar
            .set_position((self.done / self.total * 1000.0) as u64);
    }

    /// A line that must not be lost in the bar.
    pub fn print(&self, line: &str) {
        self.bar.suspend(|| println!("{line}"));
    }

    /// A line on standard error that must not be lost in the bar.
    pub fn warn(&self, line: &str) {
        self.bar.suspend(|| eprintln!("matryoshka: {line}"));
    }

    fn say(&mut self, message: String) {
        self.said = Instant::now();
        if self.terminal {
            self.bar.set_message(message);
        } else {
            eprintln!("[{:3.0} %] {message}", self.done / self.total * 100.0);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
