// SPDX-License-Identifier: GPL-2.0-or-later
//! Exceptions of the child, which of them leave it, and events injected into it.

use core::arch::asm;

use super::bed::Bed;
use super::exits::program;
use crate::vmx::field::*;
use crate::vmx::ops::{vmread, vmwrite, VmxError};
use crate::vmx::setup::Features;

const UD: u64 = 1 << 6;
const BP: u64 = 1 << 3;
const GP: u64 = 1 << 13;
const PF: u64 = 1 << 14;
const DF: u64 = 1 << 8;
/// Exit reason: monitor trap flag.
const MONITOR_TRAP: u64 = 37;
/// The entry field is valid.
const INJECT_VALID: u64 = 1 << 31;

/// The group.
pub fn run() -> Result<(), VmxError> {
    let mut bed = Bed::new("events");
    for features in [Features::default(), bed.modern()] {
        exceptions(&mut bed, features)?;
        page_faults(&mut bed, features)?;
        injections(&mut bed, features)?;
        control_registers(&mut bed, features)?;
        activity(&mut bed, features)?;
    }
    Ok(())
}

type Change = (u32, u64);

/// Prepares, writes fields, enters once and logs.
fn once(
    bed: &mut Bed,
    name: &str,
    features: Features,
    changes: &[Change],
    program: extern "C" fn() -> !,
) -> Result<(), VmxError> {
    bed.prepare(features, program)?;
    for &(field, value) in changes {
        vmwrite(field, value)?;
    }
    let outcome = bed.enter();
    bed.log_exit(name, &outcome);
    Ok(())
}

fn exceptions(bed: &mut Bed, features: Features) -> Result<(), VmxError> {
    let no_idt = (GUEST_IDTR_LIMIT, 0);
    once(
        bed,
        "#UD",
        features,
        &[(EXCEPTION_BITMAP, UD)],
        program!("ud2"),
    )?;
    once(
        bed,
        "#BP",
        features,
        &[(EXCEPTION_BITMAP, BP)],
        program!("int3"),
    )?;
    once(
        bed,
        "#GP of a bad address",
        features,
        &[(EXCEPTION_BITMAP, GP)],
        program!("mov rax, 1", "shl rax, 63", "mov rax, [rax]"),
    )?;
    once(
        bed,
        "#GP of an interrupt without gate",
        features,
        &[(EXCEPTION_BITMAP, GP)],
        program!("int 0x80"),
    )?;
    once(bed, "triple fault", features, &[no_idt], program!("ud2"))?;
    once(
        bed,
        "#GP while delivering #UD",
        features,
        &[(EXCEPTION_BITMAP, GP), no_idt],
        program!("ud2"),
    )?;
    once(
        bed,
        "#DF",
        features,
        &[(EXCEPTION_BITMAP, DF), no_idt],
        program!("mov rax, 1", "shl rax, 63", "mov rax, [rax]"),
    )
}

/// Page faults leave by bitmap, mask and match together (SDM volume 3, 27.2).
fn page_faults(bed: &mut Bed, features: Features) -> Result<(), VmxError> {
    let fault = program!("mov rax, 1", "shl rax, 40", "mov [rax], rax");
    let no_idt = (GUEST_IDTR_LIMIT, 0);
    for (name, bitmap, mask, value) in [
        ("#PF by bitmap", PF, 0, 0),
        ("#PF match of a write", PF, 2, 2),
        ("#PF match of a read", PF, 2, 0),
        ("#PF no match, bit clear", 0, 2, 0),
        ("#PF bit clear", 0, 0, 0),
    ] {
        let changes = [
            (EXCEPTION_BITMAP, bitmap),
            (PAGE_FAULT_ERROR_CODE_MASK, mask),
            (PAGE_FAULT_ERROR_CODE_MATCH, value),
            no_idt,
        ];
        once(bed, name, features, &changes, fault)?;
    }
    Ok(())
}

/// Delivery fails at once, since there is no IDT: the exit shows what was being delivered.
fn injections(bed: &mut Bed, features: Features) -> Result<(), VmxError> {
    let vmcall = program!("nop");
    for (name, info, error, length) in [
        ("inject interrupt", 0x30, 0, 0),
        ("inject NMI", 2 << 8 | 2, 0, 0),
        ("inject #UD", 3 << 8 | 6, 0, 0),
        ("inject #GP", 3 << 8 | 13 | 1 << 11, 0x18, 0),
        ("inject software interrupt", 4 << 8 | 0x30, 0, 2),
        ("inject software exception", 6 << 8 | 3, 0, 1),
    ] {
        let changes = [
            (VM_ENTRY_INTR_INFO_FIELD, INJECT_VALID | info),
            (VM_ENTRY_EXCEPTION_ERROR_CODE, error),
            (VM_ENTRY_INSTRUCTION_LEN, length),
            (EXCEPTION_BITMAP, GP | DF),
            (GUEST_IDTR_LIMIT, 0),
            (GUEST_RFLAGS, 0x202),
        ];
        once(bed, name, features, &changes, vmcall)?;
        super::log!(
            "events/{}: entry field then {:#x}",
            name,
            vmread(VM_ENTRY_INTR_INFO_FIELD)?
        );
    }
    // If something comes up for the host between KVM's last look and the entry, KVM takes back what it was about to inject
    // and has no case for this type (vmx_cancel_injection()): the event is gone. Three times in a row it is no chance.
    let mut outcome = None;
    for _ in 0..3 {
        bed.prepare(features, vmcall)?;
        vmwrite(VM_ENTRY_INTR_INFO_FIELD, INJECT_VALID | 7 << 8)?;
        outcome = Some(bed.enter());
        if vmread(VM_EXIT_REASON)? == MONITOR_TRAP {
            break;
        }
    }
    if let Some(outcome) = outcome {
        bed.log_exit("inject monitor trap flag", &outcome);
    }
    Ok(())
}

fn control_registers(bed: &mut Bed, features: Features) -> Result<(), VmxError> {
    const TS: u64 = 1 << 3;
    const PGE: u64 = 1 << 7;
    let cr0 = [(CR0_GUEST_HOST_MASK, TS), (CR0_READ_SHADOW, TS)];
    once(
        bed,
        "mov to cr0 of a masked bit",
        features,
        &cr0,
        program!("mov rax, cr0", "and eax, ~8", "mov cr0, rax"),
    )?;
    once(
        bed,
        "clts of a masked bit",
        features,
        &cr0,
        program!("clts"),
    )?;
    once(
        bed,
        "lmsw of a masked bit",
        features,
        &cr0,
        program!("mov eax, 1", "lmsw ax"),
    )?;
    once(
        bed,
        "mov to cr0 of an unmasked bit",
        features,
        &cr0,
        program!(
            "mov rax, cr0",
            "xor eax, 2",
            "mov cr0, rax",
            "xor eax, 2",
            "mov cr0, rax"
        ),
    )?;
    let cr4 = [(CR4_GUEST_HOST_MASK, PGE), (CR4_READ_SHADOW, 0)];
    once(
        bed,
        "mov to cr4 of a masked bit",
        features,
        &cr4,
        program!("mov rcx, cr4", "or ecx, 0x80", "mov cr4, rcx"),
    )
}

/// Activity states other than active, with something that ends them at once.
fn activity(bed: &mut Bed, features: Features) -> Result<(), VmxError> {
    let pin = vmread(PIN_BASED_VM_EXEC_CONTROL)?;
    let timer = [
        (GUEST_ACTIVITY_STATE, 1),
        (PIN_BASED_VM_EXEC_CONTROL, pin | 1 << 6),
        (VMX_PREEMPTION_TIMER_VALUE, 0),
    ];
    once(
        bed,
        "preemption timer in HLT",
        features,
        &timer,
        program!("nop"),
    )?;
    let window = vmread(CPU_BASED_VM_EXEC_CONTROL)? | 1 << 2;
    let interrupt = [
        (GUEST_ACTIVITY_STATE, 1),
        (CPU_BASED_VM_EXEC_CONTROL, window),
        (GUEST_RFLAGS, 0x202),
    ];
    once(
        bed,
        "interrupt window in HLT",
        features,
        &interrupt,
        program!("nop"),
    )
}
