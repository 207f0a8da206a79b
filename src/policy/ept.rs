// SPDX-License-Identifier: GPL-2.0
//! What an entry of EPT12 for a page of 4 KiB lets EPT02 have (SDM volume 3, 30.3.2 and table 30-7).

/// Bits of an entry, in EPT02 as in EPT12: data may be read.
pub const READ: u64 = 1 << 0;
/// Data may be written.
pub const WRITE: u64 = 1 << 1;
/// Code may be run; with mode-based execute control, a supervisor's.
pub const EXEC: u64 = 1 << 2;
/// Bits 5:3, the memory type of a page.
pub const MEMORY_TYPE: u64 = 7 << 3;
/// A large page, above the last level.
pub const LARGE: u64 = 1 << 7;
/// Accessed (30.3.5).
pub const ACCESSED: u64 = 1 << 8;
/// Dirty.
pub const DIRTY: u64 = 1 << 9;
/// A user's code may be run, with mode-based execute control.
pub const USER_EXEC: u64 = 1 << 10;
/// Bits 51:12, the physical address.
pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Bit 6 of EPTP: accessed and dirty flags are on (26.6.11).
pub const EPTP_FLAGS: u64 = 1 << 6;

/// The numbers that KVM has for rights (`ACC_…_MASK`).
#[derive(Clone, Copy, Debug)]
pub struct Rights {
    /// Data may be read.
    pub read: u64,
    /// Data may be written.
    pub write: u64,
    /// Code may be run; with mode-based execute control, a supervisor's.
    pub exec: u64,
    /// A user's code may be run, with mode-based execute control.
    pub user_exec: u64,
}

impl Rights {
    /// The rights of an entry, in KVM's numbers.
    #[inline(always)]
    pub fn of(&self, entry: u64) -> u64 {
        let right = |bit: u64, number: u64| if entry & bit != 0 { number } else { 0 };
        right(READ, self.read)
            | right(WRITE, self.write)
            | right(EXEC, self.exec)
            | right(USER_EXEC, self.user_exec)
    }
}

/// A page that EPT02 may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Page frame in L1's memory.
    pub gfn: u64,
    /// Rights, in KVM's numbers.
    pub access: u64,
}

/// The page that stock KVM would put into EPT02 for `entry` ahead of any access, in a table whose upper levels grant
/// `granted`, with accessed and dirty flags on. `reserved`: address bits that the guest's processor does not have.
///
/// `None` where stock would map nothing, and for a page that cannot be read, which is left to stock. As in
/// `ept_prefetch_gpte()`: an entry that was never accessed stays out, one that is not dirty is not writable.
#[inline]
pub fn page(entry: u64, reserved: u64, granted: u64, rights: &Rights) -> Option<Page> {
    // Memory types 2, 3 and 7 are EPT misconfigurations, and so would be writable without readable.
    let memory_type = entry >> 3 & 7;
    if entry & READ == 0
        || entry & ACCESSED == 0
        || matches!(memory_type, 2 | 3 | 7)
        || entry & ADDRESS & reserved != 0
    {
        return None;
    }
    let mut access = rights.of(entry);
    if entry & DIRTY == 0 {
        access &= !rights.write;
    }
    access &= granted;
    (access & rights.read != 0).then_some(Page {
        gfn: (entry & ADDRESS) >> 12,
        access,
    })
}

/// Whether `entry` is as `before`, of which `page` has said something, but for the next frame: then it gives the next page, with the
/// same rights.
#[inline(always)]
pub fn follows(before: u64, entry: u64, reserved: u64) -> bool {
    // No carry out of the address.
    entry == before.wrapping_add(1 << 12) && entry & ADDRESS != 0 && entry & ADDRESS & reserved == 0
}

/// Where an entry leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// To a table, at this guest-physical address.
    Table(u64),
    /// To a page, of the size that the level has, at this address.
    Page(u64),
}

/// Where `entry`, of a table of this level, leads an access, with accessed and dirty flags on. `None` if it is not present, or if following
/// it would set a flag: one that was never accessed, or a page that is to be written and is not dirty.
///
/// This is about flags alone. Whether the entry grants the access, and is one at all, is for who follows it to say.
#[inline]
pub fn step(entry: u64, level: u32, write: bool) -> Option<Step> {
    if entry & (READ | WRITE | EXEC) == 0 || entry & ACCESSED == 0 {
        return None;
    }
    let address = entry & ADDRESS;
    if level > 1 && (entry & LARGE == 0 || level > 3) {
        return Some(Step::Table(address));
    }
    (!write || entry & DIRTY != 0).then_some(Step::Page(address))
}

/// Bits of an exit qualification for an EPT violation (SDM volume 3, table 29-7): what the access was.
const BY_READ: u64 = 1 << 0;
const BY_WRITE: u64 = 1 << 1;
const BY_FETCH: u64 = 1 << 2;
/// A linear address led there, and it was the page's that it stood for, not that of a guest paging structure.
const HAS_LINEAR: u64 = 1 << 7;
const IS_FINAL: u64 = 1 << 8;

/// An access of L2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// It writes.
    pub write: bool,
    /// It fetches an instruction; counts if it does not write.
    pub fetch: bool,
    /// It is one to the guest's paging structures.
    pub walks: bool,
}

/// The exit qualification that ept_walk_addr_generic() makes for an access where the last-level entry of EPT12 is `entry`, if that is
/// not present, whether there is mode-based execute control or not: there are no rights in it then (bits 6:3), whatever the levels above
/// grant. `None` for an entry that is present.
#[inline]
pub fn absent(entry: u64, access: Access) -> Option<u64> {
    if entry & (READ | WRITE | EXEC | USER_EXEC) != 0 {
        return None;
    }
    let by = if access.write {
        BY_WRITE
    } else if access.fetch {
        BY_FETCH
    } else {
        BY_READ
    };
    let stage = if access.walks { BY_READ } else { IS_FINAL };
    Some(by | stage | HAS_LINEAR)
}
