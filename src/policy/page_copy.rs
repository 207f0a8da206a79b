// SPDX-License-Identifier: GPL-2.0
//! How a page of a guest and a copy of it, which belongs to the guest below while that runs, are kept the same
//! without copying all of it each time.
//!
//! The copy is made when the guest below is entered and written back when it exits. Known is when the page held all
//! that the copy held (a key: which page, and whatever else must be as it was for the page to be the same memory), and
//! the range of bytes in which the copy has changed since. Whoever may change the page in any other way says
//! `forget`, and whoever may change the copy says so as well: nothing is ever searched.

use core::ops::Range;

/// What is known of one copy; `K` is the key.
#[derive(Debug)]
pub struct PageCopy<K> {
    /// With this key the page held what the copy held.
    same: Option<K>,
    /// The copy may have changed since from here ...
    first: u16,
    /// ... up to here; not after `first` if it has not.
    end: u16,
    /// The page may have changed since up to here.
    stale: u16,
    /// The guest below was entered with this copy, and has not exited since.
    entered: bool,
}

impl<K: Copy + PartialEq> Default for PageCopy<K> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K: Copy + PartialEq> PageCopy<K> {
    /// Nothing is known.
    pub const fn new() -> Self {
        Self {
            same: None,
            first: u16::MAX,
            end: 0,
            stale: 0,
            entered: false,
        }
    }

    /// Page and copy may differ anywhere.
    #[inline]
    pub fn forget(&mut self) {
        *self = Self::new();
    }

    /// The first `len` bytes of the page may have changed.
    #[inline]
    pub fn suspect(&mut self, len: u16) {
        self.stale = self.stale.max(len);
        self.entered = false;
    }

    /// Whether anything is known.
    #[inline]
    pub fn is_known(&self) -> bool {
        self.same.is_some()
    }

    /// `len` bytes of the copy at `offset` change, or may.
    #[inline]
    pub fn change(&mut self, offset: u16, len: u16) {
        self.first = self.first.min(offset);
        self.end = self.end.max(offset.saturating_add(len));
    }

    /// The guest below is entered: the bytes that have to be read for the copy to hold what the page holds, maybe none.
    /// `None` for all of them.
    #[inline]
    pub fn to_read(&self, key: K) -> Option<Range<usize>> {
        let known = self.same == Some(key) && self.first >= self.end;
        known.then(|| 0..usize::from(self.stale))
    }

    /// The bytes that `to_read` gave were made anew ahead of the entry.
    #[inline]
    pub fn renewed(&mut self) {
        self.stale = 0;
    }

    /// The bytes that `to_write` gave were written ahead of the exit.
    #[inline]
    pub fn written(&mut self) {
        (self.first, self.end) = (u16::MAX, 0);
    }

    /// The guest below has been entered with the copy that there was, of which the bytes that `to_read` gave were made anew.
    #[inline]
    pub fn enter(&mut self) {
        self.entered = true;
        self.stale = 0;
    }

    /// The guest below has been entered with a copy that was made with this key.
    pub fn enter_anew(&mut self, key: K) {
        *self = Self {
            same: Some(key),
            entered: true,
            ..Self::new()
        };
    }

    /// The guest below exits: the bytes that have to be written for the page to hold what the copy holds, maybe none.
    /// `None` for all of them.
    #[inline]
    pub fn to_write(&self, key: K) -> Option<Range<usize>> {
        let known = self.same == Some(key) && self.entered;
        known.then(|| usize::from(self.first.min(self.end))..usize::from(self.end))
    }

    /// The page holds what the copy holds, written with this key.
    #[inline]
    pub fn exit(&mut self, key: K) {
        *self = Self {
            same: Some(key),
            ..Self::new()
        };
    }
}
