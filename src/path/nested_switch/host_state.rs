// SPDX-License-Identifier: GPL-2.0
//! load_vmcs12_host_state(): L2 has exited, and vmcs01 and KVM's registers get what vmcs12 says L1 shall find.
//!
//! The stock function works for every kind of L1 and calls the general function for each register. Here it is the
//! plain case: an L1 in 64-bit mode, on a KVM with EPT and unrestricted guest, without MSR lists, performance
//! counters, CET, or breakpoints of user space. What KVM makes of L1's CR0 and CR4 is taken from the last time that
//! the stock function loaded the same two; EFER and the paging must be known to the other two parts.

use super::{ensure, mismatch, mode, takes_detour, Reason, NUMBER};
#[cfg(MTK_GVA_WALK)]
use crate::kvm::roots::Root;
use crate::{
    bindings,
    hook::{CallId, Continuation, HookId, InFlight, Verdict},
    kvm::{host_state::ControlRegisters, vmcs12::field, Vcpu, Vmcs12},
    layout,
    path::{CounterSet, Local},
    policy::{host_state::Plan, mode::Mode, role::Key},
    state,
};
use core::sync::atomic::{AtomicBool, Ordering};
use kernel::prelude::*;

const HOOK: HookId = HookId::LOAD_HOST_STATE;

/// kvm_intel uses EPT and unrestricted guest.
static ABLE: AtomicBool = AtomicBool::new(false);

/// Reads what this needs to know about kvm_intel, each time it has been loaded.
pub(super) fn prepare() {
    let able = layout::module_flag("kvm_intel", "ept")
        && layout::module_flag("kvm_intel", "unrestricted_guest");
    ABLE.store(able, Ordering::Relaxed);
}

/// Whether kvm_intel uses EPT and unrestricted guest.
#[inline(always)]
pub(super) fn is_able() -> bool {
    ABLE.load(Ordering::Relaxed)
}

/// What is kept for one vCPU.
pub(super) struct Memory {
    known: Option<ControlRegisters>,
}

impl Memory {
    pub(super) const NEW: Memory = Memory { known: None };

    pub(super) fn clear(&mut self) {
        self.known = None;
    }
}

/// The plan for this exit, if it is one for us.
#[inline(always)]
fn plan(vcpu: Vcpu, m: Vmcs12, memory: &super::Memory) -> Result<(Plan, Key), Reason> {
    let plan = vcpu.host_state_inputs(m).plan().ok_or(Reason::Unusual)?;
    let known = memory.host_state.known.as_ref().ok_or(Reason::New)?;
    if !is_able() || !vcpu.can_load_host_state(m, known) {
        return Err(Reason::Unusual);
    }
    let key = vcpu
        .mmu_key_of(field!(m, host_cr0), field!(m, host_cr4), plan.efer)
        .ok_or(Reason::Unusual)?;
    Ok((plan, key))
}

/// The root of L0's own table for L1, if the handler below will load what this vmcs12 says, while L2 has just exited and nothing has been done about it.
#[cfg(MTK_GVA_WALK)]
#[inline(always)]
pub(super) fn root_to_load(vcpu: Vcpu, m: Vmcs12, memory: &super::Memory) -> Option<Root> {
    let plan = vcpu.host_state_inputs(m).plan()?;
    let known = memory.host_state.known.as_ref()?;
    if !is_able() || !vcpu.will_load_host_state(m, known) {
        return None;
    }
    let key = vcpu.mmu_key_of(field!(m, host_cr0), field!(m, host_cr4), plan.efer)?;
    let paging = memory.mmu.get(key)?;
    memory.efer.get(vcpu, plan.efer)?;
    vcpu.root_of_role(paging.root_role())
}

/// Loads what this vmcs12 says, if it is one for us. `always`: it was looked at before, and is not sent to the stock code.
///
/// # Safety
///
/// In the handler of load_vmcs12_host_state().
#[inline(always)]
unsafe fn load(
    vcpu: Vcpu,
    m: Vmcs12,
    local: &mut Local,
    counters: &CounterSet,
    always: bool,
) -> Option<()> {
    let memory = &mut local.nested_switch;
    let (plan, key) = plan(vcpu, m, memory).ok()?;
    let known = memory.host_state.known.as_ref()?;
    let paging = memory.mmu.get(key)?;
    let count = counters.path::<NUMBER>();
    let efer = memory.efer.get(vcpu, plan.efer)?;
    if !always && takes_detour(&mut memory.detour, count) {
        return None;
    }
    // SAFETY: `plan` has asked all that is to be asked, and vmcs01 is current.
    unsafe {
        efer.apply(vcpu);
        vcpu.load_host_state(m, plan, known);
    }
    paging.restore(vcpu, key.is_nested());
    count.taken.bump();
    // SAFETY: In this handler, and `load_host_state` has loaded the register.
    unsafe { memory.debugctl.loaded(vcpu, counters) };
    local.run.switched();
    Some(())
}

/// `root_to_load` has said what `load` did not keep: a mistake here, which the stock code makes good.
#[cfg(MTK_GVA_WALK)]
#[cold]
fn report_undone(vcpu: Vcpu) {
    static REPORTED: AtomicBool = AtomicBool::new(false);
    state::with(vcpu, |_, counters| {
        if mismatch(counters.path::<NUMBER>(), &REPORTED) {
            pr_warn!("nested_switch: an exit of L2 was begun that could not be ended\n");
        }
    });
}

/// Handler of load_vmcs12_host_state().
#[no_mangle]
extern "C" fn mtk_on_load_host_state(
    raw: *mut bindings::kvm_vcpu,
    vmcs12: *mut bindings::vmcs12,
    cont: Continuation,
) -> Verdict {
    // SAFETY: The hooked function's own arguments, in its handler.
    let (vcpu, m) = unsafe { (Vcpu::from_hook(raw), Vmcs12::from_hook(vmcs12)) };
    // Within KVM's inner loop it has been decided, whatever the mode is by now.
    #[cfg(MTK_GVA_WALK)]
    if let Some(root) = state::with(vcpu, |local, _| local.run.leaving.take()).flatten() {
        let done = state::with(vcpu, |local, counters| {
            // SAFETY: In this very handler.
            unsafe { load(vcpu, m, local, counters, true) }
        });
        if done.flatten().is_some() {
            // SAFETY: It was looked for in the same handler of vmx_vcpu_run(), for this exit. The other function as stock calls it.
            unsafe {
                vcpu.use_root(root);
                CallId::TRANSITION_FLUSH.call([vcpu.key(), m.as_ptr() as usize, 0]);
            }
            return Verdict::handled(0);
        }
        report_undone(vcpu);
    }
    match mode() {
        Mode::Off => return Verdict::STOCK,
        Mode::Check => (),
        Mode::On => {
            // kvm_mmu_new_pgd() takes a lock that sleeps in a real-time kernel.
            let section = InFlight::enter(HOOK);
            let done = state::with(vcpu, |local, counters| {
                // SAFETY: In this very handler.
                unsafe { load(vcpu, m, local, counters, false) }
            });
            if let Some(Some(())) = done {
                let cr3 = field!(m, host_cr3) as usize;
                // SAFETY: As the stock function calls them at this point, with its own arguments.
                unsafe {
                    CallId::NEW_PGD.call([vcpu.key(), cr3]);
                    CallId::TRANSITION_FLUSH.call([vcpu.key(), m.as_ptr() as usize, 0]);
                }
                drop(section);
                return Verdict::handled(0);
            }
        }
    }
    load_slowly(vcpu, m, cont)
}

static REPORTED: AtomicBool = AtomicBool::new(false);

/// Lets the stock code do it, and remembers or compares.
#[cold]
#[inline(never)]
fn load_slowly(vcpu: Vcpu, m: Vmcs12, cont: Continuation) -> Verdict {
    let section = InFlight::enter(HOOK);
    // Here L2 has just been left, or was not quite entered.
    let before = if ensure(vcpu, &section) {
        state::with(vcpu, |local, _| plan(vcpu, m, &local.nested_switch))
    } else {
        None
    };
    // SAFETY: This handler's continuation and the hooked function's own arguments.
    unsafe { section.call_stock(cont, [vcpu.key(), m.as_ptr() as usize, 0]) };
    state::with(vcpu, |local, counters| {
        let count = counters.path::<NUMBER>();
        let memory = &mut local.nested_switch.host_state;
        match (before, memory.known.as_ref()) {
            (Some(Ok((plan, _))), Some(known)) => {
                count.checked.bump();
                if let Err(field) = vcpu.compare_host_state(m, plan, known) {
                    if mismatch(count, &REPORTED) {
                        pr_warn!(
                            "nested_switch: load_vmcs12_host_state() left something else in field {field:#x} (0: in KVM) for {plan:x?}, {known:x?}\n"
                        );
                    }
                }
            }
            (Some(Err(reason)), _) => count.fall_back(reason as usize),
            _ => count.fall_back(Reason::New as usize),
        }
        memory.known = vcpu
            .loaded_control_registers(m)
            .filter(|_| vcpu.host_state_inputs(m).plan().is_some());
    });
    Verdict::handled(0)
}
