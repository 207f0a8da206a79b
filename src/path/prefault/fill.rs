// SPDX-License-Identifier: GPL-2.0
//! Filling entries of EPT02, and comparing what would be filled with what stock KVM fills.

use super::{Memory, Reason, NUMBER};
use crate::{
    bindings,
    kvm::{
        self,
        ept02::{Leaf, MmuLock, Translation, ENTRIES, PREFETCH},
        host_pages::BATCH,
        Vcpu,
    },
    path::{CounterSet, Counters},
    policy::{
        ept::{self, Page, Rights},
        window::{self, Block, MIN},
    },
};
use core::{
    mem::MaybeUninit,
    ops::Range,
    sync::atomic::{AtomicBool, Ordering},
};
use kernel::prelude::*;

/// Entries that are looked at under one hold of the lock.
const CHUNK: usize = 16;
/// Pages the host does not have, after which a fill gives up.
const PATIENCE: usize = 4;

pub(super) const RIGHTS: Rights = Rights {
    read: bindings::MTK_ACC_READ as u64,
    write: bindings::MTK_ACC_WRITE as u64,
    exec: bindings::MTK_ACC_EXEC as u64,
    user_exec: bindings::MTK_ACC_USER_EXEC as u64,
};

/// Frame of L1's local APIC (`APIC_DEFAULT_PHYS_BASE`). KVM may have a page there for its own use, which a fault of L2
/// never gets (`kvm_mmu_faultin_pfn()`), but prefetching would.
const APIC_FRAME: u64 = 0xfee00;

/// What became of a fill.
#[derive(Default)]
struct Outcome {
    /// Index of the entry that L2 waits for.
    aim: Option<usize>,
    /// It was filled.
    hit: bool,
    /// Entries of the last chunk that EPT12 maps and EPT02 did not.
    mapped: usize,
    /// Entries that were filled.
    filled: usize,
    /// Empty ones that EPT12 does not map, or not for us.
    wanting: usize,
    /// Runs of pages that the host did not have.
    missed: usize,
    /// Why it ended early.
    reason: Option<Reason>,
}

/// Entries side by side that follow each other in L1's memory, too, with the same rights.
#[derive(Clone, Copy)]
struct Run {
    at: usize,
    count: usize,
    to: Page,
}

impl Run {
    /// Whether `page` at `index` goes on with the run.
    #[inline(always)]
    fn is_followed_by(&self, index: usize, page: Page) -> bool {
        let gfn = self.to.gfn.wrapping_add(self.count as u64);
        self.count < BATCH && index == self.at + self.count && page == Page { gfn, ..self.to }
    }

    /// Has KVM map the run, under the lock. Leaves out pages that the host does not have.
    ///
    /// # Safety
    ///
    /// The run's entries were found empty under this hold of the lock, under which no addresses are being invalidated.
    unsafe fn fill(mut self, vcpu: Vcpu, lock: &MmuLock, leaf: &Leaf<'_>, out: &mut Outcome) {
        while self.count != 0 && out.reason.is_none() {
            // Who waits has a fault of its own; stock holds the lock for as many, too.
            let most = if lock.is_contended() { PREFETCH } else { BATCH };
            let ask = self.count.min(vcpu.spare_rmap_entries()).min(most);
            if ask == 0 {
                out.reason = Some(Reason::NoMemory);
                return;
            }
            let to = Translation {
                gfn: self.to.gfn,
                access: self.to.access,
            };
            // SAFETY: By this function's contract; no more than `spare_rmap_entries()`.
            let done = unsafe { leaf.map(self.at, ask, to) };
            let range = self.at..self.at + done;
            out.filled += done;
            if kvm::runs_on_hypervisor() {
                range.clone().for_each(|i| leaf.mark_accessed(i));
            }
            out.hit |= out.aim.is_some_and(|aim| range.contains(&aim));
            let mut past = done;
            if done < ask {
                // Past the page that the host does not have.
                past += 1;
                out.missed += 1;
                if out.missed >= PATIENCE {
                    out.reason = Some(Reason::NotBacked);
                }
            }
            if lock.is_contended() {
                out.reason = Some(Reason::Busy);
            }
            self.at += past;
            self.count -= past;
            self.to.gfn = self.to.gfn.wrapping_add(past as u64);
        }
    }
}

/// Fills empty entries of the range, at most [`CHUNK`], under one hold of the lock.
fn fill_chunk(vcpu: Vcpu, gpa: u64, range: Range<usize>, out: &mut Outcome) {
    let lock = vcpu.lock_mmu();
    if lock.is_invalidating() {
        out.reason = Some(Reason::Busy);
        return;
    }
    let Some(leaf) = lock.leaf(gpa) else {
        out.reason = Some(Reason::NoTable);
        return;
    };
    if leaf.large_page().is_some() {
        let pages = range.map(|index| {
            let Translation { gfn, access } = leaf.translation(index);
            // What cannot be read is left to stock.
            let readable = access & RIGHTS.read != 0;
            (index, readable.then_some(Page { gfn, access }))
        });
        // SAFETY: Looked at above.
        return unsafe { fill_pages(vcpu, &lock, &leaf, pages, out) };
    }
    let mut buffer = [MaybeUninit::uninit(); CHUNK];
    let Some(entries) = leaf.read_ept12(range.clone(), &mut buffer) else {
        out.reason = Some(Reason::NotMapped);
        return;
    };
    let (granted, reserved) = (leaf.granted(), vcpu.reserved_gpa_bits());
    let mut last: Option<(u64, Page)> = None;
    let pages = range.zip(entries).map(|(index, &entry)| {
        let page = match last {
            Some((before, page)) if ept::follows(before, entry, reserved) => {
                let gfn = page.gfn.wrapping_add(1);
                Some(Page { gfn, ..page })
            }
            _ => ept::page(entry, reserved, granted, &RIGHTS),
        };
        last = page.map(|page| (entry, page));
        (index, page)
    });
    // SAFETY: Looked at above.
    unsafe { fill_pages(vcpu, &lock, &leaf, pages, out) };
}

/// Fills those entries of a table that are empty with the pages that EPT12 has there.
///
/// # Safety
///
/// Under this hold of the lock no addresses are being invalidated.
#[inline(always)]
unsafe fn fill_pages(
    vcpu: Vcpu,
    lock: &MmuLock,
    leaf: &Leaf<'_>,
    pages: impl Iterator<Item = (usize, Option<Page>)>,
    out: &mut Outcome,
) {
    let mut run: Option<Run> = None;
    for (index, page) in pages {
        if !leaf.is_empty(index) {
            continue;
        }
        let Some(to) = page.filter(|to| to.gfn != APIC_FRAME) else {
            out.wanting += 1;
            continue;
        };
        out.mapped += 1;
        match &mut run {
            Some(r) if r.is_followed_by(index, to) => r.count += 1,
            _ => {
                let new = Run {
                    at: index,
                    count: 1,
                    to,
                };
                if let Some(full) = run.replace(new) {
                    // SAFETY: Only empty entries join a run; by this function's contract.
                    unsafe { full.fill(vcpu, lock, leaf, out) };
                    if out.reason.is_some() {
                        return;
                    }
                }
            }
        }
    }
    if let Some(last) = run {
        // SAFETY: As above.
        unsafe { last.fill(vcpu, lock, leaf, out) };
    }
}

/// Fills the empty entries of a block, from `page` on upwards and then downwards, in both directions until a chunk beyond the
/// first has none that EPT12 maps. `aims`: L2 waits for the page. May sleep.
fn fill(vcpu: Vcpu, block: &Block, page: u64, aims: bool) -> Outcome {
    let aim = window::index(page);
    let mut out = Outcome {
        aim: aims.then_some(aim),
        ..Outcome::default()
    };
    let start = window::index(block.first);
    let end = (start + usize::from(block.count)).min(ENTRIES);
    let middle = aim / CHUNK * CHUNK;
    let upwards = (middle..end).step_by(CHUNK);
    let downwards = (0..middle).step_by(CHUNK).rev();
    let mut chunks = |first: usize| {
        let range = first.max(start)..(first + CHUNK).min(end);
        if range.is_empty() {
            return false;
        }
        // Stock makes sure of as many before each fault; a chunk may need more than are left.
        if vcpu.spare_rmap_entries() < range.len() && !vcpu.refill_mmu_caches(true) {
            out.reason = Some(Reason::NoMemory);
        } else {
            out.mapped = 0;
            fill_chunk(vcpu, block.first << 12, range, &mut out);
        }
        // In the first there may be nothing left but what was filled just now, and the guest is about to leave it.
        out.reason.is_none() && (out.mapped != 0 || first == middle)
    };
    upwards.take_while(|&first| chunks(first)).for_each(drop);
    downwards.take_while(|&first| chunks(first)).for_each(drop);
    out
}

/// Entries of a block that are looked at to judge it.
const SAMPLE: usize = 64;

/// How much of a block was used: accessed pages and present pages of a sample. `None` if its table is gone.
fn used(vcpu: Vcpu, block: &Block) -> Option<(u16, u16)> {
    let lock = vcpu.lock_mmu();
    let leaf = lock.leaf(block.first << 12)?;
    let start = window::index(block.first);
    let (mut used, mut present) = (0, 0);
    // Odd, so that no stride of the guest's falls in with it.
    let step = usize::from(block.count) / SAMPLE | 1;
    for index in (start..(start + usize::from(block.count)).min(ENTRIES)).step_by(step) {
        present += u16::from(leaf.is_present(index));
        used += u16::from(leaf.is_accessed(index));
    }
    Some((used, present))
}

fn count(counters: &Counters, out: &Outcome) {
    match out.reason {
        Some(reason) => counters.fall_back(reason as usize),
        None if out.filled == 0 => counters.fall_back(Reason::NotMapped as usize),
        None => {}
    }
    if out.filled > 0 {
        counters.taken.bump();
    }
}

/// L0 has served a fault of L2 at `gpa` with a page of 4 KiB: fills around it. `is_split`: of a large one. May sleep.
pub(super) fn around(
    vcpu: Vcpu,
    memory: &mut Memory,
    counters: &CounterSet,
    gpa: u64,
    is_split: bool,
) {
    let counters = counters.path::<NUMBER>();
    if vcpu.in_smm() {
        counters.fall_back(Reason::Unusual as usize);
        return;
    }
    let root = vcpu.ept12_root();
    if core::mem::replace(&mut memory.root, root) != root {
        memory.window.other_tables();
        memory.whole.other_tables();
    }
    let window = match is_split {
        true => &mut memory.whole,
        false => &mut memory.window,
    };
    let (block, due) = window.fault(gpa >> 12, super::limit());
    // In a guest accessed flags say nothing: what is filled has them.
    if due.count != 0 && !kvm::runs_on_hypervisor() {
        if let Some((used, present)) = used(vcpu, &due) {
            window.judge(used, present);
        }
    }
    if block.count > 1 << MIN {
        let out = fill(vcpu, &block, gpa >> 12, false);
        window.filled(out.filled, out.wanting + out.missed);
        count(counters, &out);
    }
}

/// L1 has resumed L2, which waits for the page at `gpa`. May sleep.
pub(super) fn awaited(vcpu: Vcpu, memory: &mut Memory, set: &CounterSet, gpa: u64) {
    let counters = set.path::<NUMBER>();
    if vcpu.in_smm() {
        counters.fall_back(Reason::Unusual as usize);
        return;
    }
    let page = gpa >> 12;
    let near = Block {
        first: page & !(PREFETCH as u64 - 1),
        count: PREFETCH as u16,
    };
    let mut out = fill(vcpu, &near, page, true);
    // Stock has no table there yet, or there is to be a large page.
    let asked = match (out.reason, memory.reflected) {
        (Some(Reason::NoTable), Some(fault)) if !kvm::runs_on_hypervisor() => {
            fault.ask_again(vcpu, vcpu.ept12_root())
        }
        _ => None,
    };
    if let Some(made) = asked {
        out.reason = None;
        out.filled = 1;
        out.hit = true;
        if made.level == 1 {
            around(vcpu, memory, set, gpa, made.is_split);
        }
    }
    count(counters, &out);
    if out.hit {
        counters.saved_exits.bump();
    }
    // More than the one page: L1 maps ahead, too.
    if out.filled > PREFETCH / 2 {
        around(vcpu, memory, set, gpa, false);
    }
}

/// Stock has served a fault at `gpa`: compares what it made of EPT12 with what this path would have.
pub(super) fn compare(vcpu: Vcpu, counters: &CounterSet, gpa: u64) {
    let counters = counters.path::<NUMBER>();
    let lock = vcpu.lock_mmu();
    let Some(leaf) = lock.leaf(gpa) else {
        counters.fall_back(Reason::NoTable as usize);
        return;
    };
    if leaf.large_page().is_some() {
        return compare_large(&leaf, counters, gpa);
    }
    let aim = window::index(gpa >> 12);
    let first = aim & !(PREFETCH - 1);
    let mut buffer = [MaybeUninit::uninit(); PREFETCH];
    let Some(entries) = leaf.read_ept12(first..first + PREFETCH, &mut buffer) else {
        counters.fall_back(Reason::NotMapped as usize);
        return;
    };
    for (index, &entry) in (first..).zip(entries) {
        // What KVM does not watch may have changed since, unless it is new and nobody else could change it.
        let fresh = !leaf.is_unsync() || index == aim && vcpu.is_alone();
        if !leaf.is_present(index) || !fresh {
            continue;
        }
        counters.checked.bump();
        let stock = leaf.translation(index);
        let same = |page: Page| page.gfn == stock.gfn && page.access == stock.access;
        // What cannot be read is left to stock, so that there is nothing to compare.
        let judged = stock.access & RIGHTS.read != 0;
        let ours = ept::page(entry, vcpu.reserved_gpa_bits(), leaf.granted(), &RIGHTS);
        if judged && !ours.is_some_and(same) {
            report(counters, entry, stock);
        }
    }
}

/// The same for a table that stands for a large page: stock gives its entries the rights of all of it.
fn compare_large(leaf: &Leaf<'_>, counters: &Counters, gpa: u64) {
    let aim = window::index(gpa >> 12);
    let first = aim & !(PREFETCH - 1);
    for index in first..first + PREFETCH {
        let Some(rights) = leaf.rights(index, &RIGHTS) else {
            continue;
        };
        counters.checked.bump();
        // KVM takes writing away for reasons of its own.
        let ours = leaf.translation(index);
        if rights | RIGHTS.write != ours.access | RIGHTS.write || rights & !ours.access != 0 {
            let access = rights;
            report(counters, 0, Translation { access, ..ours });
        }
    }
}

static REPORTED: AtomicBool = AtomicBool::new(false);

#[cold]
fn report(counters: &Counters, entry: u64, stock: Translation) {
    counters.mismatches.bump();
    if !REPORTED.swap(true, Ordering::Relaxed) {
        let (gfn, access) = (stock.gfn, stock.access);
        pr_warn!(
            "prefault: stock makes frame {gfn:#x} with rights {access:#x} of EPT12's {entry:#x}\n"
        );
    }
}
