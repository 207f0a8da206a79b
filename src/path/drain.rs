// SPDX-License-Identifier: GPL-2.0
//! Giving vCPUs back to the stock code, running or not.

use super::{fields, l2fields, CounterSet};
use crate::{
    bindings,
    hook::{self, CallId, Continuation, HookId, Verdict},
    kvm::{thread, Held, Vcpu},
    state,
};

/// Handler of vmx_prepare_switch_to_guest(), a drain hook: a vCPU that is about to run gives itself back.
#[no_mangle]
extern "C" fn mtk_on_enter_guest(raw: *mut bindings::kvm_vcpu, _cont: Continuation) -> Verdict {
    // SAFETY: The hooked function's own argument.
    let vcpu = unsafe { Vcpu::from_hook(raw) };
    l2fields::leave(vcpu);
    fields::leave(vcpu);
    Verdict::STOCK
}

/// Rounds of about a millisecond after which a vCPU that sleeps in KVM_RUN is woken.
const PATIENCE: u32 = 50;

/// Waits until no handler of a path that has just been switched off can act on the mode that it had: neither
/// one that runs with preemption off nor one inside a section of `sections`, which looks at the mode once it
/// is in.
pub(super) fn wait_for_handlers(sections: &[HookId]) {
    hook::wait_for_atomic_handlers();
    for id in sections {
        while id.in_flight() != 0 {
            // SAFETY: Process context.
            unsafe { bindings::msleep(1) };
        }
    }
}

/// Sends a vCPU that sleeps in KVM_RUN out, as by a signal; its VMM sees EINTR.
///
/// # Safety
///
/// The vCPU is not freed meanwhile.
unsafe fn send_out(raw: *mut bindings::kvm_vcpu, counters: &CounterSet) {
    thread::interrupt(counters.fields.thread());
    // SAFETY: By this function's contract; wakes the vCPU's thread if it sleeps in
    // kvm_vcpu_block().
    unsafe { CallId::WAKE_UP.call([raw as usize]) };
}

/// Sends every vCPU's thread out of an interruptible wait, and of KVM_RUN, as far as it is known.
pub(crate) fn interrupt_all() {
    state::for_each_counters(|counters| thread::interrupt(counters.fields.thread()));
}

/// Waits until nothing is kept for any vCPU. One that runs gives it back on its next exit, one that sleeps in
/// KVM_RUN is sent out, and one that is out has nothing.
pub(super) fn wait_until_none(sections: &[HookId], holding: fn(&CounterSet) -> bool) {
    wait_for_handlers(sections);
    let mut rounds = 0u32;
    loop {
        let mut left = false;
        state::for_each_vcpu(|raw, counters| {
            if holding(counters) {
                left = true;
                if rounds >= PATIENCE {
                    // SAFETY: Neither vCPU nor state goes meanwhile (`for_each_vcpu`).
                    unsafe { send_out(raw, counters) };
                }
            }
        });
        if !left {
            return;
        }
        rounds = rounds.saturating_add(1);
        // SAFETY: Process context.
        unsafe { bindings::msleep(1) };
    }
}

/// Gives every vCPU back for which `pending` holds. A vCPU that runs does it on its next entry (a tick of the
/// host is enough to bring it there); one that is out of KVM_RUN is done here, by `give_back` under its mutex;
/// one that sleeps inside is sent out.
pub(super) fn drain(sections: &[HookId], pending: fn(&CounterSet) -> bool, give_back: fn(Vcpu)) {
    wait_for_handlers(sections);
    let mut rounds = 0u32;
    loop {
        let mut left = 0;
        state::for_each_vcpu(|raw, counters| {
            if !pending(counters) {
                return;
            }
            // SAFETY: The vCPU cannot be freed: its state is dropped first, which waits for us.
            let Some(held) = (unsafe { Held::try_take(raw) }) else {
                left += 1;
                if rounds >= PATIENCE {
                    // SAFETY: Neither vCPU nor state goes meanwhile (`for_each_vcpu`).
                    unsafe { send_out(raw, counters) };
                }
                return;
            };
            // SAFETY: The mutex is held, as for an ioctl on the vCPU, which loads it the same way.
            unsafe {
                let args = [raw as usize];
                if CallId::VCPU_LOAD.call(args).is_some() {
                    give_back(Vcpu::from_hook(raw));
                    CallId::VCPU_PUT.call(args);
                }
            }
            drop(held);
            left += usize::from(pending(counters));
        });
        if left == 0 {
            return;
        }
        rounds = rounds.saturating_add(1);
        // SAFETY: Process context.
        unsafe { bindings::msleep(1) };
    }
}
