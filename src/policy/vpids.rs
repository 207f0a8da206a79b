// SPDX-License-Identifier: GPL-2.0
//! A flush of one virtual processor's TLB without an instruction that flushes: it gets another VPID, of which the TLB has
//! nothing.
//!
//! The TLB tags what it has with the VPID (SDM volume 3, 30.4). A VPID that was not used since all were flushed has nothing in it. So a
//! virtual processor with some VPIDs to spare is given the next of these instead of a flush of the one that it has, and when
//! none is left one flush of all makes every spare one good again.

/// Most VPIDs that a virtual processor has to spare.
pub const MOST: usize = 32;
/// Fewest with which it is worth the trouble.
pub const FEWEST: usize = 4;

/// The VPIDs that a virtual processor has beside those that it uses.
#[derive(Debug)]
pub struct Spare {
    /// The first `fresh` of these have nothing in the TLB; the rest, up to `len`, may.
    vpids: [u16; MOST],
    len: u8,
    fresh: u8,
}

impl Default for Spare {
    fn default() -> Self {
        Self::new()
    }
}

impl Spare {
    /// None.
    pub const fn new() -> Self {
        Self {
            vpids: [0; MOST],
            len: 0,
            fresh: 0,
        }
    }

    /// How many there are.
    #[inline]
    pub fn count(&self) -> usize {
        usize::from(self.len)
    }

    /// Takes one that is nobody else's and that the TLB may have something of. `false` if there is no room, or it is 0, which is the
    /// host's.
    pub fn add(&mut self, vpid: u16) -> bool {
        match self.vpids.get_mut(usize::from(self.len)) {
            Some(place) if vpid != 0 => {
                *place = vpid;
                self.len += 1;
                true
            }
            _ => false,
        }
    }

    /// Gives one away; `None` if there is none.
    pub fn remove(&mut self) -> Option<u16> {
        let last = self.len.checked_sub(1)?;
        self.len = last;
        self.fresh = self.fresh.min(last);
        self.vpids.get(usize::from(last)).copied()
    }

    /// A VPID that the TLB has nothing of, for `old`, which is to spare from now on. `None` if there is no such: all have to be flushed.
    #[inline]
    pub fn exchange(&mut self, old: u16) -> Option<u16> {
        let last = self.fresh.checked_sub(1)?;
        let place = self.vpids.get_mut(usize::from(last))?;
        self.fresh = last;
        Some(core::mem::replace(place, old))
    }

    /// All VPIDs have been flushed on this processor.
    pub fn flushed(&mut self) {
        self.fresh = self.len;
    }
}

/// How long a write of the VPID may take to be better than a flush, in ticks of the TSC: one that exits takes more, on any
/// processor, and one that does not takes much less.
pub const DEAR: u64 = 600;
/// After how many writes, the least of which counts, it is decided. A hypervisor below may need some to learn that it is written.
pub const TRIAL: u8 = 64;
/// How many flushes it is left alone after a trial that showed it to be dear.
pub const PAUSE: u32 = 1 << 16;

/// Whether writing the VPID is cheaper than a flush: not where the hypervisor below has each of these writes exit.
#[derive(Debug)]
pub struct Price {
    least: u64,
    left: u8,
    pause: u32,
}

impl Default for Price {
    fn default() -> Self {
        Self::new()
    }
}

impl Price {
    /// To be found out.
    pub const fn new() -> Self {
        Self {
            least: u64::MAX,
            left: TRIAL,
            pause: 0,
        }
    }

    /// Whether this flush is to be made by another VPID.
    #[inline]
    pub fn is_fair(&mut self) -> bool {
        match self.pause.checked_sub(1) {
            None => true,
            Some(pause) => {
                self.pause = pause;
                false
            }
        }
    }

    /// One write took so many ticks.
    #[inline]
    pub fn paid(&mut self, ticks: u64) {
        self.least = self.least.min(ticks);
        self.left = self.left.saturating_sub(1);
        if self.left == 0 {
            if self.least > DEAR {
                self.pause = PAUSE;
            }
            self.left = TRIAL;
            self.least = u64::MAX;
        }
    }
}
