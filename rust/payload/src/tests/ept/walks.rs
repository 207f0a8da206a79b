// SPDX-License-Identifier: GPL-2.0-or-later
//! Accesses that the processor makes by itself: to the child's page tables, and to its stack when an event is
//! delivered; and EPT tables that lie where no memory is.

use super::super::bed::calls;
use super::super::log;
use super::super::model::fold;
use super::tables::{
    frame, paging_through, plain, Tables, ACCESSED, HOLE, RWX_NAMES, USED, WINDOW,
};
use super::toucher::{Access, Exit, Then, Toucher, VIOLATION};
use super::world::World;
use crate::memory::{self, PAGE};
use crate::trap;
use crate::vmx::ept::{LowMemory, LARGE, RWX, WRITE_BACK};
use crate::vmx::field::*;
use crate::vmx::ops::{vmread, vmwrite, VmxError};

const GROUP: &str = "ept_walks";
const PAGES: u64 = 512;
/// The page with the child's page directory for the second GiB of the window, which is the first one again.
const DIRECTORY: u64 = 300;
/// The page that is accessed through it.
const TARGET: u64 = 9;
/// The page that the child's stack is in when an event is delivered.
const STACK: u64 = 40;
const GIB: u64 = 1 << 30;
/// In an entry of the child's page directory: present, writable, a large page; used.
const GUEST_ENTRY: u64 = 3 | LARGE;
const GUEST_USED: u64 = 0x60;

/// The group.
pub fn run(_: u32) -> Result<(), VmxError> {
    super::group(GROUP, || {
        for flags in [true, false] {
            page_tables(flags)?;
        }
        events()?;
        nowhere()
    })
}

fn directory(entry: u64) -> *mut u64 {
    (frame(DIRECTORY) + entry * 8) as *mut u64
}

/// The child's page directory, mapped in every way, for an access through it.
fn page_tables(flags: bool) -> Result<(), VmxError> {
    let mut tables = Tables::new(LowMemory::new(), PAGES, flags);
    let mut world = World::new(GROUP, PAGES);
    let mut toucher = Toucher::new(GROUP, 4);
    let cr3 = paging_through(DIRECTORY);
    toucher.prepare(&tables)?;
    vmwrite(GUEST_CR3, cr3)?;
    let of_directory = |rights: u64, used: u64| frame(DIRECTORY) | rights | WRITE_BACK | used;
    let ways = [
        (0, 0),
        (1, USED),
        (1, 0),
        (3, USED),
        (3, ACCESSED),
        (3, 0),
        (4, USED),
        (5, USED),
        (RWX, USED),
        (RWX, ACCESSED),
        (RWX, 0),
    ];
    for (rights, used) in ways {
        for guest in [GUEST_ENTRY | GUEST_USED, GUEST_ENTRY] {
            for access in [Access::Read, Access::Write] {
                world.fill();
                for page in 0..PAGES {
                    tables.set(1, page, plain(frame(page)));
                }
                tables.set(1, TARGET, 0);
                tables.set(1, DIRECTORY, of_directory(rights, used));
                for index in 0..512 {
                    // SAFETY: a page of the touch region, which holds no Rust object.
                    unsafe {
                        directory(index).write_volatile((WINDOW + (index << 21)) | guest);
                    }
                }
                tables.invalidate(false)?;
                // What the child has cached of its own tables is of another round.
                crate::vmx::ops::invvpid(1, [1, 0])?;
                toucher.clear();
                toucher.push(access, TARGET + GIB / PAGE, 7);
                let mut said = [Exit::default(); 4];
                let mut count = 0;
                toucher.run("page tables", |_, _, exit| {
                    said[count.min(3)] = exit;
                    count += 1;
                    let page = exit.address.wrapping_sub(WINDOW) / PAGE;
                    if exit.reason != VIOLATION || page >= PAGES || count > 3 {
                        return Ok(Then::Skip);
                    }
                    // Mapped as a hypervisor does it that wants to know what is used.
                    tables.set(1, page, frame(page) | RWX | WRITE_BACK);
                    Ok(Then::Retry)
                })?;
                log!(
                    "{}/directory {} {:#x}, flags {}, entry {:#x}, {}: {} exits {} at {:#x} ({:#x}) {} at {:#x} ({:#x}) {} at {:#x}; \
                     done {}; directory {:#x} target {:#x} entry {:#x}",
                    GROUP,
                    RWX_NAMES[rights as usize],
                    used,
                    flags,
                    guest,
                    access.name(),
                    count,
                    said[0],
                    said[0].address / PAGE,
                    said[0].linear / PAGE,
                    said[1],
                    said[1].address / PAGE,
                    said[1].linear / PAGE,
                    said[2],
                    said[2].address / PAGE,
                    toucher.steps()[0].done,
                    tables.get(1, DIRECTORY) & 0xfff,
                    tables.get(1, TARGET) & 0xfff,
                    // SAFETY: as above.
                    unsafe { directory(0).read_volatile() } & 0xfff
                );
            }
        }
    }
    tables.invalidate(true)
}

/// An event that is injected while the child's stack is not mapped.
fn events() -> Result<(), VmxError> {
    const INVALID_OPCODE: u64 = 1 << 31 | 3 << 8 | 6;
    const BREAKPOINT: u64 = 1 << 31 | 6 << 8 | 3;
    const PAGE_FAULT: u64 = 1 << 31 | 1 << 11 | 3 << 8 | 14;
    const EXTERNAL: u64 = 1 << 31 | 32;
    let mut tables = Tables::new(LowMemory::new(), PAGES, true);
    let mut toucher = Toucher::new(GROUP, 4);
    let cr3 = paging_through(DIRECTORY);
    // Every gate leads to the child that makes VMCALLs.
    let gates = memory::pages(1);
    let to = calls as extern "C" fn() -> ! as *const () as u64;
    for vector in 0..64u64 {
        let low =
            to & 0xffff | (trap::CODE as u64) << 16 | 0x8e00 << 32 | (to >> 16 & 0xffff) << 48;
        // SAFETY: a page of ours.
        unsafe {
            ((gates + vector * 16) as *mut u64).write_volatile(low);
            ((gates + vector * 16 + 8) as *mut u64).write_volatile(to >> 32);
        }
    }
    for page in 0..PAGES {
        tables.set(1, page, plain(frame(page)));
    }
    for (name, event) in [
        ("#UD", INVALID_OPCODE),
        ("#BP", BREAKPOINT),
        ("#PF", PAGE_FAULT),
        ("interrupt 32", EXTERNAL),
    ] {
        for (how, first, last) in [
            ("mapped", 0, plain(frame(STACK))),
            ("mapped unused", 0, frame(STACK) | RWX | WRITE_BACK),
            (
                "from read-only",
                1,
                frame(STACK) | RWX | WRITE_BACK | ACCESSED,
            ),
        ] {
            for again in [true, false] {
                let features = crate::vmx::setup::Features {
                    ept: Some(tables.pointer()),
                    vpid: Some(1),
                    unrestricted: true,
                };
                tables.set(
                    1,
                    STACK,
                    if first == 0 {
                        0
                    } else {
                        frame(STACK) | first | WRITE_BACK | USED
                    },
                );
                tables.invalidate(false)?;
                let bed = &mut toucher.bed;
                bed.prepare(features, calls)?;
                vmwrite(GUEST_CR3, cr3)?;
                vmwrite(GUEST_RSP, WINDOW + STACK * PAGE + 0x800)?;
                vmwrite(GUEST_IDTR_BASE, gates)?;
                vmwrite(GUEST_RFLAGS, 0x202)?;
                vmwrite(VM_ENTRY_INTR_INFO_FIELD, event)?;
                vmwrite(VM_ENTRY_EXCEPTION_ERROR_CODE, 2)?;
                vmwrite(VM_ENTRY_INSTRUCTION_LEN, 1)?;
                let outcome = bed.enter();
                bed.log_exit(name, &outcome);
                let address = vmread(GUEST_PHYSICAL_ADDRESS)?;
                tables.set(1, STACK, last);
                if again {
                    vmwrite(
                        VM_ENTRY_INTR_INFO_FIELD,
                        vmread(IDT_VECTORING_INFO_FIELD)? & !(1 << 12),
                    )?;
                    vmwrite(VM_ENTRY_EXCEPTION_ERROR_CODE, 2)?;
                    vmwrite(VM_ENTRY_INSTRUCTION_LEN, 1)?;
                }
                let bed = &mut toucher.bed;
                let outcome = bed.enter();
                let stack = vmread(GUEST_RSP)?;
                let mut sum = 0;
                // What was pushed, but for addresses of the payload's code.
                for at in
                    (stack.max(WINDOW + STACK * PAGE)..WINDOW + STACK * PAGE + 0x800).step_by(8)
                {
                    // SAFETY: within the frame of the stack's page in the touch region.
                    let word =
                        unsafe { ((frame(STACK) + at % PAGE) as *const u64).read_volatile() };
                    sum = fold(sum, if word == to { 1 } else { word });
                }
                log!(
                    "{}/{} on a stack {}, again {}: left at {:#x}; then {} with {:#x} used, {:#x}; entry {:#x}",
                    GROUP,
                    name,
                    how,
                    again,
                    address / PAGE,
                    outcome,
                    WINDOW + STACK * PAGE + 0x800 - stack,
                    sum,
                    tables.get(1, STACK) & 0xfff
                );
            }
        }
    }
    tables.invalidate(true)
}

/// Tables of every level where no memory is.
fn nowhere() -> Result<(), VmxError> {
    let mut tables = Tables::new(LowMemory::new(), PAGES, true);
    let mut toucher = Toucher::new(GROUP, 4);
    toucher.prepare(&tables)?;
    for page in 0..PAGES {
        tables.set(1, page, plain(frame(page)));
    }
    for level in 2..=4 {
        for access in Access::EVERY {
            tables.set(level, TARGET, HOLE | RWX | ACCESSED);
            tables.invalidate(false)?;
            toucher.clear();
            toucher.push(access, TARGET, 0);
            let mut said = Exit::default();
            toucher.run("nowhere", |_, _, exit| {
                said = exit;
                Ok(Then::Skip)
            })?;
            log!(
                "{}/table below level {} nowhere, {}: {} at {:#x}, done {}",
                GROUP,
                level,
                access.name(),
                said,
                said.address / PAGE,
                toucher.steps()[0].done
            );
            tables.connect();
            tables.invalidate(false)?;
        }
    }
    Ok(())
}
