// SPDX-License-Identifier: GPL-2.0-or-later
//! An upper entry that changes behind the back of whoever shadows it: the parent has its own hypervisor write it, by a VMREAD with an
//! operand in memory. KVM 7.3 does not take that for a write to a table. What it has already it keeps (so no page is touched again
//! here that was touched before), but a page that it does not have yet it looks up anew, in the new table; and so must
//! everybody else.

use super::super::log;
use super::tables::{frame, plain, Tables, ACCESSED};
use super::toucher::{Access, Then, Toucher, VIOLATION};
use super::world::{tagged, World};
use crate::vmx::ept::{LowMemory, RWX};
use crate::vmx::field::IO_BITMAP_A;
use crate::vmx::ops::{vmread_to, vmwrite, VmxError};

const GROUP: &str = "ept_behind";
const PAGES: u64 = 512;

/// The group.
pub fn run(_level: u32) -> Result<(), VmxError> {
    super::group(GROUP, || {
        for flags in [true, false] {
            behind(flags)?;
        }
        Ok(())
    })
}

fn behind(flags: bool) -> Result<(), VmxError> {
    let low = LowMemory::new();
    let mut tables = Tables::new(low, PAGES, flags);
    let mut other = Tables::new(low, PAGES, flags);
    let mut world = World::new(GROUP, PAGES);
    let mut toucher = Toucher::new(GROUP, 8);
    toucher.prepare(&tables)?;
    // Three pages for each level, none in a group of eight with another, which is what KVM fills at once.
    for (round, level) in (2..=4).enumerate() {
        let first = 64 * round as u64;
        let (old, new, never) = (first, first + 16, first + 32);
        tables.set(1, old, plain(frame(old)));
        other.set(1, new, plain(frame(new)));
        tables.invalidate(true)?;
        toucher.push(Access::Read, old, 0);
        toucher.push(Access::Read, new, 0);
        toucher.push(Access::Read, never, 0);
        world.batch("before", &mut toucher, &mut tables)?;
        // A field that nobody looks at as long as there is no bitmap, and that KVM does not shadow, so that it is KVM that writes.
        let entry = other.next(level, 0) | RWX | ACCESSED;
        vmwrite(IO_BITMAP_A, entry)?;
        vmread_to(IO_BITMAP_A, tables.address(level, 0))?;
        if tables.get(level, 0) != entry {
            world.fail("behind", format_args!("level {level} was not written"));
        }
        tables.invalidate(round % 2 == 0)?;
        toucher.push(Access::Read, new, 0);
        toucher.push(Access::Read, never, 0);
        let mut left = [0u64; 2];
        toucher.run("behind", |at, _, exit| {
            left[at] += 1;
            if exit.reason != VIOLATION || exit.qualification >> 3 & 7 != 0 {
                let step = ["new", "never"][at];
                world.fail("behind", format_args!("level {level}: {step}: {exit}"));
            }
            Ok(Then::Skip)
        })?;
        if left != [0, 1] || toucher.steps()[0].value != tagged(new) {
            world.fail(
                "behind",
                format_args!(
                    "level {level}: left {left:?} times, read {:#x}",
                    toucher.steps()[0].value
                ),
            );
        }
        log!(
            "{}/{} flags: level {level}: read {:#x}, left {left:?}",
            GROUP,
            if tables.flags() { "with" } else { "without" },
            toucher.steps()[0].value & 0xffff
        );
        toucher.clear();
        // By its own hand, which everybody sees.
        let back = tables.next(level, 0) | RWX | ACCESSED;
        tables.set(level, 0, back);
        tables.set(1, old, 0);
        tables.invalidate(true)?;
    }
    world.report(if tables.flags() {
        "with flags"
    } else {
        "without flags"
    });
    Ok(())
}
