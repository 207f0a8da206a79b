// SPDX-License-Identifier: GPL-2.0
//! VMLAUNCH and VMRESUME by L1, which more than one path wants to see, and what they put to use.

#[cfg(MTK_GVA_WALK)]
use super::nested_switch::ept_mmu;
use super::{l2fields, prefault, vmptrld::roots};
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

/// Handler of nested_ept_new_eptp(): L1's EPT is put to use, with another pointer or not.
#[no_mangle]
extern "C" fn mtk_on_new_eptp(raw: *mut bindings::kvm_vcpu, cont: Continuation) -> Verdict {
    // SAFETY: The hooked function's own argument.
    let vcpu = unsafe { Vcpu::from_hook(raw) };
    let todo = state::with(vcpu, |local, counters| {
        #[cfg(MTK_GVA_WALK)]
        let learns = ept_mmu::prime(local, vcpu, counters);
        #[cfg(not(MTK_GVA_WALK))]
        let (learns, _) = (false, counters);
        (learns, local.regions.roots.are_kept())
    });
    let Some((learns, kept)) = todo.filter(|&(learns, kept)| learns | kept) else {
        return Verdict::STOCK;
    };
    let section = InFlight::enter(HookId::NEW_EPTP);
    // SAFETY: This handler's continuation and the hooked function's own argument.
    let value = unsafe { section.call_stock(cont, [vcpu.key()]) };
    #[cfg(MTK_GVA_WALK)]
    if learns {
        state::with(vcpu, |local, counters| {
            ept_mmu::learn(local, vcpu, counters)
        });
    }
    #[cfg(not(MTK_GVA_WALK))]
    let _ = learns;
    if kept {
        roots::renew(vcpu, &section);
    }
    Verdict::handled(value)
}
