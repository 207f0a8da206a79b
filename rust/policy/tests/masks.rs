// SPDX-License-Identifier: GPL-2.0
//! `policy::masks` against a plain set of encodings.

use policy::masks::Words;
use proptest::prelude::*;
use std::collections::BTreeSet;

fn bits(words: &Words<32>, of: fn(&policy::masks::Masks) -> u64) -> BTreeSet<u16> {
    let mut all = BTreeSet::new();
    for m in words.iter() {
        for bit in 0..64 {
            if (of(m) >> bit) & 1 != 0 {
                assert!(all.insert(m.index * 64 + bit), "a word stands twice");
            }
        }
    }
    all
}

proptest! {
    /// Sets come and go in one table; what it says is always the set that is in, and nothing of those before.
    #[test]
    fn says_what_is_in(sets in prop::collection::vec(
        prop::collection::vec((0u16..0x8000, any::<bool>(), any::<bool>()), 0..24), 1..6)) {
        let mut words = Words::<32>::new();
        for set in sets {
            words.clear();
            let (mut read, mut write) = (BTreeSet::new(), BTreeSet::new());
            for (encoding, high, written) in set {
                // As in the VMCS: encodings of full fields are even.
                let encoding = encoding & !1;
                prop_assert!(words.insert(encoding, high, written));
                for e in encoding..=encoding + u16::from(high) {
                    read.insert(e);
                    if written {
                        write.insert(e);
                    }
                }
            }
            prop_assert_eq!(bits(&words, |m| m.read), read);
            prop_assert_eq!(bits(&words, |m| m.write), write);
        }
    }
}

#[test]
fn there_is_an_end() {
    let mut words = Words::<2>::new();
    assert!(words.insert(0, false, false));
    assert!(words.insert(64, true, true));
    assert!(!words.insert(128, false, false));
    assert!(words.insert(66, false, true));
    assert_eq!(words.iter().count(), 2);
}
