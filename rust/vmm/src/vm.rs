// SPDX-License-Identifier: GPL-2.0-or-later
//! A VM of KVM's: what it has before its vCPUs.

use kvm_bindings::{
    kvm_enable_cap, kvm_pit_config, KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_X86_TRIPLE_FAULT_EVENT,
    KVM_PIT_SPEAKER_DUMMY,
};
use kvm_ioctls::{Kvm, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::device::COM1_IRQ;
use crate::machine::Config;
use crate::memory::Memory;
use crate::{Error, Result};

/// Three pages that KVM needs for real mode on old CPUs, out of every guest's way.
const TSS_ADDR: usize = 0xfffb_d000;
/// One page for the same purpose.
const IDENTITY_MAP_ADDR: u64 = 0xfffb_c000;
/// What makes KVM_GET_VCPU_EVENTS tell all: without the first, an exception that is still to be looked at (it may be an
/// exit of a guest's guest to the guest) counts as one that is being delivered; without the second a triple fault is lost.
const EVENT_CAPS: [u32; 2] = [KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_X86_TRIPLE_FAULT_EVENT];

/// Makes a VM with its interrupt controllers and its memory, and no vCPU yet.
pub(crate) fn create(kvm: &Kvm, config: &Config, mem: &Memory) -> Result<VmFd> {
    let vm = kvm.create_vm().map_err(Error::kvm("KVM_CREATE_VM"))?;
    for cap in EVENT_CAPS {
        if vm.check_extension_raw(cap.into()) > 0 {
            vm.enable_cap(&kvm_enable_cap {
                cap,
                args: [1, 0, 0, 0],
                ..Default::default()
            })
            .map_err(Error::kvm("KVM_ENABLE_CAP"))?;
        }
    }
    vm.set_tss_address(TSS_ADDR)
        .map_err(Error::kvm("KVM_SET_TSS_ADDR"))?;
    vm.set_identity_map_address(IDENTITY_MAP_ADDR)
        .map_err(Error::kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.create_irq_chip()
        .map_err(Error::kvm("KVM_CREATE_IRQCHIP"))?;
    if config.pit {
        // The dummy answers port 0x61 in the kernel instead of here.
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        vm.create_pit2(pit).map_err(Error::kvm("KVM_CREATE_PIT2"))?;
    }
    mem.register(&vm)?;
    Ok(vm)
}

/// Connects COM1's interrupt to a VM.
pub(crate) fn connect(vm: &VmFd, irq: &EventFd) -> Result<()> {
    vm.register_irqfd(irq, COM1_IRQ)
        .map_err(Error::kvm("KVM_IRQFD"))
}

/// Takes it away again.
pub(crate) fn disconnect(vm: &VmFd, irq: &EventFd) -> Result<()> {
    vm.unregister_irqfd(irq, COM1_IRQ)
        .map_err(Error::kvm("KVM_IRQFD"))
}
