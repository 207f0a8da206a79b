// SPDX-License-Identifier: GPL-2.0-or-later
//! What CPUID answers in the guest: KVM's own list with the few leaves mended
//! that depend on this machine.

use kvm_bindings::kvm_cpuid_entry2;

/// KVM's local APIC timer counts nanoseconds (APIC_BUS_FREQUENCY in
/// arch/x86/kvm/lapic.h): one tick is 1 ns.
const APIC_BUS_HZ: u32 = 1_000_000_000;

/// What the leaves are made to fit.
#[derive(Debug, Clone, Copy)]
pub struct Topology {
    /// APIC id of this vCPU.
    pub apic_id: u32,
    /// vCPUs in the machine, all of them in one package.
    pub cpus: u32,
    /// Frequency of the guest's TSC in kHz (KVM_GET_TSC_KHZ).
    pub tsc_khz: u32,
    /// Whether this CPU itself has UMIP.
    pub umip: bool,
    /// KVM_CAP_TSC_DEADLINE_TIMER: KVM_GET_SUPPORTED_CPUID never says so itself.
    pub tsc_deadline: bool,
}

/// Whether the CPU this runs on has UMIP itself (CPUID leaf 7, ECX bit 2).
pub fn host_has_umip() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    // SAFETY: CPUID is always there in 64-bit mode and changes nothing.
    unsafe { __cpuid(0).eax >= 7 && __cpuid_count(7, 0).ecx & (1 << 2) != 0 }
}

/// Mends the leaves that KVM passes through from the host.
///
/// Leaf 0x15 is where the guest gets its frequencies from. Passed through it
/// names the host's crystal (25 MHz, say), while KVM's APIC timer runs at 1 GHz.
/// Linux takes the timer's frequency from it, so every timer of the guest fires
/// forty times too early and it drowns in interrupts. Clearing the leaf sends the
/// guest calibrating against the PIT, which costs exits. Here it says what is
/// true of this machine: a crystal of 1 GHz and the TSC's ratio to it. The guest
/// then knows both frequencies without measuring anything.
pub fn mend(entries: &mut [kvm_cpuid_entry2], t: &Topology) {
    for e in entries.iter_mut() {
        match e.function {
            0x1 => {
                e.ebx = (e.ebx & 0xffff) | (t.cpus.min(255) << 16) | (t.apic_id << 24);
                // Bit 31: there is a hypervisor, as the guest's kernel may know.
                e.ecx |= 1 << 31;
                e.ecx = (e.ecx & !(1 << 24)) | (u32::from(t.tsc_deadline) << 24);
                // Bit 28 (HTT) says that EBX[23:16] is valid.
                e.edx = (e.edx & !(1 << 28)) | (u32::from(t.cpus > 1) << 28);
            }
            // KVM offers UMIP (ECX bit 2) even where it must emulate it, by intercepting
            // every use of the descriptor-table registers: 200 exits in a boot.
            0x7 if e.index == 0 && !t.umip => e.ecx &= !(1 << 2),
            // No performance counters: nobody here uses them, and a guest kernel
            // that finds them reads and writes dozens of MSRs at boot.
            0xa => (e.eax, e.ebx, e.ecx, e.edx) = (0, 0, 0, 0),
            // One thread per core, all cores in one package.
            0xb | 0x1f => {
                let (shift, count, kind) = match e.index {
                    0 => (0, 1, 1),
                    1 => (32 - t.cpus.saturating_sub(1).leading_zeros(), t.cpus, 2),
                    _ => (0, 0, 0),
                };
                (e.eax, e.ebx, e.ecx, e.edx) = (shift, count, (kind << 8) | e.index, t.apic_id);
            }
            0x15 => {
                // TSC = crystal * EBX / EAX, and crystal = 1e6 kHz.
                (e.eax, e.ebx, e.ecx, e.edx) = (APIC_BUS_HZ / 1000, t.tsc_khz, APIC_BUS_HZ, 0);
            }
            0x16 => {
                let mhz = t.tsc_khz / 1000;
                (e.eax, e.ebx, e.ecx, e.edx) = (mhz, mhz, 100, 0);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            ..Default::default()
        }
    }

    fn topology(cpus: u32, apic_id: u32) -> Topology {
        Topology {
            apic_id,
            cpus,
            tsc_khz: 3_500_123,
            umip: false,
            tsc_deadline: true,
        }
    }

    #[test]
    fn leaf_15_gives_back_the_tsc_frequency() {
        let mut e = [leaf(0x15, 0)];
        e[0].ecx = 25_000_000;
        mend(&mut e, &topology(1, 0));
        let khz = u64::from(e[0].ecx / 1000) * u64::from(e[0].ebx) / u64::from(e[0].eax);
        assert_eq!(khz, 3_500_123);
        assert_eq!(e[0].ecx, APIC_BUS_HZ);
    }

    #[test]
    fn leaf_1_carries_the_apic_id_and_the_deadline_timer() {
        let mut e = [leaf(1, 0)];
        mend(&mut e, &topology(2, 1));
        assert_eq!(e[0].ebx >> 24, 1);
        assert_eq!((e[0].ebx >> 16) & 0xff, 2);
        assert_ne!(e[0].ecx & (1 << 24), 0);
        assert_ne!(e[0].ecx & (1 << 31), 0);
        assert_ne!(e[0].edx & (1 << 28), 0);
    }

    #[test]
    fn emulated_umip_is_hidden() {
        let mut e = [leaf(7, 0), leaf(7, 1)];
        (e[0].ecx, e[1].ecx) = (0b101, 0b101);
        mend(&mut e, &topology(1, 0));
        assert_eq!((e[0].ecx, e[1].ecx), (0b001, 0b101));
    }

    #[test]
    fn topology_shift_covers_all_cpus() {
        for (cpus, shift) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3)] {
            let mut e = [leaf(0xb, 1)];
            mend(&mut e, &topology(cpus, 0));
            assert_eq!(e[0].eax, shift, "{cpus} CPUs");
            assert_eq!(e[0].ebx, cpus);
        }
    }
}
