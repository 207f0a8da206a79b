// SPDX-License-Identifier: GPL-2.0
//! Which bits of a VMREAD and of a VMWRITE bitmap a set of fields has, word by word.

/// Encodings in one word.
const BITS: u16 = u64::BITS as u16;

/// One word of 64 encodings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Masks {
    /// Number of the word in the bitmap.
    pub index: u16,
    /// Bits of fields that are read.
    pub read: u64,
    /// Bits of fields that are written as well.
    pub write: u64,
}

/// The words that have a field, at most `N`.
#[derive(Debug)]
pub struct Words<const N: usize> {
    words: [Masks; N],
    len: usize,
}

impl<const N: usize> Default for Words<N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const N: usize> Words<N> {
    /// No field.
    pub const fn new() -> Self {
        Self {
            words: [Masks {
                index: 0,
                read: 0,
                write: 0,
            }; N],
            len: 0,
        }
    }

    /// Takes all fields out.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Puts a field in, with the encoding of its high half if it has one. `false` if there is no room.
    pub fn insert(&mut self, encoding: u16, has_high: bool, written: bool) -> bool {
        let index = encoding / BITS;
        let bits: u64 = if has_high { 3 } else { 1 } << (encoding % BITS);
        let known = self.iter().position(|m| m.index == index);
        let at = known.unwrap_or(self.len);
        let Some(word) = self.words.get_mut(at) else {
            return false;
        };
        if known.is_none() {
            // Whatever was here belongs to fields that are out.
            *word = Masks {
                index,
                read: 0,
                write: 0,
            };
            self.len += 1;
        }
        word.read |= bits;
        if written {
            word.write |= bits;
        }
        true
    }

    /// The words that have a field.
    #[inline]
    pub fn iter(&self) -> impl Iterator<Item = &Masks> + '_ {
        self.words.iter().take(self.len)
    }
}
