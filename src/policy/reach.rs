// SPDX-License-Identifier: GPL-2.0
//! May an entry of EPT02 lead where it leads? What an entry of EPT12 grants at any level (SDM volume 3, 30.3.2 and
//! tables 30-1 to 30-7) and what a memory slot grants, compared with what KVM's shadow has.
//!
//! Each table is compared by itself: an entry that leads to a table must lead to the shadow of the very table that EPT12
//! names, with no more rights than have come down to it. So if every table passes, no way from the root reaches a
//! page that EPT12 does not give on the same way.

use super::ept::{
    Rights, ACCESSED, ADDRESS, DIRTY, EXEC, LARGE, MEMORY_TYPE, READ, USER_EXEC, WRITE,
};

/// A table of EPT12 as KVM shadows it.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    /// 1 for the table whose entries map pages of 4 KiB, 5 for the highest.
    pub level: u32,
    /// Rights that the levels above grant, in KVM's numbers.
    pub granted: u64,
    /// EPTP12 turns accessed and dirty flags on.
    pub flags: bool,
    /// Mode-based execute control: bit 10 makes an entry present.
    pub user_exec: bool,
    /// Address bits that the guest's processor does not have.
    pub reserved: u64,
}

/// Where an entry leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// To nothing: the access is a violation or a misconfiguration, or the hypervisor has yet to set the accessed flag.
    Nothing,
    /// To a table of the level below.
    Table(Place),
    /// To a page as large as an entry of that level maps.
    Page(Place),
}

/// A frame of L1's memory and what may be done with it, or with what the table there leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Number of the (first) frame.
    pub gfn: u64,
    /// Rights, in KVM's numbers.
    pub access: u64,
}

/// What is wrong with an entry of EPT02.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// EPT12 has nothing there.
    NotMapped,
    /// It leads to another frame or to something of another kind.
    Elsewhere,
    /// It allows what EPT12 does not.
    Rights,
    /// The frame is in no memory slot.
    NoSlot,
    /// It may be written and the slot may not.
    ReadOnly,
    /// It may be written, the slot's writes are logged, and this one is not in the log.
    NotLogged,
    /// The VMM has another page there.
    OtherPage,
}

impl Wrong {
    /// One word for reports.
    pub fn name(self) -> &'static str {
        match self {
            Wrong::NotMapped => "not_mapped",
            Wrong::Elsewhere => "elsewhere",
            Wrong::Rights => "rights",
            Wrong::NoSlot => "no_slot",
            Wrong::ReadOnly => "read_only",
            Wrong::NotLogged => "not_logged",
            Wrong::OtherPage => "other_page",
        }
    }
}

/// Frames that an entry of a table of `level` spans.
pub fn span(level: u32) -> u64 {
    1 << (9 * level.clamp(1, 5).wrapping_sub(1))
}

/// Where `entry` of a table of EPT12 leads.
pub fn target(entry: u64, table: &Table, rights: &Rights) -> Target {
    let level = table.level;
    let present = READ | WRITE | EXEC | if table.user_exec { USER_EXEC } else { 0 };
    if entry & present == 0 || entry & ADDRESS & table.reserved != 0 {
        return Target::Nothing;
    }
    let is_page = level == 1 || (level <= 3 && entry & LARGE != 0);
    // Bits that must be 0: 7:3 where no page can be, 6:3 of an entry that could be one, the address below a large page.
    let clear = match level {
        1 => 0,
        _ if is_page => (span(level) - 1) << 12,
        2 | 3 => 0xf << 3,
        _ => 0x1f << 3,
    };
    let bad_type = matches!((entry & MEMORY_TYPE) >> 3, 2 | 3 | 7);
    let write_only = entry & (READ | WRITE) == WRITE;
    if entry & clear != 0 || is_page && bad_type || write_only {
        return Target::Nothing;
    }
    if table.flags && entry & ACCESSED == 0 {
        return Target::Nothing;
    }
    let mut access = rights.of(entry);
    if is_page && table.flags && entry & DIRTY == 0 {
        access &= !rights.write;
    }
    let place = Place {
        gfn: (entry & ADDRESS) >> 12,
        access: access & table.granted,
    };
    if is_page {
        Target::Page(place)
    } else {
        Target::Table(place)
    }
}

/// Whether an entry of EPT02 that leads to `seen`, a table or a page as `target` says EPT12 has it, allows no more.
pub fn compare(seen: Target, target: Target) -> Result<(), Wrong> {
    let (seen, may) = match (seen, target) {
        (Target::Nothing, _) => return Ok(()),
        (_, Target::Nothing) => return Err(Wrong::NotMapped),
        (Target::Table(seen), Target::Table(may)) | (Target::Page(seen), Target::Page(may)) => {
            (seen, may)
        }
        _ => return Err(Wrong::Elsewhere),
    };
    if seen.gfn != may.gfn {
        return Err(Wrong::Elsewhere);
    }
    if seen.access & !may.access != 0 {
        return Err(Wrong::Rights);
    }
    Ok(())
}

/// The memory slot of a frame.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    /// The VMM allows no writes (KVM_MEM_READONLY).
    pub read_only: bool,
    /// Writes are logged (KVM_MEM_LOG_DIRTY_PAGES): whether each of the frames is in the log; `None` if there is none.
    pub in_log: Option<bool>,
}

/// Whether a slot (`None` if there is none) lets a page be there, writable or not.
pub fn slot_allows(writable: bool, slot: Option<Slot>) -> Result<(), Wrong> {
    let slot = slot.ok_or(Wrong::NoSlot)?;
    if writable && slot.read_only {
        return Err(Wrong::ReadOnly);
    }
    if writable && slot.in_log == Some(false) {
        return Err(Wrong::NotLogged);
    }
    Ok(())
}
