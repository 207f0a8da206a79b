// SPDX-License-Identifier: GPL-2.0-or-later
//! EPT tables of which every entry can be written, for a window of guest-physical addresses, and a walk of
//! them as the SDM defines it (volume 3, 30.3).

use crate::cpu;
use crate::memory::{self, PAGE};
use crate::paging;
use crate::vmx::ept::{LowMemory, LARGE, RWX, WRITE_BACK};
use crate::vmx::ops::{invept, VmxError};
use crate::vmx::{capability, msr};
use protocol::ports::TOUCH_BASE;

/// First guest-physical, and for the child linear, address of the window. It has a PML4 entry for itself: the
/// child's code lies below another.
pub const WINDOW: u64 = 1 << 39;
/// Read, write and execute.
pub const READ: u64 = 1;
/// Write.
pub const WRITE: u64 = 2;
/// Execute.
pub const EXECUTE: u64 = 4;
/// What rights are called.
pub const RWX_NAMES: [&str; 8] = ["---", "r--", "-w-", "rw-", "--x", "r-x", "-wx", "rwx"];
/// Accessed.
pub const ACCESSED: u64 = 1 << 8;
/// Dirty.
pub const DIRTY: u64 = 1 << 9;
/// Both, as KVM sets them beforehand in tables for its guests.
pub const USED: u64 = ACCESSED | DIRTY;
/// The address in an entry.
pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Physical addresses of the payload's machine where nothing is: neither memory nor a device of KVM.
pub const HOLE: u64 = 0x9000_0000;

/// IA32_VMX_EPT_VPID_CAP: four levels, write-back tables, INVEPT, for one context and for all.
pub const CAP_EPT: u64 = 1 << 6 | 1 << 14 | 1 << 20 | 1 << 25 | 1 << 26;
const CAP_EXECUTE_ONLY: u64 = 1;
const CAP_1G: u64 = 1 << 17;
const CAP_FLAGS: u64 = 1 << 21;

/// IA32_VMX_EPT_VPID_CAP.
pub fn capabilities() -> u64 {
    capability(msr::EPT_VPID_CAP)
}

/// Has EPT accessed and dirty flags here?
pub fn flags_available() -> bool {
    capabilities() & CAP_FLAGS != 0
}

/// Has EPT pages of 1 GiB here?
pub fn gigabyte_pages() -> bool {
    capabilities() & CAP_1G != 0
}

/// Address of frame number `frame`: a page of the touch region.
pub const fn frame(number: u64) -> u64 {
    TOUCH_BASE + number * PAGE
}

/// What a translation comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The page at this address.
    Page(u64),
    /// An EPT violation; the rights that all entries agree on.
    Violation(u64),
    /// An EPT misconfiguration.
    Misconfiguration,
}

/// The tables of one root.
pub struct Tables {
    root: u64,
    pointers: u64,
    directory: u64,
    tables: u64,
    pages: u64,
    flags: bool,
    /// What the last-level entries must be: as written, with the flags that accesses set.
    expected: &'static mut [u64],
}

fn read(table: u64, index: u64) -> u64 {
    // SAFETY: a page of the payload's that is one of its tables; the index is below 512.
    unsafe { ((table + (index & 511) * 8) as *const u64).read_volatile() }
}

fn write(table: u64, index: u64, entry: u64) {
    // SAFETY: as for `read`; the child's tables map no page in which a Rust object lies that it writes to.
    unsafe { ((table + (index & 511) * 8) as *mut u64).write_volatile(entry) };
}

impl Tables {
    /// Tables for `pages` pages of the window, none of them mapped, with all upper entries in place.
    pub fn new(low: LowMemory, pages: u64, flags: bool) -> Tables {
        let count = pages.div_ceil(512);
        let new = Tables {
            root: memory::pages(1),
            pointers: memory::pages(1),
            directory: memory::pages(1),
            tables: memory::pages(count),
            pages,
            flags: flags && flags_available(),
            expected: memory::slice(pages as usize),
        };
        let low_pointers = memory::pages(1);
        write(low_pointers, 0, low.directory() | RWX | ACCESSED);
        write(new.root, 0, low_pointers | RWX | ACCESSED);
        new.connect();
        new
    }

    /// Puts all upper entries back.
    pub fn connect(&self) {
        write(self.root, WINDOW >> 39, self.pointers | RWX | ACCESSED);
        write(self.pointers, 0, self.directory | RWX | ACCESSED);
        for index in 0..self.pages.div_ceil(512) {
            write(self.directory, index, self.table(index) | RWX | ACCESSED);
        }
    }

    /// The last-level table number `index`.
    pub fn table(&self, index: u64) -> u64 {
        self.tables + index * PAGE
    }

    /// The table that the entry for `page` at `level` names, if it is to name one.
    pub fn next(&self, level: u32, page: u64) -> u64 {
        match level {
            4 => self.pointers,
            3 => self.directory,
            _ => self.table(page / 512),
        }
    }

    /// Pages of the window.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Does the processor note in these tables what was used?
    pub fn flags(&self) -> bool {
        self.flags
    }

    fn place(&self, level: u32, page: u64) -> (u64, u64) {
        assert!(page < self.pages);
        match level {
            4 => (self.root, WINDOW >> 39),
            3 => (self.pointers, 0),
            2 => (self.directory, page / 512),
            _ => (self.table(page / 512), page),
        }
    }

    /// The entry for `page` at `level`, 4 to 1.
    pub fn get(&self, level: u32, page: u64) -> u64 {
        let (table, index) = self.place(level, page);
        read(table, index)
    }

    /// Where the entry for `page` at `level` is.
    pub fn address(&self, level: u32, page: u64) -> *mut u64 {
        let (table, index) = self.place(level, page);
        (table + (index & 511) * 8) as *mut u64
    }

    /// Writes the entry for `page` at `level`.
    pub fn set(&mut self, level: u32, page: u64, entry: u64) {
        let (table, index) = self.place(level, page);
        write(table, index, entry);
        if level == 1 {
            self.expected[page as usize] = entry;
        }
    }

    /// Writes a last-level entry while others may do the same; nothing is noted about what it must be.
    pub fn map_now(&self, page: u64, entry: u64) {
        let (table, index) = self.place(1, page);
        write(table, index, entry);
    }

    /// The EPT pointer.
    pub fn pointer(&self) -> u64 {
        self.root | 6 | 3 << 3 | (self.flags as u64) << 6
    }

    /// INVEPT, of this context or of all.
    pub fn invalidate(&self, all: bool) -> Result<(), VmxError> {
        match all {
            true => invept(2, [0, 0]),
            false => invept(1, [self.pointer(), 0]),
        }
    }

    /// Translates, without noting anything, for an access that needs `rights`.
    pub fn walk(&self, page: u64, rights: u64) -> Verdict {
        self.through(page, self.get(1, page), rights)
    }

    /// As [`walk`](Tables::walk), with another last-level entry.
    pub fn through(&self, page: u64, last: u64, rights: u64) -> Verdict {
        let mut all = RWX;
        for level in (1..=4).rev() {
            let entry = match level {
                1 => last,
                _ => self.get(level, page),
            };
            if entry & RWX == 0 {
                return Verdict::Violation(0);
            }
            let leaf = is_leaf(level, entry);
            if misconfigured(level, leaf, entry) {
                return Verdict::Misconfiguration;
            }
            all &= entry;
            if leaf {
                let size = PAGE << (9 * (level - 1));
                let within = page * PAGE & (size - 1);
                return match all & rights == rights {
                    true => Verdict::Page((entry & ADDRESS & !(size - 1)) + within),
                    false => Verdict::Violation(all),
                };
            }
        }
        Verdict::Misconfiguration
    }

    /// What the last-level entry for `page` must be.
    pub fn expectation(&self, page: u64) -> u64 {
        self.expected[page as usize]
    }

    /// Notes in what is expected that `page` was used.
    pub fn used(&mut self, page: u64, wrote: bool) {
        if self.flags {
            let flags = if wrote { USED } else { ACCESSED };
            if !is_leaf(2, self.get(2, page)) {
                self.expected[page as usize] |= flags;
            }
        }
    }

    /// Last-level entries that are not what they must be: how many, and the first of them with what it is and
    /// what it must be.
    pub fn wrong(&self) -> (u64, Option<(u64, u64, u64)>) {
        let (mut count, mut first) = (0, None);
        for page in 0..self.pages {
            let (is, must) = (self.get(1, page), self.expected[page as usize]);
            if is != must {
                count += 1;
                first = first.or(Some((page, is, must)));
            }
        }
        (count, first)
    }

    /// Takes what the entries are for what they must be.
    pub fn accept(&mut self) {
        for page in 0..self.pages {
            self.expected[page as usize] = self.get(1, page);
        }
    }
}

fn is_leaf(level: u32, entry: u64) -> bool {
    level == 1 || (level == 2 || level == 3 && gigabyte_pages()) && entry & LARGE != 0
}

/// SDM volume 3, 30.3.3.1.
fn misconfigured(level: u32, leaf: bool, entry: u64) -> bool {
    let rights = entry & RWX;
    let bad_rights = rights & (READ | WRITE) == WRITE
        || rights == EXECUTE && capabilities() & CAP_EXECUTE_ONLY == 0;
    let beyond = ADDRESS & !((1 << cpu::physical_bits()) - 1);
    let reserved = beyond
        | match (level, leaf) {
            (4, _) => 0xf8,
            (_, false) => 0x78,
            (3, true) => 0x3fff_f000,
            (2, true) => 0x1f_f000,
            _ => 0,
        }
        | if level == 3 && !gigabyte_pages() {
            LARGE
        } else {
            0
        };
    let bad_type = leaf && matches!(entry >> 3 & 7, 2 | 3 | 7);
    bad_rights || entry & reserved != 0 || bad_type
}

/// A last-level entry for everything, used already.
pub const fn plain(address: u64) -> u64 {
    address | RWX | WRITE_BACK | USED
}

/// Present, writable, accessed, dirty: an entry of the child's own tables.
const GUEST: u64 = 0x63;

/// The child's own page tables: the payload's, and the window with 2 MiB pages. Its CR3.
pub fn paging_with_window() -> u64 {
    paging(None)
}

/// The same, and the GiB behind the window by a page directory that is page `page` of the window itself.
pub fn paging_through(page: u64) -> u64 {
    paging(Some(page))
}

fn paging(through: Option<u64>) -> u64 {
    let (root, pointers, directory) = (memory::pages(1), memory::pages(1), memory::pages(1));
    write(root, 0, paging::pointers() | GUEST);
    write(root, WINDOW >> 39, pointers | GUEST);
    write(pointers, 0, directory | GUEST);
    if let Some(page) = through {
        write(pointers, 1, (WINDOW + page * PAGE) | GUEST);
    }
    for index in 0..512 {
        write(directory, index, (WINDOW + (index << 21)) | LARGE | GUEST);
    }
    root
}
