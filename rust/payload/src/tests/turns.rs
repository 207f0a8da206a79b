// SPDX-License-Identifier: GPL-2.0-or-later
//! Several VMCSs that take turns without VMCLEAR between: each keeps its own values, wherever they are
//! kept meanwhile, and its region has them when the architecture says that it must.

use super::log;
use super::model::{page_sum, Model, Numbers};
use crate::cpu;
use crate::memory::{self, PAGE};
use crate::vmx::field::{EVERY, GUEST_RIP};
use crate::vmx::ops::{vmclear, vmptrld, vmptrst, vmwrite, vmxoff, vmxon, VmxError};
use crate::vmx::{self, vmxon_region};

/// VMCSs at most.
const MOST: usize = 8;
/// Fields that are in use at a time: few enough for each to be used often.
const WINDOW: usize = 24;

/// The group.
pub fn run(level: u32) -> Result<(), VmxError> {
    let mut turns = Turns {
        regions: [(); MOST].map(|()| vmx::new_region()),
        model: Model::new("turns", MOST)?,
        numbers: Numbers::new(1),
    };
    turns.regions.into_iter().try_for_each(vmclear)?;
    // Where an access costs tens of thousands of instructions, less must do.
    let (counts, rounds): (&[usize], usize) = match level {
        1 => (&[2, 3, 5, MOST], 20),
        _ => (&[3], 3),
    };
    for &count in counts {
        turns.alternate(count, rounds)?;
    }
    turns.clear()?;
    turns.copies()?;
    turns.off_and_on(if level > 1 { 1 } else { 2 })?;
    turns.reuse()?;
    log!("turns/wrong: {}", turns.model.wrong());
    Ok(())
}

struct Turns {
    regions: [u64; MOST],
    model: Model,
    numbers: Numbers,
}

/// Fields in the order in which windows take them: neighbours in the table are of one kind, and each
/// window is to have some of every kind.
fn spread(at: usize) -> usize {
    at * 37 % EVERY.len()
}

impl Turns {
    fn load(&mut self, vmcs: usize) -> Result<(), VmxError> {
        vmptrld(self.regions[vmcs])?;
        if vmptrst()? != self.regions[vmcs] {
            log!("turns/FAIL: VMPTRST after VMPTRLD of {}", vmcs);
        }
        Ok(())
    }

    /// `count` VMCSs by turns, each turn checking what the last one left and writing anew. The fields in
    /// use change with each of the windows, so that habits change as well.
    fn alternate(&mut self, count: usize, rounds: usize) -> Result<(), VmxError> {
        for window in 0..EVERY.len().div_ceil(WINDOW) {
            let fields = window * WINDOW..((window + 1) * WINDOW).min(EVERY.len());
            for round in 0..rounds {
                for turn in 0..count {
                    // In order, or in any.
                    let vmcs = match round % 2 {
                        0 => turn,
                        _ => self.numbers.below(count),
                    };
                    self.load(vmcs)?;
                    for at in fields.clone().map(spread) {
                        let number = self.numbers.next();
                        if number >> 40 & 1 == 0 {
                            self.model.check(vmcs, at, "alternate");
                        }
                        if number >> 41 & 1 == 0 {
                            self.model.write(vmcs, at, self.numbers.next())?;
                        }
                        if number >> 44 & 63 == 0 {
                            // The VMM may save the machine here, with what was written a moment ago.
                            cpu::out32(protocol::ports::NOP, 0);
                        }
                        if number >> 42 & 3 == 0 {
                            self.model.check(vmcs, at, "written");
                        }
                    }
                }
            }
        }
        for vmcs in 0..count {
            self.load(vmcs)?;
            let sum = self.model.check_all(vmcs, "afterwards");
            log!("turns/{} take turns, {}: {:#x}", count, vmcs, sum);
        }
        Ok(())
    }

    /// VMCLEAR of the current one, of others and of one that was never loaded; values stay, and are in
    /// the region from then on.
    fn clear(&mut self) -> Result<(), VmxError> {
        self.load(0)?;
        self.model.write(0, 5, 0x1234_5678_9abc_def1)?;
        vmclear(self.regions[0])?;
        log!("turns/clear current: VMPTRST {:#x}", vmptrst()?);
        log!(
            "turns/clear current: region {:#x}",
            page_sum(self.regions[0])
        );
        vmclear(self.regions[0])?;
        self.load(0)?;
        self.model.check_all(0, "clear current");

        self.load(1)?;
        self.model.write(1, 7, 0x0fed_cba9_8765_4321)?;
        self.load(2)?;
        vmclear(self.regions[1])?;
        log!(
            "turns/clear another: still current {}, region {:#x}",
            (vmptrst()? == self.regions[2]) as u8,
            page_sum(self.regions[1])
        );
        self.model.check_all(2, "clear another, current");
        self.load(1)?;
        self.model.check_all(1, "clear another");

        // Never loaded: only its launch state is the processor's.
        let page = memory::pages(1);
        for word in 0..PAGE / 8 {
            // SAFETY: a page of ours.
            unsafe { ((page + word * 8) as *mut u64).write_volatile(word * 0x0101_0101_0101) };
        }
        log!(
            "turns/clear one never loaded: {}, page {:#x}",
            vmclear(page).is_ok() as u8,
            page_sum(page)
        );
        self.model.check_all(1, "clear one never loaded");
        for vmcs in 0..MOST {
            self.load(vmcs)?;
            self.model.write(vmcs, 9 + vmcs, self.numbers.next())?;
        }
        for vmcs in 0..MOST {
            vmclear(self.regions[vmcs])?;
            log!(
                "turns/clear all: region {} {:#x}",
                vmcs,
                page_sum(self.regions[vmcs])
            );
        }
        for vmcs in (0..MOST).rev() {
            self.load(vmcs)?;
            self.model.check_all(vmcs, "clear all");
        }
        Ok(())
    }

    fn copy_page(&self, from: u64, to: u64) {
        // SAFETY: two different pages of ours.
        unsafe { core::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, PAGE as usize) };
    }

    /// A clear VMCS is its region: it can be copied, and replaced.
    fn copies(&mut self) -> Result<(), VmxError> {
        vmclear(self.regions[3])?;
        vmclear(self.regions[4])?;
        self.copy_page(self.regions[3], self.regions[4]);
        self.model.copy(3, 4);
        self.load(4)?;
        self.model.check_all(4, "copy");
        self.model.write(4, 11, self.numbers.next())?;
        self.load(3)?;
        self.model.check_all(3, "original");
        self.load(4)?;
        self.model.check_all(4, "copy again");
        // The other way: what was cached of 3 is void.
        vmclear(self.regions[4])?;
        vmclear(self.regions[3])?;
        self.copy_page(self.regions[4], self.regions[3]);
        self.model.copy(4, 3);
        self.load(3)?;
        let sum = self.model.check_all(3, "replaced");
        log!("turns/replaced: {:#x}", sum);
        // A page that has never been a VMCS.
        let page = memory::pages(1);
        vmclear(self.regions[3])?;
        self.copy_page(self.regions[3], page);
        vmptrld(page)?;
        self.model.check_all(3, "elsewhere");
        vmclear(page)
    }

    /// VMXOFF with VMCSs that nobody has cleared: none of their values is lost but those of the current
    /// one, with which the stock code does as it likes (as a processor may with all of them).
    fn off_and_on(&mut self, times: usize) -> Result<(), VmxError> {
        let sacrifice = vmx::new_region();
        for again in 0..times {
            for vmcs in 0..MOST {
                self.load(vmcs)?;
                self.model.write(vmcs, 40 + again, self.numbers.next())?;
                self.model.write(vmcs, 60 + vmcs, self.numbers.next())?;
            }
            vmptrld(sacrifice)?;
            vmwrite(GUEST_RIP, 1)?;
            vmxoff()?;
            for (vmcs, &region) in self.regions.iter().enumerate() {
                log!(
                    "turns/after VMXOFF: region {} {:#x}",
                    vmcs,
                    page_sum(region)
                );
            }
            vmxon(vmxon_region())?;
            log!("turns/after VMXON: VMPTRST {:#x}", vmptrst()?);
            for vmcs in (0..MOST).rev() {
                self.load(vmcs)?;
                self.model.check_all(vmcs, "after VMXON");
            }
        }
        Ok(())
    }

    /// A page whose VMCS is clear is anybody's: nothing is written to it any more.
    fn reuse(&mut self) -> Result<(), VmxError> {
        let region = self.regions[6];
        self.load(6)?;
        self.model.write(6, 30, self.numbers.next())?;
        self.load(5)?;
        vmclear(region)?;
        // SAFETY: the page of a clear VMCS.
        unsafe { core::ptr::write_bytes(region as *mut u8, 0x5a, PAGE as usize) };
        let before = page_sum(region);
        for _ in 0..2 {
            for vmcs in [0, 1, 2, 3, 4, 5, 7] {
                self.load(vmcs)?;
                self.model.write(vmcs, 30, self.numbers.next())?;
                self.model.check(vmcs, 30, "reuse");
            }
        }
        vmxoff()?;
        vmxon(vmxon_region())?;
        if page_sum(region) != before {
            log!("turns/FAIL: a page was written to after its VMCLEAR");
        }
        log!("turns/reuse: page {:#x}", page_sum(region));
        self.regions
            .into_iter()
            .filter(|&other| other != region)
            .try_for_each(vmclear)
    }
}
