// SPDX-License-Identifier: GPL-2.0
//! The test knob that sends calls to the stock code at random.

use policy::detour::{Detour, Rate};
use proptest::prelude::*;

fn taken(rate: Rate, calls: u32) -> Vec<bool> {
    let mut detour = Detour::NEW;
    (0..calls).map(|_| detour.take(rate.to_word())).collect()
}

proptest! {
    #[test]
    fn one_word_has_it_all(every: u32, seed: u32) {
        let rate = Rate { every, seed };
        prop_assert_eq!(Rate::from_word(rate.to_word()), rate);
        prop_assert_eq!(Rate::parse(format!(" {every}\t{seed} \n").as_bytes()), Some(rate));
        prop_assert_eq!(Rate::parse(format!("{every}\n").as_bytes()), Some(Rate { every, seed: 0 }));
    }

    #[test]
    fn anything_is_read_or_refused(text: Vec<u8>) {
        let _ = Rate::parse(&text);
    }

    #[test]
    fn about_one_in_every(every in 1u32..100, seed: u32) {
        let calls = 200 * every;
        let count = taken(Rate { every, seed }, calls).iter().filter(|&&t| t).count();
        prop_assert!((100..=300).contains(&count), "{} of {} with {}", count, calls, every);
    }

    #[test]
    fn the_seed_decides(every in 2u32..10, seed: u32) {
        let rate = Rate { every, seed };
        prop_assert_eq!(taken(rate, 200), taken(rate, 200));
        let other = Rate { seed: seed ^ 1, ..rate };
        prop_assert_ne!(taken(rate, 200), taken(other, 200));
    }
}

#[test]
fn none_and_all() {
    assert!(taken(Rate { every: 0, seed: 5 }, 1000).iter().all(|t| !t));
    assert!(taken(Rate { every: 1, seed: 5 }, 1000).iter().all(|&t| t));
}

#[test]
fn what_is_no_rate() {
    for text in ["", " ", "x", "-1", "1 2 3", "4294967296", "1,2", "0x1"] {
        assert_eq!(Rate::parse(text.as_bytes()), None, "{text}");
    }
}
