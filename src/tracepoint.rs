// SPDX-License-Identifier: GPL-2.0
//! Tracepoints of KVM in functions that the module answers: while somebody listens to one, the stock function runs.
//!
//! The kernel tells of each module's tracepoints as it comes and goes, and of those that are there already when it is first asked.

use crate::{alloc, bindings};
use core::sync::atomic::{AtomicPtr, Ordering};
use kernel::{prelude::*, str::CStr};

/// The tracepoint kvm_nested_vmenter, while kvm is loaded.
static NESTED_VMENTER: AtomicPtr<bindings::tracepoint> = AtomicPtr::new(core::ptr::null_mut());

/// Whether nobody listens to kvm_nested_vmenter. `false` if it was not found.
///
/// In a handler: kvm stays loaded.
#[cfg_attr(not(MTK_GVA_WALK), expect(dead_code))]
#[inline(always)]
pub(crate) fn nested_vmenter_is_off() -> bool {
    let tracepoint = NESTED_VMENTER.load(Ordering::Relaxed);
    // SAFETY: Data of kvm. Others write the pointer to the listeners, so it is read in one go.
    !tracepoint.is_null() && unsafe { (&raw const (*tracepoint).funcs).read_volatile() }.is_null()
}

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
    core::ptr::null_mut()
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
        let found = match event as bindings::module_state {
            // SAFETY: A module that the kernel tells of stays until its going was told.
            bindings::module_state_MODULE_STATE_COMING => unsafe {
                find(module, b"kvm_nested_vmenter")
            },
            _ => core::ptr::null_mut(),
        };
        NESTED_VMENTER.store(found, Ordering::Relaxed);
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
