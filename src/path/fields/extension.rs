// SPDX-License-Identifier: GPL-2.0
//! What an extended vCPU has: bitmaps of its own and the lists of what its shadow VMCS carries.

use super::{
    lists::{Bitmap, List, Use},
    LEARNED, STOCK,
};
use crate::{
    alloc,
    kvm::{
        fields::{
            encoding::{GUEST_ES_AR_BYTES, VMREAD_BITMAP, VMWRITE_BITMAP},
            Class, FIELDS,
        },
        vmx, Vcpu,
    },
    policy::{set::Set, trial::ACCESS_RIGHTS},
};
use kernel::{new_spinlock, prelude::*, sync::SpinLock};
use pin_init::{init_from_closure, Init};

/// What an extended vCPU needs beside what is learned. Pinned: the processor holds the bitmaps'
/// addresses.
#[pin_data]
pub(super) struct Extension {
    pub(super) vmread: Bitmap,
    pub(super) vmwrite: Bitmap,
    /// Addresses of the stock bitmaps, to go back to.
    pub(super) stock_vmread: u64,
    pub(super) stock_vmwrite: u64,
    /// Fields that the stock code shadows and that may be left out, for it makes no difference to L1.
    pub(super) optional: Set,
    /// Those that are left out now.
    pub(super) left_out: Set,
    /// Fields that are in the shadow VMCS now.
    pub(super) fields: List<{ STOCK + LEARNED }>,
    /// So are all segments, [`Field::is_segment`](crate::kvm::fields::Field), which are not in the list then.
    pub(super) segments: bool,
    /// One of the learned fields must be fetched from vmcs02.
    pub(super) late: bool,
    /// Whether the processor drops the reserved bits of access rights as KVM does; `None` before it
    /// was tried.
    pub(super) drops_reserved: Option<bool>,
    /// All these fields can be read and written in the region of the shadow VMCS.
    pub(super) in_region: bool,
    /// The processor has all of them: each was written.
    pub(super) present: bool,
    /// Taken to keep preemption off; never contended.
    #[pin]
    pub(super) quiet: SpinLock<()>,
}

/// Tries whether VMWRITE drops the reserved bits of access rights, leaving those that
/// `handle_vmwrite()` leaves. GUEST_ES_AR_BYTES stands for all of them.
///
/// # Safety
///
/// A shadow VMCS that is about to be filled is current.
pub(in crate::path) unsafe fn drops_reserved() -> bool {
    // SAFETY: By this function's contract.
    unsafe {
        vmx::vmwrite(GUEST_ES_AR_BYTES, u64::from(u32::MAX))
            && vmx::vmread(GUEST_ES_AR_BYTES) == Some(ACCESS_RIGHTS)
    }
}

fn copy_of(bitmap: u64) -> impl Init<Bitmap> {
    let from = vmx::virtual_address(bitmap).cast::<Bitmap>();
    // SAFETY: KVM's own bitmap: a whole page in the direct map, constant since kvm_intel's init and
    // never freed while it is loaded. The slot is a whole page as well, and fully written.
    unsafe {
        init_from_closure(move |slot: *mut Bitmap| {
            core::ptr::copy_nonoverlapping(from, slot, 1);
            Ok(())
        })
    }
}

impl Extension {
    /// Reads the stock bitmaps off vmcs01, which must be current. `Ok(None)` if they are not what
    /// the field table can explain: then this kernel shadows something that we do not know.
    pub(super) fn new(vcpu: Vcpu) -> Result<Option<Pin<KBox<Self>>>> {
        // SAFETY: `vcpu` is in a handler with vmcs01 current.
        let addresses = unsafe { (vmx::vmread(VMREAD_BITMAP), vmx::vmread(VMWRITE_BITMAP)) };
        let (Some(stock_vmread), Some(stock_vmwrite)) = addresses else {
            return Ok(None);
        };
        let _ = vcpu;
        alloc::VCPU.gate()?;
        let mut ext = KBox::pin_init(
            pin_init!(Self {
                vmread <- copy_of(stock_vmread),
                vmwrite <- copy_of(stock_vmwrite),
                stock_vmread,
                stock_vmwrite,
                optional: Set::EMPTY,
                left_out: Set::EMPTY,
                fields: List::EMPTY,
                segments: false,
                late: false,
                drops_reserved: None,
                in_region: false,
                present: false,
                quiet <- new_spinlock!(()),
            }),
            GFP_KERNEL_ACCOUNT | __GFP_NOWARN,
        )?;
        // SAFETY: Nothing is moved out.
        let this = unsafe { ext.as_mut().get_unchecked_mut() };
        let (mut reads, mut writes, mut room) = (0, 0, true);
        for (number, field) in (0..).zip(FIELDS) {
            let bits = if field.has_high() { 2 } else { 1 };
            if !this.vmwrite.has(field) {
                room &= this.fields.push(number, field, Use::Stock);
                writes += bits;
            } else if !this.vmread.has(field) {
                room &= this.fields.push(number, field, Use::StockRead);
            }
            if !this.vmread.has(field) {
                reads += bits;
                if matches!(
                    field.class,
                    Class::Plain | Class::Aside | Class::Returned | Class::ExitInformation
                ) {
                    this.optional.insert(number);
                }
            }
        }
        let explained = this.vmread.clear_bits() == reads && this.vmwrite.clear_bits() == writes;
        Ok((explained && room).then_some(ext))
    }
}
