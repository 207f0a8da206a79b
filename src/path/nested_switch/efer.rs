// SPDX-License-Identifier: GPL-2.0
//! vmx_set_efer(): KVM looks six MSRs up in a table, each time that L1 or L2 is entered by the other, to find that
//! the same ones as before are to be loaded with the guest.
//!
//! What the function leaves behind follows from its argument and from CPUID: which MSRs are loaded, two controls, and
//! the EFER in the VMCS. The last result is kept for each of two arguments, L1's and L2's, and made again where
//! something else is found.

use super::{ensure, mismatch, mode, takes_detour, Reason, NUMBER};
use crate::{
    bindings,
    hook::{Continuation, HookId, InFlight, Verdict},
    kvm::{efer::EferState, Vcpu},
    policy::mode::Mode,
    state,
};
use core::sync::atomic::AtomicBool;
use kernel::prelude::*;

const HOOK: HookId = HookId::SET_EFER;

/// What vmx_set_efer() left behind for the arguments that it had last.
pub(super) struct Memory([Option<EferState>; 2]);

impl Memory {
    pub(super) const NEW: Memory = Memory([None; 2]);

    pub(super) fn clear(&mut self) {
        *self = Self::NEW;
    }

    /// What vmx_set_efer() with this argument makes.
    #[inline(always)]
    pub(super) fn get(&self, vcpu: Vcpu, efer: u64) -> Option<&EferState> {
        let known = self.0.iter().flatten().find(|known| known.efer() == efer)?;
        EferState::is_applicable(vcpu).then_some(known)
    }

    fn remember(&mut self, state: EferState) {
        let [first, second] = &mut self.0;
        if first.is_some_and(|known| known.efer() != state.efer()) {
            if second.is_some_and(|known| known.efer() != state.efer()) {
                *second = *first;
                *first = Some(state);
            } else {
                *second = Some(state);
            }
        } else {
            *first = Some(state);
        }
    }
}

/// Handler of vmx_set_efer().
#[no_mangle]
extern "C" fn mtk_on_set_efer(
    raw: *mut bindings::kvm_vcpu,
    efer: u64,
    cont: Continuation,
) -> Verdict {
    // SAFETY: The hooked function's own argument, in its handler.
    let vcpu = unsafe { Vcpu::from_hook(raw) };
    match mode() {
        Mode::Off => return Verdict::STOCK,
        Mode::Check => (),
        Mode::On => {
            let hit = state::with(vcpu, |local, counters| {
                let memory = &mut local.nested_switch;
                let count = counters.path::<NUMBER>();
                let known = memory.efer.get(vcpu, efer)?;
                if takes_detour(&mut memory.detour, count) {
                    return None;
                }
                // SAFETY: In the handler of vmx_set_efer(); `get` has looked.
                unsafe { known.apply(vcpu) };
                count.taken.bump();
                Some(())
            });
            if let Some(Some(())) = hit {
                return Verdict::handled(0);
            }
        }
    }
    set_slowly(vcpu, efer, cont)
}

static REPORTED: AtomicBool = AtomicBool::new(false);

/// Lets the stock code do it, and remembers or compares.
#[cold]
#[inline(never)]
fn set_slowly(vcpu: Vcpu, efer: u64, cont: Continuation) -> Verdict {
    let section = InFlight::enter(HOOK);
    if !ensure(vcpu, &section) {
        return Verdict::STOCK;
    }
    // SAFETY: This handler's continuation and the hooked function's own arguments.
    let ret = unsafe { section.call_stock(cont, [vcpu.key(), efer as usize, 0]) };
    state::with(vcpu, |local, counters| {
        let count = counters.path::<NUMBER>();
        let memory = &mut local.nested_switch.efer;
        let known = memory.get(vcpu, efer).copied();
        let now = EferState::now(vcpu, efer);
        if known.is_some() {
            count.checked.bump();
            if now != known && mismatch(count, &REPORTED) {
                pr_warn!(
                    "nested_switch: vmx_set_efer() was to leave {known:x?} and left {now:x?}\n"
                );
            }
        } else {
            let reason = match now {
                None => Reason::Unusual,
                Some(_) => Reason::New,
            };
            count.fall_back(reason as usize);
        }
        if let Some(state) = now.filter(|_| ret as u32 == 0) {
            memory.remember(state);
        }
    });
    Verdict::handled(ret)
}
