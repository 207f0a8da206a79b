// SPDX-License-Identifier: GPL-2.0
//! nested_get_vmcs12_pages(): the guest pages that a vmcs12 names, which KVM looks up and pins when L2 is entered and
//! lets go of when it exits.
//!
//! Pages stay pinned while L1 runs, a few per vCPU, and are given to KVM again when L2 is entered with the same
//! addresses, nothing having changed that leads from such an address to a page: memory slots (their generation) and the
//! VMM's mappings (KVM counts their invalidations; any of them, anywhere in the VM's memory, counts here). A page that
//! the VMM takes away meanwhile is therefore looked up anew, as on stock, on the next entry. Let go of is everything that
//! is kept when something has changed, when the vCPU leaves KVM_RUN, and when VMX operation ends. While KVM logs
//! writes to a page, that page is not kept, so that KVM marks it on every exit.
//!
//! L1's bitmap of MSRs is read where it lies, word by word, instead of being pinned.

use super::{mismatch, mode, takes_detour, Reason, NUMBER};
use crate::{
    bindings,
    hook::{Continuation, HookId, InFlight, Verdict},
    kvm::{
        guest_memory::{GuestMemory, SrcuGuard},
        vmcs12_pages::{HostMap, MsrBitmap, Stamp, Wanted, USES},
        Vcpu, Vmcs12,
    },
    path::{CounterSet, Local},
    policy::mode::Mode,
    state,
};
use core::sync::atomic::{AtomicBool, Ordering};
use kernel::prelude::*;

const HOOK: HookId = HookId::GET_PAGES;
/// Most pages that one vCPU keeps.
const SLOTS: usize = 8;

/// A page that is kept.
#[derive(Clone, Copy)]
struct Slot {
    map: HostMap,
    /// KVM has it, and unpins it unless it is taken back.
    lent: bool,
    used: u64,
}

/// What is kept for one vCPU.
///
/// # Invariants
///
/// Each slot that is not lent pins its page. `stamp` is from before the look-up of any of them, and their
/// writes are not logged with these slots.
pub(super) struct Memory {
    slots: [Option<Slot>; SLOTS],
    stamp: Option<Stamp>,
    clock: u64,
    /// The stock code has not written KVM's bitmap of MSRs of vmcs02 since this part has.
    own_bitmap: bool,
    /// Mode `check`: frames that the stock code found at `stamp`, by the guest's frame.
    seen: [Option<(u64, u64)>; SLOTS],
}

impl Memory {
    pub(super) const NEW: Memory = Memory {
        slots: [None; SLOTS],
        stamp: None,
        clock: 0,
        own_bitmap: false,
        seen: [None; SLOTS],
    };

    /// Of pages nothing is kept outside KVM_RUN.
    pub(super) fn clear(&mut self) {
        self.own_bitmap = false;
        self.seen = [None; SLOTS];
    }

    fn is_holding(&self) -> bool {
        self.slots.iter().flatten().any(|slot| !slot.lent)
    }

    /// KVM has unpinned what it was lent and not asked for again.
    #[inline(always)]
    fn forget_lent(&mut self) {
        for slot in &mut self.slots {
            if slot.is_some_and(|slot| slot.lent) {
                *slot = None;
            }
        }
    }

    /// Lets go of everything.
    ///
    /// # Safety
    ///
    /// The vCPU is loaded by the current task, and `_srcu` is its VM's.
    unsafe fn release(&mut self, vcpu: Vcpu, _srcu: &SrcuGuard) {
        for slot in self.slots.iter_mut().filter_map(Option::take) {
            if !slot.lent {
                // SAFETY: By this function's contract and the type's invariants.
                unsafe { vcpu.release_page(slot.map) };
            }
        }
    }

    /// The slots of the pages that are wanted, if all are kept.
    #[inline(always)]
    fn find(&self, wanted: &Wanted) -> Option<[usize; USES.len()]> {
        let mut places = [SLOTS; USES.len()];
        for n in 0..USES.len() {
            let Some(address) = wanted[n] else {
                continue;
            };
            let (before, _) = places.split_at(n);
            let place = self.slots.iter().enumerate().position(|(at, slot)| {
                slot.is_some_and(|slot| !slot.lent && slot.map.gfn() == address >> 12)
                    && !before.contains(&at)
            })?;
            places[n] = place;
        }
        Some(places)
    }

    /// Keeps a page that KVM has pinned since `stamp`. `false` if KVM must have it.
    ///
    /// # Safety
    ///
    /// As for `release`; if it returns `true` the caller takes the page from KVM.
    unsafe fn keep(&mut self, vcpu: Vcpu, map: HostMap) -> bool {
        self.clock += 1;
        let used = self.clock;
        let was_lent =
            self.slots.iter_mut().flatten().find(|slot| {
                slot.lent && slot.map.gfn() == map.gfn() && slot.map.pfn() == map.pfn()
            });
        if let Some(slot) = was_lent {
            *slot = Slot {
                map,
                lent: false,
                used,
            };
            return true;
        }
        if !vcpu.is_unlogged(map.gfn()) {
            return false;
        }
        let age = |slot: &Option<Slot>| match slot {
            None => 0,
            Some(Slot { lent: true, .. }) => u64::MAX,
            Some(slot) => slot.used,
        };
        let Some(place) = self.slots.iter_mut().min_by_key(|slot| age(slot)) else {
            return false;
        };
        match *place {
            Some(Slot { lent: true, .. }) => return false,
            Some(old) => {
                // SAFETY: By this function's contract; it is not lent.
                unsafe { vcpu.release_page(old.map) };
            }
            None => (),
        }
        *place = Some(Slot {
            map,
            lent: false,
            used,
        });
        true
    }
}

/// Tells a thread that switches the path off. What is lent to KVM still counts: it comes back.
#[inline(always)]
fn publish(memory: &Memory, counters: &CounterSet) {
    let holding = memory.is_holding();
    if counters.nested_switch.pages.is_holding() != holding {
        // Whose thread may have to be sent out.
        counters.fields.note_thread();
        counters
            .nested_switch
            .pages
            .0
            .store(holding, Ordering::Release);
    }
}

/// What to give KVM, if everything is known.
#[inline(always)]
fn plan(
    vcpu: Vcpu,
    m: Vmcs12,
    memory: &mut Memory,
) -> Result<([usize; USES.len()], Wanted, Option<MsrBitmap>), Reason> {
    memory.forget_lent();
    let wanted = vcpu.wanted_pages(m).ok_or(Reason::Unusual)?;
    let stamp = vcpu.memory_stamp().ok_or(Reason::Unusual)?;
    if memory.stamp != Some(stamp) {
        return Err(Reason::Changed);
    }
    let places = memory.find(&wanted).ok_or(Reason::New)?;
    // SAFETY: In the handler of nested_get_vmcs12_pages(), which KVM calls under its SRCU lock.
    let mut guest = unsafe { GuestMemory::new(vcpu) };
    let bitmap = vcpu
        .merge_msr_bitmap(m, &mut guest)
        .ok_or(Reason::Unusual)?;
    Ok((places, wanted, bitmap))
}

/// Handler of nested_get_vmcs12_pages().
#[no_mangle]
extern "C" fn mtk_on_get_pages(raw: *mut bindings::kvm_vcpu, cont: Continuation) -> Verdict {
    // SAFETY: The hooked function's own argument, in its handler.
    let vcpu = unsafe { Vcpu::from_hook(raw) };
    let Some(m) = vcpu.vmcs12() else {
        return Verdict::STOCK;
    };
    if vcpu.wants_no_page(m) {
        return Verdict::STOCK;
    }
    // Reading L1's bitmap may sleep.
    let section = InFlight::enter(HOOK);
    let mode = mode(HOOK);
    if mode == Mode::Off {
        return Verdict::STOCK;
    }
    let before = state::with(vcpu, |local, counters| {
        let count = counters.path::<NUMBER>();
        let memory = &mut local.nested_switch;
        let planned = plan(vcpu, m, &mut memory.pages);
        if mode == Mode::Check {
            return Some(planned.map(|(_, _, bitmap)| bitmap));
        }
        let (places, wanted, bitmap) = match planned {
            Ok(plan) if !takes_detour(&mut memory.detour, count) => plan,
            Ok(_) => return Some(Err(Reason::Detour)),
            Err(reason) => return Some(Err(reason)),
        };
        let pages = &mut memory.pages;
        for ((use_, place), address) in USES.into_iter().zip(places).zip(wanted) {
            let slot = pages.slots.get_mut(place).and_then(Option::as_mut);
            if let (Some(slot), Some(address)) = (slot, address) {
                // SAFETY: `find` has chosen a page that is kept and has this address by a look-up that would come out
                // the same now; KVM has let go of its own at the last exit.
                unsafe { vcpu.give_page(use_, &slot.map, address) };
                slot.lent = true;
            }
        }
        // SAFETY: In this handler, with what `plan` has just made.
        unsafe { vcpu.write_msr_bitmap(bitmap.as_ref(), !pages.own_bitmap) };
        pages.own_bitmap |= bitmap.is_some();
        count.taken.bump();
        None
    });
    match before {
        // true.
        Some(None) => Verdict::handled(1),
        Some(Some(planned)) => get_slowly(vcpu, m, &section, cont, planned),
        None => Verdict::STOCK,
    }
}

static REPORTED: AtomicBool = AtomicBool::new(false);

/// Lets the stock code do it, and remembers or compares.
#[cold]
#[inline(never)]
fn get_slowly(
    vcpu: Vcpu,
    m: Vmcs12,
    section: &InFlight,
    cont: Continuation,
    planned: Result<Option<MsrBitmap>, Reason>,
) -> Verdict {
    let stamp = vcpu.memory_stamp();
    state::with(vcpu, |local, counters| {
        let memory = &mut local.nested_switch.pages;
        if memory.stamp != stamp || mode(HOOK) != Mode::On {
            // SAFETY: KVM is carrying out an instruction of L1.
            unsafe { memory.release(vcpu, &SrcuGuard::take(vcpu)) };
            publish(memory, counters);
        }
        if memory.stamp != stamp {
            memory.seen = [None; SLOTS];
            memory.stamp = stamp;
        }
    });
    // SAFETY: This handler's continuation and the hooked function's own argument.
    let ret = unsafe { section.call_stock(cont, [vcpu.key(), 0, 0]) };
    state::with(vcpu, |local, counters| {
        let count = counters.path::<NUMBER>();
        let memory = &mut local.nested_switch.pages;
        memory.own_bitmap = false;
        match planned {
            // The detour has counted itself.
            Err(Reason::Detour) => (),
            Err(reason) => count.fall_back(reason as usize),
            Ok(Some(bitmap)) => compare(vcpu, m, bitmap, count),
            Ok(None) => (),
        }
        if mode(HOOK) == Mode::Check {
            note(vcpu, memory, count);
        }
    });
    Verdict::handled(ret)
}

/// Mode `check`: the bitmap that this part would have made, unless L1 has changed its own meanwhile.
fn compare(vcpu: Vcpu, m: Vmcs12, bitmap: MsrBitmap, count: &crate::path::Counters) {
    // SAFETY: As in `plan`.
    let mut guest = unsafe { GuestMemory::new(vcpu) };
    if vcpu.merge_msr_bitmap(m, &mut guest) != Some(Some(bitmap)) {
        return;
    }
    count.checked.bump();
    let differs = vcpu.compare_msr_bitmap(&bitmap);
    if (differs.is_some() || !vcpu.msr_bitmap_is_plain()) && mismatch(count, &REPORTED) {
        pr_warn!("nested_switch: nested_get_vmcs12_pages() made another bitmap of MSRs: word {differs:?}\n");
    }
}

/// Mode `check`: compares the pages that the stock code has pinned with those that it pinned before with the same stamp,
/// and notes them.
fn note(vcpu: Vcpu, memory: &mut Memory, count: &crate::path::Counters) {
    // The stock code's look-up may have come after a change that the stamp does not have.
    if memory.stamp.is_none() || vcpu.memory_stamp() != memory.stamp {
        memory.seen = [None; SLOTS];
        return;
    }
    for map in USES.into_iter().filter_map(|use_| vcpu.pinned_page(use_)) {
        let known = memory
            .seen
            .iter()
            .flatten()
            .find(|(gfn, _)| *gfn == map.gfn());
        match known {
            Some(&(gfn, pfn)) => {
                count.checked.bump();
                if pfn != map.pfn() && mismatch(count, &REPORTED) {
                    pr_warn!(
                        "nested_switch: nested_get_vmcs12_pages() found {:#x} at {gfn:#x} and not {pfn:#x}\n",
                        map.pfn()
                    );
                }
            }
            None => {
                if let Some(free) = memory.seen.iter_mut().find(|seen| seen.is_none()) {
                    *free = Some((map.gfn(), map.pfn()));
                } else {
                    memory.seen = [None; SLOTS];
                }
            }
        }
    }
}

/// L2 exits to L1, and KVM is about to let go of its pages: keeps them.
///
/// In the handler of sync_vmcs02_to_vmcs12().
#[inline(always)]
pub(crate) fn exited(vcpu: Vcpu) {
    // Only within KVM_RUN, whose end lets go of them.
    if mode(HOOK) != Mode::On || vcpu.guest_mode() || !vcpu.is_in_run() {
        return;
    }
    // What is kept from now on the path's `drain` has to see.
    let _section = InFlight::enter(HookId::SYNC_VMCS02);
    state::with(vcpu, |local, counters| {
        let memory = &mut local.nested_switch.pages;
        let usable =
            mode(HOOK) == Mode::On && memory.stamp.is_some_and(|stamp| vcpu.has_slots_of(stamp));
        if usable {
            for use_ in USES {
                let Some(map) = vcpu.pinned_page(use_) else {
                    continue;
                };
                // SAFETY: The vCPU is loaded, and KVM holds its SRCU lock; L2 has exited.
                unsafe {
                    if memory.keep(vcpu, map) {
                        vcpu.take_page(use_);
                    }
                }
            }
        }
        memory.forget_lent();
        publish(memory, counters);
    });
}

/// Lets go of every page: the vCPU leaves KVM_RUN, VMX operation ends, or the path is being switched off.
///
/// The vCPU is loaded by the current task; `hook` is the running handler's.
pub(crate) fn release(raw: *mut bindings::kvm_vcpu, hook: HookId) {
    // SAFETY: The hooked function's own argument.
    let vcpu = unsafe { Vcpu::from_hook(raw) };
    let holding = |_: &mut Local, counters: &CounterSet| counters.nested_switch.pages.is_holding();
    if state::with(vcpu, holding) != Some(true) {
        return;
    }
    let _section = InFlight::enter(hook);
    state::with(vcpu, |local, counters| {
        let memory = &mut local.nested_switch.pages;
        // SAFETY: By this function's contract.
        unsafe { memory.release(vcpu, &SrcuGuard::take(vcpu)) };
        publish(memory, counters);
    });
}

/// What another thread may know about a vCPU: that pages are kept for it.
pub(crate) struct Shared(AtomicBool);

impl Shared {
    pub(crate) const fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// Pages are kept for the vCPU.
    #[inline(always)]
    pub(super) fn is_holding(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}
