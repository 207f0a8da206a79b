// SPDX-License-Identifier: GPL-2.0-or-later
//! Programs made at random, each from a seed and its own number, that do to VMX whatever a hypervisor can do. All
//! that a guest may observe of it goes into a log, which must be the same whoever carries the program out.
//!
//! A program is a list of operations, each with random numbers of its own, so that one can be left out and the others
//! stay what they were. Left out is what differs from run to run on any processor: the TSC, what an exit leaves
//! undefined, cached translations that were not invalidated. `fields` and `edits` say what a program does not do
//! because the payload, its VMM or the kernel below would not survive it or would complain.

mod arena;
mod code;
mod edits;
mod enter;
mod fields;
mod log;
mod world;

use super::log as line;
use super::model::{fold, Numbers};
use crate::cpu;
use crate::vmx::field::*;
use crate::vmx::ops::{
    invept, invvpid, vmclear, vmptrld, vmptrst, vmread, vmwrite, vmxoff, vmxon, VmxError,
};
use crate::vmx::vmxon_region;
use log::Log;
use world::{World, VMCSS};

/// Fewest operations of a program, and how many more it may have.
const OPERATIONS: (usize, usize) = (12, 16);
/// How often one program is logged between two looks at all fields.
const ALL_FIELDS: u64 = 16;

/// What to run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Request {
    /// The programs' seed.
    pub seed: u64,
    /// Number of the first one.
    pub first: u64,
    /// How many in each batch.
    pub count: u64,
    /// The one whose log is printed in full, if any.
    pub show: Option<u64>,
    /// Its operations that are left out, a bit for each.
    pub without: u64,
}

impl Request {
    /// Reads `SEED:FIRST:COUNT[:SHOW[:WITHOUT]]`, decimal but for the last, which is hexadecimal.
    pub fn parse(text: &str) -> Option<Request> {
        let mut words = text.split(':');
        let mut number = || words.next()?.parse().ok();
        let mut request = Request {
            seed: number()?,
            first: number()?,
            count: number()?,
            show: number(),
            without: 0,
        };
        if let Some(bits) = words.next() {
            request.without = u64::from_str_radix(bits, 16).ok()?;
        }
        Some(request)
    }
}

/// The random numbers of a part of a program.
fn numbers(seed: u64, program: u64, part: u64) -> Numbers {
    let mut mixed = seed;
    for value in [program, part] {
        mixed = fold(mixed ^ 0x5bd1_e995, value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed ^= mixed >> 29;
    }
    let mut numbers = Numbers::new(mixed);
    numbers.next();
    numbers
}

/// Runs batch number `batch`.
pub fn run(request: Request, batch: u64) -> Result<(), VmxError> {
    let mut world = World::new()?;
    let from = request.first + batch * request.count;
    for program in from..from + request.count {
        let shown = request.show == Some(program);
        let without = if shown { request.without } else { 0 };
        let mut log = Log::new(program, shown);
        let result = one(&mut world, request.seed, program, without, &mut log);
        if let Err(why) = result {
            // What the harness itself does must work: it is logged like anything else.
            line!("fuzz {}: FAIL: ended early: {}", program, why);
            vmptrld(world.spare)?;
        }
        line!("fuzz {}: {:016x} {:029x}", program, log.sum(), log.steps());
    }
    world.restore_processor();
    vmptrld(world.spare)
}

/// Runs one program.
fn one(
    world: &mut World,
    seed: u64,
    program: u64,
    without: u64,
    log: &mut Log,
) -> Result<(), VmxError> {
    let mut first = numbers(seed, program, u64::MAX);
    world.reset(&mut first)?;
    for vmcs in &world.vmcs {
        log.does("kind", &[vmcs.kind as u64]);
    }
    let count = OPERATIONS.0 + first.below(OPERATIONS.1);
    for at in 0..count {
        log.begin(at);
        if without >> at & 1 == 1 {
            continue;
        }
        operation(world, &mut numbers(seed, program, at as u64), log)?;
    }
    log.begin(count);
    finish(world, &mut first, program % ALL_FIELDS == 0, log)
}

/// One operation.
fn operation(world: &mut World, numbers: &mut Numbers, log: &mut Log) -> Result<(), VmxError> {
    match numbers.below(100) {
        0..36 => enter::some(world, numbers, log),
        36..60 => {
            for _ in 0..1 + numbers.below(3) {
                edits::edit(world, numbers, log)?;
            }
            Ok(())
        }
        60..70 => enter::violate(world, numbers, log),
        70..78 => enter::inject(world, numbers, log),
        78..84 => switch(world, numbers, log),
        84..88 => odd(world, numbers, log),
        88..92 => edits::ept(world, numbers, log),
        92..95 => {
            for _ in 0..1 + numbers.below(4) {
                edits::bit(world, numbers, log);
            }
            Ok(())
        }
        95..98 => {
            read(numbers, 1 + numbers.clone().below(6), log);
            Ok(())
        }
        _ => {
            edits::memory(&world.arena, numbers);
            Ok(())
        }
    }
}

/// A result as a number.
fn number(result: &Result<(), VmxError>) -> u64 {
    match result {
        Ok(()) => 0,
        Err(VmxError::Invalid) => 1 << 32,
        Err(VmxError::Valid(error)) => 2 << 32 | *error as u64,
        Err(VmxError::Fault(fault)) => 3 << 32 | fault.vector << 16 | fault.error,
    }
}

/// Reads fields, those apart that are not defined.
fn read(numbers: &mut Numbers, count: usize, log: &mut Log) {
    for _ in 0..count {
        let (field, _) = EVERY[numbers.below(EVERY.len())];
        let high = is_64_bit(field) && numbers.below(8) == 0;
        if !fields::STALE.contains(&field) {
            note_field(field | high as u32, log);
        }
    }
}

fn note_field(field: u32, log: &mut Log) {
    let value = vmread(field);
    let error = value.map(|_| ());
    log.note("field", &[field as u64, value.unwrap_or(0), number(&error)]);
}

/// Another VMCS becomes current, by one way or another.
fn switch(world: &mut World, numbers: &mut Numbers, log: &mut Log) -> Result<(), VmxError> {
    let to = numbers.below(VMCSS);
    let region = world.vmcs[to].region;
    let how = numbers.below(8);
    log.does("switch", &[to as u64, how as u64]);
    match how {
        0..3 => {
            vmptrld(region)?;
            world.current = to;
        }
        3 => {
            vmclear(region)?;
            world.vmcs[to].launched = false;
            vmptrld(region)?;
            world.current = to;
        }
        4 => {
            // To and fro.
            let back = world.vmcs().region;
            vmptrld(region)?;
            read(numbers, 2, log);
            vmptrld(back)?;
        }
        5 => {
            // Fields of the shadow VMCS.
            let back = world.vmcs().region;
            vmclear(world.shadow)?;
            vmptrld(world.shadow)?;
            for _ in 0..3 {
                let at = numbers.below(fields::OF_CHILDREN.len());
                let field = fields::OF_CHILDREN[at] as u32;
                let result = vmwrite(field, numbers.next());
                log.note("shadow VMCS", &[field as u64, number(&result)]);
                note_field(field, log);
            }
            vmclear(world.shadow)?;
            vmptrld(back)?;
        }
        6 => {
            // A copy of another VMCS's region, with its state of launch.
            let from = numbers.below(VMCSS);
            if from != to {
                vmclear(world.vmcs[from].region)?;
                vmclear(region)?;
                arena::copy(world.vmcs[from].region, region, 1);
                world.vmcs[from].launched = false;
                world.vmcs[to].launched = false;
                world.vmcs[to].kind = world.vmcs[from].kind;
            }
            vmptrld(region)?;
            world.current = to;
        }
        _ => {
            // VMX operation ends and begins. KVM 7.3 spoils the next VMCS if the current one has just exited.
            vmptrld(world.spare)?;
            vmxoff()?;
            vmxon(vmxon_region())?;
            log.note("after VMXON", &[vmptrst()?]);
            vmptrld(region)?;
            world.current = to;
        }
    }
    log.note("current", &[vmptrst()?]);
    Ok(())
}

/// VMX instructions that fail, or that nobody needs.
fn odd(world: &mut World, numbers: &mut Numbers, log: &mut Log) -> Result<(), VmxError> {
    let which = numbers.below(8);
    let address = match numbers.below(8) {
        0 => 0,
        1 => world.arena.at(arena::page::DATA) | 8,
        2 => 1 << cpu::physical_bits(),
        3 => u64::MAX,
        4 => vmxon_region(),
        5 => 0x3000_0000,
        6 => world.arena.at(arena::page::DATA),
        _ => 1 << 63,
    };
    let descriptor = [
        [
            0,
            1,
            2,
            0x1_0000,
            0xffff,
            0x1e,
            world.arena.epts[0].ept.pointer(),
        ][numbers.below(7)],
        [0, 1 << 40, 1 << 47, 1][numbers.below(4)],
    ];
    let kind = [0, 1, 2, 3, 4, 1 << 32][numbers.below(6)];
    let bare = numbers.below(4) == 0;
    if bare {
        // Without a current VMCS.
        let region = world.vmcs().region;
        vmclear(region)?;
        world.vmcs().launched = false;
        let how = numbers.below(2) == 0;
        enter::bare(world, how, log);
    }
    let field = match numbers.below(3) {
        0 => fields::NONE[numbers.below(fields::NONE.len())],
        _ => EVERY[numbers.below(EVERY.len())].0,
    };
    let result = match which {
        // Page 0 and the data page are nobody's VMCS: VMCLEAR would write to the first.
        0 => vmptrld(address),
        1 if address != 0 => vmclear(address),
        2 => vmxon(address),
        3 | 4 => invept(kind, descriptor),
        5 => invvpid(kind, descriptor),
        6 => vmread(field).map(|value| {
            if !fields::STALE.contains(&field) {
                log.note("read", &[value]);
            }
        }),
        _ if fields::NONE.contains(&field) => vmwrite(field, 0),
        _ => Ok(()),
    };
    log.note(
        "odd",
        &[which as u64, address, kind, field as u64, number(&result)],
    );
    let error = vmread(VM_INSTRUCTION_ERROR);
    log.note("error", &[error.unwrap_or(0), number(&error.map(|_| ()))]);
    // Whatever was loaded, the program goes on with its own.
    let region = world.vmcs().region;
    log.note("current", &[vmptrst()?]);
    vmptrld(region)
}

/// The end of a program: fields, and all memory that children and processor have written.
fn finish(
    world: &mut World,
    numbers: &mut Numbers,
    every: bool,
    log: &mut Log,
) -> Result<(), VmxError> {
    for number in 0..VMCSS {
        let region = world.vmcs[number].region;
        vmptrld(region)?;
        if every {
            for &(field, _) in EVERY
                .iter()
                .filter(|(field, _)| !fields::STALE.contains(field))
            {
                note_field(field, log);
            }
        } else {
            read(numbers, 3, log);
        }
    }
    vmptrld(world.spare)?;
    for number in 0..VMCSS {
        let region = world.vmcs[number].region;
        vmclear(region)?;
        log.note("region", &[number as u64, world.region_sum(region)]);
    }
    log.note("shadow", &[world.region_sum(world.shadow)]);
    for page in 0..arena::PAGES {
        let address = world.arena.at(page);
        let sum = match page {
            arena::page::STACK..arena::page::GDT => arena::stack_sum(address),
            _ => super::model::page_sum(address),
        };
        log.note("page", &[page, sum]);
        if (arena::page::STACK..arena::page::GDT).contains(&page) {
            for offset in (0..crate::memory::PAGE).step_by(8) {
                let value = arena::stack_word(address + offset);
                if value != 0 {
                    log.does("push", &[offset, value]);
                }
            }
        }
    }
    for page in 0..arena::TOUCHED + 8 {
        let address = protocol::ports::TOUCH_BASE + page * crate::memory::PAGE;
        log.note("touched", &[page, super::model::page_sum(address)]);
    }
    for (number, tables) in (0..).zip(&world.arena.epts) {
        for page in tables.pages() {
            log.note("EPT", &[number, super::model::page_sum(page)]);
        }
    }
    for page in 0..world::list::PAGES {
        let address = world.lists + page * crate::memory::PAGE;
        log.note("list", &[page, super::model::page_sum(address)]);
    }
    Ok(())
}
