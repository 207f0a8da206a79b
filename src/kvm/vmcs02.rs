// SPDX-License-Identifier: GPL-2.0
//! VMCS shadowing for L2: what L1 asks for, and the controls of vmcs02 that serve it.

use super::{
    fields::encoding::{
        SECONDARY_VM_EXEC_CONTROL, VMCS_LINK_POINTER, VMREAD_BITMAP, VMWRITE_BITMAP,
    },
    vcpu::read,
    vmcs12::field,
    vmx, Vcpu,
};
use crate::{bindings, policy::controls::secondary::VMCS_SHADOWING};

/// Guest-physical addresses of the bitmaps that say which VMREADs and VMWRITEs of L2 are L1's.
#[derive(Clone, Copy)]
pub(crate) struct Bitmaps {
    pub(crate) vmread: u64,
    pub(crate) vmwrite: u64,
}

impl Vcpu {
    /// L1's bitmaps, if L2 runs and L1 shadows VMCS accesses for it.
    pub(crate) fn shadowing_for_l2(self) -> Option<Bitmaps> {
        let vmcs12 = self.vmcs12()?;
        let on = self.guest_mode() && !self.vmcs01_is_loaded() && self.has_l2_shadow();
        on.then(|| Bitmaps {
            vmread: field!(vmcs12, vmread_bitmap),
            vmwrite: field!(vmcs12, vmwrite_bitmap),
        })
    }

    /// L1 turned VMCS shadowing on for L2, and there is a shadow VMCS.
    pub(crate) fn has_l2_shadow(self) -> bool {
        self.vmcs12().is_some_and(|vmcs12| {
            !self.evmcs_is_mapped()
                && vmcs12.has_shadow_vmcs()
                && field!(vmcs12, vmcs_link_pointer) != u64::MAX
        })
    }

    /// KVM's copy of the shadow VMCS that L1 gave L2: a whole page while L1 is in VMX operation.
    pub(crate) fn shadow_vmcs12(self) -> Option<*mut u8> {
        let page = read!(self, nested.cached_shadow_vmcs12);
        (!page.is_null()).then_some(page.cast())
    }

    /// Has the processor serve L2's VMREADs and VMWRITEs from `shadow` where the bitmaps let it. KVM clears
    /// `shadow` when the vCPU goes to another CPU, as it does for vmcs01.
    ///
    /// # Safety
    ///
    /// vmcs02 is loaded, preemption is off. All three stay until `stop_serving_l2`; `shadow` is a shadow VMCS.
    pub(crate) unsafe fn serve_l2(self, shadow: *mut bindings::vmcs, vmread: u64, vmwrite: u64) {
        // SAFETY: By this function's contract; KVM's own copy of the control is kept right, so that KVM
        // takes the bit back when it next prepares vmcs02.
        unsafe {
            (&raw mut (*self.raw()).nested.vmcs02.shadow_vmcs).write(shadow);
            vmx::vmwrite(VMREAD_BITMAP, vmread);
            vmx::vmwrite(VMWRITE_BITMAP, vmwrite);
            vmx::vmwrite(VMCS_LINK_POINTER, vmx::physical(shadow.cast()));
            self.set_vmcs02_shadowing(true);
        }
    }

    /// The other way round; L2's accesses exit again. `shadow` is clear afterwards; `active` if it may not be yet.
    ///
    /// # Safety
    ///
    /// vmcs02 is loaded, preemption is off, and `serve_l2` was called with `shadow`.
    pub(crate) unsafe fn stop_serving_l2(self, shadow: *mut bindings::vmcs, active: bool) {
        // SAFETY: By this function's contract.
        unsafe {
            self.set_vmcs02_shadowing(false);
            vmx::vmwrite(VMCS_LINK_POINTER, u64::MAX);
            // Cleared before KVM forgets it, so that a migration in between clears it on the old CPU.
            if active {
                vmx::vmclear(vmx::physical(shadow.cast()));
            }
            (&raw mut (*self.raw()).nested.vmcs02.shadow_vmcs).write(core::ptr::null_mut());
        }
    }

    /// `secondary_exec_controls_setbit()` and `secondary_exec_controls_clearbit()`.
    ///
    /// # Safety
    ///
    /// vmcs02 is loaded and preemption is off.
    unsafe fn set_vmcs02_shadowing(self, on: bool) {
        let was = read!(self, nested.vmcs02.controls_shadow.secondary_exec);
        let now = if on {
            was | VMCS_SHADOWING
        } else {
            was & !VMCS_SHADOWING
        };
        if now != was {
            // SAFETY: By this function's contract.
            unsafe {
                vmx::vmwrite(SECONDARY_VM_EXEC_CONTROL, u64::from(now));
                (&raw mut (*self.raw()).nested.vmcs02.controls_shadow.secondary_exec).write(now);
            }
        }
    }

    /// A pointer to vmcs01's shadow VMCS.
    #[inline(always)]
    pub(crate) fn shadow_vmcs01(self) -> Option<*mut bindings::vmcs> {
        let shadow = read!(self, vmcs01.shadow_vmcs);
        (!shadow.is_null()).then_some(shadow)
    }
}
