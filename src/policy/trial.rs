// SPDX-License-Identifier: GPL-2.0
//! What is written to a VMCS field to find out where in the region it is kept: for each field something that no other
//! field has, that is not zero anywhere, and that every processor keeps.

/// Bits of access rights that are not reserved (SDM volume 3, table 26-2). KVM drops the others on VMWRITE.
pub const ACCESS_RIGHTS: u64 = 0x1_f0ff;

/// The value for the field with this number in one of two rounds, as wide as the field (2, 4 or 8 bytes).
///
/// `access_rights`: of the field's bits only those may be set that access rights have.
pub fn pattern(number: u8, width: usize, access_rights: bool, second: bool) -> u64 {
    let number = u64::from(if second { !number } else { number });
    // Bits 12 to 15 are never clear, so nothing here is mistaken for a field that was not written.
    let low = 0xf000 | number;
    match width {
        _ if access_rights => low & ACCESS_RIGHTS,
        2 => low,
        4 => number << 24 | low,
        _ => number << 56 | 0x5a << 32 | number << 24 | low,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn no_two_fields_share_a_pattern() {
        for width in [2, 4, 8] {
            for access_rights in [false, true] {
                let mut seen = HashSet::new();
                for number in 0..=u8::MAX {
                    let value = pattern(number, width, access_rights, false);
                    assert!(seen.insert(value), "{number} has another's pattern");
                    assert!(width == 8 || value >> (width * 8) == 0);
                    assert!(!access_rights || value & !ACCESS_RIGHTS == 0);
                }
            }
        }
    }

    #[test]
    fn rounds_differ() {
        for number in 0..=u8::MAX {
            for width in [2, 4, 8] {
                for access_rights in [false, true] {
                    let of = |second| pattern(number, width, access_rights, second);
                    assert_ne!(of(false), of(true));
                    assert_ne!(of(false), 0);
                }
            }
        }
    }

    #[test]
    fn neither_half_of_a_wide_field_is_enough() {
        for number in 0..=u8::MAX {
            let value = pattern(number, 8, false, false);
            assert_ne!(value >> 32, 0);
            assert_ne!(value & u64::from(u32::MAX), value >> 32);
        }
    }
}
