// SPDX-License-Identifier: GPL-2.0
//! Tracepoints of KVM in functions that the module answers: while somebody listens to one, the stock function runs.
//!
//! The kernel tells of each module's tracepoints as it comes and goes, and of those that are there already when it is first asked.

use crate::{alloc, bindings};
use core::{
    ptr,
    sync::atomic::{AtomicPtr, Ordering},
};
use kernel::{prelude::*, str::CStr};

/// A tracepoint of kvm.
#[derive(Clone, Copy)]
pub(crate) struct Tracepoint(usize);

#[cfg_attr(not(MTK_GVA_WALK), expect(dead_code))]
impl Tracepoint {
    /// kvm_nested_vmenter: L2 is entered.
    pub(crate) const NESTED_VMENTER: Self = Self(0);
    /// kvm_mmu_pagetable_walk: a walk of a guest's tables begins.
    pub(crate) const PAGETABLE_WALK: Self = Self(1);
    /// kvm_mmu_paging_element: it has read an entry.
    pub(crate) const PAGING_ELEMENT: Self = Self(2);
    /// kvm_mmu_walker_error: it has ended in a fault.
    pub(crate) const WALKER_ERROR: Self = Self(3);
    /// kvm_nested_vmexit: L2 has exited, to whomever.
    pub(crate) const NESTED_VMEXIT: Self = Self(4);

    /// Whether nobody listens to it. `false` if it was not found.
    ///
    /// In a handler: kvm stays loaded.
    #[inline(always)]
    pub(crate) fn is_off(self) -> bool {
        let found = FOUND.get(self.0);
        let tracepoint = found.map_or(ptr::null_mut(), |found| found.load(Ordering::Relaxed));
        if tracepoint.is_null() {
            return false;
        }
        // SAFETY: Data of kvm. Others write the pointer to the listeners, so it is read in one go.
        unsafe { (&raw const (*tracepoint).funcs).read_volatile() }.is_null()
    }
}

const NAMES: [&[u8]; 5] = [
    b"kvm_nested_vmenter",
    b"kvm_mmu_pagetable_walk",
    b"kvm_mmu_paging_element",
    b"kvm_mmu_walker_error",
    b"kvm_nested_vmexit",
];

/// Where they are, while kvm is loaded.
static FOUND: [AtomicPtr<bindings::tracepoint>; NAMES.len()] =
    [const { AtomicPtr::new(ptr::null_mut()) }; NAMES.len()];

/// Finds a tracepoint among those of a module.
///
/// # Safety
///
/// A module that stays while this runs.
unsafe fn find(module: *const bindings::module, name: &[u8]) -> *mut bindings::tracepoint {
    // SAFETY: By this function's contract; the kernel's own table, of places relative to the entries themselves
    // (CONFIG_HAVE_ARCH_PREL32_RELOCATIONS).
    unsafe {
        let table = (*module).tracepoints_ptrs.cast::<i32>();
        for at in 0..(*module).num_tracepoints as usize {
            let entry = table.add(at);
            let tracepoint = entry
                .cast::<u8>()
                .offset(entry.read() as isize)
                .cast::<bindings::tracepoint>()
                .cast_mut();
            if CStr::from_char_ptr((*tracepoint).name).to_bytes() == name {
                return tracepoint;
            }
        }
    }
    ptr::null_mut()
}

/// Called by the kernel when a module with tracepoints comes or goes.
///
/// # Safety
///
/// Only that notifier chain calls this, with a `struct tp_module *`.
unsafe extern "C" fn module_event(
    _nb: *mut bindings::notifier_block,
    event: usize,
    data: *mut kernel::ffi::c_void,
) -> kernel::ffi::c_int {
    // SAFETY: By this function's contract; the name is a NUL-terminated array.
    let (module, name) = unsafe {
        let module = (*data.cast::<bindings::tp_module>()).mod_;
        (
            module,
            CStr::from_char_ptr((&raw const (*module).name).cast()),
        )
    };
    if name.to_bytes() == b"kvm" {
        let is_coming =
            event as bindings::module_state == bindings::module_state_MODULE_STATE_COMING;
        for (found, name) in FOUND.iter().zip(NAMES) {
            let tracepoint = if is_coming {
                // SAFETY: A module that the kernel tells of stays until its going was told.
                unsafe { find(module, name) }
            } else {
                ptr::null_mut()
            };
            found.store(tracepoint, Ordering::Relaxed);
        }
    }
    0 // NOTIFY_DONE
}

/// Registration with the kernel; dropping it unregisters.
pub(crate) struct Notifier(KBox<bindings::notifier_block>);

// SAFETY: The block is only touched by the notifier chain's own functions.
unsafe impl Send for Notifier {}
// SAFETY: As above.
unsafe impl Sync for Notifier {}

impl Notifier {
    /// Starts listening, and finds what is there.
    pub(crate) fn register() -> Result<Self> {
        let block = bindings::notifier_block {
            notifier_call: Some(module_event),
            ..Default::default()
        };
        alloc::MODULE.gate()?;
        let mut block = KBox::new(block, GFP_KERNEL)?;
        // SAFETY: The box does not move and is unregistered before it is freed.
        match unsafe { bindings::register_tracepoint_module_notifier(&mut *block) } {
            0 => Ok(Self(block)),
            error => Err(Error::from_errno(error)),
        }
    }
}

impl Drop for Notifier {
    fn drop(&mut self) {
        // SAFETY: Registered by `register`.
        unsafe { bindings::unregister_tracepoint_module_notifier(&mut *self.0) };
    }
}
