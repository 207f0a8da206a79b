// SPDX-License-Identifier: GPL-2.0
//! A run of the guest, from VM entry to VM exit, which more than one path wants to see.

use super::{nested_switch, vmptrld::fast};
use crate::{
    bindings,
    hook::{Continuation, Verdict},
    kvm::Vcpu,
};

/// Handler of vmx_vcpu_run(), with interrupts off.
#[no_mangle]
extern "C" fn mtk_on_vcpu_run(
    raw: *mut bindings::kvm_vcpu,
    flags: u64,
    cont: Continuation,
) -> Verdict {
    // SAFETY: The hooked function's own argument, in its handler.
    let vcpu = unsafe { Vcpu::from_hook(raw) };
    // A function of its own, so that this one, which each exit pays for, keeps nothing over a call.
    if nested_switch::has_to_settle(vcpu) {
        return settle_and_run(vcpu, flags, cont);
    }
    fast::run(vcpu, flags, cont)
}

#[inline(never)]
fn settle_and_run(vcpu: Vcpu, flags: u64, cont: Continuation) -> Verdict {
    nested_switch::settle(vcpu);
    fast::run(vcpu, flags, cont)
}
