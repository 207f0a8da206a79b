// SPDX-License-Identifier: GPL-2.0
//! The two copies between a shadow VMCS and vmcs12, whichever way leads to the shadow VMCS.

use super::{
    extension::Extension,
    lists::{for_each_width, Entry},
};
use crate::{
    kvm::{
        fields::{Number, FIELDS},
        region::{Shadow, Width},
    },
    path::Counters,
    policy::set::Set,
};
use core::sync::atomic::{AtomicBool, Ordering};
use kernel::prelude::*;

/// What a copy out of a shadow VMCS has found of the learned fields.
#[derive(Default)]
pub(super) struct Found {
    /// One that matters to vmcs02 has another value.
    pub(super) changed: bool,
    /// How many have another value.
    pub(super) saved: u64,
}

impl Extension {
    /// Shadow VMCS to vmcs12. In mode `check` vmcs12 has what L1 writes to learned fields already, and what the shadow
    /// VMCS has is compared; `written` are those that L1 wrote, which it lacks.
    ///
    /// # Safety
    ///
    /// What `from` asks for; `vmcs12` is one.
    #[inline(always)]
    pub(super) unsafe fn copy_out<S: Shadow>(
        &self,
        from: S,
        vmcs12: *mut u8,
        checking: bool,
        written: &Set,
        count: &Counters,
    ) -> Found {
        let mut found = Found::default();
        // SAFETY: By this function's contract; entries have offsets of fields of vmcs12 with their widths.
        unsafe {
            for_each_width!(self.stock_rw, |e: Word| {
                if let Some(value) = from.read::<Word>(e.encoding, e.offset) {
                    vmcs12
                        .add(e.offset as usize)
                        .cast::<Word>()
                        .write_unaligned(value);
                }
            });
            for_each_width!(self.learned, |e: Word| {
                let at = vmcs12.add(e.offset as usize).cast::<Word>();
                if let Some(value) = from.read::<Word>(e.encoding, e.offset) {
                    let old = at.read_unaligned();
                    if value != old {
                        if !checking {
                            found.saved += 1;
                            found.changed |= e.matters;
                            at.write_unaligned(value);
                        } else if !written.has(e.number) {
                            report(count, e, value.into_u64(), old.into_u64());
                        }
                    }
                }
            });
        }
        found
    }

    /// vmcs12 to shadow VMCS. Returns a learned field that the processor does not have.
    ///
    /// # Safety
    ///
    /// As for `copy_out`.
    #[inline(always)]
    pub(super) unsafe fn copy_in<S: Shadow>(&self, vmcs12: *const u8, to: S) -> Option<Number> {
        let mut refused = None;
        // SAFETY: As in `copy_out`.
        unsafe {
            for_each_width!(self.stock_rw, |e: Word| {
                let from = vmcs12.add(e.offset as usize).cast::<Word>();
                to.write(e.encoding, e.offset, from.read_unaligned());
            });
            for_each_width!(self.stock_ro, |e: Word| {
                let from = vmcs12.add(e.offset as usize).cast::<Word>();
                to.write(e.encoding, e.offset, from.read_unaligned());
            });
            for_each_width!(self.learned, |e: Word| {
                let from = vmcs12.add(e.offset as usize).cast::<Word>();
                if !to.write(e.encoding, e.offset, from.read_unaligned()) {
                    refused = Some(e.number);
                }
            });
        }
        refused
    }

    /// The fields that are copied.
    pub(super) fn copied(&self) -> impl Iterator<Item = Number> + Clone + '_ {
        let stock = Iterator::chain(self.stock_rw.all(), self.stock_ro.all());
        Iterator::chain(stock, self.learned.all()).map(|e| e.number)
    }
}

static REPORTED: AtomicBool = AtomicBool::new(false);

#[cold]
fn report(counters: &Counters, entry: &Entry, shadow: u64, vmcs12: u64) {
    counters.mismatches.bump();
    let name = FIELDS.get(entry.number as usize).map_or("?", |f| f.name);
    if !REPORTED.swap(true, Ordering::Relaxed) {
        pr_warn!(
            "fields: {} ({:#x}) would read {:#x} from the shadow VMCS, vmcs12 has {:#x}\n",
            name,
            entry.encoding,
            shadow,
            vmcs12
        );
    }
}
