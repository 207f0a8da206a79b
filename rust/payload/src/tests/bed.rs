// SPDX-License-Identifier: GPL-2.0-or-later
//! A child in a good steady state, and what comes of disturbing it.

use core::fmt;

use super::log;
use crate::memory;
use crate::vmx::child::{self, How, Registers};
use crate::vmx::ept::{Ept, LowMemory};
use crate::vmx::ops::{vmread, vmwrite, VmxError};
use crate::vmx::setup::{Child, Features};
use crate::vmx::{exit, field};

/// Pages of the touch region that the bed's EPT has tables for.
const EPT_PAGES: u64 = 512;

/// What an attempt to enter came to.
pub struct Outcome(Result<(), VmxError>);

impl Outcome {
    /// Did the entry itself fail, so that no exit was recorded?
    pub fn failed(&self) -> bool {
        self.0.is_err()
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Err(error) = self.0 {
            return error.fmt(f);
        }
        let read = |field| vmread(field).unwrap_or(u64::MAX);
        let reason = read(field::VM_EXIT_REASON);
        let qualification = read(field::EXIT_QUALIFICATION);
        match reason >> 31 & 1 {
            1 => write!(
                f,
                "entry failure {} qualification {qualification:#x}",
                reason & 0xffff
            ),
            _ => write!(f, "exit {reason} qualification {qualification:#x}"),
        }
    }
}

/// Exit reasons that define the VM-exit instruction information (SDM volume 3, 29.2.5): string I/O,
/// VMX instructions, descriptor-table accesses, invalidations, RDRAND and RDSEED, XSAVES and XRSTORS.
const INFORMATIVE: [u64; 16] = [
    19, 21, 22, 23, 25, 27, IO, 46, 47, 50, 53, 57, 58, 61, 63, 64,
];
const IO: u64 = 30;
/// In the qualification of an I/O exit: a string instruction.
const IO_STRING: u64 = 1 << 4;
const PREEMPTION_TIMER: u64 = 52;

/// The rest of what an exit tells.
pub struct Details;

impl fmt::Display for Details {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let read = |field| vmread(field).unwrap_or(u64::MAX);
        // Where an exit leaves it undefined there is what an earlier one left, until the machine is saved
        // and restored.
        let info = match read(field::VM_EXIT_REASON) {
            IO if read(field::EXIT_QUALIFICATION) & IO_STRING == 0 => 0,
            reason if INFORMATIVE.contains(&reason) => read(field::VMX_INSTRUCTION_INFO),
            _ => 0,
        };
        let length = match read(field::VM_EXIT_REASON) {
            PREEMPTION_TIMER => 0,
            _ => read(field::VM_EXIT_INSTRUCTION_LEN),
        };
        write!(
            f,
            "length {} info {:#x} interruption {:#x}/{:#x} vectoring {:#x}/{:#x}",
            length,
            info,
            read(field::VM_EXIT_INTR_INFO),
            read(field::VM_EXIT_INTR_ERROR_CODE),
            read(field::IDT_VECTORING_INFO_FIELD),
            read(field::IDT_VECTORING_ERROR_CODE),
        )
    }
}

/// A child and its surroundings.
pub struct Bed {
    /// The child.
    pub child: Child,
    /// A page that nothing else uses.
    pub page: u64,
    /// Its tables, if it has EPT.
    pub ept: Ept,
    group: &'static str,
    registers: Registers,
    launched: bool,
}

impl Bed {
    /// Surroundings for a group's tests; no VMCS is current yet.
    pub fn new(group: &'static str) -> Bed {
        Bed {
            child: Child::new(),
            page: memory::pages(1),
            ept: Ept::new(LowMemory::new(), EPT_PAGES),
            group,
            registers: Registers::default(),
            launched: false,
        }
    }

    /// EPT, VPID and unrestricted guest.
    pub fn modern(&self) -> Features {
        Features {
            ept: Some(self.ept.pointer()),
            vpid: Some(1),
            unrestricted: true,
        }
    }

    /// A fresh VMCS for a child that runs `program`.
    pub fn prepare(
        &mut self,
        features: Features,
        program: extern "C" fn() -> !,
    ) -> Result<(), VmxError> {
        self.launched = false;
        self.registers = Registers::default();
        self.child.prepare(features, program)
    }

    /// The group whose tests this is for.
    pub fn group(&self) -> &'static str {
        self.group
    }

    /// The child's general registers, as it left them.
    pub fn registers(&mut self) -> &mut Registers {
        &mut self.registers
    }

    /// Somebody has cleared the VMCS.
    pub fn not_launched(&mut self) {
        self.launched = false;
    }

    /// Enters, with the instruction that is due.
    pub fn enter(&mut self) -> Outcome {
        let how = if self.launched {
            How::Resume
        } else {
            How::Launch
        };
        self.enter_by(how)
    }

    /// Enters with a given instruction.
    pub fn enter_by(&mut self, how: How) -> Outcome {
        // SAFETY: the programs of the tests touch their own stack and the touch region only, and HOST_RIP is
        // as `prepare` sets it: tests of the host state violate other fields.
        let result = unsafe { child::enter(how, &mut self.registers) };
        let failed = vmread(field::VM_EXIT_REASON).unwrap_or(0) >> 31 & 1 == 1;
        self.launched |= result.is_ok() && !failed;
        Outcome(result)
    }

    /// Did the last entry end in a VMCALL?
    pub fn called(&self, outcome: &Outcome) -> bool {
        outcome.0.is_ok() && vmread(field::VM_EXIT_REASON) == Ok(exit::VMCALL)
    }

    /// Skips the instruction that the child left at.
    pub fn skip(&self) -> Result<(), VmxError> {
        let length = vmread(field::VM_EXIT_INSTRUCTION_LEN)?;
        vmwrite(field::GUEST_RIP, vmread(field::GUEST_RIP)? + length)
    }

    /// A good entry; says so only if it is not one.
    pub fn good(&mut self, after: &str) -> Result<(), VmxError> {
        let outcome = self.enter();
        if !self.called(&outcome) {
            log!(
                "{}/{}: FAIL: good entry afterwards: {}",
                self.group,
                after,
                outcome
            );
            return Ok(());
        }
        self.skip()
    }

    /// Writes `changes`, enters, logs the outcome, puts the old values back and makes a good entry.
    pub fn violate(&mut self, name: &str, changes: &[(u32, u64)]) -> Result<(), VmxError> {
        let mut old = [0; 8];
        for (slot, &(field, value)) in old.iter_mut().zip(changes) {
            let before = vmread(field).and_then(|before| vmwrite(field, value).map(|()| before));
            match before {
                Ok(before) => *slot = before,
                Err(why) => {
                    log!("{}/{}: field {:#06x}: {}", self.group, name, field, why);
                    return self.restore(&old, changes, field);
                }
            }
        }
        let outcome = self.enter();
        log!("{}/{}: {}", self.group, name, outcome);
        if self.called(&outcome) {
            self.skip()?;
        }
        self.restore(&old, changes, u32::MAX)?;
        self.good(name)
    }

    /// Undoes the changes before the one to `until`.
    fn restore(&self, old: &[u64], changes: &[(u32, u64)], until: u32) -> Result<(), VmxError> {
        for (&value, &(field, _)) in old.iter().zip(changes).take_while(|(_, c)| c.0 != until) {
            vmwrite(field, value)?;
        }
        Ok(())
    }

    /// As [`violate`](Bed::violate), with bits of one field set and cleared.
    pub fn flip(&mut self, name: &str, field: u32, set: u64, clear: u64) -> Result<(), VmxError> {
        let value = vmread(field)? & !clear | set;
        self.violate(name, &[(field, value)])
    }

    /// Logs the last exit whole.
    pub fn log_exit(&self, name: &str, outcome: &Outcome) {
        log!("{}/{}: {} {}", self.group, name, outcome, Details);
    }
}

/// The child of tests that only need one that runs.
pub extern "C" fn calls() -> ! {
    loop {
        // SAFETY: VMCALL exits; the payload resumes behind it.
        unsafe { core::arch::asm!("vmcall", options(nomem, nostack)) };
    }
}
