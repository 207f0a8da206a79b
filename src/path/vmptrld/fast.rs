// SPDX-License-Identifier: GPL-2.0
//! VMPTRLD, VMCLEAR and INVVPID of L1 without leaving KVM's inner loop.
//!
//! Stock KVM answers a few kinds of exits right behind the VM exit, with interrupts still off, and has vcpu_enter_guest() run the
//! guest again at once (its *fast path*: a write of the TSC deadline, HLT with an interrupt waiting). That saves it the
//! way out to where every exit is handled and in again. What this path does for these three is
//! as short as what stock does there, and a KVM in the middle of a stack executes a dozen of them for each exit of its guest's guest.
//!
//! Only what cannot fail to be ready is done here: no allocation, no page that would have to be fetched, no roots to free, and no VMCS of
//! those that are kept to be written. Anything else goes on to the handler of the exit, which finds what it would have found.
//! Whether the guest may run on, `path::run` looks, or KVM itself (kvm_vcpu_exit_request()).

use super::{drop_current, load, mode, operand, roots::OldRoots, write_current, NUMBER};
use crate::{
    kvm::{
        fast_exit::{Fastpath, NoFaults},
        guest_memory::{GuestMemory, SrcuGuard},
        Vcpu,
    },
    path::{exits, l2fields::copies, nested_switch, CounterSet, Local},
    policy::mode::Mode,
    state,
};

/// Exit reasons (SDM appendix C), without any of the modifiers.
const VMCLEAR: u32 = 19;
const VMPTRLD: u32 = 21;
const INVVPID: u32 = 53;

/// Carries the instruction out, if it is one for us; `None` leaves it to the handler of the exit.
///
/// # Safety
///
/// L1 has just exited for this `reason`, and KVM has neither loaded another VMCS nor turned interrupts on since.
#[inline(always)]
pub(in crate::path) unsafe fn answer(vcpu: Vcpu, reason: u32) -> Option<Fastpath> {
    if !matches!(reason, VMCLEAR | VMPTRLD | INVVPID) || mode() != Mode::On {
        return None;
    }
    if !vcpu.has_plain_exit() || exits::is_counting() {
        return None;
    }
    let done = {
        let _slots = SrcuGuard::take(vcpu);
        let _no_faults = NoFaults::new();
        state::with(vcpu, |local, counters| {
            // SAFETY: By this function's contract.
            unsafe { act(vcpu, reason, local, counters) }?;
            counters.path::<NUMBER>().taken.bump();
            counters.path::<NUMBER>().short.bump();
            local.regions.publish(&counters.vmptrld);
            local.run.answered();
            Some(())
        })
    };
    done.flatten()?;
    // Without KVM's functions the handler of the exit does it again, and nothing else comes of it.
    Some(match vcpu.vm_succeed()? {
        0 => Fastpath::USERSPACE,
        _ if vcpu.sync_shadow() => Fastpath::REENTER,
        _ => Fastpath::HANDLED,
    })
}

/// What the instruction does, but for the end that all three have in common. `None`: nothing that must not be done twice.
///
/// # Safety
///
/// As for `answer`, with KVM's SRCU lock held and page faults off.
#[inline(always)]
unsafe fn act(vcpu: Vcpu, reason: u32, local: &mut Local, counters: &CounterSet) -> Option<()> {
    let able = !local.regions.images && vcpu.vmxon() && vcpu.vmcs01_is_loaded();
    if !able || nested_switch::sends_away(&mut local.nested_switch, counters) {
        return None;
    }
    // SAFETY: By this function's contract.
    let mut memory = unsafe { GuestMemory::new(vcpu) };
    if reason == INVVPID {
        // SAFETY: By this function's contract.
        return unsafe { vcpu.invvpid(&mut memory, &mut local.regions.descriptor) };
    }
    // SAFETY: By this function's contract.
    let vmptr = unsafe { operand(vcpu, &mut memory, local, counters) }.ok()?;
    let current = vcpu.current_vmptr();
    // What lies in vmcs02 is fetched by code that turns interrupts on; a shadow VMCS is written back at once.
    if vcpu.has_late_fields() || OldRoots::would_drop(vcpu) {
        return None;
    }
    if reason == VMCLEAR {
        copies::forget_in(local);
        if vmptr == current {
            // SAFETY: By this function's contract.
            unsafe {
                let written = write_current(vcpu, vmptr, local, counters).ok()?;
                if written {
                    drop_current(vcpu, local);
                }
                return written.then_some(());
            }
        }
    }
    let kept = local.regions.position(vmptr);
    if reason == VMCLEAR {
        // SAFETY: By this function's contract.
        let clears = || unsafe { SrcuGuard::take(vcpu).clear_launch_state(vmptr) };
        return (kept.is_none() && clears()).then_some(());
    }
    let leaves_shadow = current != super::NONE && vcpu.vmcs12()?.is_shadow();
    if leaves_shadow || !(kept.is_some() || local.regions.has_room()) {
        return None;
    }
    // SAFETY: By this function's contract; there is room.
    unsafe { load(vcpu, vmptr, kept, &mut memory, local, counters) }.ok()
}
