// SPDX-License-Identifier: GPL-2.0-or-later
//! Interrupts that wait in the payload's local APIC when its child is entered, or come while it runs: which of them leave the
//! child, with or without an acknowledgement, and what the APIC says afterwards.
//!
//! The payload itself never takes one: its own interrupts are off, and what is left over is acknowledged by an exit.

use core::arch::asm;
use core::fmt;

use super::apic::{self, read, write, EOI, IRR, ISR, PPR, SELF_IPI, TPR};
use super::bed::{Bed, Details};
use super::exits::program;
use super::log;
use crate::vmx::field::*;
use crate::vmx::ops::{vmread, vmwrite, VmxError};
use crate::vmx::setup::Features;

const GROUP: &str = "interrupts";

/// Pin-based: external interrupts leave the child.
const EXITING: u64 = 1 << 0;
/// Primary: the child is left as soon as it could take an interrupt.
const WINDOW: u64 = 1 << 2;
/// Exit control: the interrupt is acknowledged on exit.
const ACKNOWLEDGE: u64 = 1 << 15;
/// Exit reason: external interrupt.
const EXTERNAL_INTERRUPT: u64 = 1;

/// The vectors that are sent, of different priority classes and in words of their own.
const VECTORS: [u64; 2] = [0x41, 0x83];

/// Pin-based, primary and exit controls to set.
const CONTROLS: [(&str, u64, u64, u64); 5] = [
    ("to the child", 0, 0, 0),
    ("leaves", EXITING, 0, 0),
    ("leaves acknowledged", EXITING, 0, ACKNOWLEDGE),
    ("window", 0, WINDOW, 0),
    ("leaves, window", EXITING, WINDOW, ACKNOWLEDGE),
];

type Program = (&'static str, extern "C" fn() -> !);

fn programs() -> [Program; 3] {
    [
        ("off", program!("nop")),
        ("on", program!("sti", "nop", "nop")),
        // The child sends one itself; nobody's bitmap of MSRs is against it.
        (
            "sends",
            program!(
                "mov ecx, 0x83f",
                "mov eax, 0x83",
                "xor edx, edx",
                "wrmsr",
                "nop"
            ),
        ),
    ]
}

/// What the APIC says.
struct Apic;

impl fmt::Display for Apic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = |register: u32, vector: u64| read(register + vector as u32 / 32);
        let [low, high] = VECTORS;
        write!(
            f,
            "requested {:#x} {:#x} in service {:#x} {:#x} priority {:#x}",
            word(IRR, low),
            word(IRR, high),
            word(ISR, low),
            word(ISR, high),
            read(PPR)
        )
    }
}

/// The group.
pub fn run(level: u32) -> Result<(), VmxError> {
    let Some(_enabled) = apic::Enabled::new() else {
        log!("{}: no x2APIC", GROUP);
        return Ok(());
    };
    let mut bed = Bed::new(GROUP);
    let mut result = Ok(());
    for features in [Features::default(), bed.modern()] {
        // Further down one kind of child must do.
        if result.is_ok() && (level == 1 || features.ept.is_some()) {
            result = children(&mut bed, features, level);
        }
    }
    result
}

fn children(bed: &mut Bed, features: Features, level: u32) -> Result<(), VmxError> {
    for (name, program) in programs() {
        for (way, pin, primary, exit) in CONTROLS {
            for waiting in 0..=VECTORS.len() {
                for priority in [0, 0x50] {
                    // Further down, where it takes long, only where there is something to hold back.
                    if level > 1 && (priority == 0) != (waiting == 0) {
                        continue;
                    }
                    bed.prepare(features, program)?;
                    for (field, bits) in [
                        (PIN_BASED_VM_EXEC_CONTROL, pin),
                        (CPU_BASED_VM_EXEC_CONTROL, primary),
                        (VM_EXIT_CONTROLS, exit),
                    ] {
                        vmwrite(field, vmread(field)? | bits)?;
                    }
                    // The first interrupt that the child gets is its end: a triple fault.
                    vmwrite(GUEST_IDTR_LIMIT, 0)?;
                    write(TPR, priority);
                    VECTORS
                        .iter()
                        .take(waiting)
                        .for_each(|&vector| write(SELF_IPI, vector));
                    let outcome = bed.enter();
                    log!(
                        "{}/{}, {}, {} waiting, TPR {:#x}: {} {}; {}",
                        GROUP,
                        name,
                        way,
                        waiting,
                        priority,
                        outcome,
                        Details,
                        Apic
                    );
                    settle(bed, features)?;
                }
            }
        }
    }
    Ok(())
}

/// Takes what is left in the APIC out of it.
fn settle(bed: &mut Bed, features: Features) -> Result<(), VmxError> {
    write(TPR, 0);
    // In service can be one of each class.
    VECTORS.iter().for_each(|_| write(EOI, 0));
    let waiting = |&vector: &u64| read(IRR + vector as u32 / 32) != 0;
    if !VECTORS.iter().any(waiting) {
        return Ok(());
    }
    bed.prepare(features, super::bed::calls)?;
    for (field, bits) in [
        (PIN_BASED_VM_EXEC_CONTROL, EXITING),
        (VM_EXIT_CONTROLS, ACKNOWLEDGE),
    ] {
        vmwrite(field, vmread(field)? | bits)?;
    }
    for _ in VECTORS {
        let outcome = bed.enter();
        if outcome.failed() || vmread(VM_EXIT_REASON)? != EXTERNAL_INTERRUPT {
            break;
        }
        write(EOI, 0);
    }
    if VECTORS.iter().any(waiting) {
        log!("{}: FAIL: interrupts are left: {}", GROUP, Apic);
    }
    Ok(())
}
