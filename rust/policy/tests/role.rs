// SPDX-License-Identifier: GPL-2.0
//! The word that stands for a paging mode, against what KVM's own role takes from the same registers.

use policy::role::{Key, CR0_BITS, CR4_BITS, EFER_BITS, PLACES};
use proptest::prelude::*;

const PG: u64 = 1 << 31;
const PAE: u64 = 1 << 5;
const LA57: u64 = 1 << 12;
const LMA: u64 = 1 << 10;
const GUEST: u64 = 1;
const SMM: u64 = 2;

/// Registers that are near enough to those of 64-bit mode to be remembered often.
fn registers() -> impl Strategy<Value = (u64, u64, u64, u64, bool)> {
    let with = |must: u64| {
        (any::<u64>(), any::<u64>(), prop::bool::weighted(0.9))
            .prop_map(move |(a, b, usual)| (a & b) | if usual { must } else { 0 })
    };
    (with(PG), with(PAE), with(LMA), any::<u64>(), any::<bool>())
        .prop_map(|(cr0, cr4, efer, flags, nested)| (cr0, cr4, efer, flags, nested))
}

proptest! {
    #[test]
    fn only_four_levels_outside_smm((cr0, cr4, efer, flags, nested) in registers()) {
        let usual = cr0 & PG != 0 && cr4 & PAE != 0 && efer & LMA != 0 && cr4 & LA57 == 0 && flags & SMM == 0;
        prop_assert_eq!(Key::new(cr0, cr4, efer, flags, nested).is_some(), usual);
    }

    #[test]
    fn every_input_counts_and_nothing_else(
        (cr0, cr4, efer, flags, nested) in registers(),
        (cr0b, cr4b, eferb, flagsb, nestedb) in registers(),
    ) {
        let (Some(a), Some(b)) = (Key::new(cr0, cr4, efer, flags, nested), Key::new(cr0b, cr4b, eferb, flagsb, nestedb))
        else { return Ok(()) };
        let same = (cr0 ^ cr0b) & CR0_BITS == 0
            && (cr4 ^ cr4b) & CR4_BITS == 0
            && (efer ^ eferb) & EFER_BITS == 0
            && (flags ^ flagsb) & GUEST == 0
            && nested == nestedb;
        prop_assert_eq!(a == b, same);
    }

    #[test]
    fn each_bit_counts((cr0, cr4, efer, flags, nested) in registers(), bit in 0u32..64) {
        let bit = 1u64 << bit;
        let Some(key) = Key::new(cr0, cr4, efer, flags, nested) else { return Ok(()) };
        for (cr0b, cr4b, eferb, flagsb, counts) in [
            (cr0 ^ bit, cr4, efer, flags, bit & CR0_BITS != 0),
            (cr0, cr4 ^ bit, efer, flags, bit & CR4_BITS != 0),
            (cr0, cr4, efer ^ bit, flags, bit & EFER_BITS != 0),
            (cr0, cr4, efer, flags ^ bit, bit & (GUEST | SMM) != 0),
        ] {
            prop_assert_eq!(Key::new(cr0b, cr4b, eferb, flagsb, nested) != Some(key), counts);
        }
    }

    #[test]
    fn places_are_apart((cr0, cr4, efer, flags, nested) in registers()) {
        let nested = nested && flags & GUEST != 0;
        let Some(key) = Key::new(cr0, cr4, efer, flags, nested) else { return Ok(()) };
        prop_assert_eq!(key.place() / 2, if flags & GUEST == 0 { 0 } else { 1 + usize::from(nested) });
        prop_assert!(key.place() < PLACES);
        prop_assert_eq!(key.is_nested(), nested);
    }
}
