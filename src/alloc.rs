// SPDX-License-Identifier: GPL-2.0
//! The gate that stands before every allocation of this module, so that a test can make each fail in turn
//! (`selftests/alloc.sh`): those at load by the parameter `alloc_fault`, those for vCPUs by the debugfs file of
//! that name.

use core::sync::atomic::{AtomicU32, Ordering};
use kernel::{alloc::AllocError, prelude::*};

/// What an allocation is for.
pub(crate) struct Purpose {
    made: AtomicU32,
    failed: AtomicU32,
    /// The number, counted from 1, of the one that is to fail; 0 for none.
    fault: AtomicU32,
}

/// The module itself: loading, attaching, answering in sysfs and debugfs.
pub(crate) static MODULE: Purpose = Purpose::new();
/// A vCPU, in a handler.
pub(crate) static VCPU: Purpose = Purpose::new();

impl Purpose {
    const fn new() -> Self {
        Self {
            made: AtomicU32::new(0),
            failed: AtomicU32::new(0),
            fault: AtomicU32::new(0),
        }
    }

    /// Must be called before each allocation; on an error it is to be taken for failed.
    pub(crate) fn gate(&self) -> Result<(), AllocError> {
        let number = self.made.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let fault = self.fault.load(Ordering::Relaxed);
        if fault == 0 || fault != number {
            return Ok(());
        }
        self.failed.fetch_add(1, Ordering::Relaxed);
        Err(AllocError)
    }

    /// Has the `n`th allocation from now on fail; none if that is 0.
    pub(crate) fn arm(&self, n: u32) {
        let fault = match n {
            0 => 0,
            n => self.made.load(Ordering::Relaxed).wrapping_add(n),
        };
        self.fault.store(fault, Ordering::Relaxed);
    }

    /// How many allocations there were, and how many of them were made to fail.
    pub(crate) fn counts(&self) -> (u32, u32) {
        (
            self.made.load(Ordering::Relaxed),
            self.failed.load(Ordering::Relaxed),
        )
    }
}
