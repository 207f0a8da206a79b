// SPDX-License-Identifier: GPL-2.0
//! EPT02 is filled before L2 faults on it, and a fault that is L1's to serve goes to it in short (`absent`).
//!
//! It is filled on two occasions. After L0 has served an EPT violation of L2, entries around the one that was missing are filled as
//! well, as far as EPT12 maps them already and the host has the pages in memory (`policy::window` says how many).
//! After L0 has reflected an EPT violation to L1, L1 maps the page and resumes L2, which would fault again: the
//! entry is filled on that resumption.
//!
//! What is filled is what stock KVM would prefetch, only further away, by stock's own function and under the same rules:
//! entries of EPT12 that were accessed before, writable only if they are dirty already, pages that the host
//! has in memory for writing, no page whose writes are logged, nothing while addresses are being invalidated. No
//! accessed or dirty flag of EPT12 changes. Upper levels of EPT02 are left to stock. A module that runs in a guest marks
//! what it fills as accessed: the hypervisor below, whose EPT12 our EPT02 is, would otherwise leave it out.
//!
//! Mode `check` fills nothing; it compares what would have been put into EPT02 with what stock KVM puts there when L2
//! does fault.

#[cfg(MTK_GVA_WALK)]
mod absent;
mod fill;
pub(crate) mod walk;

use super::{CounterSet, Local, Path};
#[cfg(MTK_GVA_WALK)]
use crate::kvm::absent::Way;
use crate::{
    bindings,
    hook::{CallId, Continuation, HookId, InFlight, Verdict},
    kvm::{ept02::PageFault, ept12::Reflected, Vcpu},
    policy::{
        detour::{Detour, Rate},
        knob,
        mode::Mode,
        window::{Window, MAX, MIN},
    },
    state,
    sysfs::Attribute,
};
use core::sync::atomic::{AtomicU8, Ordering};
use kernel::{c_str, prelude::*};

/// This path's number in `PATHS`.
const NUMBER: usize = 4;

pub(super) const PATH: Path = Path {
    name: c_str!("prefault"),
    about: c_str!("EPT02 is filled before L2 faults on it"),
    hooks: &[HookId::EPT_PAGE_FAULT, HookId::NESTED_RUN],
    guest_hooks: &[],
    extra_hooks: &[],
    calls: &[
        CallId::READ_GUEST_ATOMIC,
        CallId::TOPUP_MMU_CACHES,
        CallId::GFN_TO_MEMSLOT,
        CallId::EPT_PAGE_FAULT,
        CallId::PREFETCH_SPTES,
        CallId::RELEASE_DIRTY,
        CallId::VM_GFN_TO_MEMSLOT,
    ],
    drain: None,
    drain_hooks: &[],
    knobs: &FILES,
    reasons: &[
        "no_memory",
        "no_table",
        "not_mapped",
        "not_backed",
        "busy",
        "unusual",
    ],
};

/// Base-2 logarithm of the most entries that are filled around a fault.
static LIMIT: AtomicU8 = AtomicU8::new(MAX);

static FILES: [Attribute; 3] = [
    Attribute::knob(
        c"window",
        |out| writeln!(out, "{}", 1u16 << limit()),
        |text| {
            let entries = knob::number(text).filter(|n| n.is_power_of_two());
            let log2 = entries.ok_or(EINVAL)?.trailing_zeros() as u8;
            if !(MIN..=MAX).contains(&log2) {
                return Err(EINVAL);
            }
            LIMIT.store(log2, Ordering::Relaxed);
            Ok(())
        },
    ),
    Attribute::knob(
        c"walk",
        |out| {
            let rate = walk::rate();
            writeln!(out, "{} {}", rate.every, rate.seed)
        },
        |text| {
            walk::set_rate(Rate::parse(text).ok_or(EINVAL)?);
            Ok(())
        },
    ),
    Attribute::figure(c"reflected", |out| {
        writeln!(out, "{}", super::total(NUMBER).short.get())
    }),
];

fn limit() -> u8 {
    LIMIT.load(Ordering::Relaxed)
}

/// Why a fault, or the resumption after one, was left to the stock code; names in `PATH.reasons`.
#[derive(Clone, Copy)]
enum Reason {
    /// No memory for the vCPU's state, or for the reverse map.
    NoMemory,
    /// EPT02 has no table there yet, or a large page, or one whose accessed flags are off.
    NoTable,
    /// EPT12 does not map the page (any more), or in a way that is stock's.
    NotMapped,
    /// The host does not have the page in memory, not for writing, or its writes are logged.
    NotBacked,
    /// Addresses are being invalidated, or another vCPU waits for the lock.
    Busy,
    /// System-management mode, another guest than the one that faulted.
    Unusual,
}

/// What the path remembers about a vCPU.
pub(crate) struct Memory {
    window: Window,
    /// The same for tables that stand for large pages.
    whole: Window,
    /// The root of EPT12 that it was used on last.
    root: u64,
    /// The page of the fault that L1 was told of last, and the root of EPT12 that it was on; (0, 0) for none.
    awaited: (u64, u64),
    /// That fault.
    reflected: Option<Reflected>,
    /// The way to the last entry of EPT12 that was looked for.
    #[cfg(MTK_GVA_WALK)]
    way: Way,
    /// When to walk all of EPT02.
    chance: Detour,
}

impl Memory {
    /// Nothing yet.
    pub(crate) const NEW: Memory = Memory {
        window: Window::new(),
        whole: Window::whole(),
        root: 0,
        awaited: (0, 0),
        reflected: None,
        #[cfg(MTK_GVA_WALK)]
        way: Way::NONE,
        chance: Detour::NEW,
    };
}

/// The path's mode.
#[inline(always)]
fn mode() -> Mode {
    super::mode(NUMBER)
}

/// Handler of ept_page_fault(): an EPT violation of L2, or KVM asks for a page ahead of one (`prefetch`).
#[no_mangle]
extern "C" fn mtk_on_ept_page_fault(
    raw: *mut bindings::kvm_vcpu,
    ptr: *mut bindings::kvm_page_fault,
    cont: Continuation,
) -> Verdict {
    if mode() == Mode::Off {
        return Verdict::STOCK;
    }
    let section = InFlight::enter(HookId::EPT_PAGE_FAULT);
    // SAFETY: The hooked function's own argument.
    let vcpu = unsafe { Vcpu::from_hook(raw) };
    let root = vcpu.ept12_root();
    // SAFETY: The hooked function's own argument, which its caller owns.
    let before = unsafe { PageFault::from_hook(ptr) };
    let is_for_us = root != 0 && !before.prefetch;
    #[cfg(MTK_GVA_WALK)]
    let expected = is_for_us.then(|| absent::expected(vcpu, &before)).flatten();
    #[cfg(MTK_GVA_WALK)]
    // SAFETY: In the handler, for an access of L2.
    let reflected = is_for_us && mode() == Mode::On && unsafe { absent::reflect(vcpu, &before) };
    #[cfg(not(MTK_GVA_WALK))]
    let reflected = false;
    let value = if reflected {
        bindings::MTK_RET_PF_RETRY as usize
    } else {
        // SAFETY: This handler's continuation and the hooked function's own arguments.
        unsafe { section.call_stock(cont, [vcpu.key(), ptr as usize, 0]) }
    };
    let verdict = Verdict::handled(value);
    if !is_for_us {
        return verdict;
    }
    #[cfg(MTK_GVA_WALK)]
    if let Some(what) = expected {
        absent::compare(vcpu, &before, &what);
    }
    if !state::ensure(vcpu, &section) {
        super::count_stateless(NUMBER, Reason::NoMemory as usize);
        return verdict;
    }
    if !vcpu.guest_mode() {
        // Reflected: KVM has gone over to L1.
        state::with(vcpu, |local, _| {
            local.prefault.awaited = (before.gpa & !0xfff, root);
            // SAFETY: The structure is the caller's, and as the function leaves it.
            local.prefault.reflected = Some(unsafe { Reflected::copy(vcpu, ptr) });
        });
        return verdict;
    }
    // SAFETY: The function has just run.
    let fault = unsafe { PageFault::from_hook(ptr) };
    let fixed = value as i32 == bindings::MTK_RET_PF_FIXED as i32;
    state::with(vcpu, |local, counters| {
        let mode = mode();
        if fixed && fault.level == 1 {
            match mode {
                Mode::On => fill::around(
                    vcpu,
                    &mut local.prefault,
                    counters,
                    fault.gpa,
                    fault.is_split,
                ),
                Mode::Check => fill::compare(vcpu, counters, fault.gpa),
                Mode::Off => {}
            }
        }
        walk::now_and_then(vcpu, &mut local.prefault, counters, mode);
    });
    verdict
}

/// L1 has resumed or launched L2, and KVM has prepared it; may sleep.
pub(super) fn resumed(vcpu: Vcpu, local: &mut Local, counters: &CounterSet) {
    let (gpa, root) = core::mem::take(&mut local.prefault.awaited);
    if root == 0 || !vcpu.guest_mode() || mode() != Mode::On {
        return;
    }
    if vcpu.ept12_root() != root {
        counters
            .path::<NUMBER>()
            .fall_back(Reason::Unusual as usize);
        return;
    }
    fill::awaited(vcpu, &mut local.prefault, counters, gpa);
}

/// Whether `resumed` has something to do.
pub(super) fn is_awaiting(local: &Local) -> bool {
    local.prefault.awaited.1 != 0
}
