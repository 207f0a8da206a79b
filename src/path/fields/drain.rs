// SPDX-License-Identifier: GPL-2.0
//! Giving vCPUs back to the stock code, running or not.

use super::NUMBER;
use crate::{
    bindings,
    hook::{self, CallId, Continuation, Verdict},
    kvm::{thread, Vcpu},
    policy::mode::Mode,
    state,
};
use core::sync::atomic::Ordering;

fn withdraw(vcpu: Vcpu) {
    state::with(vcpu, |local, counters| {
        let count = counters.path::<NUMBER>();
        // SAFETY: The vCPU is loaded on this CPU by this task, by the callers.
        unsafe {
            let regions = &mut local.regions;
            local
                .fields
                .withdraw(vcpu, regions, count, &counters.fields);
        }
    });
}

/// Handler of vmx_prepare_switch_to_guest(), a drain hook: a vCPU that is about to run gives itself back.
#[no_mangle]
extern "C" fn mtk_on_enter_guest(vcpu: *mut bindings::kvm_vcpu, _cont: Continuation) -> Verdict {
    if crate::path::mode(NUMBER) == Mode::Off {
        // SAFETY: The hooked function's own argument.
        withdraw(unsafe { Vcpu::from_hook(vcpu) });
    }
    Verdict::STOCK
}

/// Rounds of about a millisecond after which a vCPU that sleeps in KVM_RUN is woken.
const PATIENCE: u32 = 50;

/// Gives every vCPU back to the stock code. A vCPU that runs does it on its next entry (a tick of
/// the host is enough to bring it there); one that is out of KVM_RUN is done here, under its mutex;
/// one that sleeps inside is sent out, as by a signal, and its VMM sees EINTR.
pub(super) fn drain() {
    // A handler that saw the old mode may be about to extend its vCPU. It does so with preemption
    // off; once it is through, no vCPU is extended anew.
    hook::wait_for_atomic_handlers();
    let mut rounds = 0u32;
    loop {
        let mut left = 0;
        state::for_each_vcpu(|raw, counters| {
            if !counters.fields.is_extended() {
                return;
            }
            let mutex = Vcpu::mutex(raw);
            // SAFETY: The vCPU cannot be freed: its state is dropped first, which waits for us.
            if unsafe { bindings::mutex_trylock(mutex) } == 0 {
                left += 1;
                if rounds >= PATIENCE {
                    thread::interrupt(counters.fields.thread.load(Ordering::Relaxed));
                    // SAFETY: As above; wakes the vCPU's thread if it sleeps in kvm_vcpu_block().
                    unsafe { CallId::WAKE_UP.call([raw as usize]) };
                }
                return;
            }
            // SAFETY: The mutex is held, as for an ioctl on the vCPU, which loads it the same way.
            unsafe {
                let args = [raw as usize];
                if CallId::VCPU_LOAD.call(args).is_some() {
                    withdraw(Vcpu::from_hook(raw));
                    CallId::VCPU_PUT.call(args);
                }
                bindings::mutex_unlock(mutex);
            }
            left += usize::from(counters.fields.is_extended());
        });
        if left == 0 {
            break;
        }
        rounds = rounds.saturating_add(1);
        // SAFETY: Process context.
        unsafe { bindings::msleep(1) };
    }
}
