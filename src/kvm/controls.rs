// SPDX-License-Identifier: GPL-2.0
//! VM-execution controls (SDM volume 3, 26.6), as a vmcs12 or KVM's shadows of the controls have them.

use super::{vmcs12::field, Vmcs12};

/// PIN_BASED_POSTED_INTR.
pub(super) const POSTED_INTR: u32 = 1 << 7;

/// CPU_BASED_TPR_SHADOW.
pub(super) const TPR_SHADOW: u32 = 1 << 21;
/// CPU_BASED_USE_MSR_BITMAPS.
pub(super) const USE_MSR_BITMAPS: u32 = 1 << 28;
/// CPU_BASED_ACTIVATE_SECONDARY_CONTROLS.
const ACTIVATE_SECONDARY: u32 = 1 << 31;

/// SECONDARY_EXEC_VIRTUALIZE_APIC_ACCESSES.
pub(super) const VIRTUALIZE_APIC_ACCESSES: u32 = 1 << 0;
/// SECONDARY_EXEC_ENABLE_EPT.
pub(super) const ENABLE_EPT: u32 = 1 << 1;
/// SECONDARY_EXEC_VIRTUALIZE_X2APIC_MODE.
pub(super) const VIRTUALIZE_X2APIC: u32 = 1 << 4;
/// SECONDARY_EXEC_ENABLE_VPID.
pub(super) const ENABLE_VPID: u32 = 1 << 5;
/// SECONDARY_EXEC_APIC_REGISTER_VIRT.
pub(super) const APIC_REGISTER_VIRT: u32 = 1 << 8;
/// SECONDARY_EXEC_VIRTUAL_INTR_DELIVERY.
pub(super) const VIRTUAL_INTR_DELIVERY: u32 = 1 << 9;
/// SECONDARY_EXEC_SHADOW_VMCS.
pub(super) const SHADOW_VMCS: u32 = 1 << 14;

impl Vmcs12 {
    /// Pin-based controls.
    #[inline(always)]
    pub(super) fn pin_controls(self) -> u32 {
        field!(self, pin_based_vm_exec_control) as u32
    }

    /// Primary processor-based controls.
    #[inline(always)]
    pub(super) fn primary_controls(self) -> u32 {
        field!(self, cpu_based_vm_exec_control) as u32
    }

    /// The secondary controls in force.
    #[inline(always)]
    pub(super) fn secondary_controls(self) -> u32 {
        if self.primary_controls() & ACTIVATE_SECONDARY != 0 {
            field!(self, secondary_vm_exec_control) as u32
        } else {
            0
        }
    }

    /// `nested_cpu_has_shadow_vmcs()`.
    #[inline(always)]
    pub(crate) fn has_shadow_vmcs(self) -> bool {
        self.secondary_controls() & SHADOW_VMCS != 0
    }
}
