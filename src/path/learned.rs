// SPDX-License-Identifier: GPL-2.0
//! The learned set of a vCPU, as other threads may read it.

use crate::{
    kvm::fields::FIELDS,
    policy::set::{Set, WORDS},
};
use core::{
    fmt::{self, Write},
    sync::atomic::{AtomicU64, Ordering},
};

/// A set of fields that the vCPU's thread writes and anybody reads. A reader may see a change half made; each
/// field by itself is right.
pub(crate) struct Published([AtomicU64; WORDS]);

impl Published {
    /// No field.
    pub(crate) const fn new() -> Self {
        Self([const { AtomicU64::new(0) }; WORDS])
    }

    /// Makes `set` what is read.
    pub(crate) fn publish(&self, set: &Set) {
        for (to, from) in self.0.iter().zip(set.words()) {
            to.store(*from, Ordering::Relaxed);
        }
    }

    /// The set as it was published.
    pub(crate) fn get(&self) -> Set {
        Set::from_words(core::array::from_fn(|at| {
            self.0.get(at).map_or(0, |w| w.load(Ordering::Relaxed))
        }))
    }
}

/// Writes a line with the names of the fields of a set.
pub(crate) fn write_names(set: &Set, out: &mut dyn Write) -> fmt::Result {
    let mut between = "";
    for (number, field) in (0..).zip(FIELDS) {
        if set.has(number) {
            write!(out, "{between}{}", field.name)?;
            between = " ";
        }
    }
    writeln!(out)
}
