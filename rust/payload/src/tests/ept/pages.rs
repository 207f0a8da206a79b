// SPDX-License-Identifier: GPL-2.0-or-later
//! Many pages, each written once and read back, mapped beforehand or on demand, while the parent's VMM takes
//! pages away: those read as zero afterwards, whoever reads them, and nothing else changes.

use protocol::ports::touch;
use protocol::Pattern;

use super::super::log;
use super::super::model::{fold, Numbers};
use super::tables::{frame, plain, Tables};
use super::toucher::{Access, Then, Toucher, VIOLATION};
use crate::control;
use crate::memory;
use crate::vmx::ept::LowMemory;
use crate::vmx::ops::VmxError;

const GROUP: &str = "ept_pages";
/// Accesses of a batch.
const BATCH: usize = 512;

/// The group.
pub fn run(level: u32) -> Result<(), VmxError> {
    super::group(GROUP, || {
        // Two tables, and their border.
        let pages = if level > 1 { 256 } else { 1024 };
        for pattern in [Pattern::Sequential, Pattern::Random, Pattern::Strided] {
            for demand in [false, true] {
                Pages::new(pattern, pages, demand)?.run()?;
            }
        }
        for pattern in [Pattern::Sequential, Pattern::Random, Pattern::Strided] {
            own(pattern, pages);
        }
        control::touch(touch::DISCARD, 0);
        Ok(())
    })
}

/// The same without a child: the parent's own memory, populated by its VMM, touched in part, and taken away.
fn own(pattern: Pattern, pages: u64) {
    let order: &mut [u32] = memory::slice(pages as usize);
    crate::measure::fill_order(order, pattern);
    let (mut sum, mut wrong) = (0, 0);
    let word = |page: u32| (frame(page as u64) + Access::Write.offset()) as *mut u64;
    for part in [8, 2] {
        control::touch(touch::POPULATE, pages as u32);
        let touched = order.len() / part;
        for &page in &order[..touched] {
            // SAFETY: pages of the touch region, which hold no Rust object.
            unsafe { word(page).write_volatile(page as u64 + 1) };
        }
        for round in 0..2 {
            for (at, &page) in order.iter().enumerate() {
                // SAFETY: as above.
                let is = unsafe { word(page).read_volatile() };
                let must = (round == 0 && at < touched) as u64 * (page as u64 + 1);
                wrong += (is != must) as u64;
                sum = fold(sum, is);
            }
            control::touch(touch::DISCARD, 0);
        }
    }
    log!(
        "{}/{} own: sum {:#x}, wrong {}{}",
        GROUP,
        pattern.name(),
        sum,
        wrong,
        if wrong == 0 { "" } else { ": FAIL" }
    );
}

struct Pages {
    pattern: Pattern,
    demand: bool,
    tables: Tables,
    toucher: Toucher,
    order: &'static mut [u32],
    /// What the word of each page must be.
    words: &'static mut [u64],
    numbers: Numbers,
    violations: u64,
    wrong: u64,
    sum: u64,
}

impl Pages {
    fn new(pattern: Pattern, pages: u64, demand: bool) -> Result<Pages, VmxError> {
        control::touch(touch::DISCARD, 0);
        let mut new = Pages {
            pattern,
            demand,
            tables: Tables::new(LowMemory::new(), pages, true),
            toucher: Toucher::new(GROUP, BATCH),
            order: memory::slice(pages as usize),
            words: memory::slice(pages as usize),
            numbers: Numbers::new(41),
            violations: 0,
            wrong: 0,
            sum: 0,
        };
        crate::measure::fill_order(new.order, pattern);
        for page in 0..pages {
            new.tables
                .set(1, page, if demand { 0 } else { plain(frame(page)) });
        }
        new.toucher.prepare(&new.tables)?;
        new.tables.invalidate(true)?;
        Ok(new)
    }

    fn run(&mut self) -> Result<(), VmxError> {
        let pages = self.order.len();
        self.pass(Access::Write, 0..pages)?;
        self.pass(Access::Read, 0..pages)?;
        // The VMM takes the first half while the shadow has it all.
        self.discard(pages / 2, false);
        self.pass(Access::Read, 0..pages)?;
        self.pass(Access::Update, 0..pages / 2)?;
        self.discard(pages / 4, true);
        // Some are touched by the parent first, some by the child, some by neither before the next.
        for page in (0..pages as u64 / 4).step_by(3) {
            self.look(page);
        }
        self.pass(Access::Update, pages / 4..pages)?;
        self.discard(pages / 8, false);
        self.pass(Access::Read, 0..pages)?;
        if self.demand {
            // Taken away by the parent, which maps them again when they are missed.
            for page in 0..pages as u64 {
                if page % 7 < 3 {
                    self.tables.set(1, page, 0);
                }
            }
            self.tables.invalidate(false)?;
        }
        self.pass(Access::Write, 0..pages)?;
        for page in 0..pages as u64 {
            self.look(page);
        }
        let (flags, _) = self.tables.wrong();
        log!(
            "{}/{} {}: sum {:#x}, {} violations, wrong {}{}",
            GROUP,
            self.pattern.name(),
            if self.demand { "on demand" } else { "mapped" },
            self.sum,
            self.violations,
            self.wrong + flags,
            if self.wrong + flags == 0 {
                ""
            } else {
                ": FAIL"
            }
        );
        Ok(())
    }

    /// The VMM takes the first pages' memory away.
    fn discard(&mut self, pages: usize, populate: bool) {
        let what = if populate {
            touch::POPULATE
        } else {
            touch::DISCARD
        };
        control::touch(what, pages as u32);
        self.words[..pages].fill(0);
    }

    /// The parent reads a page.
    fn look(&mut self, page: u64) {
        // SAFETY: a page of the touch region, which holds no Rust object.
        let is = unsafe { ((frame(page) + Access::Write.offset()) as *const u64).read_volatile() };
        self.note(page, is, self.words[page as usize]);
    }

    fn note(&mut self, page: u64, is: u64, must: u64) {
        self.sum = fold(self.sum, is);
        if is != must {
            self.wrong += 1;
            if self.wrong < 8 {
                log!(
                    "{}/page {:#x} has {:#x}, must: {:#x}",
                    GROUP,
                    page,
                    is,
                    must
                );
            }
        }
    }

    /// One access to each page of that part of the order.
    fn pass(&mut self, access: Access, part: core::ops::Range<usize>) -> Result<(), VmxError> {
        let mut from = part.start;
        while from < part.end {
            let to = part.end.min(from + BATCH);
            self.toucher.clear();
            for &page in &self.order[from..to] {
                let value = self.numbers.next();
                // A read is one of the word here.
                match access {
                    Access::Read => self.toucher.push_word(page as u64),
                    _ => self.toucher.push(access, page as u64, value),
                }
            }
            let mut given = [0; BATCH];
            for (slot, step) in given.iter_mut().zip(self.toucher.steps()) {
                *slot = step.value;
            }
            let (tables, violations) = (&mut self.tables, &mut self.violations);
            let good = self.toucher.run(self.pattern.name(), |_, step, exit| {
                if exit.reason == VIOLATION && tables.get(1, step.page()) == 0 {
                    *violations += 1;
                    tables.set(1, step.page(), plain(frame(step.page())));
                    return Ok(Then::Retry);
                }
                log!("{}/page {:#x}: FAIL: left for {}", GROUP, step.page(), exit);
                Ok(Then::Skip)
            })?;
            self.wrong += !good as u64;
            for (at, given) in given.into_iter().enumerate().take(to - from) {
                let step = self.toucher.steps()[at];
                let page = step.page();
                let old = self.words[page as usize];
                match access {
                    Access::Write => self.words[page as usize] = given,
                    Access::Update => {
                        self.words[page as usize] = old.wrapping_add(given);
                        self.note(page, step.value, old);
                    }
                    _ => self.note(page, step.value, old),
                }
            }
            from = to;
        }
        Ok(())
    }
}
