// SPDX-License-Identifier: GPL-2.0
//! A walk that is remembered ends where a new one does, whatever was changed meanwhile.

use std::collections::HashMap;

use policy::operand::{Start, Trail};
use proptest::prelude::*;

/// Where guest-physical memory begins, by the number of `Start::memory`.
fn base(memory: u64) -> u64 {
    0x7f00_0000_0000 + (memory << 32)
}

#[derive(Clone, Debug)]
enum Step {
    /// An entry of a table gets a value.
    Write(u64, u64, u64),
    Walk(Start, u64),
}

/// Four tables and four pages.
fn page() -> impl Strategy<Value = u64> {
    (1u64..9).prop_map(|n| n << 12)
}

fn entry() -> impl Strategy<Value = u64> {
    let flags = prop_oneof![
        12 => Just(0x23u64),
        2 => Just(0x27),
        1 => Just(0x22),
        1 => Just(3),
        2 => Just(0xa3),
        1 => Just((1 << 63) | 0x23),
    ];
    (page(), flags).prop_map(|(page, flags)| page | flags)
}

fn start() -> impl Strategy<Value = Start> {
    let reserved = prop_oneof![6 => Just(0u64), 1 => Just(1u64 << 63), 1 => Just(0x8000)];
    (0u64..2, 1u64..3, reserved).prop_map(|(memory, cr3, reserved)| Start {
        memory,
        cr3: (cr3 << 12) | 0x18,
        reserved,
    })
}

/// Few addresses; each uses the first two entries of its tables.
fn address() -> impl Strategy<Value = u64> {
    (prop::collection::vec(0u64..2, 4), 0u64..4).prop_map(|(at, offset)| {
        let page = at.into_iter().fold(0, |page, index| (page << 9) | index);
        (page << 12) | (offset * 8)
    })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        1 => (page(), 0u64..2, entry()).prop_map(|(page, index, value)| Step::Write(page, index, value)),
        3 => (start(), address()).prop_map(|(start, address)| Step::Walk(start, address)),
    ]
}

proptest! {
    #[test]
    fn a_trail_leads_where_a_walk_does(
        tables in prop::collection::vec(entry(), 16), steps in prop::collection::vec(step(), 0..200),
        repeats in 1usize..4,
    ) {
        let mut memory: HashMap<u64, u64> = HashMap::new();
        for (number, &value) in (0u64..).zip(&tables) {
            memory.insert((((number >> 1) + 1) << 12) | ((number & 1) << 3), value);
        }
        let mut kept = Trail::NONE;
        for step in steps {
            match step {
                Step::Write(page, index, value) => {
                    memory.insert(page | (index << 3), value);
                }
                Step::Walk(start, address) => {
                    // Nothing is at the last page.
                    let place = |gpa: u64| (gpa >> 12 != 8).then(|| base(start.memory) + gpa);
                    let read = |place: u64| {
                        let gpa = place.checked_sub(base(start.memory))?;
                        memory.get(&gpa).copied()
                    };
                    let mut fresh = Trail::NONE;
                    let new = fresh.walk(start, address, place, read);
                    for _ in 0..repeats {
                        prop_assert_eq!(kept.walk(start, address, place, read), new);
                    }
                }
            }
        }
    }
}
