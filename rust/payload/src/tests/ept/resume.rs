// SPDX-License-Identifier: GPL-2.0-or-later
//! What a parent may do between an EPT violation and the next entry. It need not map what was missed, nor let
//! the child try again, nor even enter that child: an entry that is filled on resume has to be one that the
//! child then asks for.

use super::super::log;
use super::super::model::{fold, Numbers};
use super::tables::{frame, plain, Tables, ACCESSED, DIRTY, HOLE, USED};
use super::toucher::{Access, Exit, Then, Toucher, VIOLATION};
use super::world::World;
use crate::memory::PAGE;
use crate::vmx::ept::{LowMemory, LARGE, RWX, WRITE_BACK};
use crate::vmx::field::*;
use crate::vmx::ops::{vmclear, vmptrld, vmwrite, VmxError};

const GROUP: &str = "ept_resume";
const PAGES: u64 = 1024;
/// The page that is missed, and what is done about it.
const MISSED: u64 = 515;
/// Pages around it that are not mapped. What is further away is.
const NEAR: u64 = 40;
/// Another frame than the page's own.
const OTHER: u64 = 77;

/// What the parent does after a violation.
type Action = fn(&mut Parent, u32, Exit) -> Result<Then, VmxError>;

/// What an action works on.
struct Parent {
    tables: [Tables; 2],
    second: Toucher,
    /// VMCS of the child that left.
    vmcs: u64,
    world: World,
    numbers: Numbers,
}

impl Parent {
    fn map(&mut self, entry: u64) -> Then {
        self.tables[0].set(1, MISSED, entry);
        Then::Retry
    }

    /// The page's neighbours, mapped without having been used.
    fn neighbours(&mut self) {
        for page in MISSED - 8..=MISSED + 8 {
            if page != MISSED {
                self.tables[0].set(1, page, fresh(page));
            }
        }
    }
}

/// A last-level entry for a page's own frame, not used yet.
fn fresh(page: u64) -> u64 {
    frame(page) | RWX | WRITE_BACK
}

/// Each: its name, the entry that the access finds, and what the parent does at the number of the violation.
const CASES: &[(&str, u64, Action)] = &[
    ("mapped", 0, |p, _, _| Ok(p.map(plain(frame(MISSED))))),
    ("mapped unused", 0, |p, _, _| Ok(p.map(fresh(MISSED)))),
    ("mapped clean", 0, |p, _, _| {
        Ok(p.map(fresh(MISSED) | ACCESSED))
    }),
    ("mapped dirty, not accessed", 0, |p, _, _| {
        Ok(p.map(fresh(MISSED) | DIRTY))
    }),
    ("mapped unused, left out", 0, |p, _, _| {
        p.map(fresh(MISSED));
        Ok(Then::Skip)
    }),
    ("mapped clean, left out", 0, |p, _, _| {
        p.map(fresh(MISSED) | ACCESSED);
        Ok(Then::Skip)
    }),
    ("not mapped, left out", 0, |_, _, _| Ok(Then::Skip)),
    ("not mapped, tried again", 0, |p, times, _| {
        Ok(match times {
            0..=2 => Then::Retry,
            _ => p.map(plain(frame(MISSED))),
        })
    }),
    ("read-only at first", 0, |p, times, _| {
        Ok(p.map(match times {
            0 => frame(MISSED) | 1 | WRITE_BACK | USED,
            _ => fresh(MISSED),
        }))
    }),
    ("execute-only at first", 0, |p, times, _| {
        Ok(p.map(match times {
            0 => frame(MISSED) | 4 | WRITE_BACK | USED,
            _ => fresh(MISSED) | ACCESSED,
        }))
    }),
    ("each right by itself", 0, |p, times, _| {
        Ok(p.map(
            frame(MISSED)
                | WRITE_BACK
                | match times {
                    0 => 4,
                    1 => 5,
                    2 => 1,
                    _ => 3,
                },
        ))
    }),
    ("write-only at first", 0, |p, times, _| {
        Ok(p.map(match times {
            0 => frame(MISSED) | 2 | WRITE_BACK,
            _ => plain(frame(MISSED)),
        }))
    }),
    ("memory type 7 at first", 0, |p, times, _| {
        Ok(p.map(match times {
            0 => frame(MISSED) | RWX | 7 << 3,
            _ => plain(frame(MISSED)),
        }))
    }),
    ("uncached", 0, |p, _, _| {
        Ok(p.map(frame(MISSED) | RWX | USED))
    }),
    ("beyond at first", 0, |p, times, _| {
        Ok(p.map(match times {
            0 => plain(frame(MISSED)) | 1 << 51,
            _ => plain(frame(MISSED)),
        }))
    }),
    ("from read-only", 1, |p, _, _| Ok(p.map(fresh(MISSED)))),
    ("from read-only, another frame", 1, |p, _, _| {
        Ok(p.map(plain(frame(OTHER))))
    }),
    ("from read-only, left out", 1, |p, _, _| {
        p.map(fresh(MISSED));
        Ok(Then::Skip)
    }),
    ("neighbours too", 0, |p, _, _| {
        p.neighbours();
        Ok(p.map(fresh(MISSED)))
    }),
    ("neighbours only, left out", 0, |p, _, _| {
        p.neighbours();
        Ok(Then::Skip)
    }),
    ("a neighbour at first", 0, |p, times, _| {
        if times == 0 {
            p.neighbours();
            return Ok(Then::Retry);
        }
        Ok(p.map(fresh(MISSED)))
    }),
    ("mapped and taken away", 0, |p, times, _| {
        p.map(plain(frame(OTHER)));
        Ok(p.map(if times == 0 { 0 } else { fresh(MISSED) }))
    }),
    ("mapped, INVEPT of it", 0, |p, _, _| {
        p.map(fresh(MISSED));
        p.tables[0].invalidate(false)?;
        Ok(Then::Retry)
    }),
    ("mapped, INVEPT of all", 0, |p, _, _| {
        p.map(fresh(MISSED));
        p.tables[0].invalidate(true)?;
        Ok(Then::Retry)
    }),
    ("where nothing is", 0, |p, _, _| Ok(p.map(plain(HOLE)))),
    ("where nothing is, left out", 0, |p, _, _| {
        p.map(HOLE | RWX | WRITE_BACK);
        Ok(Then::Skip)
    }),
    ("without its table", 2, |p, times, _| {
        if times == 0 {
            // The last level is ready below an entry that is not.
            return Ok(p.map(fresh(MISSED)));
        }
        p.tables[0].connect();
        Ok(Then::Retry)
    }),
    ("without its table, at once", 2, |p, _, _| {
        p.tables[0].connect();
        Ok(p.map(fresh(MISSED)))
    }),
    ("as part of 2 MiB", 2, |p, _, _| {
        p.tables[0].set(2, MISSED, frame(512) | RWX | WRITE_BACK | LARGE);
        Ok(Then::Retry)
    }),
    ("as part of 2 MiB, left out", 2, |p, _, _| {
        p.tables[0].set(2, MISSED, frame(512) | RWX | WRITE_BACK | LARGE);
        Ok(Then::Skip)
    }),
    ("as part of read-only 2 MiB", 2, |p, times, _| {
        let rights = if times == 0 { 1 } else { RWX };
        p.tables[0].set(2, MISSED, frame(512) | rights | WRITE_BACK | LARGE);
        p.tables[0].invalidate(false)?;
        Ok(Then::Retry)
    }),
    ("without the third level", 3, |p, _, _| {
        p.tables[0].connect();
        Ok(p.map(fresh(MISSED)))
    }),
    ("without the fourth level", 4, |p, _, _| {
        p.tables[0].connect();
        Ok(p.map(fresh(MISSED)))
    }),
    ("under read-only upper entries", 0, |p, times, _| {
        let table = p.tables[0].next(2, MISSED);
        let rights = if times == 0 { 1 } else { RWX };
        p.tables[0].set(2, MISSED, table | rights);
        p.tables[0].invalidate(false)?;
        Ok(p.map(fresh(MISSED)))
    }),
    ("through another root", 0, |p, _, _| {
        p.map(plain(frame(MISSED)));
        p.tables[1].set(1, MISSED, fresh(OTHER));
        vmwrite(EPT_POINTER, p.tables[1].pointer())?;
        Ok(Then::Retry)
    }),
    ("through another root that lacks it", 0, |p, times, _| {
        p.map(fresh(MISSED));
        let root = if times == 0 { 1 } else { 0 };
        vmwrite(EPT_POINTER, p.tables[root].pointer())?;
        Ok(Then::Retry)
    }),
    ("another VMCS in between", 0, |p, _, _| {
        p.map(fresh(MISSED));
        p.between(MISSED)?;
        Ok(Then::Retry)
    }),
    ("another VMCS in between, neighbours", 0, |p, _, _| {
        p.neighbours();
        p.map(fresh(MISSED));
        p.between(MISSED + 1)?;
        Ok(Then::Retry)
    }),
    ("VMCLEAR in between", 0, |p, _, _| {
        p.map(fresh(MISSED));
        vmclear(p.vmcs)?;
        vmptrld(p.vmcs)?;
        Ok(Then::Relaunch)
    }),
    ("the address rewritten", 0, |p, _, _| {
        // A processor may let exit information be written; what it says must not matter.
        let _ = vmwrite(
            GUEST_PHYSICAL_ADDRESS,
            super::tables::WINDOW + (MISSED + 3) * PAGE,
        );
        p.neighbours();
        p.map(fresh(MISSED));
        Ok(Then::Skip)
    }),
    ("another VPID", 0, |p, _, _| {
        vmwrite(VIRTUAL_PROCESSOR_ID, 2)?;
        Ok(p.map(fresh(MISSED)))
    }),
    ("frame by frame", 0, |p, times, exit| {
        // Each try finds another frame, none of them for long enough.
        p.world.sum = fold(p.world.sum, exit.qualification);
        Ok(p.map(match times {
            0 => frame(OTHER) | 4 | WRITE_BACK,
            1 => frame(OTHER + 1) | 1 | WRITE_BACK,
            2 => frame(OTHER + 2) | 5 | WRITE_BACK,
            _ => fresh(MISSED),
        }))
    }),
];

impl Parent {
    /// The other child reads a page through the other root, which lacks it, is given it, and reads it.
    fn between(&mut self, page: u64) -> Result<(), VmxError> {
        vmptrld(self.second.bed.child.vmcs)?;
        self.second.clear();
        self.second.push(Access::Read, page, 0);
        let (tables, mut count) = (&mut self.tables[1], 0);
        self.second.run("another VMCS", |_, step, exit| {
            count += 1;
            if exit.reason != VIOLATION {
                return Ok(Then::Skip);
            }
            tables.set(1, step.page(), plain(frame(OTHER)));
            Ok(Then::Retry)
        })?;
        let value = self.second.steps()[0].value;
        self.world.sum = fold(fold(self.world.sum, value), count);
        vmptrld(self.vmcs)
    }

    /// Nothing is mapped but what is far away.
    fn reset(&mut self, start: u64) -> Result<(), VmxError> {
        for tables in &mut self.tables {
            tables.connect();
            for page in MISSED - NEAR..=MISSED + NEAR {
                tables.set(1, page, 0);
            }
        }
        match start {
            0 => {}
            1 => self.tables[0].set(1, MISSED, frame(MISSED) | 1 | WRITE_BACK | USED),
            level => self.tables[0].set(level as u32, MISSED, 0),
        }
        self.tables[0].invalidate(true)
    }
}

/// The group.
pub fn run(_: u32) -> Result<(), VmxError> {
    super::group(GROUP, || {
        let low = LowMemory::new();
        let mut first = Toucher::new(GROUP, 4);
        let mut parent = Parent {
            tables: [Tables::new(low, PAGES, true), Tables::new(low, PAGES, true)],
            second: Toucher::new(GROUP, 4),
            vmcs: first.bed.child.vmcs,
            world: World::new(GROUP, PAGES),
            numbers: Numbers::new(43),
        };
        for tables in &mut parent.tables {
            for page in 0..PAGES {
                tables.set(1, page, plain(frame(page)));
            }
        }
        parent.second.prepare(&parent.tables[1])?;
        first.prepare(&parent.tables[0])?;
        for &(name, start, action) in CASES {
            for access in Access::EVERY {
                one(&mut first, &mut parent, name, start, access, action)?;
            }
        }
        vmclear(parent.second.bed.child.vmcs)?;
        parent.tables[0].invalidate(true)?;
        parent.world.report("all");
        Ok(())
    })
}

fn one(
    first: &mut Toucher,
    parent: &mut Parent,
    name: &str,
    start: u64,
    access: Access,
    action: Action,
) -> Result<(), VmxError> {
    parent.reset(start)?;
    vmwrite(EPT_POINTER, parent.tables[0].pointer())?;
    vmwrite(VIRTUAL_PROCESSOR_ID, 1)?;
    parent.world.fill();
    first.clear();
    // KVM cannot emulate these where nothing is.
    let access = match access {
        Access::Update | Access::Fetch if name.starts_with("where") => Access::Read,
        access => access,
    };
    let value = parent.numbers.next();
    first.push(access, MISSED, value);
    let (mut exits, mut count, mut last) = (0, 0, Exit::default());
    first.run(name, |_, _, exit| {
        for value in [exit.reason, exit.qualification, exit.address / PAGE] {
            exits = fold(exits, value);
        }
        last = exit;
        count += 1;
        action(parent, count - 1, exit)
    })?;
    let step = first.steps()[0];
    let entries: [u64; 2] = core::array::from_fn(|root| parent.tables[root].get(1, MISSED) & 0xfff);
    let noted = (0..PAGES).filter(|&page| {
        page != MISSED && parent.tables[0].get(1, page) != parent.tables[0].expectation(page)
    });
    let frames = (0..PAGES).filter(|&number| parent.world.look(number) != 0);
    log!(
        "{}/{} {}: {} exits {:#x}, last {}; done {} value {:#x}; entries {:#x} {:#x} upper {:#x}, others {}; written {}",
        GROUP,
        access.name(),
        name,
        count,
        exits,
        last,
        step.done,
        step.value ^ if access == Access::Write { value } else { 0 },
        entries[0],
        entries[1],
        parent.tables[0].get(2, MISSED) & 0xfff,
        noted.count(),
        frames.fold(0, fold)
    );
    Ok(())
}
