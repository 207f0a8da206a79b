// SPDX-License-Identifier: GPL-2.0
//! What the module keeps for each vCPU, and how long it lives.
//!
//! A vCPU's state is made by the first handler that wants one and dropped when KVM frees the vCPU,
//! when the last path is switched off, when kvm_intel goes and when this module goes. Handlers find
//! it by the vCPU's address in a hash table that is read without a lock; only making and dropping
//! take the mutex.
//!
//! Why a handler may keep a reference without counting it: the state of a vCPU is dropped either by
//! the vCPU's own thread (free) or after every hook is off and drained (see `hook`), so never while
//! one of the vCPU's handlers runs.

use crate::{alloc, bindings, hook::InFlight, kvm::Vcpu, path};
use core::{
    cell::UnsafeCell,
    sync::atomic::{AtomicPtr, AtomicUsize, Ordering},
};
use kernel::prelude::*;

/// Slots of the hash table; more vCPUs than about this run on stock code (counted as `no_state`).
const SLOTS: usize = 4096;
/// A vCPU is within this many slots of where its address hashes to, or nowhere.
const WINDOW: usize = 8;

/// State of one vCPU.
pub(crate) struct VcpuState {
    /// Only the vCPU's own thread looks at it.
    local: UnsafeCell<path::Local>,
    /// Written by the vCPU's thread, read by anybody.
    pub(crate) counters: path::CounterSet,
}

// SAFETY: `local` is only reached through `with`, from the thread that holds the vCPU's mutex;
// `counters` are atomics.
unsafe impl Sync for VcpuState {}

/// Most memory that the module ever takes for one vCPU, in bytes as the allocator rounds them.
pub(crate) const MOST: usize = core::mem::size_of::<VcpuState>().next_power_of_two() + path::MOST;

// Documentation/design.md says so.
const _: () = assert!(MOST <= 116 * 1024);

/// What the state of a new vCPU looks like.
static TEMPLATE: VcpuState = VcpuState {
    local: UnsafeCell::new(path::Local::NEW),
    counters: path::CounterSet::new(),
};

struct Slot {
    key: AtomicUsize,
    state: AtomicPtr<VcpuState>,
}

static TABLE: [Slot; SLOTS + WINDOW] = [const {
    Slot {
        key: AtomicUsize::new(0),
        state: AtomicPtr::new(core::ptr::null_mut()),
    }
}; SLOTS + WINDOW];

kernel::sync::global_lock! {
    // SAFETY: `init` is called once, by the module's own init, before any handler can run.
    unsafe(uninit) static WRITERS: Mutex<usize> = 0;
}

/// Must be called once before anything else here.
///
/// # Safety
///
/// Not more than once in the module's life.
pub(crate) unsafe fn init() {
    // SAFETY: By this function's contract.
    unsafe { WRITERS.init() };
}

#[inline(always)]
fn window(key: usize) -> &'static [Slot] {
    // Fibonacci hashing; a vcpu_vmx is at least page aligned. 12 bits are left: SLOTS is 4096.
    const { assert!(SLOTS == 1 << 12) };
    let at = (key as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52;
    // SAFETY: `at` is below SLOTS and the table has WINDOW more.
    unsafe { TABLE.get_unchecked(at as usize..at as usize + WINDOW) }
}

#[inline(always)]
fn find(key: usize) -> Option<&'static VcpuState> {
    let slot = window(key)
        .iter()
        .find(|s| s.key.load(Ordering::Acquire) == key)?;
    // SAFETY: A slot with a key has a state, which outlives every handler of its vCPU (see above).
    Some(unsafe { &*slot.state.load(Ordering::Relaxed) })
}

/// Whether the vCPU at this address has a state. It need not be one: nothing there is looked at.
#[inline(always)]
pub(crate) fn has(key: usize) -> bool {
    find(key).is_some()
}

/// Runs `f` on the state of `vcpu`; `None` if it has none yet.
#[inline(always)]
pub(crate) fn with<R>(
    vcpu: Vcpu,
    f: impl FnOnce(&mut path::Local, &path::CounterSet) -> R,
) -> Option<R> {
    let state = find(vcpu.key())?;
    // SAFETY: `vcpu` proves that this is the vCPU's thread with its mutex held, and `f` cannot get
    // here again for the same vCPU: of KVM it calls only functions that end in no handler which looks at the state
    // (ept_page_fault() does in one, which turns a prefetch away before).
    Some(f(unsafe { &mut *state.local.get() }, &state.counters))
}

/// Makes the state of `vcpu` if it has none. `false` if there is no room or no memory: stock code
/// serves the vCPU until there is. A TDX guest's never gets one.
///
/// May sleep, which the section of the calling handler allows.
pub(crate) fn ensure(vcpu: Vcpu, _section: &InFlight) -> bool {
    let key = vcpu.key();
    if find(key).is_some() {
        return true;
    }
    // Freed without nested_vmx_free_vcpu(), it would leave its state to the next vCPU at its address.
    if !vcpu.is_vmx() {
        return false;
    }
    if alloc::VCPU.gate().is_err() {
        return false;
    }
    let Ok(state) = KVBox::<VcpuState>::new_uninit(GFP_KERNEL_ACCOUNT | __GFP_NOWARN) else {
        return false;
    };
    let state = KVBox::into_raw(state).cast::<VcpuState>();
    // Copied, not made on the stack, which is deep enough here already.
    // SAFETY: The box is new and large enough; the template owns nothing, so a copy of its bytes is
    // a value of its own.
    let state = unsafe {
        core::ptr::copy_nonoverlapping(&raw const TEMPLATE, state, 1);
        KVBox::from_raw(state)
    };
    let mut count = WRITERS.lock();
    let Some(slot) = window(key)
        .iter()
        .find(|s| s.key.load(Ordering::Relaxed) == 0)
    else {
        return false;
    };
    slot.state.store(KVBox::into_raw(state), Ordering::Relaxed);
    slot.key.store(key, Ordering::Release);
    *count += 1;
    true
}

fn take(slot: &Slot) {
    slot.key.store(0, Ordering::Relaxed);
    let raw = slot.state.swap(core::ptr::null_mut(), Ordering::Relaxed);
    // SAFETY: `ensure` put it there by `into_raw`, and the slot has just been emptied under the
    // mutex, so nobody else takes it.
    let state = unsafe { KVBox::from_raw(raw) };
    path::retire(&state.counters);
}

/// Drops the state of the vCPU at `vcpu`, which KVM is about to free.
///
/// May sleep, which the section of the calling handler allows.
pub(crate) fn forget(vcpu: *const bindings::kvm_vcpu, _section: &InFlight) {
    let mut count = WRITERS.lock();
    let key = vcpu as usize;
    for slot in window(key)
        .iter()
        .filter(|s| s.key.load(Ordering::Relaxed) == key)
    {
        take(slot);
        *count -= 1;
    }
}

/// Drops all states.
///
/// # Safety
///
/// Every hook whose handler uses states is off and drained.
pub(crate) unsafe fn forget_all() {
    let mut count = WRITERS.lock();
    for slot in TABLE.iter().filter(|s| s.key.load(Ordering::Relaxed) != 0) {
        take(slot);
    }
    *count = 0;
}

/// How many vCPUs have a state.
pub(crate) fn count() -> usize {
    *WRITERS.lock()
}

/// Calls `f` with the counters of every vCPU that has a state; the states stay while it runs.
pub(crate) fn for_each_counters(mut f: impl FnMut(&path::CounterSet)) {
    let _guard = WRITERS.lock();
    for slot in TABLE.iter().filter(|s| s.key.load(Ordering::Relaxed) != 0) {
        // SAFETY: The mutex keeps `take` out.
        f(unsafe { &(*slot.state.load(Ordering::Relaxed)).counters });
    }
}

/// Calls `f` with every vCPU that has a state; neither state nor vCPU goes while it runs.
pub(crate) fn for_each_vcpu(mut f: impl FnMut(*mut bindings::kvm_vcpu, &path::CounterSet)) {
    let _guard = WRITERS.lock();
    for slot in TABLE.iter() {
        let key = slot.key.load(Ordering::Relaxed);
        if key != 0 {
            // SAFETY: As in `for_each_counters`. The vCPU stays as well: KVM frees it after
            // nested_vmx_free_vcpu(), whose handler waits for the mutex.
            f(key as *mut _, unsafe {
                &(*slot.state.load(Ordering::Relaxed)).counters
            });
        }
    }
}
