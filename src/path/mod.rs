// SPDX-License-Identifier: GPL-2.0
//! The path framework: what every acceleration has in common.
//!
//! A path has a mode (off, on, check), a list of hook points that it needs while it is not off,
//! names for the reasons why it falls back to stock code, and counters. [`PATHS`] is the one list;
//! `control` attaches and detaches, `sysfs` shows it.

pub(crate) mod checks;
pub(crate) mod direct;
mod drain;
pub(crate) use drain::interrupt_all;
mod entry;
pub(crate) mod exits;
pub(crate) mod fields;
pub(crate) mod l2fields;
pub(crate) mod learned;
pub(crate) mod nested_switch;
pub(crate) mod prefault;
mod run;
pub(crate) mod vmptrld;

use crate::{
    hook::{CallId, HookId},
    kvm,
    policy::mode::Mode,
    sysfs::Attribute,
};
use core::sync::atomic::{AtomicU64, AtomicU8, Ordering};
use kernel::{prelude::*, str::CStr};

/// Most fallback reasons that a path may have.
pub(crate) const MAX_REASONS: usize = 8;
/// How many paths there are.
pub(crate) const COUNT: usize = PATHS.len();

/// What is fixed about a path.
pub(crate) struct Path {
    /// Name of its directory in sysfs.
    pub(crate) name: &'static CStr,
    /// One line for the logs and the documentation.
    pub(crate) about: &'static CStr,
    /// Hook points that it needs, beside [`COMMON_HOOKS`].
    pub(crate) hooks: &'static [HookId],
    /// Hook points that it needs beside these where this kernel is a guest itself.
    pub(crate) guest_hooks: &'static [HookId],
    /// Hook points that are attached where they can be. Without one the path does less.
    pub(crate) extra_hooks: &'static [HookId],
    /// KVM functions that it calls.
    pub(crate) calls: &'static [CallId],
    /// Called when the path has been switched off and its hooks are still on: gives every vCPU back
    /// to the stock code, and returns when all are.
    pub(crate) drain: Option<fn()>,
    /// Hook points that are attached while `drain` runs, where they can be.
    pub(crate) drain_hooks: &'static [HookId],
    /// Names of its fallback reasons, in the order of its own `Reason` numbers.
    pub(crate) reasons: &'static [&'static str],
    /// What can be set beside its mode, as files in sysfs.
    pub(crate) knobs: &'static [Attribute],
}

impl Path {
    /// All hooks that the path needs, in the order in which they must be attached.
    pub(crate) fn all_hooks(&self) -> impl Iterator<Item = HookId> {
        let guest = self
            .guest_hooks
            .iter()
            .filter(|_| kvm::runs_on_hypervisor());
        let own = Iterator::chain(self.hooks.iter(), guest);
        Iterator::chain(COMMON_HOOKS.iter(), own).copied()
    }
}

/// All paths; a path's number is its place here.
pub(crate) static PATHS: &[Path] = &[
    checks::PATH,
    fields::PATH,
    vmptrld::PATH,
    l2fields::PATH,
    prefault::PATH,
    direct::PATH,
    nested_switch::PATH,
];

/// Hooks that keep per-vCPU state honest; attached whenever any path is not off, before the path's
/// own and detached after them.
pub(crate) const COMMON_HOOKS: &[HookId] = &[HookId::FREE_VCPU, HookId::VCPU_IOCTL];

/// The modes in force, by number of the path. `control` alone writes them.
static MODES: [AtomicU8; COUNT] = [const { AtomicU8::new(Mode::Off as u8) }; COUNT];

/// The mode of a path right now.
#[inline(always)]
pub(crate) fn mode(path: usize) -> Mode {
    let number = MODES.get(path).map_or(0, |m| m.load(Ordering::Relaxed));
    Mode::from_number(number).unwrap_or(Mode::Off)
}

/// Puts a mode in force; `control` has made sure that the hooks fit.
pub(crate) fn set_mode(path: usize, mode: Mode) {
    if let Some(m) = MODES.get(path) {
        m.store(mode as u8, Ordering::Relaxed);
    }
}

/// A count that one thread at a time adds to and everybody may read.
#[derive(Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Adds one. The vCPU's thread is the only writer, so no locked instruction is needed.
    #[inline(always)]
    pub(crate) fn bump(&self) {
        self.0.store(
            self.0.load(Ordering::Relaxed).wrapping_add(1),
            Ordering::Relaxed,
        );
    }

    /// Adds `n`, as `bump` does.
    #[inline(always)]
    pub(crate) fn add(&self, n: u64) {
        self.0.store(
            self.0.load(Ordering::Relaxed).wrapping_add(n),
            Ordering::Relaxed,
        );
    }

    /// The count so far.
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn add_shared(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }
}

/// Counters of one path.
#[derive(Default)]
pub(crate) struct Counters {
    /// Calls that the path answered itself.
    pub(crate) taken: Count,
    /// Answers compared with the stock code's (mode `check`).
    pub(crate) checked: Count,
    /// Comparisons that differed. Anything but 0 is a bug.
    pub(crate) mismatches: Count,
    /// Exits into L0 that did not happen because of the path.
    pub(crate) saved_exits: Count,
    /// Of those taken, the ones answered in a way that is shorter still (see `vmptrld::fast`, `nested_switch::inner`, `prefault::absent`).
    pub(crate) short: Count,
    /// Calls left to the stock code, by reason.
    pub(crate) fallbacks: [Count; MAX_REASONS],
}

impl Counters {
    const fn new() -> Self {
        Self {
            taken: Count::new(),
            checked: Count::new(),
            mismatches: Count::new(),
            saved_exits: Count::new(),
            short: Count::new(),
            fallbacks: [const { Count::new() }; MAX_REASONS],
        }
    }

    /// Counts a call left to the stock code; `reason` is the path's own number for why.
    fn fall_back(&self, reason: usize) {
        if let Some(count) = self.fallbacks.get(reason) {
            count.bump();
        }
    }

    fn each(&self) -> impl Iterator<Item = &Count> {
        // Spelt out: pin_init's prelude has a `chain` of its own.
        Iterator::chain(
            [
                &self.taken,
                &self.checked,
                &self.mismatches,
                &self.saved_exits,
                &self.short,
            ]
            .into_iter(),
            self.fallbacks.iter(),
        )
    }

    /// Adds `other` to this, which any thread may do at any time.
    pub(crate) fn add(&self, other: &Counters) {
        for (sum, n) in self.each().zip(other.each()) {
            sum.add_shared(n.get());
        }
    }
}

/// Counters of all paths for one vCPU.
pub(crate) struct CounterSet {
    paths: [Counters; COUNT],
    /// Exit accounting.
    pub(crate) exits: exits::Exits,
    /// What a thread that withdraws the path `fields` must know about the vCPU.
    pub(crate) fields: fields::Shared,
    /// As `fields`, for the path `vmptrld`.
    pub(crate) vmptrld: vmptrld::Shared,
    /// As `fields`, for the path `l2fields`.
    pub(crate) l2fields: l2fields::Shared,
    /// As `fields`, for the path `nested_switch`.
    pub(crate) nested_switch: nested_switch::Shared,
}

impl CounterSet {
    /// All zero.
    pub(crate) const fn new() -> Self {
        Self {
            paths: [const { Counters::new() }; COUNT],
            exits: exits::Exits::new(),
            fields: fields::Shared::new(),
            vmptrld: vmptrld::Shared::new(),
            l2fields: l2fields::Shared::new(),
            nested_switch: nested_switch::Shared::new(),
        }
    }

    /// The counters of the path of this number, which must be one of [`PATHS`].
    #[inline(always)]
    pub(crate) fn path<const N: usize>(&self) -> &Counters {
        const { assert!(N < COUNT) };
        &self.paths[N]
    }

    /// As `path`, for a number that is not known at compile time.
    pub(crate) fn get(&self, path: usize) -> Option<&Counters> {
        self.paths.get(path)
    }
}

/// What vCPUs that are gone counted, and calls for which no state could be made.
static RETIRED: CounterSet = CounterSet::new();

/// Keeps the counts of a vCPU that goes away.
pub(crate) fn retire(counters: &CounterSet) {
    for (sum, n) in RETIRED.paths.iter().zip(&counters.paths) {
        sum.add(n);
    }
    RETIRED.exits.add(&counters.exits);
}

/// Sums the counters of one path over all vCPUs, present and gone.
pub(crate) fn total(path: usize) -> Counters {
    let sum = Counters::default();
    if let Some(gone) = RETIRED.get(path) {
        sum.add(gone);
    }
    crate::state::for_each_counters(|set| {
        if let Some(c) = set.get(path) {
            sum.add(c);
        }
    });
    sum
}

/// Sums the exit accounting over all vCPUs, present and gone.
pub(crate) fn total_exits() -> Result<KBox<exits::Exits>> {
    crate::alloc::MODULE.gate()?;
    let sum = KBox::new(exits::Exits::new(), GFP_KERNEL)?;
    sum.add(&RETIRED.exits);
    crate::state::for_each_counters(|set| sum.add(&set.exits));
    Ok(sum)
}

/// Counts a fallback of a call whose vCPU has no state.
pub(crate) fn count_stateless(path: usize, reason: usize) {
    if let Some(count) = RETIRED.get(path).and_then(|c| c.fallbacks.get(reason)) {
        count.add_shared(1);
    }
}

/// Most that paths allocate for one vCPU beside [`Local`], in bytes. Paths that are not named here allocate nothing.
pub(crate) const MOST: usize = fields::MOST + vmptrld::MOST + l2fields::MOST;

/// What each path remembers about a vCPU; touched only by the vCPU's thread.
pub(crate) struct Local {
    pub(crate) checks: checks::Memory,
    pub(crate) fields: fields::Memory,
    pub(crate) regions: vmptrld::Regions,
    pub(crate) l2fields: l2fields::Memory,
    pub(crate) prefault: prefault::Memory,
    pub(crate) direct: direct::Memory,
    pub(crate) nested_switch: nested_switch::Memory,
    pub(crate) run: run::Memory,
}

impl Local {
    /// Nothing yet.
    pub(crate) const NEW: Local = Local {
        checks: checks::Memory::NEW,
        fields: fields::Memory::NEW,
        regions: vmptrld::Regions::NEW,
        l2fields: l2fields::Memory::NEW,
        prefault: prefault::Memory::NEW,
        direct: direct::Memory::NEW,
        nested_switch: nested_switch::Memory::NEW,
        run: run::Memory::NEW,
    };

    /// Forgets everything that was concluded from the vCPU's configuration.
    pub(crate) fn invalidate(&mut self) {
        self.checks.clear();
        self.fields.reconsider();
        self.nested_switch.clear();
        self.run.forget();
    }
}
