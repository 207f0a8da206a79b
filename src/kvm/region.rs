// SPDX-License-Identifier: GPL-2.0
//! Two ways to the fields of a shadow VMCS: by VMREAD and VMWRITE, or, on a processor that is itself a KVM, in its region.
//!
//! A KVM that runs as a guest has a processor that another KVM makes, whose VMCS regions are laid out as struct vmcs12. They
//! have a revision identifier of their own (`VMCS12_REVISION`), which changes if the layout does (SDM volume 3, 26.2). In its region a shadow VMCS can be read and
//! written without an exit; getting at it by VMPTRLD, VMREAD, VMWRITE and VMCLEAR would take one for each of these but the accesses.
//!
//! When it is there and nowhere else, the SDM says only for one that is clear (volume 3, 26.11.3). A KVM makes no difference between a
//! shadow VMCS that is active and one that is clear: it reads all of the region on each VM entry with a link pointer to it
//! (nested_cache_shadow_vmcs12()) and has written all of it by the VM exit (nested_flush_cached_shadow_vmcs12()), ever since there is
//! VMCS shadowing for its guests (4.20); VMCLEAR of it changes the launch state alone. So in its guest's guest it can be anywhere, otherwise it is in its region. A
//! KVM with this module (`path::l2fields::copies`) leaves out to read a region that nothing was said of, so where one is written, VMPTRLD or
//! VMCLEAR, of whatever VMCS, comes between the exit before and the entry behind. VMPTRLD does in any switch between two VMCSs.
//!
//! The identifier is not relied upon alone: before a field is read or written in this way for the first time it is tried where the
//! processor puts it, and from where it takes it ([`prove`]). One field that is elsewhere ends it for all.

use super::{
    fields::{Class, Number, FIELDS},
    nested::Header,
    vmx,
};
use crate::{
    bindings,
    policy::{
        set::{self, Set},
        trial::pattern,
    },
};
use core::{
    mem::size_of,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};
use kernel::prelude::*;

/// The width of a field.
pub(crate) trait Width: Copy + PartialEq {
    /// The lower bits of a VMREAD.
    fn from_u64(value: u64) -> Self;
    /// What VMWRITE gets.
    fn into_u64(self) -> u64;
}

macro_rules! widths {
    ($($ty:ty)*) => {$(
        impl Width for $ty {
            #[inline(always)]
            fn from_u64(value: u64) -> Self {
                value as $ty
            }
            #[inline(always)]
            #[allow(clippy::useless_conversion, reason = "one text for three widths")]
            fn into_u64(self) -> u64 {
                u64::from(self)
            }
        }
    )*};
}

widths!(u16 u32 u64);

/// The fields of a shadow VMCS.
pub(crate) trait Shadow: Copy {
    /// Reads a field; `None` if the processor has no such field.
    ///
    /// # Safety
    ///
    /// The implementer says what must be so; `offset` is the field's in struct vmcs12, `W` its width.
    unsafe fn read<W: Width>(self, encoding: u16, offset: u16) -> Option<W>;

    /// Writes a field; `false` if the processor has no such field.
    ///
    /// # Safety
    ///
    /// As for `read`.
    unsafe fn write<W: Width>(self, encoding: u16, offset: u16, value: W) -> bool;
}

/// The current VMCS, by VMREAD and VMWRITE. It is a shadow VMCS, and preemption is off.
#[derive(Clone, Copy)]
pub(crate) struct Current;

impl Shadow for Current {
    #[inline(always)]
    unsafe fn read<W: Width>(self, encoding: u16, _offset: u16) -> Option<W> {
        // SAFETY: As the type says.
        unsafe { vmx::vmread(u64::from(encoding)) }.map(W::from_u64)
    }

    #[inline(always)]
    unsafe fn write<W: Width>(self, encoding: u16, _offset: u16, value: W) -> bool {
        // SAFETY: As the type says.
        unsafe { vmx::vmwrite(u64::from(encoding), value.into_u64()) }
    }
}

/// The current VMCS as well, without asking whether each access worked: the processor has all fields that are used.
#[derive(Clone, Copy)]
pub(crate) struct Present;

impl Shadow for Present {
    #[inline(always)]
    unsafe fn read<W: Width>(self, encoding: u16, _offset: u16) -> Option<W> {
        // SAFETY: As the type says.
        Some(W::from_u64(unsafe {
            vmx::vmread_present(u64::from(encoding))
        }))
    }

    #[inline(always)]
    unsafe fn write<W: Width>(self, encoding: u16, _offset: u16, value: W) -> bool {
        // SAFETY: As the type says.
        unsafe { vmx::vmwrite_basic(u64::from(encoding), value.into_u64()) };
        true
    }
}

/// A region that holds a VMCS as the processor keeps it. All its fields that are used were proved.
#[derive(Clone, Copy)]
pub(crate) struct Region(*mut bindings::vmcs);

impl Region {
    /// # Safety
    ///
    /// A page that lives while this does, of a shadow VMCS that is clear, or any on a processor that is a KVM, and nobody else's to
    /// change.
    #[inline(always)]
    pub(crate) unsafe fn new(shadow: *mut bindings::vmcs) -> Self {
        Self(shadow)
    }

    #[inline(always)]
    fn at<W>(self, offset: u16) -> *mut W {
        self.0.cast::<u8>().wrapping_add(offset as usize).cast()
    }
}

impl Shadow for Region {
    #[inline(always)]
    unsafe fn read<W: Width>(self, _encoding: u16, offset: u16) -> Option<W> {
        // SAFETY: By the contracts of `new` and of this function: within the page.
        Some(unsafe { self.at::<W>(offset).read_unaligned() })
    }

    #[inline(always)]
    unsafe fn write<W: Width>(self, _encoding: u16, offset: u16, value: W) -> bool {
        // SAFETY: As above.
        unsafe { self.at::<W>(offset).write_unaligned(value) };
        true
    }
}

/// A field was found elsewhere: nothing is read or written in a region any more.
static ELSEWHERE: AtomicBool = AtomicBool::new(false);
/// Fields that were found where struct vmcs12 has them, by number.
static PROVED: [AtomicU64; set::WORDS] = [const { AtomicU64::new(0) }; set::WORDS];

fn is_proved(number: Number) -> bool {
    PROVED
        .get(number as usize / 64)
        .is_some_and(|word| word.load(Ordering::Relaxed) >> (number % 64) & 1 != 0)
}

/// Whether the processor keeps this shadow VMCS as struct vmcs12, if its revision identifier tells the truth.
///
/// # Safety
///
/// A shadow VMCS of KVM's.
pub(crate) unsafe fn is_vmcs12(shadow: *const bindings::vmcs) -> bool {
    // SAFETY: Software writes the first word, the processor does not (SDM volume 3, 26.2).
    let header = Header(unsafe { shadow.cast::<u32>().read() });
    super::runs_on_hypervisor() && header.is_ours() && !ELSEWHERE.load(Ordering::Relaxed)
}

/// Whether all these fields are where struct vmcs12 has them, tried for those that were not before. What the shadow VMCS held is lost
/// if so; it is clear afterwards.
///
/// # Safety
///
/// A shadow VMCS of KVM's, or one like it, which nothing is to be learned from any more. The vCPU is loaded with preemption off, and
/// `loaded`, the address of its loaded VMCS, is current, as it is again afterwards.
pub(crate) unsafe fn prove(shadow: *mut bindings::vmcs, loaded: u64, wanted: &Set) -> bool {
    // SAFETY: By this function's contract.
    if !unsafe { is_vmcs12(shadow) } {
        return false;
    }
    let mut new = *wanted;
    wanted
        .iter()
        .filter(|&number| is_proved(number))
        .for_each(|number| new.remove(number));
    if new.is_empty() {
        return true;
    }
    // SAFETY: By this function's contract.
    let tried = unsafe { try_fields(shadow, &new) };
    // SAFETY: As above.
    unsafe {
        vmx::vmclear(vmx::physical(shadow.cast()));
        vmx::vmptrld(loaded);
    }
    match tried {
        Some(true) => {
            for number in new.iter() {
                if let Some(word) = PROVED.get(number as usize / 64) {
                    word.fetch_or(1 << (number % 64), Ordering::Relaxed);
                }
            }
            true
        }
        Some(false) => {
            if !ELSEWHERE.swap(true, Ordering::Relaxed) {
                pr_info!("the hypervisor below keeps a VMCS in another way than this kernel's KVM would; shadow VMCSs are copied by instructions\n");
            }
            false
        }
        // Who copies by instructions finds out which it is.
        None => false,
    }
}

/// `None` if the processor lacks one of the fields.
///
/// # Safety
///
/// As for `prove`, but that the shadow VMCS is left in any state.
#[cold]
unsafe fn try_fields(shadow: *mut bindings::vmcs, fields: &Set) -> Option<bool> {
    let physical = vmx::physical(shadow.cast());
    let of = |number: Number, second: bool| {
        let field = FIELDS.get(number as usize)?;
        let rights = matches!(field.class, Class::AccessRights | Class::LateAccessRights);
        Some((field, pattern(number, field.width(), rights, second)))
    };
    // SAFETY: By this function's contract; a region is looked at while it is clear.
    unsafe {
        let region = Region::new(shadow);
        if !vmx::vmptrld(physical) {
            return None;
        }
        for number in fields.iter() {
            let (field, value) = of(number, false)?;
            if !vmx::vmwrite(u64::from(field.encoding), value) {
                return None;
            }
        }
        if !vmx::vmclear(physical) {
            return None;
        }
        for number in fields.iter() {
            let ((field, first), (_, second)) = (of(number, false)?, of(number, true)?);
            let (encoding, offset) = (field.encoding, field.offset);
            let is = |found: Option<u64>| found == Some(first);
            let same = match field.width() {
                size if size == size_of::<u16>() => {
                    is(region.read::<u16>(encoding, offset).map(Width::into_u64))
                        && region.write(encoding, offset, second as u16)
                }
                size if size == size_of::<u32>() => {
                    is(region.read::<u32>(encoding, offset).map(Width::into_u64))
                        && region.write(encoding, offset, second as u32)
                }
                _ => {
                    is(region.read::<u64>(encoding, offset))
                        && region.write(encoding, offset, second)
                }
            };
            if !same {
                return Some(false);
            }
        }
        if !vmx::vmptrld(physical) {
            return None;
        }
        for number in fields.iter() {
            let (field, second) = of(number, true)?;
            if vmx::vmread(u64::from(field.encoding)) != Some(second) {
                return Some(false);
            }
        }
    }
    Some(true)
}
