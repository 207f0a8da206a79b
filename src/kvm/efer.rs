// SPDX-License-Identifier: GPL-2.0
//! What vmx_set_efer() leaves behind for a guest in 64-bit mode.

use super::{vcpu::read, vmx, Vcpu};
use crate::bindings;

const GUEST_IA32_EFER: u64 = 0x2806;
const HOST_IA32_EFER: u64 = 0x2c02;
/// EFER_LMA.
const LMA: u64 = 1 << 10;
/// VM_ENTRY_IA32E_MODE and VM_ENTRY_LOAD_IA32_EFER.
const ENTRY_CONTROLS: u32 = ENTRY_LOAD_EFER | 1 << 9;
/// VM_ENTRY_LOAD_IA32_EFER.
const ENTRY_LOAD_EFER: u32 = 1 << 15;
/// VM_EXIT_LOAD_IA32_EFER.
const EXIT_CONTROLS: u32 = 1 << 21;

/// Slots of `guest_uret_msrs`.
const SLOTS: usize = bindings::MTK_NR_URET_MSRS as usize;
const _: () = assert!(SLOTS <= 32);

/// What vmx_set_efer() did: which MSRs go into hardware with the guest, the two controls, and the EFER in the VMCS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EferState {
    /// The argument.
    efer: u64,
    /// `load_into_hardware` of each MSR, a bit each.
    loaded: u32,
    /// The entry controls that it sets.
    entry: u32,
    /// The exit control that it sets.
    exit: u32,
    /// GUEST_IA32_EFER, if the processor is to load it.
    guest: u64,
}

impl EferState {
    /// What the vCPU has now for this EFER. `None` if the guest is not in 64-bit mode, or EFER is switched in
    /// another way than by the processor's own control.
    #[inline(always)]
    pub(crate) fn now(vcpu: Vcpu, efer: u64) -> Option<Self> {
        let by_list = read!(vcpu, msr_autoload.guest.nr) | read!(vcpu, msr_autoload.host.nr);
        if efer & LMA == 0 || by_list != 0 {
            return None;
        }
        let vmcs = read!(vcpu, loaded_vmcs);
        // SAFETY: KVM's own pointer to one of the vCPU's two `loaded_vmcs`.
        let (entry, exit) = unsafe {
            (
                (*vmcs).controls_shadow.vm_entry,
                (*vmcs).controls_shadow.vm_exit,
            )
        };
        let guest = if entry & ENTRY_LOAD_EFER != 0 {
            // SAFETY: By the invariants of `Vcpu` the VMCS that KVM would write is current.
            unsafe { vmx::vmread(GUEST_IA32_EFER)? }
        } else {
            // KVM leaves the control off where the host has the same EFER. A processor without the control has
            // no such field, or nothing in it.
            // SAFETY: As above.
            let host = unsafe { vmx::vmread(HOST_IA32_EFER)? };
            if host != efer {
                return None;
            }
            efer
        };
        let mut loaded = 0;
        for slot in 0..SLOTS {
            loaded |= u32::from(read!(vcpu, guest_uret_msrs[slot].load_into_hardware)) << slot;
        }
        Some(Self {
            efer,
            loaded,
            entry: entry & ENTRY_CONTROLS,
            exit: exit & EXIT_CONTROLS,
            guest,
        })
    }

    /// The argument.
    #[inline(always)]
    pub(crate) fn efer(&self) -> u64 {
        self.efer
    }

    /// Whether `efer` is the argument and everything is as it was left, so that vmx_set_efer() would change nothing
    /// but `vcpu->arch.efer`, and would have the MSRs loaded anew that are loaded.
    #[inline(always)]
    pub(crate) fn is_current(&self, vcpu: Vcpu, efer: u64) -> bool {
        self.efer == efer && Self::now(vcpu, efer).is_some_and(|now| now == *self)
    }
}

impl Vcpu {
    /// Sets `vcpu->arch.efer`.
    #[inline(always)]
    pub(crate) fn note_efer(self, efer: u64) {
        // SAFETY: By the invariants of `Vcpu`.
        unsafe { (&raw mut (*self.raw()).vcpu.arch.efer).write(efer) };
    }
}
