// SPDX-License-Identifier: GPL-2.0
//! `policy::reach` against the rules of SDM volume 3, 30.3, spelt out another way, and against `policy::ept`: what may be
//! filled may be there.

use policy::ept::{self, Rights};
use policy::reach::{compare, slot_allows, span, target, Place, Slot, Table, Target, Wrong};
use proptest::prelude::*;

const RIGHTS: Rights = Rights {
    read: 1,
    write: 2,
    exec: 8,
    user_exec: 4,
};
const ALL: u64 = 15;
/// A processor with 46 bits of physical address.
const RESERVED: u64 = 0x000f_c000_0000_0000;
const LARGE: u64 = 1 << 7;
const USED: u64 = 3 << 8;
const WB: u64 = 6 << 3;

fn table(level: u32) -> Table {
    Table {
        level,
        granted: ALL,
        flags: true,
        user_exec: false,
        reserved: RESERVED,
    }
}

fn place(gfn: u64, access: u64) -> Place {
    Place { gfn, access }
}

#[test]
fn ordinary_entries() {
    let entry = 0x1234_5000 | USED | 7;
    let to = place(0x12345, 11);
    assert_eq!(target(entry | WB, &table(1), &RIGHTS), Target::Page(to));
    // Bit 7 is ignored in a last-level entry.
    assert_eq!(
        target(entry | WB | LARGE, &table(1), &RIGHTS),
        Target::Page(to)
    );
    for level in 2..=5 {
        assert_eq!(target(entry, &table(level), &RIGHTS), Target::Table(to));
    }
    // A table is never dirty.
    assert_eq!(
        target(entry & !(1 << 9), &table(3), &RIGHTS),
        Target::Table(to)
    );
    let large = 0x1220_0000 | WB | USED | LARGE | 7;
    assert_eq!(
        target(large, &table(2), &RIGHTS),
        Target::Page(place(0x12200, 11))
    );
    assert_eq!(target(large, &table(3), &RIGHTS), Target::Nothing);
    assert_eq!(
        target(0x4000_0000 | WB | USED | LARGE | 7, &table(3), &RIGHTS),
        Target::Page(place(0x40000, 11))
    );
    assert_eq!(target(large, &table(4), &RIGHTS), Target::Nothing);
}

#[test]
fn flags_and_rights() {
    let entry = 0x1234_5000 | WB | 7;
    assert_eq!(target(entry, &table(1), &RIGHTS), Target::Nothing);
    let plain = Table {
        flags: false,
        ..table(1)
    };
    assert_eq!(
        target(entry, &plain, &RIGHTS),
        Target::Page(place(0x12345, 11))
    );
    assert_eq!(
        target(entry | (1 << 8), &table(1), &RIGHTS),
        Target::Page(place(0x12345, 9))
    );
    let less = Table {
        granted: 1,
        ..table(1)
    };
    assert_eq!(
        target(entry | USED, &less, &RIGHTS),
        Target::Page(place(0x12345, 1))
    );
    // Bit 10 alone is an entry with mode-based execute control only.
    let user = 0x1234_5000 | WB | USED | (1 << 10);
    assert_eq!(target(user, &table(1), &RIGHTS), Target::Nothing);
    let mode_based = Table {
        user_exec: true,
        ..table(1)
    };
    assert_eq!(
        target(user, &mode_based, &RIGHTS),
        Target::Page(place(0x12345, 4))
    );
}

#[test]
fn everything_wrong_has_its_name() {
    let may = Target::Page(place(8, 3));
    assert_eq!(compare(Target::Page(place(8, 1)), may), Ok(()));
    assert_eq!(compare(Target::Nothing, Target::Nothing), Ok(()));
    assert_eq!(
        compare(Target::Page(place(8, 1)), Target::Nothing),
        Err(Wrong::NotMapped)
    );
    assert_eq!(
        compare(Target::Page(place(9, 1)), may),
        Err(Wrong::Elsewhere)
    );
    assert_eq!(
        compare(Target::Table(place(8, 1)), may),
        Err(Wrong::Elsewhere)
    );
    assert_eq!(compare(Target::Page(place(8, 8)), may), Err(Wrong::Rights));
    let slot = |read_only, in_log| Some(Slot { read_only, in_log });
    assert_eq!(slot_allows(false, None), Err(Wrong::NoSlot));
    assert_eq!(slot_allows(true, slot(true, None)), Err(Wrong::ReadOnly));
    assert_eq!(slot_allows(false, slot(true, Some(false))), Ok(()));
    assert_eq!(
        slot_allows(true, slot(false, Some(false))),
        Err(Wrong::NotLogged)
    );
    assert_eq!(slot_allows(true, slot(false, Some(true))), Ok(()));
    let names = [
        Wrong::NotMapped,
        Wrong::Elsewhere,
        Wrong::Rights,
        Wrong::NoSlot,
        Wrong::ReadOnly,
        Wrong::NotLogged,
        Wrong::OtherPage,
    ]
    .map(Wrong::name);
    assert!((1..names.len()).all(|i| !names[..i].contains(&names[i])));
}

proptest! {
    #[test]
    fn what_may_be_filled_may_be_there(entry: u64, granted in 0u64..16, user_exec: bool) {
        let last = Table { granted, user_exec, ..table(1) };
        if let Some(page) = ept::page(entry, RESERVED, granted, &RIGHTS) {
            let filled = Target::Page(place(page.gfn, page.access));
            prop_assert_eq!(compare(filled, target(entry, &last, &RIGHTS)), Ok(()));
        }
    }

    #[test]
    fn nothing_more_than_the_entry_grants(entry: u64, level in 1u32..=5, granted in 0u64..16, flags: bool) {
        let rules = Table { level, granted, flags, ..table(level) };
        let (page, to) = match target(entry, &rules, &RIGHTS) {
            Target::Nothing => return Ok(()),
            Target::Page(to) => (true, to),
            Target::Table(to) => (false, to),
        };
        prop_assert!(entry & 7 != 0 && entry & 3 != 2);
        prop_assert!(!flags || entry & (1 << 8) != 0);
        prop_assert_eq!(to.access & !granted, 0);
        prop_assert!(to.access & 1 == 0 || entry & 1 != 0);
        prop_assert!(to.access & 2 == 0 || entry & 2 != 0);
        prop_assert!(to.access & 8 == 0 || entry & 4 != 0);
        prop_assert!(to.access & 4 == 0 || entry & (1 << 10) != 0);
        prop_assert!(!page || !flags || to.access & 2 == 0 || entry & (1 << 9) != 0);
        prop_assert_eq!(page, level == 1 || (level < 4 && entry & LARGE != 0));
        prop_assert_eq!(to.gfn % if page { span(level) } else { 1 }, 0);
        prop_assert!(to.gfn < 1 << 34);
    }

    #[test]
    fn less_is_always_allowed(gfn in 0u64..1 << 40, access in 0u64..16, fewer in 0u64..16) {
        let may = Target::Page(place(gfn, access));
        prop_assert_eq!(compare(Target::Page(place(gfn, access & fewer)), may), Ok(()));
        let more = access | fewer;
        prop_assert_eq!(compare(Target::Page(place(gfn, more)), may).is_ok(), more == access);
    }
}
