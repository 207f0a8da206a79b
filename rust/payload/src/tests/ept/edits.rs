// SPDX-License-Identifier: GPL-2.0-or-later
//! Tables that their owner edits without saying so. Until an INVEPT the processor may use an entry as it was; it
//! may not use one that never was. (By the SDM an EPT violation of the page would end that as well. KVM 7.3
//! keeps what it has then, so that is not asked for.) What it does use may depend on who fills the shadow
//! when, so the log has only whether all was allowed; after an INVEPT it has everything.

use super::super::log;
use super::super::model::Numbers;
use super::around::any;
use super::tables::{frame, Tables, Verdict, RWX_NAMES, USED};
use super::toucher::{Access, Exit, Then, Toucher, MISCONFIGURATION, VIOLATION};
use super::world::World;
use crate::memory;
use crate::vmx::ept::{LowMemory, RWX, WRITE_BACK};
use crate::vmx::ops::VmxError;

const GROUP: &str = "ept_edits";
const PAGES: u64 = 512;
const BATCH: usize = 48;
/// Old entries that are kept of a page; when there are more, INVEPT it is.
const OLD: usize = 3;

/// The group.
pub fn run(level: u32) -> Result<(), VmxError> {
    super::group(GROUP, || {
        for flags in [true, false] {
            Edits::new(flags)?.run(if level > 1 { 16 } else { 96 })?;
        }
        Ok(())
    })
}

struct Edits {
    tables: Tables,
    world: World,
    toucher: Toucher,
    numbers: Numbers,
    /// Entries that may be in use beside the one that is in the table, 0 for none.
    old: &'static mut [u64],
    allowed: u64,
}

/// Page `page` has two frames of its own, so that a word tells which entry was used.
fn entry(page: u64, numbers: &mut Numbers) -> u64 {
    let address = frame(2 * page + numbers.below(2) as u64);
    let rights = match numbers.below(12) {
        0..=5 => RWX,
        6 => 1,
        7 => 3,
        8 => 5,
        9 => 4,
        10 => 2,
        _ => 0,
    };
    address | rights | WRITE_BACK | USED
}

impl Edits {
    fn new(flags: bool) -> Result<Edits, VmxError> {
        let mut edits = Edits {
            tables: Tables::new(LowMemory::new(), PAGES, flags),
            world: World::new(GROUP, 2 * PAGES),
            toucher: Toucher::new(GROUP, BATCH),
            numbers: Numbers::new(31 + flags as u64),
            old: memory::slice(PAGES as usize * OLD),
            allowed: 0,
        };
        edits.toucher.prepare(&edits.tables)?;
        for page in 0..PAGES {
            let new = entry(page, &mut edits.numbers);
            edits.tables.set(1, page, new);
        }
        edits.invalidate()?;
        Ok(edits)
    }

    fn old(&mut self, page: u64) -> &mut [u64] {
        &mut self.old[page as usize * OLD..][..OLD]
    }

    fn invalidate(&mut self) -> Result<(), VmxError> {
        self.old.fill(0);
        let all = self.numbers.below(2) == 0;
        self.tables.invalidate(all)
    }

    fn run(&mut self, rounds: u32) -> Result<(), VmxError> {
        for round in 0..rounds {
            let centre = self.numbers.below(PAGES as usize) as u64;
            self.silently(centre, round % 3 == 0)?;
            if round % 4 == 3 {
                self.invalidate()?;
                self.settled(centre)?;
            }
            // From nothing to something needs no INVEPT: nothing was cached.
            if round % 8 == 5 {
                self.out_of_nothing(centre)?;
            }
        }
        self.invalidate()?;
        let flags = self.tables.flags();
        self.world.inspect("at the end", Some(&self.tables));
        log!(
            "{}/{} flags: {} accesses, wrong {}",
            GROUP,
            if flags { "with" } else { "without" },
            self.allowed,
            self.world.wrong()
        );
        Ok(())
    }

    /// Changes entries and does not say so. The accesses that follow are in order or in none.
    fn silently(&mut self, centre: u64, in_order: bool) -> Result<(), VmxError> {
        let wide = if in_order { BATCH } else { BATCH / 2 };
        for _ in 0..8 {
            let page = (centre + self.numbers.below(wide) as u64) % PAGES;
            let was = self.tables.get(1, page);
            let new = entry(page, &mut self.numbers);
            // What maps nothing, or is misconfigured, is not cached.
            let cached = matches!(self.tables.walk(page, 0), Verdict::Page(_));
            let mut full = false;
            if cached && was != new {
                match self
                    .old(page)
                    .iter()
                    .position(|&old| old == 0 || old == was)
                {
                    Some(at) => self.old(page)[at] = was,
                    None => full = true,
                }
            }
            self.tables.set(1, page, new);
            if full {
                self.invalidate()?;
            }
        }
        // One write to a page, or none could tell where it went.
        let mut written = 0u64;
        while !self.toucher.full() {
            let offset = match in_order {
                true => self.toucher.steps().len() as u64,
                false => self.numbers.below(wide) as u64,
            };
            let access = match any(&mut self.numbers) {
                Access::Update => Access::Read,
                Access::Write if written >> offset & 1 != 0 => Access::Fetch,
                access => access,
            };
            written |= (access.writes() as u64) << offset;
            let value = self.numbers.next();
            self.toucher.push(access, (centre + offset) % PAGES, value);
        }
        self.accesses("silently")
    }

    /// Runs the list and judges it with everything that may be in use.
    fn accesses(&mut self, name: &str) -> Result<(), VmxError> {
        let (old, tables, world) = (&*self.old, &self.tables, &mut self.world);
        let mut left = [false; BATCH];
        self.toucher.run(name, |at, step, exit| {
            let page = step.page();
            let entries = &old[page as usize * OLD..][..OLD];
            let now = tables.get(1, page);
            let fits = |entry: u64| fits_exit(tables, page, entry, step.access(), exit);
            if !fits(now) && !entries.iter().any(|&entry| entry != 0 && fits(entry)) {
                world.fail(
                    name,
                    format_args!(
                        "{} of page {page:#x} left for {exit}; entry {now:#x}, before {entries:x?}",
                        step.access().name()
                    ),
                );
            }
            left[at] = true;
            Ok(Then::Skip)
        })?;
        for (at, left) in left
            .into_iter()
            .enumerate()
            .take(self.toucher.steps().len())
        {
            let step = self.toucher.steps()[at];
            let page = step.page();
            self.allowed += 1;
            if step.done == 0 {
                if !left {
                    self.world
                        .fail(name, format_args!("step {at} was not made"));
                }
                continue;
            }
            let frames = [2 * page, 2 * page + 1];
            let access = step.access();
            let used = match access {
                Access::Read => frames
                    .into_iter()
                    .find(|&number| step.value << 16 == number << 16),
                Access::Fetch => frames.into_iter().find(|&number| step.value == number),
                _ => frames
                    .into_iter()
                    .find(|&number| self.world.look(number) == step.value),
            };
            let Some(number) = used else {
                self.world.fail(
                    name,
                    format_args!("{} of page {page:#x}: {:#x}", access.name(), step.value),
                );
                continue;
            };
            if access.writes() {
                *self.world.word(number) = step.value;
            }
            let now = self.tables.get(1, page);
            let may = |entry: u64| {
                entry & access.rights() == access.rights()
                    && entry & 3 != 2
                    && entry & super::tables::ADDRESS == frame(number)
            };
            let known = may(now) || self.old(page).iter().any(|&entry| may(entry));
            if !known {
                let entries: [u64; OLD] = core::array::from_fn(|at| self.old(page)[at]);
                self.world.fail(
                    name,
                    format_args!(
                        "{} of page {page:#x} used frame {number:#x}; entry {now:#x} ({}), before {entries:x?}",
                        access.name(),
                        RWX_NAMES[(now & 7) as usize]
                    ),
                );
            }
        }
        self.toucher.clear();
        Ok(())
    }

    /// After an INVEPT: everything must be as the tables say, and is in the log.
    fn settled(&mut self, centre: u64) -> Result<(), VmxError> {
        // Where a write went that found an old entry is nobody's business any more.
        self.world.fill();
        self.world.sum = 0;
        while !self.toucher.full() {
            let page = (centre + self.numbers.below(32) as u64) % PAGES;
            let access = any(&mut self.numbers);
            self.world.push(
                &mut self.toucher,
                &self.tables,
                access,
                page,
                &mut self.numbers,
            );
        }
        self.world
            .batch("settled", &mut self.toucher, &mut self.tables)?;
        self.world.inspect("settled", Some(&self.tables));
        self.world.report("settled");
        Ok(())
    }

    /// Takes pages away, says so, lets the child find out about some, and gives them back silently.
    fn out_of_nothing(&mut self, centre: u64) -> Result<(), VmxError> {
        let pages = |at: u64| (centre + at) % PAGES;
        for at in 0..16 {
            self.tables.set(1, pages(at), 0);
        }
        self.invalidate()?;
        for at in [3, 4, 9] {
            self.toucher.push(Access::Read, pages(at), 0);
        }
        self.world
            .batch("nothing", &mut self.toucher, &mut self.tables)?;
        for at in 0..16 {
            let address = frame(2 * pages(at));
            let rights = if at % 5 == 4 { 1 } else { RWX };
            self.tables
                .set(1, pages(at), address | rights | WRITE_BACK | USED);
        }
        for at in [4, 3, 5, 0, 15, 9, 8, 10, 14] {
            let access = any(&mut self.numbers);
            self.world.push(
                &mut self.toucher,
                &self.tables,
                access,
                pages(at),
                &mut self.numbers,
            );
        }
        self.world
            .batch("out of nothing", &mut self.toucher, &mut self.tables)
    }
}

/// Is that an exit which the access makes through this entry?
fn fits_exit(tables: &Tables, page: u64, entry: u64, access: Access, exit: Exit) -> bool {
    match tables.through(page, entry, access.rights()) {
        Verdict::Page(_) => false,
        Verdict::Misconfiguration => exit.reason == MISCONFIGURATION,
        Verdict::Violation(rights) => {
            exit.reason == VIOLATION && exit.qualification >> 3 & 7 == rights
        }
    }
}
