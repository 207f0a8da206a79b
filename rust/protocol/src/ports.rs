// SPDX-License-Identifier: GPL-2.0-or-later
//! The control device that a level's VMM shows to what it runs.
//!
//! Ports rather than MMIO: an I/O exit needs no instruction decoding on any level, so the device
//! costs the same everywhere and works before the guest has set anything up.

/// Text of the payload, 8-bit OUT (`rep outsb` allowed). Relayed line by line up to L0.
pub const CONSOLE: u16 = 0x4D00;
/// Next [`Command`](crate::Command), 32-bit IN. A VMM that is itself a guest asks its own port first.
pub const COMMAND: u16 = 0x4D04;
/// The payload is done, 32-bit OUT of its exit status (0 is success).
pub const DONE: u16 = 0x4D08;
/// Touch region request, 32-bit OUT of a [`touch`] word. Done when the OUT has retired. A 32-bit IN says what the
/// last [`touch::COMPARE`] found.
pub const TOUCH: u16 = 0x4D0C;
/// Nothing happens, in the VMM's user space: the `pio` operation. 32-bit OUT.
pub const NOP: u16 = 0x4D10;
/// Work for a payload's other processors, 32-bit OUT: bits 7:0 are the word that their [`NEXT_WORK`] then gives, bits
/// 31:8 say which processors are to have it (bit 9 the second one).
pub const GIVE_WORK: u16 = 0x4D04;
/// On any processor but the first the next word of work, which it waits for; being back here it is done with
/// the last one. On the first one it waits until all are. 32-bit IN.
pub const NEXT_WORK: u16 = 0x4D08;
/// Number of 4 KiB pages in the touch region, 32-bit IN.
pub const TOUCH_PAGES: u16 = 0x4D14;
/// The init of a Linux guest runs, 32-bit OUT of anything: the end of its boot, which the VMM has
/// measured from the guest's first instruction.
pub const UP: u16 = 0x4D14;
/// Console text again, 32-bit OUT of how many bytes of it lie in the [`MAILBOX`]. One exit for a
/// whole line: KVM lets a `rep outsb` exit for each byte.
pub const TEXT: u16 = 0x4D18;
/// As [`TEXT`], for raw bytes of an interactive console, which go to L0's standard output as they are.
pub const RAW: u16 = 0x4D1C;
/// First port of the device.
pub const FIRST: u16 = CONSOLE;
/// One past the last port of the device.
pub const END: u16 = 0x4D20;

/// Words for [`TOUCH`]: bits 7:0 what to do, bits 31:8 how many pages from the start of the region
/// (0: all of it), or what else the request is about.
pub mod touch {
    /// Drop the backing (MADV_DONTNEED).
    pub const DISCARD: u8 = 0;
    /// Drop the backing, then back every page again from the VMM (MADV_POPULATE_WRITE), so that the
    /// VMM has the pages and its KVM has not mapped them yet.
    pub const POPULATE: u8 = 1;
    /// Log from now on which pages are written (KVM_MEM_LOG_DIRTY_PAGES).
    pub const LOG: u8 = 2;
    /// Fetch that log (KVM_GET_DIRTY_LOG) and compare it with which pages have changed since they were looked at
    /// last: bits 15:0 of the answer are how many changed ones it lacks, bits 31:16 how many it has.
    pub const COMPARE: u8 = 3;
    /// Log no longer.
    pub const UNLOG: u8 = 4;
    /// Have the module in the VMM's kernel walk EPT02: bits 15:0 of the answer are what it found wrong, bits 31:16 how
    /// many entries it saw. Nothing of either where there is no module.
    pub const WALK: u8 = 5;
    /// Take the rights out of the first entry of the table of EPT12 in the frame of that number, behind KVM's back; 0
    /// gives them back.
    pub const PLANT: u8 = 6;
    /// Make the memory slot of the region anew, as one that can be read only.
    pub const READ_ONLY: u8 = 7;
    /// Take the memory slot away.
    pub const GONE: u8 = 8;
    /// Move the memory slot up by that many pages, or make it anew there as an ordinary one.
    pub const MOVE: u8 = 9;

    /// Packs a request for the first `pages` pages; 0 asks for the whole region.
    pub const fn word(what: u8, pages: u32) -> u32 {
        what as u32 | (pages << 8)
    }

    /// Unpacks a request into what to do and the number of pages, 0 for all.
    pub const fn unpack(word: u32) -> (u8, u32) {
        (word as u8, word >> 8)
    }
}

/// Guest-physical address where the touch region starts: its own memslot, backed with 4 KiB pages
/// only (MADV_NOHUGEPAGE), or the counts would be those of a huge page.
pub const TOUCH_BASE: u64 = 0x4000_0000;

/// Guest-physical address of the page through which [`TEXT`] and [`RAW`] pass bytes. It is below the
/// end of conventional memory and not part of the memory that a guest kernel is told of.
pub const MAILBOX: u64 = 0x9_E000;
/// Bytes in it.
pub const MAILBOX_SIZE: usize = 4096;
