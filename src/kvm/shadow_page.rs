// SPDX-License-Identifier: GPL-2.0
//! A shadow VMCS of our own, as `alloc_vmcs(true)` makes KVM's.

use super::vmx;
use crate::{alloc, bindings};
use kernel::prelude::*;

/// A shadow VMCS. It must be clear (VMCLEAR) when this is dropped.
pub(crate) struct ShadowPage(*mut bindings::vmcs);

// SAFETY: A page that has one owner.
unsafe impl Send for ShadowPage {}

impl ShadowPage {
    /// Allocates one and clears it. May sleep.
    ///
    /// # Safety
    ///
    /// The CPU is in VMX root operation; `like` is a shadow VMCS of KVM's.
    pub(crate) unsafe fn new(like: *const bindings::vmcs) -> Result<Self> {
        alloc::VCPU.gate()?;
        // SAFETY: Asks for nothing.
        let page = unsafe { bindings::get_free_pages_noprof(bindings::MTK_GFP_ZEROED, 0) };
        if page == 0 {
            return Err(ENOMEM);
        }
        let shadow = page as *mut bindings::vmcs;
        // SAFETY: A new page. The first word of a VMCS region is the revision identifier with the shadow
        // indicator, which the processor leaves alone.
        unsafe {
            shadow.cast::<u32>().write(like.cast::<u32>().read());
            vmx::vmclear(vmx::physical(shadow.cast()));
        }
        Ok(Self(shadow))
    }

    /// Takes over one that KVM allocated in the same way.
    ///
    /// # Safety
    ///
    /// Nobody else frees it.
    pub(crate) unsafe fn from_raw(shadow: *mut bindings::vmcs) -> Self {
        Self(shadow)
    }

    /// The page, which stays ours.
    #[inline(always)]
    pub(crate) fn as_ptr(&self) -> *mut bindings::vmcs {
        self.0
    }
}

impl Drop for ShadowPage {
    fn drop(&mut self) {
        // SAFETY: Allocated by `new` or by KVM, as one page, and nobody else's.
        unsafe { bindings::free_pages(self.0 as usize, 0) };
    }
}
