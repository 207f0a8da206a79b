// SPDX-License-Identifier: GPL-2.0
//! What is learned of an L1's VMCS fields, whatever that L1 does.

use std::collections::BTreeSet;

use policy::learn::{Learner, Set, FIELDS};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Touch(u8, bool),
    Switch,
    Bar(u8),
}

fn step() -> impl Strategy<Value = Step> {
    // Few fields, so that they are touched often, and now and then any number at all.
    let field = prop_oneof![8 => 0u8..12, 1 => any::<u8>()];
    prop_oneof![
        20 => (field.clone(), any::<bool>()).prop_map(|(f, costly)| Step::Touch(f, costly)),
        10 => Just(Step::Switch),
        1 => field.prop_map(Step::Bar),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_learner_keeps_its_promises(
        budget in 0u8..8, steps in prop::collection::vec(step(), 0..300),
    ) {
        let mut learner = Learner::new(budget);
        let mut barred = BTreeSet::new();
        for step in steps {
            let before: BTreeSet<u8> = learner.learned().iter().collect();
            match step {
                Step::Touch(field, costly) => {
                    let joined = learner.touched(field, costly);
                    prop_assert_eq!(joined, !before.contains(&field) && learner.learned().has(field));
                }
                Step::Switch => {
                    let left = learner.switched();
                    prop_assert_eq!(left, learner.learned().len() < before.len());
                    prop_assert!(learner.learned().iter().all(|f| before.contains(&f)));
                }
                Step::Bar(field) => {
                    learner.bar(field);
                    barred.insert(field);
                }
            }
            let learned: BTreeSet<u8> = learner.learned().iter().collect();
            prop_assert!(learned.len() <= budget as usize);
            prop_assert!(learned.is_disjoint(&barred));
            prop_assert!(learned.iter().all(|&f| usize::from(f) < FIELDS));
        }
    }

    #[test]
    fn a_set_is_a_set(changes in prop::collection::vec((any::<bool>(), any::<u8>()), 0..100)) {
        let mut set = Set::EMPTY;
        let mut model = BTreeSet::new();
        for (insert, field) in changes {
            if insert {
                set.insert(field);
                // Numbers beyond the last field are not kept.
                if usize::from(field) < FIELDS {
                    model.insert(field);
                }
            } else {
                set.remove(field);
                model.remove(&field);
            }
            prop_assert_eq!(set.has(field), model.contains(&field));
        }
        prop_assert_eq!(set.len(), model.len());
        prop_assert_eq!(set.is_empty(), model.is_empty());
        prop_assert!(set.iter().eq(model.iter().copied()));
    }
}
