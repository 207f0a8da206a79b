// SPDX-License-Identifier: GPL-2.0
//! VM-execution controls (SDM volume 3, 26.6), as a vmcs12 or KVM's shadows of the controls have them.

use super::{vmcs12::field, Vmcs12};
use crate::policy::controls::{primary::SECONDARY_CONTROLS, secondary::VMCS_SHADOWING};

impl Vmcs12 {
    /// Pin-based controls.
    #[inline(always)]
    pub(super) fn pin_controls(self) -> u32 {
        field!(self, pin_based_vm_exec_control) as u32
    }

    /// Primary processor-based controls.
    #[inline(always)]
    pub(crate) fn primary_controls(self) -> u32 {
        field!(self, cpu_based_vm_exec_control) as u32
    }

    /// The secondary controls in force.
    #[inline(always)]
    pub(crate) fn secondary_controls(self) -> u32 {
        if self.primary_controls() & SECONDARY_CONTROLS != 0 {
            field!(self, secondary_vm_exec_control) as u32
        } else {
            0
        }
    }

    /// `nested_cpu_has_shadow_vmcs()`.
    #[inline(always)]
    pub(crate) fn has_shadow_vmcs(self) -> bool {
        self.secondary_controls() & VMCS_SHADOWING != 0
    }
}
