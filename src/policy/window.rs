// SPDX-License-Identifier: GPL-2.0
//! How many entries around a fault are filled along with it.
//!
//! A fill is an aligned block of a last-level table, between [`MIN`] entries, which is what stock KVM does itself, and
//! a whole table. A fault that follows on one of the last blocks, upwards or downwards, doubles it, any other halves it.
//! Some fills later a block is judged by how much of it was used, too: little use halves the window. A fault costs as much
//! as filling some eight entries, so that little means less than one in eight, beside the page of the fault itself.
//! A guest whose faults never follow on one another pays nothing.
//!
//! Looking costs something even where there is nothing to fill: a hypervisor in the guest that maps eight pages at each fault of
//! its own guest has faults that follow on one another, and nothing beyond them. So a fill in vain sends the window back to
//! [`MIN`], and it does not grow for the next fault, then for the next three, and so on up to [`LONGEST`].
//!
//! A table may stand for a large page, of EPT12 and of the host, that the processor gets in small ones only because L2 executes
//! in it (NX huge pages). All of it is there, and stock KVM would have mapped it at once but for that. So faults in such tables have a
//! window of their own, [`Window::whole`], which begins with the whole table and of which only little use takes anything away.

/// Entries in a table.
const TABLE: u64 = 512;
/// Fills between a fill and its judgement.
pub const DELAY: usize = 8;
/// Widest gap between a block and a fault that follows on it, in pages.
const NEAR: u64 = 32;
/// Base-2 logarithm of the smallest window, 8 entries.
pub const MIN: u8 = 3;
/// Of the largest.
pub const MAX: u8 = 9;
/// Most faults for which the window stays as it is after fills in vain.
pub const LONGEST: u8 = 63;
/// Of that of a new vCPU.
const START: u8 = MIN;

/// Pages that lie side by side in one table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Block {
    /// First page: guest-physical address in L2, shifted by 12.
    pub first: u64,
    /// How many; 0 for none.
    pub count: u16,
}

impl Block {
    const NONE: Block = Block { first: 0, count: 0 };

    /// The page after the last.
    fn end(&self) -> u64 {
        self.first.wrapping_add(u64::from(self.count))
    }
}

/// The window of one vCPU.
#[derive(Debug)]
pub struct Window {
    log2: u8,
    fills: [Block; DELAY],
    next: u8,
    /// Faults for which the window does not grow, and how many they were after the last fill in vain.
    pause: u8,
    last_pause: u8,
    /// Faults that do not follow on one another say nothing.
    steady: bool,
}

impl Default for Window {
    fn default() -> Self {
        Self::new()
    }
}

impl Window {
    /// For a vCPU of which nothing is known.
    pub const fn new() -> Self {
        Self {
            log2: START,
            fills: [Block::NONE; DELAY],
            next: 0,
            pause: 0,
            last_pause: 0,
            steady: false,
        }
    }

    /// For tables that stand for large pages.
    pub const fn whole() -> Self {
        let mut this = Self::new();
        this.log2 = MAX;
        this.steady = true;
        this
    }

    /// Entries that the next fill has at most.
    pub fn size(&self) -> u16 {
        1 << self.log2
    }

    fn shrink(&mut self) {
        self.log2 = self.log2.saturating_sub(1).max(MIN);
    }

    fn grow(&mut self, limit: u8) {
        if self.log2 < limit.min(MAX) {
            self.log2 += 1;
        }
    }

    /// Whether `page` follows on one of the last blocks, upwards or downwards.
    fn follows(&self, page: u64) -> bool {
        self.fills.iter().any(|fill| {
            let above = page.wrapping_sub(fill.end());
            let below = fill.first.wrapping_sub(1).wrapping_sub(page);
            fill.count != 0 && (above < NEAR || below < NEAR)
        })
    }

    /// The blocks so far are not in the tables that are used now: nothing follows on them, nor can they be judged.
    pub fn other_tables(&mut self) {
        self.fills = [Block::NONE; DELAY];
    }

    /// L2 has faulted on `page`: the block to fill, which has the page in it, and the block whose judgement is due
    /// (`count` 0 for none). `limit`: base-2 logarithm of the largest window that is allowed.
    ///
    /// The block has [`MIN`] entries if nothing is to be filled beyond what stock KVM does.
    pub fn fault(&mut self, page: u64, limit: u8) -> (Block, Block) {
        if self.pause > 0 {
            self.pause -= 1;
        } else if self.follows(page) {
            self.grow(limit);
        } else if !self.steady && self.fills.iter().any(|fill| fill.count != 0) {
            self.shrink();
        }
        self.log2 = self.log2.clamp(MIN, limit.clamp(MIN, MAX));
        let size = u64::from(self.size());
        let block = Block {
            first: page & !(size - 1),
            count: self.size(),
        };
        let slot = self.fills.get_mut(usize::from(self.next) % DELAY);
        self.next = self.next.wrapping_add(1);
        let due = slot.map_or(block, |slot| core::mem::replace(slot, block));
        let beyond_stock = due.count > 1 << MIN;
        (block, if beyond_stock { due } else { Block::default() })
    }

    /// Of a block of more than [`MIN`] entries so many were filled, and so many that are empty were not to be had. (Where
    /// there was none of either, the block says nothing: most of it may have been there from before.)
    pub fn filled(&mut self, filled: usize, wanting: usize) {
        if filled > 0 {
            self.last_pause = 0;
        }
        if filled > 0 || wanting == 0 {
            return;
        }
        self.log2 = MIN;
        self.last_pause = self
            .last_pause
            .saturating_mul(2)
            .saturating_add(1)
            .min(LONGEST);
        self.pause = self.last_pause;
    }

    /// `used` of the `present` pages of a block have been accessed since.
    pub fn judge(&mut self, used: u16, present: u16) {
        let (used, present) = (u32::from(used), u32::from(present));
        let beside = used.saturating_sub(1);
        if beside * 8 < present {
            self.shrink();
        }
    }
}

/// Where a page is in its table.
#[inline]
pub fn index(page: u64) -> usize {
    (page % TABLE) as usize
}
