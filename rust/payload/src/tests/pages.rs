// SPDX-License-Identifier: GPL-2.0-or-later
//! The pages that a VMCS names and the processor uses while the child runs, rewritten, exchanged, logged and taken away
//! by the VMM between its entries: the bitmap of MSRs says of each access whether it leaves, and the virtual-APIC page
//! has what the child wrote to CR8, in the page that was named for that entry and in no other.

use core::arch::asm;

use protocol::ports::{touch, TOUCH_BASE};

use super::bed::Bed;
use super::log;
use super::model::{fold, Numbers};
use crate::control;
use crate::memory;
use crate::vmx::field::*;
use crate::vmx::ops::{vmread, vmwrite, VmxError};
use crate::vmx::setup::Features;
use crate::vmx::{capability, msr};

/// Processor-based controls: use of MSR bitmaps, TPR shadow.
const USE_MSR_BITMAPS: u64 = 1 << 28;
const TPR_SHADOW: u64 = 1 << 21;
/// Where the task-priority register is in a virtual-APIC page.
const VTPR: u64 = 0x80;

const RDMSR: u64 = 31;
const WRMSR: u64 = 32;

/// MSRs that hypervisors let pass, their neighbours, and others: the child reads them, and writes back what it read.
/// None changes by itself.
const MSRS: [u32; 12] = [
    0xc000_0100,
    0xc000_0101,
    0xc000_0102,
    0xc000_0103,
    0xc000_0081,
    0xc000_0082,
    0x174,
    0x175,
    0x176,
    0x277,
    0x1d9,
    0x8b,
];

/// Pages of each kind: two of the payload's own, and some of the touch region, which the VMM takes away.
const OWN: usize = 2;
const TOUCHED: usize = 3;
const PAGES: usize = OWN + TOUCHED;

/// A child that reads or writes an MSR (EBX: 0 or 1), writes RSI to CR8, and makes a VMCALL. An access that leaves is
/// skipped.
extern "C" fn child() -> ! {
    // SAFETY: the child has registers of its own and does not come back.
    unsafe {
        asm!(
            "2: test ebx, ebx",
            "jnz 3f",
            "rdmsr",
            "jmp 4f",
            "3: wrmsr",
            "4: mov cr8, rsi",
            "mov rdi, cr8",
            "vmcall",
            "jmp 2b",
            options(noreturn)
        )
    }
}

/// The group.
pub fn run(level: u32) -> Result<(), VmxError> {
    if (capability(msr::TRUE_PROCBASED_CTLS) >> 32) & (USE_MSR_BITMAPS | TPR_SHADOW)
        != USE_MSR_BITMAPS | TPR_SHADOW
    {
        log!("pages/not available");
        return Ok(());
    }
    let mut beds = [(); 2].map(|()| Bed::new("pages"));
    let own = memory::pages(2 * OWN as u64);
    let pages = |kind: usize| -> [u64; PAGES] {
        core::array::from_fn(|n| match n.checked_sub(OWN) {
            None => own + (kind * OWN + n) as u64 * memory::PAGE,
            Some(n) => TOUCH_BASE + (kind * TOUCHED + n) as u64 * memory::PAGE,
        })
    };
    control::touch(touch::DISCARD, 0);
    let mut test = Test {
        bitmaps: pages(0),
        apics: pages(1),
        tasks: [0; PAGES],
        numbers: Numbers::new(61),
        sum: 0,
        left: 0,
        wrong: 0,
    };
    for (number, features) in [Features::default(), beds[1].modern()]
        .into_iter()
        .enumerate()
    {
        let bed = &mut beds[number];
        bed.prepare(features, child)?;
        let controls = vmread(CPU_BASED_VM_EXEC_CONTROL)?;
        vmwrite(
            CPU_BASED_VM_EXEC_CONTROL,
            controls | USE_MSR_BITMAPS | TPR_SHADOW,
        )?;
        let rounds = if level > 1 { 60 } else { 600 };
        for round in 0..rounds {
            test.round(bed, controls, round)?;
        }
        log!(
            "pages/{}: {} left, sum {:#x}, wrong {}",
            if number == 0 { "plain" } else { "modern" },
            test.left,
            test.sum,
            test.wrong
        );
    }
    control::touch(touch::DISCARD, 0);
    Ok(())
}

struct Test {
    bitmaps: [u64; PAGES],
    apics: [u64; PAGES],
    /// What the task-priority register of each page must be.
    tasks: [u32; PAGES],
    numbers: Numbers,
    sum: u64,
    left: u64,
    wrong: u64,
}

/// The byte and the bit of an MSR in a bitmap (SDM volume 3, 26.6.9).
fn place(msr: u32, write: bool) -> (u64, u8) {
    let part = write as u64 * 2048 + if msr >= 0xc000_0000 { 1024 } else { 0 };
    (part + (msr as u64 & 0x1fff) / 8, 1 << (msr % 8))
}

fn byte(address: u64) -> *mut u8 {
    address as *mut u8
}

impl Test {
    fn round(&mut self, bed: &mut Bed, controls: u64, round: u64) -> Result<(), VmxError> {
        self.disturb(round);
        let (map, apic) = match self.numbers.below(3) {
            // Mostly the pages of before.
            0 => (self.numbers.below(PAGES), self.numbers.below(PAGES)),
            _ => ((round / 16) as usize % PAGES, (round / 24) as usize % PAGES),
        };
        vmwrite(MSR_BITMAP, self.bitmaps[map])?;
        vmwrite(VIRTUAL_APIC_PAGE_ADDR, self.apics[apic])?;
        // Now and then without a bitmap: then every access leaves.
        let bitmap = self.numbers.below(8) != 0;
        let used = if bitmap { USE_MSR_BITMAPS } else { 0 };
        vmwrite(CPU_BASED_VM_EXEC_CONTROL, controls | TPR_SHADOW | used)?;
        for _ in 0..1 + self.numbers.below(3) {
            let msr = MSRS[self.numbers.below(MSRS.len())];
            if self.numbers.below(2) == 0 {
                let write = self.numbers.below(2) != 0;
                let (at, bit) = place(msr, write);
                let at = byte(self.bitmaps[map] + at);
                // SAFETY: a bitmap of ours, which the processor only reads.
                unsafe { at.write_volatile(at.read_volatile() ^ bit) };
            }
            self.access(bed, map, apic, bitmap, msr)?;
        }
        Ok(())
    }

    /// What the VMM does in between.
    fn disturb(&mut self, round: u64) {
        let pages = 2 * TOUCHED as u32;
        match round % 32 {
            7 => self.lose(touch::DISCARD, pages),
            13 => control::touch(touch::LOG, pages),
            17 | 21 => {
                let (missing, _) = control::compare(pages);
                if missing != 0 {
                    self.wrong += 1;
                    log!(
                        "pages/round {}: FAIL: {} pages missing in the log",
                        round,
                        missing
                    );
                }
            }
            23 => control::touch(touch::UNLOG, pages),
            29 => self.lose(touch::POPULATE, pages),
            _ => {}
        }
    }

    /// The VMM takes the first pages of the touch region away: they read as zero.
    fn lose(&mut self, what: u8, pages: u32) {
        control::touch(what, pages);
        for n in 0..TOUCHED {
            if n + TOUCHED < pages as usize {
                self.tasks[OWN + n] = 0;
            }
        }
    }

    fn access(
        &mut self,
        bed: &mut Bed,
        map: usize,
        apic: usize,
        bitmap: bool,
        msr: u32,
    ) -> Result<(), VmxError> {
        // Written is only what can be without harm: the child's own value again, where an access is a write that leaves.
        let open = |write| {
            let (at, bit) = place(msr, write);
            // SAFETY: a bitmap of ours.
            bitmap && unsafe { byte(self.bitmaps[map] + at).read_volatile() } & bit == 0
        };
        let write = !open(true) && self.numbers.below(2) != 0;
        let must_leave = !open(write);
        let task = self.numbers.below(16) as u32;
        let registers = bed.registers();
        registers.rcx = msr as u64;
        registers.rbx = write as u64;
        registers.rsi = task as u64;
        let mut outcome = bed.enter();
        let reason = vmread(VM_EXIT_REASON)?;
        let left = reason == if write { WRMSR } else { RDMSR };
        if left {
            self.left += 1;
            bed.skip()?;
            outcome = bed.enter();
        }
        if !bed.called(&outcome) {
            self.wrong += 1;
            log!("pages/MSR {:#x}: FAIL: {}", msr, outcome);
            return Ok(());
        }
        bed.skip()?;
        self.tasks[apic] = task << 4;
        let read = bed.registers().rdi as u32;
        self.sum = fold(self.sum, (left as u64) << 8 | read as u64);
        if left != must_leave || read != task {
            self.wrong += 1;
            log!(
                "pages/MSR {:#x}, write {}: FAIL: left {}, must {}; CR8 {:#x}, must {:#x}",
                msr,
                write as u8,
                left as u8,
                must_leave as u8,
                read,
                task
            );
        }
        for (n, (&page, &must)) in self.apics.iter().zip(&self.tasks).enumerate() {
            // SAFETY: a virtual-APIC page of ours.
            let is = unsafe { ((page + VTPR) as *const u32).read_volatile() };
            if is != must {
                self.wrong += 1;
                if self.wrong < 16 {
                    log!(
                        "pages/virtual-APIC page {}: FAIL: {:#x}, must {:#x}",
                        n,
                        is,
                        must
                    );
                }
            }
        }
        Ok(())
    }
}
