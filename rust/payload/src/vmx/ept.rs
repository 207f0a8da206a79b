// SPDX-License-Identifier: GPL-2.0-or-later
//! EPT tables for the child (SDM volume 3, 30.3): identity, with 2 MiB pages below the touch region
//! and 4 KiB pages in it.

use crate::memory;
use protocol::ports::TOUCH_BASE;

/// Read, write and execute.
pub const RWX: u64 = 7;
/// Write-back, in a leaf.
pub const WRITE_BACK: u64 = 6 << 3;
/// A leaf above the last level.
pub const LARGE: u64 = 1 << 7;
/// Accessed and dirty, set beforehand as KVM does in the tables it builds for its guests.
const ACCESSED: u64 = 1 << 8;
/// Dirty.
const DIRTY: u64 = 1 << 9;
/// An entry that names the next table.
const TABLE: u64 = RWX | ACCESSED;
/// A leaf.
pub const LEAF: u64 = RWX | WRITE_BACK | ACCESSED | DIRTY;
/// EPTP: write-back tables, walk of four levels.
const EPTP: u64 = 6 | 3 << 3;
/// EPTP: accessed and dirty flags. Every KVM uses them where it can. Without them L0 leaves entries that
/// it filled ahead unusable until they are touched, since it could not tell those from used ones.
const EPTP_ACCESSED_DIRTY: u64 = 1 << 6;
/// IA32_VMX_EPT_VPID_CAP: accessed and dirty flags.
const CAP_ACCESSED_DIRTY: u64 = 1 << 21;

/// A set of tables. Cheap to make: only what maps the touch region is its own.
#[derive(Clone, Copy)]
pub struct Ept {
    root: u64,
    directory: u64,
    touch_tables: u64,
    touch_pages: u64,
}

/// What all sets have in common: the page directory of the first GiB.
#[derive(Clone, Copy)]
pub struct LowMemory(u64);

fn write(table: u64, index: u64, entry: u64) {
    // SAFETY: `table` is a page of `memory`'s that this module made into a table, `index` is below 512.
    unsafe { ((table + (index & 511) * 8) as *mut u64).write_volatile(entry) };
}

impl LowMemory {
    /// Identity-maps the first GiB.
    pub fn new() -> LowMemory {
        let directory = memory::pages(1);
        for index in 0..512 {
            write(directory, index, index << 21 | LARGE | LEAF);
        }
        LowMemory(directory)
    }

    /// Maps nothing yet.
    pub fn empty() -> LowMemory {
        LowMemory(memory::pages(1))
    }

    /// Has a last-level table map 2 MiB: those of number `at`.
    pub fn table(&self, at: u64, table: u64) {
        write(self.0, at, table | TABLE);
    }

    /// The page directory.
    pub fn directory(&self) -> u64 {
        self.0
    }
}

impl Ept {
    /// New tables, in pages that have not been tables before unless the arena was rewound: whoever
    /// shadows them has nothing cached. No page of the touch region is mapped.
    pub fn new(low: LowMemory, touch_pages: u64) -> Ept {
        let (root, pointers, directory) = (memory::pages(1), memory::pages(1), memory::pages(1));
        let tables = touch_pages.div_ceil(512);
        let touch_tables = memory::pages(tables.max(1));
        write(root, 0, pointers | TABLE);
        write(pointers, 0, low.0 | TABLE);
        write(pointers, TOUCH_BASE >> 30, directory | TABLE);
        for index in 0..tables {
            write(
                directory,
                index,
                touch_tables + index * memory::PAGE | TABLE,
            );
        }
        Ept {
            root,
            directory,
            touch_tables,
            touch_pages,
        }
    }

    /// Maps page number `page` of the touch region.
    pub fn map(&self, page: u64) {
        self.set(page, TOUCH_BASE + page * memory::PAGE | LEAF);
    }

    /// Maps the 2 MiB in which page number `page` of the touch region lies, as a large page.
    pub fn map_large(&self, page: u64) {
        assert!(page < self.touch_pages);
        let index = page / 512;
        write(
            self.directory,
            index,
            TOUCH_BASE + (index << 21) | LARGE | LEAF,
        );
    }

    /// Writes the last-level entry of a page of the touch region.
    pub fn set(&self, page: u64, entry: u64) {
        assert!(page < self.touch_pages);
        write(self.touch_tables + page / 512 * memory::PAGE, page, entry);
    }

    /// The first last-level table of the touch region.
    pub fn touch_table(&self) -> u64 {
        self.touch_tables
    }

    /// Reads it back, with what the processor has set in it.
    pub fn get(&self, page: u64) -> u64 {
        assert!(page < self.touch_pages);
        let table = self.touch_tables + page / 512 * memory::PAGE;
        // SAFETY: one of this set's own tables.
        unsafe { ((table + (page & 511) * 8) as *const u64).read_volatile() }
    }

    /// The EPT pointer for a VMCS.
    pub fn pointer(&self) -> u64 {
        match super::capability(super::msr::EPT_VPID_CAP) & CAP_ACCESSED_DIRTY {
            0 => self.root | EPTP,
            _ => self.root | EPTP | EPTP_ACCESSED_DIRTY,
        }
    }
}
