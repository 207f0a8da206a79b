// SPDX-License-Identifier: GPL-2.0
//! What is kept for one vCPU: what is known of its L1, and which fields are to be shadowed for it. `super::shadow` does the copying.

use super::{extension::Extension, knobs, BUDGET};
use crate::{
    bindings,
    kvm::{
        fields::{Class, Number, FIELDS},
        nested::Pages,
        Vcpu,
    },
    path::learned::Published,
    policy::{
        learn::{Config, Learner},
        set::Set,
    },
};
use core::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use kernel::{current, prelude::*};

/// What another thread may know about a vCPU.
pub(crate) struct Shared {
    /// vmcs01 has our bitmaps and the shadow VMCS the learned fields.
    pub(super) extended: AtomicBool,
    /// The thread that ran the vCPU last, by its number in the initial namespace.
    pub(super) thread: AtomicI32,
    /// What is shadowed beside the stock list.
    pub(crate) learned: Published,
}

impl Shared {
    pub(crate) const fn new() -> Self {
        Self {
            extended: AtomicBool::new(false),
            thread: AtomicI32::new(0),
            learned: Published::new(),
        }
    }

    pub(crate) fn is_extended(&self) -> bool {
        self.extended.load(Ordering::Relaxed)
    }

    /// Notes that the current thread runs the vCPU.
    #[inline(always)]
    pub(crate) fn note_thread(&self) {
        self.thread.store(current!().pid(), Ordering::Relaxed);
    }

    /// The thread that ran the vCPU last, by its number in the initial namespace.
    pub(crate) fn thread(&self) -> i32 {
        self.thread.load(Ordering::Relaxed)
    }
}

/// What is known of the guest state that KVM leaves in vmcs02 (class `Late` of the field table).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Late {
    /// Nothing.
    Unread,
    /// vmcs12 has it, since L2's exit.
    Read,
    /// The same in mode `check`, for which KVM is left to fetch it again; what stands for the values.
    Compare(u64),
}

/// What is kept for one vCPU.
pub(crate) struct Memory {
    pub(super) learner: Learner,
    /// The same for the stock list: which of its fields L1 uses.
    pub(super) stock: Learner,
    /// Which of the administrator's rules the learner has; 0 if others may be due.
    pub(super) rules: u32,
    /// Fields that KVM was found to know.
    known: Set,
    pub(super) extension: Option<Pin<KBox<Extension>>>,
    /// The stock bitmaps could not be explained, or a shadow VMCS could not be loaded: nothing is learned any
    /// more.
    pub(super) unfit: bool,
    /// The learned set is not what the lists and bitmaps say.
    pub(super) stale: bool,
    /// The bitmaps were made in mode `check`, so that vmcs12 has what L1 writes to learned fields,
    /// whatever the mode is by now.
    pub(super) checking: bool,
    /// In mode `check`: fields that L1 wrote since the last copy, which the shadow VMCS lacks.
    pub(super) written: Set,
    /// L1 has not entered L2 since the vCPU is extended, so that it is about to write most fields, and all that may be are shadowed:
    /// these.
    pub(super) beginning: Option<Set>,
    /// Since L1 last ran the processor has been told that VMCSs may have changed, see `left_l2`.
    pub(super) announced: bool,
    /// The shadow VMCS that had just been copied to its vmcs12 when L1 entered L2: unless something else comes between, KVM
    /// changes nothing in that vmcs12 but what L2 returns. Null without one.
    pub(super) entered_with: *const bindings::vmcs,
    pub(super) late: Late,
}

// SAFETY: The pointer is compared and never followed.
unsafe impl Send for Memory {}

impl Memory {
    pub(crate) const NEW: Memory = Memory {
        learner: Learner::new(Config::new(BUDGET)),
        stock: Learner::new(Config::new(u8::MAX)),
        rules: 0,
        known: Set::EMPTY,
        extension: None,
        unfit: false,
        stale: true,
        checking: false,
        written: Set::EMPTY,
        beginning: None,
        announced: false,
        entered_with: core::ptr::null(),
        late: Late::Unread,
    };

    /// Whether a field of this class may be shadowed for this L1.
    pub(super) fn may_shadow(&self, vcpu: Vcpu, class: Class) -> bool {
        let drops_reserved = || {
            self.extension
                .as_ref()
                .is_some_and(|e| e.drops_reserved == Some(true))
        };
        match class {
            _ if self.unfit => false,
            Class::Plain | Class::Aside | Class::Returned | Class::Late => true,
            Class::AccessRights | Class::LateAccessRights => drops_reserved(),
            Class::ExitInformation => vcpu.may_write_any_field(),
            Class::Seen => false,
        }
    }

    /// Those of some fields that KVM knows.
    pub(super) fn known_of(&mut self, fields: &Set) -> Set {
        let mut known = *fields;
        for number in fields.iter() {
            if !self.knows(number) {
                known.remove(number);
            }
        }
        known
    }

    /// Whether KVM knows the field; one that it does not know is never shadowed.
    pub(super) fn knows(&mut self, number: Number) -> bool {
        if self.known.has(number) {
            return true;
        }
        let knows = super::kvm_knows(number);
        if knows {
            self.known.insert(number);
        } else {
            self.learner.bar(number);
        }
        knows
    }

    /// Takes an extension that `Extension::new` has just made.
    pub(super) fn adopt(&mut self, extension: Option<Pin<KBox<Extension>>>) {
        self.unfit = extension.is_none();
        if let Some(ext) = &extension {
            self.stock = Learner::with(Config::new(u8::MAX), ext.optional);
            self.rules = 0;
            self.beginning = Some(Set::EMPTY);
        }
        self.extension = extension;
        self.stale = true;
    }

    /// Whether the stock code shadows a field that exits here.
    pub(super) fn is_left_out(&self, number: Number) -> bool {
        self.extension
            .as_ref()
            .is_some_and(|ext| ext.left_out.has(number))
    }

    /// L1 has entered its guest and come back.
    #[inline(always)]
    pub(super) fn switched(&mut self) {
        self.stale |= self.learner.switched() | self.stock.switched();
    }

    /// The shadow VMCS of `pages` was copied, for L1 is entering L2.
    #[inline(always)]
    pub(super) fn enter_l2(&mut self, pages: Pages) {
        self.entered_with = pages.shadow;
        if self.beginning.is_some() {
            self.beginning = None;
            self.stale = true;
        }
    }

    /// The fields that are shadowed beside the stock list.
    pub(super) fn shadowed(&self) -> Set {
        let learned = self.learner.learned();
        self.beginning.map_or(*learned, |all| all.or(learned))
    }

    /// Nothing is known of any vmcs12 any more: KVM frees them all, and may have others at the same addresses.
    #[inline(always)]
    pub(in crate::path) fn forget_entry(&mut self) {
        self.entered_with = core::ptr::null();
        self.late = Late::Unread;
    }

    /// Shadow VMCSs are read and written in their regions, see `kvm::region`.
    #[inline(always)]
    pub(in crate::path) fn are_in_region(&self) -> bool {
        self.extension.as_ref().is_some_and(|ext| ext.in_region)
    }

    /// What follows from the vCPU's configuration must be found out anew.
    pub(crate) fn reconsider(&mut self) {
        self.rules = 0;
    }

    /// Follows the administrator's rules. The learned set may change.
    #[inline(always)]
    pub(super) fn obey(&mut self, vcpu: Vcpu) {
        if self.rules != knobs::generation() {
            self.follow(vcpu);
        }
    }

    #[cold]
    fn follow(&mut self, vcpu: Vcpu) {
        let (mut config, rules) = knobs::rules();
        self.rules = rules;
        for (number, field) in (0..).zip(FIELDS) {
            if !self.may_shadow(vcpu, field.class) {
                // L1's rights may have changed since the field was learned.
                config.forbidden.insert(number);
            } else if config.pinned.has(number) && !self.knows(number) {
                config.pinned.remove(number);
            }
        }
        if self.beginning.is_some() {
            let mut all = Set::EMPTY;
            for (number, field) in (0..).zip(FIELDS) {
                // Without a budget the path does nothing.
                let wanted = config.budget != 0 && field.class != Class::Seen;
                if wanted && !config.forbidden.has(number) && self.knows(number) {
                    all.insert(number);
                }
            }
            self.beginning = Some(all);
            self.stale = true;
        }
        self.stale |= self.learner.configure(config);
        if let Some(ext) = &self.extension {
            // Without a budget the path does nothing.
            let always = match config.budget {
                0 => ext.optional,
                _ => config.pinned.and(&ext.optional),
            };
            let stock = Config {
                budget: u8::MAX,
                pinned: always,
                forbidden: Set::EMPTY,
                eager: true,
                ..config
            };
            self.stale |= self.stock.configure(stock);
        }
    }

    /// Whether vmcs12 has what L1 writes to learned fields, as in mode `check`.
    pub(crate) fn is_checking(&self) -> bool {
        self.checking
    }

    /// Runs `f` with preemption off; `None` if the vCPU is not extended.
    pub(crate) fn quietly<R>(&self, f: impl FnOnce() -> R) -> Option<R> {
        let ext = self.extension.as_ref()?;
        let guard = ext.quiet.lock();
        let result = f();
        drop(guard);
        Some(result)
    }
}
