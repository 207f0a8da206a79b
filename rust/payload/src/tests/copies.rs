// SPDX-License-Identifier: GPL-2.0-or-later
//! A child that is entered again and again with a shadow VMCS, with nothing in between or something: the other shadow
//! VMCS, its parent looking into or clearing the one that is in use, an entry that fails. After each exit the page
//! has to be what KVM makes of it.

use super::log;
use super::model::{fold, page_sum, Model, Numbers};
use super::script::{available, new_shadow, with_current, Form, Scripted, VMCS_SHADOWING};
use crate::vmx::field::{is_64_bit, EVERY, SECONDARY_VM_EXEC_CONTROL, VMCS_LINK_POINTER};
use crate::vmx::ops::{vmclear, vmread, vmwrite, VmxError};

/// Most accesses of the child in one run.
const ACCESSES: usize = 6;

/// The group.
pub fn run(level: u32) -> Result<(), VmxError> {
    if !available() {
        log!("copies/not available");
        return Ok(());
    }
    let mut copies = Copies {
        main: Scripted::new("copies", 2 * ACCESSES),
        shadows: [(); 2].map(|()| new_shadow()),
        link: 0,
        model: Model::new("copies", 2)?,
        numbers: Numbers::new(23),
        sum: 0,
    };
    copies.shadows.into_iter().try_for_each(vmclear)?;
    copies.main.prepare(true, copies.shadows[0])?;
    copies.main.fill(false, false);
    for number in 0..copies.shadows.len() {
        copies.look(number, EVERY.len(), true)?;
    }
    for round in 0..if level > 1 { 40 } else { 400 } {
        copies.between(round)?;
        copies.child(round)?;
        // Not only once the VMCS is clear: KVM keeps the page up to date.
        for shadow in copies.shadows {
            copies.sum = fold(copies.sum, page_sum(shadow));
        }
        if round % 20 == 19 {
            log!("copies/round {}: {:#x}", round, copies.sum);
        }
    }
    vmclear(copies.vmcs())?;
    for (number, shadow) in copies.shadows.into_iter().enumerate() {
        vmclear(shadow)?;
        log!(
            "copies/shadow VMCS {}: region {:#x}",
            number,
            page_sum(shadow)
        );
    }
    log!("copies/wrong {}", copies.model.wrong());
    Ok(())
}

struct Copies {
    main: Scripted,
    shadows: [u64; 2],
    /// Which of them the link pointer names.
    link: usize,
    model: Model,
    numbers: Numbers,
    sum: u64,
}

impl Copies {
    fn vmcs(&self) -> u64 {
        self.main.bed.child.vmcs
    }

    /// The parent loads a shadow VMCS, compares fields and changes them, and may clear it.
    fn look(&mut self, number: usize, fields: usize, change: bool) -> Result<(), VmxError> {
        let (shadow, back) = (self.shadows[number], self.vmcs());
        let (model, numbers) = (&mut self.model, &mut self.numbers);
        with_current(shadow, back, || {
            let first = numbers.below(EVERY.len());
            for step in 0..fields {
                let at = (first + step) % EVERY.len();
                if fields < EVERY.len() {
                    model.check(number, at, "parent");
                }
                if change {
                    model.write(number, at, numbers.next())?;
                }
            }
            if numbers.below(2) == 0 {
                vmclear(shadow)
            } else {
                Ok(())
            }
        })
    }

    /// What happens before an entry: most often nothing.
    fn between(&mut self, round: u64) -> Result<(), VmxError> {
        let shadow = self.shadows[self.link];
        match self.numbers.below(20) {
            0 => {
                self.link ^= 1;
                vmwrite(VMCS_LINK_POINTER, self.shadows[self.link])?;
            }
            1 => self.look(self.link, 8, false)?,
            2 => self.look(self.link, 8, true)?,
            3 => self.look(self.link ^ 1, 8, true)?,
            4 => vmclear(shadow)?,
            5 => {
                let (reads, writes) = (self.numbers.below(2) == 0, self.numbers.below(2) == 0);
                self.main.fill(reads, writes);
            }
            6 => {
                vmwrite(VMCS_LINK_POINTER, shadow | 0x10)?;
                let outcome = self.main.bed.enter();
                self.main.bed.log_exit("bad link", &outcome);
                vmwrite(VMCS_LINK_POINTER, shadow)?;
            }
            7 => {
                // No access succeeds.
                vmwrite(VMCS_LINK_POINTER, u64::MAX)?;
                self.child(round)?;
                vmwrite(VMCS_LINK_POINTER, shadow)?;
            }
            8 => {
                // Every access leaves.
                let controls = vmread(SECONDARY_VM_EXEC_CONTROL)?;
                vmwrite(SECONDARY_VM_EXEC_CONTROL, controls & !VMCS_SHADOWING)?;
                vmwrite(VMCS_LINK_POINTER, u64::MAX)?;
                self.child(round)?;
                vmwrite(SECONDARY_VM_EXEC_CONTROL, controls)?;
                vmwrite(VMCS_LINK_POINTER, shadow)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// The child makes a few accesses, or none.
    fn child(&mut self, round: u64) -> Result<(), VmxError> {
        // In some rounds the VMM may save the machine behind each access.
        let save = round % 5 == 1;
        let mut fields = [0; ACCESSES];
        let count = self.numbers.below(ACCESSES + 1);
        self.main.clear();
        for at in &mut fields[..count] {
            *at = loop {
                let at = self.numbers.below(EVERY.len());
                if self.model.writable(at) {
                    break at;
                }
            };
            let (encoding, _) = EVERY[*at];
            let half = is_64_bit(encoding) && self.numbers.below(4) == 0;
            let form = [Form::Read, Form::Write, Form::ReadMemory, Form::WriteMemory];
            let form = form[self.numbers.below(form.len())];
            let value = self.numbers.next();
            self.main.push(
                form,
                encoding as u64 | half as u64,
                value >> (32 * half as u32),
            );
            if save {
                self.main.push(Form::Out, 0, 0);
            }
        }
        if !self.main.run("child")? {
            return Ok(());
        }
        let number = self.link;
        for (step, &at) in fields[..count].iter().enumerate() {
            let step = if save { 2 * step } else { step };
            let (reads, step) = (self.main.reads(step), self.main.steps()[step]);
            self.sum = fold(self.sum, step.value ^ step.flags << 32 ^ step.left);
            if step.left != 0 || step.flags != 0 {
                continue;
            }
            if !reads {
                self.model.written(number, at, step.field, step.value);
                continue;
            }
            let whole = self.model.expected(number, at);
            let half = is_64_bit(EVERY[at].0) && step.field & 1 != 0;
            let expected = if half { whole >> 32 } else { whole };
            if step.value != expected {
                log!(
                    "copies/child: FAIL: round {}: reads {:#06x} {} of shadow VMCS {} as {:#x} instead of {:#x}",
                    round,
                    step.field,
                    EVERY[at].1,
                    number,
                    step.value,
                    expected
                );
            }
        }
        Ok(())
    }
}
