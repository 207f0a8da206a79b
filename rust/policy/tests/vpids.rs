// SPDX-License-Identifier: GPL-2.0
//! Other VPIDs instead of flushes: what a virtual processor uses after one has nothing in the TLB.

use policy::vpids::{Price, Spare, DEAR, FEWEST, MOST, PAUSE, TRIAL};
use proptest::prelude::*;
use std::collections::BTreeSet;

/// A virtual processor with two VPIDs in use, and what the TLB has.
struct Model {
    spare: Spare,
    used: [u16; 2],
    tlb: BTreeSet<u16>,
    flushes: usize,
}

impl Model {
    fn new(count: u16) -> Self {
        let mut spare = Spare::new();
        // Another owner may have left something of each.
        let tlb = (1..=count + 2).collect();
        for vpid in 0..count {
            assert_eq!(spare.add(vpid + 3), usize::from(vpid) < MOST);
        }
        assert!(!spare.add(0));
        Self {
            spare,
            used: [1, 2],
            tlb,
            flushes: 0,
        }
    }

    fn run(&mut self, which: usize) {
        self.tlb.insert(self.used[which]);
    }

    fn flush(&mut self, which: usize) {
        match self.spare.exchange(self.used[which]) {
            Some(vpid) => self.used[which] = vpid,
            None => {
                self.tlb.clear();
                self.flushes += 1;
                self.spare.flushed();
            }
        }
    }
}

proptest! {
    #[test]
    fn what_is_used_after_a_flush_has_nothing_in_the_tlb(
        count in 0u16..40, steps in prop::collection::vec((0usize..2, any::<bool>()), 0..400),
    ) {
        let mut model = Model::new(count);
        for (which, flush) in steps {
            if flush {
                model.flush(which);
                prop_assert!(!model.tlb.contains(&model.used[which]));
            } else {
                model.run(which);
            }
            prop_assert_ne!(model.used[0], model.used[1]);
        }
    }

    #[test]
    fn no_vpid_is_lost_or_doubled(count in 0u16..40, flushes in prop::collection::vec(0usize..2, 0..200)) {
        let mut model = Model::new(count);
        for which in flushes {
            model.flush(which);
        }
        let mut all: Vec<u16> = model.used.to_vec();
        let left = model.spare.count();
        prop_assert_eq!(left, usize::from(count).min(MOST));
        all.extend(std::iter::from_fn(|| model.spare.remove()));
        all.sort_unstable();
        prop_assert_eq!(all, (1..=2 + left as u16).collect::<Vec<_>>());
    }

    #[test]
    fn one_flush_of_all_in_as_many_as_there_are(count in FEWEST as u16..=MOST as u16, flushes in 1usize..500) {
        let mut model = Model::new(count);
        for _ in 0..flushes {
            model.flush(0);
            model.run(0);
        }
        prop_assert_eq!(model.flushes, flushes.div_ceil(usize::from(count) + 1));
    }

    #[test]
    fn removed_ones_are_not_handed_out(count in 1u16..=MOST as u16, removed in 1usize..40) {
        let mut model = Model::new(count);
        model.flush(0);
        let gone: Vec<u16> = std::iter::from_fn(|| model.spare.remove()).take(removed).collect();
        for _ in 0..100 {
            model.flush(0);
            prop_assert!(!gone.contains(&model.used[0]));
        }
    }

    #[test]
    fn dear_writes_end_it_for_a_while(ticks in DEAR + 1..1 << 40) {
        let mut price = Price::new();
        for _ in 0..TRIAL {
            prop_assert!(price.is_fair());
            price.paid(ticks);
        }
        for _ in 0..PAUSE {
            prop_assert!(!price.is_fair());
        }
        prop_assert!(price.is_fair());
    }

    #[test]
    fn cheap_writes_do_not(ticks in prop::collection::vec(0..=2 * DEAR, TRIAL as usize..1000)) {
        let mut price = Price::new();
        for (n, &t) in ticks.iter().enumerate() {
            let fair = price.is_fair();
            let dear = ticks[..n].chunks_exact(TRIAL.into()).any(|trial| trial.iter().all(|&t| t > DEAR));
            prop_assert_eq!(fair, !dear);
            if fair {
                price.paid(t);
            }
        }
    }
}
