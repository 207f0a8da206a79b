// SPDX-License-Identifier: GPL-2.0-or-later
//! Entering a child on a processor that is not alone: no static is used, the stack is found by HOST_RSP, and nothing is
//! guarded.

use core::arch::global_asm;
use core::mem::offset_of;

use super::child::Registers;
use super::field;

global_asm!(
    // u64 beside_enter(rdi: launch, rsi: registers): 0 after an exit, RFLAGS with bit 63 set after a failed entry.
    ".global beside_enter",
    "beside_enter:",
    "    push rbx",
    "    push rbp",
    "    push r12",
    "    push r13",
    "    push r14",
    "    push r15",
    "    push rsi",
    "    push rsi", // room for one register of the child
    "    mov eax, {host_rsp}",
    "    vmwrite rax, rsp",
    "    mov eax, {host_rip}",
    "    lea rdx, [rip + 2f]",
    "    vmwrite rax, rdx",
    "    test rdi, rdi",
    "    mov rax, [rsi + {rax}]",
    "    mov rbx, [rsi + {rbx}]",
    "    mov rcx, [rsi + {rcx}]",
    "    mov rdx, [rsi + {rdx}]",
    "    mov rdi, [rsi + {rdi}]",
    "    mov r14, [rsi + {r8} + 48]",
    "    jnz 4f",
    "    vmresume",
    "    jmp 6f",
    "4:  vmlaunch",
    "6:  pushfq",
    "    pop rax",
    "    bts rax, 63",
    "    jmp 7f",
    "2:  mov [rsp], rsi",
    "    mov rsi, [rsp + 8]",
    "    mov [rsi + {rax}], rax",
    "    mov [rsi + {rbx}], rbx",
    "    mov [rsi + {rcx}], rcx",
    "    mov [rsi + {rdx}], rdx",
    "    mov [rsi + {rdi}], rdi",
    "    mov [rsi + {r8} + 48], r14",
    "    xor eax, eax",
    "7:  add rsp, 16",
    "    pop r15",
    "    pop r14",
    "    pop r13",
    "    pop r12",
    "    pop rbp",
    "    pop rbx",
    "    ret",
    host_rsp = const field::HOST_RSP,
    host_rip = const field::HOST_RIP,
    rax = const offset_of!(Registers, rax),
    rbx = const offset_of!(Registers, rbx),
    rcx = const offset_of!(Registers, rcx),
    rdx = const offset_of!(Registers, rdx),
    rdi = const offset_of!(Registers, rdi),
    r8 = const offset_of!(Registers, r8),
);

extern "C" {
    fn beside_enter(launch: u64, registers: *mut Registers) -> u64;
}

/// Enters the child of this processor's current VMCS until it exits. The child gets RAX to RDX, RDI and R14 alone. False if
/// the entry failed.
///
/// # Safety
/// In VMX root operation with a VMCS that has been prepared; what it makes the child do must leave the payload's own
/// memory intact.
pub unsafe fn enter(launch: bool, registers: &mut Registers) -> bool {
    // SAFETY: by the caller's promise; the assembler saves what the ABI asks for.
    unsafe { beside_enter(launch as u64, registers) == 0 }
}
