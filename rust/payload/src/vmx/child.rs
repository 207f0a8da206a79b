// SPDX-License-Identifier: GPL-2.0-or-later
//! Entering the child and coming back.

use core::arch::global_asm;
use core::mem::offset_of;

use super::field;
use super::ops::{self, VmxError};
use crate::trap;

/// General registers of the child; RSP lives in the VMCS.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Registers {
    /// RAX.
    pub rax: u64,
    /// RBX.
    pub rbx: u64,
    /// RCX.
    pub rcx: u64,
    /// RDX.
    pub rdx: u64,
    /// RBP.
    pub rbp: u64,
    /// RSI.
    pub rsi: u64,
    /// RDI.
    pub rdi: u64,
    /// R8 to R15.
    pub r8: [u64; 8],
}

global_asm!(
    // u64 child_enter(rdi: launch, rsi: registers, rdx: write the host fields, rcx: how)
    // Returns 0 after an exit, else RFLAGS with bit 63 set after a failed entry; bit 62 after a fault.
    ".global child_enter",
    "child_enter:",
    "    push rbx",
    "    push rbp",
    "    push r12",
    "    push r13",
    "    push r14",
    "    push r15",
    "    push rsi",
    "    push rsi", // room for one register of the child
    "    mov [rip + child_stack], rsp",
    "    test rdx, rdx",
    "    jz 3f",
    "    mov eax, {host_rsp}",
    "    lea rdx, [rip + child_exit_stack]",
    "    vmwrite rax, rdx",
    "    mov eax, {host_rip}",
    "    lea rdx, [rip + child_exit]",
    "    vmwrite rax, rdx",
    "3:",
    "    mov [rip + child_how], rcx",
    "    test rdi, rdi",
    "    mov rax, [rsi + {rax}]",
    "    mov rbx, [rsi + {rbx}]",
    "    mov rcx, [rsi + {rcx}]",
    "    mov rdx, [rsi + {rdx}]",
    "    mov rbp, [rsi + {rbp}]",
    "    mov rdi, [rsi + {rdi}]",
    "    mov r8, [rsi + {r8}]",
    "    mov r9, [rsi + {r8} + 8]",
    "    mov r10, [rsi + {r8} + 16]",
    "    mov r11, [rsi + {r8} + 24]",
    "    mov r12, [rsi + {r8} + 32]",
    "    mov r13, [rsi + {r8} + 40]",
    "    mov r14, [rsi + {r8} + 48]",
    "    mov r15, [rsi + {r8} + 56]",
    "    mov rsi, [rsi + {rsi}]",
    "    jnz 4f",
    // With MOV SS blocking, an entry must fail in its own way; only a test asks for that.
    "    cmp qword ptr [rip + child_how], 0",
    "    jne 5f",
    "    vmresume",
    "    jmp 6f",
    "5:  push rax",
    "    mov ax, ss",
    "    mov ss, ax",
    "    vmresume",
    "    lea rsp, [rsp + 8]",
    "    jmp 6f",
    "4:  vmlaunch",
    "6:  pushfq",
    "    pop rax",
    "    bts rax, 63",
    "    jmp 7f",
    ".global child_fault",
    "child_fault:",
    "    mov eax, 1",
    "    shl rax, 62",
    "    jmp 7f",
    ".global child_exit",
    "child_exit:",
    "    mov rsp, [rip + child_stack]",
    "    mov [rsp], rsi",
    "    mov rsi, [rsp + 8]",
    "    mov [rsi + {rax}], rax",
    "    mov [rsi + {rbx}], rbx",
    "    mov [rsi + {rcx}], rcx",
    "    mov [rsi + {rdx}], rdx",
    "    mov [rsi + {rbp}], rbp",
    "    mov [rsi + {rdi}], rdi",
    "    mov [rsi + {r8}], r8",
    "    mov [rsi + {r8} + 8], r9",
    "    mov [rsi + {r8} + 16], r10",
    "    mov [rsi + {r8} + 24], r11",
    "    mov [rsi + {r8} + 32], r12",
    "    mov [rsi + {r8} + 40], r13",
    "    mov [rsi + {r8} + 48], r14",
    "    mov [rsi + {r8} + 56], r15",
    "    mov rax, [rsp]",
    "    mov [rsi + {rsi}], rax",
    "    xor eax, eax",
    "7:",
    "    mov rsp, [rip + child_stack]",
    "    add rsp, 16",
    "    pop r15",
    "    pop r14",
    "    pop r13",
    "    pop r12",
    "    pop rbp",
    "    pop rbx",
    "    ret",
    ".section .bss.child, \"aw\", @nobits",
    ".align 16",
    "child_stack: .skip 8",
    "child_how: .skip 8",
    // What HOST_RSP names. Nothing is pushed there: child_exit sets the real stack first.
    "    .skip 48",
    ".global child_exit_stack",
    "child_exit_stack:",
    "    .skip 16",
    ".text",
    host_rsp = const field::HOST_RSP,
    host_rip = const field::HOST_RIP,
    rax = const offset_of!(Registers, rax),
    rbx = const offset_of!(Registers, rbx),
    rcx = const offset_of!(Registers, rcx),
    rdx = const offset_of!(Registers, rdx),
    rbp = const offset_of!(Registers, rbp),
    rsi = const offset_of!(Registers, rsi),
    rdi = const offset_of!(Registers, rdi),
    r8 = const offset_of!(Registers, r8),
);

extern "C" {
    fn child_enter(launch: u64, registers: *mut Registers, write_host: u64, how: u64) -> u64;
    static child_exit: u8;
    static child_fault: u8;
    static child_exit_stack: u8;
}

/// What HOST_RIP must hold.
pub fn host_rip() -> u64 {
    &raw const child_exit as u64
}

/// What HOST_RSP may hold: the stack is found elsewhere.
pub fn host_rsp() -> u64 {
    &raw const child_exit_stack as u64
}

/// Which instruction enters.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// VMLAUNCH.
    Launch,
    /// VMRESUME.
    Resume,
    /// VMRESUME right behind a MOV to SS.
    ResumeBehindMovSs,
}

/// Enters the child of the current VMCS, until it exits.
///
/// # Safety
/// What the VMCS makes the child do must leave the payload's own memory intact, and HOST_RIP must be
/// [`host_rip`].
pub unsafe fn enter(how: How, registers: &mut Registers) -> Result<(), VmxError> {
    trap::arm(&raw const child_fault as u64);
    // SAFETY: by the caller's promise; the assembler saves what the ABI asks for.
    let flags = unsafe {
        child_enter(
            (how == How::Launch) as u64,
            registers,
            0,
            (how == How::ResumeBehindMovSs) as u64,
        )
    };
    trap::guarded(())?;
    if flags == 0 {
        Ok(())
    } else {
        ops::outcome(flags & 1 != 0, flags & 1 << 6 != 0)
    }
}

/// VMRESUME for measured loops: no guard, no check. With `write_host` HOST_RSP and HOST_RIP are
/// written first, which changes nothing but costs what it costs.
///
/// # Safety
/// As [`enter`], and the VMCS must have been entered successfully in this state before.
#[inline(always)]
pub unsafe fn resume(registers: &mut Registers, write_host: bool) -> u64 {
    // SAFETY: by the caller's promise.
    unsafe { child_enter(0, registers, write_host as u64, 0) }
}
