// SPDX-License-Identifier: GPL-2.0
//! Whose an exit of L2 is, against nested_vmx_l1_wants_exit() as its table reads.

use policy::reflect::{msr_place, owner, place, Owner};
use proptest::prelude::*;

/// Exit reasons of VMX instructions: VMCALL to VMXON but VMREAD and VMWRITE, INVEPT, INVVPID.
const INSTRUCTIONS: [u32; 10] = [18, 19, 20, 21, 22, 24, 26, 27, 50, 53];

#[test]
fn instructions_of_a_hypervisor_are_its_parents() {
    let l1s: Vec<u32> = (0..=u32::from(u16::MAX))
        .filter(|&r| owner(r) == Owner::L1)
        .collect();
    assert_eq!(l1s, INSTRUCTIONS);
    assert_eq!(owner(10), Owner::L1UnlessFaulting);
    assert_eq!(owner(12), Owner::L1If(1 << 7));
    assert_eq!(
        (owner(23), owner(25)),
        (Owner::VmreadBitmap, Owner::VmwriteBitmap)
    );
    // Use I/O bitmaps is bit 25, unconditional I/O exiting bit 24.
    assert_eq!(owner(30), Owner::L1IfNot(1 << 24, 1 << 25));
    for (reason, write) in [(31, false), (32, true)] {
        assert_eq!(owner(reason), Owner::MsrBitmap { write });
    }
}

proptest! {
    #[test]
    fn a_modifier_makes_it_somebody_elses_to_decide(reason in 0..78u32, modifier in 16..32u32) {
        prop_assert_eq!(owner(reason | (1 << modifier)), Owner::Unknown);
    }

    #[test]
    fn a_field_has_the_bit_that_the_manual_gives_it(field in any::<u64>()) {
        // KVM reads the byte at field / 8 and looks at bit field % 8 of it.
        match place(field) {
            Some((word, bit)) => {
                prop_assert!(field < 1 << 15 && word < 512 && bit < 64);
                prop_assert_eq!(word * 8 + u64::from(bit / 8), field / 8);
                prop_assert_eq!(u64::from(bit % 8), field % 8);
            }
            None => prop_assert!(field >= 1 << 15),
        }
    }

    #[test]
    fn an_msr_has_the_bit_that_the_manual_gives_it(msr in prop_oneof![any::<u32>(), 0..0x2100u32, 0xbfff_ff00..0xc000_2100u32], write in any::<bool>()) {
        // Reads of the low MSRs, of the high ones, writes of the low ones, of the high ones: 1,024 bytes each.
        let quarter = u64::from(write) * 2048 + u64::from(msr >= 0xc000_0000) * 1024;
        let index = u64::from(if msr >= 0xc000_0000 { msr - 0xc000_0000 } else { msr });
        match msr_place(msr, write) {
            Some((word, bit)) => {
                prop_assert!(index < 1024 * 8 && bit < 64);
                prop_assert_eq!(word * 8 + u64::from(bit / 8), quarter + index / 8);
                prop_assert_eq!(u64::from(bit % 8), index % 8);
            }
            None => prop_assert!(index >= 1024 * 8),
        }
    }

    #[test]
    fn every_field_has_a_bit(field in 0..1u64 << 15) {
        prop_assert!(place(field).is_some());
    }
}
