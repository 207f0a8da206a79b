// SPDX-License-Identifier: GPL-2.0-or-later
//! Events in every combination at an entry: an interrupt, an NMI and an INIT that wait for the payload, the monitor trap flag, a
//! preemption timer that has run down, the two windows, and an event that the entry injects, with the child's interrupts on, off and
//! blocked. What leaves the child, in which order, and where, until it has come to its end.
//!
//! The payload has its interrupts off, and an NMI waits for it because the exit of another NMI has blocked them
//! (SDM volume 3, 29.5.5). All are taken from it again before the next case: each leaves a child that wants nothing else.

use core::arch::asm;
use core::fmt::{self, Write};

use super::apic::{self, read, write, EOI, ICR, ID, SELF_IPI};
use super::bed::{calls, Bed};
use super::log;
use super::model::Numbers;
use crate::memory;
use crate::trap;
use crate::vmx::field::*;
use crate::vmx::ops::{vmread, vmwrite, VmxError};
use crate::vmx::setup::Features;

const GROUP: &str = "pending";

/// Delivery modes in the interrupt command register, level asserted.
const NMI: u64 = 0x4400;
const INIT: u64 = 0x4500;
/// The interrupt.
const VECTOR: u64 = 0x41;

/// Pin-based controls.
const EXTERNAL: u64 = 1 << 0;
const NMI_EXITING: u64 = 1 << 3;
const VIRTUAL_NMIS: u64 = 1 << 5;
const TIMER: u64 = 1 << 6;
/// Primary controls.
const INTERRUPT_WINDOW: u64 = 1 << 2;
const NMI_WINDOW: u64 = 1 << 22;
const TRAP_FLAG: u64 = 1 << 27;
const MSR_BITMAPS: u64 = 1 << 28;
/// Exit control: the interrupt is acknowledged on exit.
const ACKNOWLEDGE: u64 = 1 << 15;

/// What a case begins with, a bit each.
const SOURCES: [&str; 7] = [
    "interrupt",
    "NMI",
    "INIT",
    "trap flag",
    "timer",
    "interrupt window",
    "NMI window",
];
const INTERRUPT: usize = 0;
const WAITING_NMI: usize = 1;
const WAITING_INIT: usize = 2;
const WANTS_TRAP: usize = 3;
const WANTS_TIMER: usize = 4;
const WANTS_WINDOW: usize = 5;
const WANTS_NMI_WINDOW: usize = 6;

/// Interruptibility: nothing, by STI, by MOV SS, by NMI.
const BLOCKED: [u64; 4] = [0, 1, 2, 8];
/// Injected: nothing, an interrupt, an NMI, #UD, INT 0x30.
const INJECTED: [u64; 5] = [0, 0x8000_0033, 0x8000_0202, 0x8000_0306, 0x8000_0430];
/// NMIs do not leave the child, do, do and are virtual.
const NMIS: [u64; 3] = [0, NMI_EXITING, NMI_EXITING | VIRTUAL_NMIS];
/// How often each combination of sources is tried, with whatever else chance gives.
const TRIES: usize = 4;
/// Entries after which a child has to be at its end.
const ENTRIES: usize = 24;

/// The child's code: NOP, NOP, NOP, VMCALL, and that for ever.
const CODE: u64 = 0xfbeb_c101_0f90_9090;
const CALL: u64 = 3;
/// A handler: VMCALL, IRETQ.
const HANDLER: u64 = 0x00cf_48c1_010f;
/// WRMSR, VMCALL.
const SEND: u64 = 0x00c1_010f_300f;

fn put(address: u64, value: u64) {
    // SAFETY: a page that `memory` handed out to this module, in which no Rust object lies.
    unsafe { (address as *mut u64).write_volatile(value) };
}

/// Lets NMIs through again.
fn unblock() {
    // SAFETY: goes on behind the IRET, on the same stack and with the same flags.
    unsafe {
        asm!(
            "mov {stack}, rsp",
            "push {data}",
            "push {stack}",
            "pushfq",
            "push {code}",
            "lea {stack}, [rip + 2f]",
            "push {stack}",
            "iretq",
            "2:",
            stack = out(reg) _,
            data = in(reg) trap::DATA as u64,
            code = in(reg) trap::CODE as u64,
        );
    }
}

/// Where the child lives, and what is waiting.
struct World {
    bed: Bed,
    code: u64,
    handlers: u64,
    idt: u64,
    /// The payload's own APIC, as an address in the interrupt command register.
    myself: u64,
}

/// What is seen of a case, in a few words.
struct Story {
    text: [u8; 400],
    length: usize,
}

impl Write for Story {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = self.length + text.len();
        self.text
            .get_mut(self.length..end)
            .ok_or(fmt::Error)?
            .copy_from_slice(text.as_bytes());
        self.length = end;
        Ok(())
    }
}

impl Story {
    fn text(&self) -> &str {
        core::str::from_utf8(&self.text[..self.length]).unwrap_or("?")
    }
}

/// One case.
#[derive(Clone, Copy)]
struct Case {
    sources: usize,
    interrupts_on: bool,
    blocked: u64,
    injected: u64,
    nmis: u64,
    external: bool,
    halted: bool,
}

impl Case {
    fn draw(sources: usize, numbers: &mut Numbers) -> Case {
        // The window of NMIs is for virtual ones; without, the entry fails.
        let nmis = match numbers.below(4) {
            1.. if sources >> WANTS_NMI_WINDOW & 1 == 1 => NMI_EXITING | VIRTUAL_NMIS,
            _ => NMIS[numbers.below(NMIS.len())],
        };
        Case {
            sources,
            interrupts_on: numbers.below(2) == 0,
            blocked: BLOCKED[numbers.below(8).saturating_sub(4)],
            injected: INJECTED[numbers.below(10).saturating_sub(5)],
            nmis,
            external: numbers.below(3) > 0,
            halted: numbers.below(8) == 0,
        }
    }

    fn has(&self, source: usize) -> bool {
        self.sources >> source & 1 == 1
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, name) in SOURCES.into_iter().enumerate() {
            if self.has(number) {
                write!(f, "{name}, ")?;
            }
        }
        write!(
            f,
            "IF {} blocked {} injected {:#x} pin {:#x}{}",
            self.interrupts_on as u8,
            self.blocked,
            self.injected,
            self.nmis | self.external as u64,
            if self.halted { " halted" } else { "" }
        )
    }
}

/// The group.
pub fn run(level: u32) -> Result<(), VmxError> {
    let Some(_enabled) = apic::Enabled::new() else {
        log!("{}: no x2APIC", GROUP);
        return Ok(());
    };
    let mut world = World::new();
    let mut numbers = Numbers::new(29);
    let mut result = Ok(());
    // Further down a case takes a second: those with up to two sources and with nearly all must do, once each.
    let tries = if level == 1 { TRIES } else { 1 };
    for sources in 0..1usize << SOURCES.len() {
        if level > 1 && (3..SOURCES.len() as u32 - 1).contains(&sources.count_ones()) {
            continue;
        }
        for number in 0..tries {
            let case = Case::draw(sources, &mut numbers);
            let modern = number % 2 == 0;
            if result.is_ok() {
                result = world.try_case(case, modern);
            }
        }
    }
    result
}

impl World {
    fn new() -> World {
        let [code, handlers, idt] = [(); 3].map(|()| memory::pages(1));
        put(code, CODE);
        for vector in 0..256 {
            let handler = handlers + vector * 8;
            put(handler, HANDLER);
            let low = handler & 0xffff | (trap::CODE as u64) << 16 | 0x8e00 << 32;
            put(idt + vector * 16, low | (handler >> 16 & 0xffff) << 48);
            put(idt + vector * 16 + 8, handler >> 32);
        }
        World {
            bed: Bed::new(GROUP),
            code,
            handlers,
            idt,
            myself: read(ID) << 32,
        }
    }

    /// A child that is about to execute the code at `rip`.
    fn prepare(&mut self, modern: bool, rip: u64) -> Result<(), VmxError> {
        let features = match modern {
            true => self.bed.modern(),
            false => Features::default(),
        };
        self.bed.prepare(features, calls)?;
        vmwrite(GUEST_IDTR_BASE, self.idt)?;
        vmwrite(GUEST_IDTR_LIMIT, 0xfff)?;
        vmwrite(GUEST_RIP, rip)
    }

    /// A child that sends this machine's only processor an NMI, without an exit.
    fn child_sends_nmi(&mut self) -> Result<(), VmxError> {
        put(self.code, SEND);
        self.prepare(true, self.code)?;
        set(PIN_BASED_VM_EXEC_CONTROL, NMI_EXITING)?;
        set(CPU_BASED_VM_EXEC_CONTROL, MSR_BITMAPS)?;
        let registers = self.bed.registers();
        registers.rcx = ICR as u64;
        registers.rax = NMI;
        registers.rdx = 0;
        self.bed.enter();
        put(self.code, CODE);
        Ok(())
    }

    fn try_case(&mut self, case: Case, modern: bool) -> Result<(), VmxError> {
        if case.has(WAITING_NMI) {
            self.child_sends_nmi()?;
            if vmread(VM_EXIT_REASON)? != 0 {
                log!("{}/{}: FAIL: the NMI did not leave its sender", GROUP, case);
                return Ok(());
            }
            write(ICR, self.myself | NMI);
        }
        if case.has(WAITING_INIT) {
            write(ICR, self.myself | INIT);
        }
        if case.has(INTERRUPT) {
            write(SELF_IPI, VECTOR);
        }
        self.prepare(modern, self.code)?;
        case.fill_in()?;
        let story = self.follow(case)?;
        log!("{}/{}: {}", GROUP, case, story.text());
        self.settle(case)
    }

    /// Enters until the child is at its end, and takes off what it was left for.
    fn follow(&mut self, case: Case) -> Result<Story, VmxError> {
        let mut story = Story {
            text: [0; 400],
            length: 0,
        };
        for _ in 0..ENTRIES {
            let outcome = self.bed.enter();
            if outcome.failed() {
                let _ = write!(story, "{outcome}");
                break;
            }
            let reason = vmread(VM_EXIT_REASON)?;
            let rip = vmread(GUEST_RIP)?;
            // In which handler, or how far in the code.
            let place = match rip.checked_sub(self.handlers) {
                Some(offset) if offset < memory::PAGE => 0x1000 + offset / 8 * 16 + offset % 8,
                _ => rip.wrapping_sub(self.code),
            };
            let _ = write!(
                story,
                "{:x}@{:x}/{:x}",
                reason & 0xffff,
                place,
                vmread(GUEST_INTERRUPTIBILITY_INFO)?
            );
            for field in [
                VM_EXIT_INTR_INFO,
                IDT_VECTORING_INFO_FIELD,
                VM_ENTRY_INTR_INFO_FIELD,
            ] {
                let value = vmread(field)?;
                if value >> 31 == 1 {
                    let _ = write!(story, "+{:x}", value & 0x7fff_ffff);
                }
            }
            let _ = write!(story, " ");
            if reason >> 31 == 1 {
                break;
            }
            match reason {
                VMCALL if place == CALL => break,
                VMCALL => self.bed.skip()?,
                0 => {}
                1 => write(EOI, 0),
                INIT_SIGNAL => {}
                7 => clear(CPU_BASED_VM_EXEC_CONTROL, INTERRUPT_WINDOW)?,
                8 => clear(CPU_BASED_VM_EXEC_CONTROL, NMI_WINDOW)?,
                TRAP => clear(CPU_BASED_VM_EXEC_CONTROL, TRAP_FLAG)?,
                RUN_DOWN => clear(PIN_BASED_VM_EXEC_CONTROL, TIMER)?,
                _ => break,
            }
            // A child that sleeps for good has nothing left to wait for.
            if reason == RUN_DOWN && case.halted {
                vmwrite(GUEST_ACTIVITY_STATE, 0)?;
            }
        }
        Ok(story)
    }

    /// Takes from the payload what is waiting for it still.
    fn settle(&mut self, case: Case) -> Result<(), VmxError> {
        write(EOI, 0);
        for _ in 0..6 {
            self.prepare(true, self.code + CALL)?;
            set(PIN_BASED_VM_EXEC_CONTROL, EXTERNAL | NMI_EXITING)?;
            set(VM_EXIT_CONTROLS, ACKNOWLEDGE)?;
            let outcome = self.bed.enter();
            if outcome.failed() || self.bed.called(&outcome) {
                unblock();
                return Ok(());
            }
            if vmread(VM_EXIT_REASON)? == 1 {
                write(EOI, 0);
            }
        }
        log!("{}/{}: FAIL: it does not come to an end", GROUP, case);
        Ok(())
    }
}

const VMCALL: u64 = crate::vmx::exit::VMCALL;
/// Exit reasons.
const INIT_SIGNAL: u64 = 3;
const TRAP: u64 = 37;
const RUN_DOWN: u64 = 52;

impl Case {
    /// Controls and state of the current VMCS.
    fn fill_in(&self) -> Result<(), VmxError> {
        let bit = |source, bits| if self.has(source) { bits } else { 0 };
        // A timer that runs down late wakes a child that nothing else does.
        let timer = bit(WANTS_TIMER, TIMER) | if self.halted { TIMER } else { 0 };
        set(
            PIN_BASED_VM_EXEC_CONTROL,
            self.nmis | if self.external { EXTERNAL } else { 0 } | timer,
        )?;
        set(
            CPU_BASED_VM_EXEC_CONTROL,
            bit(WANTS_TRAP, TRAP_FLAG)
                | bit(WANTS_WINDOW, INTERRUPT_WINDOW)
                | bit(WANTS_NMI_WINDOW, NMI_WINDOW),
        )?;
        set(VM_EXIT_CONTROLS, ACKNOWLEDGE)?;
        let late = if self.has(WANTS_TIMER) { 0 } else { 1 << 14 };
        vmwrite(VMX_PREEMPTION_TIMER_VALUE, late)?;
        vmwrite(GUEST_INTERRUPTIBILITY_INFO, self.blocked)?;
        let flags = vmread(GUEST_RFLAGS)? & !(1 << 9);
        vmwrite(GUEST_RFLAGS, flags | (self.interrupts_on as u64) << 9)?;
        vmwrite(VM_ENTRY_INTR_INFO_FIELD, self.injected)?;
        vmwrite(VM_ENTRY_INSTRUCTION_LEN, 1)?;
        vmwrite(GUEST_ACTIVITY_STATE, self.halted as u64)
    }
}

fn set(field: u32, bits: u64) -> Result<(), VmxError> {
    vmwrite(field, vmread(field)? | bits)
}

fn clear(field: u32, bits: u64) -> Result<(), VmxError> {
    vmwrite(field, vmread(field)? & !bits)
}
