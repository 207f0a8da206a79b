// SPDX-License-Identifier: GPL-2.0-or-later
//! Children of several VMCSs that run by turns: each goes on where it was, launched stays launched, and
//! the guest state that the processor saved at its last exit is found whenever it is asked for.
//! And loading what is no VMCS, which must leave the current one alone.

use core::arch::global_asm;

use super::bed::Bed;
use super::log;
use super::model::{fold, page_sum, Numbers};
use crate::cpu;
use crate::memory;
use crate::trap;
use crate::vmx::child::How;
use crate::vmx::field::*;
use crate::vmx::ops::{vmclear, vmptrld, vmptrst, vmread, vmwrite, vmxoff, vmxon, VmxError};
use crate::vmx::setup::Features;
use crate::vmx::{self, vmxon_region};

/// Children.
const CHILDREN: usize = 4;
/// A guest-physical page that nobody has given the payload memory for.
const UNBACKED: u64 = 0x3000_0000;

global_asm!(
    // Each step changes guest state that lives in the VMCS alone: selectors with their hidden parts, the
    // limit of the IDT, RSP.
    ".global changing_child",
    "changing_child:",
    "    inc r12",
    "    mov eax, r12d",
    "    and eax, 1",
    "    shl eax, 4", // the data selector or none
    "    mov es, ax",
    "    xor eax, {data}",
    "    mov fs, ax",
    "    mov eax, r12d",
    "    shr eax, 1",
    "    and eax, 1",
    "    shl eax, 4",
    "    mov gs, ax",
    "    sidt [rsp - 16]",
    "    mov ax, r12w",
    "    or ax, 0xf00",
    "    mov [rsp - 16], ax",
    "    lidt [rsp - 16]",
    "    lea rsp, [rsp - 8]",
    "    xor rsp, 16",
    "    lea rsp, [rsp + 8]",
    // To the VMM of the payload, past the payload: it may save the machine here.
    "    test r12d, 3",
    "    jnz 2f",
    "    mov edx, {nop}",
    "    out dx, eax",
    "2:  vmcall",
    "    jmp changing_child",
    data = const trap::DATA,
    nop = const protocol::ports::NOP,
);

extern "C" {
    fn changing_child() -> !;
}

/// `changing_child` as a program: it never returns and takes nothing.
pub extern "C" fn changing() -> ! {
    // SAFETY: the child's own code, on the child's own stack.
    unsafe { changing_child() }
}

/// The group.
pub fn run(level: u32) -> Result<(), VmxError> {
    let steps = if level > 1 { 24 } else { 200 };
    basic_and_modern(steps)?;
    states()?;
    pointers()
}

/// What the child must have left in its VMCS after step `count`.
pub fn left_behind(name: &str, which: usize, count: u64) {
    let selector = |number: u64| (number & 1) * trap::DATA as u64;
    let data = trap::DATA as u64;
    for (field, expected) in [
        (GUEST_ES_SELECTOR, selector(count)),
        (GUEST_FS_SELECTOR, selector(count) ^ data),
        (GUEST_GS_SELECTOR, selector(count >> 1)),
        (GUEST_IDTR_LIMIT, count & 0xffff | 0xf00),
        (GUEST_ES_AR_BYTES, rights(selector(count))),
        (GUEST_FS_AR_BYTES, rights(selector(count) ^ data)),
    ] {
        let found = vmread(field).map(|value| match field {
            // Of a register that is unusable only that bit counts.
            GUEST_ES_AR_BYTES | GUEST_FS_AR_BYTES if value & UNUSABLE != 0 => UNUSABLE,
            _ => value,
        });
        if found != Ok(expected) {
            log!(
                "launches/{}: FAIL: child {} at step {}: field {:#06x} is {:#x} instead of {:#x}",
                name,
                which,
                count,
                field,
                found.unwrap_or(u64::MAX),
                expected
            );
        }
    }
}

const UNUSABLE: u64 = 1 << 16;

fn rights(selector: u64) -> u64 {
    match selector {
        0 => UNUSABLE,
        _ => 0xc093,
    }
}

fn basic_and_modern(steps: usize) -> Result<(), VmxError> {
    for modern in [false, true] {
        let name = if modern { "modern" } else { "basic" };
        let mut beds = [(); CHILDREN].map(|()| Bed::new("launches"));
        for bed in &mut beds {
            let features = if modern {
                bed.modern()
            } else {
                Features::default()
            };
            bed.prepare(features, changing)?;
            bed.registers().r8[4] = 0;
        }
        run_by_turns(name, &mut beds, steps)?;
        for bed in &beds {
            vmclear(bed.child.vmcs)?;
        }
    }
    Ok(())
}

/// Enters the children in any order, and asks now for the state of the one that ran, now for another's.
fn run_by_turns(name: &str, beds: &mut [Bed; CHILDREN], steps: usize) -> Result<(), VmxError> {
    let mut numbers = Numbers::new(7);
    let mut counts = [0u64; CHILDREN];
    // L1 has not written over what the child left.
    let mut untouched = [false; CHILDREN];
    let mut sums = [0u64; CHILDREN];
    for step in 0..steps {
        let which = numbers.below(CHILDREN);
        let bed = &mut beds[which];
        vmptrld(bed.child.vmcs)?;
        let ask = numbers.below(5);
        if ask == 4 && untouched[which] {
            // Before it runs again, long after its exit.
            left_behind(name, which, counts[which]);
        }
        for _ in 0..1 + numbers.below(3) {
            let outcome = bed.enter();
            counts[which] += 1;
            if !bed.called(&outcome) || bed.registers().r8[4] != counts[which] {
                log!(
                    "launches/{}: FAIL: step {} child {}: {}, its count {} instead of {}",
                    name,
                    step,
                    which,
                    outcome,
                    bed.registers().r8[4],
                    counts[which]
                );
            }
            sums[which] = fold(sums[which], vmread(GUEST_RSP)? ^ vmread(GUEST_RIP)?);
            bed.skip()?;
        }
        untouched[which] = true;
        match ask {
            0 => left_behind(name, which, counts[which]),
            1 => {
                // Another's state, whose VMCS is not the one that was left last.
                let other = (which + 1) % CHILDREN;
                vmptrld(beds[other].child.vmcs)?;
                if untouched[other] {
                    left_behind(name, other, counts[other]);
                }
            }
            2 => {
                // VMCLEAR right after the exit: the state is in the region, and the VMCS not launched.
                vmclear(beds[which].child.vmcs)?;
                beds[which].not_launched();
                vmptrld(beds[which].child.vmcs)?;
                left_behind(name, which, counts[which]);
            }
            3 => {
                // L1 writes what the processor saved: the next entry takes that.
                untouched[which] = false;
                let rsp = vmread(GUEST_RSP)?;
                vmwrite(GUEST_RSP, rsp ^ 32)?;
                vmwrite(GUEST_IDTR_LIMIT, 0xfff)?;
                vmwrite(GUEST_ES_BASE, step as u64 * 8)?;
            }
            _ => {}
        }
        if ask == 3 {
            sums[which] = fold(sums[which], vmread(GUEST_ES_BASE)?);
        }
    }
    for (which, sum) in sums.into_iter().enumerate() {
        vmptrld(beds[which].child.vmcs)?;
        let all = EVERY
            .iter()
            // Nobody has written these since whatever exit there was before.
            .filter(|(encoding, _)| {
                ![
                    GUEST_LINEAR_ADDRESS,
                    GUEST_PHYSICAL_ADDRESS,
                    VMX_INSTRUCTION_INFO,
                ]
                .contains(encoding)
            })
            .fold(0, |sum, &(encoding, _)| {
                fold(sum, vmread(encoding).unwrap_or(1))
            });
        log!(
            "launches/{}: child {} ran {} steps: {:#x} {:#x}",
            name,
            which,
            counts[which],
            sum,
            all
        );
    }
    Ok(())
}

/// VMLAUNCH wants a clear VMCS and VMRESUME a launched one, whichever of several is current.
fn states() -> Result<(), VmxError> {
    let mut beds = [(); 3].map(|()| Bed::new("launches"));
    for bed in &mut beds {
        bed.prepare(Features::default(), super::bed::calls)?;
    }
    let [one, two, three] = &mut beds;
    vmptrld(one.child.vmcs)?;
    log!("launches/one VMRESUME: {}", one.enter_by(How::Resume));
    log!("launches/one VMLAUNCH: {}", one.enter_by(How::Launch));
    one.skip()?;
    vmptrld(two.child.vmcs)?;
    log!(
        "launches/two error number: {:#x}",
        vmread(VM_INSTRUCTION_ERROR)?
    );
    log!("launches/two VMRESUME: {}", two.enter_by(How::Resume));
    log!(
        "launches/two error number: {:#x}",
        vmread(VM_INSTRUCTION_ERROR)?
    );
    vmptrld(one.child.vmcs)?;
    log!(
        "launches/one error number: {:#x}",
        vmread(VM_INSTRUCTION_ERROR)?
    );
    log!("launches/one VMLAUNCH again: {}", one.enter_by(How::Launch));
    log!(
        "launches/one error number: {:#x}",
        vmread(VM_INSTRUCTION_ERROR)?
    );
    vmptrld(two.child.vmcs)?;
    log!("launches/two VMLAUNCH: {}", two.enter_by(How::Launch));
    two.skip()?;
    log!(
        "launches/two error number: {:#x}",
        vmread(VM_INSTRUCTION_ERROR)?
    );
    vmptrld(three.child.vmcs)?;
    log!("launches/three VMLAUNCH: {}", three.enter_by(How::Launch));
    three.skip()?;
    // Clear one while three is current; two stays launched.
    vmclear(one.child.vmcs)?;
    log!("launches/three VMRESUME: {}", three.enter_by(How::Resume));
    three.skip()?;
    vmptrld(one.child.vmcs)?;
    log!(
        "launches/one VMRESUME after VMCLEAR: {}",
        one.enter_by(How::Resume)
    );
    log!(
        "launches/one VMLAUNCH after VMCLEAR: {}",
        one.enter_by(How::Launch)
    );
    one.skip()?;
    vmptrld(two.child.vmcs)?;
    log!("launches/two VMRESUME: {}", two.enter_by(How::Resume));
    two.skip()?;
    // VMXOFF keeps launch states where the stock code does. It has none of the current VMCS: see
    // `super::run`.
    vmptrld(vmx::new_region())?;
    vmxoff()?;
    vmxon(vmxon_region())?;
    for (name, bed) in [("one", &mut *one), ("two", two), ("three", three)] {
        vmptrld(bed.child.vmcs)?;
        log!(
            "launches/{} VMLAUNCH after VMXON: {}",
            name,
            bed.enter_by(How::Launch)
        );
        log!(
            "launches/{} VMRESUME after VMXON: {}",
            name,
            bed.enter_by(How::Resume)
        );
        bed.skip()?;
    }
    // Launched, and a copy of it that is not.
    vmptrld(one.child.vmcs)?;
    vmclear(two.child.vmcs)?;
    one.good("another was cleared")?;
    beds.iter().try_for_each(|bed| vmclear(bed.child.vmcs))
}

/// What VMPTRLD and VMCLEAR refuse while others are loaded, and that nothing of it shows.
fn pointers() -> Result<(), VmxError> {
    let mut bed = Bed::new("launches");
    bed.prepare(Features::default(), super::bed::calls)?;
    bed.good("start")?;
    let current = bed.child.vmcs;
    let (other, revised, shadow) = (vmx::new_region(), vmx::new_region(), vmx::new_region());
    for region in [other, revised, shadow] {
        vmptrld(region)?;
        vmwrite(GUEST_RIP, region ^ 0x77)?;
        vmwrite(GUEST_ES_SELECTOR, region >> 12)?;
    }
    vmclear(revised)?;
    vmclear(shadow)?;
    let set_revision = |region: u64, value: u32| {
        // SAFETY: the first word of a page of ours whose VMCS is clear.
        unsafe { (region as *mut u32).write_volatile(value) }
    };
    set_revision(revised, vmx::revision() ^ 1);
    set_revision(shadow, vmx::revision() | 1 << 31);
    vmptrld(current)?;
    let data = memory::pages(1);
    for (name, address) in [
        ("zero", 0),
        ("misaligned", other | 8),
        ("beyond memory", 1u64 << cpu::physical_bits()),
        ("not canonical", 1 << 63),
        ("unbacked", UNBACKED),
        ("no revision", data),
        ("wrong revision", revised),
        ("VMXON region", vmxon_region()),
        ("all ones", u64::MAX),
    ] {
        let result = vmptrld(address);
        log!(
            "launches/VMPTRLD {}: {}, error number {:#x}, current {}",
            name,
            Shown(result),
            vmread(VM_INSTRUCTION_ERROR)?,
            (vmptrst()? == current) as u8
        );
        // No page is cleared that is somebody's.
        if address != 0 && address != data {
            let result = vmclear(address);
            log!(
                "launches/VMCLEAR {}: {}, error number {:#x}, current {}",
                name,
                Shown(result),
                vmread(VM_INSTRUCTION_ERROR)?,
                (vmptrst()? == current) as u8
            );
        }
        bed.good(name)?;
    }
    set_revision(revised, vmx::revision());
    for (name, region) in [("other", other), ("revised", revised)] {
        vmptrld(region)?;
        log!(
            "launches/{}: own values {}",
            name,
            (vmread(GUEST_RIP)? == region ^ 0x77
                && vmread(GUEST_ES_SELECTOR)? == region >> 12 & 0xffff) as u8
        );
    }
    // A shadow VMCS can be loaded, read and written, and not entered.
    log!(
        "launches/VMPTRLD of a shadow VMCS: {}",
        Shown(vmptrld(shadow))
    );
    log!(
        "launches/shadow VMCS: VMPTRST {}, own values {}",
        (vmptrst()? == shadow) as u8,
        (vmread(GUEST_RIP)? == shadow ^ 0x77) as u8
    );
    log!(
        "launches/VMLAUNCH of a shadow VMCS: {}",
        bed.enter_by(How::Launch)
    );
    log!(
        "launches/VMRESUME of a shadow VMCS: {}",
        bed.enter_by(How::Resume)
    );
    log!(
        "launches/shadow VMCS: error number {:#x}",
        vmread(VM_INSTRUCTION_ERROR)?
    );
    vmwrite(GUEST_RSP, 0x1234)?;
    vmptrld(current)?;
    bed.good("a shadow VMCS was current")?;
    vmclear(shadow)?;
    vmptrld(shadow)?;
    log!(
        "launches/shadow VMCS: kept {}",
        (vmread(GUEST_RSP)? == 0x1234) as u8
    );
    vmclear(shadow)?;
    log!("launches/shadow VMCS: region {:#x}", page_sum(shadow));
    // The VMXON region of the next time was a VMCS until now.
    vmptrld(other)?;
    vmxoff()?;
    vmxon(other)?;
    log!(
        "launches/VMPTRLD of what became the VMXON region: {}",
        Shown(vmptrld(other))
    );
    log!(
        "launches/VMPTRLD of what was the VMXON region: {}",
        Shown(vmptrld(vmxon_region()))
    );
    vmptrld(current)?;
    log!(
        "launches/VMPTRLD again, with a current VMCS: {}",
        Shown(vmptrld(other))
    );
    bed.good("another VMXON region")?;
    vmclear(current)?;
    vmxoff()?;
    vmxon(vmxon_region())
}

/// How a result is logged.
struct Shown(Result<(), VmxError>);

impl core::fmt::Display for Shown {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match &self.0 {
            Ok(()) => f.write_str("VMsucceed"),
            Err(error) => error.fmt(f),
        }
    }
}
