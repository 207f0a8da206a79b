// SPDX-License-Identifier: GPL-2.0-or-later
//! What KVM holds of a machine beside its memory: read from one VM, put into another.
//!
//! The order of the requests is that of the kernel's own KVM selftests, but for KVM_GET_MP_STATE: some of these change others.

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_nested_state, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave, CpuId, Msrs, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, KVM_STATE_NESTED_GUEST_MODE,
};
use kvm_ioctls::{Kvm, KvmNestedStateBuffer, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use crate::memory::{Memory, PAGE};
use crate::{Error, Result};

const MSR_IA32_TSC: u32 = 0x10;
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;
/// No VMCS.
const NO_VMCS: u64 = u64::MAX;

/// What belongs to the whole machine: its interrupt controllers, timer and clock.
#[derive(Serialize, Deserialize)]
pub(crate) struct VmState {
    chips: Vec<kvm_irqchip>,
    pit: Option<kvm_pit_state2>,
    clock: kvm_clock_data,
}

impl VmState {
    /// Reads it; `pit` says whether there is one.
    pub(crate) fn save(vm: &VmFd, pit: bool) -> Result<VmState> {
        let chip = |id| {
            let mut chip = kvm_irqchip {
                chip_id: id,
                ..Default::default()
            };
            vm.get_irqchip(&mut chip)
                .map_err(Error::kvm("KVM_GET_IRQCHIP"))?;
            Ok(chip)
        };
        Ok(VmState {
            chips: [
                KVM_IRQCHIP_PIC_MASTER,
                KVM_IRQCHIP_PIC_SLAVE,
                KVM_IRQCHIP_IOAPIC,
            ]
            .into_iter()
            .map(chip)
            .collect::<Result<_>>()?,
            pit: match pit {
                true => Some(vm.get_pit2().map_err(Error::kvm("KVM_GET_PIT2"))?),
                false => None,
            },
            clock: vm.get_clock().map_err(Error::kvm("KVM_GET_CLOCK"))?,
        })
    }

    /// Puts it into a new VM, after its vCPUs': the timer starts, and an interrupt that it or the I/O APIC has pending goes
    /// to local APICs, whose state would replace it.
    pub(crate) fn restore(&self, vm: &VmFd) -> Result<()> {
        vm.set_clock(&kvm_clock_data {
            flags: 0,
            ..self.clock
        })
        .map_err(Error::kvm("KVM_SET_CLOCK"))?;
        for chip in &self.chips {
            vm.set_irqchip(chip)
                .map_err(Error::kvm("KVM_SET_IRQCHIP"))?;
        }
        if let Some(pit) = &self.pit {
            vm.set_pit2(pit).map_err(Error::kvm("KVM_SET_PIT2"))?;
        }
        Ok(())
    }
}

/// One vCPU's.
#[derive(Serialize, Deserialize)]
pub(crate) struct VcpuState {
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    sregs: kvm_sregs,
    nested: Box<KvmNestedStateBuffer>,
    msrs: Vec<kvm_msr_entry>,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    cpuid: Vec<kvm_cpuid_entry2>,
    tsc_khz: u32,
}

/// Reads or writes a list of MSRs, leaving out those that KVM refuses one by one.
fn each_msr(
    entries: &[kvm_msr_entry],
    what: impl Fn(&mut Msrs) -> std::result::Result<usize, kvm_ioctls::Error>,
    name: &'static str,
) -> Result<Vec<kvm_msr_entry>> {
    let mut done = Vec::with_capacity(entries.len());
    let mut rest = entries;
    while !rest.is_empty() {
        let mut list = Msrs::from_entries(rest)
            .map_err(|_| Error::Memory("no memory for a list of MSRs".into()))?;
        let n = what(&mut list).map_err(Error::kvm(name))?;
        done.extend_from_slice(&list.as_slice()[..n]);
        rest = rest.get(n + 1..).unwrap_or(&[]);
    }
    Ok(done)
}

impl VcpuState {
    /// Reads it. Nothing of the last exit may be left to be completed.
    pub(crate) fn save(kvm: &Kvm, vcpu: &VcpuFd) -> Result<VcpuState> {
        // First, because it acts on an INIT or SIPI that is pending, which changes anything.
        let mp_state = vcpu
            .get_mp_state()
            .map_err(Error::kvm("KVM_GET_MP_STATE"))?;
        let events = vcpu
            .get_vcpu_events()
            .map_err(Error::kvm("KVM_GET_VCPU_EVENTS"))?;
        let regs = vcpu.get_regs().map_err(Error::kvm("KVM_GET_REGS"))?;
        let xsave = vcpu.get_xsave().map_err(Error::kvm("KVM_GET_XSAVE"))?;
        let xcrs = vcpu.get_xcrs().map_err(Error::kvm("KVM_GET_XCRS"))?;
        let sregs = vcpu.get_sregs().map_err(Error::kvm("KVM_GET_SREGS"))?;
        let mut nested = Box::new(KvmNestedStateBuffer::empty());
        vcpu.nested_state(&mut nested)
            .map_err(Error::kvm("KVM_GET_NESTED_STATE"))?;
        let entries: Vec<kvm_msr_entry> = kvm
            .get_msr_index_list()
            .map_err(Error::kvm("KVM_GET_MSR_INDEX_LIST"))?
            .as_slice()
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut msrs = each_msr(&entries, |list| vcpu.get_msrs(list), "KVM_GET_MSRS")?;
        // The deadline is in terms of the TSC, and needs a timer that the APIC has in that mode.
        msrs.sort_by_key(|msr| match msr.index {
            MSR_IA32_TSC => 0,
            MSR_IA32_TSC_DEADLINE => 2,
            _ => 1,
        });
        Ok(VcpuState {
            events,
            mp_state,
            regs,
            xsave,
            xcrs,
            sregs,
            nested,
            msrs,
            debug: vcpu
                .get_debug_regs()
                .map_err(Error::kvm("KVM_GET_DEBUGREGS"))?,
            lapic: vcpu.get_lapic().map_err(Error::kvm("KVM_GET_LAPIC"))?,
            cpuid: vcpu
                .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
                .map_err(Error::kvm("KVM_GET_CPUID2"))?
                .as_slice()
                .to_vec(),
            tsc_khz: vcpu.get_tsc_khz().map_err(Error::kvm("KVM_GET_TSC_KHZ"))?,
        })
    }

    /// Puts it into a new vCPU.
    pub(crate) fn restore(&self, vcpu: &VcpuFd) -> Result<()> {
        let cpuid = CpuId::from_entries(&self.cpuid)
            .map_err(|_| Error::Memory("no memory for a list of CPUID leaves".into()))?;
        vcpu.set_cpuid2(&cpuid)
            .map_err(Error::kvm("KVM_SET_CPUID2"))?;
        vcpu.set_tsc_khz(self.tsc_khz)
            .map_err(Error::kvm("KVM_SET_TSC_KHZ"))?;
        self.put_back(vcpu)
    }

    /// Puts it into a vCPU that has the same CPUID.
    pub(crate) fn put_back(&self, vcpu: &VcpuFd) -> Result<()> {
        vcpu.set_sregs(&self.sregs)
            .map_err(Error::kvm("KVM_SET_SREGS"))?;
        vcpu.set_lapic(&self.lapic)
            .map_err(Error::kvm("KVM_SET_LAPIC"))?;
        each_msr(&self.msrs, |list| vcpu.set_msrs(list), "KVM_SET_MSRS")?;
        vcpu.set_xcrs(&self.xcrs)
            .map_err(Error::kvm("KVM_SET_XCRS"))?;
        // SAFETY: KVM gave this state of the same size; no feature with a larger one (AMX) has been asked for, so
        // the kernel reads no more than the structure.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(Error::kvm("KVM_SET_XSAVE"))?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(Error::kvm("KVM_SET_VCPU_EVENTS"))?;
        vcpu.set_mp_state(self.mp_state)
            .map_err(Error::kvm("KVM_SET_MP_STATE"))?;
        vcpu.set_debug_regs(&self.debug)
            .map_err(Error::kvm("KVM_SET_DEBUGREGS"))?;
        vcpu.set_regs(&self.regs)
            .map_err(Error::kvm("KVM_SET_REGS"))?;
        // KVM reads as many bytes as the state says that it has.
        if self.nested.size as usize > size_of::<KvmNestedStateBuffer>() {
            return Err(Error::Stack(format!(
                "nested state of {} bytes, more than there can be",
                self.nested.size
            )));
        }
        if self.nested.size as usize > size_of::<kvm_nested_state>() || self.vmxon() {
            vcpu.set_nested_state(&self.nested)
                .map_err(Error::kvm("KVM_SET_NESTED_STATE"))?;
        }
        Ok(())
    }

    /// Makes a vCPU what this one was, from which it was read when it had just been made: a reset, as QEMU does it. VMX
    /// operation ends first, because other requests are taken for L2's while that runs.
    pub(crate) fn reset(&self, vcpu: &VcpuFd) -> Result<()> {
        vcpu.set_nested_state(&self.nested)
            .map_err(Error::kvm("KVM_SET_NESTED_STATE"))?;
        self.put_back(vcpu)
    }

    fn vmxon(&self) -> bool {
        // SAFETY: KVM on Intel fills in this member, and any bits are valid.
        unsafe { self.nested.hdr.vmx.vmxon_pa != NO_VMCS }
    }

    /// Was a guest of the guest running?
    pub(crate) fn in_l2(&self) -> bool {
        u32::from(self.nested.flags) & KVM_STATE_NESTED_GUEST_MODE != 0
    }

    /// Is the current VMCS another in KVM than in memory?
    pub(crate) fn dirty(&self, mem: &Memory) -> bool {
        // SAFETY: as in `vmxon`.
        let at = unsafe { self.nested.hdr.vmx.vmcs12_pa };
        if at == NO_VMCS {
            return false;
        }
        let mut page = [0u8; PAGE];
        // SAFETY: as above; the data behind a header of this format is a VMCS.
        let vmcs12 = unsafe { self.nested.data.vmx.vmcs12 };
        mem.guest()
            .read_slice(&mut page, GuestAddress(at))
            .is_ok_and(|()| vmcs12 != page)
    }
}
