// SPDX-License-Identifier: GPL-2.0-or-later
//! The parent's VMM logs which pages are written, as for a live migration, and switches that on and off while the
//! child writes through its tables: no page that changed may be missing from the log. (It may have more: what a read
//! made writable. How many depends on who fills the shadow when.)

use protocol::ports::touch;

use super::super::model::Numbers;
use super::around::any;
use super::tables::{frame, plain, Tables, ACCESSED};
use super::toucher::{Access, Toucher};
use super::world::World;
use crate::control;
use crate::vmx::ept::{LowMemory, RWX, WRITE_BACK};
use crate::vmx::ops::VmxError;

const GROUP: &str = "ept_logging";
const PAGES: u64 = 1024;
const BATCH: usize = 96;

/// The group.
pub fn run(level: u32) -> Result<(), VmxError> {
    super::group(GROUP, || {
        if level > 1 {
            return rounds(true, 1);
        }
        rounds(true, 3)?;
        rounds(false, 3)
    })
}

fn rounds(flags: bool, count: u64) -> Result<(), VmxError> {
    let mut tables = Tables::new(LowMemory::new(), PAGES, flags);
    let mut world = World::new(GROUP, PAGES);
    let mut toucher = Toucher::new(GROUP, BATCH);
    let mut numbers = Numbers::new(47 + flags as u64);
    toucher.prepare(&tables)?;
    for page in 0..PAGES {
        tables.set(1, page, plain(frame(page)));
    }
    tables.invalidate(true)?;
    for round in 0..count {
        let mut at = 0;
        for turn in 0..12 {
            // On, fetched several times, and off again, in the middle of a stretch of writes.
            match turn % 6 {
                1 => control::touch(touch::LOG, PAGES as u32),
                5 => control::touch(touch::UNLOG, PAGES as u32),
                _ => {}
            }
            while !toucher.full() {
                // Upwards in order, so that windows grow, or near each other.
                let (page, access) = match round % 3 {
                    0 => (at, Access::Write),
                    1 => (at / 2 + numbers.below(64) as u64, any(&mut numbers)),
                    _ => (
                        at * 3,
                        if at % 5 == 0 {
                            Access::Write
                        } else {
                            Access::Read
                        },
                    ),
                };
                at += 1;
                world.push(&mut toucher, &tables, access, page % PAGES, &mut numbers);
            }
            world.batch("writes", &mut toucher, &mut tables)?;
            if matches!(turn % 6, 1..=4) {
                let (missing, _) = control::compare(PAGES as u32);
                if missing != 0 {
                    world.fail(
                        "log",
                        format_args!("round {round} turn {turn}: {missing} missing"),
                    );
                }
            }
            if turn % 3 == 2 {
                // What a parent does at the same time: takes pages away, and notes which are dirty.
                for _ in 0..24 {
                    let page = numbers.below(PAGES as usize) as u64;
                    let new = match numbers.below(3) {
                        0 => frame(page) | RWX | WRITE_BACK | ACCESSED,
                        1 => frame(page) | RWX | WRITE_BACK,
                        _ => plain(frame(page ^ 1)),
                    };
                    tables.set(1, page, new);
                }
                tables.invalidate(turn % 2 == 0)?;
            }
        }
        world.inspect("at the end of a round", Some(&tables));
    }
    control::touch(touch::UNLOG, PAGES as u32);
    world.report(if flags { "with flags" } else { "without flags" });
    Ok(())
}
