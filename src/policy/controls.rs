// SPDX-License-Identifier: GPL-2.0
//! The VM-execution, VM-exit and VM-entry controls that anything here looks at (SDM volume 3, 26.6 to 26.8), each under the SDM's name
//! for it, in a module for each field of the VMCS. Here and nowhere else.

/// Pin-based VM-execution controls.
pub mod pin {
    /// Activate the VMX-preemption timer, which KVM emulates for L1.
    pub const PREEMPTION_TIMER: u32 = 1 << 6;
    /// Process posted interrupts.
    pub const POSTED_INTERRUPTS: u32 = 1 << 7;
}

/// Primary processor-based VM-execution controls.
pub mod primary {
    /// Interrupt-window exiting.
    pub const INTERRUPT_WINDOW: u32 = 1 << 2;
    /// Use TSC offsetting.
    pub const TSC_OFFSETTING: u32 = 1 << 3;
    /// HLT exiting.
    pub const HLT_EXITING: u32 = 1 << 7;
    /// CR3-load exiting.
    pub const CR3_LOAD_EXITING: u32 = 1 << 15;
    /// CR8-load exiting and CR8-store exiting.
    pub const CR8_EXITING: u32 = 3 << 19;
    /// Use TPR shadow.
    pub const TPR_SHADOW: u32 = 1 << 21;
    /// NMI-window exiting.
    pub const NMI_WINDOW: u32 = 1 << 22;
    /// Unconditional I/O exiting.
    pub const UNCONDITIONAL_IO: u32 = 1 << 24;
    /// Use I/O bitmaps.
    pub const IO_BITMAPS: u32 = 1 << 25;
    /// Use MSR bitmaps.
    pub const MSR_BITMAPS: u32 = 1 << 28;
    /// Activate secondary controls.
    pub const SECONDARY_CONTROLS: u32 = 1 << 31;
}

/// Secondary processor-based VM-execution controls.
pub mod secondary {
    /// Virtualize APIC accesses.
    pub const VIRTUALIZE_APIC_ACCESSES: u32 = 1 << 0;
    /// Enable EPT.
    pub const EPT: u32 = 1 << 1;
    /// Descriptor-table exiting, with which KVM emulates CR4.UMIP where the processor lacks it.
    pub const DESCRIPTOR_TABLES: u32 = 1 << 2;
    /// Enable RDTSCP.
    pub const RDTSCP: u32 = 1 << 3;
    /// Virtualize x2APIC mode.
    pub const VIRTUALIZE_X2APIC: u32 = 1 << 4;
    /// Enable VPID.
    pub const VPID: u32 = 1 << 5;
    /// Unrestricted guest.
    pub const UNRESTRICTED_GUEST: u32 = 1 << 7;
    /// APIC-register virtualization.
    pub const APIC_REGISTER_VIRT: u32 = 1 << 8;
    /// Virtual-interrupt delivery.
    pub const INTERRUPT_DELIVERY: u32 = 1 << 9;
    /// Enable INVPCID.
    pub const INVPCID: u32 = 1 << 12;
    /// Enable VM functions.
    pub const VM_FUNCTIONS: u32 = 1 << 13;
    /// VMCS shadowing.
    pub const VMCS_SHADOWING: u32 = 1 << 14;
    /// ENCLS exiting.
    pub const ENCLS: u32 = 1 << 15;
    /// Enable page-modification logging.
    pub const PML: u32 = 1 << 17;
    /// Enable XSAVES and XRSTORS.
    pub const XSAVES: u32 = 1 << 20;
    /// Mode-based execute control for EPT.
    pub const MBEC: u32 = 1 << 22;
    /// Use TSC scaling.
    pub const TSC_SCALING: u32 = 1 << 25;
    /// Enable user wait and pause.
    pub const USER_WAIT: u32 = 1 << 26;
}

/// VM-entry controls.
pub mod vm_entry {
    /// Load debug controls.
    pub const LOAD_DEBUG: u32 = 1 << 2;
    /// IA-32e mode guest.
    pub const IA32E_MODE: u32 = 1 << 9;
    /// Load IA32_PERF_GLOBAL_CTRL.
    pub const LOAD_PERF_GLOBAL_CTRL: u32 = 1 << 13;
    /// Load IA32_PAT.
    pub const LOAD_PAT: u32 = 1 << 14;
    /// Load IA32_EFER.
    pub const LOAD_EFER: u32 = 1 << 15;
    /// Load IA32_BNDCFGS.
    pub const LOAD_BNDCFGS: u32 = 1 << 16;
    /// Load CET state.
    pub const LOAD_CET: u32 = 1 << 20;
}

/// VM-exit controls.
pub mod vm_exit {
    /// Host address-space size.
    pub const HOST_ADDRESS_SPACE_SIZE: u32 = 1 << 9;
    /// Load IA32_PERF_GLOBAL_CTRL.
    pub const LOAD_PERF_GLOBAL_CTRL: u32 = 1 << 12;
    /// Load IA32_PAT.
    pub const LOAD_PAT: u32 = 1 << 19;
    /// Load IA32_EFER.
    pub const LOAD_EFER: u32 = 1 << 21;
    /// Clear IA32_BNDCFGS.
    pub const CLEAR_BNDCFGS: u32 = 1 << 23;
    /// Load CET state.
    pub const LOAD_CET: u32 = 1 << 28;
}
