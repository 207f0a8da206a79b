// SPDX-License-Identifier: GPL-2.0
//! KVM's cached copy of the VMCS that L1 keeps for L2.

use crate::bindings;

/// A vcpu's cached vmcs12: kernel memory that only the vCPU's own thread changes while it holds the
/// vCPU's mutex. Its *contents* are the guest's and untrusted.
///
/// # Invariants
///
/// The pointer is to a whole `struct vmcs12`, valid for reads, and nobody writes it while this view
/// exists.
#[derive(Clone, Copy)]
pub(crate) struct Vmcs12(*const bindings::vmcs12);

impl Vmcs12 {
    /// Views the vmcs12 that KVM passed to a hooked function.
    ///
    /// # Safety
    ///
    /// `ptr` is the argument of the hooked function, in whose handler the view is used.
    #[inline(always)]
    pub(crate) unsafe fn from_hook(ptr: *const bindings::vmcs12) -> Self {
        // INVARIANT: By this function's contract.
        Self(ptr)
    }

    /// The raw pointer, for [`field!`].
    #[inline(always)]
    pub(crate) fn as_ptr(self) -> *const bindings::vmcs12 {
        self.0
    }
}

/// Reads a field of a [`Vmcs12`] by KVM's name for it, as `u64`.
macro_rules! field {
    ($vmcs12:expr, $name:ident) => {{
        let ptr = $vmcs12.as_ptr();
        // SAFETY: By the invariants of `Vmcs12` the pointer is valid for reads; the structure is
        // packed, so the read is made unaligned.
        unsafe { u64::from((&raw const (*ptr).$name).read_unaligned()) }
    }};
}
pub(crate) use field;
