// SPDX-License-Identifier: GPL-2.0
//! A fault that is L1's to serve goes to L1 without KVM's walk of EPT12 (`kvm::absent`).
//!
//! Mode `check` lets stock KVM find it out, and compares what L1 was told.

use super::{mode, NUMBER};
use crate::{
    hook::CallId,
    kvm::{absent::Absent, ept02::PageFault, Vcpu},
    path::{nested_switch, Local},
    policy::mode::Mode,
    state,
    tracepoint::Tracepoint,
};
use core::sync::atomic::{AtomicBool, Ordering};
use kernel::prelude::*;

/// The tracepoints of the walk.
const WALK: [Tracepoint; 3] = [
    Tracepoint::PAGETABLE_WALK,
    Tracepoint::PAGING_ELEMENT,
    Tracepoint::WALKER_ERROR,
];

/// Reflects the fault if EPT12 has nothing there. Returns whether it has. May sleep.
///
/// # Safety
///
/// In the handler of ept_page_fault() for an access of L2, with KVM's SRCU lock held.
#[inline]
pub(super) unsafe fn reflect(vcpu: Vcpu, fault: &PageFault) -> bool {
    if !CallId::INJECT_EPT_FAULT.is_available()
        || !WALK.iter().all(|tracepoint| tracepoint.is_off())
    {
        return false;
    }
    let what = state::with(vcpu, |local, counters| {
        let what = vcpu.find_absent(&mut local.prefault.way, fault)?;
        if nested_switch::sends_away(&mut local.nested_switch, counters) {
            return None;
        }
        let counters = counters.path::<NUMBER>();
        counters.taken.bump();
        counters.short.bump();
        Some(what)
    });
    let Some(what) = what.flatten() else {
        return false;
    };
    // SAFETY: By this function's contract.
    unsafe { vcpu.reflect(&what) };
    true
}

/// What `reflect` would do, in mode `check`.
#[inline]
pub(super) fn expected(vcpu: Vcpu, fault: &PageFault) -> Option<Absent> {
    if mode() != Mode::Check {
        return None;
    }
    find(vcpu, fault)
}

fn find(vcpu: Vcpu, fault: &PageFault) -> Option<Absent> {
    let find = |local: &mut Local, _: &_| vcpu.find_absent(&mut local.prefault.way, fault);
    state::with(vcpu, find).flatten()
}

static REPORTED: AtomicBool = AtomicBool::new(false);

/// Compares what stock KVM has done with a fault at which EPT12 had nothing before.
#[cold]
pub(super) fn compare(vcpu: Vcpu, fault: &PageFault, what: &Absent) {
    if !vcpu.is_alone() {
        // Another vCPU of L1 may have mapped the page meanwhile, in any way.
        return;
    }
    let is_right = if vcpu.guest_mode() {
        // The VMM may have written to it.
        find(vcpu, fault).is_none()
    } else {
        vcpu.was_reflected(what)
    };
    state::with(vcpu, |_, counters| {
        let counters = counters.path::<NUMBER>();
        counters.checked.bump();
        if !is_right {
            counters.mismatches.bump();
            if !REPORTED.swap(true, Ordering::Relaxed) {
                pr_warn!("prefault: stock does something else at an absent page: {what:x?}\n");
            }
        }
    });
}
