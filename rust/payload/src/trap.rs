// SPDX-License-Identifier: GPL-2.0-or-later
//! GDT, TSS and IDT of our own, and catching faults of single instructions.
//!
//! Many tests execute an instruction that may fault. Such an instruction sits between [`guard!`]'s note
//! of where to go on and [`guarded`], which says whether it came to that. Any other exception ends the
//! payload with a message.

use core::arch::{asm, global_asm};
use core::mem::size_of;

use crate::control::{self, Exit};
use crate::error;
use crate::second::MOST;

/// Selector of the 64-bit code segment.
pub const CODE: u16 = 0x08;
/// Selector of the data segment.
pub const DATA: u16 = 0x10;
/// Selector of the task state segment.
pub const TSS: u16 = 0x18;
/// RFLAGS: a trap behind each instruction.
const TF: u64 = 1 << 8;
/// #UD.
pub const UD: u64 = 6;
/// #GP.
pub const GP: u64 = 13;
/// Exceptions defined by the architecture.
const VECTORS: usize = 32;

/// An exception that was expected and caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Its vector.
    pub vector: u64,
    /// Its error code, 0 if it has none.
    pub error: u64,
}

impl core::fmt::Display for Fault {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.vector {
            UD => f.write_str("#UD"),
            GP => write!(f, "#GP({:#x})", self.error),
            _ => write!(f, "exception {} ({:#x})", self.vector, self.error),
        }
    }
}

/// Where a guarded instruction resumes (0: none is executing), and what it did.
#[repr(C)]
pub struct Guard {
    resume: u64,
    vector: u64,
    error: u64,
}

/// The one guard: a single CPU, no interrupts, and guarded instructions do not nest.
pub static mut GUARD: Guard = Guard {
    resume: 0,
    vector: 0,
    error: 0,
};

/// Assembler text for one guarded instruction. Needs the operands `guard = sym trap::GUARD` and a
/// `scratch` register, and [`guarded`] behind it.
macro_rules! guard {
    ($($instruction:tt)*) => {
        concat!(
            "lea {scratch}, [rip + 2f]\n",
            "mov [rip + {guard}], {scratch}\n",
            $($instruction)*,
            "\n2:"
        )
    };
}
pub(crate) use guard;

/// Tells whether the guarded instruction before it faulted.
pub fn guarded<T>(value: T) -> Result<T, Fault> {
    let guard = &raw mut GUARD;
    // SAFETY: only the trap handler also writes GUARD, and only between `guard!` and here.
    unsafe {
        let caught = (*guard).resume == 0;
        (*guard).resume = 0;
        if caught {
            Err(Fault {
                vector: (*guard).vector,
                error: (*guard).error,
            })
        } else {
            Ok(value)
        }
    }
}

/// Arms the guard from Rust, for code that has its own resume point.
pub fn arm(resume: u64) {
    let guard = &raw mut GUARD;
    // SAFETY: as in `guarded`.
    unsafe { (*guard).resume = resume };
}

/// What the common entry leaves on the stack, lowest address first.
#[repr(C)]
struct Frame {
    registers: [u64; 15],
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

extern "C" fn trap_handler(frame: &mut Frame) {
    let guard = &raw mut GUARD;
    // The guard of a VM entry stays armed while the child runs, and the child's faults are not the entry's.
    let own = crate::start::on_stack(frame.rsp);
    // SAFETY: interrupts are off and the interrupted code is stopped inside the guarded region, if any.
    let resume = unsafe {
        let resume = if own { (*guard).resume } else { 0 };
        if resume != 0 {
            *guard = Guard {
                resume: 0,
                vector: frame.vector,
                error: frame.error,
            };
        }
        resume
    };
    if resume != 0 {
        frame.rip = resume;
        // A trap behind one instruction, not behind each from here on.
        frame.rflags &= !TF;
        return;
    }
    error!(
        "exception {} error {:#x} at {:#x} cr2 {:#x} rsp {:#x}{}",
        frame.vector,
        frame.error,
        frame.rip,
        crate::cpu::cr2(),
        frame.rsp,
        if own { "" } else { " in the child" }
    );
    control::done(Exit::Fault)
}

global_asm!(
    ".global trap_stubs",
    ".balign 16",
    "trap_stubs:",
    ".set vector, 0",
    ".rept {vectors}",
    "    .balign 16",
    // #DF, #TS, #NP, #SS, #GP, #PF, #AC, #CP, #VC and #SX push an error code.
    "    .if !((0x60227d00 >> vector) & 1)",
    "        push 0",
    "    .endif",
    "    push vector",
    "    jmp trap_common",
    "    .set vector, vector + 1",
    ".endr",
    "trap_common:",
    "    push r15",
    "    push r14",
    "    push r13",
    "    push r12",
    "    push r11",
    "    push r10",
    "    push r9",
    "    push r8",
    "    push rbp",
    "    push rdi",
    "    push rsi",
    "    push rdx",
    "    push rcx",
    "    push rbx",
    "    push rax",
    "    mov rdi, rsp",
    "    mov rbx, rsp",
    "    sub rsp, 512",
    "    and rsp, -16",
    "    fxsave64 [rsp]",
    "    cld",
    "    call {handler}",
    "    fxrstor64 [rsp]",
    "    mov rsp, rbx",
    "    pop rax",
    "    pop rbx",
    "    pop rcx",
    "    pop rdx",
    "    pop rsi",
    "    pop rdi",
    "    pop rbp",
    "    pop r8",
    "    pop r9",
    "    pop r10",
    "    pop r11",
    "    pop r12",
    "    pop r13",
    "    pop r14",
    "    pop r15",
    "    add rsp, 16",
    "    iretq",
    vectors = const VECTORS,
    handler = sym trap_handler,
);

extern "C" {
    static trap_stubs: [[u8; 16]; VECTORS];
}

/// Task state segment (SDM 8.7): only there because VMX wants a busy one.
#[repr(C, align(16))]
struct Tss([u32; 26]);

#[repr(C, align(16))]
struct Gdt([u64; 3 + 2 * MOST]);

#[repr(C, align(16))]
struct Idt([[u64; 2]; VECTORS]);

#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

static mut TASKS: [Tss; MOST] = [const { Tss([0; 26]) }; MOST];
static mut GDT: Gdt = {
    let mut gdt = [0; 3 + 2 * MOST];
    gdt[1] = 0x00af_9b00_0000_ffff;
    gdt[2] = 0x00cf_9300_0000_ffff;
    Gdt(gdt)
};
static mut IDT: Idt = Idt([[0; 2]; VECTORS]);

/// Address of the GDT.
pub fn gdt_base() -> u64 {
    &raw const GDT as u64
}

/// Address of the IDT.
pub fn idt_base() -> u64 {
    &raw const IDT as u64
}

/// Address of the task state segment.
pub fn tss_base() -> u64 {
    &raw const TASKS as u64
}

/// Makes the tables and installs them on the first processor.
pub fn init() {
    let limit = (size_of::<Tss>() - 1) as u64;
    let (gdt, idt) = (&raw mut GDT, &raw mut IDT);
    // SAFETY: single-threaded start-up; the statics are not otherwise borrowed.
    unsafe {
        for cpu in 0..MOST {
            let tss = tss_base() + (cpu * size_of::<Tss>()) as u64;
            (*gdt).0[3 + 2 * cpu] =
                limit | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24 & 0xff) << 56;
            (*gdt).0[4 + 2 * cpu] = tss >> 32;
        }
        for (vector, gate) in (*idt).0.iter_mut().enumerate() {
            let stub = &raw const trap_stubs[vector] as u64;
            *gate = [
                stub & 0xffff | (CODE as u64) << 16 | 0x8e00 << 32 | (stub >> 16 & 0xffff) << 48,
                stub >> 32,
            ];
        }
    }
    load(TSS);
}

/// Installs the tables on another processor.
pub fn init_other(number: usize) {
    load(TSS + 16 * number as u16);
}

fn load(task: u16) {
    let gdtr = Pointer {
        limit: (size_of::<Gdt>() - 1) as u16,
        base: gdt_base(),
    };
    let idtr = Pointer {
        limit: (size_of::<Idt>() - 1) as u16,
        base: idt_base(),
    };
    // SAFETY: the selectors loaded are those of `init`'s table: flat code and data, and a TSS that is
    // available, since each processor has its own.
    unsafe {
        asm!(
            "lgdt [{gdtr}]",
            "lidt [{idtr}]",
            "push {code}",
            "lea {scratch}, [rip + 2f]",
            "push {scratch}",
            "retfq",
            "2:",
            "mov ds, {data:e}",
            "mov es, {data:e}",
            "mov fs, {data:e}",
            "mov gs, {data:e}",
            "mov ss, {data:e}",
            "ltr {tss:x}",
            gdtr = in(reg) &gdtr,
            idtr = in(reg) &idtr,
            code = const CODE,
            data = in(reg) DATA as u64,
            tss = in(reg) task as u64,
            scratch = out(reg) _,
        );
    }
}
