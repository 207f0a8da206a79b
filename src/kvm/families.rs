// SPDX-License-Identifier: GPL-2.0
//! Fields of the VMCS that make up one thing: a hypervisor that touches two of them touches them all.

use super::fields::{encoding::*, Number, FIELDS};
use crate::policy::set::Set;

static FAMILIES: [Set; 5] = [
    // Which EOIs exit.
    set_of([
        EOI_EXIT_BITMAP0,
        EOI_EXIT_BITMAP1,
        EOI_EXIT_BITMAP2,
        EOI_EXIT_BITMAP3,
    ]),
    set_of([GUEST_PDPTR0, GUEST_PDPTR1, GUEST_PDPTR2, GUEST_PDPTR3]),
    // An event to inject.
    set_of([
        VM_ENTRY_INTR_INFO_FIELD,
        VM_ENTRY_EXCEPTION_ERROR_CODE,
        VM_ENTRY_INSTRUCTION_LEN,
    ]),
    // A register, and what L2 reads there.
    set_of([CR0_READ_SHADOW, GUEST_CR0]),
    set_of([CR4_READ_SHADOW, GUEST_CR4]),
];

const fn set_of<const N: usize>(encodings: [u64; N]) -> Set {
    let (mut set, mut number) = (Set::EMPTY, 0);
    let mut found = 0;
    while number < FIELDS.len() {
        let mut n = 0;
        while n < N {
            if FIELDS[number].encoding as u64 == encodings[n] {
                set = set.with(number as Number);
                found += 1;
            }
            n += 1;
        }
        number += 1;
    }
    assert!(found == N, "a field that is not in the table");
    set
}

/// The fields that make up one thing with this one, itself included; none if it stands alone.
pub(crate) fn family(number: Number) -> Set {
    let mut families = FAMILIES.iter();
    let family = families.find(|family| family.has(number));
    family.copied().unwrap_or(Set::EMPTY)
}
