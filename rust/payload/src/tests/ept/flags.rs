// SPDX-License-Identifier: GPL-2.0-or-later
//! Accessed and dirty flags, exactly: of what the child touched and of nothing else, at the first touch and again
//! after its parent has cleared them; and the page-modification log.

use super::super::log;
use super::super::model::{fold, Numbers};
use super::around::any;
use super::tables::{frame, Tables, ACCESSED, DIRTY, USED};
use super::toucher::{Access, Then, Toucher, LOG_FULL};
use super::world::World;
use crate::cpu;
use crate::memory::{self, PAGE};
use crate::vmx::ept::{LowMemory, LARGE, RWX, WRITE_BACK};
use crate::vmx::field::*;
use crate::vmx::ops::{vmread, vmwrite, VmxError};

const GROUP: &str = "ept_flags";
const PAGES: u64 = 1024;
const BATCH: usize = 64;
/// Secondary control: page-modification logging.
const ENABLE_PML: u64 = 1 << 17;
/// Entries of the log.
const LOG_ENTRIES: u64 = 512;

/// The group.
pub fn run(level: u32) -> Result<(), VmxError> {
    super::group(GROUP, || {
        for flags in [true, false] {
            small(flags, if level > 1 { 1 } else { 4 })?;
            upper(flags)?;
        }
        modification_log(if level > 1 { 1 } else { 4 })
    })
}

/// Last-level entries in every state, touched, cleared and touched again.
fn small(flags: bool, rounds: u32) -> Result<(), VmxError> {
    let mut tables = Tables::new(LowMemory::new(), PAGES, flags);
    let mut world = World::new(GROUP, PAGES);
    let mut toucher = Toucher::new(GROUP, BATCH);
    let mut numbers = Numbers::new(23 + flags as u64);
    toucher.prepare(&tables)?;
    for round in 0..rounds {
        for page in 0..PAGES {
            // Stretches of equal entries, as hypervisors make them, and all mixed.
            let state = match round % 2 {
                0 => (page / 64 % 3) as usize,
                _ => numbers.below(3),
            };
            let used = [0, ACCESSED, USED][state];
            tables.set(1, page, frame(page) | RWX | WRITE_BACK | used);
        }
        tables.invalidate(round % 2 == 0)?;
        for turn in 0..8 {
            let centre = numbers.below(PAGES as usize) as u64;
            while !toucher.full() {
                let page = (centre + numbers.below(96) as u64) % PAGES;
                let access = match turn {
                    0 => Access::Read,
                    1 => Access::Write,
                    _ => any(&mut numbers),
                };
                world.push(&mut toucher, &tables, access, page, &mut numbers);
            }
            world.batch("accesses", &mut toucher, &mut tables)?;
            world.inspect("after accesses", Some(&tables));
            // What a hypervisor does that looks which pages are used, or logs what is written.
            let cleared = [DIRTY, ACCESSED, USED][turn % 3];
            for page in centre..centre + 80 {
                if numbers.below(3) != 0 {
                    let page = page % PAGES;
                    let entry = tables.get(1, page);
                    tables.set(1, page, entry & !cleared);
                }
            }
            tables.invalidate(turn % 2 == 0)?;
            // The same pages first.
            toucher.clear();
        }
    }
    // Cleared without INVEPT: a flag may be missing then, but none may be there that nobody asked for.
    for page in 0..PAGES {
        tables.set(1, page, frame(page) | RWX | WRITE_BACK);
    }
    for page in (0..PAGES).step_by(64) {
        world.push(&mut toucher, &tables, Access::Write, page, &mut numbers);
    }
    let mut touched = [false; (PAGES / 64) as usize];
    toucher.run("stale flags", |_, _, _| Ok(Then::Skip))?;
    for (slot, step) in touched.iter_mut().zip(toucher.steps()) {
        *slot = step.done != 0;
        *world.word(step.page()) = step.value;
    }
    toucher.clear();
    for page in 0..PAGES {
        let noted = tables.get(1, page) & USED;
        let ours = page % 64 == 0;
        if ours && !touched[page as usize / 64] || !(ours && flags) && noted != 0 {
            world.fail("stale flags", format_args!("page {page:#x} has {noted:#x}"));
        }
    }
    tables.accept();
    tables.invalidate(true)?;
    for page in 0..PAGES {
        tables.set(1, page, frame(page) | RWX | WRITE_BACK);
    }
    for page in (0..PAGES).step_by(64) {
        world.push(&mut toucher, &tables, Access::Write, page, &mut numbers);
    }
    world.batch("flags again", &mut toucher, &mut tables)?;
    world.inspect("flags again", Some(&tables));
    world.report(if flags { "with flags" } else { "without flags" });
    Ok(())
}

/// The flags of upper entries and of large pages.
fn upper(flags: bool) -> Result<(), VmxError> {
    let mut tables = Tables::new(LowMemory::new(), PAGES, flags);
    let mut toucher = Toucher::new(GROUP, BATCH);
    toucher.prepare(&tables)?;
    for large in [false, true] {
        for access in Access::EVERY {
            for page in 0..PAGES {
                tables.set(1, page, frame(page) | RWX | WRITE_BACK);
            }
            let page = 600;
            tables.connect();
            for level in 2..=4 {
                let entry = tables.next(level, page) | RWX;
                tables.set(level, page, entry);
            }
            if large {
                tables.set(2, page, frame(512) | RWX | WRITE_BACK | LARGE);
            }
            tables.invalidate(false)?;
            toucher.clear();
            toucher.push(access, page, 0);
            toucher.run("upper entries", |_, _, exit| {
                log!("{}/upper entries: FAIL: left for {}", GROUP, exit);
                Ok(Then::Skip)
            })?;
            let of = |level| tables.get(level, page) & USED;
            let others = (0..PAGES)
                .filter(|&other| other != page && tables.get(1, other) & USED != 0)
                .count();
            log!(
                "{}/upper entries, flags {}, 2 MiB {}, {}: {:#x} {:#x} {:#x} {:#x}, others {}, done {}",
                GROUP,
                flags,
                large,
                access.name(),
                of(4),
                of(3),
                of(2),
                of(1),
                others,
                toucher.steps()[0].done
            );
        }
    }
    tables.connect();
    tables.invalidate(true)
}

/// The page-modification log: each page that became dirty, once, in order.
fn modification_log(rounds: u32) -> Result<(), VmxError> {
    const PROCBASED_CTLS2: u32 = 0x48b;
    let offered = cpu::rdmsr(PROCBASED_CTLS2).is_ok_and(|allowed| allowed >> 32 & ENABLE_PML != 0);
    let mut tables = Tables::new(LowMemory::new(), PAGES, true);
    if !offered || !tables.flags() {
        log!("{}/page-modification log: not available", GROUP);
        return Ok(());
    }
    let mut world = World::new(GROUP, PAGES);
    let mut toucher = Toucher::new(GROUP, 300);
    let mut numbers = Numbers::new(29);
    let buffer = memory::pages(1);
    let at = |index: u64| {
        // SAFETY: a page of ours, the index is below 512.
        unsafe { ((buffer + (index % LOG_ENTRIES) * 8) as *const u64).read_volatile() }
    };
    toucher.prepare(&tables)?;
    vmwrite(PML_ADDRESS, buffer)?;
    vmwrite(
        SECONDARY_VM_EXEC_CONTROL,
        vmread(SECONDARY_VM_EXEC_CONTROL)? | ENABLE_PML,
    )?;
    for round in 0..rounds {
        for page in 0..PAGES {
            let used = [0, ACCESSED, USED, ACCESSED][numbers.below(4)];
            tables.set(1, page, frame(page) | RWX | WRITE_BACK | used);
        }
        tables.invalidate(true)?;
        // The child's stack and list are below, dirty already; only the window can be logged.
        for turn in 0..3 {
            // A short log is full several times.
            let start = if turn == 1 { 6 } else { LOG_ENTRIES - 1 };
            vmwrite(GUEST_PML_INDEX, start)?;
            while !toucher.full() {
                let page = match turn {
                    0 => toucher.steps().len() as u64 * 3 % PAGES,
                    _ => numbers.below(PAGES as usize) as u64,
                };
                let access = any(&mut numbers);
                toucher.push(access, page, numbers.next());
            }
            let (mut sum, mut logged, mut full) = (0, 0, 0);
            let mut take = |from: u64| {
                // The index is that of the next entry, and below 0 when the log is full.
                let mut index = start;
                while index != from & 0xffff && index < LOG_ENTRIES {
                    sum = fold(sum, at(index));
                    logged += 1;
                    index = index.wrapping_sub(1);
                }
            };
            let good = toucher.run("log", |_, _, exit| {
                if exit.reason != LOG_FULL {
                    log!("{}/page-modification log: FAIL: left for {}", GROUP, exit);
                    return Ok(Then::Skip);
                }
                full += 1;
                take(vmread(GUEST_PML_INDEX)?);
                vmwrite(GUEST_PML_INDEX, start)?;
                Ok(Then::Retry)
            })?;
            take(vmread(GUEST_PML_INDEX)?);
            // What the log must hold, from the entries before and the list.
            let mut must = 0;
            let mut expected = 0;
            for step in toucher.steps() {
                let old = tables.expectation(step.page());
                if step.access().writes() && old & DIRTY == 0 {
                    must += 1;
                    expected = fold(expected, super::tables::WINDOW + step.page() * PAGE);
                }
                tables.used(step.page(), step.access().writes());
            }
            let (wrong, _) = tables.wrong();
            log!(
                "{}/page-modification log {} {}: {} entries, sum {:#x}, full {}, flags wrong {}{}",
                GROUP,
                round,
                turn,
                logged,
                sum,
                full,
                wrong,
                if good && logged == must && sum == expected && wrong == 0 {
                    ""
                } else {
                    ": FAIL"
                }
            );
            toucher.clear();
            for page in 0..PAGES {
                if numbers.below(3) == 0 {
                    let entry = tables.get(1, page);
                    tables.set(1, page, entry & !DIRTY);
                }
            }
            tables.invalidate(false)?;
        }
    }
    world.fill();
    Ok(())
}
