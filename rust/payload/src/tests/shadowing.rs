// SPDX-License-Identifier: GPL-2.0-or-later
//! VMCS shadowing for the child: which of its VMREADs and VMWRITEs leave it, what the others do, and that
//! the shadow VMCS is the same whether the child or its parent looks at it.

use super::log;
use super::model::{fold, page_sum, Model, Numbers};
use super::script::{available, new_shadow, with_current, Form, Scripted};
use crate::vmx::field::{is_64_bit, EVERY, VM_INSTRUCTION_ERROR};
use crate::vmx::ops::{vmclear, vmread, vmwrite, VmxError};

/// Encodings that name no field: reserved ones, halves that fields do not have, and beyond what a bitmap
/// has bits for, among them such as look like a field in their low bits.
const UNKNOWN: [u64; 20] = [
    0x0004,
    0x0801,
    0x0814,
    0x0c0e,
    0x20ff,
    0x4801,
    0x4828,
    0x4fff,
    0x6402,
    0x681f,
    0x6fff,
    0x7ffe,
    0x7fff,
    0x8000,
    0x1_0800,
    0x8000_0800,
    0xffff_ffff,
    1 << 32 | 0x681e,
    1 << 63 | 0x4400,
    u64::MAX,
];

/// What an access did that reached the shadow VMCS.
type Done = (u64, u64);

/// The group.
pub fn run(level: u32) -> Result<(), VmxError> {
    if !available() {
        log!("shadowing/not available");
        return Ok(());
    }
    let mut shadowing = Shadowing {
        main: Scripted::new("shadowing", encodings().count() * 3),
        shadow: new_shadow(),
        model: Model::new("shadowing", 1)?,
        numbers: Numbers::new(3),
    };
    vmclear(shadowing.shadow)?;
    // At a deeper level an access that leaves costs half a million instructions: every so many do.
    shadowing.forms(if level > 1 { 7 } else { 1 })?;
    shadowing.single_bits(if level > 1 { 31 } else { 1 })?;
    shadowing.changing_bitmaps()?;
    shadowing.both_sides(if level > 1 { 4 } else { 60 })?;
    vmclear(shadowing.main.bed.child.vmcs)?;
    vmclear(shadowing.shadow)?;
    log!(
        "shadowing/region {:#x}, wrong {}",
        page_sum(shadowing.shadow),
        shadowing.model.wrong()
    );
    Ok(())
}

/// Every encoding that is tried, with its field's place in the table if it has one.
pub fn encodings() -> impl Iterator<Item = (u64, Option<usize>)> {
    let fields = EVERY.iter().enumerate().flat_map(|(at, &(encoding, _))| {
        let high = is_64_bit(encoding).then_some((encoding as u64 | 1, Some(at)));
        core::iter::once((encoding as u64, Some(at))).chain(high)
    });
    fields.chain(UNKNOWN.into_iter().map(|encoding| (encoding, None)))
}

/// Of [`encodings`] those of every `stride`th field, with both halves, and as many of the unknown ones.
fn some_encodings(stride: usize) -> impl Iterator<Item = (u64, Option<usize>)> {
    let chosen = move |&(number, (_, at)): &(usize, (u64, Option<usize>))| {
        at.unwrap_or(number) % stride == 0
    };
    encodings().enumerate().filter(chosen).map(|(_, both)| both)
}

fn name(at: Option<usize>) -> &'static str {
    at.map_or("nothing", |at| EVERY[at].1)
}

/// Beyond the bitmaps: always leaves.
fn out_of_range(encoding: u64) -> bool {
    encoding >> 15 != 0
}

/// A way to access fields.
struct Way {
    title: &'static str,
    /// The child has EPT and VPID.
    modern: bool,
    /// All bits of the VMREAD bitmap are set.
    reads: bool,
    /// All bits of the VMWRITE bitmap are set.
    writes: bool,
    read: Form,
    write: Form,
}

struct Shadowing {
    main: Scripted,
    shadow: u64,
    model: Model,
    numbers: Numbers,
}

impl Shadowing {
    fn vmcs(&self) -> u64 {
        self.main.bed.child.vmcs
    }

    /// Fills the shadow VMCS from the parent's side, and makes the child's VMCS current.
    fn refill(&mut self) -> Result<(), VmxError> {
        let (shadow, back) = (self.shadow, self.vmcs());
        let (model, numbers) = (&mut self.model, &mut self.numbers);
        with_current(shadow, back, || {
            for at in 0..EVERY.len() {
                // Whole fields: nobody knows what the child has left in the other half.
                model.write(0, at, numbers.next() | 1)?;
            }
            vmwrite(VM_INSTRUCTION_ERROR, 0)
        })
    }

    /// Reads the shadow VMCS from the parent's side.
    fn inspect(&mut self, when: &str) -> Result<u64, VmxError> {
        let (shadow, back) = (self.shadow, self.vmcs());
        let model = &mut self.model;
        with_current(shadow, back, || Ok(model.check_all(0, when)))
    }

    /// Every encoding in registers with no bit set (every other one if there is a stride), then every
    /// `stride`th in every way.
    fn forms(&mut self, stride: usize) -> Result<(), VmxError> {
        let way = |title, reads, writes, read, write| Way {
            title,
            modern: true,
            reads,
            writes,
            read,
            write,
        };
        let registers = way("registers", false, false, Form::Read, Form::Write);
        let all = if stride > 1 { 2 } else { 1 };
        self.form(&registers, all, stride)?;
        let first = self.form(&registers, stride, 0)?;
        for way in [
            Way {
                title: "without EPT",
                modern: false,
                ..registers
            },
            way("memory", false, false, Form::ReadMemory, Form::WriteMemory),
            way(
                "high registers",
                false,
                false,
                Form::ReadHigh,
                Form::WriteHigh,
            ),
            way(
                "indexed",
                false,
                false,
                Form::ReadIndexed,
                Form::WriteIndexed,
            ),
            way("all leave", true, true, Form::Read, Form::Write),
            way(
                "all leave, indexed",
                true,
                true,
                Form::ReadIndexed,
                Form::WriteIndexed,
            ),
            way(
                "reads leave",
                true,
                false,
                Form::ReadHigh,
                Form::WriteMemory,
            ),
            way(
                "writes leave",
                false,
                true,
                Form::ReadMemory,
                Form::WriteHigh,
            ),
        ] {
            let sum = self.form(&way, stride, 0)?;
            if !way.reads && !way.writes && sum != first {
                log!("shadowing/{}: FAIL: not what registers gave", way.title);
            }
        }
        Ok(())
    }

    /// Reads, writes and reads every `stride`th field; gives the sum of what came of it. Every `show`th
    /// result is logged.
    fn form(&mut self, way: &Way, stride: usize, show: usize) -> Result<u64, VmxError> {
        self.main.prepare(way.modern, self.shadow)?;
        self.main.fill(way.reads, way.writes);
        // The same numbers each time, so that results can be compared.
        self.numbers = Numbers::new(4);
        self.refill()?;
        self.main.clear();
        for (encoding, _) in some_encodings(stride) {
            self.main.push(way.read, encoding, 0x1122_3344_5566_7788);
            self.main.push(way.write, encoding, self.numbers.next());
            self.main.push(way.read, encoding, 0x8877_6655_4433_2211);
        }
        if !self.main.run(way.title)? {
            return Ok(0);
        }
        let sum = self.judge(way, stride, show);
        let error = vmread(VM_INSTRUCTION_ERROR)?;
        let parent = self.inspect(way.title)?;
        log!(
            "shadowing/{}: {:#x}, {} exits {:#x}, parent's error number {:#x}, parent sees {:#x}",
            way.title,
            sum,
            self.main.count,
            self.main.exits,
            error,
            parent
        );
        Ok(sum)
    }

    /// Goes through what the three steps for each encoding did; gives their sum.
    fn judge(&mut self, way: &Way, stride: usize, show: usize) -> u64 {
        let mut sum = 0;
        for (number, (encoding, at)) in some_encodings(stride).enumerate() {
            let steps = [0, 1, 2].map(|n| self.main.steps()[number * 3 + n]);
            for (step, leaves) in steps.iter().zip([way.reads, way.writes, way.reads]) {
                if (step.left != 0) != (leaves || out_of_range(encoding)) {
                    log!(
                        "shadowing/{}: FAIL: {:#06x} {}: left {}",
                        way.title,
                        encoding,
                        name(at),
                        step.left
                    );
                }
                if step.left == 0 {
                    sum = fold(fold(sum, step.value), step.flags);
                }
            }
            let [before, write, after]: [Done; 3] = steps.map(|step| (step.value, step.flags));
            if show != 0 && number % show == 0 && steps[0].left == 0 {
                log!(
                    "shadowing/{:#06x} {}: {:#x} {:#x}, wrote {:#x} {:#x}, {:#x} {:#x}",
                    encoding,
                    name(at),
                    before.0,
                    before.1,
                    write.0,
                    write.1,
                    after.0,
                    after.1
                );
            }
            if let (Some(at), 0, 0) = (at, write.1, steps[1].left) {
                self.model.written(0, at, encoding, write.0);
            }
        }
        sum
    }

    /// One bit clear and all others set, and the other way round: which bit is whose, and that a changed
    /// bitmap counts from the next entry on. No VMCLEAR between.
    fn single_bits(&mut self, stride: usize) -> Result<(), VmxError> {
        self.main.prepare(true, self.shadow)?;
        self.refill()?;
        for set in [false, true] {
            self.main.fill(!set, !set);
            let mut sum = 0;
            let mut accesses = 0;
            for (number, (encoding, _)) in encodings().enumerate().filter(|(n, _)| n % stride == 0)
            {
                // Now the one bitmap, now the other, now both.
                let (reads, writes) = (number % 3 != 0, number % 3 != 1);
                let in_range = !out_of_range(encoding);
                if in_range {
                    Scripted::bit(self.main.read_bitmap, encoding, set == reads);
                    Scripted::bit(self.main.write_bitmap, encoding, set == writes);
                }
                self.main.clear();
                for neighbour in [encoding, encoding ^ 1, encoding ^ 2, encoding ^ 0x2000] {
                    self.main.push(Form::Read, neighbour, 0);
                    self.main.push(Form::Write, neighbour, 0);
                }
                let run = self.main.run("single bits")?;
                for (at, step) in self.main.steps().iter().enumerate().filter(|_| run) {
                    let own = step.field == encoding && in_range;
                    let chosen = if at % 2 == 0 { reads } else { writes };
                    let leaves = match own {
                        true => set == chosen,
                        false => !set || out_of_range(step.field),
                    };
                    if (step.left != 0) != leaves {
                        log!(
                            "shadowing/single bits: FAIL: bit of {:#06x}, {} of {:#06x} left {}",
                            encoding,
                            if at % 2 == 0 { "read" } else { "write" },
                            step.field,
                            step.left
                        );
                    }
                    sum = fold(fold(sum, step.flags), step.left);
                    accesses += 1;
                }
                if in_range {
                    Scripted::bit(self.main.read_bitmap, encoding, !set);
                    Scripted::bit(self.main.write_bitmap, encoding, !set);
                }
            }
            log!(
                "shadowing/single bit {}: {} accesses {:#x}",
                if set { "set" } else { "clear" },
                accesses,
                sum
            );
        }
        Ok(())
    }

    /// The bitmaps change while the child runs (it does it itself: all memory is common). The processor
    /// may go by either value then; from the next entry on, by the new one only.
    fn changing_bitmaps(&mut self) -> Result<(), VmxError> {
        self.main.prepare(true, self.shadow)?;
        self.main.fill(false, false);
        self.refill()?;
        let fields = [0x681e_u64, 0x0800, 0x2800, 0x4402, 0x4816, 0x6808];
        for round in 0..6 {
            let leave = round % 2 == 0;
            let byte = if leave { 0xff } else { 0 };
            self.main.clear();
            for field in fields {
                self.main.push(Form::Read, field, 0);
                self.main
                    .push(Form::Poke, self.main.read_bitmap + field / 8, byte);
                self.main
                    .push(Form::Poke, self.main.write_bitmap + field / 8, byte);
                self.main.push(Form::Read, field, 0);
                self.main.push(Form::Write, field, round << 4 | field << 32);
            }
            if !self.main.run("changing bitmaps")? {
                continue;
            }
            let mut wrong = 0;
            for step in self.main.steps().chunks(5) {
                // Before its own change each goes by what the last round left.
                wrong += ((step[0].left != 0) == leave) as u32;
                // Whether it reached the shadow VMCS or left: never anything else.
                for access in [step[3], step[4]] {
                    wrong += (access.left == 0 && access.flags != 0) as u32;
                }
            }
            log!(
                "shadowing/changing bitmaps, round {}: wrong {}",
                round,
                wrong
            );
            self.main.clear();
            for field in fields {
                self.main.push(Form::Write, field, 0x0070 | round);
                self.main.push(Form::Read, field, 0);
            }
            self.main.run("changed bitmaps")?;
            for step in self.main.steps() {
                if (step.left != 0) != leave {
                    log!(
                        "shadowing/changed bitmaps, round {}: FAIL: {:#06x} left {}",
                        round,
                        step.field,
                        step.left
                    );
                }
            }
            let sum = self.main.steps().iter().fold(0, |sum, step| {
                fold(
                    sum,
                    if step.left == 0 {
                        step.value ^ step.flags
                    } else {
                        1
                    },
                )
            });
            log!("shadowing/changed bitmaps, round {}: {:#x}", round, sum);
        }
        Ok(())
    }

    /// Child and parent write the same shadow VMCS by turns, the parent with and without VMCLEAR between.
    fn both_sides(&mut self, rounds: u64) -> Result<(), VmxError> {
        self.main.prepare(true, self.shadow)?;
        self.main.fill(false, false);
        self.refill()?;
        let back = self.vmcs();
        let mut sum = 0;
        for round in 0..rounds {
            let clear = self.numbers.below(2) == 0;
            let (shadow, model, numbers) = (self.shadow, &mut self.model, &mut self.numbers);
            let picked = [(); 12].map(|()| numbers.below(EVERY.len()));
            if round % 3 != 2 {
                with_current(shadow, back, || {
                    for at in picked {
                        model.check(0, at, "parent reads");
                        model.write(0, at, numbers.next())?;
                    }
                    if clear {
                        vmclear(shadow)
                    } else {
                        Ok(())
                    }
                })?;
            }
            // In some rounds the VMM may save the machine between the child's write and its read.
            let save = round % 4 == 1;
            self.main.clear();
            for at in picked.into_iter().filter(|&at| self.model.writable(at)) {
                self.main.push(Form::Read, EVERY[at].0 as u64, 0);
                self.main
                    .push(Form::WriteMemory, EVERY[at].0 as u64, self.numbers.next());
                if save {
                    self.main.push(Form::Out, 0, 0);
                }
                self.main.push(Form::ReadMemory, EVERY[at].0 as u64, 0);
            }
            if !self.main.run("both sides")? {
                continue;
            }
            for steps in self.main.steps().chunks(if save { 4 } else { 3 }) {
                let at = EVERY
                    .iter()
                    .position(|&(encoding, _)| encoding as u64 == steps[0].field)
                    .unwrap_or(0);
                let found = (steps[0].value, self.model.expected(0, at));
                self.model.written(0, at, steps[1].field, steps[1].value);
                for (found, expected) in [
                    found,
                    (steps[steps.len() - 1].value, self.model.expected(0, at)),
                ] {
                    if found != expected {
                        log!(
                            "shadowing/both sides: FAIL: round {}: child reads {:#06x} {} as {:#x} instead of {:#x}",
                            round,
                            steps[0].field,
                            EVERY[at].1,
                            found,
                            expected
                        );
                    }
                    sum = fold(sum, found);
                }
            }
        }
        let seen = self.inspect("both sides")?;
        log!("shadowing/both sides: {:#x}, parent sees {:#x}", sum, seen);
        Ok(())
    }
}
