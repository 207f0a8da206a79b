// SPDX-License-Identifier: GPL-2.0-or-later
//! Every combination of rights, every misconfiguration and what is ignored, at every level and page size.

use super::super::log;
use super::super::model::Numbers;
use super::tables::{
    flags_available, frame, gigabyte_pages, Tables, Verdict, ACCESSED, RWX_NAMES, USED,
};
use super::toucher::{Access, Exit, Then, Toucher};
use super::world::World;
use crate::memory::PAGE;
use crate::vmx::ept::{LowMemory, LARGE, RWX, WRITE_BACK};
use crate::vmx::ops::VmxError;

const GROUP: &str = "ept_rights";
/// The page that is accessed.
const PAGE_NUMBER: u64 = 5;

/// Bits of an entry beside its rights and its address, for one that names a table.
const OF_TABLE: [(&str, u64); 9] = [
    ("bit 3", 1 << 3),
    ("bit 5", 1 << 5),
    ("bit 6", 1 << 6),
    ("bit 9", 1 << 9),
    ("bit 10", 1 << 10),
    ("bit 11", 1 << 11),
    ("bit 51", 1 << 51),
    ("bit 52", 1 << 52),
    ("bit 63", 1 << 63),
];

/// For a leaf: memory types and others.
const OF_LEAF: [(&str, u64); 13] = [
    ("type 0", 0),
    ("type 1", 1 << 3),
    ("type 2", 2 << 3),
    ("type 3", 3 << 3),
    ("type 4", 4 << 3),
    ("type 5", 5 << 3),
    ("type 7", 7 << 3),
    ("ignoring PAT", WRITE_BACK | 1 << 6),
    ("bit 10", WRITE_BACK | 1 << 10),
    ("bit 11", WRITE_BACK | 1 << 11),
    ("bit 51", WRITE_BACK | 1 << 51),
    ("bit 52", WRITE_BACK | 1 << 52),
    ("bit 63", WRITE_BACK | 1 << 63),
];

/// A kind of entry: its name, its level, and whether it is a leaf above the last.
const KINDS: [(&str, u32, bool); 6] = [
    ("PML4E", 4, false),
    ("PDPTE", 3, false),
    ("PDPTE of 1 GiB", 3, true),
    ("PDE", 2, false),
    ("PDE of 2 MiB", 2, true),
    ("PTE", 1, false),
];

/// The group.
pub fn run(level: u32) -> Result<(), VmxError> {
    super::group(GROUP, || {
        log!(
            "{}/accessed and dirty flags {}, 1 GiB {}",
            GROUP,
            flags_available(),
            gigabyte_pages()
        );
        for flags in [true, false] {
            // An exit is dear at a deeper level.
            if flags || level == 1 {
                entries(flags, level == 1)?;
            }
        }
        Ok(())
    })
}

/// All kinds of entries, and with `whole` everything about each of them.
fn entries(flags: bool, whole: bool) -> Result<(), VmxError> {
    let mut tables = Tables::new(LowMemory::new(), 512, flags);
    let mut world = World::new(GROUP, 512);
    let mut toucher = Toucher::new(GROUP, 8);
    toucher.prepare(&tables)?;
    for (kind, level, large) in KINDS {
        if level == 3 && large && !gigabyte_pages() {
            continue;
        }
        let leaf = large || level == 1;
        // A leaf above the last level begins where the touch region does.
        let base = match (level, leaf) {
            (1, _) => frame(PAGE_NUMBER),
            (_, true) => frame(0) | LARGE,
            _ => tables.next(level, PAGE_NUMBER),
        };
        let usual = if leaf { WRITE_BACK | USED } else { ACCESSED };
        let mut case = |name: core::fmt::Arguments<'_>, entry: u64| {
            one(
                &mut world,
                &mut toucher,
                &mut tables,
                level,
                kind,
                name,
                entry,
            )
        };
        for rights in 0..=RWX {
            let name = RWX_NAMES[rights as usize];
            case(format_args!("{name}"), base | rights | usual)?;
            // Not used yet: whether an access may note it is up to its rights.
            if flags && leaf && whole {
                case(format_args!("{name} unused"), base | rights | WRITE_BACK)?;
            }
        }
        let others: &[(&str, u64)] = if leaf { &OF_LEAF } else { &OF_TABLE };
        for (name, bits) in others {
            let usual = usual & USED;
            case(format_args!("{name}"), base | RWX | bits | usual)?;
            if !whole {
                continue;
            }
            case(format_args!("{name} r--"), base | 1 | bits | usual)?;
            case(format_args!("{name} ---"), base | bits | usual)?;
        }
        match (level, leaf) {
            (4, _) => case(format_args!("bit 7"), base | LARGE | RWX | usual)?,
            (1, _) => case(format_args!("bit 7"), base | LARGE | RWX | usual)?,
            (_, true) => {
                let low = PAGE << (9 * (level - 1) - 1);
                case(format_args!("reserved bit 12"), base | PAGE | RWX | usual)?;
                case(format_args!("highest reserved"), base | low | RWX | usual)?;
            }
            _ => {}
        }
        tables.connect();
    }
    tables.invalidate(true)?;
    world.report(if flags { "with flags" } else { "without flags" });
    Ok(())
}

/// All accesses through one entry.
fn one(
    world: &mut World,
    toucher: &mut Toucher,
    tables: &mut Tables,
    level: u32,
    kind: &str,
    name: core::fmt::Arguments<'_>,
    entry: u64,
) -> Result<(), VmxError> {
    tables.set(1, PAGE_NUMBER, super::tables::plain(frame(PAGE_NUMBER)));
    tables.set(level, PAGE_NUMBER, entry);
    let mut exits = [None; 4];
    let mut after = [0; 4];
    let mut numbers = Numbers::new(entry);
    for (number, access) in Access::EVERY.into_iter().enumerate() {
        // Each access comes to tables of which nothing is cached, and finds the entry as it was written.
        tables.set(level, PAGE_NUMBER, entry);
        tables.invalidate(false)?;
        toucher.clear();
        let value = numbers.next();
        toucher.push(access, PAGE_NUMBER, value);
        let must = tables.walk(PAGE_NUMBER, access.rights());
        toucher.run(kind, |_, step, exit| {
            world.judge(kind, must, step, exit);
            exits[number] = Some(exit);
            Ok(Then::Skip)
        })?;
        let step = toucher.steps()[0];
        after[number] = tables.get(level, PAGE_NUMBER) & USED;
        match must {
            Verdict::Page(address) if step.done != 0 => world.done(kind, address, &step, value),
            _ if step.done != 0 => world.fail(kind, format_args!("{} succeeded", access.name())),
            _ => {}
        }
    }
    let show = |exit: Option<Exit>| exit.unwrap_or_default();
    log!(
        "{}/{} {}: read {} write {} update {} fetch {}; flags {:#x} {:#x} {:#x} {:#x}",
        GROUP,
        kind,
        name,
        show(exits[0]),
        show(exits[1]),
        show(exits[2]),
        show(exits[3]),
        after[0],
        after[1],
        after[2],
        after[3]
    );
    Ok(())
}
