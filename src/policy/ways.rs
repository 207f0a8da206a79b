// SPDX-License-Identifier: GPL-2.0
//! A small set of remembered things, one per vmcs12, most recently used first to be found.
//!
//! A hypervisor in the middle of a stack alternates between a few VMCSs on each exit of its guest,
//! so one remembered vmcs12 is never enough and four nearly always are.

/// Key that no vmcs12 can have: KVM's `INVALID_GPA`.
pub const NO_KEY: u64 = u64::MAX;

/// Up to `N` values by key. The one that was not asked for longest makes room.
///
/// # Invariants
///
/// A key other than [`NO_KEY`] stands in at most one slot, and `last < N`.
#[derive(Debug)]
pub struct Ways<T, const N: usize> {
    keys: [u64; N],
    stamps: [u64; N],
    values: [T; N],
    clock: u64,
    last: usize,
}

impl<T: Default, const N: usize> Default for Ways<T, N> {
    fn default() -> Self {
        Self::new(core::array::from_fn(|_| T::default()))
    }
}

impl<T, const N: usize> Ways<T, N> {
    /// Nothing remembered; `values` is what the slots hold until they are first used.
    pub const fn new(values: [T; N]) -> Self {
        Self {
            keys: [NO_KEY; N],
            stamps: [0; N],
            values,
            clock: 0,
            last: 0,
        }
    }
}

impl<T: Default, const N: usize> Ways<T, N> {
    /// The value remembered for `key`.
    #[inline]
    pub fn get(&mut self, key: u64) -> Option<&mut T> {
        if key == NO_KEY {
            return None;
        }
        let last = self.last;
        if self.keys.get(last).copied() == Some(key) {
            return self.values.get_mut(last);
        }
        self.find(key)
    }

    fn find(&mut self, key: u64) -> Option<&mut T> {
        let at = self.keys.iter().position(|&k| k == key)?;
        self.touch(at);
        self.values.get_mut(at)
    }

    fn touch(&mut self, at: usize) {
        self.clock = self.clock.wrapping_add(1);
        if let Some(stamp) = self.stamps.get_mut(at) {
            *stamp = self.clock;
        }
        self.last = at;
    }

    /// The value for `key`, made anew (and the oldest one forgotten) if there is none. `None` for
    /// [`NO_KEY`].
    pub fn get_or_insert(&mut self, key: u64) -> Option<&mut T> {
        if key == NO_KEY {
            return None;
        }
        let at = match self.keys.iter().position(|&k| k == key) {
            Some(at) => at,
            None => {
                let at = self.victim()?;
                *self.keys.get_mut(at)? = key;
                *self.values.get_mut(at)? = T::default();
                at
            }
        };
        self.touch(at);
        self.values.get_mut(at)
    }

    fn victim(&self) -> Option<usize> {
        self.keys
            .iter()
            .position(|&k| k == NO_KEY)
            .or_else(|| (0..N).min_by_key(|&i| self.stamps.get(i).copied()))
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.keys = [NO_KEY; N];
    }
}

#[cfg(test)]
mod tests {
    use super::{Ways, NO_KEY};

    #[test]
    fn the_oldest_makes_room() {
        let mut ways: Ways<u32, 2> = Ways::default();
        *ways.get_or_insert(1).unwrap() = 10;
        *ways.get_or_insert(2).unwrap() = 20;
        assert_eq!(ways.get(1).copied(), Some(10));
        *ways.get_or_insert(3).unwrap() = 30;
        assert_eq!(ways.get(2), None);
        assert_eq!(ways.get(1).copied(), Some(10));
        assert_eq!(ways.get(3).copied(), Some(30));
    }

    #[test]
    fn no_key_is_never_found() {
        let mut ways: Ways<u32, 2> = Ways::default();
        assert!(ways.get(NO_KEY).is_none());
        assert!(ways.get_or_insert(NO_KEY).is_none());
    }

    #[test]
    fn a_new_key_starts_from_default() {
        let mut ways: Ways<u32, 1> = Ways::default();
        *ways.get_or_insert(1).unwrap() = 5;
        assert_eq!(ways.get_or_insert(2).copied(), Some(0));
        ways.clear();
        assert!(ways.get(2).is_none());
    }
}
