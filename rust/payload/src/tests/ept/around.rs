// SPDX-License-Identifier: GPL-2.0-or-later
//! Accesses in clusters among neighbours of every kind, while the tables change between them: whatever was
//! filled around one access must give every other what its own entry says.

use super::super::model::Numbers;
use super::tables::{frame, plain, Tables, Verdict, ACCESSED, ADDRESS, EXECUTE, HOLE, READ, USED};
use super::toucher::{Access, Then, Toucher};
use super::world::World;
use crate::memory::PAGE;
use crate::vmx::ept::{LowMemory, LARGE, RWX, WRITE_BACK};
use crate::vmx::ops::VmxError;

const GROUP: &str = "ept_around";
/// Pages of the window, and frames: two tables of the last level.
const PAGES: u64 = 1024;
/// Accesses of a batch.
const BATCH: usize = 48;

/// The group.
pub fn run(level: u32) -> Result<(), VmxError> {
    super::group(GROUP, || {
        if level > 1 {
            rounds(true, 1)?;
            return sweeps(true, 1);
        }
        for flags in [true, false] {
            rounds(flags, 6)?;
            sweeps(flags, 3)?;
        }
        Ok(())
    })
}

/// Some access.
pub fn any(numbers: &mut Numbers) -> Access {
    Access::EVERY[numbers.below(4)]
}

/// Some entry, most of which a hypervisor would make.
pub fn entry(numbers: &mut Numbers, frames: u64) -> u64 {
    let address = frame(numbers.below(frames as usize) as u64);
    let hole = HOLE + numbers.below(64) as u64 * PAGE;
    match numbers.below(32) {
        0..=11 => plain(address),
        12..=14 => 0,
        15 => address | WRITE_BACK, // an address alone maps nothing
        16 | 17 => address | RWX | WRITE_BACK,
        18 | 19 => address | RWX | WRITE_BACK | ACCESSED,
        20 => address | 1 | WRITE_BACK | USED,
        21 => address | 1 | WRITE_BACK,
        22 => address | 3 | WRITE_BACK | USED,
        23 => address | 5 | WRITE_BACK | ACCESSED,
        24 => address | 5 | WRITE_BACK,
        25 => address | 4 | WRITE_BACK | USED,
        26 => address | 2 | WRITE_BACK | USED,
        27 => address | RWX | 7 << 3 | USED,
        28 => address | RWX | WRITE_BACK | 1 << 51 | USED,
        29 => address | RWX | USED,
        30 => hole | RWX | WRITE_BACK | USED,
        _ => hole | 1 | WRITE_BACK,
    }
}

/// An entry that differs from `old` in one thing.
fn changed(old: u64, numbers: &mut Numbers, frames: u64) -> u64 {
    match numbers.below(8) {
        0 => 0,
        1 => old & !2,
        2 => old & !6,
        3 => old & !USED,
        4 => old & !(1 << 9),
        5 if old & ADDRESS < HOLE => old & !ADDRESS | frame(numbers.below(frames as usize) as u64),
        // An entry without an address would give the child the payload's own memory.
        6 if old & ADDRESS != 0 => old | RWX,
        _ => entry(numbers, frames),
    }
}

fn rounds(flags: bool, count: u64) -> Result<(), VmxError> {
    let mut tables = Tables::new(LowMemory::new(), PAGES, flags);
    let mut world = World::new(GROUP, PAGES);
    let mut toucher = Toucher::new(GROUP, BATCH);
    let mut numbers = Numbers::new(17 + flags as u64);
    toucher.prepare(&tables)?;
    for _ in 0..count {
        for page in 0..PAGES {
            tables.set(1, page, entry(&mut numbers, PAGES));
        }
        tables.invalidate(numbers.below(2) == 0)?;
        for turn in 0..8 {
            // Clusters lie across the border of the two tables as well.
            let centre = match turn {
                0 => 504 + numbers.below(16) as u64,
                _ => numbers.below(PAGES as usize) as u64,
            };
            cluster(&mut world, &mut toucher, &tables, centre, &mut numbers);
            world.batch("clusters", &mut toucher, &mut tables)?;
            world.inspect("after a cluster", Some(&tables));
            match turn {
                3 => upper(&mut world, &mut toucher, &mut tables, centre, &mut numbers)?,
                _ => edit(&mut tables, centre, &mut numbers)?,
            }
            cluster(&mut world, &mut toucher, &tables, centre, &mut numbers);
            world.batch("clusters after a change", &mut toucher, &mut tables)?;
            world.inspect("after a change", Some(&tables));
        }
    }
    world.report(if flags { "with flags" } else { "without flags" });
    Ok(())
}

/// The pages in order, upwards, downwards and in strides, with some left out, among entries of which most are
/// plain: habits that make a window grow until it is a whole table. Entries ahead and behind change meanwhile.
fn sweeps(flags: bool, count: u64) -> Result<(), VmxError> {
    let mut tables = Tables::new(LowMemory::new(), PAGES, flags);
    let mut world = World::new(GROUP, PAGES);
    let mut toucher = Toucher::new(GROUP, PAGES as usize / 8);
    let mut numbers = Numbers::new(19 + flags as u64);
    toucher.prepare(&tables)?;
    for round in 0..count {
        for page in 0..PAGES {
            let new = match numbers.below(8) {
                0 => entry(&mut numbers, PAGES),
                1 => frame(page) | RWX | WRITE_BACK | ACCESSED,
                _ => plain(frame(page)),
            };
            tables.set(1, page, new);
        }
        tables.invalidate(round % 2 == 0)?;
        for at in 0..PAGES {
            let page = match round % 3 {
                0 => at,
                1 => PAGES - 1 - at,
                _ => at * 16 % PAGES + at * 16 / PAGES,
            };
            if numbers.below(4) != 0 {
                let access = any(&mut numbers);
                world.push(&mut toucher, &tables, access, page, &mut numbers);
            }
            // Not at the borders of tables.
            if at % 97 != 96 && at + 1 != PAGES {
                continue;
            }
            world.batch("sweeps", &mut toucher, &mut tables)?;
            world.inspect("after a sweep", Some(&tables));
            if numbers.below(2) == 0 {
                for _ in 0..4 {
                    let centre = (page + numbers.below(128) as u64) % PAGES;
                    edit(&mut tables, centre, &mut numbers)?;
                }
            }
        }
    }
    world.report(match flags {
        true => "sweeps with flags",
        false => "sweeps without flags",
    });
    Ok(())
}

/// Accesses to the page `centre`, then to its neighbours in no order, and some far away.
fn cluster(
    world: &mut World,
    toucher: &mut Toucher,
    tables: &Tables,
    centre: u64,
    numbers: &mut Numbers,
) {
    let first = any(numbers);
    world.push(toucher, tables, first, centre, numbers);
    while !toucher.full() {
        let page = match numbers.below(8) {
            0 => numbers.below(PAGES as usize) as u64,
            1..=3 => centre / 8 * 8 + numbers.below(8) as u64,
            _ => (centre + PAGES + numbers.below(49) as u64 - 24) % PAGES,
        };
        let access = any(numbers);
        world.push(toucher, tables, access, page, numbers);
    }
}

/// Changes some of the neighbours, and says so.
fn edit(tables: &mut Tables, centre: u64, numbers: &mut Numbers) -> Result<(), VmxError> {
    for _ in 0..12 {
        let page = (centre + PAGES + numbers.below(33) as u64 - 16) % PAGES;
        let new = changed(tables.get(1, page), numbers, PAGES);
        tables.set(1, page, new);
    }
    tables.invalidate(numbers.below(2) == 0)
}

/// Changes an upper entry for a while: rights, a large page, nothing, the other table.
fn upper(
    world: &mut World,
    toucher: &mut Toucher,
    tables: &mut Tables,
    centre: u64,
    numbers: &mut Numbers,
) -> Result<(), VmxError> {
    let table = tables.next(2, centre);
    let other = tables.next(2, centre ^ 512);
    let large = frame(0) | LARGE | WRITE_BACK;
    let changes = [
        (2, table | 1 | ACCESSED),
        (2, 0),
        (2, large | RWX | USED),
        (2, large | 5 | USED),
        (2, large | 1),
        (2, table | 2 | ACCESSED),
        (3, tables.next(3, centre) | 5 | ACCESSED),
        (3, 0),
        (4, tables.next(4, centre) | 1 | ACCESSED),
        (2, table | 5),
    ];
    // KVM 7.3 warns (in make_spte) when it fills a neighbour that no right is left of: an entry for execution
    // only, below an upper one for reading only. Its log is to stay quiet.
    for page in 0..PAGES {
        let entry = tables.get(1, page);
        if entry & RWX == EXECUTE {
            tables.set(1, page, entry | READ);
        }
    }
    for (level, entry) in changes {
        tables.set(level, centre, entry);
        tables.invalidate(numbers.below(2) == 0)?;
        cluster(world, toucher, tables, centre, numbers);
        // Nobody can emulate a fetch from where no memory is, and the walk above knows the last level only.
        world.batch("an upper entry", toucher, tables)?;
        world.inspect("after an upper entry", Some(tables));
        tables.connect();
        tables.invalidate(numbers.below(2) == 0)?;
    }
    // Through the other's table the neighbours are others: entries of one table, pages of two.
    tables.set(2, centre, other | RWX | ACCESSED);
    tables.invalidate(false)?;
    for at in 0..8 {
        let page = centre / 8 * 8 + at;
        toucher.push(Access::Read, page, 0);
    }
    let base = (centre ^ 512) & !511;
    toucher.run("the other table", |_, step, exit| {
        let must = tables.walk(base + step.page() % 512, READ);
        world.judge("the other table", must, step, exit);
        Ok(Then::Skip)
    })?;
    for step in toucher.steps().iter().filter(|step| step.done != 0) {
        match tables.walk(base + step.page() % 512, READ) {
            Verdict::Page(address) => world.done("the other table", address, step, 0),
            must => world.fail("the other table", format_args!("read, must: {must:x?}")),
        }
    }
    toucher.clear();
    tables.connect();
    tables.accept();
    tables.invalidate(true)
}
