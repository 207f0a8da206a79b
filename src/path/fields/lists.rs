// SPDX-License-Identifier: GPL-2.0
//! What the processor and the copies read: bitmaps of fields whose access exits, and lists of fields
//! to copy.

use super::{fields::Field, Number};

/// A page that the processor reads: one bit for each field encoding, set if the access exits.
#[repr(C, align(4096))]
pub(in crate::path) struct Bitmap([u64; WORDS]);

/// Words of a bitmap.
pub(in crate::path) const WORDS: usize = 512;

impl Bitmap {
    /// One word of 64 encodings, to change it.
    #[inline(always)]
    pub(in crate::path) fn word(&mut self, index: u16) -> Option<&mut u64> {
        self.0.get_mut(index as usize)
    }

    pub(in crate::path) fn set(&mut self, field: &Field, exits: bool) {
        let mut one = |encoding: u16| {
            if let Some(word) = self.0.get_mut(encoding as usize / 64) {
                let bit = 1 << (encoding % 64);
                *word = if exits { *word | bit } else { *word & !bit };
            }
        };
        one(field.encoding);
        if field.has_high() {
            one(field.encoding | 1);
        }
    }

    pub(in crate::path) fn has(&self, field: &Field) -> bool {
        let word = self
            .0
            .get(field.encoding as usize / 64)
            .copied()
            .unwrap_or(0);
        word >> (field.encoding % 64) & 1 != 0
    }

    pub(in crate::path) fn clear_bits(&self) -> usize {
        self.0.iter().map(|w| w.count_zeros() as usize).sum()
    }
}

/// One field to copy, with all that the copy needs in one word.
#[derive(Clone, Copy)]
pub(in crate::path) struct Entry {
    pub(in crate::path) encoding: u16,
    pub(in crate::path) offset: u16,
    pub(in crate::path) number: Number,
    /// A change marks vmcs12 dirty.
    pub(in crate::path) matters: bool,
}

/// Lists of fields to copy, one for each width, so that the copies have nothing to decide.
pub(in crate::path) struct List<const N: usize> {
    pub(in crate::path) entries: [[Entry; N]; 3],
    pub(in crate::path) lens: [usize; 3],
}

impl<const N: usize> List<N> {
    pub(in crate::path) const EMPTY: Self = Self {
        entries: [[Entry {
            encoding: 0,
            offset: 0,
            number: 0,
            matters: false,
        }; N]; 3],
        lens: [0; 3],
    };

    pub(in crate::path) fn clear(&mut self) {
        self.lens = [0; 3];
    }

    /// Appends a field; `false` if there is no room for it.
    pub(in crate::path) fn push(&mut self, number: Number, field: &Field) -> bool {
        let class = match field.width() {
            2 => 0,
            4 => 1,
            _ => 2,
        };
        let (Some(entries), Some(len)) = (self.entries.get_mut(class), self.lens.get_mut(class))
        else {
            return false;
        };
        let Some(slot) = entries.get_mut(*len) else {
            return false;
        };
        *slot = Entry {
            encoding: field.encoding,
            offset: field.offset,
            number,
            matters: field.class.matters_to_vmcs02(),
        };
        *len += 1;
        true
    }

    /// All fields, of whatever width.
    pub(in crate::path) fn all(&self) -> impl Iterator<Item = &Entry> + Clone {
        let each = self.entries.iter().zip(&self.lens);
        each.flat_map(|(entries, &len)| entries.get(..len).unwrap_or_default())
    }

    /// The fields of one width: 0 for 16 bits, 1 for 32, 2 for 64.
    #[inline(always)]
    pub(in crate::path) fn of<const CLASS: usize>(&self) -> &[Entry] {
        self.entries[CLASS]
            .get(..self.lens[CLASS])
            .unwrap_or_default()
    }
}

/// Calls a copying function for each width of a list.
macro_rules! for_each_width {
    ($list:expr, |$entry:ident: $ty:ident| $body:expr) => {{
        for $entry in $list.of::<0>() {
            type $ty = u16;
            $body
        }
        for $entry in $list.of::<1>() {
            type $ty = u32;
            $body
        }
        for $entry in $list.of::<2>() {
            type $ty = u64;
            $body
        }
    }};
}

pub(in crate::path) use for_each_width;
