// SPDX-License-Identifier: GPL-2.0
//! IA32_DEBUGCTL: a KVM in L1 reads it each time before it enters L2, and each time exits for it.
//!
//! While L1 runs, the processor's register has what vmcs01 says, for which the stock code lets L1 exit to leave out the
//! bits that are the host's (`VMX_HOST_OWNED_DEBUGCTL_BITS`). Where these are clear, and L1 has not written the register
//! since it was loaded with 0 at an exit of L2, a read gives 0 either way, and is let through. Writes exit as ever.
//!
//! It is closed again before the next entry when the host sets one of its bits, before L1 or the VMM writes the
//! register, and when the VMM changes its filter of MSRs, which is asked again before the next time.

use super::mode;
use crate::{
    bindings,
    hook::{Continuation, Verdict},
    kvm::Vcpu,
    path::{CounterSet, Local},
    policy::mode::Mode,
    state,
};
use core::sync::atomic::{AtomicBool, Ordering};

/// Whether reads are let through.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reads {
    /// They exit.
    Exit,
    /// They pass.
    Pass,
    /// They exit because the VMM's filter or a lack of bitmaps wants it.
    Refused,
}

/// What is kept for one vCPU.
pub(super) struct Memory(Reads);

impl Memory {
    pub(super) const NEW: Memory = Memory(Reads::Exit);

    /// `Reads::Pass` must not be forgotten.
    pub(super) fn clear(&mut self) {
        if self.0 == Reads::Refused {
            self.0 = Reads::Exit;
        }
    }

    /// L1's IA32_DEBUGCTL has just been loaded with 0 and the host's bits.
    ///
    /// # Safety
    ///
    /// In the handler of load_vmcs12_host_state().
    #[inline(always)]
    pub(super) unsafe fn loaded(&mut self, vcpu: Vcpu, counters: &CounterSet) {
        if self.0 == Reads::Exit && !vcpu.host_owns_debugctl() {
            // SAFETY: By this function's contract.
            unsafe { self.open(vcpu, counters) };
        }
    }

    /// Lets reads through, if the VMM's filter allows it.
    ///
    /// # Safety
    ///
    /// As for `loaded`.
    #[cold]
    unsafe fn open(&mut self, vcpu: Vcpu, counters: &CounterSet) {
        // Anew, in the handler's section, for which a thread waits that has just switched the path off.
        if mode() != Mode::On {
            return;
        }
        counters.fields.note_thread();
        // SAFETY: By this function's contract.
        self.0 = if unsafe { vcpu.pass_debugctl_reads(true) } {
            Reads::Pass
        } else {
            Reads::Refused
        };
        counters
            .nested_switch
            .debugctl
            .0
            .store(self.0 == Reads::Pass, Ordering::Release);
    }

    /// Has reads exit again.
    fn close(&mut self, vcpu: Vcpu, counters: &CounterSet) {
        if self.0 == Reads::Pass {
            // SAFETY: In a handler on the vCPU's thread.
            unsafe { vcpu.pass_debugctl_reads(false) };
        }
        self.0 = Reads::Exit;
        counters
            .nested_switch
            .debugctl
            .0
            .store(false, Ordering::Release);
    }
}

#[cold]
#[inline(never)]
fn close(vcpu: Vcpu) {
    state::with(vcpu, |local: &mut Local, counters| {
        local.nested_switch.debugctl.close(vcpu, counters);
    });
}

/// In the handler of vmx_vcpu_run(), with interrupts off: what the host has in its own register is settled. Whether reads
/// must exit.
#[inline(always)]
pub(super) fn must_close(vcpu: Vcpu) -> bool {
    vcpu.host_owns_debugctl() || mode() != Mode::On
}

/// At that place, has them exit if they must.
pub(super) fn before_run(vcpu: Vcpu) {
    if must_close(vcpu) {
        close(vcpu);
    }
}

/// Handler of vmx_set_msr().
#[no_mangle]
extern "C" fn mtk_on_set_msr(
    raw: *mut bindings::kvm_vcpu,
    msr: *const bindings::msr_data,
    _cont: Continuation,
) -> Verdict {
    // SAFETY: KVM's own structure, the hooked function's argument.
    if unsafe { (*msr).index } == bindings::MTK_MSR_DEBUGCTL {
        // SAFETY: As above.
        close(unsafe { Vcpu::from_hook(raw) });
    }
    Verdict::STOCK
}

/// Handler of vmx_recalc_intercepts().
#[no_mangle]
extern "C" fn mtk_on_recalc_intercepts(
    raw: *mut bindings::kvm_vcpu,
    _cont: Continuation,
) -> Verdict {
    // SAFETY: The hooked function's own argument.
    close(unsafe { Vcpu::from_hook(raw) });
    Verdict::STOCK
}

/// Gives the vCPU back to the stock code.
pub(super) fn withdraw(vcpu: Vcpu) {
    close(vcpu);
}

/// What another thread may know about a vCPU: that reads pass.
pub(crate) struct Shared(AtomicBool);

impl Shared {
    pub(crate) const fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    pub(super) fn is_open(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}
