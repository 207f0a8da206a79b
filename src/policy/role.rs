// SPDX-License-Identifier: GPL-2.0
//! What KVM's `kvm_init_mmu()` looks at, as one word: the paging mode of the guest, which of the two
//! guests it is, and whether L1's EPT is in between.

/// CR0.WP: supervisor writes heed read-only pages.
const CR0_WP: u64 = 1 << 16;
/// CR0.PG: paging.
const CR0_PG: u64 = 1 << 31;
/// CR4.PSE: 4-MiB pages in 32-bit paging; KVM's role has it in every mode.
const CR4_PSE: u64 = 1 << 4;
/// CR4.PAE.
const CR4_PAE: u64 = 1 << 5;
/// CR4.LA57: five levels.
const CR4_LA57: u64 = 1 << 12;
/// CR4.SMEP.
const CR4_SMEP: u64 = 1 << 20;
/// CR4.SMAP.
const CR4_SMAP: u64 = 1 << 21;
/// CR4.PKE.
const CR4_PKE: u64 = 1 << 22;
/// IA32_EFER.LMA.
const EFER_LMA: u64 = 1 << 10;
/// IA32_EFER.NXE.
const EFER_NX: u64 = 1 << 11;
/// KVM's HF_GUEST_MASK: L2 runs.
const HF_GUEST: u64 = 1 << 0;
/// KVM's HF_SMM_MASK.
const HF_SMM: u64 = 1 << 1;
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
