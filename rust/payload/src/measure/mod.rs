// SPDX-License-Identifier: GPL-2.0-or-later
//! Measuring: the bracket around an operation, and a round of all that was asked for.

mod ops;
mod touch;

pub use touch::fill_order;

use protocol::op::parse_list;
use protocol::{backdoor, stats, Config, Op, OpSpec, PayloadInfo, Row, Sample, Summary};

use crate::vmx::ept::{Ept, LowMemory};
use crate::vmx::ops::VmxError;
use crate::vmx::setup::{Child, Features};
use crate::{control, cpu, error, line, memory};

/// Most samples of one operation.
const SAMPLES: usize = 4096;
/// Operations done before the first that counts, at a level: the levels below then have everything
/// in place that they make on first use, and have seen what this operation needs (the module follows
/// a change of habits within some two hundred switches). Fewer where one takes millions of
/// instructions.
const fn warm_up(level: u32) -> u32 {
    match level {
        0..=2 => 256,
        3 => 128,
        _ => 4,
    }
}

/// What measuring needs, made once.
pub struct Meter {
    level: u32,
    /// Exits can be counted.
    backdoor: bool,
    /// What an empty bracket costs.
    overhead: Sample,
    samples: &'static mut [Sample],
    /// Two children, so that VMPTRLD has something to switch to.
    children: [Child; 2],
    low: LowMemory,
    touch_pages: u64,
    /// Order in which pages are touched.
    order: &'static mut [u32],
}

impl Meter {
    /// Allocates everything and calibrates the bracket.
    pub fn new(info: &PayloadInfo, backdoor: bool) -> Meter {
        let mut meter = Meter {
            level: info.level,
            backdoor,
            overhead: Sample::default(),
            samples: memory::slice(SAMPLES),
            children: [Child::new(), Child::new()],
            low: LowMemory::new(),
            touch_pages: info.touch_pages as u64,
            order: memory::slice(info.touch_pages.max(1) as usize),
        };
        meter.collect(warm_up(info.level), 64, || {});
        meter.overhead = Sample {
            ticks: meter.summary(64).min,
            exits: 0,
        };
        meter
    }

    /// Exits so far; 0 where they cannot be counted.
    #[inline(always)]
    fn exits(&self) -> u64 {
        if !self.backdoor {
            return 0;
        }
        // SAFETY: the backdoor answered when it was probed.
        unsafe { cpu::xgetbv_known(backdoor::EXITS) }
    }

    /// One sample of `operation`.
    #[inline(always)]
    fn sample(&self, operation: &mut impl FnMut()) -> Sample {
        let exits = self.exits();
        let start = cpu::rdtsc();
        operation();
        let ticks = cpu::rdtsc() - start;
        Sample {
            ticks,
            exits: self.exits() - exits,
        }
    }

    /// Fills the first `count` samples, after so many operations that do not count.
    #[inline(always)]
    fn collect(&mut self, warm_up: u32, count: u32, mut operation: impl FnMut()) {
        for _ in 0..warm_up {
            operation();
        }
        for index in 0..count as usize {
            self.samples[index] = self.sample(&mut operation);
        }
    }

    fn summary(&mut self, count: u32) -> Summary {
        stats::summarize(&mut self.samples[..count as usize], self.overhead)
    }

    /// One round: every operation of `list`. False if one could not be measured.
    pub fn run(&mut self, list: &str, config: Config, round: u16) -> bool {
        let mut all = true;
        for item in parse_list(list) {
            let spec = match item {
                Ok(spec) => spec,
                Err(text) => {
                    error!("no such operation: {text}");
                    all = false;
                    continue;
                }
            };
            line!("start {}", spec.op.name());
            let mark = memory::mark();
            match self.measure(spec) {
                Ok((summary, exits_milli)) => {
                    let row = Row {
                        op: spec.op,
                        depth: spec.op.depth(self.level),
                        level: self.level,
                        config,
                        round,
                        pattern: spec.pattern,
                        min: summary.min,
                        median: summary.median,
                        max: summary.max,
                        n: summary.n,
                        disturbed: summary.disturbed,
                        worst: summary.worst,
                        exits_milli: self.backdoor.then_some(exits_milli),
                    };
                    crate::console::send(format_args!("{row}"));
                }
                Err(why) => {
                    error!("{}: {why}", spec.op.name());
                    all = false;
                }
            }
            if spec.op.is_touch() {
                // What is resident after another operation must not depend on this one.
                control::touch(protocol::ports::touch::DISCARD, 0);
            } else {
                // SAFETY: what a touch operation allocates are EPT tables, whose pages must not come again: a
                // level below may still shadow them. Nothing else allocates here.
                unsafe { memory::release(mark) };
            }
        }
        all
    }

    fn measure(&mut self, spec: OpSpec) -> Result<(Summary, u64), VmxError> {
        if spec.op.is_touch() {
            return self.touch(spec);
        }
        let count = spec.count.min(SAMPLES as u32);
        self.one_by_one(spec.op, count)?;
        let summary = self.summary(count);
        Ok((summary, summary.exits * 1000))
    }

    /// Warm-up, then one operation between the profiler's start and stop.
    pub fn profile(&mut self, name: &str) -> bool {
        let Some(op) = Op::from_name(name) else {
            error!("cannot profile '{name}'");
            return false;
        };
        if !self.backdoor {
            error!("profiling needs the laboratory's emulator (no backdoor here)");
            return false;
        }
        line!("start {}", op.name());
        let result = if op.is_touch() {
            self.touch_profiled(op)
        } else {
            self.one_profiled(op)
        };
        if let Err(why) = result {
            error!("{name}: {why}");
        }
        result.is_ok()
    }

    /// A child with EPT, VPID and unrestricted guest, the way KVM runs its guests.
    fn modern(&self) -> Features {
        Features {
            ept: Some(Ept::new(self.low, self.touch_pages).pointer()),
            vpid: Some(1),
            unrestricted: true,
        }
    }
}
