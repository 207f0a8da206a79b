// SPDX-License-Identifier: GPL-2.0-or-later
//! Entering a child, noting what came of it, and doing what a hypervisor might do then.

use super::arena::page;
use super::edits;
use super::fields::{LENGTH, OURS, QUALIFICATION, VIOLATIONS};
use super::log::Log;
use super::world::World;
use super::{number, Numbers};
use crate::cpu;
use crate::vmx::child::{self, How};
use crate::vmx::field::*;
use crate::vmx::ops::{invvpid, vmclear, vmread, vmwrite, VmxError};
use crate::vmx::setup::IA32E_MODE_GUEST;

const EXCEPTION: u64 = 0;
const TRIPLE_FAULT: u64 = 2;
const IO: u64 = 30;
const EPT_VIOLATION: u64 = 48;
const EPT_MISCONFIGURATION: u64 = 49;
const PREEMPTION_TIMER: u64 = 52;
const MONITOR_TRAP: u64 = 37;
/// In an event's information: valid, with an error code, its type.
const VALID: u64 = 1 << 31;
const WITH_ERROR: u64 = 1 << 11;
const TYPE: u64 = 7 << 8;
/// Types of events: external interrupt, NMI, hardware exception, software interrupt, exceptions by INT1 and INT3.
const NMI: u64 = 2 << 8;
const HARDWARE: u64 = 3 << 8;
const SOFTWARE: u64 = 4 << 8;
const INT1: u64 = 5 << 8;
const INT3: u64 = 6 << 8;
/// Exits with an instruction's information that is defined whatever the operands (SDM volume 3, 29.2.5).
const INFORMATIVE: [u64; 14] = [19, 21, 22, 23, 25, 27, 46, 47, 50, 53, 57, 58, 61, 63];
/// In that information: the operand is a register, and what describes that.
const REGISTER: u64 = 1 << 10;
const OF_REGISTER: u64 = 0xf << 3 | REGISTER | 0xf << 28;

/// Secondary control: enable VPID.
const ENABLE_VPID: u64 = 1 << 5;
/// INVVPID of all VPIDs but 0.
const ALL_CONTEXTS: u64 = 2;

/// RFLAGS.RF, which see `fields::STALE`.
const RF: u64 = 1 << 16;

/// What came of an entry.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// VMLAUNCH or VMRESUME failed.
    Failed,
    /// The entry failed behind the checks of controls.
    EntryFailure,
    /// An exit for that reason.
    Exit(u64),
}

/// Enters once and notes everything.
fn enter(world: &mut World, how: How, numbers: &mut Numbers, log: &mut Log) -> End {
    log.does(
        "enter",
        &[
            world.current as u64,
            how as u64,
            vmread(GUEST_RIP).unwrap_or(0),
        ],
    );
    // Without a current VMCS, which entering will say, there is nothing to load.
    let _ = load_pdptes(world);
    let _ = invalidate(world);
    let _ = unblock();
    let vmcs = world.vmcs();
    // SAFETY: children live in the arena, by their page tables or by EPT; `OURS` keeps the host state.
    let result = unsafe { child::enter(how, &mut vmcs.registers) };
    log.note("entered", &[how as u64, number(&result)]);
    if result.is_err() {
        return End::Failed;
    }
    let read = |field| vmread(field).unwrap_or(u64::MAX);
    let reason = read(VM_EXIT_REASON);
    let basic = reason & 0xffff;
    let qualification = match basic {
        EXCEPTION if [1, 14].contains(&(read(VM_EXIT_INTR_INFO) & 0xff)) => {
            read(EXIT_QUALIFICATION)
        }
        basic if QUALIFICATION.contains(&basic) => read(EXIT_QUALIFICATION),
        _ => 0,
    };
    if reason >> 31 & 1 == 1 {
        log.note("entry failure", &[reason, qualification]);
        // KVM may have failed before it loaded the PDPTEs, and would not on the next entry.
        world.vmcs().pae = false;
        note_host(numbers, log);
        return End::EntryFailure;
    }
    world.vmcs().launched = true;
    let with_code = |info: u64, code| match info & (VALID | WITH_ERROR) {
        bits if bits == VALID | WITH_ERROR => read(code),
        _ => 0,
    };
    let interruption = read(VM_EXIT_INTR_INFO);
    let vectoring = read(IDT_VECTORING_INFO_FIELD);
    let software = |info: u64| info & VALID != 0 && [SOFTWARE, INT1, INT3].contains(&(info & TYPE));
    let length = match LENGTH.contains(&basic) || software(interruption) || software(vectoring) {
        true => read(VM_EXIT_INSTRUCTION_LEN),
        false => 0,
    };
    let info = match basic {
        IO if qualification & 1 << 4 == 0 => 0,
        IO => read(VMX_INSTRUCTION_INFO) & (7 << 7 | 7 << 15),
        basic if INFORMATIVE.contains(&basic) => match read(VMX_INSTRUCTION_INFO) {
            info if info & REGISTER != 0 => info & OF_REGISTER,
            info => info,
        },
        _ => 0,
    };
    // An operand in a register has no displacement.
    let qualification = match info & REGISTER {
        0 => qualification,
        _ if basic == IO => qualification,
        _ => 0,
    };
    let (physical, linear) = match basic {
        EPT_VIOLATION if qualification & 1 << 7 != 0 => {
            (read(GUEST_PHYSICAL_ADDRESS), read(GUEST_LINEAR_ADDRESS))
        }
        EPT_VIOLATION | EPT_MISCONFIGURATION => (read(GUEST_PHYSICAL_ADDRESS), 0),
        _ => (0, 0),
    };
    log.note(
        "exit",
        &[
            reason,
            qualification,
            length,
            info,
            interruption,
            with_code(interruption, VM_EXIT_INTR_ERROR_CODE),
            vectoring,
            with_code(vectoring, IDT_VECTORING_ERROR_CODE),
            physical,
            linear,
        ],
    );
    log.note(
        "guest",
        &[
            GUEST_RIP,
            GUEST_RSP,
            GUEST_RFLAGS,
            GUEST_INTERRUPTIBILITY_INFO,
            GUEST_CR0,
            GUEST_CR3,
            GUEST_CR4,
        ]
        .map(|field| match field {
            GUEST_RFLAGS => read(field) & !RF,
            _ => read(field),
        }),
    );
    let r = world.vmcs().registers;
    log.note(
        "registers",
        &[
            r.rax, r.rbx, r.rcx, r.rdx, r.rbp, r.rsi, r.rdi, r.r8[0], r.r8[7],
        ],
    );
    note_host(numbers, log);
    End::Exit(basic)
}

/// Notes what the payload finds in its own registers after an exit.
fn note_host(numbers: &mut Numbers, log: &mut Log) {
    let [es, ss, ds, fs, gs] = cpu::selectors();
    log.note("host", &[cpu::cr0(), cpu::cr4(), es, ss, ds, fs, gs]);
    let msr = match numbers.below(24) {
        0..4 => 0xc000_0100,
        4..8 => 0xc000_0101,
        8 => 0xc000_0080,
        9 => 0x277,
        10 => 0x174,
        11 => 0x175,
        12 => 0x176,
        13 => 0xc000_0102,
        14 => {
            log.note("DR7", &[cpu::dr7(), cpu::cr2()]);
            return;
        }
        _ => return,
    };
    log.note("MSR", &[msr, cpu::rdmsr(msr as u32).unwrap_or(u64::MAX)]);
}

/// Tries to enter without a current VMCS.
pub fn bare(world: &mut World, launch: bool, log: &mut Log) {
    let how = if launch { How::Launch } else { How::Resume };
    // SAFETY: there is nothing to enter.
    let result = unsafe { child::enter(how, &mut world.vmcs().registers) };
    log.note("bare entry", &[how as u64, number(&result)]);
}

/// Enters a few times, with what a hypervisor does after each exit.
pub fn some(world: &mut World, numbers: &mut Numbers, log: &mut Log) -> Result<(), VmxError> {
    for _ in 0..1 + numbers.below(3) {
        let due = if world.vmcs().launched {
            How::Resume
        } else {
            How::Launch
        };
        let how = match (numbers.below(24), due) {
            (0, How::Launch) => How::Resume,
            (0, _) => How::Launch,
            (1, How::Resume) => How::ResumeBehindMovSs,
            _ => due,
        };
        let end = enter(world, how, numbers, log);
        if end == End::Failed && how != due {
            continue;
        }
        if !react(world, end, numbers, log)? {
            break;
        }
    }
    Ok(())
}

/// Has KVM take the PDPTEs from a vmcs12 whose child has PAE paging and had not when it was entered last: it does so only
/// if a field that it does not shadow was written, and so forgets it where CR0 or CR4 alone turn that paging on.
fn load_pdptes(world: &mut World) -> Result<(), VmxError> {
    let pae = vmread(VM_ENTRY_CONTROLS)? & IA32E_MODE_GUEST == 0
        && vmread(GUEST_CR0)? & 1 << 31 != 0
        && vmread(GUEST_CR4)? & 1 << 5 != 0;
    if pae && !core::mem::replace(&mut world.vmcs().pae, pae) {
        vmwrite(GUEST_PDPTR0, vmread(GUEST_PDPTR0)?)?;
    }
    world.vmcs().pae = pae;
    Ok(())
}

/// What a hypervisor must do that gives all its children one VPID: what the TLB has of another one, or by another CR3 or
/// other PDPTEs, goes (SDM volume 3, 30.4.3.3). An entry does not see to it.
fn invalidate(world: &mut World) -> Result<(), VmxError> {
    let with_vpid = vmread(SECONDARY_VM_EXEC_CONTROL)? & ENABLE_VPID != 0;
    let mut pdptes = [0; 4];
    if with_vpid && world.vmcs().pae {
        for (field, pdpte) in (GUEST_PDPTR0..).step_by(2).zip(&mut pdptes) {
            *pdpte = vmread(field)?;
        }
    }
    let now = (world.current, vmread(GUEST_CR3)?, pdptes);
    if with_vpid && world.translated.replace(now) != Some(now) {
        invvpid(ALL_CONTEXTS, [0, 0])?;
    }
    Ok(())
}

/// A preemption timer that has run down lets no instruction pass, but behind STI one did, on stock KVM, in one program of some
/// tens of thousands: presumably when an interrupt of L0's came just then. So there is no blocking with such a timer.
fn unblock() -> Result<(), VmxError> {
    const STI_OR_MOV_SS: u64 = 3;
    let timed = vmread(PIN_BASED_VM_EXEC_CONTROL)? & edits::TIMER != 0;
    let blocked = vmread(GUEST_INTERRUPTIBILITY_INFO)?;
    if timed && blocked & STI_OR_MOV_SS != 0 && vmread(VMX_PREEMPTION_TIMER_VALUE)? == 0 {
        vmwrite(GUEST_INTERRUPTIBILITY_INFO, blocked & !STI_OR_MOV_SS)?;
    }
    Ok(())
}

/// Does what a hypervisor might do after an exit. False if the child cannot go on as it is.
fn react(
    world: &mut World,
    end: End,
    numbers: &mut Numbers,
    log: &mut Log,
) -> Result<bool, VmxError> {
    let reason = match end {
        End::Exit(reason) => reason,
        _ => {
            // A program that has spoiled its VMCS for good gets a new one soon.
            if numbers.below(10) < 7 {
                let current = world.current;
                world.revive(current)?;
            }
            return Ok(false);
        }
    };
    let vectoring = vmread(IDT_VECTORING_INFO_FIELD)?;
    let choice = numbers.below(8);
    log.does("react", &[choice as u64]);
    match reason {
        reason if LENGTH.contains(&reason) && choice > 0 => {
            let length = vmread(VM_EXIT_INSTRUCTION_LEN)?;
            let rip = vmread(GUEST_RIP)?;
            // Out of a handler's loop, which would come back to what has faulted.
            let (from, to) = (page::HANDLERS, page::HANDLERS32 + 1);
            let handlers = world.arena.at(from)..world.arena.at(to);
            if handlers.contains(&rip) && choice > 3 {
                world.lead()?;
                return Ok(true);
            }
            vmwrite(GUEST_RIP, rip + length)?;
            if choice > 4 {
                let blocked = vmread(GUEST_INTERRUPTIBILITY_INFO)?;
                vmwrite(GUEST_INTERRUPTIBILITY_INFO, blocked & !3)?;
            }
        }
        EXCEPTION if choice < 2 => {
            // The exception is the child's own affair.
            let info = vmread(VM_EXIT_INTR_INFO)? & (VALID | WITH_ERROR | TYPE | 0xff);
            vmwrite(VM_ENTRY_INTR_INFO_FIELD, info)?;
            vmwrite(
                VM_ENTRY_EXCEPTION_ERROR_CODE,
                match info & WITH_ERROR {
                    0 => 0,
                    _ => vmread(VM_EXIT_INTR_ERROR_CODE)?,
                },
            )?;
            vmwrite(VM_ENTRY_INSTRUCTION_LEN, 1)?;
        }
        EPT_VIOLATION | EPT_MISCONFIGURATION if choice < 6 => {
            for tables in &world.arena.epts {
                tables.reset();
            }
            world.invalidate()?;
            if vectoring & VALID != 0 && choice < 4 {
                vmwrite(VM_ENTRY_INTR_INFO_FIELD, vectoring & !(1 << 12))?;
                if vectoring & WITH_ERROR != 0 {
                    let code = vmread(IDT_VECTORING_ERROR_CODE)?;
                    vmwrite(VM_ENTRY_EXCEPTION_ERROR_CODE, code)?;
                }
                if [SOFTWARE, INT1, INT3].contains(&(vectoring & TYPE)) {
                    vmwrite(VM_ENTRY_INSTRUCTION_LEN, vmread(VM_EXIT_INSTRUCTION_LEN)?)?;
                }
            }
        }
        TRIPLE_FAULT if choice < 6 => {
            let current = world.current;
            world.revive(current)?;
        }
        7 | 8 | MONITOR_TRAP if choice < 6 => {
            let bit = match reason {
                7 => 2,
                8 => 22,
                _ => 27,
            };
            let controls = vmread(CPU_BASED_VM_EXEC_CONTROL)?;
            vmwrite(CPU_BASED_VM_EXEC_CONTROL, controls & !(1 << bit))?;
        }
        MONITOR_TRAP => {}
        PREEMPTION_TIMER if choice < 6 => {
            let controls = vmread(PIN_BASED_VM_EXEC_CONTROL)?;
            vmwrite(PIN_BASED_VM_EXEC_CONTROL, controls & !(1 << 6))?;
        }
        62 => vmwrite(GUEST_PML_INDEX, 511)?,
        _ => world.lead()?,
    }
    Ok(true)
}

/// Writes bad or random values to fields, enters, and puts the old ones back.
pub fn violate(world: &mut World, numbers: &mut Numbers, log: &mut Log) -> Result<(), VmxError> {
    let mut old = [(0, 0); 2];
    let count = 1 + (numbers.below(4) == 0) as usize;
    for slot in &mut old[..count] {
        let (field, value) = match numbers.below(4) {
            0 => {
                let (field, _) = EVERY[numbers.below(EVERY.len())];
                // What exits leave in a read-only field may be undefined.
                let value = match numbers.below(4) {
                    0 => numbers.next(),
                    1 if field >> 10 & 3 == 1 => 1 << numbers.below(64),
                    1 => vmread(field).unwrap_or(0) ^ 1 << numbers.below(64),
                    2 => 0,
                    _ => numbers.next() & 0xffff_f000,
                };
                if OURS.contains(&field) {
                    continue;
                }
                (field, value)
            }
            _ => VIOLATIONS[numbers.below(VIOLATIONS.len())],
        };
        let before = vmread(field);
        let result = vmwrite(field, value);
        log.note("violate", &[field as u64, value, number(&result)]);
        if let (Ok(before), Ok(())) = (before, result) {
            *slot = (field, before);
        }
    }
    let due = if world.vmcs().launched {
        How::Resume
    } else {
        How::Launch
    };
    let end = enter(world, due, numbers, log);
    for &(field, value) in old.iter().rev().filter(|(field, _)| *field != 0) {
        vmwrite(field, value)?;
    }
    if let End::Exit(_) = end {
        react(world, end, numbers, log)?;
    }
    Ok(())
}

/// Has an event delivered with the entry, in any state that the child may be in, and notes the entry field after it.
pub fn inject(world: &mut World, numbers: &mut Numbers, log: &mut Log) -> Result<(), VmxError> {
    const CODES: u64 = 0x6022_7d00;
    let vector = numbers.below(64) as u64;
    let info = match numbers.below(8) {
        0 | 1 => vector,
        2 => NMI | 2,
        3 | 4 => {
            // Not #BP and #OF: where the delivery meets a page that EPT02 lacks, KVM delivers them anew as software exceptions,
            // with the length of whatever instruction it had last (vmx_inject_exception()).
            let vector = match vector & 31 {
                3 | 4 => 13,
                vector => vector,
            };
            HARDWARE | vector | WITH_ERROR * (CODES >> vector & 1)
        }
        5 => SOFTWARE | vector,
        // Not INT1: KVM forgets one whose delivery meets a page that EPT02 lacks.
        _ => INT3 | 3 + (vector & 1),
    };
    log.does("inject", &[info]);
    vmwrite(VM_ENTRY_INTR_INFO_FIELD, VALID | info)?;
    vmwrite(VM_ENTRY_EXCEPTION_ERROR_CODE, numbers.next() & 0x7fff)?;
    vmwrite(VM_ENTRY_INSTRUCTION_LEN, 1 + numbers.below(3) as u64)?;
    if numbers.below(3) > 0 {
        // What blocks events that come from outside would make the entry fail.
        vmwrite(GUEST_INTERRUPTIBILITY_INFO, 0)?;
        vmwrite(GUEST_RFLAGS, vmread(GUEST_RFLAGS)? | 1 << 9)?;
    }
    // An event wakes a child that was halted.
    let halted = numbers.below(6) == 0;
    if halted {
        vmwrite(GUEST_ACTIVITY_STATE, 1)?;
    }
    for _ in 0..numbers.below(2) {
        edits::edit(world, numbers, log)?;
    }
    let due = if world.vmcs().launched {
        How::Resume
    } else {
        How::Launch
    };
    let end = enter(world, due, numbers, log);
    log.note(
        "entry field",
        &[
            vmread(VM_ENTRY_INTR_INFO_FIELD)?,
            vmread(GUEST_ACTIVITY_STATE)?,
        ],
    );
    vmwrite(GUEST_ACTIVITY_STATE, 0)?;
    if end == End::Failed || end == End::EntryFailure {
        vmwrite(VM_ENTRY_INTR_INFO_FIELD, 0)?;
    }
    if numbers.below(64) == 0 {
        // In the middle of everything.
        vmclear(world.vmcs().region)?;
        let current = world.current;
        world.revive(current)?;
        return Ok(());
    }
    react(world, end, numbers, log)?;
    Ok(())
}
