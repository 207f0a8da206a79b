// SPDX-License-Identifier: GPL-2.0
//! Which accesses to MSRs by L2 may pass without an exit (SDM volume 3, 26.6.9): what KVM lets L1 decide.
//!
//! As `nested_vmx_prepare_msr_bitmap()`: for a few MSRs an access passes if both L1 and KVM, which has vmcs01's bitmap
//! for it, let it; for three registers of the local APIC, and all reads of its registers, L1's word is enough where
//! the processor virtualizes them. Every other access exits, which is right for any MSR: KVM then asks L1's bitmap.

/// 64-bit words of a bitmap: reads of MSRs from 0, reads of those from 0xc0000000, and writes of either.
pub const WORDS: usize = 512;
/// Where the writes begin.
const WRITES: usize = WORDS / 2;

const READ: u8 = 1;
const WRITE: u8 = 2;

/// The MSRs for which L1's bitmap and vmcs01's decide together.
const MSRS: [(u32, u8); 14] = [
    // IA32_FS_BASE, IA32_GS_BASE, IA32_KERNEL_GS_BASE.
    (0xc000_0100, READ | WRITE),
    (0xc000_0101, READ | WRITE),
    (0xc000_0102, READ | WRITE),
    // IA32_SPEC_CTRL, IA32_PRED_CMD, IA32_FLUSH_CMD.
    (0x48, READ | WRITE),
    (0x49, WRITE),
    (0x10b, WRITE),
    // IA32_MPERF, IA32_APERF.
    (0xe7, READ),
    (0xe8, READ),
    // IA32_U_CET, IA32_S_CET, IA32_PL0_SSP to IA32_PL3_SSP.
    (0x6a0, READ | WRITE),
    (0x6a2, READ | WRITE),
    (0x6a4, READ | WRITE),
    (0x6a5, READ | WRITE),
    (0x6a6, READ | WRITE),
    (0x6a7, READ | WRITE),
];

/// A word with bits that are merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Merged {
    /// Number of the word.
    pub index: usize,
    /// Its bits that are merged; all others exit.
    pub mask: u64,
}

const NONE: Merged = Merged { index: 0, mask: 0 };

/// How many words have such bits.
pub const MERGED_WORDS: usize = 8;

/// The words with bits that are merged.
pub const MERGED: [Merged; MERGED_WORDS] = merged();

const fn merged() -> [Merged; MERGED_WORDS] {
    let mut words = [NONE; MERGED_WORDS];
    let mut n = 0;
    while n < MSRS.len() {
        let (msr, access) = MSRS[n];
        // The second half of each part is for the MSRs from 0xc0000000.
        let bit = (msr & 0x1fff) as usize + if msr >= 0xc000_0000 { 0x2000 } else { 0 };
        if access & READ != 0 {
            insert(&mut words, bit / 64, 1 << (bit % 64));
        }
        if access & WRITE != 0 {
            insert(&mut words, WRITES + bit / 64, 1 << (bit % 64));
        }
        n += 1;
    }
    words
}

const fn insert(words: &mut [Merged; MERGED_WORDS], index: usize, bit: u64) {
    let mut n = 0;
    while words[n].mask != 0 && words[n].index != index {
        // Out of room is an error at compile time.
        n += 1;
    }
    words[n].index = index;
    words[n].mask |= bit;
}

impl Merged {
    /// The word that the processor gets for L1's and vmcs01's.
    #[inline(always)]
    pub const fn word(self, l1: u64, vmcs01: u64) -> u64 {
        l1 | vmcs01 | !self.mask
    }
}

/// Words for the 256 MSRs of the x2APIC, of reads and as many of writes.
pub const X2APIC_WORDS: usize = 4;
/// The first of them for reads.
pub const X2APIC_READS: usize = 0x800 / 64;
/// The first of them for writes.
pub const X2APIC_WRITES: usize = WRITES + X2APIC_READS;

/// IA32_X2APIC_TPR, in the first word.
const TPR: u64 = 1 << 0x08;
/// IA32_X2APIC_EOI.
const EOI: u64 = 1 << 0x0b;
/// IA32_X2APIC_SELF_IPI.
const SELF_IPI: u64 = 1 << 0x3f;

/// What L1 has the processor virtualize of L2's x2APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct X2apic {
    /// APIC-register virtualization: all reads.
    pub registers: bool,
    /// Virtual-interrupt delivery: writes of EOI and SELF_IPI.
    pub delivery: bool,
}

impl X2apic {
    /// The word of reads at `n`, below [`X2APIC_WORDS`].
    #[inline(always)]
    pub const fn reads(self, n: usize, l1: u64) -> u64 {
        if self.registers {
            l1
        } else if n == 0 {
            l1 | !TPR
        } else {
            u64::MAX
        }
    }

    /// The first word of writes; the others are all ones.
    #[inline(always)]
    pub const fn first_writes(self, l1: u64) -> u64 {
        let open = if self.delivery {
            TPR | EOI | SELF_IPI
        } else {
            TPR
        };
        l1 | !open
    }
}

/// Whether every access exits that neither [`MERGED`] nor [`X2apic`] is about, so that a bitmap can be made anew by
/// writing their words.
pub fn is_closed_elsewhere(word: impl Fn(usize) -> u64) -> bool {
    (0..WORDS).all(|index| {
        let ours = MERGED
            .iter()
            .filter(|merged| merged.index == index)
            .fold(0, |mask, merged| mask | merged.mask);
        let x2apic =
            (X2APIC_READS..X2APIC_READS + X2APIC_WORDS).contains(&index) || index == X2APIC_WRITES;
        x2apic || word(index) | ours == u64::MAX
    })
}
