// SPDX-License-Identifier: GPL-2.0
//! `policy::ept` against the rules of SDM volume 3, 30.3 and of KVM's prefetching, spelt out another way.

use policy::ept::{absent, follows, page, step, Access, Page, Rights, Step};
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

#[test]
fn an_ordinary_entry() {
    let wb = 6 << 3;
    let entry = 0x1234_5000 | wb | (1 << 9) | (1 << 8) | 7;
    let full = Page {
        gfn: 0x12345,
        access: 1 | 2 | 8,
    };
    assert_eq!(page(entry, RESERVED, ALL, &RIGHTS), Some(full));
    // Clean: not writable, so that the first write is seen.
    assert_eq!(
        page(entry & !(1 << 9), RESERVED, ALL, &RIGHTS),
        Some(Page {
            access: 1 | 8,
            ..full
        })
    );
    // Never accessed: stays out, so that the first access is seen.
    assert_eq!(page(entry & !(1 << 8), RESERVED, ALL, &RIGHTS), None);
    // Upper levels grant less.
    assert_eq!(
        page(entry, RESERVED, 1, &RIGHTS),
        Some(Page { access: 1, ..full })
    );
    // A page that can only be run is left to stock.
    assert_eq!(page(entry, RESERVED, 8, &RIGHTS), None);
}

proptest! {
    #[test]
    fn never_more_than_the_entry_grants(entry: u64, granted in 0u64..16) {
        if let Some(p) = page(entry, RESERVED, granted, &RIGHTS) {
            prop_assert!(p.access & !granted == 0);
            prop_assert!(p.access & 2 == 0 || (entry & 2 != 0 && entry & (1 << 9) != 0));
            prop_assert!(p.access & 8 == 0 || entry & 4 != 0);
            prop_assert!(p.access & 4 == 0 || entry & (1 << 10) != 0);
            prop_assert!(entry & (1 << 8) != 0);
            prop_assert_eq!(p.gfn << 12, entry & 0x000f_ffff_ffff_f000);
            // Neither a misconfiguration (table 30-3's rules for memory types, 30.3.3.1's for bits 2:0) nor an
            // address that the processor does not have.
            prop_assert!(![2, 3, 7].contains(&((entry >> 3) & 7)));
            prop_assert!(entry & 7 != 2 && entry & 7 != 6);
            prop_assert!(p.gfn < 1 << 34);
        }
    }

    /// Bits that mean nothing here (ignored ones and the suppression of #VE) change nothing.
    #[test]
    fn ignored_bits_are_ignored(entry: u64, noise: u64) {
        let ignored = 0xfff0_0000_0000_0880 | (1 << 6);
        let other = (entry & !ignored) | (noise & ignored);
        prop_assert_eq!(page(entry, RESERVED, ALL, &RIGHTS), page(other, RESERVED, ALL, &RIGHTS));
    }

    /// An entry that follows gives the next page, and nothing but what `page` says.
    #[test]
    fn what_follows_needs_no_look(entry: u64, plain: bool, edge: bool, reserved: bool, granted in 0u64..16) {
        let reserved = if reserved { RESERVED } else { 0 };
        let mut entry = if plain { entry & 0x3f_ffff_f000 | 0x337 } else { entry };
        if edge {
            entry |= 0x0000_3fff_ffff_f000 | ((entry & 1) * 0x000f_c000_0000_0000);
        }
        let next = entry.wrapping_add(0x1000);
        let (first, second) = (page(entry, reserved, granted, &RIGHTS), page(next, reserved, granted, &RIGHTS));
        if let (Some(first), true) = (first, follows(entry, next, reserved)) {
            prop_assert_eq!(second, Some(Page { gfn: first.gfn + 1, ..first }));
        }
        prop_assert!(plain <= (edge || follows(entry, next, reserved)));
        prop_assert!(!follows(entry, next ^ (1 << 8), reserved) && !follows(entry, entry, reserved));
    }

    /// What is followed has all flags that a walk would set, and leads where the entry says.
    #[test]
    fn following_sets_no_flag(entry: u64, level in 1u32..=5, write: bool) {
        let accessed = entry & (1 << 8) != 0;
        let dirty = entry & (1 << 9) != 0;
        let leaf = level == 1 || level <= 3 && entry & (1 << 7) != 0;
        let may = entry & 7 != 0 && accessed && (!leaf || !write || dirty);
        let to = entry & 0x000f_ffff_ffff_f000;
        let want = if leaf { Step::Page(to) } else { Step::Table(to) };
        prop_assert_eq!(step(entry, level, write), may.then_some(want));
    }
}

#[test]
fn what_an_absent_entry_says() {
    let access = |write, fetch, walks| Access {
        write,
        fetch,
        walks,
    };
    // Table 29-7: 0 read, 1 write, 2 fetch, 7 with a linear address, 8 that of the page itself.
    assert_eq!(absent(0, access(false, false, false)), Some(0x181));
    assert_eq!(absent(0, access(true, false, false)), Some(0x182));
    assert_eq!(absent(0, access(false, true, false)), Some(0x184));
    // A fetch for a paging structure is none, as nobody makes it; a read goes with it.
    assert_eq!(absent(0, access(false, true, true)), Some(0x85));
    // Present with mode-based execute control, and left to stock without.
    assert_eq!(absent(1 << 10, access(false, false, false)), None);
    // Paging structures are read, or read and written.
    assert_eq!(absent(0, access(false, false, true)), Some(0x81));
    assert_eq!(absent(0, access(true, false, true)), Some(0x83));
    // What Linux leaves where it suppresses #VE.
    assert_eq!(absent(1 << 63, access(false, false, false)), Some(0x181));
}

proptest! {
    #[test]
    fn an_entry_with_a_right_is_not_absent(entry: u64, write: bool, fetch: bool, walks: bool) {
        let is_present = entry & 7 != 0 || entry & (1 << 10) != 0;
        let qualification = absent(entry, Access { write, fetch, walks });
        prop_assert_eq!(qualification.is_none(), is_present);
        // Bits 6:3: no rights. Nothing that is the processor's alone. A write comes before a fetch.
        let by = if write { 2 } else if fetch { 4 } else { 1 };
        prop_assert!(qualification.is_none_or(|q| q & !0x187 == 0 && q & 7 == by | u64::from(walks)));
    }
}
