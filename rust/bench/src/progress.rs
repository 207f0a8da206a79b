// SPDX-License-Identifier: GPL-2.0-or-later
//! Progress of a run: a bar on a terminal, and a line for each step elsewhere.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};
use protocol::{Config, Op};

/// Steps are weighted with what they are expected to cost, so that the estimate of the time left holds
/// for a run whose last steps take longest.
pub struct Progress {
    bar: ProgressBar,
    terminal: bool,
    total: f64,
    done: f64,
    at: String,
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
        }
    }

    /// A stack is about to boot.
    pub fn boot(&mut self, level: u32) {
        self.say(format!("booting a stack of {level}"));
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

    fn say(&self, message: String) {
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
