// SPDX-License-Identifier: GPL-2.0-or-later
//! A child that works off a list of accesses to the window. What an access did to it is in the list; if it
//! left the child its parent decides whether to skip or to repeat it.

use core::arch::global_asm;
use core::fmt;
use core::mem::offset_of;

use super::super::bed::Bed;
use super::super::log;
use super::tables::{paging_with_window, Tables, EXECUTE, READ, WINDOW, WRITE};
use crate::memory::{self, PAGE};
use crate::vmx::beside;
use crate::vmx::field::*;
use crate::vmx::ops::{raw, vmread, vmwrite, VmxError};
use crate::vmx::setup::Features;

/// EPT violation.
pub const VIOLATION: u64 = 48;
/// EPT misconfiguration.
pub const MISCONFIGURATION: u64 = 49;
/// Page-modification log full.
pub const LOG_FULL: u64 = 62;
/// In an EPT violation's qualification: the guest-linear address is valid.
const LINEAR_VALID: u64 = 1 << 7;
/// Repetitions of one access after which its parent gives up.
const PATIENCE: u32 = 16;

/// What a step does. The offset in its page is the access's own, see [`Access::offset`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Access {
    /// A read of the page's number.
    Read = 1,
    /// A write of the word that is there for it.
    Write = 2,
    /// A locked read and write of that word.
    Update = 3,
    /// A call of the function that is in the page, which returns the page's number.
    Fetch = 4,
}

impl Access {
    /// Every access.
    pub const EVERY: [Access; 4] = [Access::Read, Access::Write, Access::Update, Access::Fetch];

    /// Its name in a log.
    pub fn name(self) -> &'static str {
        match self {
            Access::Read => "read",
            Access::Write => "write",
            Access::Update => "update",
            Access::Fetch => "fetch",
        }
    }

    /// Where in a page it goes.
    pub const fn offset(self) -> u64 {
        match self {
            Access::Read => 0,
            Access::Fetch => 8,
            Access::Write | Access::Update => 16,
        }
    }

    /// The rights that it needs.
    pub const fn rights(self) -> u64 {
        match self {
            Access::Read => READ,
            Access::Write => WRITE,
            Access::Update => READ | WRITE,
            Access::Fetch => EXECUTE,
        }
    }

    /// Does it write?
    pub const fn writes(self) -> bool {
        matches!(self, Access::Write | Access::Update)
    }
}

/// One access.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Step {
    address: u64,
    form: u64,
    /// What is written or added; what was read.
    pub value: u64,
    /// It was carried out.
    pub done: u64,
}

// SAFETY: four integers.
unsafe impl memory::Plain for Step {}

impl Step {
    /// The page of the window.
    pub fn page(&self) -> u64 {
        (self.address - WINDOW) / PAGE
    }

    /// What it does.
    pub fn access(&self) -> Access {
        Access::EVERY[self.form as usize - 1]
    }
}

global_asm!(
    ".global touch_child_code",
    "touch_child_code:",
    "    mov r14, rsp",
    "2:  mov rsp, r14",
    "    mov eax, [rdi + {form}]",
    "    mov rcx, [rdi + {address}]",
    "    mov rdx, [rdi + {value}]",
    "    dec eax",
    "    js 3f",
    "    jz 4f",
    "    dec eax",
    "    jz 5f",
    "    dec eax",
    "    jz 6f",
    "    call rcx",
    "    mov edx, eax",
    "    jmp 7f",
    "3:  vmcall",
    "    jmp 2b",
    "4:  mov rdx, [rcx]",
    "    jmp 7f",
    "5:  mov [rcx], rdx",
    "    jmp 7f",
    "6:  lock xadd [rcx], rdx",
    "7:  mov [rdi + {value}], rdx",
    "    mov qword ptr [rdi + {done}], 1",
    ".global touch_child_next",
    "touch_child_next:",
    "    lea rdi, [rdi + {step}]",
    "    jmp 2b",
    form = const offset_of!(Step, form),
    address = const offset_of!(Step, address),
    value = const offset_of!(Step, value),
    done = const offset_of!(Step, done),
    step = const size_of::<Step>(),
);

extern "C" {
    fn touch_child_code() -> !;
    static touch_child_next: u8;
}

extern "C" fn touch_child() -> ! {
    // SAFETY: the child's own code; the list that RDI names is the parent's, who waits.
    unsafe { touch_child_code() }
}

/// What an exit said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exit {
    /// Its reason.
    pub reason: u64,
    /// Its qualification, 0 where there is none.
    pub qualification: u64,
    /// The guest-physical address, 0 where there is none.
    pub address: u64,
    /// The guest-linear address if there is one.
    pub linear: u64,
}

impl Exit {
    /// What the last exit of the current VMCS defines of it; 0 where it defines nothing.
    pub fn read() -> Result<Exit, VmxError> {
        let reason = vmread(VM_EXIT_REASON)?;
        let mut exit = Exit {
            reason,
            ..Exit::default()
        };
        if reason == VIOLATION {
            exit.qualification = vmread(EXIT_QUALIFICATION)?;
            if exit.qualification & LINEAR_VALID != 0 {
                exit.linear = vmread(GUEST_LINEAR_ADDRESS)?;
            }
        }
        if reason == VIOLATION || reason == MISCONFIGURATION {
            exit.address = vmread(GUEST_PHYSICAL_ADDRESS)?;
        }
        Ok(exit)
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.reason)?;
        if self.reason == VIOLATION {
            write!(f, "/{:#x}", self.qualification)?;
        }
        Ok(())
    }
}

/// What comes after an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// The access is left out.
    Skip,
    /// It is made again.
    Retry,
    /// It is made again, by VMLAUNCH.
    Relaunch,
}

/// The child and its list.
pub struct Toucher {
    /// The child.
    pub bed: Bed,
    cr3: u64,
    steps: &'static mut [Step],
    used: usize,
}

impl Toucher {
    /// One with room for `room` steps, whose VMCS has yet to be prepared.
    pub fn new(group: &'static str, room: usize) -> Toucher {
        Toucher {
            bed: Bed::new(group),
            cr3: paging_with_window(),
            steps: memory::slice(room + 1),
            used: 0,
        }
    }

    /// A fresh VMCS with these tables, which becomes current.
    pub fn prepare(&mut self, tables: &Tables) -> Result<(), VmxError> {
        let features = Features {
            ept: Some(tables.pointer()),
            vpid: Some(1),
            unrestricted: true,
        };
        self.bed.prepare(features, touch_child)?;
        vmwrite(GUEST_CR3, self.cr3)
    }

    /// Forgets the list.
    pub fn clear(&mut self) {
        self.used = 0;
    }

    /// Is there no room for another step?
    pub fn full(&self) -> bool {
        self.used + 1 == self.steps.len()
    }

    /// Appends an access to `page` of the window; `value` is written or added.
    pub fn push(&mut self, access: Access, page: u64, value: u64) {
        self.steps[self.used] = Step {
            address: WINDOW + page * PAGE + access.offset(),
            form: access as u64,
            value,
            done: 0,
        };
        self.used += 1;
        self.steps[self.used].form = 0;
    }

    /// Appends a read of the word that [`Access::Write`] writes.
    pub fn push_word(&mut self, page: u64) {
        self.push(Access::Read, page, 0);
        self.steps[self.used - 1].address += Access::Write.offset();
    }

    /// What the steps did.
    pub fn steps(&self) -> &[Step] {
        &self.steps[..self.used]
    }

    /// Lets the child work off the list on a processor that is not alone. `mend` is told the reason and the address of
    /// each exit, and says whether to go on. False if it did not, or an entry failed.
    ///
    /// # Safety
    /// Prepared on this processor, current there, and never entered.
    pub unsafe fn run_beside(&mut self, mut mend: impl FnMut(u64, u64) -> bool) -> bool {
        self.bed.registers().rdi = self.steps.as_ptr() as u64;
        let mut launch = true;
        loop {
            // SAFETY: by the caller's promise; the child's code is `touch_child`.
            let entered = unsafe { beside::enter(launch, self.bed.registers()) };
            if !entered {
                return false;
            }
            launch = false;
            // SAFETY: after an exit there is a current VMCS.
            let (reason, address) = unsafe {
                (
                    raw::vmread(VM_EXIT_REASON),
                    raw::vmread(GUEST_PHYSICAL_ADDRESS),
                )
            };
            if reason == crate::vmx::exit::VMCALL {
                return true;
            }
            if !mend(reason, address) {
                return false;
            }
        }
    }

    /// Lets the child work off the list; `decide` is told of each exit, with the number of the step that made
    /// it. False if something happened that should not, which is in the log.
    pub fn run(
        &mut self,
        name: &str,
        mut decide: impl FnMut(usize, &Step, Exit) -> Result<Then, VmxError>,
    ) -> Result<bool, VmxError> {
        self.bed.registers().rdi = self.steps.as_ptr() as u64;
        let (mut last, mut times) = (usize::MAX, 0);
        loop {
            let outcome = self.bed.enter();
            if self.bed.called(&outcome) {
                self.bed.skip()?;
                return Ok(true);
            }
            let exit = match outcome.failed() {
                true => Exit::default(),
                false => Exit::read()?,
            };
            if ![VIOLATION, MISCONFIGURATION, LOG_FULL].contains(&exit.reason) {
                self.bed.log_exit(name, &outcome);
                log!("{}/{}: FAIL: left for that", self.bed.group(), name);
                return Ok(false);
            }
            let at = (self.bed.registers().rdi - self.steps.as_ptr() as u64) as usize
                / size_of::<Step>();
            times = if at == last { times + 1 } else { 1 };
            last = at;
            match decide(at, &self.steps[at], exit)? {
                Then::Skip => vmwrite(GUEST_RIP, &raw const touch_child_next as u64)?,
                _ if times > PATIENCE => {
                    log!("{}/{}: FAIL: no end of {}", self.bed.group(), name, exit);
                    return Ok(false);
                }
                Then::Retry => {}
                Then::Relaunch => self.bed.not_launched(),
            }
        }
    }
}
