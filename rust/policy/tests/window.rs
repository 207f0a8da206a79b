// SPDX-License-Identifier: GPL-2.0
//! `policy::window` and `policy::ahead` against guests that touch memory in various orders.

use policy::{
    ahead::{Ahead, MOST},
    pause,
    window::{self, Window, MAX, MIN},
};
use proptest::prelude::*;
use std::collections::BTreeSet;

/// Pages that are to be mapped after the one of a fault.
fn fault(ahead: &mut Ahead, page: u64) -> u16 {
    if ahead.follows(page) {
        ahead.count(page, MOST)
    } else {
        0
    }
}

/// A guest whose every first touch of a page that is not there is a fault. Stock KVM brings 8 pages.
struct Guest {
    window: Window,
    /// Pages that its hypervisor maps.
    allows: fn(u64) -> bool,
    mapped: BTreeSet<u64>,
    touched: BTreeSet<u64>,
    faults: usize,
    /// Fills beyond what stock does.
    looks: usize,
}

impl Default for Guest {
    fn default() -> Self {
        Self {
            window: Window::default(),
            allows: |_| true,
            mapped: BTreeSet::new(),
            touched: BTreeSet::new(),
            faults: 0,
            looks: 0,
        }
    }
}

impl Guest {
    fn touch(&mut self, page: u64) {
        self.touched.insert(page);
        if self.mapped.contains(&page) {
            return;
        }
        self.faults += 1;
        let (block, due) = self.window.fault(page, MAX);
        assert!(block.first <= page && page < block.first + u64::from(block.count));
        assert_eq!(
            block.first / 512,
            (block.first + u64::from(block.count) - 1) / 512
        );
        assert!((1 << MIN..=1 << MAX).contains(&block.count));
        self.mapped.extend((page & !7)..(page & !7) + 8);
        if block.count > 1 << MIN {
            self.looks += 1;
            let all = block.first..block.first + u64::from(block.count);
            let empty = all.filter(|page| !self.mapped.contains(page));
            let (new, wanting): (Vec<_>, Vec<_>) = empty.partition(|page| (self.allows)(*page));
            self.window.filled(new.len(), wanting.len());
            self.mapped.extend(new);
        }
        if due.count != 0 {
            let range = due.first..due.first + u64::from(due.count);
            let used = range.clone().filter(|p| self.touched.contains(p)).count();
            self.window.judge(used as u16, due.count);
        }
    }
}

#[test]
fn in_order_whole_tables_are_filled() {
    let mut guest = Guest::default();
    (0..2048).for_each(|page| guest.touch(page));
    // 4 per cent of the 256 faults that stock has.
    assert!(guest.faults <= 10, "{}", guest.faults);
}

#[test]
fn downwards_and_in_strides_too() {
    for order in [
        (0..2048u64).rev().collect::<Vec<_>>(),
        (0..16).flat_map(|n| (n..2048).step_by(16)).collect(),
    ] {
        let mut guest = Guest::default();
        order.into_iter().for_each(|page| guest.touch(page));
        assert!(guest.faults <= 16, "{}", guest.faults);
    }
}

/// One page in each of many tables: all but the page itself is waste.
fn scatter(guest: &mut Guest, count: u64) {
    (0..count).for_each(|n| guest.touch((1 << 30) + (n * 7919 % 100_000) * 512 + n % 512));
}

fn beyond_stock(guest: &Guest) -> usize {
    guest.mapped.len() - guest.faults * 8
}

#[test]
fn scattered_touches_cost_nothing() {
    let mut guest = Guest::default();
    scatter(&mut guest, 1000);
    assert_eq!(beyond_stock(&guest), 0);
}

#[test]
fn a_large_page_is_filled_at_once() {
    let mut guest = Guest {
        window: Window::whole(),
        ..Guest::default()
    };
    // An odd stride: each page once, and none beside the one before.
    (0..4096u64).for_each(|n| guest.touch(n * 1037 % 4096));
    assert_eq!(guest.faults, 4096 / 512);
}

#[test]
fn of_large_pages_that_are_hardly_used_less_is_filled() {
    let mut guest = Guest {
        window: Window::whole(),
        ..Guest::default()
    };
    // One page of each table.
    (0..200).for_each(|table| guest.touch(table * 512 + table * 37 % 512));
    assert_eq!(guest.window.size(), 1 << MIN);
    assert!(guest.mapped.len() < 512 * 17, "{}", guest.mapped.len());
}

#[test]
fn two_streams_at_once() {
    let mut guest = Guest::default();
    for page in 0..2048 {
        guest.touch(page);
        guest.touch((1 << 20) + page);
    }
    assert!(guest.faults <= 20, "{}", guest.faults);
}

#[test]
fn a_habit_that_ends_is_forgotten() {
    let mut guest = Guest::default();
    (0..4096).for_each(|page| guest.touch(page));
    let before = beyond_stock(&guest);
    scatter(&mut guest, 1000);
    let waste = beyond_stock(&guest) - before;
    assert!(waste <= 256 + 128 + 64 + 32 + 16 + 8, "{waste}");
}

#[test]
fn with_other_tables_the_window_stays() {
    let mut guest = Guest::default();
    (0..2048).for_each(|page| guest.touch(page));
    for _ in 0..3 {
        guest.mapped.clear();
        guest.touched.clear();
        guest.faults = 0;
        guest.window.other_tables();
        (0..2048).for_each(|page| guest.touch(page));
        assert_eq!(guest.faults, 4);
    }
}

#[test]
fn where_nothing_is_to_be_had_it_hardly_looks() {
    // As under a hypervisor that maps eight pages at each fault.
    let mut guest = Guest {
        allows: |_| false,
        ..Guest::default()
    };
    (0..8 * 1024).for_each(|page| guest.touch(page));
    assert_eq!(guest.faults, 1024);
    let most = 1024 / usize::from(window::LONGEST) + 8;
    assert!(guest.looks <= most, "{}", guest.looks);
    // And finds out soon that there is something.
    guest.allows = |_| true;
    (8 * 1024..16 * 1024).for_each(|page| guest.touch(page));
    let most = 1024 + usize::from(window::LONGEST) + 24;
    assert!(guest.faults <= most, "{}", guest.faults);
}

proptest! {
    /// Whatever the guest does, no more faults than stock's and every block has its page.
    #[test]
    fn never_more_faults_than_stock(pages in prop::collection::vec(0u64..4096, 1..2000)) {
        let mut guest = Guest::default();
        let (mut stock, mut faults) = (BTreeSet::new(), 0);
        for page in pages {
            guest.touch(page);
            if stock.insert(page & !7) {
                faults += 1;
            }
        }
        prop_assert!(guest.faults <= faults);
    }

    /// What is mapped ahead lies right after the fault, in its table, and only after faults in order.
    #[test]
    fn ahead_stays_in_the_table(start in 0u64..1 << 40, steps in prop::collection::vec(0u64..3, 1..300)) {
        let mut ahead = Ahead::new();
        let mut page = start;
        let mut end = None;
        for step in steps {
            let count = u64::from(fault(&mut ahead, page));
            prop_assert_eq!(page / 512, (page + count) / 512);
            prop_assert!(count == 0 || end == Some(page));
            prop_assert!(count < 128);
            end = Some(page + count + 1);
            page += count + 1 + if step == 2 { 5 } else { 0 };
        }
    }

    /// A guest that never goes on where it was gets nothing.
    #[test]
    fn ahead_of_a_scattered_guest_is_nothing(pages in prop::collection::vec(0u64..1 << 20, 1..300)) {
        let mut ahead = Ahead::new();
        for page in pages {
            // Odd pages only: no page follows another.
            prop_assert_eq!(fault(&mut ahead, page | 1), 0);
        }
    }
}

#[test]
fn ahead_goes_on_after_what_was_mapped() {
    let mut ahead = Ahead::new();
    assert_eq!(fault(&mut ahead, 0), 0);
    assert_eq!(fault(&mut ahead, 1), 1);
    assert_eq!(fault(&mut ahead, 3), 3);
    assert_eq!(fault(&mut ahead, 7), 7);
    // Only two of the seven were there.
    ahead.stopped(7, 2);
    assert_eq!(fault(&mut ahead, 10), 15);
}

#[test]
fn ahead_looks_less_often_where_nothing_is_there() {
    let mut ahead = Ahead::new();
    let mut looks = 0;
    for page in 0..1000 {
        if fault(&mut ahead, page) > 0 {
            looks += 1;
            ahead.missed();
            ahead.stopped(page, 0);
        }
    }
    assert!(looks <= 1000 / u32::from(pause::LONGEST) + 5, "{looks}");
    // And comes back within as many faults.
    let back = (1000..).find(|&page| fault(&mut ahead, page) > 0).unwrap();
    assert!(back <= 1000 + u64::from(pause::LONGEST));
    ahead.stopped(back, 1);
    assert_eq!(fault(&mut ahead, back + 2), 3);
}
