// SPDX-License-Identifier: GPL-2.0
//! The descriptor of L1's INVEPT and INVVPID, 16 bytes that kvm_read_guest_virt() reads by a walk of L1's page tables: found
//! where the last one was, like the operand of VMPTRLD.

use super::{mode, NUMBER};
use crate::{
    bindings,
    hook::{Continuation, HookId, InFlight, Verdict},
    kvm::{guest_memory::GuestMemory, Vcpu},
    policy::mode::Mode,
    state,
};
use core::sync::atomic::{AtomicBool, Ordering};
use kernel::prelude::*;

/// Bytes of a descriptor (SDM volume 3, 32.3); nothing else that this function reads for a hypervisor is as long.
const LEN: u32 = 16;
/// X86EMUL_CONTINUE: it was read.
const READ: usize = 0;

/// Handler of kvm_read_guest_virt().
#[no_mangle]
extern "C" fn mtk_on_read_virt(
    raw: *mut bindings::kvm_vcpu,
    address: usize,
    to: *mut [u64; 2],
    len: u32,
    exception: usize,
    cont: Continuation,
) -> Verdict {
    if len != LEN {
        return Verdict::STOCK;
    }
    // SAFETY: The hooked function's own argument.
    let vcpu = unsafe { Vcpu::from_hook(raw) };
    let mode = mode();
    // One of L2's is stock's: its paging is not in vmcs01.
    if mode == Mode::Off || vcpu.guest_mode() || !vcpu.vmxon() || !vcpu.is_in_run() {
        return Verdict::STOCK;
    }
    let section = InFlight::enter(HookId::READ_VIRT);
    let found = state::with(vcpu, |local, _| {
        local.run.answered();
        // SAFETY: kvm_read_guest_virt() is called in the handler of an exit, and may itself sleep.
        let mut memory = unsafe { GuestMemory::new(vcpu) };
        vcpu.descriptor_at(address as u64, &mut memory, &mut local.regions.descriptor)
    });
    let Some(found) = found.flatten() else {
        return Verdict::STOCK;
    };
    if mode == Mode::Check {
        let args = [raw as usize, address, to as usize, len as usize, exception];
        // SAFETY: This handler's continuation and the hooked function's own arguments.
        let value = unsafe { section.call_stock(cont, args) };
        // SAFETY: The hooked function has written there.
        let read = unsafe { to.read_unaligned() };
        compare(vcpu, value as u32 as usize == READ && read == found);
        return Verdict::handled(value);
    }
    // SAFETY: The caller's buffer of `LEN` bytes; what the stock function does to `exception` matters to nobody who is told
    // that it was read.
    unsafe { to.write_unaligned(found) };
    Verdict::handled(READ)
}

static REPORTED: AtomicBool = AtomicBool::new(false);

/// Another vCPU may write the descriptor between the two looks; none of the tests does.
#[cold]
fn compare(vcpu: Vcpu, same: bool) {
    state::with(vcpu, |_, counters| {
        let count = counters.path::<NUMBER>();
        count.checked.bump();
        if !same {
            count.mismatches.bump();
            if !REPORTED.swap(true, Ordering::Relaxed) {
                pr_warn!("vmptrld: the stock code reads another descriptor of INVEPT or INVVPID\n");
            }
        }
    });
}
