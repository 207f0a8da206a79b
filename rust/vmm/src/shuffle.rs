// SPDX-License-Identifier: GPL-2.0-or-later
//! Saving a machine in the middle of its run and going on in a new one: what live migration does, on
//! one host and many times a second.
//!
//! The memory stays where it is; everything else is read from KVM, put into a VM and a vCPU that have
//! just been made, and the old ones are dropped. A guest must not be able to tell, whatever it was
//! doing: that is a test of whoever keeps state of a vCPU beside KVM's own.
//!
//! Or in the same VM and vCPU, after a reset ([`Config::reset`]): what a reboot does to whoever keeps such state.
//!
//! When it happens is decided by numbers from a seed: after so many exits to user space, and after so
//! many microseconds, wherever the vCPU is then.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::machine::{Config, Machine};
use crate::memory::Memory;
use crate::state::{VcpuState, VmState};
use crate::{vm, Error, Result};

/// Exits to user space from one shuffle to the next, on average.
const EXITS: u64 = 16;
/// Microseconds between two kicks, on average.
const KICK_US: u64 = 150;
/// Both are so many times as far apart for a Linux, which has to boot before its guests do anything.
const LINUX: u64 = 4;

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

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "saved and restored {} times, {} in L2, {} with a current VMCS that memory did not have",
            self.all, self.in_l2, self.dirty
        )
    }
}

/// A stream of numbers (xorshift64*).
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Numbers {
        // Zero would stay zero; every other seed has numbers of its own.
        Numbers(match seed ^ 0x9e37_79b9_7f4a_7c15 {
            0 => 1,
            numbers => numbers,
        })
    }

    /// A number from 1 to twice `mean`.
    pub(crate) fn around(&mut self, mean: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        1 + (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % (2 * mean)
    }
}

/// How far apart things happen to this machine, beside a payload.
fn factor(config: &Config) -> u64 {
    if config.all_begin {
        1
    } else {
        LINUX
    }
}

/// What the thread that kicks the vCPU and the vCPU's own tell one another.
#[derive(Debug, Default)]
pub(crate) struct Due {
    due: AtomicBool,
    /// How many microseconds it took the last time.
    took: AtomicU64,
}

impl Due {
    /// Whether it is to be done now.
    pub(crate) fn is_now(&self) -> bool {
        self.due.load(Ordering::Relaxed)
    }

    /// It is to be done. Whether that is news.
    pub(crate) fn now(&self) -> bool {
        !self.due.swap(true, Ordering::Relaxed)
    }

    /// It was done, which began then.
    pub(crate) fn done(&self, since: Instant) {
        let took = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.took.store(took, Ordering::Relaxed);
        self.due.store(false, Ordering::Relaxed);
    }

    /// How long the thread that kicks the vCPU sleeps before the next kick. A kernel with KASAN takes so long for a new VM, and
    /// for the pages of its guest, that the guest would not get on otherwise.
    pub(crate) fn pause(&self, numbers: &mut Numbers, config: &Config) -> Duration {
        let us = numbers.around(factor(config) * KICK_US);
        Duration::from_micros(us.max(self.took.load(Ordering::Relaxed)))
    }
}

/// Does it, and decides when.
pub(crate) struct Shuffler<'a> {
    kvm: Kvm,
    vm: &'a mut VmFd,
    mem: &'a Memory,
    config: &'a Config,
    irq: EventFd,
    /// What a vCPU is like that has just been made, to reset ours.
    fresh: Option<VcpuState>,
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
        let kvm = Machine::open_kvm()?;
        let fresh = match config.reset {
            false => None,
            true => {
                let vm = vm::create(&kvm, config, mem)?;
                let vcpu = vm.create_vcpu(0).map_err(Error::kvm("KVM_CREATE_VCPU"))?;
                Some(VcpuState::save(&kvm, &vcpu)?)
            }
        };
        Ok(Shuffler {
            kvm,
            vm,
            mem,
            config,
            irq,
            fresh,
            exits: numbers.around(factor(config) * EXITS),
            numbers,
            counts: Counts::default(),
        })
    }

    /// Counts an exit to user space, which may make it due.
    pub(crate) fn exit(&mut self, due: &Due) {
        self.exits -= 1;
        if self.exits == 0 {
            self.exits = self.numbers.around(factor(self.config) * EXITS);
            due.now();
        }
    }

    /// Replaces VM and vCPU, or resets the latter and puts everything back. Nothing of the last exit may be left to be completed.
    pub(crate) fn shuffle(&mut self, vcpu: &mut VcpuFd) -> Result<()> {
        let state = VcpuState::save(&self.kvm, vcpu)?;
        self.counts.all += 1;
        self.counts.in_l2 += u64::from(state.in_l2());
        self.counts.dirty += u64::from(!state.in_l2() && state.dirty(self.mem));
        if let Some(fresh) = &self.fresh {
            fresh.reset(vcpu)?;
            return state.put_back(vcpu);
        }
        let chips = VmState::save(self.vm, self.config.pit)?;
        let vm = vm::create(&self.kvm, self.config, self.mem)?;
        // An eventfd interrupts one VM at a time.
        vm::disconnect(self.vm, &self.irq)?;
        vm::connect(&vm, &self.irq)?;
        let new = vm.create_vcpu(0).map_err(Error::kvm("KVM_CREATE_VCPU"))?;
        state.restore(&new)?;
        chips.restore(&vm)?;
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

    #[test]
    fn seeds_that_follow_on_one_another_differ() {
        let first = |seed| {
            (0..8)
                .map(move |_| seed)
                .scan(Numbers::new(seed), |n, _| Some(n.around(EXITS)))
        };
        for seed in 0..100 {
            assert!(!first(seed).eq(first(seed + 1)), "{seed}");
        }
    }
}
