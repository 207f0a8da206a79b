// SPDX-License-Identifier: GPL-2.0
//! kvm_init_shadow_ept_mmu(): which accesses fault by L1's EPT, and the role of EPT02.
//!
//! It is a function of a few bits of the EPT pointer and of mode-based execute control, and of what only an ioctl can change. KVM makes it anew
//! when it differs from the last one, as it does each time where L1 goes back and forth between two guests of which one has mode-based execute
//! control, or accessed and dirty flags. Here one is kept for each combination of the two, and put in place before the stock function looks,
//! which then has nothing to do but to find the root.

use super::{mismatch, takes_detour, Reason, NUMBER};
use crate::{
    hook::HookId,
    kvm::{mmu::EptState, Vcpu},
    path::{CounterSet, Local},
    policy::mode::Mode,
};
use core::sync::atomic::AtomicBool;
use kernel::prelude::*;

/// How many are kept.
const PLACES: usize = 4;
/// Bit 6 of the EPT pointer: accessed and dirty flags.
const ACCESSED_DIRTY: u32 = 1 << 6;

#[derive(Clone, Copy)]
struct Known {
    mode: Option<u32>,
    state: EptState,
}

/// What kvm_init_shadow_ept_mmu() made for the modes that were seen last.
pub(super) struct Memory([Known; PLACES]);

/// The place of a mode: of its two parts the flag of the pointer is in the low twelve bits, the control above.
fn place(mode: u32) -> usize {
    usize::from(mode & ACCESSED_DIRTY != 0) | usize::from(mode & !0xfff != 0) << 1
}

impl Memory {
    pub(super) const NEW: Memory = Memory(
        [Known {
            mode: None,
            state: EptState::EMPTY,
        }; PLACES],
    );

    pub(super) fn clear(&mut self) {
        for known in &mut self.0 {
            known.mode = None;
        }
    }

    #[inline(always)]
    fn get(&self, mode: u32) -> Option<&EptState> {
        let known = self.0.get(place(mode))?;
        (known.mode == Some(mode)).then_some(&known.state)
    }
}

/// nested_ept_new_eptp() is about to run: puts in place what it is about to make. Returns whether `learn` has to be called
/// afterwards.
#[inline(always)]
pub(in crate::path) fn prime(local: &mut Local, vcpu: Vcpu, counters: &CounterSet) -> bool {
    let all = &mut local.nested_switch;
    let (Some(mode), Mode::On) = (vcpu.ept_mode(), super::mode(HookId::NEW_EPTP)) else {
        return super::mode(HookId::NEW_EPTP) == Mode::Check;
    };
    let Some(known) = all.ept_mmu.get(mode) else {
        return true;
    };
    let count = counters.path::<NUMBER>();
    if !known.has_mode_of(vcpu) && !takes_detour(&mut all.detour, count) {
        known.restore(vcpu);
        count.taken.bump();
    }
    false
}

static REPORTED: AtomicBool = AtomicBool::new(false);

/// The stock function has made it: remembers or compares.
#[cold]
#[inline(never)]
pub(in crate::path) fn learn(local: &mut Local, vcpu: Vcpu, counters: &CounterSet) {
    let Some(mode) = vcpu.ept_mode() else { return };
    let count = counters.path::<NUMBER>();
    let memory = &mut local.nested_switch.ept_mmu;
    match memory.get(mode) {
        Some(known) => {
            count.checked.bump();
            if !known.is_current(vcpu) && mismatch(count, &REPORTED) {
                pr_warn!(
                    "nested_switch: kvm_init_shadow_ept_mmu() made something else for {mode:#x}\n"
                );
            }
        }
        None => count.fall_back(Reason::New as usize),
    }
    if let Some(known) = memory.0.get_mut(place(mode)) {
        known.mode = Some(mode);
        known.state.save(vcpu);
    }
}
