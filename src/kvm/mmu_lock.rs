// SPDX-License-Identifier: GPL-2.0
//! `kvm->mmu_lock` held for reading, as KVM holds it where it maps a page of a guest whose memory it maps directly, and the
//! host's invalidations.

use super::{vcpu::read, Vcpu};
use crate::bindings;
use core::sync::atomic::{fence, Ordering};

/// A point in time, as far as invalidations by the host's memory management go: `mmu_invalidate_seq`.
#[derive(Clone, Copy)]
pub(crate) struct Moment(usize);

impl Vcpu {
    /// Now. What is looked up of the VMM's memory afterwards may be mapped under the lock if `has_invalidated` says no.
    pub(crate) fn now(self) -> Moment {
        let kvm = read!(self, vcpu.kvm);
        // SAFETY: A vCPU's VM outlives it; a plain word that changes at any time.
        let seq = unsafe { (&raw const (*kvm).mmu_invalidate_seq).read_volatile() };
        // As in kvm_mmu_faultin_pfn(): the look-up comes after.
        fence(Ordering::Acquire);
        Moment(seq)
    }

    /// Takes the lock for reading.
    pub(crate) fn share_mmu(self) -> SharedMmu {
        let kvm = read!(self, vcpu.kvm);
        // SAFETY: A vCPU's VM outlives it, and no caller holds the lock.
        unsafe { bindings::_raw_read_lock(&raw mut (*kvm).mmu_lock) };
        SharedMmu(kvm)
    }

    /// Whether the VM is of the ordinary kind, of which no memory is the guest's alone.
    pub(crate) fn is_of_default_vm(self) -> bool {
        let kvm = read!(self, vcpu.kvm);
        // SAFETY: As in `is_vmx`.
        u32::from(unsafe { (*kvm).arch.vm_type }) == bindings::MTK_DEFAULT_VM
    }
}

/// `kvm->mmu_lock`, held for reading. Code that holds it does not sleep and holds it for a bounded number of entries.
pub(crate) struct SharedMmu(*mut bindings::kvm);

impl SharedMmu {
    /// `mmu_invalidate_retry()`: something may have been taken away since, or is about to be.
    pub(crate) fn has_invalidated(&self, since: Moment) -> bool {
        // SAFETY: A vCPU's VM outlives it; both are read under the lock, as KVM does.
        unsafe {
            if (&raw const (*self.0).mmu_invalidate_in_progress).read_volatile() != 0 {
                return true;
            }
            fence(Ordering::Acquire);
            (&raw const (*self.0).mmu_invalidate_seq).read_volatile() != since.0
        }
    }

    /// Whether somebody waits for the lock (`rwlock_is_contended()`).
    pub(crate) fn is_contended(&self) -> bool {
        // SAFETY: A vCPU's VM outlives it.
        unsafe { is_contended(self.0) }
    }
}

impl Drop for SharedMmu {
    fn drop(&mut self) {
        // SAFETY: Taken in `share_mmu`.
        unsafe { bindings::_raw_read_unlock(&raw mut (*self.0).mmu_lock) };
    }
}

/// Whether somebody waits for the lock.
///
/// # Safety
///
/// The VM stays meanwhile.
pub(super) unsafe fn is_contended(kvm: *const bindings::kvm) -> bool {
    // What queues behind the lock's holder holds the lock for waiting.
    // SAFETY: By this function's contract.
    unsafe {
        let lock = &raw const (*kvm).mmu_lock.raw_lock.wait_lock;
        lock.cast::<u32>().read_volatile() != 0
    }
}
