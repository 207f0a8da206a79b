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
    pub(in crate::path) flags: u8,
}

impl Entry {
    /// A flag: the stock code does not shadow the field.
    pub(in crate::path) const LEARNED: u8 = 1;
    /// A flag: and vmcs12 is marked dirty if L1 has changed it.
    pub(in crate::path) const MATTERS: u8 = 2;

    pub(in crate::path) const fn is_learned(&self) -> bool {
        self.flags & Self::LEARNED != 0
    }
}

/// What a shadow VMCS does with a field.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::path) enum Use {
    /// Stock KVM shadows reads of it, and writes go on to exit.
    StockRead,
    /// Stock KVM shadows it.
    Stock,
    /// It is shadowed because its accesses were seen.
    Learned,
}

/// Which fields of a list are meant.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::path) enum Part {
    /// All.
    All,
    /// Those that L1 may have changed.
    Writable,
    /// Those that may have changed while L2 ran, [`Field::returns_from_l2`].
    Returned,
    /// All others.
    Kept,
}

/// Lists of fields to copy, one for each width, so that the copies have nothing to decide.
///
/// # Invariants
///
/// In each, fields that do not return from L2 are before those that do, and among these the ones that L1 may write before those that
/// it may not: `kept[i] <= writable[i] <= lens[i] <= N`.
pub(in crate::path) struct List<const N: usize> {
    entries: [[Entry; N]; 3],
    lens: [usize; 3],
    kept: [usize; 3],
    writable: [usize; 3],
}

impl<const N: usize> List<N> {
    pub(in crate::path) const EMPTY: Self = Self {
        entries: [[Entry {
            encoding: 0,
            offset: 0,
            number: 0,
            flags: 0,
        }; N]; 3],
        lens: [0; 3],
        kept: [0; 3],
        writable: [0; 3],
    };

    pub(in crate::path) fn clear(&mut self) {
        self.lens = [0; 3];
        self.kept = [0; 3];
        self.writable = [0; 3];
    }

    /// Takes a field in; `false` if there is no room for it.
    pub(in crate::path) fn push(&mut self, number: Number, field: &Field, how: Use) -> bool {
        let class = match field.width() {
            2 => 0,
            4 => 1,
            _ => 2,
        };
        let (Some(entries), Some(len), Some(kept), Some(writable)) = (
            self.entries.get_mut(class),
            self.lens.get_mut(class),
            self.kept.get_mut(class),
            self.writable.get_mut(class),
        ) else {
            return false;
        };
        let Some(slot) = entries.get_mut(*len) else {
            return false;
        };
        let flags = match how {
            Use::Learned if field.class.matters_to_vmcs02() => Entry::LEARNED | Entry::MATTERS,
            Use::Learned => Entry::LEARNED,
            Use::Stock | Use::StockRead => 0,
        };
        *slot = Entry {
            encoding: field.encoding,
            offset: field.offset,
            number,
            flags,
        };
        // The first of each later part makes room by going to its end.
        let returns = field.returns_from_l2();
        if !returns || how != Use::StockRead {
            entries.swap(*writable, *len);
            if !returns {
                entries.swap(*kept, *writable);
                *kept += 1;
            }
            *writable += 1;
        }
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
    pub(in crate::path) fn of<const CLASS: usize>(&self, part: Part) -> &[Entry] {
        let (len, kept) = (self.lens[CLASS], self.kept[CLASS]);
        let range = match part {
            Part::All => 0..len,
            Part::Writable => 0..self.writable[CLASS],
            Part::Returned => kept..len,
            Part::Kept => 0..kept,
        };
        self.entries[CLASS].get(range).unwrap_or_default()
    }
}

/// Calls a copying function for a part of a list, one width after the other. Four at a time, for most of what one field takes would be
/// the loop otherwise.
macro_rules! for_each_width {
    (@class $class:literal, $width:ty, $list:expr, $part:expr, $entry:ident, $ty:ident, $body:expr) => {{
        type $ty = $width;
        let fours = $list.of::<$class>($part).chunks_exact(4);
        let rest = fours.remainder();
        for four in fours {
            let [a, b, c, d] = four else { continue };
            {
                let $entry = a;
                $body
            }
            {
                let $entry = b;
                $body
            }
            {
                let $entry = c;
                $body
            }
            {
                let $entry = d;
                $body
            }
        }
        for $entry in rest {
            $body
        }
    }};
    ($list:expr, $part:expr, |$entry:ident: $ty:ident| $body:expr) => {
        for_each_width!(@class 0, u16, $list, $part, $entry, $ty, $body);
        for_each_width!(@class 1, u32, $list, $part, $entry, $ty, $body);
        for_each_width!(@class 2, u64, $list, $part, $entry, $ty, $body);
    };
}

pub(in crate::path) use for_each_width;
