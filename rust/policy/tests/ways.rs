// SPDX-License-Identifier: GPL-2.0
//! `Ways` against the plainest thing that does the same: a list, most recently used last.

use policy::ways::{Ways, NO_KEY};
use proptest::prelude::*;

const WAYS: usize = 4;

#[derive(Clone, Debug)]
enum Step {
    Get(u64),
    Insert(u64, u32),
    Clear,
}

fn step() -> impl Strategy<Value = Step> {
    // Few keys, so that they meet each other often.
    let key = prop_oneof![9 => 0u64..8, 1 => Just(NO_KEY)];
    prop_oneof![
        10 => key.clone().prop_map(Step::Get),
        10 => (key, any::<u32>()).prop_map(|(key, value)| Step::Insert(key, value)),
        1 => Just(Step::Clear),
    ]
}

/// Keys and values, the one that was asked for longest ago first.
#[derive(Default)]
struct Model(Vec<(u64, u32)>);

impl Model {
    fn get(&mut self, key: u64) -> Option<u32> {
        let at = self.0.iter().position(|&(k, _)| k == key)?;
        let entry = self.0.remove(at);
        self.0.push(entry);
        Some(entry.1)
    }

    fn insert(&mut self, key: u64, value: u32) {
        if key == NO_KEY {
            return;
        }
        if self.get(key).is_none() {
            if self.0.len() == WAYS {
                self.0.remove(0);
            }
            self.0.push((key, 0));
        }
        if let Some(newest) = self.0.last_mut() {
            newest.1 = value;
        }
    }
}

proptest! {
    #[test]
    fn ways_forget_what_a_list_forgets(steps in prop::collection::vec(step(), 0..200)) {
        let mut ways: Ways<u32, WAYS> = Ways::default();
        let mut model = Model::default();
        for step in steps {
            match step {
                Step::Get(key) => {
                    prop_assert_eq!(ways.get(key).copied(), model.get(key));
                }
                Step::Insert(key, value) => {
                    let known = model.0.iter().find(|&&(k, _)| k == key).map(|&(_, v)| v);
                    let slot = ways.get_or_insert(key);
                    // A key that was forgotten starts anew, whatever stood in its place.
                    let expected = (key != NO_KEY).then_some(known.unwrap_or_default());
                    prop_assert_eq!(slot.as_deref().copied(), expected);
                    if let Some(slot) = slot {
                        *slot = value;
                    }
                    model.insert(key, value);
                }
                Step::Clear => {
                    ways.clear();
                    model = Model::default();
                }
            }
        }
    }
}
