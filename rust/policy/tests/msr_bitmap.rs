// SPDX-License-Identifier: GPL-2.0
//! `policy::msr_bitmap` against a literal transcription of nested_vmx_prepare_msr_bitmap(), bit by bit.

use policy::msr_bitmap::{
    is_closed_elsewhere, X2apic, MERGED, WORDS, X2APIC_READS, X2APIC_WORDS, X2APIC_WRITES,
};
use proptest::prelude::*;

/// The bit of a bitmap that is about reads or writes of an MSR (SDM volume 3, 26.6.9).
fn bit(msr: u32, write: bool) -> usize {
    let bytes = usize::from(write) * 2048 + if msr >= 0xc000_0000 { 1024 } else { 0 };
    bytes * 8 + (msr & 0x1fff) as usize
}

fn get(map: &[u64], bit: usize) -> bool {
    (map[bit / 64] >> (bit % 64)) & 1 != 0
}

fn set(map: &mut [u64], bit: usize, value: bool) {
    map[bit / 64] = (map[bit / 64] & !(1 << (bit % 64))) | (u64::from(value) << (bit % 64));
}

/// (MSR, reads, writes) in the kernel's order.
const KVM: [(u32, bool, bool); 14] = [
    (0xc000_0100, true, true),
    (0xc000_0101, true, true),
    (0xc000_0102, true, true),
    (0x0000_0048, true, true),
    (0x0000_0049, false, true),
    (0x0000_010b, false, true),
    (0x0000_00e8, true, false),
    (0x0000_00e7, true, false),
    (0x0000_06a0, true, true),
    (0x0000_06a2, true, true),
    (0x0000_06a4, true, true),
    (0x0000_06a5, true, true),
    (0x0000_06a6, true, true),
    (0x0000_06a7, true, true),
];

/// What the kernel makes of vmcs02's bitmap.
fn kernel(l0: &mut [u64], l1: &[u64], vmcs01: &[u64], x2apic: Option<X2apic>) {
    for msr in 0x800..0x900 {
        set(l0, bit(msr, false), true);
        set(l0, bit(msr, true), true);
    }
    if let Some(x2apic) = x2apic {
        if x2apic.registers {
            for msr in 0x800..0x900 {
                set(l0, bit(msr, false), get(l1, bit(msr, false)));
            }
        }
        let mut open = |msr, write| {
            if !get(l1, bit(msr, write)) {
                set(l0, bit(msr, write), false);
            }
        };
        open(0x808, false);
        open(0x808, true);
        if x2apic.delivery {
            open(0x80b, true);
            open(0x83f, true);
        }
    }
    for (msr, read, write) in KVM {
        for (wanted, write) in [(read, false), (write, true)] {
            if wanted {
                let at = bit(msr, write);
                set(l0, at, get(vmcs01, at) || get(l1, at));
            }
        }
    }
}

/// What the module makes of it.
fn module(l0: &mut [u64], l1: &[u64], vmcs01: &[u64], x2apic: Option<X2apic>) {
    for merged in MERGED {
        l0[merged.index] = merged.word(l1[merged.index], vmcs01[merged.index]);
    }
    for n in 0..X2APIC_WORDS {
        l0[X2APIC_READS + n] =
            x2apic.map_or(u64::MAX, |x2apic| x2apic.reads(n, l1[X2APIC_READS + n]));
    }
    l0[X2APIC_WRITES] = x2apic.map_or(u64::MAX, |x2apic| x2apic.first_writes(l1[X2APIC_WRITES]));
}

fn bitmap() -> impl Strategy<Value = Vec<u64>> {
    prop::collection::vec(any::<u64>(), WORDS)
}

proptest! {
    /// Several entries of one vmcs02 with any bitmaps: always what the kernel makes, and what it leaves can always
    /// be written over.
    #[test]
    fn is_the_kernels(entries in prop::collection::vec(
        (bitmap(), bitmap(), prop::option::of((any::<bool>(), any::<bool>())), any::<bool>()), 1..6)) {
        let (mut theirs, mut ours) = (vec![u64::MAX; WORDS], vec![u64::MAX; WORDS]);
        for (l1, vmcs01, x2apic, stock) in entries {
            let x2apic = x2apic.map(|(registers, delivery)| X2apic { registers, delivery });
            kernel(&mut theirs, &l1, &vmcs01, x2apic);
            if stock {
                kernel(&mut ours, &l1, &vmcs01, x2apic);
            } else {
                module(&mut ours, &l1, &vmcs01, x2apic);
            }
            prop_assert_eq!(&ours, &theirs);
            prop_assert!(is_closed_elsewhere(|index| theirs[index]));
        }
    }

    /// A bit that is open anywhere else is seen.
    #[test]
    fn sees_what_others_open(at in 0..WORDS * 64) {
        let mut map = vec![u64::MAX; WORDS];
        set(&mut map, at, false);
        let ours = MERGED.iter().any(|m| m.index == at / 64 && (m.mask >> (at % 64)) & 1 != 0)
            || (X2APIC_READS..X2APIC_READS + X2APIC_WORDS).contains(&(at / 64))
            || at / 64 == X2APIC_WRITES;
        prop_assert_eq!(is_closed_elsewhere(|index| map[index]), ours);
    }
}
