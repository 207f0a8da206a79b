// SPDX-License-Identifier: GPL-2.0
//! Loading host state against the SDM's words, written out another way.

use policy::host_state::{self, Inputs};
use proptest::prelude::*;

const LMA: u64 = 1 << 10;
const LME: u64 = 1 << 8;

fn inputs() -> impl Strategy<Value = Inputs> {
    // Near enough to 64-bit mode that a plan is common.
    let mostly = |set: u64, clear: u64| {
        (any::<u64>(), prop::bool::weighted(0.85)).prop_map(move |(word, usual)| {
            if usual {
                (word & !clear) | set
            } else {
                word
            }
        })
    };
    (
        mostly(1 << 9, (1 << 12) | (1 << 28)),
        prop_oneof![9 => Just(0u64), 1 => any::<u64>()],
        mostly(1 | (1 << 31), 0),
        mostly(1 << 5, 0),
        mostly(LMA | LME, 0),
        any::<u64>(),
    )
        .prop_map(|(controls, msr_count, cr0, cr4, efer, guest_efer)| Inputs {
            controls,
            msr_count,
            cr0,
            cr4,
            efer,
            guest_efer,
        })
}

fn bit(word: u64, number: u32) -> bool {
    (word >> number) & 1 == 1
}

proptest! {
    #[test]
    fn only_what_is_plain(now in inputs()) {
        let load_efer = bit(now.controls, 21);
        let refused = !bit(now.controls, 9)
            || bit(now.controls, 12)
            || bit(now.controls, 28)
            || now.msr_count != 0
            || !bit(now.cr0, 0)
            || !bit(now.cr0, 31)
            || !bit(now.cr4, 5)
            || load_efer && !(bit(now.efer, 8) && bit(now.efer, 10));
        prop_assert_eq!(now.plan().is_none(), refused);
    }

    #[test]
    fn efer_is_loaded_or_kept_in_long_mode(now in inputs()) {
        let Some(plan) = now.plan() else { return Ok(()) };
        let want = if bit(now.controls, 21) { now.efer } else { now.guest_efer | LMA | LME };
        prop_assert_eq!(plan.efer, want);
        prop_assert_eq!(plan.load_pat, bit(now.controls, 19));
        prop_assert_eq!(plan.clear_bndcfgs, bit(now.controls, 23));
    }
}

#[test]
fn rights_are_those_of_a_flat_64_bit_kernel() {
    // As Linux has them in its own VMCS dumps.
    assert_eq!(host_state::CS_RIGHTS, 0xa09b);
    assert_eq!(host_state::DATA_RIGHTS, 0xc093);
    assert_eq!(host_state::TR_RIGHTS, 0x8b);
    assert_eq!(host_state::LDTR_RIGHTS, 0x1_0000);
}
