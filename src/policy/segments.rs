// SPDX-License-Identifier: GPL-2.0
//! What KVM's `__vmx_guest_state_valid` looks at in the segment registers.

/// The segment registers in KVM's numbering (`VCPU_SREG_*`), which is how `segment_cache` is
/// indexed: ES, CS, SS, DS, FS, GS, TR, LDTR.
pub const COUNT: usize = 8;

/// In protected mode the check is a function of nothing but selector and access rights of the
/// eight segments: this is its whole input, one word for each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Inputs(pub [u64; COUNT]);

/// One word out of a selector and its access rights.
#[inline(always)]
pub const fn word(selector: u16, access_rights: u32) -> u64 {
    ((selector as u64) << 32) | access_rights as u64
}

impl Inputs {
    /// Whether two inputs are the same; written out so that no loop remains.
    #[inline(always)]
    pub fn same(&self, other: &Inputs) -> bool {
        let [a0, a1, a2, a3, a4, a5, a6, a7] = self.0;
        let [b0, b1, b2, b3, b4, b5, b6, b7] = other.0;
        ((a0 ^ b0) | (a1 ^ b1) | (a2 ^ b2) | (a3 ^ b3)) == 0
            && ((a4 ^ b4) | (a5 ^ b5) | (a6 ^ b6) | (a7 ^ b7)) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_counts() {
        let base = Inputs(core::array::from_fn(|i| word(i as u16 * 8, 0xc093)));
        assert!(base.same(&base.clone()));
        for i in 0..COUNT {
            for bit in 0..48 {
                let mut other = base;
                other.0[i] ^= 1 << bit;
                assert!(!base.same(&other), "segment {i} bit {bit}");
            }
        }
    }
}
