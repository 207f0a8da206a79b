// SPDX-License-Identifier: GPL-2.0
//! A guest that touches its memory in order gets the next pages along with the one that it faulted on.
//!
//! This is about a hypervisor's own guest, whose memory KVM maps directly. Only pages that the VMM has populated
//! already are mapped, so no memory is spent, and only after faults that follow on one another (`policy::ahead`). KVM's own
//! function maps them, as for KVM_PRE_FAULT_MEMORY. On bare metal a fault costs little; in a hypervisor that
//! is a guest itself each fault passes through all levels below, and so does each of its writes to the table.
//!
//! There, entries are marked as accessed too: the hypervisor below shadows only entries that are, ahead of a fault.
//!
//! The knob `populate` lets it map pages as well that the VMM has not populated, which spends memory ahead of need.
//!
//! What happens to writes near page tables that KVM shadows is another idea, `beside`'s.
//!
//! Mode `check` maps nothing and sees whether stock KVM, when the guest comes to a page that would have been mapped,
//! maps it, too.

mod beside;

use super::Path;
use crate::{
    bindings,
    hook::{CallId, Continuation, HookId, InFlight, Verdict},
    kvm::{host_pages::BATCH, tdp::Fault, write_protected::Write, Vcpu},
    policy::{
        ahead::{Ahead, MOST},
        knob,
        mode::Mode,
    },
    state,
    sysfs::Attribute,
};
use core::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use kernel::{c_str, prelude::*};

/// This path's number in `PATHS`.
const NUMBER: usize = 5;

pub(super) const PATH: Path = Path {
    name: c_str!("direct"),
    about: c_str!(
        "pages that the VMM has populated are mapped ahead of a guest that goes through its memory"
    ),
    hooks: &[HookId::TDP_PAGE_FAULT],
    guest_hooks: &[],
    extra_hooks: &[],
    calls: &[
        CallId::TDP_MMU_MAP,
        CallId::TRY_TO_UNSYNC,
        CallId::TOPUP_MMU_CACHES,
        CallId::RELEASE_DIRTY,
    ],
    drain: None,
    drain_hooks: &[],
    knobs: &FILES,
    reasons: &[
        "no_memory",
        "unusual",
        "not_in_order",
        "not_backed",
        "refused",
        "none_beside",
    ],
};

/// Most pages that are mapped along with the one of a fault.
static AHEAD: AtomicU16 = AtomicU16::new(MOST);
/// How many of them may be such that the VMM has not populated: memory is spent.
static POPULATE: AtomicU16 = AtomicU16::new(0);

/// Whether the right to write comes back for other pages, too, when it does for one.
static BESIDE: AtomicBool = AtomicBool::new(true);

static FILES: [Attribute; 3] = [
    Attribute::knob(
        c"ahead",
        |out| writeln!(out, "{}", AHEAD.load(Ordering::Relaxed)),
        |text| store(text, &AHEAD),
    ),
    Attribute::knob(
        c"populate",
        |out| writeln!(out, "{}", POPULATE.load(Ordering::Relaxed)),
        |text| store(text, &POPULATE),
    ),
    Attribute::knob(
        c"beside",
        |out| writeln!(out, "{}", u8::from(BESIDE.load(Ordering::Relaxed))),
        |text| {
            let on = knob::number(text).filter(|&n| n <= 1).ok_or(EINVAL)?;
            BESIDE.store(on != 0, Ordering::Relaxed);
            Ok(())
        },
    ),
];

fn store(text: &[u8], to: &AtomicU16) -> Result {
    let pages = knob::number(text).filter(|&n| n <= MOST).ok_or(EINVAL)?;
    to.store(pages, Ordering::Relaxed);
    Ok(())
}

/// Why nothing, or not all, was mapped beside the page of a fault; names in `PATH.reasons`.
#[derive(Clone, Copy)]
enum Reason {
    /// No memory for the vCPU's state.
    NoMemory,
    /// A write to a read-only page, a slot with logging, a large page, not the TDP MMU, system-management mode.
    Unusual,
    /// The fault does not follow on the one before.
    NotInOrder,
    /// The VMM has not populated the next page.
    NotBacked,
    /// KVM did not map a page that it was asked for.
    Refused,
    /// No other page could be given back the right to write to.
    NoneBeside,
}

/// What the path remembers about a vCPU.
pub(crate) struct Memory {
    ahead: Ahead,
    /// Mode `check`: pages that would have been mapped after the last fault, the first and their number.
    expected: (u64, u16),
    beside: beside::Memory,
}

impl Memory {
    /// Nothing yet.
    pub(crate) const NEW: Memory = Memory {
        ahead: Ahead::new(),
        expected: (0, 0),
        beside: beside::Memory::NEW,
    };
}

/// The path's mode.
#[inline(always)]
fn mode() -> Mode {
    super::mode(NUMBER)
}

/// Handler of kvm_tdp_page_fault(): an EPT violation of a guest whose memory KVM maps itself.
#[no_mangle]
extern "C" fn mtk_on_tdp_page_fault(
    raw: *mut bindings::kvm_vcpu,
    ptr: *mut bindings::kvm_page_fault,
    cont: Continuation,
) -> Verdict {
    let mode = mode();
    if mode == Mode::Off {
        return Verdict::STOCK;
    }
    // SAFETY: The hooked function's own argument.
    let vcpu = unsafe { Vcpu::from_hook(raw) };
    // SAFETY: The hooked function's own argument.
    let Some(page) = (unsafe { Fault::plain_page(ptr) }) else {
        // SAFETY: As above; what is made of it is used up here.
        return match unsafe { Write::from_hook(ptr) } {
            // SAFETY: In the handler, with its arguments.
            Some(write) => unsafe { beside::written(vcpu, &write, ptr, cont) },
            None => Verdict::STOCK,
        };
    };
    let concerned = state::with(vcpu, |local, counters| {
        // The fault may wait long for its page.
        counters.fields.note_thread();
        let memory = &mut local.direct;
        let follows = memory.ahead.follows(page);
        if !follows {
            let counters = counters.path::<NUMBER>();
            counters.fall_back(Reason::NotInOrder as usize);
        }
        follows || memory.expected.1 != 0
    });
    if concerned == Some(false) {
        return Verdict::STOCK;
    }
    let section = InFlight::enter(HookId::TDP_PAGE_FAULT);
    // SAFETY: The hooked function's own argument.
    let fault = unsafe { Fault::copy(ptr) };
    // SAFETY: This handler's continuation and the hooked function's own arguments.
    let value = unsafe { section.call_stock(cont, [vcpu.key(), ptr as usize, 0]) };
    if concerned.is_none() {
        if !state::ensure(vcpu, &section) {
            super::count_stateless(NUMBER, Reason::NoMemory as usize);
        }
        return Verdict::handled(value);
    }
    // SAFETY: The function has just run and its caller owns the structure.
    let level = unsafe { (*ptr).goal_level };
    let fixed = value as i32 == bindings::MTK_RET_PF_FIXED as i32 && level == 1;
    state::with(vcpu, |local, counters| {
        let counters = counters.path::<NUMBER>();
        let memory = &mut local.direct;
        let (first, count) = core::mem::take(&mut memory.expected);
        if mode == Mode::Check && page.wrapping_sub(first) < u64::from(count) {
            counters.checked.bump();
            // A page that stock retries or finds mapped by somebody else is not held against anybody.
            if value as i32 == bindings::MTK_RET_PF_EMULATE as i32 {
                report(counters, page);
            }
        }
        if !memory.ahead.is_next(page) {
            return;
        }
        if !fixed || vcpu.in_smm() {
            counters.fall_back(Reason::Unusual as usize);
            return;
        }
        let wanted = memory.ahead.count(page, AHEAD.load(Ordering::Relaxed));
        if wanted == 0 {
            // The end of the table.
            return;
        }
        if mode == Mode::Check {
            let backed = backed(&fault, wanted);
            memory.expected = (page.wrapping_add(1), backed);
            if backed == 0 {
                counters.fall_back(Reason::NotBacked as usize);
                memory.ahead.missed();
            }
            memory.ahead.stopped(page, 0);
            return;
        }
        let (mapped, reason) = map(vcpu, &fault, wanted);
        if mapped != 0 {
            counters.taken.bump();
        }
        if let Some(reason) = reason {
            counters.fall_back(reason as usize);
            if mapped == 0 && matches!(reason, Reason::NotBacked) {
                memory.ahead.missed();
            }
        }
        memory.ahead.stopped(page, mapped);
    });
    Verdict::handled(value)
}

/// How many of `wanted` pages after the fault's the host has, from the first on.
fn backed(fault: &Fault, wanted: u16) -> u16 {
    let (wanted, mut backed) = (usize::from(wanted), 0);
    while backed < wanted {
        let ask = (wanted - backed).min(BATCH);
        let found = fault.look_up(1 + backed as u64, ask).count();
        backed += found;
        if found < ask {
            break;
        }
    }
    backed as u16
}

/// Has KVM map `wanted` pages after the fault's, as many as the host has and the knob allows to populate. Returns how many there are
/// now, and why there are not more. May sleep.
fn map(vcpu: Vcpu, fault: &Fault, wanted: u16) -> (u16, Option<Reason>) {
    if !vcpu.is_of_default_vm() {
        return (0, Some(Reason::Unusual));
    }
    let (wanted, mut mapped) = (usize::from(wanted), 0);
    let mut budget = usize::from(POPULATE.load(Ordering::Relaxed));
    while mapped < wanted {
        let (next, ask) = (1 + mapped as u64, (wanted - mapped).min(BATCH));
        let now = vcpu.now();
        let mut pages = fault.look_up(next, ask);
        if pages.count() == 0 && budget != 0 {
            pages = fault.populate(next, ask.min(budget));
            budget -= pages.count();
        }
        let found = pages.count();
        let done = fault.map(vcpu, next, pages, now);
        mapped += done;
        if done < found {
            return (mapped as u16, Some(Reason::Refused));
        }
        if found == 0 || found < ask && budget == 0 {
            let none = mapped == 0;
            return (mapped as u16, none.then_some(Reason::NotBacked));
        }
    }
    (mapped as u16, None)
}

static REPORTED: AtomicBool = AtomicBool::new(false);

#[cold]
fn report(counters: &super::Counters, page: u64) {
    counters.mismatches.bump();
    if !REPORTED.swap(true, Ordering::Relaxed) {
        pr_warn!("direct: stock does not map frame {page:#x}, which has memory\n");
    }
}
