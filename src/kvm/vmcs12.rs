// SPDX-License-Identifier: GPL-2.0
//! KVM's cached copy of the VMCS that L1 keeps for L2.

use crate::{
    bindings,
    policy::{
        controls::vm_entry::IA32E_MODE,
        registers::{CR0_PG, CR4_PAE},
    },
};

/// A vcpu's cached vmcs12: kernel memory that only the vCPU's own thread changes while it holds the
/// vCPU's mutex. Its *contents* are the guest's and untrusted.
///
/// # Invariants
///
/// The pointer is to a whole `struct vmcs12`, valid for reads, and nobody writes it while this view
/// exists.
#[derive(Clone, Copy)]
pub(crate) struct Vmcs12(*const bindings::vmcs12);

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

    /// Whether the guest is entered with PAE paging (`is_pae_paging()`), so that the PDPTEs in the VMCS matter if it has EPT
    /// (SDM volume 3, 28.3.1.6).
    #[inline(always)]
    pub(crate) fn has_pae_paging(self) -> bool {
        field!(self, vm_entry_controls) & u64::from(IA32E_MODE) == 0
            && field!(self, guest_cr0) & CR0_PG != 0
            && field!(self, guest_cr4) & CR4_PAE != 0
    }

    /// The raw pointer, for [`field!`].
    #[inline(always)]
    pub(crate) fn as_ptr(self) -> *const bindings::vmcs12 {
        self.0
    }
}
