// SPDX-License-Identifier: GPL-2.0
//! `policy::ept_trail` against a walk that remembers nothing, while somebody edits the tables.

use policy::ept_trail::{Start, Trail};
use proptest::prelude::*;
use std::{cell::RefCell, collections::BTreeMap};

/// Tables are at frames 1 to 8, and the VMM has frame N at HOST + N pages.
const FRAMES: u64 = 8;
const HOST: u64 = 0x7f00_0000_0000;
/// Not in memory.
const HOLE: u64 = 7;
/// An address bit that the guest's processor does not have.
const NO_SUCH_BIT: u64 = 1 << 46;

/// A pointer to the table at frame 1, for so many levels.
fn eptp(levels: u64) -> u64 {
    (1 << 12) | ((levels - 1) << 3) | 6
}

struct Memory(RefCell<BTreeMap<u64, u64>>);

impl Memory {
    fn place(gpa: u64) -> Option<u64> {
        assert_eq!(gpa & 0xfff, 0, "a table begins with a page");
        (gpa >> 12 != HOLE).then_some(HOST + gpa)
    }

    fn read(&self, place: u64) -> Option<u64> {
        assert_eq!(place % 8, 0);
        Some(*self.0.borrow().get(&place).unwrap_or(&0))
    }
}

fn is_reserved(entry: u64, level: u32) -> bool {
    assert!((2..=5).contains(&level));
    // Write without read, and bits 6:3 of an entry for a table.
    entry & NO_SUCH_BIT != 0 || entry & 3 == 2 || entry & 0x78 != 0
}

/// SDM volume 3, 30.3.2, spelt out once more.
fn walk(memory: &Memory, eptp: u64, gpa: u64) -> Option<u64> {
    let mut level = match (eptp >> 3) & 7 {
        3 => 4,
        4 => 5,
        _ => return None,
    };
    let mut table = eptp & 0x000f_ffff_ffff_f000;
    loop {
        let index = (gpa >> (12 + 9 * (level - 1))) & 511;
        let entry = memory.read(Memory::place(table)? + index * 8)?;
        if level == 1 || entry & 0x407 == 0 {
            return Some(entry);
        }
        if entry & 7 == 0 || entry & (1 << 7) != 0 || is_reserved(entry, level) {
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
        1 => Just(NO_SUCH_BIT),
        1 => Just(1 << 10),
        1 => Just(6 << 3),
    ];
    let rights = prop_oneof![8 => Just(7u64), 2 => Just(0u64), 1 => Just(1u64), 1 => Just(2u64)];
    (1..=FRAMES, rights, odd).prop_map(|(frame, rights, odd)| (frame << 12) | rights | odd)
}

#[derive(Clone, Debug)]
enum Step {
    /// Entry `index` of a table changes.
    Edit(u64, u64, u64),
    /// An access, with one of two EPTPs.
    Access(u64, bool),
    /// The memory slots change.
    Slots,
    /// What is reserved changes (nothing here depends on it).
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
        4 => (1..=FRAMES, 0u64..2, entry()).prop_map(|(frame, index, entry)| Step::Edit(frame, index, entry)),
        8 => (gpa, any::<bool>()).prop_map(|(gpa, five)| Step::Access(gpa, five)),
        1 => Just(Step::Slots),
        1 => Just(Step::Rules),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn finds_what_a_walk_finds(steps in proptest::collection::vec(step(), 1..80)) {
        let memory = Memory(RefCell::default());
        let mut trail = Trail::NONE;
        let mut start = Start::default();
        for step in steps {
            match step {
                Step::Edit(frame, index, entry) => {
                    memory.0.borrow_mut().insert(HOST + (frame << 12) + index * 8, entry);
                }
                Step::Slots => start.memory += 1,
                Step::Rules => start.rules[1] += 1,
                Step::Access(gpa, five) => {
                    start.eptp = eptp(if five { 5 } else { 4 });
                    let found = trail.entry(start, gpa, is_reserved, Memory::place, |p| memory.read(p));
                    prop_assert_eq!(found, walk(&memory, start.eptp, gpa));
                }
            }
        }
    }
}

#[test]
fn reads_no_more_than_it_has_to() {
    let memory = Memory(RefCell::default());
    for frame in 1..=4u64 {
        memory
            .0
            .borrow_mut()
            .insert(HOST + (frame << 12), ((frame + 1) << 12) | 7);
    }
    let (places, reads) = (RefCell::new(0), RefCell::new(0));
    let start = Start {
        memory: 1,
        eptp: eptp(4),
        rules: [0; 2],
    };
    let mut trail = Trail::NONE;
    let mut look = |gpa| {
        (*places.borrow_mut(), *reads.borrow_mut()) = (0, 0);
        let found = trail.entry(
            start,
            gpa,
            is_reserved,
            |gpa| {
                *places.borrow_mut() += 1;
                Memory::place(gpa)
            },
            |place| {
                *reads.borrow_mut() += 1;
                memory.read(place)
            },
        );
        (found, *places.borrow(), *reads.borrow())
    };
    // The first entry of the last table leads on; the others are absent. Remembered, nothing is looked up but what is read.
    assert_eq!(look(0), (Some((5 << 12) | 7), 4, 4));
    assert_eq!(look(0x1000), (Some(0), 0, 4));
    assert_eq!(look(0x5000), (Some(0), 0, 4));
    // Another table.
    assert_eq!(look(1 << 21).0, Some(0));
    assert_eq!(look(0x5000), (Some(0), 4, 4));
}
