// SPDX-License-Identifier: GPL-2.0
//! kvm_apic_has_interrupt() and vmx_sync_pir_to_irr(): whether an interrupt waits in the vCPU's local APIC, which KVM asks
//! five times on the way into L2 and out of it, and looks for bit by bit.
//!
//! Nothing is remembered: interrupts come at any time. The plain case, that there is none and nothing to be written either,
//! is found out with a few words; in any other the stock function runs.

use super::{mismatch, mode, takes_detour, NUMBER};
use crate::{
    bindings,
    hook::{Continuation, HookId, InFlight, Verdict},
    kvm::Vcpu,
    policy::mode::Mode,
    state,
};
use core::sync::atomic::AtomicBool;
use kernel::prelude::*;

/// What both functions return when there is no interrupt.
const NONE: i32 = -1;

static REPORTED: AtomicBool = AtomicBool::new(false);

/// The handler of both: `none` says whether the stock function would return [`NONE`] and change nothing.
///
/// vCPUs that have never entered an L2 have no state and are left alone.
#[inline(always)]
fn ask(vcpu: Vcpu, hook: HookId, none: impl Fn() -> bool, cont: Continuation) -> Verdict {
    match mode() {
        Mode::Off => Verdict::STOCK,
        Mode::On => {
            let answer = state::with(vcpu, |local, counters| {
                let count = counters.path::<NUMBER>();
                let detour = &mut local.nested_switch.detour;
                let answer = none() && !takes_detour(detour, count);
                if answer {
                    count.taken.bump();
                }
                answer
            });
            match answer {
                Some(true) => Verdict::handled(NONE as usize),
                _ => Verdict::STOCK,
            }
        }
        Mode::Check => compare(vcpu, hook, none, cont),
    }
}

/// Lets the stock function answer, and compares.
#[cold]
fn compare(vcpu: Vcpu, hook: HookId, none: impl Fn() -> bool, cont: Continuation) -> Verdict {
    let section = InFlight::enter(hook);
    let before = none();
    // SAFETY: This handler's continuation and the hooked function's own argument.
    let ret = unsafe { section.call_stock(cont, [vcpu.key(), 0, 0]) };
    state::with(vcpu, |_, counters| {
        // An interrupt may have come meanwhile; it would still be there.
        if before && none() {
            let count = counters.path::<NUMBER>();
            count.checked.bump();
            if ret as i32 != NONE && mismatch(count, &REPORTED) {
                pr_warn!(
                    "nested_switch: stock found interrupt {} where there was none\n",
                    ret as i32
                );
            }
        }
    });
    Verdict::handled(ret)
}

/// Handler of kvm_apic_has_interrupt().
#[no_mangle]
extern "C" fn mtk_on_has_interrupt(raw: *mut bindings::kvm_vcpu, cont: Continuation) -> Verdict {
    // SAFETY: The hooked function's own argument, in its handler. A TDX guest's vCPU has no state, and its APIC is protected.
    let vcpu = unsafe { Vcpu::from_hook(raw) };
    ask(
        vcpu,
        HookId::HAS_INTERRUPT,
        || vcpu.has_no_interrupt(),
        cont,
    )
}

/// Handler of vmx_sync_pir_to_irr(), which KVM also calls with interrupts off.
#[no_mangle]
extern "C" fn mtk_on_sync_pir(raw: *mut bindings::kvm_vcpu, cont: Continuation) -> Verdict {
    // SAFETY: The hooked function's own argument, in its handler.
    let vcpu = unsafe { Vcpu::from_hook(raw) };
    ask(
        vcpu,
        HookId::SYNC_PIR,
        || vcpu.requests_no_interrupt(),
        cont,
    )
}
