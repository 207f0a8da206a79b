// SPDX-License-Identifier: GPL-2.0-or-later
//! Two processors: a VMCS that one has cleared goes on on the other with every value and its child, each
//! keeps those that it has loaded meanwhile, and a processor may change what the other's child goes by.

use super::bed::Bed;
use super::launches::{changing, left_behind};
use super::log;
use super::model::{fold, page_sum, Model, Numbers};
use super::script::{available, new_shadow, Form, Scripted};
use crate::second;
use crate::vmx;
use crate::vmx::field::{EVERY, GUEST_RIP, GUEST_RSP};
use crate::vmx::ops::{raw, vmclear, vmptrld, vmptrst, vmread, vmxoff, vmxon, VmxError};
use crate::vmx::setup::Features;

const REGIONS: usize = 4;
const CHILDREN: usize = 2;

/// The group.
pub fn run(level: u32) -> Result<(), VmxError> {
    if !second::available() {
        log!("pair/no second processor");
        return Ok(());
    }
    on(1, || vmxoff().and_then(|()| vmxon(second::vmxon_region())))?;
    handed_over(if level > 1 { 2 } else { 24 })?;
    children(if level > 1 { 4 } else { 40 })?;
    side_by_side(if level > 1 { 1 } else { 6 })?;
    if available() {
        changed_by_the_other(if level > 1 { 2 } else { 12 })?;
    }
    Ok(())
}

/// Does something on a processor, the other one waiting.
fn on<T>(cpu: usize, mut what: impl FnMut() -> Result<T, VmxError>) -> Result<T, VmxError> {
    if cpu == 0 {
        return what();
    }
    let mut result = Err(VmxError::Invalid);
    second::run(&mut || result = what());
    result
}

/// VMCSs that go from one processor to the other and back, with VMCLEAR between as it must be. Each
/// processor has some loaded while the other one works.
fn handed_over(rounds: usize) -> Result<(), VmxError> {
    let regions = [(); REGIONS].map(|()| vmx::new_region());
    let mut model = Model::new("pair", REGIONS)?;
    let mut numbers = Numbers::new(11);
    let mut owner = [0usize; REGIONS];
    regions.into_iter().try_for_each(vmclear)?;
    for round in 0..rounds * 2 {
        let cpu = round % 2;
        on(cpu, || {
            for vmcs in (0..REGIONS).filter(|&vmcs| owner[vmcs] == cpu) {
                vmptrld(regions[vmcs])?;
                if vmptrst()? != regions[vmcs] {
                    log!("pair/FAIL: VMPTRST after VMPTRLD of {}", vmcs);
                }
                for _ in 0..32 {
                    let at = numbers.below(EVERY.len());
                    model.check(vmcs, at, "handed over");
                    model.write(vmcs, at, numbers.next())?;
                }
            }
            Ok(())
        })?;
        // Some go to the other one: cleared by the one that has them, current or not.
        for vmcs in 0..REGIONS {
            if numbers.below(2) == 0 {
                on(owner[vmcs], || vmclear(regions[vmcs]))?;
                owner[vmcs] ^= 1;
            }
        }
    }
    for vmcs in 0..REGIONS {
        let sum = on(owner[vmcs], || {
            vmptrld(regions[vmcs])?;
            let sum = model.check_all(vmcs, "in the end");
            vmclear(regions[vmcs])?;
            Ok(sum)
        })?;
        log!(
            "pair/handed over, {}: {:#x}, region {:#x}",
            vmcs,
            sum,
            page_sum(regions[vmcs])
        );
    }
    log!("pair/handed over: wrong {}", model.wrong());
    Ok(())
}

/// Children that run here and there: their guest state goes with the VMCS.
fn children(rounds: usize) -> Result<(), VmxError> {
    for modern in [false, true] {
        let mut beds = [(); CHILDREN].map(|()| Bed::new("pair"));
        for bed in &mut beds {
            let features = match modern {
                true => bed.modern(),
                false => Features::default(),
            };
            bed.prepare(features, changing)?;
            vmclear(bed.child.vmcs)?;
        }
        let mut numbers = Numbers::new(13);
        let (mut steps, mut sum) = ([0u64; CHILDREN], 0);
        for round in 0..rounds {
            let (cpu, which) = (round % 2, numbers.below(CHILDREN));
            let bed = &mut beds[which];
            let times = 1 + numbers.below(3);
            on(cpu, || {
                vmptrld(bed.child.vmcs)?;
                if steps[which] > 0 {
                    left_behind("pair", which, steps[which]);
                }
                bed.not_launched();
                for _ in 0..times {
                    let outcome = bed.enter();
                    steps[which] += 1;
                    if !bed.called(&outcome) || bed.registers().r8[4] != steps[which] {
                        log!(
                            "pair/FAIL: round {} child {}: {}, its count {} instead of {}",
                            round,
                            which,
                            outcome,
                            bed.registers().r8[4],
                            steps[which]
                        );
                    }
                    sum = fold(sum, vmread(GUEST_RSP)? ^ vmread(GUEST_RIP)?);
                    bed.skip()?;
                }
                vmclear(bed.child.vmcs)
            })?;
        }
        log!(
            "pair/children, modern {}: {} and {} steps, {:#x}",
            modern as u8,
            steps[0],
            steps[1],
            sum
        );
    }
    Ok(())
}

/// Fields that the second processor uses while the first one does anything.
const HAMMERED: [u32; 8] = [
    0x681e, 0x0800, 0x4816, 0x6808, 0x2802, 0x4004, 0x6c16, 0x4402,
];

/// Both at work at a time, each on VMCSs of its own.
fn side_by_side(rounds: usize) -> Result<(), VmxError> {
    let theirs = [(); 3].map(|()| vmx::new_region());
    let ours = [(); 3].map(|()| vmx::new_region());
    on(1, || theirs.into_iter().try_for_each(vmclear))?;
    ours.into_iter().try_for_each(vmclear)?;
    let mut model = Model::new("pair", ours.len())?;
    let mut numbers = Numbers::new(17);
    for _ in 0..rounds {
        let mut wrong = 0u64;
        let mut hammer = || {
            for turn in 0..24u64 {
                for (number, region) in (0..).zip(&theirs) {
                    // SAFETY: in VMX operation, with regions of this processor alone; nothing here faults.
                    unsafe {
                        raw::vmptrld(region);
                        for (at, field) in (0..).zip(HAMMERED) {
                            // Small enough for every width; access rights have these bits.
                            let mark = |turn: u64| turn << 4 & 0x70 | number << 2 & 0xf | at & 3;
                            if turn > 0 {
                                wrong += (raw::vmread(field) != mark(turn - 1)) as u64;
                            }
                            raw::vmwrite(field, mark(turn));
                        }
                    }
                }
            }
        };
        // SAFETY: waited for below, before anything that it borrows goes; it uses no guard.
        unsafe { second::begin(&mut hammer) };
        let done: Result<(), VmxError> = (|| {
            for turn in 0..12 {
                let vmcs = turn % ours.len();
                vmptrld(ours[vmcs])?;
                for _ in 0..16 {
                    let at = numbers.below(EVERY.len());
                    model.check(vmcs, at, "side by side");
                    model.write(vmcs, at, numbers.next())?;
                }
            }
            Ok(())
        })();
        second::wait();
        done?;
        log!("pair/side by side: {} wrong on the second processor", wrong);
        if wrong != 0 {
            log!("pair/FAIL: the second processor read what it had not written");
        }
    }
    for (vmcs, region) in ours.into_iter().enumerate() {
        vmptrld(region)?;
        let sum = model.check_all(vmcs, "side by side, in the end");
        log!("pair/side by side, {}: {:#x}", vmcs, sum);
        vmclear(region)?;
    }
    on(1, || theirs.into_iter().try_for_each(vmclear))?;
    for (number, region) in theirs.into_iter().enumerate() {
        log!(
            "pair/side by side, theirs {}: region {:#x}",
            number,
            page_sum(region)
        );
    }
    log!("pair/side by side: wrong {}", model.wrong());
    Ok(())
}

/// The second processor writes the bitmaps while the child of the first one runs. Each access goes by
/// one value or the other; once the second one has stopped, by the last.
fn changed_by_the_other(rounds: usize) -> Result<(), VmxError> {
    let shadow = new_shadow();
    vmclear(shadow)?;
    let fields = [0x681e_u64, 0x0800, 0x2800, 0x4402, 0x4816, 0x6808];
    let mut main = Scripted::new("pair", fields.len() * 4);
    main.prepare(true, shadow)?;
    let (mut odd, mut sum) = (0u32, 0);
    for round in 0..rounds {
        main.fill(false, false);
        let last = round % 2 == 0;
        let (reads, writes) = (main.read_bitmap, main.write_bitmap);
        let mut flip = || {
            for turn in 0..200u64 {
                let byte = if turn % 2 == 1 && last || turn % 3 == 0 {
                    0xff
                } else {
                    0
                };
                for field in fields {
                    // SAFETY: pages of ours that the processors read; whole bytes, so never torn.
                    unsafe {
                        ((reads + field / 8) as *mut u8).write_volatile(byte);
                        ((writes + field / 8) as *mut u8).write_volatile(byte);
                    }
                }
            }
        };
        // SAFETY: as in `side_by_side`; the bitmaps belong to nobody's Rust object.
        unsafe { second::begin(&mut flip) };
        main.clear();
        for field in fields {
            main.push(Form::Write, field, 0x0070);
            main.push(Form::Read, field, 0);
            main.push(Form::Write, field, 0x0070);
            main.push(Form::ReadMemory, field, 0);
        }
        let ran = main.run("changed by the other");
        second::wait();
        ran?;
        for step in main.steps() {
            odd += (step.left == 0 && step.flags != 0) as u32;
        }
        main.run("changed by the other, afterwards")?;
        for step in main.steps() {
            // What the last turn of all left: number 199, odd and no multiple of three.
            if (step.left != 0) != last {
                log!(
                    "pair/FAIL: round {}: {:#06x} left {} after the bitmaps had settled",
                    round,
                    step.field,
                    step.left
                );
            }
            sum = fold(
                sum,
                if step.left == 0 {
                    step.value ^ step.flags
                } else {
                    1
                },
            );
        }
    }
    log!("pair/changed by the other: odd {}, {:#x}", odd, sum);
    vmclear(main.bed.child.vmcs)?;
    vmclear(shadow)
}
