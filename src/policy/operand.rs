// SPDX-License-Identifier: GPL-2.0
//! The memory operand of VMPTRLD and VMCLEAR, as the VM-exit instruction information describes it,
//! and the walk that turns its linear address into a guest-physical one.
//!
//! Only the plain case is here: 64-bit addresses, FS and GS not used, four-level paging, 4-KByte and
//! 2-MByte pages that belong to the supervisor, accessed before. Whatever differs is left to the stock
//! code, which knows all of it and which fault it makes.

/// Bits 51:12 of a paging-structure entry: a physical address (SDM volume 3, table 5-20).
pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const PRESENT: u64 = 1 << 0;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
/// A large page, above the last level.
pub const LARGE: u64 = 1 << 7;
/// Bits that are reserved in an entry that maps a 2-MByte page.
const LARGE_RESERVED: u64 = 0x001f_e000;
/// Bit 63: no instruction fetches. Reserved unless IA32_EFER.NXE is set.
pub const EXECUTE_DISABLE: u64 = 1 << 63;

/// Levels of the paging structures that [`Walk`] goes through.
pub const LEVELS: u8 = 4;

/// Where a memory operand is, in terms of the guest's registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operand {
    scaling: u8,
    index: Option<u8>,
    base: Option<u8>,
}

impl Operand {
    /// Decodes the VM-exit instruction information (SDM volume 3, table 29-13). `None` if the operand
    /// is not a plain one.
    pub fn decode(info: u32) -> Option<Self> {
        const SIZE_64: u32 = 2;
        const FS: u32 = 4;
        let size = info >> 7 & 7;
        let register = info & 1 << 10 != 0;
        let segment = info >> 15 & 7;
        if size != SIZE_64 || register || segment >= FS {
            return None;
        }
        let unless = |invalid: u32, number: u32| (info & 1 << invalid == 0).then_some(number as u8);
        Some(Self {
            scaling: (info & 3) as u8,
            index: unless(22, info >> 18 & 0xf),
            base: unless(27, info >> 23 & 0xf),
        })
    }

    /// The linear address, given the displacement (the exit qualification) and the registers. `None` if
    /// it is not canonical or `len` bytes from it on do not fit in its page.
    #[inline(always)]
    pub fn address(self, displacement: u64, len: u64, register: impl Fn(u8) -> u64) -> Option<u64> {
        let mut address = displacement;
        if let Some(base) = self.base {
            address = address.wrapping_add(register(base));
        }
        if let Some(index) = self.index {
            address = address.wrapping_add(register(index) << self.scaling);
        }
        is_plain_address(address, len).then_some(address)
    }
}

/// Whether a linear address is canonical with four-level paging, and this many bytes from it on fit in its page.
#[inline(always)]
pub fn is_plain_address(address: u64, len: u64) -> bool {
    let canonical = ((address as i64) << 16 >> 16) as u64 == address;
    canonical && address & 0xfff <= 0x1000 - len.min(0x1000)
}

/// A walk of the guest's paging structures (SDM volume 3, 5.5.4) on behalf of a supervisor's read.
#[derive(Clone, Copy, Debug)]
pub struct Walk {
    address: u64,
    reserved: u64,
    table: u64,
    level: u8,
    user: bool,
}

/// What an entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The next entry is at this guest-physical address.
    Entry(u64),
    /// The linear address is mapped to this guest-physical address.
    Mapped(u64),
}

impl Walk {
    /// Starts at the table that CR3 names. `reserved`: address bits beyond the guest's physical-address
    /// width, and [`EXECUTE_DISABLE`] if that is reserved.
    pub fn new(cr3: u64, address: u64, reserved: u64) -> Self {
        Self {
            address,
            reserved: reserved & (ADDRESS | EXECUTE_DISABLE),
            table: cr3 & ADDRESS,
            level: LEVELS,
            user: true,
        }
    }

    /// Guest-physical address of the entry to look at first.
    pub fn first(&self) -> u64 {
        self.entry()
    }

    fn entry(&self) -> u64 {
        let shift = 12 + 9 * (u32::from(self.level) - 1);
        self.table | (self.address >> shift & 0x1ff) << 3
    }

    /// Goes on with what the entry holds. `None` where the stock code must decide.
    #[inline]
    pub fn step(&mut self, entry: u64) -> Option<Step> {
        let needed = PRESENT | ACCESSED;
        if entry & needed != needed || entry & self.reserved != 0 {
            return None;
        }
        self.user &= entry & USER != 0;
        let large = self.level > 1 && entry & LARGE != 0;
        if self.level > 1 && !large {
            self.table = entry & ADDRESS;
            self.level -= 1;
            return Some(Step::Entry(self.entry()));
        }
        if self.user || (large && (self.level != 2 || entry & LARGE_RESERVED != 0)) {
            return None;
        }
        let offset = if large { 0x001f_ffff } else { 0xfff };
        Some(Step::Mapped(
            (entry & ADDRESS & !offset) | (self.address & offset),
        ))
    }
}

/// What a walk depends on beside the entries that it meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// Says where guest-physical memory is: another number as soon as any of it may be elsewhere.
    pub memory: u64,
    /// The guest's CR3.
    pub cr3: u64,
    /// As for [`Walk::new`].
    pub reserved: u64,
}

/// A walk that was made, with the places where it looked and what it found there. The same walk ends at the
/// same place for as long as every entry holds what it held, so it is enough to read these again. (To
/// remember no more than where it ended would be a TLB, which knows nothing of INVLPG.)
#[derive(Clone, Copy, Debug)]
pub struct Trail {
    start: Start,
    /// The linear address without its offset in the page; all ones for no trail.
    page: u64,
    /// The entries: place and contents. Those of a shorter walk are followed by its last one.
    entries: [(u64, u64); LEVELS as usize],
    /// The place of the page that the linear address is in.
    end: u64,
}

impl Trail {
    /// None was made.
    pub const NONE: Trail = Trail {
        start: Start {
            memory: 0,
            cr3: 0,
            reserved: 0,
        },
        page: u64::MAX,
        entries: [(0, 0); LEVELS as usize],
        end: 0,
    };

    /// The place of what is at the linear address `address`; `None` where the stock code must decide. `place` says where a
    /// guest-physical address is, and `read` what eight bytes at a place are.
    #[inline(always)]
    pub fn walk(
        &mut self,
        start: Start,
        address: u64,
        place: impl FnMut(u64) -> Option<u64>,
        read: impl Fn(u64) -> Option<u64>,
    ) -> Option<u64> {
        let holds = |&(place, value): &(u64, u64)| read(place) == Some(value);
        let [a, b, c, d] = &self.entries;
        let known = self.page == address & !0xfff
            && self.start == start
            && holds(a)
            && holds(b)
            && holds(c)
            && holds(d);
        if !known {
            self.go(start, address, place, read)?;
        }
        Some(self.end | (address & 0xfff))
    }

    /// Makes the walk.
    #[inline(never)]
    fn go(
        &mut self,
        start: Start,
        address: u64,
        mut place: impl FnMut(u64) -> Option<u64>,
        read: impl Fn(u64) -> Option<u64>,
    ) -> Option<()> {
        self.page = u64::MAX;
        let mut walk = Walk::new(start.cr3, address, start.reserved);
        let mut at = walk.first();
        for level in 0..LEVELS as usize {
            let here = place(at)?;
            let entry = read(here)?;
            for e in self.entries.iter_mut().skip(level) {
                *e = (here, entry);
            }
            match walk.step(entry)? {
                Step::Entry(next) => at = next,
                Step::Mapped(address) => {
                    self.end = place(address & !0xfff)?;
                    break;
                }
            }
        }
        self.start = start;
        self.page = address & !0xfff;
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 8(%rsp) in 64-bit mode, as compilers like it.
    const RSP_BASED: u32 = 2 << 7 | 2 << 15 | 1 << 22 | 4 << 23;

    #[test]
    fn an_operand_on_the_stack() {
        let operand = Operand::decode(RSP_BASED).unwrap();
        let regs = |n: u8| u64::from(n == 4) * 0xffff_8880_0000_1000;
        assert_eq!(operand.address(8, 8, regs), Some(0xffff_8880_0000_1008));
        assert_eq!(operand.address(0xff8, 8, regs), Some(0xffff_8880_0000_1ff8));
        assert_eq!(operand.address(0xff9, 8, regs), None);
        assert_eq!(operand.address(8, 8, |_| 1 << 50), None);
    }

    #[test]
    fn scaled_index() {
        let operand = Operand::decode(2 << 7 | 3 | 3 << 18 | 1 << 27).unwrap();
        assert_eq!(
            operand.address(0x100, 8, |n| u64::from(n) * 16),
            Some(0x100 + (48 << 3))
        );
    }

    #[test]
    fn what_is_not_plain() {
        assert_eq!(Operand::decode(RSP_BASED | 1 << 10), None);
        assert_eq!(Operand::decode(RSP_BASED & !(7 << 7) | 1 << 7), None);
        assert_eq!(Operand::decode(RSP_BASED & !(7 << 15) | 4 << 15), None);
        assert_eq!(Operand::decode(RSP_BASED & !(7 << 15) | 5 << 15), None);
    }

    fn walk(entries: &[u64], address: u64) -> Option<u64> {
        let reserved = !((1 << 46) - 1) & !EXECUTE_DISABLE;
        let mut walk = Walk::new(0x5000 | 0x18, address, reserved);
        for &entry in entries {
            match walk.step(entry)? {
                Step::Entry(_) => {}
                Step::Mapped(at) => return Some(at),
            }
        }
        None
    }

    #[test]
    fn four_levels() {
        let mut w = Walk::new(0x5018, 0xffff_8123_4567_89a0, 0);
        assert_eq!(w.first(), 0x5000 + 8 * (0x8123_4567_89a0 >> 39 & 0x1ff));
        assert_eq!(
            w.step(0x6027),
            Some(Step::Entry(0x6000 + 8 * (0x8123_4567_89a0 >> 30 & 0x1ff)))
        );
        assert_eq!(
            walk(
                &[0x6027, 0x7027, 0x8027, 1 << 63 | 0x9063],
                0xffff_8123_4567_89a0
            ),
            Some(0x99a0)
        );
    }

    #[test]
    fn large_pages() {
        let address = 0xffff_8123_4567_89a0;
        assert_eq!(
            walk(&[0x6027, 0x7027, 0x4000_00e3], address),
            Some(0x4000_0000 | (address & 0x1f_ffff))
        );
        // The PAT bit is not part of the address.
        assert_eq!(
            walk(&[0x6027, 0x7027, 0x4000_10e3], address),
            Some(0x4000_0000 | (address & 0x1f_ffff))
        );
        assert_eq!(walk(&[0x6027, 0x7027, 0x4000_20e3], address), None);
        assert_eq!(walk(&[0x6027, 0x4000_00e3], address), None);
    }

    #[test]
    fn what_the_stock_code_decides() {
        let address = 0xffff_8123_4567_89a0;
        let good = [0x6027, 0x7027, 0x8027, 0x9063];
        assert!(walk(&good, address).is_some());
        for level in 0..4 {
            for (set, clear) in [(0, PRESENT), (0, ACCESSED), (1 << 46, 0)] {
                let mut bad = good;
                bad[level] = bad[level] & !clear | set;
                assert_eq!(walk(&bad, address), None, "level {level}");
            }
        }
        let mut no_nx = Walk::new(0x5000, address, EXECUTE_DISABLE);
        assert_eq!(no_nx.step(EXECUTE_DISABLE | 0x6027), None);
        // A user page: SMAP may forbid it.
        assert_eq!(walk(&[0x6027, 0x7027, 0x8027, 0x9067], address), None);
    }
}
