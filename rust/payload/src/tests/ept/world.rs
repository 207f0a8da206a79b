// SPDX-License-Identifier: GPL-2.0-or-later
//! Frames that can be told apart, and whether what a child did to them and what it was told is what its tables
//! say.

use super::super::log;
use super::super::model::{fold, Numbers};
use super::tables::{frame, Tables, Verdict, ADDRESS, HOLE};
use super::toucher::{Access, Exit, Step, Then, Toucher, MISCONFIGURATION, VIOLATION};
use crate::memory::{self, PAGE};
use crate::vmx::ops::VmxError;

/// Discrepancies that are named; more are only counted.
const NAMED: u32 = 12;
/// In the number of a page that the child reads.
const TAG: u64 = 0x5a5a << 48;

/// What a child reads in the page of that number.
pub fn tagged(number: u64) -> u64 {
    TAG | number
}

fn word(address: u64) -> *mut u64 {
    address as *mut u64
}

/// The frames, and what has been seen so far.
pub struct World {
    group: &'static str,
    frames: u64,
    words: &'static mut [u64],
    /// Sum of all that a guest could see.
    pub sum: u64,
    wrong: u32,
}

impl World {
    /// Of that many frames, filled.
    pub fn new(group: &'static str, frames: u64) -> World {
        let mut world = World {
            group,
            frames,
            words: memory::slice(frames as usize),
            sum: 0,
            wrong: 0,
        };
        world.fill();
        world
    }

    /// Things found wrong.
    pub fn wrong(&self) -> u32 {
        self.wrong
    }

    /// Writes all frames: the number, a function that returns it, and a word to play with.
    pub fn fill(&mut self) {
        for number in 0..self.frames {
            let at = frame(number);
            // SAFETY: pages of the touch region, which hold no Rust object.
            unsafe {
                word(at).write_volatile(TAG | number);
                // mov eax, number; ret
                word(at + Access::Fetch.offset()).write_volatile(0xb8 | number << 8 | 0xc3 << 40);
                word(at + Access::Write.offset()).write_volatile(0);
            }
        }
        self.words.fill(0);
    }

    /// Notes a discrepancy.
    pub fn fail(&mut self, name: &str, what: core::fmt::Arguments<'_>) {
        self.wrong += 1;
        if self.wrong <= NAMED {
            log!("{}/{}: FAIL: {}", self.group, name, what);
        }
    }

    /// What must be in the word of frame `number`.
    pub fn word(&mut self, number: u64) -> &mut u64 {
        &mut self.words[number as usize]
    }

    /// What is in it.
    pub fn look(&self, number: u64) -> u64 {
        // SAFETY: as in `fill`.
        unsafe { word(frame(number) + Access::Write.offset()).read_volatile() }
    }

    /// Appends an access to the list, or a read instead of one that KVM cannot emulate where no memory is.
    pub fn push(
        &self,
        toucher: &mut Toucher,
        tables: &Tables,
        access: Access,
        page: u64,
        numbers: &mut Numbers,
    ) {
        let value = numbers.next();
        let hole = tables.get(1, page) & ADDRESS >= HOLE;
        let access = match access {
            Access::Update | Access::Fetch if hole => Access::Read,
            access => access,
        };
        toucher.push(access, page, value);
    }

    /// Is that the exit that the access must make?
    pub fn judge(&mut self, name: &str, must: Verdict, step: &Step, exit: Exit) {
        let access = step.access();
        let right = match must {
            Verdict::Page(_) => false,
            Verdict::Misconfiguration => exit.reason == MISCONFIGURATION,
            Verdict::Violation(rights) => {
                let wanted = exit.qualification & 7;
                exit.reason == VIOLATION
                    && exit.qualification >> 3 & 7 == rights
                    && match access {
                        Access::Update => wanted != 0 && wanted & !access.rights() == 0,
                        _ => wanted == access.rights(),
                    }
            }
        };
        let at_page = step.page() * PAGE + super::tables::WINDOW;
        let linear = exit.linear == 0 || exit.linear / PAGE * PAGE == at_page;
        if !right || !linear || exit.address / PAGE * PAGE != at_page {
            self.fail(
                name,
                format_args!(
                    "{} of page {:#x} left for {} at {:#x} ({:#x}), must: {:x?}",
                    access.name(),
                    step.page(),
                    exit,
                    exit.address,
                    exit.linear,
                    must
                ),
            );
        }
        for value in [exit.reason, exit.qualification, exit.address / PAGE] {
            self.sum = fold(self.sum, value);
        }
    }

    /// Did the access, which was carried out, find and leave what it must in the page at `address`?
    pub fn done(&mut self, name: &str, address: u64, step: &Step, written: u64) {
        let access = step.access();
        let number = address.wrapping_sub(frame(0)) / PAGE;
        if number >= self.frames && address < HOLE {
            self.fail(
                name,
                format_args!("the child reached {address:#x}, which is no frame"),
            );
            return;
        }
        let must = if address >= HOLE {
            match access {
                Access::Write => written,
                _ => u64::MAX,
            }
        } else {
            match access {
                Access::Read => TAG | number,
                Access::Fetch => number,
                Access::Write => {
                    *self.word(number) = written;
                    written
                }
                Access::Update => {
                    let old = *self.word(number);
                    *self.word(number) = old.wrapping_add(written);
                    old
                }
            }
        };
        if step.value != must {
            self.fail(
                name,
                format_args!(
                    "{} of page {:#x} gave {:#x}, must: {:#x}",
                    access.name(),
                    step.page(),
                    step.value,
                    must
                ),
            );
        }
        self.sum = fold(self.sum, step.value);
    }

    /// Runs the list, skipping what leaves, and compares all of it with what the tables say.
    pub fn batch(
        &mut self,
        name: &str,
        toucher: &mut Toucher,
        tables: &mut Tables,
    ) -> Result<(), VmxError> {
        let mut values = [0; 512];
        for (value, step) in values.iter_mut().zip(toucher.steps()) {
            *value = step.value;
        }
        let good = toucher.run(name, |_, step, exit| {
            let must = tables.walk(step.page(), step.access().rights());
            self.judge(name, must, step, exit);
            Ok(Then::Skip)
        })?;
        if !good {
            self.wrong += 1;
            return Ok(());
        }
        for (at, step) in toucher.steps().iter().enumerate() {
            if step.done == 0 {
                continue;
            }
            match tables.walk(step.page(), step.access().rights()) {
                Verdict::Page(address) => {
                    self.done(name, address, step, values[at]);
                    tables.used(step.page(), step.access().writes());
                }
                must => self.fail(
                    name,
                    format_args!(
                        "{} of page {:#x} succeeded, must: {:x?}",
                        step.access().name(),
                        step.page(),
                        must
                    ),
                ),
            }
        }
        toucher.clear();
        Ok(())
    }

    /// Compares the frames, and the entries unless nobody knows what they must be.
    pub fn inspect(&mut self, name: &str, tables: Option<&Tables>) {
        for number in 0..self.frames {
            let (is, must) = (self.look(number), *self.word(number));
            if is != must {
                self.fail(
                    name,
                    format_args!("frame {number:#x} has {is:#x}, must: {must:#x}"),
                );
            }
            self.sum = fold(self.sum, is);
        }
        let Some(tables) = tables else { return };
        if let (count, Some((page, is, must))) = tables.wrong() {
            self.fail(
                name,
                format_args!(
                    "{count} entries, the first of page {page:#x}: {is:#x}, must: {must:#x}"
                ),
            );
        }
        for page in 0..tables.pages() {
            self.sum = fold(self.sum, tables.get(1, page));
        }
    }

    /// The line of the log that tells two configurations apart.
    pub fn report(&self, name: &str) {
        log!(
            "{}/{}: sum {:#x}, wrong {}",
            self.group,
            name,
            self.sum,
            self.wrong
        );
    }
}
