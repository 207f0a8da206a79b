// SPDX-License-Identifier: GPL-2.0
//! A page and its copy, against a guest that writes either of them and a KVM that always copies all.

use policy::page_copy::PageCopy;
use proptest::prelude::*;

const LEN: usize = 64;
/// The guest may change what is before it without saying where.
const FIELDS: usize = 24;

/// What may happen to a page, to its copy, or to what is known of them.
#[derive(Clone, Debug)]
enum Event {
    /// The guest below is entered with one of two pages.
    Enter(usize),
    /// It changes its copy, and somebody saw it.
    Change(usize, u8, u8),
    /// It exits.
    Exit,
    /// The same, with the page written ahead of the exit.
    ExitAhead,
    /// An entry is tried, for which the copy is made ahead, and then made, or not after all.
    Ahead(usize, bool),
    /// It stops without an exit that would write the copy: the processor refuses to go on with it.
    Drop,
    /// It goes on without an entry that would make the copy, after RSM.
    Resume(usize),
    /// The guest changes a page in a way that has to be seen.
    Page(usize, usize, u8),
    /// It changes the fields of a page, and something tells that it may have.
    Fields(usize, usize, u8),
    /// The VMM may have changed a page: the key is another.
    Remap(usize, usize, u8),
    /// Stock code made the copy or wrote the page, unknown to us.
    Stock(usize, bool),
}

fn event() -> impl Strategy<Value = Event> {
    let (page, at) = (0..2usize, 0..LEN - 8);
    prop_oneof![
        6 => page.clone().prop_map(Event::Enter),
        6 => (at.clone(), 1..=8u8, any::<u8>()).prop_map(|(at, len, v)| Event::Change(at, len, v)),
        4 => Just(Event::Exit),
        4 => Just(Event::ExitAhead),
        4 => (page.clone(), any::<bool>()).prop_map(|(p, made)| Event::Ahead(p, made)),
        1 => Just(Event::Drop),
        1 => page.clone().prop_map(Event::Resume),
        1 => (page.clone(), at.clone(), any::<u8>()).prop_map(|(p, at, v)| Event::Page(p, at, v)),
        2 => (page.clone(), 0..FIELDS, any::<u8>()).prop_map(|(p, at, v)| Event::Fields(p, at, v)),
        1 => (page.clone(), at, any::<u8>()).prop_map(|(p, at, v)| Event::Remap(p, at, v)),
        1 => (page, any::<bool>()).prop_map(|(p, out)| Event::Stock(p, out)),
    ]
}

/// A machine: two pages, the copy, and which page the guest below runs with.
#[derive(Clone, PartialEq, Debug)]
struct Machine {
    pages: [[u8; LEN]; 2],
    copy: [u8; LEN],
    inside: Option<usize>,
}

impl Machine {
    const NEW: Machine = Machine {
        pages: [[1; LEN], [2; LEN]],
        copy: [0; LEN],
        inside: None,
    };
}

proptest! {
    #[test]
    fn pages_and_copy_are_always_what_whole_copies_make(events in prop::collection::vec(event(), 0..200)) {
        let (mut stock, mut ours) = (Machine::NEW, Machine::NEW);
        let mut known = PageCopy::new();
        let mut generation = 0;
        // KVM's copy may be newer than stock's, and nobody looks at it: who tries to enter a guest below did not leave one half-way.
        let mut tried = false;
        for event in events {
            match event {
                Event::Ahead(page, made) if stock.inside.is_none() => {
                    let key = (page, generation);
                    if let Some(range) = known.to_read(key) {
                        ours.copy[range.clone()].copy_from_slice(&ours.pages[page][range]);
                        known.renewed();
                    } else {
                        ours.copy = ours.pages[page];
                        known.exit(key);
                    }
                    prop_assert_eq!(known.to_read(key), Some(0..0));
                    tried = !made;
                    if !made {
                        // What the guest does to a page that it did not enter with need not be announced.
                        known.forget();
                    } else {
                        known.enter();
                        stock.copy = stock.pages[page];
                        stock.inside = Some(page);
                        ours.inside = Some(page);
                    }
                }
                Event::ExitAhead => if let Some(page) = stock.inside.take() {
                    stock.pages[page] = stock.copy;
                    ours.inside = None;
                    let key = (page, generation);
                    if let Some(range) = known.to_write(key) {
                        ours.pages[page][range.clone()].copy_from_slice(&ours.copy[range]);
                        known.written();
                        prop_assert!(known.to_write(key).is_some_and(|left| left.is_empty()));
                    } else {
                        ours.pages[page] = ours.copy;
                    }
                    known.exit(key);
                },
                Event::Enter(page) if stock.inside.is_none() => {
                    tried = false;
                    stock.copy = stock.pages[page];
                    stock.inside = Some(page);
                    let key = (page, generation);
                    if let Some(range) = known.to_read(key) {
                        ours.copy[range.clone()].copy_from_slice(&ours.pages[page][range]);
                        known.enter();
                    } else {
                        ours.copy = ours.pages[page];
                        known.enter_anew(key);
                    }
                    ours.inside = Some(page);
                }
                Event::Change(at, len, value) if stock.inside.is_some() => {
                    known.change(at as u16, u16::from(len));
                    for machine in [&mut stock, &mut ours] {
                        machine.copy[at..at + usize::from(len)].fill(value);
                    }
                }
                Event::Exit => if let Some(page) = stock.inside.take() {
                    stock.pages[page] = stock.copy;
                    ours.inside = None;
                    let key = (page, generation);
                    let range = known.to_write(key).unwrap_or(0..LEN);
                    ours.pages[page][range.clone()].copy_from_slice(&ours.copy[range]);
                    known.exit(key);
                },
                Event::Drop => {
                    stock.inside = None;
                    ours.inside = None;
                }
                Event::Resume(page) if stock.inside.is_none() && !tried => {
                    stock.inside = Some(page);
                    ours.inside = Some(page);
                }
                Event::Page(page, at, value) => {
                    known.forget();
                    for machine in [&mut stock, &mut ours] {
                        machine.pages[page][at] = value;
                    }
                }
                Event::Fields(page, at, value) => {
                    known.suspect(FIELDS as u16);
                    for machine in [&mut stock, &mut ours] {
                        machine.pages[page][at] = value;
                    }
                }
                Event::Remap(page, at, value) => {
                    generation += 1;
                    for machine in [&mut stock, &mut ours] {
                        machine.pages[page][at] = value;
                    }
                }
                Event::Stock(page, out) if !(tried && out) => {
                    known.forget();
                    tried = false;
                    for machine in [&mut stock, &mut ours] {
                        if out {
                            machine.pages[page] = machine.copy;
                        } else {
                            machine.copy = machine.pages[page];
                        }
                    }
                }
                _ => {}
            }
            if tried {
                prop_assert_eq!((&stock.pages, stock.inside), (&ours.pages, ours.inside));
            } else {
                prop_assert_eq!(&stock, &ours);
            }
        }
    }

    #[test]
    fn what_did_not_change_is_neither_read_nor_written(
        changes in prop::collection::vec((0..4000u16, 1..=8u16), 0..4),
    ) {
        let mut known = PageCopy::new();
        known.enter_anew(7);
        for &(at, len) in &changes {
            known.change(at, len);
        }
        let range = known.to_write(7);
        let first = changes.iter().map(|&(at, _)| at).min();
        let end = changes.iter().map(|&(at, len)| at + len).max();
        match first.zip(end) {
            None => prop_assert!(range.is_some_and(|range| range.is_empty())),
            Some((first, end)) => prop_assert_eq!(range, Some(usize::from(first)..usize::from(end))),
        }
        known.exit(7);
        prop_assert_eq!(known.to_read(7), Some(0..0));
        prop_assert_eq!(known.to_read(8), None);
        known.suspect(16);
        prop_assert_eq!(known.to_read(7), Some(0..16));
        known.enter();
        prop_assert_eq!(known.to_read(7), Some(0..0));
        known.exit(7);
        // Never written back without an entry.
        prop_assert_eq!(known.to_write(7), None);
    }
}
