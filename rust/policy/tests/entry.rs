// SPDX-License-Identifier: GPL-2.0
//! Entering L2: which L2 is plain, and the merged controls bit by bit, written out another way.

#![allow(clippy::precedence, reason = "as the kernel's own lints do")]

use policy::entry::{read_shadow, Controls, Inputs};
use proptest::prelude::*;

fn bit(word: u64, number: u32) -> bool {
    (word >> number) & 1 == 1
}

fn mostly(set: u64, clear: u64) -> impl Strategy<Value = u64> {
    (any::<u64>(), prop::bool::weighted(0.9)).prop_map(move |(word, usual)| {
        if usual {
            (word & !clear) | set
        } else {
            word
        }
    })
}

fn controls() -> impl Strategy<Value = Controls> {
    (
        any::<u32>(),
        any::<u32>(),
        mostly(0, 1 << 15),
        mostly(1 << 9, 1 << 13 | 1 << 20),
        any::<u32>(),
    )
        .prop_map(|(pin, primary, secondary, entry, exit)| Controls {
            pin,
            primary,
            secondary: secondary as u32,
            entry: entry as u32,
            exit,
        })
}

fn inputs() -> impl Strategy<Value = Inputs> {
    const LONG_MODE: u64 = 1 << 8 | 1 << 10;
    (
        controls(),
        prop_oneof![9 => Just(0u64), 1 => any::<u64>()],
        mostly(1 | 1 << 31, 0),
        mostly(1 << 5, 0),
        mostly(LONG_MODE, 0),
        mostly(0, 1 << 17),
        mostly(0, 0xffff_ffff << 32),
        prop_oneof![9 => Just(1u64 << 48), 1 => any::<u64>()],
        prop_oneof![9 => any::<u64>(), 1 => Just(0u64)],
        mostly(LONG_MODE, 0),
    )
        .prop_map(
            |(wanted, msr_count, cr0, cr4, efer, rflags, dr7, tsc_multiplier, timer, l1_efer)| {
                Inputs {
                    wanted,
                    msr_count,
                    cr0,
                    cr4,
                    efer,
                    rflags,
                    dr7,
                    tsc_multiplier,
                    timer,
                    l1_efer,
                }
            },
        )
}

/// Number of each control that KVM treats in a way of its own.
mod number {
    pub const PREEMPTION_TIMER: u32 = 6;
    pub const POSTED_INTERRUPTS: u32 = 7;
    pub const INTERRUPT_WINDOW: u32 = 2;
    pub const CR8_LOAD: u32 = 19;
    pub const CR8_STORE: u32 = 20;
    pub const TPR_SHADOW: u32 = 21;
    pub const NMI_WINDOW: u32 = 22;
    pub const UNCONDITIONAL_IO: u32 = 24;
    pub const IO_BITMAPS: u32 = 25;
    pub const MSR_BITMAPS: u32 = 28;
    pub const DESCRIPTOR_TABLES: u32 = 2;
    pub const UNRESTRICTED: u32 = 7;
    pub const SHADOWING: u32 = 14;
    pub const PML: u32 = 17;
    pub const L1_ALONE: [u32; 10] = [0, 3, 4, 8, 9, 12, 13, 20, 22, 26];
    pub const IA32E_MODE: u32 = 9;
    pub const LOAD_PERF: u32 = 13;
    pub const LOAD_EFER: u32 = 15;
    pub const EXIT_LOAD_EFER: u32 = 21;
}
use number::*;

proptest! {
    #[test]
    fn only_what_is_plain(now in inputs()) {
        let entry = u64::from(now.wanted.entry);
        let long = |efer| bit(efer, 8) && bit(efer, 10);
        let l2_long = if bit(entry, LOAD_EFER) { long(now.efer) } else { bit(entry, IA32E_MODE) };
        let refused = bit(entry, LOAD_PERF)
            || bit(entry, 20)
            || bit(u64::from(now.wanted.secondary), 25) && now.tsc_multiplier != 1 << 48
            || now.msr_count != 0
            || !l2_long
            || !long(now.l1_efer)
            || !(bit(now.cr0, 0) && bit(now.cr0, 31) && bit(now.cr4, 5))
            || bit(now.rflags, 17)
            || now.dr7 > u64::from(u32::MAX)
            || bit(u64::from(now.wanted.pin), PREEMPTION_TIMER) && now.timer == 0;
        prop_assert_eq!(now.efer().is_none(), refused);
        if let Some(efer) = now.efer() {
            let from = if bit(entry, LOAD_EFER) { now.efer } else { now.l1_efer };
            prop_assert_eq!(efer, from);
        }
    }

    #[test]
    fn controls_bit_by_bit(ours in controls(), wanted in controls(), bitmap: bool, umip: bool) {
        let merged = ours.merge(&wanted, bitmap, umip);
        let encls = (ours.secondary | wanted.secondary) >> 15 & 1 != 0;
        prop_assert_eq!(merged.is_none(), encls);
        let Some(merged) = merged else { return Ok(()) };
        for number in 0..32 {
            let of = |word: u32| word >> number & 1 != 0;
            let either = |word: fn(&Controls) -> u32| of(word(&ours)) || of(word(&wanted));

            let pin = match number {
                PREEMPTION_TIMER => of(ours.pin),
                POSTED_INTERRUPTS => of(wanted.pin),
                _ => either(|c| c.pin),
            };
            prop_assert_eq!(of(merged.pin), pin, "pin {}", number);

            let primary = match number {
                INTERRUPT_WINDOW | NMI_WINDOW | TPR_SHADOW => of(wanted.primary),
                CR8_LOAD | CR8_STORE => {
                    either(|c| c.primary) || wanted.primary >> TPR_SHADOW & 1 == 0
                }
                UNCONDITIONAL_IO => true,
                IO_BITMAPS => false,
                MSR_BITMAPS => bitmap,
                _ => either(|c| c.primary),
            };
            prop_assert_eq!(of(merged.primary), primary, "primary {}", number);

            let secondary = match number {
                PML | SHADOWING => false,
                DESCRIPTOR_TABLES => umip || of(wanted.secondary),
                UNRESTRICTED => of(wanted.secondary),
                _ if L1_ALONE.contains(&number) => of(wanted.secondary),
                _ => either(|c| c.secondary),
            };
            prop_assert_eq!(of(merged.secondary), secondary, "secondary {}", number);

            let entry = match number {
                IA32E_MODE | LOAD_EFER => false,
                LOAD_PERF => of(ours.entry),
                _ => either(|c| c.entry),
            };
            prop_assert_eq!(of(merged.entry), entry, "entry {}", number);
            let exit = of(ours.exit) && number != EXIT_LOAD_EFER;
            prop_assert_eq!(of(merged.exit), exit, "exit {}", number);
        }
    }

    #[test]
    fn what_l2_reads(value: u64, mask: u64, shadow: u64) {
        let seen = read_shadow(value, mask, shadow);
        for number in 0..64 {
            let from = if bit(mask, number) { shadow } else { value };
            prop_assert_eq!(bit(seen, number), bit(from, number));
        }
    }
}
