// SPDX-License-Identifier: GPL-2.0
//! Sets of VMCS fields, by number.

const WORD: usize = 64;
/// Words of a set.
pub const WORDS: usize = 3;
/// Most fields that a set can tell apart.
pub const FIELDS: usize = WORDS * WORD;

/// A set of fields, by number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Set([u64; WORDS]);

impl Set {
    /// No field.
    pub const EMPTY: Set = Set([0; WORDS]);

    /// The set as bits, the lowest for field 0.
    pub fn words(&self) -> &[u64; WORDS] {
        &self.0
    }

    /// The set with these bits.
    pub const fn from_words(words: [u64; WORDS]) -> Self {
        Self(words)
    }

    /// Whether `field` is in the set.
    pub fn has(&self, field: u8) -> bool {
        self.0
            .get(field as usize / WORD)
            .is_some_and(|w| (w >> (field as usize % WORD)) & 1 != 0)
    }

    /// The set with `field` in it as well.
    pub const fn with(self, field: u8) -> Self {
        let mut words = self.0;
        if (field as usize) < FIELDS {
            words[field as usize / WORD] |= 1 << (field as usize % WORD);
        }
        Self(words)
    }

    /// Puts `field` in.
    pub fn insert(&mut self, field: u8) {
        if let Some(w) = self.0.get_mut(field as usize / WORD) {
            *w |= 1 << (field as usize % WORD);
        }
    }

    /// Takes `field` out.
    pub fn remove(&mut self, field: u8) {
        if let Some(w) = self.0.get_mut(field as usize / WORD) {
            *w &= !(1 << (field as usize % WORD));
        }
    }

    /// How many fields are in the set.
    pub fn len(&self) -> usize {
        self.0.iter().map(|w| w.count_ones() as usize).sum()
    }

    /// Whether there is no field in the set.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|&w| w == 0)
    }

    /// The fields in the set, in rising order.
    pub fn iter(&self) -> impl Iterator<Item = u8> + '_ {
        (0..FIELDS as u8).filter(|&f| self.has(f))
    }

    /// The fields that are in both sets.
    pub fn and(&self, other: &Set) -> Set {
        Set(core::array::from_fn(|w| self.word(w) & other.word(w)))
    }

    /// The fields that are in either set.
    pub fn or(&self, other: &Set) -> Set {
        Set(core::array::from_fn(|w| self.word(w) | other.word(w)))
    }

    /// The fields that are in this set and not in the other.
    pub fn without(&self, other: &Set) -> Set {
        Set(core::array::from_fn(|w| self.word(w) & !other.word(w)))
    }

    fn word(&self, at: usize) -> u64 {
        self.0.get(at).copied().unwrap_or(0)
    }

    /// The last field of the set.
    pub fn last(&self) -> Option<u8> {
        let (at, word) = self.0.iter().enumerate().rfind(|(_, &word)| word != 0)?;
        Some((at * WORD + 63 - word.leading_zeros() as usize) as u8)
    }

    /// The first field of the set after `field`, going round.
    pub fn after(&self, field: u8) -> Option<u8> {
        self.first_from(usize::from(field) + 1)
            .or_else(|| self.first_from(0))
    }

    fn first_from(&self, field: usize) -> Option<u8> {
        let mut mask = u64::MAX << (field % WORD);
        (field / WORD..WORDS).find_map(|at| {
            let word = self.word(at) & core::mem::replace(&mut mask, u64::MAX);
            (word != 0).then(|| (at * WORD + word.trailing_zeros() as usize) as u8)
        })
    }
}
