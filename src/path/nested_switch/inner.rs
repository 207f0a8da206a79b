// SPDX-License-Identifier: GPL-2.0
//! VMRESUME of L1, and exits of L2 that are L1's, without leaving KVM's inner loop (see `path::vmptrld::fast`).
//!
//! KVM leaves the loop for either: it carries out requests, turns interrupts on and off, loads state and MSRs. What that makes of a switch in which nothing is
//! out of the ordinary is known (`kvm::inner_loop`), and done here.
//!
//! Interrupts are off, so nothing may wait: guest memory is read and written where it is there (`NoFaults`), no page is looked up or let go of, no root made or
//! given up (mmu_lock is not taken: who holds it may wait for this CPU), no list of MSRs walked. All of that is looked at before anything happens; whatever
//! speaks against it leaves the exit to KVM's handler, which finds what it would have found.
//!
//! - *Exit*: what L2 has written to its shadow VMCS goes to L1's memory first, which may fail. Then KVM's own __nested_vmx_vmexit() does the rest, with
//!   the hooks in it. Whether L1 may run on, KVM looks itself.
//! - *Entry*: nested_vmx_run() for an L2 that the other parts know. L2 then runs at once: KVM's loop is not returned to with an entry pending, for
//!   its way out takes what has happened for an exit of L2. If there is something that KVM should look at before L2 runs, L2 is entered so that it exits before its first
//!   instruction, which is how KVM itself goes about it (`KVM_RUN_FORCE_IMMEDIATE_EXIT`).

use super::{enter, ept_mmu, host_state, mode, pages, sends_away, NUMBER};
use crate::{
    bindings,
    hook::{HookId, InFlight},
    kvm::{
        entry::Made,
        fast_exit::{Fastpath, NoFaults},
        guest_memory::{GuestMemory, SrcuGuard},
        inner_loop,
        vmcs12::field,
        Vcpu, Vmcs12,
    },
    path::{checks, exits, fields, l2fields, prefault, CounterSet, Local},
    policy::{
        controls::{secondary::EPT, vm_exit::HOST_ADDRESS_SPACE_SIZE},
        mode::Mode,
        reflect::{self, Owner},
        registers::EFER_LMA,
    },
    state,
    tracepoint::Tracepoint,
};

/// GUEST_ACTIVITY_ACTIVE.
const ACTIVE: u64 = 0;

/// Whether either may be tried: nothing is to be seen but the switch itself.
#[inline(always)]
fn is_plain(vcpu: Vcpu) -> bool {
    mode() == Mode::On
        && inner_loop::is_able()
        && pages::merges_alike()
        && vcpu.has_plain_exit()
        && vcpu.is_settled()
        && !exits::is_counting()
}

/// L2 has exited: has it exit to L1, if that wants it so and nothing is out of the ordinary. `None` leaves it to the handler of the exit.
///
/// # Safety
///
/// In the handler of vmx_vcpu_run(), which has run L2, with interrupts off.
#[inline(always)]
pub(in crate::path) unsafe fn exit(vcpu: Vcpu) -> Option<Fastpath> {
    let m = vcpu.vmcs12()?;
    let reason = vcpu.full_exit_reason();
    let owner = reflect::owner(reason);
    if owner == Owner::Unknown || !is_plain(vcpu) || !Tracepoint::NESTED_VMEXIT.is_off() {
        return None;
    }
    // Who switches the path off waits until this handler has ended, or, from here on, for the section.
    let _section = InFlight::enter(HookId::SYNC_VMCS02);
    let _slots = SrcuGuard::take(vcpu);
    let _no_faults = NoFaults::new();
    let ready = state::with(vcpu, |local, counters| {
        // SAFETY: By this function's contract.
        unsafe { is_ready_to_exit(vcpu, m, owner, local, counters) }
    });
    // SAFETY: By this function's contract and what `is_ready_to_exit` has looked at.
    if ready != Some(true) || !unsafe { vcpu.exit_to_l1(reason) } {
        return None;
    }
    state::with(vcpu, |local, counters| {
        counters.path::<NUMBER>().short.bump();
        local.run.switched();
        local.run.leaving = None;
        l2fields::left(local);
    });
    // SAFETY: By this function's contract; L1 is to run.
    Some(if unsafe { vcpu.settle_switch() } {
        Fastpath::REENTER
    } else {
        Fastpath::HANDLED
    })
}

/// Whether __nested_vmx_vmexit() can be called: it will not have to wait, and no access of it to guest memory can fail.
///
/// # Safety
///
/// As for `exit`, with KVM's SRCU lock held.
#[inline(always)]
unsafe fn is_ready_to_exit(
    vcpu: Vcpu,
    m: Vmcs12,
    owner: Owner,
    local: &mut Local,
    counters: &CounterSet,
) -> bool {
    let plain = field!(m, vm_exit_msr_store_count) == 0
        && vcpu.keeps_extended_state(field!(m, host_cr4))
        // SAFETY: By this function's contract.
        && unsafe { is_l1s(vcpu, m, owner) }
        && pages::are_ours(vcpu, &local.nested_switch.pages)
        && !sends_away(&mut local.nested_switch, counters);
    let root = host_state::root_to_load(vcpu, m, &local.nested_switch).filter(|_| plain);
    // SAFETY: As above.
    if root.is_none() || !unsafe { l2fields::write_ahead(vcpu, m, local) } {
        return false;
    }
    local.run.leaving = root;
    // SAFETY: L2 exits now.
    unsafe { pages::take_back(vcpu, &mut local.nested_switch.pages, counters) };
    true
}

/// Whether L1 wants the exit; not if that cannot be found out now.
///
/// # Safety
///
/// As for `is_ready_to_exit`.
#[inline(always)]
unsafe fn is_l1s(vcpu: Vcpu, m: Vmcs12, owner: Owner) -> bool {
    let sees = |bitmap: u64| {
        if !m.has_shadow_vmcs() {
            return true;
        }
        // SAFETY: By this function's contract.
        let sees = unsafe { vcpu.sees_access(bitmap, &mut GuestMemory::new(vcpu)) };
        sees == Some(true)
    };
    let sees_msr = |write: bool| {
        // SAFETY: By this function's contract.
        let sees = unsafe { vcpu.sees_msr(m, write, &mut GuestMemory::new(vcpu)) };
        sees == Some(true)
    };
    match owner {
        // The hypercalls that are L0's own are Hyper-V's.
        Owner::L1 => !vcpu.has_hyperv(),
        Owner::L1UnlessFaulting => !vcpu.cpuid_faults(),
        Owner::L1If(control) => m.primary_controls() & control != 0,
        Owner::L1IfNot(control, unless) => m.primary_controls() & (control | unless) == control,
        Owner::MsrBitmap { write } => sees_msr(write),
        Owner::VmreadBitmap => sees(field!(m, vmread_bitmap)),
        Owner::VmwriteBitmap => sees(field!(m, vmwrite_bitmap)),
        Owner::Unknown => false,
    }
}

/// L1 has executed VMRESUME: enters L2, if nothing is out of the ordinary. Then L2 has to be run at once, with the flags of vmx_vcpu_run() that
/// are returned. `None` leaves it to the handler of the exit.
///
/// # Safety
///
/// In the handler of vmx_vcpu_run(), which has run L1, with interrupts off.
#[inline(always)]
pub(in crate::path) unsafe fn enter(vcpu: Vcpu) -> Option<u64> {
    let m = vcpu.vmcs12()?;
    let able = is_plain(vcpu) && !vcpu.counts_branches() && !vcpu.logs_pages();
    // SAFETY: By this function's contract.
    if !able || !unsafe { vcpu.may_enter_l2() } {
        return None;
    }
    // Who switches a path off waits until this handler has ended, or, from here on, for those that may be about to enter L2.
    let _section = InFlight::enter(HookId::NESTED_RUN);
    let _slots = SrcuGuard::take(vcpu);
    let _no_faults = NoFaults::new();
    let planned = state::with(vcpu, |local, counters| {
        // SAFETY: By this function's contract.
        unsafe { start(vcpu, m, local, counters) }
    });
    let made = planned.flatten()?;
    // SAFETY: After everything else.
    unsafe {
        vcpu.finish_entry(m, made);
        inner_loop::request_l1d_flush();
    }
    state::with(vcpu, |local, counters| {
        if let Some(root) = made.ept02() {
            local.regions.roots.note_use(root);
        }
        // SAFETY: L2 has been entered, with what `start` has read.
        unsafe { l2fields::entered_ahead(vcpu, local, counters) };
        counters.path::<NUMBER>().short.bump();
        local.run.switched();
    });
    // SAFETY: By this function's contract; L2 is to run.
    Some(if unsafe { vcpu.settle_switch() } && vcpu.may_run_on() {
        0
    } else {
        u64::from(bindings::MTK_RUN_FORCE_IMMEDIATE_EXIT)
    })
}

/// All of the entry up to `finish_entry`. `None`: the handler of the exit finds what it would have found.
///
/// # Safety
///
/// As for `enter`, with KVM's SRCU lock held.
#[inline(always)]
unsafe fn start(vcpu: Vcpu, m: Vmcs12, local: &mut Local, counters: &CounterSet) -> Option<Made> {
    if !local.nested_switch.pause.is_over() {
        local.nested_switch.pause.pass();
        return None;
    }
    let able = !vcpu.enlightened_vmcs()
        && !prefault::is_awaiting(local)
        // SAFETY: By this function's contract. The copy out of the shadow VMCS: what follows looks at its result.
        && unsafe { fields::save_for_entry(vcpu, local, counters) };
    if !able {
        return None;
    }
    // SAFETY: By this function's contract.
    let started = unsafe { start_with(vcpu, m, local, counters) };
    match started {
        Some(_) => local.nested_switch.pause.found(),
        None => local.nested_switch.pause.missed(),
    }
    started
}

/// The same, vmcs12 having what L1 wrote last.
///
/// # Safety
///
/// As for `start`.
#[inline(always)]
unsafe fn start_with(
    vcpu: Vcpu,
    m: Vmcs12,
    local: &mut Local,
    counters: &CounterSet,
) -> Option<Made> {
    let plain = !m.is_shadow()
        && m.is_launched()
        && field!(m, guest_activity_state) == ACTIVE
        && field!(m, vm_exit_controls) as u32 & HOST_ADDRESS_SPACE_SIZE != 0
        && vcpu.efer() & EFER_LMA != 0
        && vcpu.has_no_breakpoints(field!(m, guest_dr7))
        && vcpu.keeps_extended_state(field!(m, guest_cr4))
        && checks::controls_and_host_state_hold(vcpu, m, &mut local.checks);
    if !plain {
        return None;
    }
    if m.secondary_controls() & EPT != 0 {
        ept_mmu::put(&mut local.nested_switch, vcpu, counters.path::<NUMBER>())?;
    }
    if !l2fields::read_ahead(vcpu, m, local) {
        return None;
    }
    l2fields::before_entry(vcpu, local, counters);
    vcpu.set_run_pending(true);
    // SAFETY: L1 has executed VMRESUME, and all that nested_vmx_run() does before was done.
    match unsafe { enter::enter::<true>(vcpu, m, local, counters) } {
        Ok(made) => {
            checks::took(counters);
            checks::took(counters);
            Some(made)
        }
        Err(_) => {
            vcpu.set_run_pending(false);
            l2fields::not_entered(local);
            None
        }
    }
}
