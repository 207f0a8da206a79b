// SPDX-License-Identifier: GPL-2.0-or-later
//! Filling in a VMCS for a 64-bit child that shares the payload's memory and page tables.

use super::ops::{vmclear, vmptrld, vmread, vmwrite, VmxError};
use super::{capability, child, field::*, msr};
use crate::cpu;
use crate::memory;
use crate::trap;

/// Primary processor-based control: there are secondary ones.
pub const SECONDARY: u64 = 1 << 31;
/// Secondary control: EPT.
pub const ENABLE_EPT: u64 = 1 << 1;
/// Secondary control: VPID.
pub const ENABLE_VPID: u64 = 1 << 5;
/// Secondary control: unrestricted guest.
pub const UNRESTRICTED_GUEST: u64 = 1 << 7;
/// Exit control: the host is in 64-bit mode.
pub const HOST_ADDRESS_SPACE_SIZE: u64 = 1 << 9;
/// Entry control: the guest is in IA-32e mode.
pub const IA32E_MODE_GUEST: u64 = 1 << 9;

/// What differs between the children.
#[derive(Clone, Copy, Default)]
pub struct Features {
    /// EPT with this pointer.
    pub ept: Option<u64>,
    /// VPID with this number.
    pub vpid: Option<u16>,
    /// Unrestricted guest. Needs EPT.
    pub unrestricted: bool,
}

/// Bytes of a child's stack.
const STACK: u64 = 16 * memory::PAGE;

/// A child: its VMCS region and what belongs to it.
#[derive(Clone, Copy)]
pub struct Child {
    /// Address of the VMCS region.
    pub vmcs: u64,
    /// All-zeros page for bitmaps.
    pub bitmap: u64,
    stack: u64,
}

impl Child {
    /// A child with a region of its own, not yet current.
    pub fn new() -> Child {
        Child {
            vmcs: super::new_region(),
            bitmap: memory::pages(1),
            stack: memory::pages(16),
        }
    }

    /// Clears the VMCS, makes it current and fills in all of it. The child will start at `entry` with
    /// interrupts off, on a stack of its own.
    ///
    /// The controls without `features` are the most basic ones, those of the kernel's own KVM
    /// selftests, so that counts can be compared with theirs.
    pub fn prepare(&self, features: Features, entry: extern "C" fn() -> !) -> Result<(), VmxError> {
        vmclear(self.vmcs)?;
        vmptrld(self.vmcs)?;
        self.controls(features)?;
        host_state()?;
        guest_state(entry as *const () as u64, self.stack + STACK - 8)
    }

    fn controls(&self, features: Features) -> Result<(), VmxError> {
        let mut secondary = 0;
        if let Some(pointer) = features.ept {
            secondary |= ENABLE_EPT;
            vmwrite(EPT_POINTER, pointer)?;
        }
        if let Some(vpid) = features.vpid {
            secondary |= ENABLE_VPID;
            vmwrite(VIRTUAL_PROCESSOR_ID, vpid as u64)?;
        }
        if features.unrestricted {
            secondary |= UNRESTRICTED_GUEST;
        }
        vmwrite(PIN_BASED_VM_EXEC_CONTROL, low(msr::TRUE_PINBASED_CTLS))?;
        vmwrite(SECONDARY_VM_EXEC_CONTROL, secondary)?;
        vmwrite(
            CPU_BASED_VM_EXEC_CONTROL,
            low(msr::TRUE_PROCBASED_CTLS) | SECONDARY,
        )?;
        for field in [
            EXCEPTION_BITMAP,
            PAGE_FAULT_ERROR_CODE_MASK,
            PAGE_FAULT_ERROR_CODE_MATCH,
            CR3_TARGET_COUNT,
            VM_EXIT_MSR_STORE_COUNT,
            VM_EXIT_MSR_LOAD_COUNT,
            VM_ENTRY_MSR_LOAD_COUNT,
            VM_ENTRY_INTR_INFO_FIELD,
            TPR_THRESHOLD,
            CR0_GUEST_HOST_MASK,
            CR4_GUEST_HOST_MASK,
        ] {
            vmwrite(field, 0)?;
        }
        vmwrite(
            VM_EXIT_CONTROLS,
            low(msr::EXIT_CTLS) | HOST_ADDRESS_SPACE_SIZE,
        )?;
        vmwrite(VM_ENTRY_CONTROLS, low(msr::ENTRY_CTLS) | IA32E_MODE_GUEST)?;
        vmwrite(CR0_READ_SHADOW, cpu::cr0())?;
        vmwrite(CR4_READ_SHADOW, cpu::cr4())?;
        vmwrite(MSR_BITMAP, self.bitmap)?;
        vmwrite(VMREAD_BITMAP, self.bitmap)?;
        vmwrite(VMWRITE_BITMAP, self.bitmap)
    }
}

/// The bits of a capability MSR that must be 1.
fn low(msr: u32) -> u64 {
    capability(msr) & 0xffff_ffff
}

/// Writes a field that not every processor has; that it is missing is fine then.
fn optional(field: u32, value: u64) -> Result<(), VmxError> {
    const UNSUPPORTED_COMPONENT: u32 = 12;
    match vmwrite(field, value) {
        Err(VmxError::Valid(UNSUPPORTED_COMPONENT)) => Ok(()),
        other => other,
    }
}

fn host_state() -> Result<(), VmxError> {
    for field in [
        HOST_ES_SELECTOR,
        HOST_SS_SELECTOR,
        HOST_DS_SELECTOR,
        HOST_FS_SELECTOR,
        HOST_GS_SELECTOR,
    ] {
        vmwrite(field, trap::DATA as u64)?;
    }
    vmwrite(HOST_CS_SELECTOR, trap::CODE as u64)?;
    vmwrite(HOST_TR_SELECTOR, trap::TSS as u64)?;
    vmwrite(HOST_CR0, cpu::cr0())?;
    vmwrite(HOST_CR3, cpu::cr3())?;
    vmwrite(HOST_CR4, cpu::cr4())?;
    for field in [
        HOST_FS_BASE,
        HOST_GS_BASE,
        HOST_IA32_SYSENTER_CS,
        HOST_IA32_SYSENTER_ESP,
        HOST_IA32_SYSENTER_EIP,
    ] {
        vmwrite(field, 0)?;
    }
    vmwrite(HOST_TR_BASE, trap::tss_base())?;
    vmwrite(HOST_GDTR_BASE, trap::gdt_base())?;
    vmwrite(HOST_IDTR_BASE, trap::idt_base())?;
    vmwrite(HOST_RSP, child::host_rsp())?;
    vmwrite(HOST_RIP, child::host_rip())
}

/// The guest state is the payload's own, but for RIP, RSP and limits that VM exits leave behind.
fn guest_state(rip: u64, rsp: u64) -> Result<(), VmxError> {
    const CODE_RIGHTS: u64 = 0xa09b;
    const DATA_RIGHTS: u64 = 0xc093;
    const TSS_RIGHTS: u64 = 0x8b;
    const UNUSABLE: u64 = 1 << 16;
    // (selector, limit, rights); base is the next field group at the same distance.
    let segments = [
        (trap::DATA, 0xffff_ffff, DATA_RIGHTS),
        (trap::CODE, 0xffff_ffff, CODE_RIGHTS),
        (trap::DATA, 0xffff_ffff, DATA_RIGHTS),
        (trap::DATA, 0xffff_ffff, DATA_RIGHTS),
        (trap::DATA, 0xffff_ffff, DATA_RIGHTS),
        (trap::DATA, 0xffff_ffff, DATA_RIGHTS),
        (0, 0xffff_ffff, UNUSABLE),
        (trap::TSS, 0x67, TSS_RIGHTS),
    ];
    for (number, (selector, limit, rights)) in segments.into_iter().enumerate() {
        let at = 2 * number as u32;
        vmwrite(GUEST_ES_SELECTOR + at, selector as u64)?;
        vmwrite(GUEST_ES_LIMIT + at, limit)?;
        vmwrite(GUEST_ES_AR_BYTES + at, rights)?;
        vmwrite(GUEST_ES_BASE + at, 0)?;
    }
    vmwrite(GUEST_TR_BASE, trap::tss_base())?;
    vmwrite(GUEST_GDTR_BASE, trap::gdt_base())?;
    vmwrite(GUEST_IDTR_BASE, trap::idt_base())?;
    vmwrite(GUEST_GDTR_LIMIT, 0xffff)?;
    vmwrite(GUEST_IDTR_LIMIT, 0xffff)?;
    optional(GUEST_INTR_STATUS, 0)?;
    optional(GUEST_PML_INDEX, 0)?;
    optional(VMX_PREEMPTION_TIMER_VALUE, 0)?;
    optional(GUEST_IA32_PERF_GLOBAL_CTRL, 0)?;
    for field in [
        GUEST_IA32_DEBUGCTL,
        GUEST_INTERRUPTIBILITY_INFO,
        GUEST_ACTIVITY_STATE,
        GUEST_SYSENTER_CS,
        GUEST_SYSENTER_ESP,
        GUEST_SYSENTER_EIP,
        GUEST_PENDING_DBG_EXCEPTIONS,
    ] {
        vmwrite(field, 0)?;
    }
    vmwrite(VMCS_LINK_POINTER, u64::MAX)?;
    vmwrite(GUEST_IA32_PAT, vmread(HOST_IA32_PAT)?)?;
    vmwrite(GUEST_IA32_EFER, vmread(HOST_IA32_EFER)?)?;
    vmwrite(GUEST_CR0, cpu::cr0())?;
    vmwrite(GUEST_CR3, cpu::cr3())?;
    vmwrite(GUEST_CR4, cpu::cr4())?;
    vmwrite(GUEST_DR7, 0x400)?;
    vmwrite(GUEST_RFLAGS, 2)?;
    vmwrite(GUEST_RSP, rsp)?;
    vmwrite(GUEST_RIP, rip)
}
