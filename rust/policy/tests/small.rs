// SPDX-License-Identifier: GPL-2.0
//! Modes and segments: short code, but what sysfs writers and guests put in is anything at all.

use policy::mode::Mode;
use policy::segments::{word, Inputs, COUNT};
use proptest::prelude::*;

proptest! {
    #[test]
    fn a_mode_is_its_name_and_nothing_else(text in prop::collection::vec(any::<u8>(), 0..12)) {
        let named = match text.trim_ascii() {
            b"off" => Some(Mode::Off),
            b"on" => Some(Mode::On),
            b"check" => Some(Mode::Check),
            _ => None,
        };
        prop_assert_eq!(Mode::parse(&text), named);
    }

    #[test]
    fn white_space_around_a_mode_is_allowed(
        before in "[ \t\n]{0,4}", after in "[ \t\n]{0,4}", number in 0u8..3,
    ) {
        let mode = Mode::from_number(number);
        let text = format!("{before}{}{after}", mode.map_or("", Mode::name));
        prop_assert_eq!(Mode::parse(text.as_bytes()), mode);
    }

    #[test]
    fn a_number_is_a_mode_or_none(number in any::<u8>()) {
        prop_assert_eq!(Mode::from_number(number).map(|m| m as u8), (number < 3).then_some(number));
    }

    #[test]
    fn a_word_keeps_both_halves(
        a in any::<(u16, u32)>(), b in any::<(u16, u32)>(),
    ) {
        prop_assert_eq!(word(a.0, a.1) == word(b.0, b.1), a == b);
    }

    #[test]
    fn same_is_equality(a in any::<[u64; COUNT]>(), which in 0..COUNT, flip in any::<u64>()) {
        let mut b = a;
        b[which] ^= flip;
        prop_assert_eq!(Inputs(a).same(&Inputs(b)), a == b);
    }
}
