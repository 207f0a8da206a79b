// SPDX-License-Identifier: GPL-2.0-or-later
//! Saving a machine in the middle of its run and going on in a new one: what live migration does, on
//! one host and many times a second.
//!
//! The memory stays where it is; everything else is read from KVM, put into a VM and a vCPU that have
//! just been made, and the old ones are dropped. A guest must not be able to tell, whatever it was
//! doing: that is a test of whoever keeps state of a vCPU beside KVM's own.
//!
//! When it happens is decided by numbers from a seed: after so many exits to user space, and after so
//! many microseconds, wherever the vCPU is then.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvm_bindings::{
    kvm_clock_data, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_nested_state, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
    CpuId, Msrs, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, KVM_STATE_NESTED_GUEST_MODE,
};
use kvm_ioctls::{Kvm, KvmNestedStateBuffer, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::machine::{self, Config};
use crate::memory::{Memory, PAGE};
use crate::{Error, Result};

/// Exits to user space from one shuffle to the next, on average.
const EXITS: u64 = 16;
/// Microseconds between two kicks, on average.
const KICK_US: u64 = 150;
const MSR_IA32_TSC: u32 = 0x10;
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;
/// No VMCS.
const NO_VMCS: u64 = u64::MAX;

/// How often it was done, and when.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// All together.
    pub all: u64,
    /// While a guest of the guest was running.
    pub in_l2: u64,
    /// While the guest itself was running, with a current VMCS that memory does not have as it is:
    /// changes were in KVM, or in a shadow VMCS.
    pub dirty: u64,
}

/// A stream of numbers (xorshift64*).
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Numbers {
        // Zero would stay zero.
        Numbers(seed ^ 0x9e37_79b9_7f4a_7c15 | 1)
    }

    /// A number from 1 to twice `mean`.
    pub(crate) fn around(&mut self, mean: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        1 + (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % (2 * mean)
    }
}

/// How long the thread that kicks the vCPU sleeps before the next kick.
pub(crate) fn pause(numbers: &mut Numbers) -> Duration {
    Duration::from_micros(numbers.around(KICK_US))
}

/// What a vCPU and its VM hold, except memory.
struct State {
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
    cpuid: CpuId,
    tsc_khz: u32,
    chips: Vec<kvm_irqchip>,
    pit: Option<kvm_pit_state2>,
    clock: kvm_clock_data,
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

impl State {
    fn save(kvm: &Kvm, vm: &VmFd, vcpu: &VcpuFd, config: &Config) -> Result<State> {
        // The order is that of the kernel's own KVM selftests: some of these change others.
        let events = vcpu
            .get_vcpu_events()
            .map_err(Error::kvm("KVM_GET_VCPU_EVENTS"))?;
        let mp_state = vcpu
            .get_mp_state()
            .map_err(Error::kvm("KVM_GET_MP_STATE"))?;
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
        let chip = |id| {
            let mut chip = kvm_irqchip {
                chip_id: id,
                ..Default::default()
            };
            vm.get_irqchip(&mut chip)
                .map_err(Error::kvm("KVM_GET_IRQCHIP"))?;
            Ok(chip)
        };
        Ok(State {
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
                .map_err(Error::kvm("KVM_GET_CPUID2"))?,
            tsc_khz: vcpu.get_tsc_khz().map_err(Error::kvm("KVM_GET_TSC_KHZ"))?,
            chips: [
                KVM_IRQCHIP_PIC_MASTER,
                KVM_IRQCHIP_PIC_SLAVE,
                KVM_IRQCHIP_IOAPIC,
            ]
            .into_iter()
            .map(chip)
            .collect::<Result<_>>()?,
            pit: match config.pit {
                true => Some(vm.get_pit2().map_err(Error::kvm("KVM_GET_PIT2"))?),
                false => None,
            },
            clock: vm.get_clock().map_err(Error::kvm("KVM_GET_CLOCK"))?,
        })
    }

    fn restore(&self, vm: &VmFd, vcpu: &VcpuFd) -> Result<()> {
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
        vcpu.set_cpuid2(&self.cpuid)
            .map_err(Error::kvm("KVM_SET_CPUID2"))?;
        vcpu.set_tsc_khz(self.tsc_khz)
            .map_err(Error::kvm("KVM_SET_TSC_KHZ"))?;
        vcpu.set_sregs(&self.sregs)
            .map_err(Error::kvm("KVM_SET_SREGS"))?;
        vcpu.set_lapic(&self.lapic)
            .map_err(Error::kvm("KVM_SET_LAPIC"))?;
        each_msr(&self.msrs, |list| vcpu.set_msrs(list), "KVM_SET_MSRS")?;
        vcpu.set_xcrs(&self.xcrs)
            .map_err(Error::kvm("KVM_SET_XCRS"))?;
        // SAFETY: KVM gave this state of the same size a moment ago; no feature with a larger one (AMX) has
        // been asked for, so the kernel reads no more than the structure.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(Error::kvm("KVM_SET_XSAVE"))?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(Error::kvm("KVM_SET_VCPU_EVENTS"))?;
        vcpu.set_mp_state(self.mp_state)
            .map_err(Error::kvm("KVM_SET_MP_STATE"))?;
        vcpu.set_debug_regs(&self.debug)
            .map_err(Error::kvm("KVM_SET_DEBUGREGS"))?;
        vcpu.set_regs(&self.regs)
            .map_err(Error::kvm("KVM_SET_REGS"))?;
        if self.nested.size as usize > size_of::<kvm_nested_state>() || self.vmxon() {
            vcpu.set_nested_state(&self.nested)
                .map_err(Error::kvm("KVM_SET_NESTED_STATE"))?;
        }
        Ok(())
    }

    fn vmxon(&self) -> bool {
        // SAFETY: KVM on Intel fills in this member, and any bits are valid.
        unsafe { self.nested.hdr.vmx.vmxon_pa != NO_VMCS }
    }

    fn in_l2(&self) -> bool {
        u32::from(self.nested.flags) & KVM_STATE_NESTED_GUEST_MODE != 0
    }

    /// Is the current VMCS another in KVM than in memory?
    fn dirty(&self, mem: &Memory) -> bool {
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

/// Does it, and decides when.
pub(crate) struct Shuffler<'a> {
    kvm: Kvm,
    vm: &'a mut VmFd,
    mem: &'a Memory,
    config: &'a Config,
    irq: EventFd,
    numbers: Numbers,
    exits: u64,
    counts: Counts,
}

impl<'a> Shuffler<'a> {
    pub(crate) fn new(
        vm: &'a mut VmFd,
        mem: &'a Memory,
        config: &'a Config,
        irq: EventFd,
        seed: u64,
    ) -> Result<Self> {
        let mut numbers = Numbers::new(seed);
        Ok(Shuffler {
            kvm: machine::Machine::open_kvm()?,
            vm,
            mem,
            config,
            irq,
            exits: numbers.around(EXITS),
            numbers,
            counts: Counts::default(),
        })
    }

    /// Counts an exit to user space, which may make it due.
    pub(crate) fn exit(&mut self, due: &AtomicBool) {
        self.exits -= 1;
        if self.exits == 0 {
            self.exits = self.numbers.around(EXITS);
            due.store(true, Ordering::Relaxed);
        }
    }

    /// Replaces VM and vCPU. Nothing of the last exit may be left to be completed.
    pub(crate) fn shuffle(&mut self, vcpu: &mut VcpuFd) -> Result<()> {
        let state = State::save(&self.kvm, self.vm, vcpu, self.config)?;
        let vm = machine::new_vm(&self.kvm, self.config, self.mem)?;
        // An eventfd interrupts one VM at a time.
        machine::disconnect(self.vm, &self.irq)?;
        machine::connect(&vm, &self.irq)?;
        let new = vm.create_vcpu(0).map_err(Error::kvm("KVM_CREATE_VCPU"))?;
        state.restore(&vm, &new)?;
        self.counts.all += 1;
        self.counts.in_l2 += u64::from(state.in_l2());
        self.counts.dirty += u64::from(!state.in_l2() && state.dirty(self.mem));
        // The old vCPU goes before its VM.
        *vcpu = new;
        *self.vm = vm;
        Ok(())
    }

    pub(crate) fn counts(&self) -> Counts {
        self.counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_repeat_and_keep_their_mean() {
        let (mut a, mut b) = (Numbers::new(5), Numbers::new(5));
        let sum: u64 = (0..1000)
            .map(|_| {
                let n = a.around(EXITS);
                assert_eq!(n, b.around(EXITS));
                assert!((1..=2 * EXITS).contains(&n));
                n
            })
            .sum();
        assert!((1000 * EXITS * 9 / 10..1000 * EXITS * 11 / 10).contains(&sum));
    }
}
