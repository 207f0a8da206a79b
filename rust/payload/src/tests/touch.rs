// SPDX-License-Identifier: GPL-2.0-or-later
//! What the child may touch, for every kind of last-level EPT entry, and what its exit says.

use core::arch::asm;

use protocol::ports::TOUCH_BASE;

use super::bed::Bed;
use super::ept::toucher::Exit;
use super::exits::program;
use super::log;
use crate::memory::PAGE;
use crate::vmx::ops::{invept, VmxError};

/// Last-level entries, all for the page's own address.
const ENTRIES: [(&str, u64); 16] = [
    ("not present", 0),
    ("r", 1 | 6 << 3),
    ("w", 2 | 6 << 3),
    ("rw", 3 | 6 << 3),
    ("x", 4 | 6 << 3),
    ("rx", 5 | 6 << 3),
    ("wx", 6 | 6 << 3),
    ("rwx", 7 | 6 << 3),
    ("rwx accessed", 7 | 6 << 3 | 1 << 8),
    ("rwx accessed dirty", 7 | 6 << 3 | 3 << 8),
    ("rwx uncached", 7),
    ("rwx memory type 2", 7 | 2 << 3),
    ("rwx memory type 7", 7 | 7 << 3),
    ("rwx ignore PAT", 7 | 6 << 3 | 1 << 6),
    ("rwx ignored bits", 7 | 6 << 3 | 1 << 7 | 0xf << 52),
    ("rwx beyond", 7 | 6 << 3 | 1 << 51),
];

/// `vmcall` and a jump back to it, in memory order: what the last of the programs jumps to.
const CALLS: u64 = 0xfb_eb_c1_01_0f;

/// The group.
pub fn run() -> Result<(), VmxError> {
    let read = program!("mov eax, 0x40000000", "mov rax, [rax]");
    let write = program!("mov eax, 0x40000000", "mov [rax], rax");
    let update = program!("mov eax, 0x40000000", "lock inc qword ptr [rax]");
    let fetch = program!("mov eax, 0x40000000", "jmp rax");
    let mut bed = Bed::new("memory");
    for (entry, bits) in ENTRIES {
        for (access, program) in [
            ("read", read),
            ("write", write),
            ("update", update),
            ("fetch", fetch),
        ] {
            // SAFETY: the first page of the touch region, which holds no Rust object.
            unsafe { (TOUCH_BASE as *mut u64).write_volatile(CALLS) };
            bed.prepare(bed.modern(), program)?;
            bed.ept
                .set(0, if bits == 0 { 0 } else { TOUCH_BASE | bits });
            invept(1, [bed.ept.pointer(), 0])?;
            let outcome = bed.enter();
            bed.log_exit("", &outcome);
            // Not the fields themselves: after any other exit they hold what a parent's last one has left there.
            let exit = Exit::read()?;
            log!(
                "memory/{} of {}: address {:#x} linear {:#x} entry then {:#x}",
                access,
                entry,
                exit.address / PAGE,
                exit.linear,
                bed.ept.get(0)
            );
        }
    }
    bed.ept.set(0, 0);
    invept(1, [bed.ept.pointer(), 0])
}
