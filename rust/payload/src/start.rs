// SPDX-License-Identifier: GPL-2.0-or-later
//! From the VMM's 64-bit entry to Rust: a stack, and SSE, which the compiler uses for copies.

use core::arch::global_asm;

/// Bytes of the stack, one for each processor, that everything but the child and the trap handler runs on.
const STACK: usize = 64 * 1024;

global_asm!(
    ".section .text.start, \"ax\"",
    ".global _start",
    "_start:",
    "    cli",
    "    cld",
    "    lea rsp, [rip + boot_stack + {stack}]",
    "    mov eax, esi",
    "    imul rax, rax, {stack}",
    "    add rsp, rax",
    "    mov rax, cr0",
    "    and eax, ~(1 << 2 | 1 << 3)", // EM, TS
    "    or eax, 1 << 1 | 1 << 5 | 1 << 16", // MP, NE, WP
    "    mov cr0, rax",
    "    mov rax, cr4",
    "    or eax, 1 << 9 | 1 << 10", // OSFXSR, OSXMMEXCPT
    "    mov cr4, rax",
    "    xor ebp, ebp",
    "    test esi, esi",
    "    jnz 3f",
    "    call {main}",
    "    ud2",
    "3:  mov edi, esi",
    "    call {second}",
    "    ud2",
    ".section .bss.boot_stack, \"aw\", @nobits",
    ".align 16",
    ".global boot_stack",
    "boot_stack:",
    "    .skip {stack} * {cpus}",
    ".text",
    stack = const STACK,
    cpus = const crate::second::MOST,
    main = sym crate::payload_main,
    second = sym crate::second::main,
);

extern "C" {
    static boot_stack: u8;
}

/// Is that address on one of the payload's own stacks, rather than on its child's?
pub fn on_stack(address: u64) -> bool {
    let bottom = &raw const boot_stack as u64;
    (bottom..=bottom + (crate::second::MOST * STACK) as u64).contains(&address)
}
