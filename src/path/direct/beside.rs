// SPDX-License-Identifier: GPL-2.0
//! A hypervisor that writes to a page near its own page tables gets back the right to write to the others near them.
//!
//! KVM takes it from all of a large page when a table in it is shadowed, and gives it back page by page
//! (`kvm::write_protected`). Without the knob `beside`, or where few pages are to be had, stock KVM does as it likes.
//!
//! Mode `check` gives nothing back, and sees whether stock KVM makes of the page that was written to what this path would have.

use super::{mode, Reason, BESIDE, NUMBER};
use crate::{
    bindings,
    hook::{Continuation, HookId, InFlight, Verdict},
    kvm::{
        write_protected::{Expected, Outcome, Write},
        Vcpu,
    },
    policy::{mode::Mode, pause::Pause},
    state,
};
use core::sync::atomic::{AtomicBool, Ordering};
use kernel::prelude::*;

/// What is remembered about a vCPU.
pub(super) struct Memory(Pause);

impl Memory {
    /// Nothing yet.
    pub(super) const NEW: Memory = Memory(Pause::new());
}

/// A write to a page that is there and may not be written to: a table, or a page that happens to be near one.
///
/// # Safety
///
/// In the handler of kvm_tdp_page_fault(), with its arguments.
pub(super) unsafe fn written(
    vcpu: Vcpu,
    write: &Write,
    ptr: *mut bindings::kvm_page_fault,
    cont: Continuation,
) -> Verdict {
    if !BESIDE.load(Ordering::Relaxed)
        || vcpu.guest_mode()
        || vcpu.in_smm()
        || !vcpu.is_of_default_vm()
    {
        return Verdict::STOCK;
    }
    let is_over = state::with(vcpu, |local, _| {
        let pause = &mut local.direct.beside.0;
        let is_over = pause.is_over();
        pause.pass();
        is_over
    });
    let checks = mode() == Mode::Check;
    if is_over == Some(false) && !checks {
        return Verdict::STOCK;
    }
    let section = InFlight::enter(HookId::TDP_PAGE_FAULT);
    let expected = if checks { write.expected(vcpu) } else { None };
    // SAFETY: This handler's continuation and the hooked function's own arguments.
    let value = unsafe { section.call_stock(cont, [vcpu.key(), ptr as usize, 0]) };
    if is_over.is_none() {
        if !state::ensure(vcpu, &section) {
            super::super::count_stateless(NUMBER, Reason::NoMemory as usize);
        }
        return Verdict::handled(value);
    }
    // SAFETY: The function has just run and its caller owns the structure.
    let level = unsafe { (*ptr).goal_level };
    let is_fixed = value as i32 == bindings::MTK_RET_PF_FIXED as i32 && level == 1;
    state::with(vcpu, |local, counters| {
        let counters = counters.path::<NUMBER>();
        if checks {
            if let Some(expected) = expected {
                check(vcpu, write, expected, value as i32, counters);
            }
            return;
        }
        if !is_fixed {
            // A table of an upper level, or to be tried again.
            return;
        }
        match write.give_back(vcpu) {
            // Somebody waits for the lock, or it is a large page after all.
            None => {}
            Some(0) => {
                counters.fall_back(Reason::NoneBeside as usize);
                local.direct.beside.0.missed();
            }
            Some(_) => {
                counters.taken.bump();
                local.direct.beside.0.found();
            }
        }
    });
    Verdict::handled(value)
}

/// Compares what stock KVM has made of a page with what was expected.
fn check(
    vcpu: Vcpu,
    write: &Write,
    expected: Expected,
    value: i32,
    counters: &super::super::Counters,
) {
    let protected = [
        bindings::MTK_RET_PF_EMULATE as i32,
        bindings::MTK_RET_PF_WRITE_PROTECTED as i32,
    ];
    let is_right = if value == bindings::MTK_RET_PF_FIXED as i32 {
        write.outcome(vcpu, expected) != Outcome::Other
    } else if protected.contains(&value) {
        // It may have become a table while the other question was asked.
        write.expected(vcpu).is_none()
    } else {
        return;
    };
    counters.checked.bump();
    if !is_right {
        report(counters, write.page());
    }
}

static REPORTED: AtomicBool = AtomicBool::new(false);

#[cold]
fn report(counters: &super::super::Counters, page: u64) {
    counters.mismatches.bump();
    if !REPORTED.swap(true, Ordering::Relaxed) {
        pr_warn!("direct: stock treats a write to frame {page:#x} in another way\n");
    }
}
