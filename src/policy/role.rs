// SPDX-License-Identifier: GPL-2.0
//! What KVM's `kvm_init_mmu()` looks at, as one word: the paging mode of the guest, which of the two
//! guests it is, and whether L1's EPT is in between.

use super::registers::{
    CR0_PG, CR0_WP, CR4_LA57, CR4_PAE, CR4_PKE, CR4_PSE, CR4_SMAP, CR4_SMEP, EFER_LMA, EFER_NX,
    HF_GUEST, HF_SMM,
};

/// Ours: L1's EPT translates what the guest's paging yields. No other bit of the word is here.
const NESTED: u64 = 1 << 2;

/// `KVM_MMU_CR0_ROLE_BITS`.
pub const CR0_BITS: u64 = CR0_PG | CR0_WP;
/// `KVM_MMU_CR4_ROLE_BITS`.
pub const CR4_BITS: u64 = CR4_PSE | CR4_PAE | CR4_LA57 | CR4_SMEP | CR4_SMAP | CR4_PKE;
/// What KVM's role takes from EFER: it ignores LME, which follows from LMA and PG.
pub const EFER_BITS: u64 = EFER_NX | EFER_LMA;

/// How many places [`Key::place`] tells apart.
pub const PLACES: usize = 6;

/// Everything that the result depends on and that the guest can change. The registers' bits happen not to meet,
/// so they stand where they are in the registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key(u64);

impl Key {
    /// `None` for what is not remembered: anything but four-level paging outside SMM. Without paging, and after
    /// five levels, the result keeps parts of what was there before.
    #[inline(always)]
    pub const fn new(cr0: u64, cr4: u64, efer: u64, hflags: u64, nested: bool) -> Option<Key> {
        const MUST: u64 = CR0_PG | CR4_PAE | EFER_LMA;
        let word = (cr0 & CR0_BITS)
            | (cr4 & CR4_BITS)
            | (efer & EFER_BITS)
            | (hflags & (HF_GUEST | HF_SMM))
            | if nested { NESTED } else { 0 };
        if word & (MUST | CR4_LA57 | HF_SMM) == MUST {
            Some(Key(word))
        } else {
            None
        }
    }

    /// Where the result for this key is kept: L1, L2 without EPT, L2 with EPT, each with and without protection of a supervisor from user
    /// pages, for an L1 that goes back and forth between a kernel and something smaller. `nested` is never set without L2.
    #[inline(always)]
    pub const fn place(self) -> usize {
        let kind = (self.0 & HF_GUEST) + ((self.0 & NESTED) >> 2);
        let protected = self.0 & (CR4_SMEP | CR4_SMAP | CR4_PKE) != 0;
        let at = 2 * kind + protected as u64;
        // In range whatever the bits say.
        if at < PLACES as u64 {
            at as usize
        } else {
            0
        }
    }

    /// Whether L1's EPT is in between.
    #[inline(always)]
    pub const fn is_nested(self) -> bool {
        self.0 & NESTED != 0
    }
}

// No two inputs share a bit.
const _: () = {
    let parts = [CR0_BITS, CR4_BITS, EFER_BITS, HF_GUEST | HF_SMM, NESTED];
    let mut all = 0;
    let mut i = 0;
    while i < parts.len() {
        assert!(all & parts[i] == 0);
        all |= parts[i];
        i += 1;
    }
};
