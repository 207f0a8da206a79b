// SPDX-License-Identifier: GPL-2.0
//! A walk of all of EPT02 that compares it with EPT12 and the memory slots.
//!
//! What may differ without being wrong: a last-level table that L1 may write to without KVM's knowing (*unsync*) can
//! have old entries until L1 flushes; they are compared with KVM's record of what they were made of. All
//! other tables of EPT12 KVM protects against writes, and it drops what a write changes. Between the write and that,
//! and in the middle of a change to the slots or to the log, another thread may be seen half-way, so something counts
//! as wrong only if it still is a while later. What the host or the VMM is about to change, or cannot be found out without sleeping,
//! is counted as not judged. KVM's own page for L1's local APIC is not L2's to reach, but stock's prefetching may map it, so it is
//! counted by itself.

use super::{fill::RIGHTS, Memory, NUMBER};
use crate::{
    bindings,
    kvm::{
        self,
        shadow_mmu::{Cursor, Next, Table, Tables, Vm, CHUNK},
        visit::visit,
        Vcpu,
    },
    path::CounterSet,
    policy::{
        detour::Rate,
        ept::ADDRESS,
        mode::Mode,
        reach::{self, Place, Slot, Target, Wrong},
    },
    state,
};
use core::{
    ops::Range,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};
use kernel::{fmt, prelude::*};

/// Findings that are named.
const NAMED: usize = 8;
/// Walks in which something must be found to count, and milliseconds between them.
const PASSES: usize = 3;
const PAUSE: u32 = 20;
/// VMs that are looked at for one reading of the file.
const VMS: usize = 64;

/// Something that is wrong.
#[derive(Clone, Copy)]
struct Finding {
    role: u32,
    gfn: u64,
    index: usize,
    /// The entry of EPT12, or 0 where none was read.
    ept12: u64,
    ept02: u64,
    wrong: Wrong,
}

impl Finding {
    fn is_again(&self, other: &Finding) -> bool {
        (self.role, self.gfn, self.index) == (other.role, other.gfn, other.index)
    }
}

impl core::fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} table {:#x} role {:#x} entry {}: ept12 {:#x} ept02 {:#x}",
            self.wrong.name(),
            self.gfn,
            self.role,
            self.index,
            self.ept12,
            self.ept02
        )
    }
}

/// What a walk has seen.
#[derive(Default)]
pub(crate) struct Report {
    /// VMs.
    vms: u64,
    /// Tables of EPT02.
    tables: u64,
    /// Present entries.
    entries: u64,
    /// Those that map a page.
    pages: u64,
    /// Those in tables that KVM does not watch.
    unsync: u64,
    /// Frames that are the VMM's.
    frames: u64,
    /// What could not be judged.
    unjudged: u64,
    /// Pages of KVM's own.
    private: u64,
    /// What is wrong.
    violations: u64,
    named: [Option<Finding>; NAMED],
}

impl Report {
    fn found(&mut self, finding: Finding) {
        if let Some(free) = self.named.iter_mut().find(|n| n.is_none()) {
            *free = Some(finding);
        }
        self.violations += 1;
    }

    /// Keeps what was found before, too.
    fn confirm(&mut self, before: &Report) {
        let named = before.named.iter().flatten();
        let again = |new: &Finding| named.clone().any(|old| old.is_again(new));
        for finding in &mut self.named {
            *finding = finding.filter(again);
        }
        // More than can be named, twice, is not by chance.
        let many = NAMED as u64;
        if before.violations <= many || self.violations <= many {
            self.violations = self.named.iter().flatten().count() as u64;
        }
    }

    fn add(&mut self, other: &Report) {
        self.vms += other.vms;
        self.tables += other.tables;
        self.entries += other.entries;
        self.pages += other.pages;
        self.unsync += other.unsync;
        self.frames += other.frames;
        self.unjudged += other.unjudged;
        self.private += other.private;
        let rest = other.violations;
        other.named.iter().flatten().for_each(|f| self.found(*f));
        self.violations += rest - other.named.iter().flatten().count() as u64;
    }
}

/// A page that an entry of EPT02 maps: is it the slot's, and the VMM's?
fn judge_page(
    tables: &Tables<'_>,
    page: Place,
    entry: u64,
    frames: u64,
    out: &mut Report,
) -> Result<(), Wrong> {
    let writable = page.access & RIGHTS.write != 0;
    // Of a large page the first frame and the last.
    for ahead in [0, frames - 1] {
        let slot = tables.slot(page.gfn + ahead);
        if slot.as_ref().is_some_and(|slot| slot.moving) {
            out.unjudged += 1;
            return Ok(());
        }
        if slot.as_ref().is_some_and(|slot| slot.private) {
            out.private += 1;
            return Ok(());
        }
        let rules = slot.as_ref().map(|slot| Slot {
            read_only: slot.read_only,
            in_log: slot.in_log,
        });
        reach::slot_allows(writable, rules)?;
        let address = slot.map_or(0, |slot| slot.address);
        let there = match tables.is_invalidating() {
            true => None,
            false => tables.frame(address, writable),
        };
        match there {
            None => out.unjudged += 1,
            Some(frame) if frame == (entry & ADDRESS) >> 12 | ahead => out.frames += 1,
            Some(_) => return Err(Wrong::OtherPage),
        }
        if frames == 1 {
            break;
        }
    }
    Ok(())
}

/// Some entries of a table.
fn look(vm: Vm, tables: &Tables<'_>, table: &Table<'_>, range: Range<usize>, out: &mut Report) {
    let (place, level) = (table.place(), table.level());
    let (direct, unsync) = (table.is_direct(), table.is_unsync());
    let mut ept12 = [0; CHUNK];
    let known = !direct && tables.read_guest(place.gfn, &range, &mut ept12);
    let rules = reach::Table {
        level,
        granted: place.access,
        flags: table.has_flags(),
        user_exec: table.has_user_exec(),
        reserved: vm.reserved_gpa_bits(),
    };
    for (index, ept12) in range.zip(ept12) {
        let Some(entry) = table.entry(index) else {
            continue;
        };
        out.entries += 1;
        let frames = reach::span(level);
        let whole = Place {
            gfn: place.gfn + index as u64 * frames,
            access: place.access,
        };
        let maps_page = table.maps_page(entry);
        let seen = if maps_page {
            let gfn = table.record(index).map_or(whole.gfn, |record| record.gfn);
            let access = RIGHTS.of(entry);
            Some(Target::Page(Place { gfn, access }))
        } else {
            (tables.child(entry))
                .filter(|child| child.is_of_ept02() && child.level() + 1 == level)
                .map(|child| match child.is_direct() {
                    true => Target::Page(child.place()),
                    false => Target::Table(child.place()),
                })
        };
        let may = if direct {
            Some(Target::Page(whole))
        } else if unsync {
            out.unsync += 1;
            table.record(index).map(|record| {
                let access = record.access & place.access;
                Target::Page(Place { access, ..record })
            })
        } else {
            known.then(|| reach::target(ept12, &rules, &RIGHTS))
        };
        let judgement = match (seen, may) {
            (None, _) => Err(Wrong::Elsewhere),
            (Some(_), None) => {
                out.unjudged += 1;
                Ok(())
            }
            (Some(seen), Some(may)) => reach::compare(seen, may),
        };
        let judgement = judgement.and_then(|()| match seen {
            Some(Target::Page(page)) if maps_page => {
                out.pages += 1;
                judge_page(tables, page, entry, frames, out)
            }
            _ => Ok(()),
        });
        if let Err(wrong) = judgement {
            out.found(Finding {
                role: table.role(),
                gfn: place.gfn,
                index,
                ept12: if known { ept12 } else { 0 },
                ept02: entry,
                wrong,
            });
        }
    }
}

/// One walk.
///
/// # Safety
///
/// The current task has the VMM's address space, and holds no lock. May sleep.
unsafe fn pass(vm: Vm) -> Report {
    let mut out = Report::default();
    let mut cursor = Cursor::default();
    loop {
        {
            // SAFETY: By this function's contract.
            let tables = unsafe { vm.lock() };
            match tables.next(&mut cursor) {
                Next::Entries(table, range) if table.is_of_ept02() => {
                    out.tables += u64::from(range.start == 0);
                    look(vm, &tables, &table, range, &mut out);
                }
                Next::Entries(..) => cursor.leave_table(),
                Next::Later => {}
                Next::End => return out,
            }
        }
        // SAFETY: In process context, without a lock.
        unsafe { bindings::schedule() };
    }
}

/// As many as it takes to be sure.
///
/// # Safety
///
/// As for `pass`.
unsafe fn walk(vm: Vm) -> Report {
    // SAFETY: By this function's contract, here and below.
    let mut report = unsafe { pass(vm) };
    for _ in 1..PASSES {
        if report.violations == 0 {
            break;
        }
        // SAFETY: Process context.
        unsafe { bindings::msleep(PAUSE) };
        // SAFETY: As above.
        let mut next = unsafe { pass(vm) };
        next.confirm(&report);
        report = next;
    }
    report.vms = 1;
    account(&report);
    report
}

/// Sums over all walks since the module was loaded.
static WALKS: AtomicU64 = AtomicU64::new(0);
static ENTRIES: AtomicU64 = AtomicU64::new(0);
static VIOLATIONS: AtomicU64 = AtomicU64::new(0);
static REPORTED: AtomicBool = AtomicBool::new(false);

fn account(report: &Report) {
    WALKS.fetch_add(1, Ordering::Relaxed);
    ENTRIES.fetch_add(report.entries, Ordering::Relaxed);
    VIOLATIONS.fetch_add(report.violations, Ordering::Relaxed);
    if let Some(finding) = report.named.iter().flatten().next() {
        if !REPORTED.swap(true, Ordering::Relaxed) {
            let (wrong, gfn, index) = (finding.wrong.name(), finding.gfn, finding.index);
            let (ept12, ept02) = (finding.ept12, finding.ept02);
            pr_warn!(
                "EPT02: {wrong}: table {gfn:#x} entry {index}: ept12 {ept12:#x} ept02 {ept02:#x}\n"
            );
        }
    }
}

/// The file `ept02` in debugfs: walks the tables of every VM of which a vCPU has a state. May sleep.
pub(crate) fn show(f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let mut report = Report::default();
    if kvm::uses_ept() {
        let mut vms: [Option<Vm>; VMS] = [None; VMS];
        state::for_each_vcpu(|raw, _| {
            // SAFETY: Neither vCPU nor VM goes meanwhile.
            let vm = unsafe { Vm::from_raw(raw) };
            if vms.iter().flatten().any(|known| known.is(vm)) {
                return;
            }
            let Some(free) = vms.iter_mut().find(|known| known.is_none()) else {
                return;
            };
            *free = Some(vm);
            // SAFETY: In a thread that has borrowed it.
            let mut work = || report.add(&unsafe { walk(vm) });
            // SAFETY: KVM holds a reference to the address space as long as the VM is there.
            // One whose VMM has just ended has no guest that runs.
            let _ = unsafe { visit(vm.mm(), &mut work) };
        });
    }
    writeln!(f, "vms {}", report.vms)?;
    writeln!(f, "tables {}", report.tables)?;
    writeln!(f, "entries {}", report.entries)?;
    writeln!(f, "pages {}", report.pages)?;
    writeln!(f, "unsync {}", report.unsync)?;
    writeln!(f, "frames {}", report.frames)?;
    writeln!(f, "private {}", report.private)?;
    writeln!(f, "unjudged {}", report.unjudged)?;
    writeln!(f, "violations {}", report.violations)?;
    for finding in report.named.iter().flatten() {
        writeln!(f, "violation: {finding}")?;
    }
    writeln!(f, "all_walks {}", WALKS.load(Ordering::Relaxed))?;
    writeln!(f, "all_entries {}", ENTRIES.load(Ordering::Relaxed))?;
    writeln!(f, "all_violations {}", VIOLATIONS.load(Ordering::Relaxed))
}

/// The knob `walk`.
static RATE: AtomicU64 = AtomicU64::new(0);
/// What holds in mode `check` while the knob is 0.
const RATE_OF_CHECK: Rate = Rate {
    every: 1024,
    seed: 0,
};

/// The knob's value.
pub(super) fn rate() -> Rate {
    Rate::from_word(RATE.load(Ordering::Relaxed))
}

/// Sets the knob.
pub(super) fn set_rate(rate: Rate) {
    RATE.store(rate.to_word(), Ordering::Relaxed);
}

/// After a fault of L2 that stock has served: a walk now and then. May sleep.
pub(super) fn now_and_then(vcpu: Vcpu, memory: &mut Memory, counters: &CounterSet, mode: Mode) {
    let word = match (RATE.load(Ordering::Relaxed), mode) {
        (0, Mode::Check) => RATE_OF_CHECK.to_word(),
        (word, _) => word,
    };
    if word == 0 || !memory.chance.take(word) || !vcpu.uses_ept02() {
        return;
    }
    // SAFETY: In a handler of an exit, the task has the VMM's address space.
    let report = unsafe { walk(Vm::of(vcpu)) };
    let counters = counters.path::<NUMBER>();
    counters.checked.add(report.entries);
    counters.mismatches.add(report.violations);
}
