// SPDX-License-Identifier: GPL-2.0-or-later
//! How fast the guests' kernels take their TSC for.
//!
//! A timer tick of a guest costs several exits at each level below it. In a stack of five levels on stock KVM that is more than lies
//! between two ticks: a kernel that is served its ticks gets nothing else done. If it takes the TSC for N times as fast as it is, its ticks come N
//! times less often, and its clock goes N times slower, which a measurement in TSC cycles does not mind.

use kvm_ioctls::Kvm;

use crate::{Error, Result};

/// The kernel has the deadline timer's rate, an eighth of the TSC's, in Hz in 32 bits (`setup_APIC_timer()`, TSC_DIVISOR).
const MOST_KHZ: u64 = (u32::MAX as u64) / 125;
/// Levels from which on clocks are slow by default, and by how much.
const DEEP: u32 = 5;
const SLOW: u32 = 9;

/// By how much the clocks of a stack of `depth` levels are slowed, if nothing was asked for.
pub fn factor(asked: Option<u32>, depth: u32) -> u32 {
    asked.unwrap_or(if depth >= DEEP { SLOW } else { 1 })
}

/// Words for the kernels' command lines that make their clocks `factor` times slower, or as slow as a kernel bears, on a TSC of
/// `khz`. kvmclock would tell them better.
fn words(khz: u32, factor: u32) -> String {
    let khz = (u64::from(khz) * u64::from(factor)).min(MOST_KHZ);
    format!("no-kvmclock tsc_early_khz={khz}")
}

/// As many kHz as the TSC of a guest of this host has, by a vCPU made for the question.
fn tsc_khz(kvm: &Kvm) -> Result<u32> {
    let vm = kvm.create_vm().map_err(Error::kvm("KVM_CREATE_VM"))?;
    let vcpu = vm.create_vcpu(0).map_err(Error::kvm("KVM_CREATE_VCPU"))?;
    vcpu.get_tsc_khz().map_err(Error::kvm("KVM_GET_TSC_KHZ"))
}

/// What `words` says on this host; nothing for a factor of 1.
///
/// # Errors
/// KVM refuses a VM or a vCPU.
pub fn slowed(kvm: &Kvm, factor: u32) -> Result<Option<String>> {
    match factor {
        0 | 1 => Ok(None),
        _ => Ok(Some(words(tsc_khz(kvm)?, factor))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_slow_as_asked_or_as_possible() {
        assert_eq!(words(2_000_000, 3), "no-kvmclock tsc_early_khz=6000000");
        assert_eq!(words(3_500_000, 9), "no-kvmclock tsc_early_khz=31500000");
        assert_eq!(words(3_500_000, 100), "no-kvmclock tsc_early_khz=34359738");
        let most = words(u32::MAX, u32::MAX);
        let khz: u64 = most.rsplit('=').next().unwrap().parse().unwrap();
        assert!((khz * 125) >> 32 == 0, "the rate of the timer still fits");
    }

    #[test]
    fn deep_stacks_have_slow_clocks() {
        assert_eq!(factor(None, 4), 1);
        assert_eq!(factor(None, 5), SLOW);
        assert_eq!(factor(Some(1), 6), 1);
        assert_eq!(factor(Some(3), 2), 3);
    }
}
