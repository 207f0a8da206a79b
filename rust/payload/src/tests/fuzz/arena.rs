// SPDX-License-Identifier: GPL-2.0-or-later
//! What the children of the programs live in: pages of code, stack, descriptors and data, page tables for each
//! mode that map these and the touch region and nothing else, and EPT tables that do the same. Whatever a program
//! does to its children, the payload itself stays out of their reach.

use protocol::ports::TOUCH_BASE;

use crate::memory::{self, PAGE};
use crate::vmx::ept::{Ept, LowMemory, LEAF};

/// Alignment of the arena: a page of 32-bit paging maps it whole.
const ALIGN: u64 = 4 << 20;
/// Pages that are mapped by EPT.
pub const PAGES: u64 = 24;
/// Pages of the touch region that are mapped to begin with, and that have tables.
pub const TOUCHED: u64 = 16;
/// Last-level tables of each EPT: the arena's and the touch region's.
const TABLES: usize = 2;

/// Numbers of the arena's pages.
pub mod page {
    /// Code of three VMCSs' children.
    pub const CODE: u64 = 0;
    /// Handlers of exceptions and interrupts, 64-bit.
    pub const HANDLERS: u64 = 3;
    /// The same, 32-bit.
    pub const HANDLERS32: u64 = 4;
    /// Stacks of three children.
    pub const STACK: u64 = 5;
    /// GDT, and the TSS behind it.
    pub const GDT: u64 = 8;
    /// IDT of 64-bit mode.
    pub const IDT: u64 = 9;
    /// IDT of 32-bit modes.
    pub const IDT32: u64 = 10;
    /// Four pages of data.
    pub const DATA: u64 = 11;
    /// Page tables: PML4, PDPT, PAE's PDPT, a directory for each GiB, the directory of 32-bit paging.
    pub const PML4: u64 = 15;
    pub const PDPT: u64 = 16;
    pub const PAE: u64 = 17;
    pub const PD: u64 = 18;
    pub const PD32: u64 = 20;
    /// Three pages of nothing special.
    pub const REST: u64 = 21;
}

/// Vectors with a handler.
pub const VECTORS: u64 = 64;
/// Offset of the TSS in the page of the GDT.
const TSS: u64 = 0x800;
/// Exceptions that push an error code.
const WITH_ERROR: u64 = 0x6022_7d00;
/// HLT, which always exits: what unused memory of the children holds.
const FILL: u64 = 0xf4f4_f4f4_f4f4_f4f4;

/// Selectors in the children's GDT.
pub const CODE64: u64 = 0x08;
pub const CODE32: u64 = 0x10;
pub const DATA: u64 = 0x18;
pub const TASK: u64 = 0x20;

/// The arena and its EPTs.
pub struct Arena {
    base: u64,
    /// The arena as every program finds it.
    image: u64,
    /// Two EPTs.
    pub epts: [Tables; 2],
}

/// One EPT.
#[derive(Clone, Copy)]
pub struct Tables {
    /// The EPT.
    pub ept: Ept,
    arena: u64,
    image: u64,
}

/// Writes a word of a page of ours.
pub fn put(address: u64, value: u64) {
    // SAFETY: pages that this module handed out, which no Rust object lies in.
    unsafe { (address as *mut u64).write_volatile(value) };
}

/// Reads one.
pub fn get(address: u64) -> u64 {
    // SAFETY: as `put`.
    unsafe { (address as *const u64).read_volatile() }
}

fn put_byte(address: u64, value: u8) {
    // SAFETY: as `put`.
    unsafe { (address as *mut u8).write_volatile(value) };
}

/// Copies pages of ours.
pub fn copy(from: u64, to: u64, pages: u64) {
    // SAFETY: pages of ours that no Rust object lies in; the direction flag is clear.
    unsafe {
        core::arch::asm!("rep movsq", inout("rcx") pages * (PAGE / 8) => _,
            inout("rsi") from => _, inout("rdi") to => _, options(nostack));
    }
}

/// Fills pages of ours.
pub fn fill(page: u64, value: u64, pages: u64) {
    // SAFETY: as `copy`.
    unsafe {
        core::arch::asm!("rep stosq", inout("rcx") pages * (PAGE / 8) => _,
            inout("rdi") page => _, in("rax") value, options(nostack));
    }
}

/// A word of a stack, but for RF in what may be flags that were pushed: it tells whether a page was missing in EPT02 just
/// then, which may be at any time.
pub fn stack_word(address: u64) -> u64 {
    const RF: u64 = 1 << 16 | 1 << 48;
    get(address) & !RF
}

/// The sum of a stack's page.
pub fn stack_sum(page: u64) -> u64 {
    (0..PAGE / 8).fold(0, |sum, word| {
        super::super::model::fold(sum, stack_word(page + word * 8))
    })
}

impl Arena {
    /// A new one, in which nothing is yet as a program wants it: see [`Arena::reset`].
    pub fn new() -> Arena {
        while memory::mark() % ALIGN != 0 {
            memory::pages(1);
        }
        let base = memory::pages(PAGES);
        let image = memory::pages(PAGES);
        let arena = Arena {
            base,
            image,
            epts: [(); 2].map(|()| Tables::new(base)),
        };
        arena.draw();
        arena
    }

    /// Address of a page.
    pub fn at(&self, page: u64) -> u64 {
        self.base + page * PAGE
    }

    /// Makes everything as it is at the start of each program.
    pub fn reset(&self) {
        copy(self.image, self.base, PAGES);
        fill(TOUCH_BASE, FILL, TOUCHED + 8);
        for tables in &self.epts {
            tables.reset();
        }
    }

    /// Address of the children's TSS.
    pub fn tss(&self) -> u64 {
        self.at(page::GDT) + TSS
    }

    /// Draws the image.
    fn draw(&self) {
        fill(self.image, 0, PAGES);
        let image = |page: u64| self.image + page * PAGE;
        for page in [page::CODE, page::HANDLERS, page::DATA] {
            let pages = match page {
                page::CODE => 3,
                page::HANDLERS => 2,
                _ => 4,
            };
            fill(image(page), FILL, pages);
        }
        for vector in 0..VECTORS {
            let error = vector < 32 && WITH_ERROR >> vector & 1 == 1;
            // VMCALL, drop the error code, IRET.
            let wide: &[u8] = match error {
                true => &[0x0f, 0x01, 0xc1, 0x48, 0x83, 0xc4, 0x08, 0x48, 0xcf],
                false => &[0x0f, 0x01, 0xc1, 0x48, 0xcf],
            };
            let narrow: &[u8] = match error {
                true => &[0x0f, 0x01, 0xc1, 0x83, 0xc4, 0x04, 0xcf],
                false => &[0x0f, 0x01, 0xc1, 0xcf],
            };
            for (page, code) in [(page::HANDLERS, wide), (page::HANDLERS32, narrow)] {
                for (at, &byte) in (0..).zip(code) {
                    put_byte(image(page) + vector * 16 + at, byte);
                }
            }
            let gate = |handlers: u64, selector: u64| {
                let handler = self.at(handlers) + vector * 16;
                handler & 0xffff | selector << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48
            };
            put(image(page::IDT) + vector * 16, gate(page::HANDLERS, CODE64));
            put(
                image(page::IDT32) + vector * 8,
                gate(page::HANDLERS32, CODE32),
            );
        }
        let tss = self.tss();
        for (at, entry) in (0..).zip([
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x67 | (tss & 0xff_ffff) << 16 | 0x8b << 40 | (tss >> 24 & 0xff) << 56,
            0,
        ]) {
            put(image(page::GDT) + at * 8, entry);
        }
        // Present, writable; accessed, dirty and large for a leaf.
        const TABLE: u64 = 3;
        const LARGE: u64 = 0xe3;
        let two_mib = self.base >> 21;
        put(image(page::PML4), self.at(page::PDPT) | TABLE);
        for gib in 0..2 {
            let directory = self.at(page::PD + gib);
            put(image(page::PDPT) + gib * 8, directory | TABLE);
            put(image(page::PAE) + gib * 8, directory | 1);
        }
        put(image(page::PD) + (two_mib & 511) * 8, self.base | LARGE);
        put(image(page::PD + 1), TOUCH_BASE | LARGE);
        let narrow = |address: u64| {
            let at = image(page::PD32) + (address >> 22) * 4;
            // SAFETY: as `put`.
            unsafe { (at as *mut u32).write_volatile((address | LARGE) as u32) };
        };
        narrow(self.base);
        narrow(TOUCH_BASE);
    }
}

impl Tables {
    fn new(base: u64) -> Tables {
        let arena = memory::pages(1);
        let low = LowMemory::empty();
        low.table(base >> 21, arena);
        let ept = Ept::new(low, 512);
        let image = memory::pages(TABLES as u64);
        for page in 0..PAGES {
            put(image + page * 8, base + page * PAGE | LEAF);
        }
        for page in 0..TOUCHED {
            put(image + PAGE + page * 8, TOUCH_BASE + page * PAGE | LEAF);
        }
        Tables { ept, arena, image }
    }

    /// Makes all entries of the last level what they were.
    pub fn reset(&self) {
        copy(self.image, self.arena, 1);
        copy(self.image + PAGE, self.ept.touch_table(), 1);
    }

    /// Address of the entry of a page: the arena's first, those of the touch region behind.
    pub fn entry(&self, page: u64) -> u64 {
        match page {
            0..PAGES => self.arena + page * 8,
            _ => self.ept.touch_table() + (page - PAGES) * 8,
        }
    }

    /// What that entry was.
    pub fn original(&self, page: u64) -> u64 {
        match page {
            0..PAGES => get(self.image + page * 8),
            _ => get(self.image + PAGE + (page - PAGES) * 8),
        }
    }

    /// The tables whose entries programs change.
    pub fn pages(&self) -> [u64; TABLES] {
        [self.arena, self.ept.touch_table()]
    }
}
