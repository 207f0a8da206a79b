// SPDX-License-Identifier: GPL-2.0
//! kvm_init_mmu(): which accesses of the guest fault by its own page tables, and the role of L0's.
//!
//! KVM keeps one description of it for L1 and L2 (7.3 for the walk of the guest's tables, every version for L0's
//! own tables where L2 has no EPT), so that each switch makes it anew, 1,300 instructions of bit masks. It is a
//! function of the paging mode and of what only an ioctl can change (CPUID, for which the whole memory is thrown
//! away); so one description is kept for each of L1, L2 without EPT and L2 with EPT.

use super::{ensure, mismatch, mode, takes_detour, Reason, NUMBER};
use crate::{
    bindings,
    hook::{Continuation, HookId, InFlight, Verdict},
    kvm::{mmu::MmuState, Vcpu},
    policy::{
        mode::Mode,
        role::{Key, PLACES},
    },
    state,
};
use core::sync::atomic::AtomicBool;
use kernel::prelude::*;

const HOOK: HookId = HookId::INIT_MMU;

#[derive(Clone, Copy)]
struct Known {
    key: Option<Key>,
    state: MmuState,
}

/// What kvm_init_mmu() made for the paging modes that were seen last.
pub(super) struct Memory([Known; PLACES]);

impl Memory {
    pub(super) const NEW: Memory = Memory(
        [Known {
            key: None,
            state: MmuState::EMPTY,
        }; PLACES],
    );

    pub(super) fn clear(&mut self) {
        for known in &mut self.0 {
            known.key = None;
        }
    }

    #[inline(always)]
    pub(super) fn get(&self, key: Key) -> Option<&MmuState> {
        let known = self.0.get(key.place())?;
        (known.key == Some(key)).then_some(&known.state)
    }
}

/// Handler of kvm_init_mmu().
#[no_mangle]
extern "C" fn mtk_on_init_mmu(raw: *mut bindings::kvm_vcpu, cont: Continuation) -> Verdict {
    // SAFETY: The hooked function's own argument. A vCPU of another kind (TDX) never gets
    // a state, and until then nothing is read that is not in every `struct kvm_vcpu`.
    let vcpu = unsafe { Vcpu::from_hook(raw) };
    let mode = mode();
    if mode == Mode::On {
        let hit = state::with(vcpu, |local, counters| {
            let memory = &mut local.nested_switch;
            let key = vcpu.mmu_key()?;
            let known = memory.mmu.get(key)?;
            let count = counters.path::<NUMBER>();
            if takes_detour(&mut memory.detour, count) {
                return None;
            }
            known.restore(vcpu, key.is_nested());
            count.taken.bump();
            Some(())
        });
        if let Some(Some(())) = hit {
            return Verdict::handled(0);
        }
    }
    if mode == Mode::Off {
        return Verdict::STOCK;
    }
    init_slowly(vcpu, cont)
}

static REPORTED: AtomicBool = AtomicBool::new(false);

/// Lets the stock code do it, and remembers or compares.
#[cold]
#[inline(never)]
fn init_slowly(vcpu: Vcpu, cont: Continuation) -> Verdict {
    let section = InFlight::enter(HOOK);
    if !ensure(vcpu, &section) {
        return Verdict::STOCK;
    }
    let key = vcpu.mmu_key();
    // SAFETY: This handler's continuation and the hooked function's own argument.
    unsafe { section.call_stock(cont, [vcpu.key(), 0, 0]) };
    state::with(vcpu, |local, counters| {
        let count = counters.path::<NUMBER>();
        let memory = &mut local.nested_switch.mmu;
        let Some(key) = key else {
            // After a mode with five levels the description of four-level paging differs in what nobody looks at.
            memory.clear();
            count.fall_back(Reason::Unusual as usize);
            return;
        };
        let nested = key.is_nested();
        match memory.get(key) {
            Some(known) => {
                count.checked.bump();
                if !known.is_current(vcpu, nested) && mismatch(count, &REPORTED) {
                    pr_warn!("nested_switch: kvm_init_mmu() made something else for {key:x?}\n");
                }
            }
            None => {
                let anything = memory
                    .0
                    .get(key.place())
                    .is_some_and(|known| known.key.is_some());
                let reason = if anything {
                    Reason::Changed
                } else {
                    Reason::New
                };
                count.fall_back(reason as usize);
            }
        }
        if let Some(known) = memory.0.get_mut(key.place()) {
            known.key = Some(key);
            known.state.save(vcpu, nested);
        }
    });
    Verdict::handled(0)
}
