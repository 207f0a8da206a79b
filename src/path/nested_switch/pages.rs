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
        guest_memory::{GuestMemory, SrcuGuard, Window},
        vmcs12_pages::{HostMap, MsrBitmap, Stamp, Use, Wanted, USES},
        Vcpu, Vmcs12,
    },
    layout,
    path::{CounterSet, Counters, Local},
    policy::mode::Mode,
    state,
};
use core::sync::atomic::{AtomicBool, Ordering};
use kernel::prelude::*;

const HOOK: HookId = HookId::GET_PAGES;

/// kvm_intel lets guests have performance counters of the processor's (`enable_mediated_pmu`). Then
/// nested_vmx_merge_pmu_msr_bitmaps() opens MSRs that are closed here.
static MEDIATED_PMU: AtomicBool = AtomicBool::new(false);

/// Reads what this needs to know about kvm_intel, each time it has been loaded.
pub(super) fn prepare() {
    let mediated = layout::module_flag("kvm_intel", "enable_mediated_pmu");
    MEDIATED_PMU.store(mediated, Ordering::Relaxed);
}

/// Whether L1's bitmap of MSRs is merged as it is here.
#[inline(always)]
pub(super) fn merges_alike() -> bool {
    !MEDIATED_PMU.load(Ordering::Relaxed)
}

/// Most pages that one vCPU keeps.
const SLOTS: usize = 8;

/// No slot.
const NOWHERE: u8 = SLOTS as u8;

/// What is kept for one vCPU.
///
/// # Invariants
///
/// Each slot whose bit is set in `kept` pins its page. `stamp` is from before the look-up of any of them, and their
/// writes are not logged with these memory slots.
pub(super) struct Memory {
    slots: [HostMap; SLOTS],
    /// One bit for each slot that has a page of ours.
    kept: u8,
    /// The slots whose pages KVM has for each use, to unpin unless they are taken back, or `NOWHERE`.
    lent: [u8; USES.len()],
    /// The slots that were lent last.
    last: [u8; USES.len()],
    stamp: Option<Stamp>,
    /// The next slot to be given up.
    hand: u8,
    /// The stock code has not written KVM's bitmap of MSRs of vmcs02 since this part has.
    own_bitmap: bool,
    /// The memory slot that had L1's bitmap at `stamp`.
    bitmap_slot: Window,
    /// Mode `check`: frames that the stock code found at `stamp`, by the guest's frame.
    seen: [Option<(u64, u64)>; SLOTS],
}

impl Memory {
    pub(super) const NEW: Memory = Memory {
        slots: [HostMap::NONE; SLOTS],
        kept: 0,
        lent: [NOWHERE; USES.len()],
        last: [NOWHERE; USES.len()],
        stamp: None,
        hand: 0,
        own_bitmap: false,
        bitmap_slot: Window::EMPTY,
        seen: [None; SLOTS],
    };

    /// Of pages nothing is kept outside KVM_RUN.
    pub(super) fn clear(&mut self) {
        self.own_bitmap = false;
        self.bitmap_slot = Window::EMPTY;
        self.seen = [None; SLOTS];
    }

    /// A page that is kept.
    #[inline(always)]
    fn slot(&self, at: u8) -> Option<&HostMap> {
        let kept = at < NOWHERE && self.kept & 1 << at != 0;
        self.slots.get(usize::from(at)).filter(|_| kept)
    }

    /// Lets go of everything.
    ///
    /// # Safety
    ///
    /// The vCPU is loaded by the current task, and `_srcu` is its VM's.
    unsafe fn release(&mut self, vcpu: Vcpu, _srcu: &SrcuGuard) {
        for at in 0..NOWHERE {
            if let Some(&map) = self.slot(at) {
                // SAFETY: By this function's contract and the type's invariants.
                unsafe { vcpu.release_page(map) };
            }
        }
        self.kept = 0;
        self.lent = [NOWHERE; USES.len()];
    }

    /// The slots of the pages that are wanted, if all are kept.
    #[inline(always)]
    fn find(&self, wanted: &Wanted) -> Option<[u8; USES.len()]> {
        let mut same = true;
        let mut places = self.last;
        for (place, address) in places.iter_mut().zip(wanted) {
            match address {
                Some(address) => same &= self.has(*place, *address),
                None => *place = NOWHERE,
            }
        }
        if same {
            // Different slots, as they were when they were found.
            return Some(places);
        }
        self.search(wanted)
    }

    /// Whether a slot has the page of this address.
    #[inline(always)]
    fn has(&self, at: u8, address: u64) -> bool {
        self.slot(at).is_some_and(|map| map.gfn() == address >> 12)
    }

    #[inline(never)]
    fn search(&self, wanted: &Wanted) -> Option<[u8; USES.len()]> {
        let mut places = [NOWHERE; USES.len()];
        let mut free = self.kept;
        for (place, address) in places.iter_mut().zip(wanted) {
            let Some(address) = *address else {
                continue;
            };
            *place = (0..NOWHERE).find(|&at| free & 1 << at != 0 && self.has(at, address))?;
            free &= !(1 << *place);
        }
        Some(places)
    }

    /// Keeps a page that KVM has pinned for use `n` since `stamp`. `false` if KVM must have it.
    ///
    /// # Safety
    ///
    /// As for `release`; if it returns `true` the caller takes the page from KVM.
    #[inline(always)]
    unsafe fn keep(&mut self, vcpu: Vcpu, n: usize, map: HostMap) -> bool {
        let lent = self.lent.get(n).copied().unwrap_or(NOWHERE);
        let was_lent = self.slots.get(usize::from(lent));
        if was_lent.is_some_and(|was| was.is_same(&map)) {
            self.kept |= 1 << lent;
            return true;
        }
        // SAFETY: By this function's contract.
        unsafe { self.keep_new(vcpu, map) }
    }

    /// # Safety
    ///
    /// As for `keep`.
    #[cold]
    unsafe fn keep_new(&mut self, vcpu: Vcpu, map: HostMap) -> bool {
        if !vcpu.is_unlogged(map.gfn()) {
            return false;
        }
        let is_lent = |at: &u8| self.lent.contains(at);
        let free = (0..NOWHERE).find(|at| self.kept & 1 << at == 0 && !is_lent(at));
        let place = match free {
            Some(at) => at,
            None => {
                let Some(at) = (0..NOWHERE)
                    .map(|n| (self.hand + n) % NOWHERE)
                    .find(|at| !is_lent(at))
                else {
                    return false;
                };
                if let Some(&old) = self.slot(at) {
                    // SAFETY: By this function's contract.
                    unsafe { vcpu.release_page(old) };
                }
                self.hand = (at + 1) % NOWHERE;
                at
            }
        };
        if let Some(slot) = self.slots.get_mut(usize::from(place)) {
            *slot = map;
            self.kept |= 1 << place;
        }
        true
    }
}

/// Tells a thread that switches the path off. What is lent to KVM still counts: it comes back.
#[inline(always)]
fn publish(memory: &Memory, counters: &CounterSet) {
    let holding = memory.kept != 0;
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

/// The pages that an entry of L2 gets: slots that are kept, for these addresses.
pub(super) struct Plan {
    places: [u8; USES.len()],
    wanted: Wanted,
    /// vmcs02 has a bitmap of MSRs.
    bitmap: bool,
}

impl Plan {
    /// For a vmcs12 that names no page.
    const NONE: Plan = Plan {
        places: [NOWHERE; USES.len()],
        wanted: [None; USES.len()],
        bitmap: false,
    };
}

/// The slots to give KVM, and for which addresses, if everything is known.
#[inline(always)]
fn places(
    vcpu: Vcpu,
    m: Vmcs12,
    memory: &mut Memory,
) -> Result<([u8; USES.len()], Wanted), Reason> {
    // KVM has unpinned what it was lent and not asked for again.
    memory.lent = [NOWHERE; USES.len()];
    if !merges_alike() {
        return Err(Reason::Unusual);
    }
    let wanted = vcpu.wanted_pages(m).ok_or(Reason::Unusual)?;
    let stamp = vcpu.memory_stamp().ok_or(Reason::Unusual)?;
    if memory.stamp != Some(stamp) {
        return Err(Reason::Changed);
    }
    let places = memory.find(&wanted).ok_or(Reason::New)?;
    Ok((places, wanted))
}

/// What an entry of L2 gets; KVM's bitmap of MSRs of vmcs02 is made. If what is looked at afterwards speaks against the
/// entry, nothing needs to be undone: the stock code makes the bitmap anew. May sleep.
///
/// # Safety
///
/// KVM is carrying out a VMLAUNCH or VMRESUME of L1, under its SRCU lock.
#[inline(always)]
pub(super) unsafe fn plan(vcpu: Vcpu, m: Vmcs12, memory: &mut Memory) -> Result<Plan, Reason> {
    if vcpu.wants_no_page(m) {
        return Ok(Plan::NONE);
    }
    let (places, wanted) = places(vcpu, m, memory)?;
    // SAFETY: By this function's contract; memory slots are those of `stamp`. If L1's bitmap cannot be read whole, the stock
    // code writes KVM's anew.
    let bitmap = unsafe {
        let mut guest = GuestMemory::with_slot(vcpu, memory.bitmap_slot);
        let bitmap = vcpu.merge_msr_bitmap(m, &mut guest, !memory.own_bitmap);
        memory.bitmap_slot = guest.slot();
        bitmap.ok_or(Reason::Unusual)?
    };
    Ok(Plan {
        places,
        wanted,
        bitmap,
    })
}

impl Plan {
    /// Whether vmcs02 has a bitmap of MSRs.
    #[cfg_attr(not(MTK_GVA_WALK), expect(dead_code))]
    #[inline(always)]
    pub(super) fn has_bitmap(&self) -> bool {
        self.bitmap
    }
}

/// Gives KVM its pages, and their addresses to vmcs02.
///
/// # Safety
///
/// As for `plan`, whose result `plan` is, with vmcs02 loaded; KVM has let go of its pages at the last exit.
#[inline(always)]
pub(super) unsafe fn give(vcpu: Vcpu, memory: &mut Memory, plan: &Plan) {
    // Spelt out: each use is known to the compiler.
    // SAFETY: By this function's contract.
    unsafe {
        give_one::<0>(vcpu, memory, plan, Use::ApicAccess);
        give_one::<1>(vcpu, memory, plan, Use::VirtualApic);
        give_one::<2>(vcpu, memory, plan, Use::PostedInterrupts);
    }
    memory.lent = plan.places;
    memory.last = plan.places;
    memory.own_bitmap |= plan.bitmap;
}

/// One page of `give`, the one of number `N` in the plan.
///
/// # Safety
///
/// As for `give`.
#[inline(always)]
unsafe fn give_one<const N: usize>(vcpu: Vcpu, memory: &mut Memory, plan: &Plan, what: Use) {
    let place = plan.places[N];
    if let (Some(map), Some(address)) = (memory.slot(place), plan.wanted[N]) {
        // SAFETY: `find` has chosen a page that is kept and has this address by a look-up that would come out the same now.
        unsafe { vcpu.give_page(what, map, address) };
        memory.kept &= !(1 << place);
    }
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
    let done = match mode() {
        Mode::Off => None,
        Mode::Check => Some(Err(Reason::Detour)),
        Mode::On => state::with(vcpu, |local, counters| {
            let count = counters.path::<NUMBER>();
            let switch = &mut local.nested_switch;
            if vcpu.vmcs01_is_loaded() {
                return Err(Reason::Unusual);
            }
            // SAFETY: In this handler, which KVM calls under its SRCU lock.
            let plan = unsafe { plan(vcpu, m, &mut switch.pages)? };
            if takes_detour(&mut switch.detour, count) {
                return Err(Reason::Detour);
            }
            // SAFETY: As above, with vmcs02 loaded.
            unsafe {
                give(vcpu, &mut switch.pages, &plan);
                vcpu.use_msr_bitmap(plan.bitmap);
            }
            count.taken.bump();
            Ok(())
        }),
    };
    match done {
        // true.
        Some(Ok(())) => Verdict::handled(1),
        Some(Err(reason)) => get_slowly(vcpu, m, &section, cont, reason),
        None => Verdict::STOCK,
    }
}

static REPORTED: AtomicBool = AtomicBool::new(false);

/// Lets the stock code do it, and remembers or compares. `reason` matters in mode `on`.
#[cold]
#[inline(never)]
fn get_slowly(
    vcpu: Vcpu,
    m: Vmcs12,
    section: &InFlight,
    cont: Continuation,
    reason: Reason,
) -> Verdict {
    let checking = mode() == Mode::Check;
    let stamp = vcpu.memory_stamp();
    state::with(vcpu, |local, counters| {
        let memory = &mut local.nested_switch.pages;
        if memory.stamp != stamp || checking {
            // SAFETY: KVM is carrying out an instruction of L1.
            unsafe { memory.release(vcpu, &SrcuGuard::take(vcpu)) };
            publish(memory, counters);
        }
        if memory.stamp != stamp {
            memory.seen = [None; SLOTS];
            memory.bitmap_slot = Window::EMPTY;
            memory.stamp = stamp;
        }
        memory.own_bitmap = false;
    });
    // SAFETY: KVM calls the function under its SRCU lock.
    let guest = || unsafe { GuestMemory::new(vcpu) };
    // For an enlightened VMCS that says so the stock code leaves the bitmap as it is, whatever L1 has made of its own.
    let comparing = checking && merges_alike() && !vcpu.evmcs_is_mapped();
    let before = comparing.then(|| MsrBitmap::merge(vcpu, m, &mut guest()));
    // SAFETY: This handler's continuation and the hooked function's own argument.
    let ret = unsafe { section.call_stock(cont, [vcpu.key(), 0, 0]) };
    let after = comparing.then(|| MsrBitmap::merge(vcpu, m, &mut guest()));
    state::with(vcpu, |local, counters| {
        let count = counters.path::<NUMBER>();
        if !checking {
            // The detour has counted itself.
            if !matches!(reason, Reason::Detour) {
                count.fall_back(reason as usize);
            }
            return;
        }
        // A bool: false if a page could not be had, and then there is no bitmap either.
        let done = ret as u8 != 0;
        // Unless L1 has changed its bitmap meanwhile.
        if let (Some(Some(bitmap)), true) = (before, done && before == after) {
            compare(vcpu, &bitmap, count);
        }
        note(vcpu, &mut local.nested_switch.pages, count);
    });
    Verdict::handled(ret)
}

/// Mode `check`: the bitmap that this part would have made.
fn compare(vcpu: Vcpu, bitmap: &MsrBitmap, count: &Counters) {
    count.checked.bump();
    let differs = vcpu.compare_msr_bitmap(bitmap);
    if (differs.is_some() || !vcpu.msr_bitmap_is_plain()) && mismatch(count, &REPORTED) {
        pr_warn!(
            "nested_switch: nested_get_vmcs12_pages() made another bitmap of MSRs: word {differs:?}\n"
        );
    }
}

/// Mode `check`: compares the pages that the stock code has pinned with those that it pinned before with the same stamp,
/// and notes them.
fn note(vcpu: Vcpu, memory: &mut Memory, count: &Counters) {
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
    if mode() != Mode::On || vcpu.guest_mode() || !vcpu.has_pinned_pages() || !vcpu.is_in_run() {
        return;
    }
    // What is kept from now on the path's `drain` has to see.
    let _section = InFlight::enter(HookId::SYNC_VMCS02);
    state::with(vcpu, |local, counters| {
        let memory = &mut local.nested_switch.pages;
        let usable =
            mode() == Mode::On && memory.stamp.is_some_and(|stamp| vcpu.has_slots_of(stamp));
        if usable {
            let mut keep = |use_: Use, n: usize| {
                let Some(map) = vcpu.pinned_page(use_) else {
                    return;
                };
                // SAFETY: The vCPU is loaded, and KVM holds its SRCU lock; L2 has exited.
                unsafe {
                    if memory.keep(vcpu, n, map) {
                        vcpu.take_page(use_);
                    }
                }
            };
            keep(Use::ApicAccess, 0);
            keep(Use::VirtualApic, 1);
            keep(Use::PostedInterrupts, 2);
        }
        memory.lent = [NOWHERE; USES.len()];
        publish(memory, counters);
    });
}

/// Whether every page that KVM has for L2 is one of those that are kept, in memory slots that are as they were: then `take_back` can be called, and
/// marking them dirty would do nothing.
///
/// L2 has just exited, and KVM's SRCU lock is held.
#[cfg(MTK_GVA_WALK)]
#[inline(always)]
pub(super) fn are_ours(vcpu: Vcpu, memory: &Memory) -> bool {
    if memory.lent == [NOWHERE; USES.len()] {
        return !vcpu.has_pinned_pages();
    }
    vcpu.pins_nothing_but(memory.lent.map(|lent| memory.slots.get(usize::from(lent))))
        && vcpu.is_in_run()
        && memory.stamp.is_some_and(|stamp| vcpu.has_slots_of(stamp))
}

/// Takes all pages back from KVM, which are kept on. L2 exits to L1.
///
/// # Safety
///
/// `are_ours` has just said yes, and vmcs02 is not run before KVM is given pages again.
#[cfg(MTK_GVA_WALK)]
#[inline(always)]
pub(super) unsafe fn take_back(vcpu: Vcpu, memory: &mut Memory, counters: &CounterSet) {
    if memory.lent == [NOWHERE; USES.len()] {
        return;
    }
    for (use_, lent) in USES.into_iter().zip(memory.lent) {
        if lent < NOWHERE {
            memory.kept |= 1 << lent;
            // SAFETY: By this function's contract.
            unsafe { vcpu.take_page(use_) };
        }
    }
    memory.lent = [NOWHERE; USES.len()];
    publish(memory, counters);
}

/// Lets go of every page: the vCPU leaves KVM_RUN, VMX operation ends, or the path is being switched off.
///
/// # Safety
///
/// The vCPU is loaded by the current task; `hook` is the running handler's.
pub(crate) unsafe fn release(vcpu: Vcpu, hook: HookId) {
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
