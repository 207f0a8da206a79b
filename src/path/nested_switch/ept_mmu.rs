// SPDX-License-Identifier: GPL-2.0
//! kvm_init_shadow_ept_mmu(): which accesses fault by L1's EPT, and the role of EPT02.
//!
//! It is a function of a few bits of the EPT pointer and of mode-based execute control, and of what only an ioctl can change. KVM makes it anew
//! when it differs from the last one, as it does each time where L1 goes back and forth between two guests of which one has mode-based execute
//! control, or accessed and dirty flags. Here one is kept for each combination of the two, and put in place before the stock function looks,
//! which then has nothing to do but to find the root.

use super::{mismatch, takes_detour, Memory as All, Reason, NUMBER};
use crate::{
    kvm::{mmu::EptState, Vcpu},
    path::{CounterSet, Counters, Local},
    policy::{controls::secondary::MBEC, ept::EPTP_FLAGS, mode::Mode},
};
use core::sync::atomic::AtomicBool;
use kernel::prelude::*;

/// How many are kept.
const PLACES: usize = 4;
/// Mode-based execute control in a mode (`Vcpu::ept_mode`), which has the low bits of the EPT pointer as well.
const MODE_BASED: u64 = (MBEC as u64) << 8;

#[derive(Clone, Copy)]
struct Known {
    mode: Option<u64>,
    state: EptState,
}

/// What kvm_init_shadow_ept_mmu() made for the modes that were seen last.
pub(super) struct Memory([Known; PLACES]);

/// The place of a mode.
fn place(mode: u64) -> usize {
    usize::from(mode & EPTP_FLAGS != 0) | usize::from(mode & MODE_BASED != 0) << 1
}

/// The mode of the current vmcs12; `None` without EPT.
#[inline(always)]
fn mode_of(vcpu: Vcpu) -> Option<u64> {
    vcpu.vmcs12().map(Vcpu::ept_mode).filter(|&mode| mode != 0)
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
    fn get(&self, mode: u64) -> Option<&EptState> {
        let known = self.0.get(place(mode))?;
        (known.mode == Some(mode)).then_some(&known.state)
    }
}

/// Puts in place what kvm_init_shadow_ept_mmu() would make for this vmcs12, if that is known and not there. `None` if it is not known.
#[inline(always)]
pub(super) fn put(all: &mut All, vcpu: Vcpu, count: &Counters) -> Option<()> {
    let known = all.ept_mmu.get(mode_of(vcpu)?)?;
    if !known.has_mode_of(vcpu) && !takes_detour(&mut all.detour, count) {
        known.restore(vcpu);
        count.taken.bump();
    }
    Some(())
}

/// nested_ept_new_eptp() is about to run: puts in place what it is about to make. Returns whether `learn` has to be called
/// afterwards.
#[inline(always)]
pub(in crate::path) fn prime(local: &mut Local, vcpu: Vcpu, counters: &CounterSet) -> bool {
    match super::mode() {
        Mode::Off => false,
        Mode::Check => true,
        Mode::On => put(&mut local.nested_switch, vcpu, counters.path::<NUMBER>()).is_none(),
    }
}

static REPORTED: AtomicBool = AtomicBool::new(false);

/// The stock function has made it: remembers or compares.
#[cold]
#[inline(never)]
pub(in crate::path) fn learn(local: &mut Local, vcpu: Vcpu, counters: &CounterSet) {
    let Some(mode) = mode_of(vcpu) else { return };
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
