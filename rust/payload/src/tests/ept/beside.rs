// SPDX-License-Identifier: GPL-2.0-or-later
//! Pages of the parent's own that lie beside its EPT tables, written to all the time, and some of them tables for a while.
//! Whoever lets the parent write to them without being asked must notice what becomes a table, and not lose a word.

use super::super::log;
use super::super::model::Numbers;
use super::around::any;
use super::tables::{frame, plain, Tables, ACCESSED};
use super::toucher::Toucher;
use super::world::World;
use crate::memory::{self, PAGE};
use crate::vmx::ept::{LowMemory, RWX, WRITE_BACK};
use crate::vmx::ops::VmxError;

const GROUP: &str = "ept_beside";
/// Pages of the window: two tables of the last level.
const PAGES: u64 = 1024;
/// Accesses of a batch.
const BATCH: usize = 48;
/// Pages of data before the tables, and as many behind them.
const DATA: u64 = 96;
/// Words of a page of data that are used.
const WORDS: usize = 4;

/// The group.
pub fn run(level: u32) -> Result<(), VmxError> {
    super::group(GROUP, || Beside::new()?.run(if level > 1 { 8 } else { 48 }))
}

struct Beside {
    tables: Tables,
    world: World,
    toucher: Toucher,
    numbers: Numbers,
    before: u64,
    behind: u64,
    /// What each page of data has.
    words: &'static mut [u64],
    lost: u32,
}

impl Beside {
    fn new() -> Result<Beside, VmxError> {
        let before = memory::pages(DATA);
        // Without flags no entry changes behind the copies that are made of the tables here.
        let tables = Tables::new(LowMemory::new(), PAGES, false);
        let mut beside = Beside {
            tables,
            before,
            behind: memory::pages(DATA),
            world: World::new(GROUP, PAGES),
            toucher: Toucher::new(GROUP, BATCH),
            numbers: Numbers::new(47),
            words: memory::slice(2 * DATA as usize * WORDS),
            lost: 0,
        };
        beside.toucher.prepare(&beside.tables)?;
        for page in 0..PAGES {
            beside.tables.set(1, page, plain(frame(page)));
        }
        beside.tables.invalidate(true)?;
        Ok(beside)
    }

    /// Address of a page of data.
    fn page(&self, number: usize) -> u64 {
        match number as u64 {
            n if n < DATA => self.before + n * PAGE,
            n => self.behind + (n - DATA) * PAGE,
        }
    }

    /// Writes to some pages of data.
    fn write(&mut self) {
        for _ in 0..24 {
            let number = self.numbers.below(2 * DATA as usize);
            let (at, value) = (self.numbers.below(WORDS), self.numbers.next());
            // SAFETY: a page of ours in which no Rust object lies.
            unsafe { word(self.page(number), at).write_volatile(value) };
            self.words[number * WORDS + at] = value;
        }
    }

    /// Reads all of them.
    fn check(&mut self) {
        for number in 0..2 * DATA as usize {
            for at in 0..WORDS {
                // SAFETY: as above.
                let is = unsafe { word(self.page(number), at).read_volatile() };
                self.lost += u32::from(is != self.words[number * WORDS + at]);
            }
        }
    }

    /// The child touches what it likes.
    fn touch(&mut self, name: &str, centre: u64) -> Result<(), VmxError> {
        while !self.toucher.full() {
            let near = self.numbers.below(64) as u64;
            let access = any(&mut self.numbers);
            self.world.push(
                &mut self.toucher,
                &self.tables,
                access,
                (centre + near) % PAGES,
                &mut self.numbers,
            );
        }
        self.world
            .batch(name, &mut self.toucher, &mut self.tables)?;
        self.world.inspect(name, Some(&self.tables));
        Ok(())
    }

    /// Has other entries near `centre` from now on, in the tables and, if one of them has a stand-in, there.
    fn edit(&mut self, centre: u64, stand_in: Option<u64>) {
        for _ in 0..12 {
            let page = (centre + self.numbers.below(64) as u64) % PAGES;
            let address = frame(self.numbers.below(PAGES as usize) as u64);
            let entry = match self.numbers.below(4) {
                0 => 0,
                1 => address | 1 | WRITE_BACK,
                _ => plain(address),
            };
            self.tables.set(1, page, entry);
            if let Some(table) = stand_in.filter(|_| page / 512 == centre / 512) {
                // SAFETY: as above; the page stands in for that table.
                unsafe { word(table, page as usize % 512).write_volatile(entry) };
            }
        }
    }

    fn run(&mut self, rounds: u32) -> Result<(), VmxError> {
        for round in 0..rounds {
            let centre = self.numbers.below(PAGES as usize) as u64;
            self.touch("tables", centre)?;
            self.write();
            self.edit(centre, None);
            self.tables.invalidate(round % 2 == 0)?;
            self.write();
            self.touch("other entries", centre)?;
            match round % 3 {
                0 => self.last_level(centre)?,
                1 => self.directory(centre)?,
                _ => {}
            }
            self.check();
        }
        self.world.report("with tables beside");
        log!("{}/words lost {}", GROUP, self.lost);
        Ok(())
    }

    /// A page of data is a table of the last level for a while.
    fn last_level(&mut self, centre: u64) -> Result<(), VmxError> {
        let number = self.numbers.below(2 * DATA as usize);
        let (page, table) = (self.page(number), self.tables.next(2, centre));
        copy(table, page);
        self.tables.set(2, centre, page | RWX | ACCESSED);
        self.tables.invalidate(true)?;
        self.touch("a page as table", centre)?;
        for turn in 0..3 {
            self.edit(centre, Some(page));
            self.tables.invalidate(turn == 1)?;
            self.touch("a page as table, changed", centre)?;
        }
        self.tables.set(2, centre, table | RWX | ACCESSED);
        self.tables.invalidate(false)?;
        self.give_back(number);
        self.touch("and data again", centre)
    }

    /// A page of data is the directory for a while, and loses and gets an entry.
    fn directory(&mut self, centre: u64) -> Result<(), VmxError> {
        let number = self.numbers.below(2 * DATA as usize);
        let (page, directory) = (self.page(number), self.tables.next(3, centre));
        copy(directory, page);
        self.tables.set(3, centre, page | RWX | ACCESSED);
        self.tables.invalidate(true)?;
        self.touch("a page as directory", centre)?;
        let (index, entry) = (centre as usize / 512, self.tables.get(2, centre));
        for new in [0, entry & !2, entry] {
            // SAFETY: as above; the page is the directory just now.
            unsafe { word(page, index).write_volatile(new) };
            self.tables.set(2, centre, new);
            self.tables.invalidate(true)?;
            self.touch("a page as directory, changed", centre)?;
        }
        self.tables.set(3, centre, directory | RWX | ACCESSED);
        self.tables.invalidate(false)?;
        self.give_back(number);
        self.touch("and data again", centre)
    }

    /// The page is data again.
    fn give_back(&mut self, number: usize) {
        for at in 0..WORDS {
            let value = self.numbers.next();
            // SAFETY: as above; no table names the page any more.
            unsafe { word(self.page(number), at).write_volatile(value) };
            self.words[number * WORDS + at] = value;
        }
    }
}

fn word(page: u64, at: usize) -> *mut u64 {
    (page as *mut u64).wrapping_add(at)
}

/// Copies a table.
fn copy(from: u64, to: u64) {
    for at in 0..512 {
        // SAFETY: pages of ours in which no Rust object lies.
        unsafe { word(to, at).write_volatile(word(from, at).read_volatile()) };
    }
}
