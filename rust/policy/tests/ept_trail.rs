// SPDX-License-Identifier: GPL-2.0
//! `policy::ept_trail` against a walk that remembers nothing, while somebody edits the tables.

use policy::ept_trail::{Start, Trail};
use proptest::prelude::*;
use std::{cell::RefCell, collections::BTreeMap};

/// Tables are at frames 1 to 8.
const FRAMES: u64 = 8;
/// Memory slots are in one of so many states. In each the VMM has everything elsewhere, with other contents, and another frame is
/// not in memory.
const STATES: u64 = 3;
const APART: u64 = 1 << 32;
/// Address bits of which the guest's processor does not have one, by the rules in force.
const NO_SUCH_BIT: [u64; 2] = [1 << 46, 1 << 45];

/// A pointer to the table at frame 1, for so many levels.
fn eptp(levels: u64) -> u64 {
    (1 << 12) | ((levels - 1) << 3) | 6
}

struct Memory(RefCell<BTreeMap<u64, u64>>);

impl Memory {
    fn place(state: u64, gpa: u64) -> Option<u64> {
        assert_eq!(gpa & 0xfff, 0, "a table begins with a page");
        let state = state % STATES;
        (gpa >> 12 != FRAMES - state).then_some((state + 1) * APART + gpa)
    }

    fn read(&self, place: u64) -> Option<u64> {
        assert_eq!(place % 8, 0);
        Some(*self.0.borrow().get(&place).unwrap_or(&0))
    }
}

fn is_reserved(rules: u64, entry: u64, level: u32) -> bool {
    assert!((2..=5).contains(&level));
    // Write without read, and bits 6:3 of an entry for a table.
    entry & NO_SUCH_BIT[rules as usize % 2] != 0 || entry & 3 == 2 || entry & 0x78 != 0
}

/// SDM volume 3, 30.3.2, spelt out once more.
fn walk(memory: &Memory, start: &Start, gpa: u64) -> Option<u64> {
    let eptp = start.eptp;
    let mut level = match (eptp >> 3) & 7 {
        3 => 4,
        4 => 5,
        _ => return None,
    };
    let mut table = eptp & 0x000f_ffff_ffff_f000;
    loop {
        let index = (gpa >> (12 + 9 * (level - 1))) & 511;
        let entry = memory.read(Memory::place(start.memory, table)? + index * 8)?;
        if level == 1 || entry & 0x407 == 0 {
            return Some(entry);
        }
        if entry & 7 == 0 || entry & (1 << 7) != 0 || is_reserved(start.rules[1], entry, level) {
            return None;
        }
        table = entry & 0x000f_ffff_ffff_f000;
        level -= 1;
    }
}

/// An entry: most lead to one of the tables, some have a bit that ends the walk.
fn entry() -> impl Strategy<Value = u64> {
    let odd = prop_oneof![
        8 => Just(0u64),
        1 => Just(1 << 7),
        1 => Just(NO_SUCH_BIT[0]),
        1 => Just(NO_SUCH_BIT[1]),
        1 => Just(1 << 10),
        1 => Just(6 << 3),
    ];
    let rights = prop_oneof![8 => Just(7u64), 2 => Just(0u64), 1 => Just(1u64), 1 => Just(2u64)];
    (1..=FRAMES, rights, odd).prop_map(|(frame, rights, odd)| (frame << 12) | rights | odd)
}

#[derive(Clone, Debug)]
enum Step {
    /// Entry `index` of a table changes, as one state of the slots has it.
    Edit(u64, u64, u64, u64),
    /// An access, with one of two EPTPs.
    Access(u64, bool),
    /// The memory slots change.
    Slots,
    /// What is reserved changes.
    Rules,
}

/// Few indices, so that ways meet.
fn step() -> impl Strategy<Value = Step> {
    let gpa = proptest::collection::vec(0u64..2, 5).prop_map(|i| {
        i.iter()
            .enumerate()
            .fold(0x123, |gpa, (n, i)| gpa | (i << (12 + 9 * n)))
    });
    prop_oneof![
        4 => (0..STATES, 1..=FRAMES, 0u64..2, entry()).prop_map(|(state, frame, index, entry)| Step::Edit(state, frame, index, entry)),
        8 => (gpa, any::<bool>()).prop_map(|(gpa, five)| Step::Access(gpa, five)),
        1 => Just(Step::Slots),
        1 => Just(Step::Rules),
    ]
}

/// Tables in a row from frame 1 on, by their first two entries, in each state of the slots. What the last ones have is the state's own.
fn tables() -> Memory {
    let mut memory = BTreeMap::new();
    for state in 0..STATES {
        for (frame, index) in (1..=5).flat_map(|frame| [(frame, 0), (frame, 1)]) {
            let place = Memory::place(state, frame << 12).unwrap() + index * 8;
            let leads_on = ((frame + 1) << 12) | 7;
            memory.insert(place, leads_on | (state << 52));
        }
    }
    Memory(RefCell::new(memory))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn finds_what_a_walk_finds(steps in proptest::collection::vec(step(), 1..80)) {
        let memory = tables();
        let mut trail = Trail::NONE;
        let mut start = Start::default();
        for step in steps {
            match step {
                Step::Edit(state, frame, index, entry) => {
                    if let Some(table) = Memory::place(state, frame << 12) {
                        memory.0.borrow_mut().insert(table + index * 8, entry);
                    }
                }
                Step::Slots => start.memory += 1,
                Step::Rules => start.rules[1] += 1,
                Step::Access(gpa, five) => {
                    start.eptp = eptp(if five { 5 } else { 4 });
                    let found = trail.entry(
                        start,
                        gpa,
                        |entry, level| is_reserved(start.rules[1], entry, level),
                        |gpa| Memory::place(start.memory, gpa),
                        |place| memory.read(place),
                    );
                    prop_assert_eq!(found, walk(&memory, &start, gpa));
                }
            }
        }
    }
}

#[test]
fn other_slots_or_rules_are_another_walk() {
    let memory = tables();
    let mut trail = Trail::NONE;
    let mut look = |start: Start| {
        trail.entry(
            start,
            0,
            |entry, level| is_reserved(start.rules[1], entry, level),
            |gpa| Memory::place(start.memory, gpa),
            |place| memory.read(place),
        )
    };
    let start = Start {
        memory: 0,
        eptp: eptp(4),
        rules: [0; 2],
    };
    let last = (5 << 12) | 7;
    assert_eq!(look(start), Some(last));
    assert_eq!(look(Start { memory: 1, ..start }), Some(last | (1 << 52)));
    assert_eq!(look(start), Some(last));
    // An upper entry that is in order by one set of rules only.
    let place = Memory::place(0, 2 << 12).unwrap();
    *memory.0.borrow_mut().get_mut(&place).unwrap() |= NO_SUCH_BIT[1];
    let moved = Memory::place(0, NO_SUCH_BIT[1] | (3 << 12)).unwrap();
    memory.0.borrow_mut().insert(moved, (4 << 12) | 7);
    assert_eq!(look(start), Some(last));
    let other = Start {
        rules: [0, 1],
        ..start
    };
    assert_eq!(look(other), None);
    assert_eq!(look(start), Some(last));
}

#[test]
fn reads_no_more_than_it_has_to() {
    let memory = tables();
    let (places, reads) = (RefCell::new(0), RefCell::new(0));
    let start = Start {
        memory: 0,
        eptp: eptp(4),
        rules: [0; 2],
    };
    let mut trail = Trail::NONE;
    let mut look = |gpa| {
        (*places.borrow_mut(), *reads.borrow_mut()) = (0, 0);
        let found = trail.entry(
            start,
            gpa,
            |entry, level| is_reserved(0, entry, level),
            |gpa| {
                *places.borrow_mut() += 1;
                Memory::place(0, gpa)
            },
            |place| {
                *reads.borrow_mut() += 1;
                memory.read(place)
            },
        );
        (found, *places.borrow(), *reads.borrow())
    };
    // The first two entries of the last table lead on; the others are absent. Remembered, nothing is looked up but what is read.
    assert_eq!(look(0), (Some((5 << 12) | 7), 4, 4));
    assert_eq!(look(0x2000), (Some(0), 0, 4));
    assert_eq!(look(0x5000), (Some(0), 0, 4));
    // Another table: the directory's second entry leads to the same.
    assert_eq!(look(1 << 21).0, Some((5 << 12) | 7));
    assert_eq!(look(0x5000), (Some(0), 4, 4));
}
