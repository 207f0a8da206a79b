// SPDX-License-Identifier: GPL-2.0
//! VMLAUNCH and VMRESUME by L1, which more than one path wants to see.

use super::{l2fields, prefault};
use crate::{
    bindings,
    hook::{Continuation, HookId, InFlight, Verdict},
    kvm::Vcpu,
    state,
};

/// Handler of nested_vmx_run().
#[no_mangle]
extern "C" fn mtk_on_nested_run(
    raw: *mut bindings::kvm_vcpu,
    launch: usize,
    cont: Continuation,
) -> Verdict {
    // SAFETY: The hooked function's own argument.
    let vcpu = unsafe { Vcpu::from_hook(raw) };
    let concerned = |local: &mut super::Local, _: &_| {
        l2fields::has_learned(local) || prefault::is_awaiting(local)
    };
    if state::with(vcpu, concerned) != Some(true) {
        return Verdict::STOCK;
    }
    let section = InFlight::enter(HookId::NESTED_RUN);
    state::with(vcpu, |local, counters| {
        l2fields::before_entry(vcpu, local, counters);
    });
    // SAFETY: This handler's continuation and the hooked function's own arguments.
    let value = unsafe { section.call_stock(cont, [vcpu.key(), launch, 0]) };
    state::with(vcpu, |local, counters| {
        l2fields::entered(vcpu, local, counters);
        prefault::resumed(vcpu, local, counters);
    });
    Verdict::handled(value)
}
