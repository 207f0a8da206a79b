// SPDX-License-Identifier: GPL-2.0-or-later
//! Instructions that leave the child: reason, qualification and the rest, once for each.

use core::arch::asm;

use super::bed::Bed;
use crate::vmx::field::*;
use crate::vmx::ops::{vmread, vmwrite, VmxError};
use crate::vmx::setup::Features;

const PIN: u32 = PIN_BASED_VM_EXEC_CONTROL;
const PROC: u32 = CPU_BASED_VM_EXEC_CONTROL;
const SECOND: u32 = SECONDARY_VM_EXEC_CONTROL;

/// A child that executes something and then makes VMCALLs.
macro_rules! program {
    ($($instruction:literal),*) => {{
        extern "C" fn program() -> ! {
            // SAFETY: the child has a stack and registers of its own, and does not come back.
            unsafe { asm!($($instruction,)* "3: vmcall", "jmp 3b", options(noreturn)) }
        }
        program as extern "C" fn() -> !
    }};
}
pub(super) use program;

/// A test: its name, bits to set in controls, and what the child does.
type Case = (&'static str, &'static [(u32, u64)], extern "C" fn() -> !);

/// The group.
pub fn run() -> Result<(), VmxError> {
    let mut bed = Bed::new("exits");
    for features in [Features::default(), bed.modern()] {
        for (name, set, program) in cases() {
            bed.prepare(features, program)?;
            for &(field, bits) in set {
                vmwrite(field, vmread(field)? | bits)?;
            }
            // Two steps: the instruction, and what comes after it has been skipped.
            for _ in 0..2 {
                let outcome = bed.enter();
                bed.log_exit(name, &outcome);
                bed.skip()?;
            }
        }
    }
    Ok(())
}

fn cases() -> [Case; 41] {
    [
        (
            "cpuid",
            &[],
            program!("xor eax, eax", "xor ecx, ecx", "cpuid"),
        ),
        ("hlt", &[(PROC, 1 << 7)], program!("hlt")),
        ("invlpg", &[(PROC, 1 << 9)], program!("invlpg [rsp]")),
        ("invlpg allowed", &[], program!("invlpg [rsp]")),
        ("rdtsc", &[(PROC, 1 << 12)], program!("rdtsc")),
        ("rdtsc allowed", &[], program!("rdtsc")),
        (
            "rdpmc",
            &[(PROC, 1 << 11)],
            program!("xor ecx, ecx", "rdpmc"),
        ),
        (
            "mov to cr3",
            &[(PROC, 1 << 15)],
            program!("mov rax, cr3", "mov cr3, rax"),
        ),
        ("mov from cr3", &[(PROC, 1 << 16)], program!("mov rbx, cr3")),
        (
            "mov to cr8",
            &[(PROC, 1 << 19)],
            program!("xor eax, eax", "mov cr8, rax"),
        ),
        ("mov from cr8", &[(PROC, 1 << 20)], program!("mov r9, cr8")),
        (
            "mov to dr7",
            &[(PROC, 1 << 23)],
            program!("mov eax, 0x400", "mov dr7, rax"),
        ),
        ("mov from dr6", &[(PROC, 1 << 23)], program!("mov rdx, dr6")),
        ("in", &[(PROC, 1 << 24)], program!("in al, 0x80")),
        (
            "out dx",
            &[(PROC, 1 << 24)],
            program!("mov edx, 0x4d10", "out dx, eax"),
        ),
        (
            "outsb",
            &[(PROC, 1 << 24)],
            program!("mov edx, 0x80", "mov rsi, rsp", "outsb"),
        ),
        (
            "rep insd",
            &[(PROC, 1 << 24)],
            program!("mov edx, 0x80", "mov rdi, rsp", "mov ecx, 1", "rep insd"),
        ),
        ("rdmsr", &[], program!("mov ecx, 0x174", "rdmsr")),
        (
            "wrmsr",
            &[],
            program!("mov ecx, 0x174", "xor eax, eax", "xor edx, edx", "wrmsr"),
        ),
        (
            "rdmsr, empty bitmap",
            &[(PROC, 1 << 28)],
            program!("mov ecx, 0x174", "rdmsr"),
        ),
        (
            "rdmsr beyond the bitmap",
            &[(PROC, 1 << 28)],
            program!("mov ecx, 0x4000", "rdmsr"),
        ),
        ("pause", &[(PROC, 1 << 30)], program!("pause")),
        (
            "monitor",
            &[(PROC, 1 << 29)],
            program!("mov rax, rsp", "xor ecx, ecx", "xor edx, edx", "monitor"),
        ),
        (
            "mwait",
            &[(PROC, 1 << 10)],
            program!("xor eax, eax", "xor ecx, ecx", "mwait"),
        ),
        ("wbinvd", &[(SECOND, 1 << 6)], program!("wbinvd")),
        ("invd", &[], program!("invd")),
        ("xsetbv", &[], program!("xor ecx, ecx", "xgetbv", "xsetbv")),
        ("sgdt", &[(SECOND, 1 << 2)], program!("sgdt [rsp - 32]")),
        ("vmxon", &[], program!("vmxon qword ptr [rsp]")),
        ("vmxoff", &[], program!("vmxoff")),
        ("vmclear", &[], program!("vmclear qword ptr [rsp + 8]")),
        ("vmptrld", &[], program!("vmptrld qword ptr [rsp + rax*2]")),
        (
            "vmread",
            &[],
            program!("mov eax, 0x681e", "vmread [rsp + 16], rax"),
        ),
        (
            "vmwrite",
            &[],
            program!("mov eax, 0x681e", "vmwrite rax, [rsp]"),
        ),
        ("vmresume", &[], program!("vmresume")),
        ("invept", &[], program!("xor eax, eax", "invept rax, [rsp]")),
        (
            "lgdt",
            &[(SECOND, 1 << 2)],
            program!("sub rsp, 32", "sgdt [rsp]", "lgdt [rsp]"),
        ),
        ("preemption timer", &[(PIN, 1 << 6)], program!("nop")),
        (
            "interrupt window",
            &[(PROC, 1 << 2), (GUEST_RFLAGS, 1 << 9)],
            program!("nop"),
        ),
        (
            "interrupt window, IF clear",
            &[(PROC, 1 << 2)],
            program!("nop"),
        ),
        (
            "monitor trap flag",
            &[(PROC, 1 << 27)],
            program!("nop", "nop"),
        ),
    ]
}
