// SPDX-License-Identifier: GPL-2.0
//! A run of the guest, from VM entry to VM exit, which more than one path wants to see, and what is answered right behind it, without leaving
//! KVM's inner loop (`vmptrld::fast`, `nested_switch::inner`).
//!
//! To call the hooked function rather than let it run costs a little, so that is done only for a guest that has exited lately in a way that is answered.

#[cfg(MTK_GVA_WALK)]
use super::nested_switch::inner;
use super::{nested_switch, vmptrld::fast};
#[cfg(MTK_GVA_WALK)]
use crate::kvm::roots::Root;
use crate::{
    bindings,
    hook::{Continuation, HookId, InFlight, Verdict},
    kvm::{fast_exit::Fastpath, Vcpu},
    state,
};

/// Exit reason of VMRESUME (SDM appendix C), without any of the modifiers.
#[cfg(MTK_GVA_WALK)]
const VMRESUME: u32 = 24;

/// Whether the next exits of a guest are worth looking at here.
struct Hope(u8);

impl Hope {
    /// Nothing speaks for it.
    const NONE: Hope = Hope(0);
    /// How many exits in a row may be others.
    const PATIENCE: u8 = 16;

    #[inline(always)]
    fn rise(&mut self) {
        self.0 = Self::PATIENCE;
    }

    /// The guest is about to run. Whether to look at its exit.
    #[inline(always)]
    fn spend(&mut self) -> bool {
        if self.0 == 0 {
            return false;
        }
        self.0 = self.0.wrapping_sub(1);
        true
    }
}

/// What is kept for one vCPU.
pub(crate) struct Memory {
    l1: Hope,
    l2: Hope,
    /// L2 exits to L1 inside KVM's loop, and this is the root that L1 is to have.
    #[cfg(MTK_GVA_WALK)]
    pub(super) leaving: Option<Root>,
}

impl Memory {
    pub(crate) const NEW: Memory = Memory {
        l1: Hope::NONE,
        l2: Hope::NONE,
        #[cfg(MTK_GVA_WALK)]
        leaving: None,
    };

    /// Nothing is going on in KVM's loop.
    pub(super) fn forget(&mut self) {
        #[cfg(MTK_GVA_WALK)]
        {
            self.leaving = None;
        }
    }

    /// L1 has executed an instruction that is answered.
    #[inline(always)]
    pub(super) fn answered(&mut self) {
        self.l1.rise();
    }

    /// L1 has entered L2, or L2 has exited to it.
    #[inline(always)]
    pub(super) fn switched(&mut self) {
        self.l1.rise();
        self.l2.rise();
    }

    #[inline(always)]
    fn of(&mut self, nested: bool) -> &mut Hope {
        if nested {
            &mut self.l2
        } else {
            &mut self.l1
        }
    }
}

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
    run(vcpu, flags, cont)
}

#[inline(never)]
fn settle_and_run(vcpu: Vcpu, flags: u64, cont: Continuation) -> Verdict {
    nested_switch::settle(vcpu);
    run(vcpu, flags, cont)
}

#[inline(always)]
fn run(vcpu: Vcpu, flags: u64, cont: Continuation) -> Verdict {
    // In a real-time kernel even a spinlock may sleep.
    if cfg!(CONFIG_PREEMPT_RT) || !vcpu.vmxon() {
        return Verdict::STOCK;
    }
    let nested = vcpu.guest_mode();
    if cfg!(not(MTK_GVA_WALK)) && nested {
        return Verdict::STOCK;
    }
    let hopes = state::with(vcpu, |local, _| local.run.of(nested).spend());
    if hopes != Some(true) {
        return Verdict::STOCK;
    }
    // SAFETY: In this very handler.
    unsafe { run_and_answer(vcpu, flags, cont) }
}

/// Runs the guest and looks at its exit, and runs it again for as long as KVM's own loop would.
///
/// # Safety
///
/// In the handler of vmx_vcpu_run(), with its own arguments.
#[inline(never)]
unsafe fn run_and_answer(vcpu: Vcpu, flags: u64, cont: Continuation) -> Verdict {
    let section = InFlight::enter(HookId::VCPU_RUN);
    let mut flags = flags;
    let mut rounds = 0u32;
    loop {
        // SAFETY: By this function's contract, the arguments being those that KVM's loop would pass.
        let value = unsafe { section.call_stock(cont, [vcpu.key(), flags as usize]) };
        if Fastpath::from_stock(value) != Fastpath::NONE {
            return Verdict::handled(value);
        }
        // SAFETY: The guest has just exited.
        match unsafe { answer(vcpu) } {
            Next::Entered(with) => flags = with,
            // Out of the loop for once, for what KVM does outside without having been asked to.
            Next::Answered | Next::Left if rounds >= ROUNDS => {
                return Verdict::handled(Fastpath::HANDLED.to_stock());
            }
            Next::Answered if vcpu.may_run_on() => flags = 0,
            Next::Left if vcpu.may_run_on() && vcpu.requests_no_interrupt() => flags = 0,
            Next::Answered | Next::Left => return Verdict::handled(Fastpath::REENTER.to_stock()),
            Next::Return(fastpath) => return Verdict::handled(fastpath.to_stock()),
        }
        rounds = rounds.wrapping_add(1);
        vcpu.count_exit();
        if nested_switch::has_to_settle(vcpu) {
            nested_switch::settle(vcpu);
        }
    }
}

/// After so many exits KVM's loop is left, although nothing is to be done that is known of.
const ROUNDS: u32 = 64;

/// What comes after an exit.
enum Next {
    /// vmx_vcpu_run() returns this.
    Return(Fastpath),
    /// L1 has executed an instruction, and can run on.
    Answered,
    /// L2 has exited to L1, which can run. KVM brings up to date which interrupt the processor is to deliver to L1.
    #[cfg_attr(not(MTK_GVA_WALK), expect(dead_code))]
    Left,
    /// L2 was entered and must be run, with these flags.
    #[cfg_attr(not(MTK_GVA_WALK), expect(dead_code))]
    Entered(u64),
}

/// # Safety
///
/// The guest has just exited, and KVM has neither loaded another VMCS nor turned interrupts on since.
#[inline(always)]
unsafe fn answer(vcpu: Vcpu) -> Next {
    #[cfg(MTK_GVA_WALK)]
    if vcpu.guest_mode() {
        // SAFETY: By this function's contract.
        return match unsafe { inner::exit(vcpu) } {
            Some(Fastpath::REENTER) => Next::Left,
            Some(fastpath) => Next::Return(fastpath),
            None => Next::Return(Fastpath::NONE),
        };
    }
    let reason = vcpu.full_exit_reason();
    #[cfg(MTK_GVA_WALK)]
    if reason == VMRESUME {
        // SAFETY: By this function's contract.
        return unsafe { inner::enter(vcpu) }.map_or(Next::Return(Fastpath::NONE), Next::Entered);
    }
    // SAFETY: By this function's contract: L1, which runs with vmcs01.
    match unsafe { fast::answer(vcpu, reason) } {
        Some(Fastpath::REENTER) => Next::Answered,
        Some(fastpath) => Next::Return(fastpath),
        None => Next::Return(Fastpath::NONE),
    }
}
