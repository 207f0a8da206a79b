// SPDX-License-Identifier: GPL-2.0-or-later
//! A child that is a hypervisor in little: it executes a list of VMREADs and VMWRITEs, in every form of
//! operands, and notes what each of them did. Its parent has VMCS shadowing on for it, so some of them
//! reach a shadow VMCS and others leave the child.

use core::arch::global_asm;
use core::mem::offset_of;

use super::bed::Bed;
use super::log;
use super::model::fold;
use crate::cpu;
use crate::memory::{self, PAGE};
use crate::vmx::field::*;
use crate::vmx::ops::{vmptrld, vmread, vmwrite, VmxError};
use crate::vmx::setup::Features;

/// Secondary control: VMCS shadowing.
pub const VMCS_SHADOWING: u64 = 1 << 14;
/// In a revision identifier: a shadow VMCS.
const SHADOW: u32 = 1 << 31;
/// Exit reasons.
const VMREAD: u64 = 23;
const VMWRITE: u64 = 25;

/// VM-exit instruction information: the operand is a register (SDM table 29-14) ...
const INFO_REGISTER: u64 = 1 << 10;
/// ... and then these bits name it and the register with the encoding.
const INFO_OF_REGISTER: u64 = 0xf << 3 | INFO_REGISTER | 0xf << 28;

/// What an entry of the list does.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Form {
    /// VMCALL: the list ends.
    End,
    /// VMREAD to a register.
    Read,
    /// VMWRITE from a register.
    Write,
    /// VMREAD to memory.
    ReadMemory,
    /// VMWRITE from memory.
    WriteMemory,
    /// VMREAD with other registers.
    ReadHigh,
    /// VMWRITE with other registers.
    WriteHigh,
    /// VMREAD to memory by base, index and displacement.
    ReadIndexed,
    /// VMWRITE from memory by base, index and displacement.
    WriteIndexed,
    /// Store a byte at the address `field`: no VMX instruction.
    Poke,
    /// VMREAD to the address in `value`.
    ReadTo,
    /// VMWRITE from the address in `value`.
    WriteFrom,
    /// OUT to a port of the payload's VMM, which may save the machine then: no VMX instruction.
    Out,
}

/// One step of the child.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Step {
    /// The field's encoding.
    pub field: u64,
    /// What is written; what was read.
    pub value: u64,
    form: u64,
    /// CF, PF, AF, ZF, SF and OF afterwards; all were set before.
    pub flags: u64,
    /// The instruction left the child.
    pub left: u64,
}

/// The arithmetic flags.
pub const FLAGS: u64 = 0x8d5;

global_asm!(
    ".global script_child_code",
    "script_child_code:",
    "    mov rax, [rdi + {form}]",
    "    mov rcx, [rdi + {field}]",
    "    mov rdx, [rdi + {value}]",
    "    xor r9d, r9d",
    "    lea rbx, [rdi - 0x40]",
    "    mov esi, ({value} + 0x30) / 4",
    "    mov r10, rcx",
    "    mov r15, rdx",
    "    lea r11, [rip + 20f]",
    "    movsxd rax, dword ptr [r11 + rax * 4]",
    "    add r11, rax",
    "    push 0x8d7",
    "    popfq",
    "    jmp r11",
    "10: vmcall",
    "    jmp script_child_code",
    "11: vmread rdx, rcx",
    "    jmp 30f",
    "12: vmwrite rcx, rdx",
    "    jmp 30f",
    "13: vmread [rdi + {value}], rcx",
    "    mov rdx, [rdi + {value}]",
    "    jmp 30f",
    "14: vmwrite rcx, [rdi + {value}]",
    "    jmp 30f",
    "15: vmread r15, r10",
    "    mov rdx, r15",
    "    jmp 30f",
    "16: vmwrite r10, r15",
    "    jmp 30f",
    "17: vmread [rbx + rsi * 4 + 0x10], r10",
    "    mov rdx, [rdi + {value}]",
    "    jmp 30f",
    "18: vmwrite r10, [rbx + rsi * 4 + 0x10]",
    "    jmp 30f",
    "19: mov [rcx], dl",
    "    jmp 30f",
    "21: vmread [rdx], rcx",
    "    jmp 30f",
    "22: vmwrite rcx, [rdx]",
    "    jmp 30f",
    "23: mov r15, rdx",
    "    mov edx, {nop}",
    "    out dx, eax",
    "    mov rdx, r15",
    "30: pushfq",
    "    pop qword ptr [rdi + {flags}]",
    "    mov [rdi + {value}], rdx",
    "    mov [rdi + {left}], r9",
    "    lea rdi, [rdi + {step}]",
    "    jmp script_child_code",
    ".balign 4",
    "20: .long 10b - 20b, 11b - 20b, 12b - 20b, 13b - 20b, 14b - 20b, 15b - 20b",
    "    .long 16b - 20b, 17b - 20b, 18b - 20b, 19b - 20b, 21b - 20b, 22b - 20b, 23b - 20b",
    form = const offset_of!(Step, form),
    field = const offset_of!(Step, field),
    value = const offset_of!(Step, value),
    flags = const offset_of!(Step, flags),
    left = const offset_of!(Step, left),
    step = const size_of::<Step>(),
    nop = const protocol::ports::NOP,
);

extern "C" {
    fn script_child_code() -> !;
}

extern "C" fn script_child() -> ! {
    // SAFETY: the child's own code; the list that RDI names is the parent's, who waits.
    unsafe { script_child_code() }
}

// SAFETY: five integers.
unsafe impl memory::Plain for Step {}

/// A child with a list, and the bitmaps that its parent has for it.
pub struct Scripted {
    /// The child.
    pub bed: Bed,
    /// VMREAD bitmap: a set bit makes the instruction leave.
    pub read_bitmap: u64,
    /// VMWRITE bitmap.
    pub write_bitmap: u64,
    steps: &'static mut [Step],
    used: usize,
    /// Sum of what the exits said.
    pub exits: u64,
    /// Exits of the last run.
    pub count: u64,
}

impl Scripted {
    /// One with room for `room` steps. Its VMCS has yet to be prepared.
    pub fn new(group: &'static str, room: usize) -> Scripted {
        Scripted {
            bed: Bed::new(group),
            read_bitmap: memory::pages(1),
            write_bitmap: memory::pages(1),
            steps: memory::slice(room + 1),
            used: 0,
            exits: 0,
            count: 0,
        }
    }

    /// A fresh VMCS with VMCS shadowing, which becomes current.
    pub fn prepare(&mut self, modern: bool, link: u64) -> Result<(), VmxError> {
        let features = if modern {
            self.bed.modern()
        } else {
            Features::default()
        };
        self.bed.prepare(features, script_child)?;
        vmwrite(
            SECONDARY_VM_EXEC_CONTROL,
            vmread(SECONDARY_VM_EXEC_CONTROL)? | VMCS_SHADOWING,
        )?;
        vmwrite(VMREAD_BITMAP, self.read_bitmap)?;
        vmwrite(VMWRITE_BITMAP, self.write_bitmap)?;
        vmwrite(VMCS_LINK_POINTER, link)
    }

    /// Makes every bit of both bitmaps that.
    pub fn fill(&self, reads: bool, writes: bool) {
        for (page, ones) in [(self.read_bitmap, reads), (self.write_bitmap, writes)] {
            // SAFETY: pages of ours that only the processor reads.
            unsafe {
                core::ptr::write_bytes(page as *mut u8, if ones { 0xff } else { 0 }, PAGE as usize)
            };
        }
    }

    /// Sets or clears one bit of a bitmap.
    pub fn bit(bitmap: u64, encoding: u64, set: bool) {
        let byte = (bitmap + (encoding & 0x7fff) / 8) as *mut u8;
        // SAFETY: within the bitmap's page.
        unsafe {
            let value = byte.read_volatile();
            let bit = 1 << (encoding & 7);
            byte.write_volatile(if set { value | bit } else { value & !bit });
        }
    }

    /// Forgets the list.
    pub fn clear(&mut self) {
        self.used = 0;
    }

    /// Appends a step.
    pub fn push(&mut self, form: Form, field: u64, value: u64) {
        self.steps[self.used] = Step {
            field,
            value,
            form: form as u64,
            flags: 0,
            left: 0,
        };
        self.used += 1;
    }

    /// What the steps did.
    pub fn steps(&self) -> &[Step] {
        &self.steps[..self.used]
    }

    /// What step number `at` was.
    pub fn reads(&self, at: usize) -> bool {
        let form = self.steps[at].form;
        [
            Form::Read,
            Form::ReadMemory,
            Form::ReadHigh,
            Form::ReadIndexed,
            Form::ReadTo,
        ]
        .iter()
        .any(|&read| read as u64 == form)
    }

    /// Lets the child begin with the list at its next entry.
    pub fn start(&mut self) {
        self.steps[self.used].form = Form::End as u64;
        self.bed.registers().rdi = self.steps.as_ptr() as u64;
    }

    /// Runs the list to its end, skipping each instruction that leaves. False if something else happened,
    /// which is in the log.
    pub fn run(&mut self, name: &str) -> Result<bool, VmxError> {
        self.start();
        self.exits = 0;
        self.count = 0;
        loop {
            let outcome = self.bed.enter();
            if self.bed.called(&outcome) {
                break;
            }
            let reason = match outcome.failed() {
                true => u64::MAX,
                false => vmread(VM_EXIT_REASON)?,
            };
            if reason != VMREAD && reason != VMWRITE {
                self.bed.log_exit(name, &outcome);
                return Ok(false);
            }
            let at = (self.bed.registers().rdi - self.steps.as_ptr() as u64) as usize
                / size_of::<Step>();
            if (reason == VMREAD) != self.reads(at) {
                log!(
                    "{}/{}: FAIL: step {} left for reason {}",
                    self.bed.group(),
                    name,
                    at,
                    reason
                );
            }
            let info = vmread(VMX_INSTRUCTION_INFO)?;
            let length = vmread(VM_EXIT_INSTRUCTION_LEN)?;
            // Of a register operand, what describes an address is undefined.
            let (info, displacement) = match info & INFO_REGISTER {
                0 => (info, vmread(EXIT_QUALIFICATION)?),
                _ => (info & INFO_OF_REGISTER, 0),
            };
            for value in [reason, length, info, displacement] {
                self.exits = fold(self.exits, value);
            }
            self.count += 1;
            self.bed.registers().r8[1] = 1;
            self.bed.skip()?;
        }
        for step in &mut self.steps[..self.used] {
            step.flags &= FLAGS;
        }
        // The next list starts anew, behind the VMCALL's jump.
        self.bed.skip()?;
        Ok(true)
    }
}

/// A shadow VMCS, clear.
pub fn new_shadow() -> u64 {
    let region = crate::vmx::new_region();
    set_revision(region, crate::vmx::revision() | SHADOW);
    region
}

/// Writes the first word of a region whose VMCS is clear.
pub fn set_revision(region: u64, revision: u32) {
    // SAFETY: a page of ours.
    unsafe { (region as *mut u32).write_volatile(revision) };
}

/// Does something with a shadow VMCS as the current one, then makes `back` current.
pub fn with_current<T>(
    vmcs: u64,
    back: u64,
    what: impl FnOnce() -> Result<T, VmxError>,
) -> Result<T, VmxError> {
    vmptrld(vmcs)?;
    let result = what();
    vmptrld(back)?;
    result
}

/// Can this processor shadow VMCSs for us?
pub fn available() -> bool {
    const PROCBASED_CTLS2: u32 = 0x48b;
    cpu::rdmsr(PROCBASED_CTLS2).is_ok_and(|allowed| allowed >> 32 & VMCS_SHADOWING != 0)
}
