// SPDX-License-Identifier: GPL-2.0-or-later
//! VMPTRLD, VMCLEAR and INVVPID in every form of memory operand, with all flags set before, a step at a time, and behind STI
//! with an interrupt waiting; of VMCSs that are current, were loaded before, or were not.
//!
//! Each comes right after two VMPTRLDs, since a hypervisor that goes back and forth between VMCSs may be served in another way
//! than one that does not.

use core::arch::asm;
use core::fmt;

use super::apic::{self, read, write, EOI, IRR, ISR, SELF_IPI};
use super::bed::{calls, Bed};
use super::log;
use super::model::page_sum;
use super::script::FLAGS;
use crate::cpu;
use crate::memory::{self, PAGE};
use crate::trap::{self, Fault};
use crate::vmx::child::How;
use crate::vmx::ops::{vmclear, vmptrld, vmptrst, vmread, vmwrite, VmxError};
use crate::vmx::setup::Features;
use crate::vmx::{field, new_region, vmxon_region};

const GROUP: &str = "operands";

/// A guest-physical page that nobody has given the payload memory for.
const UNBACKED: u64 = 0x3000_0000;
/// Not in the payload's page tables.
const UNMAPPED: u64 = 1 << 40;
const NOT_CANONICAL: u64 = 1 << 62;

/// RFLAGS: trap after the next instruction.
const TF: u64 = 1 << 8;
/// A vector beyond the payload's IDT: an interrupt that is taken is a #GP that names it.
const VECTOR: u64 = 0x41;

/// What an instruction did.
struct Done {
    fault: Result<(), Fault>,
    /// RFLAGS behind it.
    flags: u64,
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Err(fault) = self.fault {
            write!(f, "{fault}, ")?;
        }
        write!(f, "flags {:#x}", self.flags & FLAGS)?;
        // ZF: there is a current VMCS, and it has a number of the error.
        if self.fault.is_ok() && self.flags & 1 << 6 != 0 {
            let number = vmread(field::VM_INSTRUCTION_ERROR).unwrap_or(u64::MAX);
            write!(f, ", error {number}")?;
        }
        Ok(())
    }
}

/// A function that executes one instruction with its operand in one form: flags before, the operand's address, and
/// what is in the register operand if there is one.
type Form = fn(u64, u64, u64) -> Done;

/// `$operand` may use the registers `base` (the operand's address), `index` (an eighth of it) and `below` (0x140 less), and their
/// lower halves.
macro_rules! form {
    ($instruction:literal, $operand:literal) => {
        |set: u64, place: u64, kind: u64| {
            let flags: u64;
            // SAFETY: the operand is only read; what the instruction does to the region that it names is the processor's
            // business, no Rust object lies there. A fault or trap resumes behind it.
            unsafe {
                asm!(
                    trap::guard!(
                        "push {set}\n",
                        "popfq\n",
                        concat!($instruction, $operand)
                    ),
                    "pushfq",
                    "pop {flags}",
                    "/* {kind} {base} {base:e} {index} {below} */",
                    guard = sym trap::GUARD,
                    scratch = out(reg) _,
                    set = in(reg) set,
                    flags = lateout(reg) flags,
                    base = in(reg) place,
                    index = in(reg) place / 8,
                    below = in(reg) place.wrapping_sub(0x140),
                    kind = in(reg) kind,
                );
            }
            Done { fault: trap::guarded(()), flags }
        }
    };
}

macro_rules! forms {
    ($($instruction:literal)*) => {
        [$([
            ("plain", form!($instruction, "[{base}]") as Form),
            ("displacement", form!($instruction, "[{below} + 0x140]")),
            ("index", form!($instruction, "[{index} * 8]")),
            ("32-bit address", form!($instruction, "[{base:e}]")),
            ("GS", form!($instruction, "gs:[{base}]")),
            ("SS", form!($instruction, "ss:[{base}]")),
        ]),*]
    };
}

struct Operands {
    vmcss: [u64; 3],
    /// Two pages for operands.
    place: u64,
}

/// The group.
pub fn run(level: u32) -> Result<(), VmxError> {
    // KVM knows of no VMCS of the child's, whose translations INVVPID would flush, before there was one.
    let mut bed = Bed::new(GROUP);
    bed.prepare(Features::default(), calls)?;
    log!("{}/a child: {}", GROUP, bed.enter_by(How::Launch));
    let operands = Operands {
        vmcss: [(); 3].map(|()| new_region()),
        place: memory::pages(2),
    };
    for (number, vmcs) in (1..).zip(operands.vmcss) {
        vmclear(vmcs)?;
        vmptrld(vmcs)?;
        vmwrite(field::GUEST_RSP, number)?;
    }
    operands.forms()?;
    operands.regions()?;
    operands.contexts()?;
    // Further down all that matters is that the three work.
    if level < 3 {
        operands.steps()?;
        operands.interrupts()?;
    }
    operands.vmcss.into_iter().try_for_each(vmclear)?;
    for (number, vmcs) in (1..).zip(operands.vmcss) {
        log!("{}/VMCS {}: region {:#x}", GROUP, number, page_sum(vmcs));
    }
    Ok(())
}

/// The current VMCS, by what it holds.
struct Current;

impl fmt::Display for Current {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (vmptrst(), vmread(field::GUEST_RSP)) {
            (Ok(u64::MAX), _) => f.write_str("no VMCS"),
            (_, Ok(number)) => write!(f, "VMCS {number}"),
            (_, Err(error)) => write!(f, "{error}"),
        }
    }
}

impl Operands {
    /// Makes the second VMCS current, the first one the one before.
    fn warm(&self) -> Result<(), VmxError> {
        let [first, second, _] = self.vmcss;
        vmptrld(first)?;
        vmptrld(second)
    }

    /// Puts an operand of two words somewhere in the two pages.
    fn put(&self, offset: u64, words: [u64; 2]) -> u64 {
        let at = self.place + offset;
        // SAFETY: within the two pages, which are nobody else's.
        unsafe { (at as *mut [u64; 2]).write_unaligned(words) };
        at
    }

    /// The same operand in each form, and at places where it cannot be read in one piece, or not at all.
    fn forms(&self) -> Result<(), VmxError> {
        let [first, ..] = self.vmcss;
        let instructions = ["vmptrld", "vmclear", "invvpid"];
        let forms =
            forms!("vmptrld qword ptr " "vmclear qword ptr " "invvpid {kind}, xmmword ptr ");
        for (name, forms) in instructions.into_iter().zip(forms) {
            let operand = if name == "invvpid" {
                [1, 0x1000]
            } else {
                [first, 0]
            };
            for (form, execute) in forms {
                self.warm()?;
                let done = execute(FLAGS, self.put(0x40, operand), 1);
                log!("{}/{} {}: {}, {}", GROUP, name, form, done, Current);
            }
            let [(_, plain), ..] = forms;
            // At a place that is not backed stock KVM gives up, for it asks for emulation.
            for (what, place) in [
                ("at the end of a page", Ok(PAGE - 16)),
                ("across pages", Ok(PAGE - 4)),
                ("not mapped", Err(UNMAPPED)),
                ("not canonical", Err(NOT_CANONICAL)),
            ] {
                let at = place.map_or_else(|at| at, |offset| self.put(offset, operand));
                self.warm()?;
                let done = plain(FLAGS, at, 1);
                log!("{}/{} {}: {}, {}", GROUP, name, what, done, Current);
            }
        }
        Ok(())
    }

    /// What the operand of VMPTRLD and VMCLEAR names.
    fn regions(&self) -> Result<(), VmxError> {
        let [load, clear] = [
            form!("vmptrld qword ptr ", "[{base}]") as Form,
            form!("vmclear qword ptr ", "[{base}]"),
        ];
        let [first, second, third] = self.vmcss;
        let fresh = new_region();
        for (what, region) in [
            ("the one before", first),
            ("the current one", second),
            ("another", third),
            ("a fresh one", fresh),
            ("no VMCS", self.place),
            ("the VMXON region", vmxon_region()),
            ("misaligned", first | 8),
            ("beyond memory", 1 << 51),
            ("all ones", u64::MAX),
            ("not backed", UNBACKED),
        ] {
            for (name, execute) in [("vmptrld", load), ("vmclear", clear)] {
                self.warm()?;
                let done = execute(0, self.put(0, [region, 0]), 0);
                log!("{}/{} of {}: {}, {}", GROUP, name, what, done, Current);
                // And again, whatever it has come to.
                let done = execute(FLAGS, self.put(0, [region, 0]), 0);
                log!(
                    "{}/{} of {}, again: {}, {}",
                    GROUP,
                    name,
                    what,
                    done,
                    Current
                );
            }
            // What VMCLEAR has left in memory.
            vmptrld(third)?;
            log!(
                "{}/{} then: {:#x}",
                GROUP,
                what,
                if [first, second, fresh].contains(&region) {
                    vmclear(region)?;
                    page_sum(region)
                } else {
                    0
                }
            );
        }
        Ok(())
    }

    /// The types of INVVPID and what they want of a descriptor.
    fn contexts(&self) -> Result<(), VmxError> {
        let execute = form!("invvpid {kind}, xmmword ptr ", "[{base}]") as Form;
        for kind in [0, 1, 2, 3, 4, 1 << 32, u64::MAX] {
            for (what, descriptor) in [
                ("VPID 1", [1, 0x1000]),
                ("VPID 0", [0, 0x1000]),
                ("VPID 0xffff", [0xffff, 0x1000]),
                ("reserved bits", [1 << 16 | 1, 0x1000]),
                ("address not canonical", [1, NOT_CANONICAL]),
                ("high address", [1, !0xfff]),
            ] {
                self.warm()?;
                let done = execute(FLAGS, self.put(0, descriptor), kind);
                log!(
                    "{}/invvpid type {:#x}, {}: {}, {}",
                    GROUP,
                    kind,
                    what,
                    done,
                    Current
                );
            }
        }
        Ok(())
    }

    /// A trap follows each of them, and they are done before it.
    fn steps(&self) -> Result<(), VmxError> {
        let [first, ..] = self.vmcss;
        let all: [(&str, Form, [u64; 2]); 3] = [
            (
                "vmptrld",
                form!("vmptrld qword ptr ", "[{base}]"),
                [first, 0],
            ),
            (
                "vmclear",
                form!("vmclear qword ptr ", "[{base}]"),
                [first, 0],
            ),
            (
                "invvpid",
                form!("invvpid {kind}, xmmword ptr ", "[{base}]"),
                [1, 0],
            ),
        ];
        for (name, execute, operand) in all {
            for _ in 0..2 {
                self.warm()?;
                let done = execute(FLAGS | TF, self.put(0, operand), 1);
                let dr6 = cpu::dr6();
                cpu::reset_debug();
                log!(
                    "{}/{} stepped: {}, DR6 {:#x}, {}",
                    GROUP,
                    name,
                    done,
                    dr6,
                    Current
                );
            }
        }
        Ok(())
    }

    /// An interrupt waits for the instruction behind STI to end.
    fn interrupts(&self) -> Result<(), VmxError> {
        let Some(_enabled) = apic::Enabled::new() else {
            log!("{}: no x2APIC", GROUP);
            return Ok(());
        };
        let [first, ..] = self.vmcss;
        for round in 0..4 {
            self.warm()?;
            let at = self.put(0, [first, 0]);
            write(SELF_IPI, VECTOR);
            let (behind, flags): (u64, u64);
            // SAFETY: as in `form!`. The interrupt resumes behind the INC, wherever it comes.
            unsafe {
                asm!(
                    trap::guard!("sti\n", "vmptrld qword ptr [{at}]\n", "inc {behind}"),
                    "pushfq",
                    "cli",
                    "pop {flags}",
                    guard = sym trap::GUARD,
                    scratch = out(reg) _,
                    at = in(reg) at,
                    behind = inout(reg) 0u64 => behind,
                    flags = out(reg) flags,
                );
            }
            let taken = trap::guarded(());
            let word = |register: u32| read(register + VECTOR as u32 / 32);
            log!(
                "{}/behind STI {}: {}, {} instructions later, requested {:#x} in service {:#x}",
                GROUP,
                round,
                Done {
                    fault: taken,
                    flags
                },
                behind,
                word(IRR),
                word(ISR)
            );
            log!("{}/behind STI {}: {}", GROUP, round, Current);
            write(EOI, 0);
        }
        Ok(())
    }
}
