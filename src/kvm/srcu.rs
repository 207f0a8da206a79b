// SPDX-License-Identifier: GPL-2.0
//! KVM's SRCU lock, under which memory slots stay as they are.

use crate::bindings;

/// The lock of one VM, held for reading. KVM itself may hold it already.
pub(super) struct ReadLock {
    kvm: *mut bindings::kvm,
    index: i32,
}

impl ReadLock {
    /// `srcu_read_lock(&kvm->srcu)`.
    ///
    /// # Safety
    ///
    /// The VM outlives the result.
    pub(super) unsafe fn take(kvm: *mut bindings::kvm) -> Self {
        // SAFETY: By this function's contract.
        let index = unsafe { bindings::__srcu_read_lock(&raw mut (*kvm).srcu) };
        // What the inline function in C does beside; 7.2 has no helper for it.
        #[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
        // SAFETY: The lock's own map.
        unsafe {
            let map = &raw mut (*kvm).srcu.dep_map;
            bindings::lock_acquire(map, 0, 0, 2, 1, core::ptr::null_mut(), Self::take as usize);
        }
        Self { kvm, index }
    }

    /// The VM that it is of.
    pub(super) fn kvm(&self) -> *mut bindings::kvm {
        self.kvm
    }
}

impl Drop for ReadLock {
    fn drop(&mut self) {
        #[cfg(CONFIG_DEBUG_LOCK_ALLOC)]
        // SAFETY: As in `take`.
        unsafe {
            bindings::lock_release(&raw mut (*self.kvm).srcu.dep_map, Self::take as usize);
        }
        // SAFETY: Taken by `take`.
        unsafe { bindings::__srcu_read_unlock(&raw mut (*self.kvm).srcu, self.index) };
    }
}
