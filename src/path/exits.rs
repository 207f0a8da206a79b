// SPDX-License-Identifier: GPL-2.0
//! Exit accounting: exits into L0 by the level they came from and by basic exit reason. Off by
//! default, and then not even hooked; switched in debugfs.
//!
//! L0 tells its guest (L1) from what that guest runs (L2); deeper levels are vmcs12s of the same L1
//! and count as L2 and deeper. Exits that KVM's fast path finishes and re-enters from without
//! leaving its inner loop are not seen.

use super::{Count, Path};
use crate::{
    bindings,
    hook::{Continuation, HookId, InFlight, Verdict},
    kvm::Vcpu,
    state,
};
use core::sync::atomic::{AtomicBool, Ordering};
use kernel::c_str;

/// The accounting attaches like a path, but has no modes and is not in `PATHS`.
pub(crate) const ACCOUNTING: Path = Path {
    name: c_str!("exits"),
    about: c_str!("exits into L0 by level and reason"),
    hooks: &[HookId::HANDLE_EXIT],
    guest_hooks: &[],
    extra_hooks: &[],
    calls: &[],
    drain: None,
    drain_hooks: &[],
    reasons: &[],
    knobs: &[],
};

/// Basic exit reasons (SDM appendix C) go to 77 today; the last row takes what is beyond.
pub(crate) const REASONS: usize = 80;

/// Counts by level (0: L1, 1: L2 and deeper) and basic exit reason.
pub(crate) struct Exits([[Count; REASONS]; 2]);

impl Default for Exits {
    fn default() -> Self {
        Self::new()
    }
}

impl Exits {
    pub(crate) const fn new() -> Self {
        Self([const { [const { Count::new() }; REASONS] }; 2])
    }

    /// Adds `other`, which any thread may do at any time.
    pub(crate) fn add(&self, other: &Exits) {
        for (sum, n) in self.0.iter().flatten().zip(other.0.iter().flatten()) {
            sum.add_shared(n.get());
        }
    }

    fn bump(&self, nested: bool, reason: u16) {
        let row = (reason as usize).min(REASONS - 1);
        if let Some(count) = self
            .0
            .get(usize::from(nested))
            .and_then(|level| level.get(row))
        {
            count.bump();
        }
    }

    /// (reason, exits from L1, exits from L2 and deeper) of every reason that occurred.
    pub(crate) fn rows(&self) -> impl Iterator<Item = (usize, u64, u64)> + '_ {
        let [l1, l2] = &self.0;
        let both = l1.iter().zip(l2).map(|(a, b)| (a.get(), b.get()));
        both.enumerate()
            .filter(|(_, (a, b))| a | b != 0)
            .map(|(reason, (a, b))| (reason, a, b))
    }
}

/// Exits are counted. The hook may be on without, while a path is being switched off.
static COUNTING: AtomicBool = AtomicBool::new(false);

/// Starts or ends counting.
pub(crate) fn set_counting(on: bool) {
    COUNTING.store(on, Ordering::Relaxed);
}

/// Whether they are counted, which takes that they come to vmx_handle_exit().
#[inline(always)]
pub(super) fn is_counting() -> bool {
    COUNTING.load(Ordering::Relaxed)
}

/// Handler of vmx_handle_exit(): counts and lets the stock function run.
#[no_mangle]
extern "C" fn mtk_on_handle_exit(
    vcpu: *mut bindings::kvm_vcpu,
    _fastpath: usize,
    _cont: Continuation,
) -> Verdict {
    // SAFETY: The hooked function's own argument, in its handler.
    let vcpu = unsafe { Vcpu::from_hook(vcpu) };
    super::vmptrld::leave(vcpu);
    super::nested_switch::leave(vcpu);
    if !COUNTING.load(Ordering::Relaxed) {
        return Verdict::STOCK;
    }
    let (nested, reason) = (vcpu.guest_mode(), vcpu.exit_reason());
    let count = || state::with(vcpu, |_, counters| counters.exits.bump(nested, reason));
    if count().is_none() {
        // Preemption is on here: __vcpu_run() handles exits after it was enabled again.
        let section = InFlight::enter(HookId::HANDLE_EXIT);
        if state::ensure(vcpu, &section) {
            count();
        }
    }
    Verdict::STOCK
}
