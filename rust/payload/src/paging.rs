// SPDX-License-Identifier: GPL-2.0-or-later
//! The payload's own page tables: the first 4 GiB, identity-mapped with 2 MiB pages. The touch region
//! lies in there; what is counted of it is the mapping below, in the EPT, which is by 4 KiB pages.

use crate::cpu;

const PRESENT_WRITE: u64 = 0x3;
const LARGE: u64 = 0x80;

/// One table of any level.
#[repr(C, align(4096))]
pub struct Table(pub [u64; 512]);

impl Table {
    /// No entry present.
    pub const EMPTY: Table = Table([0; 512]);
}

static mut PML4: Table = Table::EMPTY;
static mut PDPT: Table = Table::EMPTY;
static mut PD: [Table; 4] = [const { Table::EMPTY }; 4];

/// Switches to tables in the payload's own image, so that nothing in low memory is needed any more.
pub fn init() {
    let (pml4, pdpt, pd) = (&raw mut PML4, &raw mut PDPT, &raw mut PD);
    // SAFETY: start-up is single-threaded and these are borrowed nowhere else. The new tables map what the
    // old ones did (the VMM's contract), to the same addresses.
    unsafe {
        (*pml4).0[0] = pdpt as u64 | PRESENT_WRITE;
        for gib in 0..4 {
            (*pdpt).0[gib] = &raw const (*pd)[gib] as u64 | PRESENT_WRITE;
            for entry in 0..512 {
                (*pd)[gib].0[entry] =
                    (gib as u64) << 30 | (entry as u64) << 21 | LARGE | PRESENT_WRITE;
            }
        }
    }
    load();
}

/// The table of page-directory pointers, which maps the first 4 GiB.
pub fn pointers() -> u64 {
    &raw const PDPT as u64
}

/// Switches a processor to the tables that [`init`] has made.
pub fn load() {
    // SAFETY: they map what the VMM's tables do, to the same addresses.
    unsafe { cpu::write_cr3(&raw const PML4 as u64) };
}
