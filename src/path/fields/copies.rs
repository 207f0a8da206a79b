// SPDX-License-Identifier: GPL-2.0
//! The two copies between a shadow VMCS and vmcs12, whichever way leads to the shadow VMCS.

use super::{
    extension::Extension,
    lists::{for_each_width, Entry, Part},
};
use crate::{
    kvm::{
        fields::{for_each_late, FIELDS},
        region::{Current, Shadow, Width},
    },
    path::Counters,
    policy::set::Set,
};
use core::sync::atomic::{AtomicBool, Ordering};
use kernel::prelude::*;

/// What a copy out of a shadow VMCS has found of the learned fields.
#[derive(Default)]
pub(super) struct Found {
    /// Flags of those that have another value.
    flags: u8,
    /// How many have another value.
    pub(super) saved: u64,
}

impl Found {
    /// Whether one that matters to vmcs02 has another value.
    pub(super) const fn changed(&self) -> bool {
        self.flags & Entry::MATTERS != 0
    }
}

/// What became of a copy to a shadow VMCS.
#[derive(Default)]
pub(super) struct Put {
    /// Learned fields that the processor does not have.
    pub(super) refused: Set,
    /// There was another.
    pub(super) lacks_other: bool,
}

impl Extension {
    /// Shadow VMCS to vmcs12.
    ///
    /// # Safety
    ///
    /// What `from` asks for; `vmcs12` is one.
    #[inline(always)]
    pub(super) unsafe fn copy_out<S: Shadow>(&self, from: S, vmcs12: *mut u8) -> Found {
        let mut found = Found::default();
        // SAFETY: By this function's contract; entries and the table have offsets of fields of vmcs12 with their widths.
        unsafe {
            for_each_width!(self.fields, Part::Writable, |e: Word| {
                take::<S, Word>(from, vmcs12, (e.encoding, e.offset), e.flags, &mut found);
            });
            if self.segments {
                const FLAGS: u8 = Entry::LEARNED | Entry::MATTERS;
                for_each_late(|f| {
                    let place = (f.encoding, f.offset);
                    match f.width() {
                        _ if !f.is_segment() => {}
                        2 => take::<S, u16>(from, vmcs12, place, FLAGS, &mut found),
                        4 => take::<S, u32>(from, vmcs12, place, FLAGS, &mut found),
                        _ => take::<S, u64>(from, vmcs12, place, FLAGS, &mut found),
                    }
                });
            }
        }
        found
    }

    /// The same by instructions, each of which may fail.
    ///
    /// # Safety
    ///
    /// As for `copy_out` from [`Current`].
    #[cold]
    #[inline(never)]
    pub(super) unsafe fn copy_out_slowly(&self, vmcs12: *mut u8) -> Found {
        // SAFETY: By this function's contract.
        unsafe { self.copy_out(Current, vmcs12) }
    }

    /// `copy_in` by instructions, each of which may fail.
    ///
    /// # Safety
    ///
    /// As for `copy_in` to [`Current`].
    #[cold]
    #[inline(never)]
    pub(super) unsafe fn copy_in_slowly(&self, vmcs12: *const u8, part: Part) -> Put {
        // SAFETY: By this function's contract.
        unsafe { self.copy_in(vmcs12, Current, part) }
    }

    /// As `copy_out` in mode `check`: vmcs12 has what L1 writes to learned fields already, and what the shadow VMCS has is compared;
    /// `written` are those that L1 wrote, which it lacks.
    ///
    /// # Safety
    ///
    /// As for `copy_out`.
    #[cold]
    #[inline(never)]
    pub(super) unsafe fn compare_out<S: Shadow>(
        &self,
        from: S,
        vmcs12: *mut u8,
        written: &Set,
        count: &Counters,
    ) {
        // SAFETY: As in `copy_out`.
        unsafe {
            for_each_width!(self.fields, Part::Writable, |e: Word| {
                let at = vmcs12.add(e.offset as usize).cast::<Word>();
                let (found, old) = (from.read::<Word>(e.encoding, e.offset), at.read_unaligned());
                match found.filter(|&value| value != old) {
                    Some(value) if !e.is_learned() => at.write_unaligned(value),
                    Some(value) if !written.has(e.number) => {
                        report(count, e, value.into_u64(), old.into_u64());
                    }
                    _ => {}
                }
            });
        }
    }

    /// vmcs12 to shadow VMCS, all fields or those that L2 may have changed.
    ///
    /// # Safety
    ///
    /// As for `copy_out`.
    #[inline(always)]
    pub(super) unsafe fn copy_in<S: Shadow>(&self, vmcs12: *const u8, to: S, part: Part) -> Put {
        let mut put = Put::default();
        // SAFETY: As in `copy_out`.
        unsafe {
            for_each_width!(self.fields, part, |e: Word| {
                if !give::<S, Word>(vmcs12, to, (e.encoding, e.offset)) {
                    if e.is_learned() {
                        put.refused.insert(e.number);
                    } else {
                        put.lacks_other = true;
                    }
                }
            });
            if self.segments {
                for_each_late(|f| {
                    let place = (f.encoding, f.offset);
                    let given = match f.width() {
                        _ if !f.is_segment() => true,
                        2 => give::<S, u16>(vmcs12, to, place),
                        4 => give::<S, u32>(vmcs12, to, place),
                        _ => give::<S, u64>(vmcs12, to, place),
                    };
                    // Every processor has them.
                    put.lacks_other |= !given;
                });
            }
        }
        put
    }

    /// In mode `check`: whether the shadow VMCS has those fields as vmcs12 has them that `Part::Returned` leaves out, but
    /// for those `written` by L1, which it lacks.
    ///
    /// # Safety
    ///
    /// As for `copy_out`.
    #[cold]
    #[inline(never)]
    pub(super) unsafe fn compare_kept<S: Shadow>(
        &self,
        vmcs12: *const u8,
        with: S,
        written: &Set,
        count: &Counters,
    ) {
        // SAFETY: As in `copy_out`.
        unsafe {
            for_each_width!(self.fields, Part::Kept, |e: Word| {
                let at = vmcs12.add(e.offset as usize).cast::<Word>();
                let (found, vmcs12) =
                    (with.read::<Word>(e.encoding, e.offset), at.read_unaligned());
                if let Some(found) = found.filter(|&f| f != vmcs12 && !written.has(e.number)) {
                    report(count, e, found.into_u64(), vmcs12.into_u64());
                }
            });
        }
    }

    /// The fields that are copied.
    pub(super) fn copied(&self) -> Set {
        let mut copied = Set::EMPTY;
        self.fields.all().for_each(|e| copied.insert(e.number));
        let all = (0..).zip(FIELDS);
        let segments = all.filter(|(_, field)| self.segments && field.is_segment());
        segments.for_each(|(number, _)| copied.insert(number));
        copied
    }
}

/// One field, given as encoding and offset, from a shadow VMCS to vmcs12.
///
/// # Safety
///
/// As for `Extension::copy_out`.
#[inline(always)]
unsafe fn take<S: Shadow, W: Width>(
    from: S,
    vmcs12: *mut u8,
    (encoding, offset): (u16, u16),
    flags: u8,
    found: &mut Found,
) {
    // SAFETY: By this function's contract.
    unsafe {
        let at = vmcs12.add(usize::from(offset)).cast::<W>();
        if let Some(value) = from.read::<W>(encoding, offset) {
            if value != at.read_unaligned() {
                let saved = u64::from(flags & Entry::LEARNED);
                found.saved = found.saved.wrapping_add(saved);
                found.flags |= flags;
                at.write_unaligned(value);
            }
        }
    }
}

/// The other way; `false` if the processor has no such field.
///
/// # Safety
///
/// As for `Extension::copy_in`.
#[inline(always)]
unsafe fn give<S: Shadow, W: Width>(
    vmcs12: *const u8,
    to: S,
    (encoding, offset): (u16, u16),
) -> bool {
    // SAFETY: By this function's contract.
    unsafe {
        let from = vmcs12.add(usize::from(offset)).cast::<W>();
        to.write(encoding, offset, from.read_unaligned())
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
