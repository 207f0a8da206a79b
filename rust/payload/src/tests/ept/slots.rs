// SPDX-License-Identifier: GPL-2.0-or-later
//! The memory slot behind the frames comes and goes: read-only, away, elsewhere, back, while the tables stay as they
//! are. Where there is no slot a child reads ones and its writes are lost; where it is read-only they are lost, too.

use protocol::ports::touch;

use super::super::log;
use super::super::model::{fold, Numbers};
use super::tables::{frame, plain, Tables};
use super::toucher::{Access, Then, Toucher};
use super::world::World;
use crate::control;
use crate::memory;
use crate::vmx::ept::LowMemory;
use crate::vmx::ops::VmxError;

const GROUP: &str = "ept_slots";
const PAGES: u64 = 512;
const BATCH: usize = 96;
/// How far up the slot is moved, in pages: whole large pages and not.
const MOVES: [u64; 4] = [512, 64, 1, 300];

/// The group.
pub fn run(level: u32) -> Result<(), VmxError> {
    super::group(GROUP, || {
        let mut slots = Slots::new()?;
        let rounds = if level > 1 { 1 } else { 4 };
        let result = (0..rounds).try_for_each(|round| slots.round(round));
        control::touch(touch::MOVE, 0);
        log!(
            "{}/sum {:#x}, wrong {}{}",
            GROUP,
            slots.sum,
            slots.wrong,
            if slots.wrong == 0 { "" } else { ": FAIL" }
        );
        result
    })
}

/// What is behind the frames.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Behind {
    /// Memory, moved up by that many pages.
    Memory(u64),
    /// Memory that takes no writes.
    ReadOnly,
    /// Nothing.
    Nothing,
}

struct Slots {
    tables: Tables,
    toucher: Toucher,
    numbers: Numbers,
    /// The word of each page of memory.
    words: &'static mut [u64],
    sum: u64,
    wrong: u64,
}

impl Slots {
    fn new() -> Result<Slots, VmxError> {
        let mut slots = Slots {
            tables: Tables::new(LowMemory::new(), PAGES, true),
            toucher: Toucher::new(GROUP, BATCH),
            numbers: Numbers::new(53),
            words: memory::slice(PAGES as usize),
            sum: 0,
            wrong: 0,
        };
        // Fills the frames.
        let mut world = World::new(GROUP, PAGES);
        for page in 0..PAGES {
            slots.tables.set(1, page, plain(frame(page)));
            slots.words[page as usize] = world.look(page);
            *world.word(page) = 0;
        }
        slots.toucher.prepare(&slots.tables)?;
        slots.tables.invalidate(true)?;
        Ok(slots)
    }

    fn round(&mut self, round: u64) -> Result<(), VmxError> {
        let up = MOVES[round as usize % MOVES.len()];
        self.accesses(Behind::Memory(0), round)?;
        control::touch(touch::READ_ONLY, 0);
        self.accesses(Behind::ReadOnly, round)?;
        control::touch(touch::MOVE, 0);
        self.accesses(Behind::Memory(0), round)?;
        control::touch(touch::MOVE, up as u32);
        self.accesses(Behind::Memory(up), round)?;
        control::touch(touch::GONE, 0);
        self.accesses(Behind::Nothing, round)?;
        control::touch(touch::READ_ONLY, 0);
        self.accesses(Behind::ReadOnly, round)?;
        control::touch(touch::GONE, 0);
        control::touch(touch::MOVE, up as u32);
        self.accesses(Behind::Memory(up), round)?;
        control::touch(touch::MOVE, 0);
        self.accesses(Behind::Memory(0), round)
    }

    /// Reads and writes in order, near each other and here and there, twice: the second time with a full shadow.
    fn accesses(&mut self, behind: Behind, round: u64) -> Result<(), VmxError> {
        for turn in 0..4 {
            self.toucher.clear();
            let start = self.numbers.below(PAGES as usize) as u64;
            let mut written = [0; BATCH];
            while !self.toucher.full() {
                let at = self.toucher.steps().len();
                let page = match (turn + round) % 3 {
                    0 => start + at as u64,
                    1 => start + self.numbers.below(48) as u64,
                    _ => self.numbers.below(PAGES as usize) as u64,
                } % PAGES;
                written[at % BATCH] = self.numbers.next();
                match self.numbers.below(2) {
                    0 => self.toucher.push_word(page),
                    _ => self.toucher.push(Access::Write, page, written[at % BATCH]),
                }
            }
            self.toucher.run("slots", |_, step, exit| {
                log!("{}/page {:#x}: FAIL: left for {}", GROUP, step.page(), exit);
                Ok(Then::Skip)
            })?;
            for (step, &written) in self.toucher.steps().iter().zip(&written) {
                // Which page of memory that is.
                let number = match behind {
                    Behind::Memory(up) => step.page().checked_sub(up),
                    Behind::ReadOnly => Some(step.page()),
                    Behind::Nothing => None,
                };
                let word = number.and_then(|number| self.words.get_mut(number as usize));
                if step.access() == Access::Write {
                    if let (Some(word), Behind::Memory(_)) = (word, behind) {
                        *word = written;
                    }
                    continue;
                }
                let must = word.map_or(u64::MAX, |word| *word);
                if step.value != must {
                    self.wrong += 1;
                    if self.wrong < 8 {
                        log!(
                            "{}/page {:#x}: FAIL: {:#x}, must: {:#x}",
                            GROUP,
                            step.page(),
                            step.value,
                            must
                        );
                    }
                }
                self.sum = fold(self.sum, step.value);
            }
        }
        super::reachable(GROUP, "after a change of the slots");
        Ok(())
    }
}
