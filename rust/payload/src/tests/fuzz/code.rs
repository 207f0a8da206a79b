// SPDX-License-Identifier: GPL-2.0-or-later
//! What the children of the programs execute: snippets, chosen at random, whose encodings mean the same in 32-bit and
//! 64-bit mode. None leaves anything behind that varies from run to run.

use protocol::ports::{NOP, TOUCH_BASE};

use super::arena::{page, Arena, CODE32, CODE64, DATA, TASK, TOUCHED};
use super::Numbers;
use crate::memory::PAGE;

/// Snippets of one child.
pub const SNIPPETS: usize = 20;
/// Bytes that a snippet may take.
const ROOM: u64 = 128;

/// MSRs that answer the same each time, and some that do not exist.
pub const MSRS: [u64; 20] = [
    0x174,
    0x175,
    0x176,
    0x277,
    0x1b,
    0x3a,
    0x480,
    0x48b,
    0xc000_0080,
    0xc000_0081,
    0xc000_0082,
    0xc000_0084,
    0xc000_0100,
    0xc000_0101,
    0xc000_0102,
    0x1fff,
    0x4000,
    0xc000_1fff,
    0xdead_beef,
    0x8b,
];

/// A child's code while it is written.
struct Writer {
    at: u64,
}

/// Registers by their number in an instruction.
const EAX: u8 = 0;
const ECX: u8 = 1;
const EDX: u8 = 2;
const EBX: u8 = 3;
const ESI: u8 = 6;
const EDI: u8 = 7;

impl Writer {
    fn bytes(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            // SAFETY: a page of the arena's; a snippet fits into its room, see `write`.
            unsafe { (self.at as *mut u8).write_volatile(byte) };
            self.at += 1;
        }
    }

    /// MOV of a constant to a register, whose upper half becomes 0.
    fn set(&mut self, register: u8, value: u64) {
        self.bytes(&[0xb8 + register]);
        self.bytes(&(value as u32).to_le_bytes());
    }
}

/// A linear address to access: data, the touch region, now and then something worse.
pub fn address(numbers: &mut Numbers, arena: &Arena) -> u64 {
    let offset = (numbers.next() >> 20) & 0xff8;
    match numbers.below(16) {
        0..6 => arena.at(page::DATA + numbers.below(4) as u64) + offset,
        6..12 => TOUCH_BASE + (numbers.below(TOUCHED as usize) as u64 + 1) * PAGE - 8 - offset,
        // Anything but page tables, for the same reason that `snippet` has for CR3.
        12 => arena.at(numbers.below(page::PML4 as usize) as u64) + offset,
        13 => TOUCH_BASE + (TOUCHED + numbers.below(8) as u64) * PAGE + offset,
        14 if offset & 8 == 0 => arena.at(page::REST) + offset,
        14 => arena.at(page::DATA + 1) - 2,
        _ => [0, 0xb800_0000, 0xfffff000, 0x3000_0000, 0x10_0000][numbers.below(5)] + offset,
    }
}

fn any(numbers: &mut Numbers, of: &[u64]) -> u64 {
    of[numbers.below(of.len())]
}

/// Toggles bits of a control register.
fn toggle(code: &mut Writer, register: u8, bits: u64) {
    code.bytes(&[0x0f, 0x20, 0xc0 | register << 3]); // mov eax, crN
    code.bytes(&[0x35]); // xor eax, ...
    code.bytes(&(bits as u32).to_le_bytes());
    code.bytes(&[0x0f, 0x22, 0xc0 | register << 3]);
}

/// Writes the code of a child to `start`, gives where its snippets begin. Behind the last one is a loop of VMCALLs.
pub fn write(numbers: &mut Numbers, arena: &Arena, start: u64) -> [u64; SNIPPETS] {
    let mut starts = [0; SNIPPETS];
    let mut code = Writer { at: start };
    for slot in &mut starts {
        *slot = code.at;
        let end = code.at + ROOM;
        snippet(numbers, arena, &mut code);
        assert!(
            code.at <= end,
            "a snippet of {} bytes",
            code.at + ROOM - end
        );
    }
    code.bytes(&[0x0f, 0x01, 0xc1, 0xeb, 0xfb]); // vmcall; jmp
    starts
}

fn snippet(numbers: &mut Numbers, arena: &Arena, code: &mut Writer) {
    match numbers.below(44) {
        0 => {
            code.set(EAX, any(numbers, &[0, 1, 7, 0xd, 0x8000_0008, 0x4000_0000]));
            code.set(ECX, numbers.below(3) as u64);
            code.bytes(&[0x0f, 0xa2]); // cpuid
        }
        1 | 2 => {
            code.set(EAX, numbers.next());
            code.bytes(&[0x0f, 0x01, 0xc1]); // vmcall
        }
        3 => code.bytes(&[0xf4]), // hlt
        4 | 5 => {
            code.set(ECX, any(numbers, &MSRS));
            code.bytes(&[0x0f, 0x32]); // rdmsr
        }
        6 | 7 => {
            code.set(ECX, any(numbers, &MSRS));
            code.set(
                EAX,
                any(numbers, &[0, 1, 0x10, 0x500, 0x0007_0406, 0x0700_0406]),
            );
            code.set(EDX, any(numbers, &[0, 0, 0x0007_0406, 0x8000_0000]));
            code.bytes(&[0x0f, 0x30]); // wrmsr
        }
        8 => {
            code.set(EDX, any(numbers, &[NOP as u64, 0x80, 0x4d30, 0xfffe]));
            code.set(EAX, numbers.next());
            code.bytes(match numbers.below(4) {
                0 => &[0xec],       // in al, dx
                1 => &[0xed],       // in eax, dx
                2 => &[0xee],       // out dx, al
                _ => &[0x66, 0xef], // out dx, ax
            });
        }
        9 => {
            code.set(EDX, any(numbers, &[0x80, 0x4d30]));
            // Not repeated: a child that comes here another way may have any count, and KVM asks the VMM for each.
            code.set(ECX, 1 + numbers.below(3) as u64);
            let memory = address(numbers, arena);
            code.set(ESI, memory);
            code.set(EDI, memory);
            code.bytes(match numbers.below(4) {
                0 => &[0x6e], // outsb
                1 => &[0x6f], // outsd
                2 => &[0x6c], // insb
                _ => &[0x6d], // insd
            });
        }
        10 => toggle(
            code,
            0,
            any(numbers, &[2, 8, 1 << 16, 1 << 18, 10, 1, 1 << 31]),
        ),
        11 => {
            let bits = [4, 8, 0x80, 0x400, 1 << 20, 1 << 13, 1 << 18, 1 << 31];
            toggle(code, 4, any(numbers, &bits));
        }
        12 => {
            // Only ever one of the arena's tables: KVM loops with page tables where no memory is.
            let tables = [page::PML4, page::PAE, page::PD32];
            code.bytes(&[0x0f, 0x20, 0xd9]); // mov ecx, cr3
            let flags = any(numbers, &[0, 8, 0x18]);
            code.set(EAX, arena.at(any(numbers, &tables)) | flags);
            code.bytes(&[0x0f, 0x22, 0xd8]); // mov cr3, eax
        }
        13 => code.bytes(&[0x0f, 0x06]), // clts
        14 => {
            code.set(EAX, any(numbers, &[1, 3, 9, 0xb, 0xf]));
            code.bytes(&[0x0f, 0x01, 0xf0]); // lmsw ax
        }
        15 => code.bytes(&[0x0f, 0x01, 0xe0, 0x0f, 0x20, 0xd1]), // smsw eax; mov ecx, cr2
        16 => {
            code.set(
                EAX,
                any(numbers, &[0x400, 0x400, 0x700, 0x2400, 0x1_0000_0400]),
            );
            code.bytes(&[0x0f, 0x23, 0xf8]); // mov dr7, eax
            code.bytes(&[0x0f, 0x21, 0xfa]); // mov edx, dr7
        }
        17 => code.bytes(&[0x0f, 0x21, 0xf3]), // mov ebx, dr6
        18 => code.bytes(&[0xcc]),             // int3
        19 => code.bytes(&[0xcd, any(numbers, &[0x20, 0x2f, 0x3f, 0x80, 3, 1]) as u8]), // int n
        20 => code.bytes(&[0x0f, 0x0b]),       // ud2
        21 => {
            // pushf; xor [esp], ...; popf
            code.bytes(&[0x9c, 0x81, 0x34, 0x24]);
            let bits = [0x100, 0x200, 0x200, 0x4_0000, 0x1_0000, 0x20_0000, 1];
            code.bytes(&(any(numbers, &bits) as u32).to_le_bytes());
            code.bytes(&[0x9d]);
        }
        22 => code.bytes(&[0xfb]),       // sti
        23 => code.bytes(&[0xfa]),       // cli
        24 => code.bytes(&[0x0f, 0x31]), // rdtsc
        25 => {
            code.set(EAX, address(numbers, arena));
            code.bytes(&[0x0f, 0x01, 0x38]); // invlpg [eax]
        }
        26 => code.bytes(&[0xf3, 0x90]), // pause
        27 => code.bytes(match numbers.below(2) {
            0 => &[0x0f, 0x09], // wbinvd
            _ => &[0x0f, 0x08], // invd
        }),
        28 => {
            // Not XINUSE (1): whether the x87 is in use changes when L0 saves and restores its state.
            code.set(ECX, any(numbers, &[0, 0, 2, 0x4d]));
            code.bytes(&[0x0f, 0x01, 0xd0]); // xgetbv
            code.set(EAX, any(numbers, &[1, 3, 7, 0, 4]));
            code.set(EDX, any(numbers, &[0, 0, 1]));
            code.bytes(&[0x0f, 0x01, 0xd1]); // xsetbv
        }
        29 => {
            code.set(EAX, arena.at(page::DATA));
            code.set(ECX, 0);
            code.set(EDX, 0);
            // monitor; mwait
            code.bytes(&[0x0f, 0x01, 0xc8, 0x31, 0xc0, 0x0f, 0x01, 0xc9]);
        }
        30 => {
            code.set(ECX, any(numbers, &[0, 0xffff]));
            code.bytes(&[0x0f, 0x33]); // rdpmc
        }
        31 | 32 => {
            // A VMX instruction, with its operand in memory or in a register.
            let field = any(numbers, &super::fields::OF_CHILDREN);
            code.set(ECX, field);
            code.set(EDX, numbers.next());
            code.set(EAX, address(numbers, arena));
            code.bytes(match numbers.below(14) {
                0..3 => &[0x0f, 0x78, 0xca],           // vmread edx, ecx
                3..5 => &[0x0f, 0x79, 0xca],           // vmwrite ecx, edx
                5 => &[0x0f, 0x78, 0x08],              // vmread [eax], ecx
                6 => &[0x0f, 0x79, 0x08],              // vmwrite ecx, [eax]
                7 => &[0x0f, 0xc7, 0x30],              // vmptrld [eax]
                8 => &[0x66, 0x0f, 0xc7, 0x30],        // vmclear [eax]
                9 => &[0xf3, 0x0f, 0xc7, 0x30],        // vmxon [eax]
                10 => &[0x0f, 0x01, 0xc4],             // vmxoff
                11 => &[0x0f, 0x01, 0xc3],             // vmresume
                12 => &[0x66, 0x0f, 0x38, 0x80, 0x08], // invept ecx, [eax]
                _ => &[0x0f, 0xc7, 0x38],              // vmptrst [eax]
            });
        }
        33 => {
            code.set(EAX, arena.at(page::DATA + 3) + 0x800);
            code.bytes(match numbers.below(4) {
                0 => &[0x0f, 0x01, 0x00],                   // sgdt [eax]
                1 => &[0x0f, 0x01, 0x08],                   // sidt [eax]
                2 => &[0x0f, 0x01, 0x00, 0x0f, 0x01, 0x10], // sgdt, lgdt
                _ => &[0x0f, 0x01, 0x08, 0x0f, 0x01, 0x18], // sidt, lidt
            });
        }
        34 => {
            code.set(EAX, any(numbers, &[0, TASK, 0x28, DATA]));
            code.bytes(match numbers.below(4) {
                0 => &[0x0f, 0x00, 0xc1], // sldt ecx
                1 => &[0x0f, 0x00, 0xc9], // str ecx
                2 => &[0x0f, 0x00, 0xd0], // lldt ax
                _ => &[0x0f, 0x00, 0xd8], // ltr ax
            });
        }
        35 => {
            code.set(
                EAX,
                any(numbers, &[0, DATA, DATA, CODE32, CODE64, TASK, 0x43]),
            );
            // mov es/ss/ds/fs/gs, ax
            code.bytes(&[0x8e, any(numbers, &[0xc0, 0xd8, 0xe0, 0xe8]) as u8]);
        }
        36 => {
            code.set(EAX, DATA);
            code.bytes(&[0x8e, 0xd0]); // mov ss, ax
        }
        37..40 => {
            code.set(EAX, address(numbers, arena));
            code.set(EBX, numbers.next());
            for _ in 0..1 + numbers.below(3) {
                code.bytes(match numbers.below(4) {
                    0 | 1 => &[0x89, 0x18], // mov [eax], ebx
                    2 => &[0x8b, 0x18],     // mov ebx, [eax]
                    _ => &[0x01, 0x18],     // add [eax], ebx
                });
                code.bytes(&[0x81, 0xc0]); // add eax, ...
                code.bytes(&(any(numbers, &[0x1000, 0x1000, 8, 0x3ff8]) as u32).to_le_bytes());
            }
        }
        40 => {
            // A bad address in 64-bit mode: shl rax, 32 (there a DEC in 32-bit mode).
            code.set(EAX, any(numbers, &[0x8000_0000, 0x100, 1]));
            code.bytes(&[0x48, 0xc1, 0xe0, 0x20, 0x8b, 0x18]);
        }
        41 => {
            // To memory that holds HLT, if nobody has written to it. Not to the page of APIC accesses, from which the
            // emulator cannot fetch.
            let to = arena.at(page::DATA + numbers.below(4) as u64) + numbers.below(4096) as u64;
            code.set(EAX, to);
            code.bytes(&[0xff, 0xd0]); // call eax
        }
        42 => code.bytes(match numbers.below(4) {
            0 => &[0xf1],                   // int1
            1 => &[0x31, 0xc9, 0xf7, 0xf1], // div by 0
            2 => &[0x0f, 0x77],             // emms
            _ => &[0x0f, 0xaa],             // rsm
        }),
        _ => code.bytes(&[0x90, 0x90, 0x40, 0x90]), // nops, in 32-bit mode an INC
    }
}
