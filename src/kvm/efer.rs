// SPDX-License-Identifier: GPL-2.0
//! What vmx_set_efer() leaves behind for a guest in 64-bit mode.

use super::{
    fields::encoding::{GUEST_IA32_EFER, HOST_IA32_EFER, VM_ENTRY_CONTROLS, VM_EXIT_CONTROLS},
    vcpu::read,
    vmx, Vcpu,
};
use crate::{
    bindings,
    policy::{
        controls::{
            vm_entry::{IA32E_MODE, LOAD_EFER},
            vm_exit,
        },
        registers::EFER_LMA,
    },
};

/// The entry controls that vmx_set_efer() makes.
pub(super) const ENTRY_CONTROLS: u32 = LOAD_EFER | IA32E_MODE;
/// The exit control that it makes.
pub(super) const EXIT_CONTROLS: u32 = vm_exit::LOAD_EFER;

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
    pub(crate) fn now(vcpu: Vcpu, efer: u64) -> Option<Self> {
        if efer & EFER_LMA == 0 || !Self::is_applicable(vcpu) {
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
        let guest = if entry & LOAD_EFER != 0 {
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

    /// Whether EFER is switched by nothing but the processor's own control, so that `apply` may be called.
    #[inline(always)]
    pub(crate) fn is_applicable(vcpu: Vcpu) -> bool {
        read!(vcpu, msr_autoload.guest.nr) | read!(vcpu, msr_autoload.host.nr) == 0
    }

    /// Makes everything what vmx_set_efer() with the same argument would make it.
    ///
    /// Where no MSR joins those that are loaded, they are not loaded anew, as the stock function would have
    /// it: what is loaded is right, because KVM writes a new value to hardware at once.
    ///
    /// # Safety
    ///
    /// The VMCS that KVM's vmx_set_efer() would write is current, and `is_applicable`.
    #[inline(always)]
    pub(crate) unsafe fn apply(&self, vcpu: Vcpu) {
        let vmx = vcpu.raw();
        // SAFETY: By the invariants of `Vcpu` and this function's contract; KVM's copy of the controls is kept right.
        unsafe {
            (*vmx).vcpu.arch.efer = self.efer;
            let mut loaded = 0;
            for slot in 0..SLOTS {
                loaded |= u32::from((*vmx).guest_uret_msrs[slot].load_into_hardware) << slot;
            }
            if loaded != self.loaded {
                for slot in 0..SLOTS {
                    let load = self.loaded >> slot & 1 != 0;
                    (*vmx).guest_uret_msrs[slot].load_into_hardware = load;
                }
                // Those that leave stay where they are, as on stock, and the others are there already.
                if self.loaded & !loaded != 0 {
                    (*vmx).guest_uret_msrs_loaded = false;
                }
            }
            let shadow = &raw mut (*(*vmx).loaded_vmcs).controls_shadow;
            let entry = (*shadow).vm_entry & !ENTRY_CONTROLS | self.entry;
            if entry != (*shadow).vm_entry {
                vmx::vmwrite_basic(VM_ENTRY_CONTROLS, u64::from(entry));
                (*shadow).vm_entry = entry;
            }
            let exit = (*shadow).vm_exit & !EXIT_CONTROLS | self.exit;
            if exit != (*shadow).vm_exit {
                vmx::vmwrite_basic(VM_EXIT_CONTROLS, u64::from(exit));
                (*shadow).vm_exit = exit;
            }
            if entry & LOAD_EFER != 0 {
                vmx::vmwrite_basic(GUEST_IA32_EFER, self.guest);
            }
        }
    }
}
