// SPDX-License-Identifier: GPL-2.0
//! VMCS shadowing for a hypervisor in L2: its VMREADs and VMWRITEs are served by the processor where its L1
//! wants them served without an exit.
//!
//! L1 turns VMCS shadowing on for L2, gives it bitmaps and a shadow VMCS. Stock KVM lets every VMREAD and VMWRITE
//! of L2 exit, and reads or writes its own copy of that shadow VMCS, which it fetches from L1's memory when L2 is
//! entered and writes back when L2 exits.
//!
//! This path gives vmcs02 a shadow VMCS and bitmaps of its own: an access exits unless L1's bitmap lets it pass,
//! read anew on each entry, and it is one of the fields that this L2 was seen to use (`policy::learn`). The fields
//! are copied from KVM's copy after nested_vmx_run() has fetched it, and back before sync_vmcs02_to_vmcs12(), which
//! comes before everything that looks at it: the write to L1's memory and KVM_GET_NESTED_STATE.
//!
//! Of the copies that stock KVM makes of the whole page on each switch those are left out that would change nothing
//! ([`copies`]).
//!
//! L2s that are entered in another way (KVM_SET_NESTED_STATE, RSM) run on stock code until L1 enters them again.

pub(super) mod copies;
mod memory;

pub(crate) use memory::Memory;
pub(super) use memory::MOST;

use super::{learned::Published, CounterSet, Counters, Local, Path};
#[cfg(MTK_GVA_WALK)]
use crate::kvm::{vmcs12::field, Vmcs12};
use crate::{
    bindings,
    hook::{CallId, Continuation, HookId, InFlight, Verdict},
    kvm::{
        fields::{self, Number, FIELDS},
        Held, Vcpu,
    },
    policy::mode::Mode,
    state,
};
use core::sync::atomic::{AtomicBool, Ordering};
use kernel::{c_str, prelude::*};

/// This path's number in `PATHS`.
const NUMBER: usize = 3;

pub(super) const PATH: Path = Path {
    name: c_str!("l2fields"),
    about: c_str!("VMREAD and VMWRITE of a hypervisor in L2 do not exit"),
    hooks: &[
        HookId::FREE_NESTED,
        HookId::SYNC_VMCS02,
        HookId::HANDLE_VMREAD,
        HookId::HANDLE_VMWRITE,
        HookId::NESTED_RUN,
        HookId::VCPU_PUT,
        HookId::HANDLE_VMPTRLD,
        HookId::HANDLE_VMCLEAR,
        HookId::READ_CACHED,
        HookId::WRITE_CACHED,
    ],
    guest_hooks: &[],
    extra_hooks: &[],
    calls: &[
        CallId::VCPU_LOAD,
        CallId::VCPU_PUT,
        CallId::WAKE_UP,
        CallId::LOAD_VMCS,
        CallId::FIELD_OFFSET,
        CallId::GFN_TO_MEMSLOT,
    ],
    drain: Some(drain),
    drain_hooks: &[HookId::ENTER_GUEST],
    reasons: &[
        "no_memory",
        "unknown_field",
        "never",
        "learning",
        "copy_new",
        "copy_changed",
        "copy_unusual",
        "detour",
    ],
    knobs: &[],
};

/// Why an access of L2, or a copy, was left to the stock code; names in `PATH.reasons`.
#[derive(Clone, Copy)]
enum Reason {
    /// No memory for the tables.
    NoMemory,
    /// L2 named a field that vmcs12 does not have.
    UnknownField,
    /// A field that the processor cannot serve as KVM does.
    Never,
    /// A field that is not, or not yet, worth serving.
    Learning,
    /// Nothing is known of what KVM's copy of L2's shadow VMCS and the page hold, or may be known.
    CopyNew,
    /// The page or the copy may have changed.
    CopyChanged,
    /// The page cannot be written.
    CopyUnusual,
    /// The test knob wants it so.
    Detour,
}

/// What another thread may know about a vCPU.
pub(crate) struct Shared {
    serving: AtomicBool,
    /// What L2 is served, if anything.
    pub(crate) learned: Published,
}

impl Shared {
    pub(crate) const fn new() -> Self {
        Self {
            serving: AtomicBool::new(false),
            learned: Published::new(),
        }
    }

    /// The processor serves the vCPU's L2.
    pub(super) fn is_serving(&self) -> bool {
        self.serving.load(Ordering::Acquire)
    }
}

/// The path's mode.
#[inline(always)]
fn mode() -> Mode {
    super::mode(NUMBER)
}

fn publish(local: &Local, shared: &CounterSet) {
    let serving = local.l2fields.is_serving();
    shared
        .l2fields
        .learned
        .publish(local.l2fields.learner.learned());
    if shared.l2fields.serving.load(Ordering::Relaxed) != serving {
        // Whoever gives the vCPU back may have to send its thread out of KVM_RUN.
        shared.fields.note_thread();
        shared.l2fields.serving.store(serving, Ordering::Release);
    }
}

/// L2 has made an access that exited and is not L1's to see. Returns whether `renew` must be called after the access was
/// carried out: the field is to be served from now on, or was already.
pub(super) fn accessed(vcpu: Vcpu, id: HookId, encoding: u64) -> bool {
    if mode() == Mode::Off {
        return false;
    }
    let section = InFlight::enter(id);
    if !state::ensure(vcpu, &section) {
        super::count_stateless(NUMBER, Reason::NoMemory as usize);
        return false;
    }
    let joined = state::with(vcpu, |local, counters| {
        let count = counters.path::<NUMBER>();
        let memory = &mut local.l2fields;
        let reason = match fields::by_encoding(encoding) {
            None => Reason::UnknownField,
            Some(_) if !memory.make_tables(vcpu) => Reason::NoMemory,
            // L1 has changed its bitmaps since it entered L2. KVM reads and writes its copy, so that has to be up to date, and
            // what the processor has anew afterwards.
            Some(number) if memory.is_serving() && memory.learner.learned().has(number) => {
                // SAFETY: L2 has exited and not to L1, so that vmcs02 is loaded.
                unsafe {
                    memory.save(vcpu);
                    memory.stop(vcpu);
                }
                publish(local, counters);
                return true;
            }
            Some(number) if memory.may_serve(number) => {
                let joined = memory.learner.touched(number, false);
                if joined && !super::fields::kvm_knows(number) {
                    memory.learner.bar(number);
                }
                memory.stale |= joined;
                count.fall_back(Reason::Learning as usize);
                return joined;
            }
            Some(_) => Reason::Never,
        };
        count.fall_back(reason as usize);
        false
    });
    joined == Some(true)
}

/// Has the processor serve what was learned, without waiting for the next entry by L1: a hypervisor may touch
/// many fields before it leaves.
///
/// `_section` stands for a handler that may sleep, in an exit of L2.
#[cold]
pub(super) fn renew(vcpu: Vcpu, _section: &InFlight) {
    let (Some(bitmaps), Mode::On) = (vcpu.shadowing_for_l2(), mode()) else {
        return;
    };
    state::with(vcpu, |local, counters| {
        // SAFETY: L2 has exited and not to L1, so that vmcs02 is loaded and KVM's copy of L2's shadow VMCS is
        // complete but for what is served.
        unsafe {
            local.l2fields.save(vcpu);
            local.l2fields.stop(vcpu);
            local.l2fields.serve(vcpu, bitmaps, false);
        }
        publish(local, counters);
    });
}

/// Whether VMLAUNCH or VMRESUME concerns this path.
#[inline(always)]
pub(super) fn has_learned(local: &Local) -> bool {
    local.l2fields.is_serving() || !local.l2fields.learner.is_idle()
}

/// L1 has made a VMLAUNCH or VMRESUME, which is yet to be carried out.
pub(super) fn before_entry(vcpu: Vcpu, local: &mut Local, counters: &CounterSet) {
    if !local.l2fields.is_serving() {
        return;
    }
    // The last entry failed in the processor, so that nobody looked at the shadow VMCS.
    // SAFETY: L1 has exited, so the vCPU is loaded by this task.
    unsafe { local.l2fields.stop(vcpu) };
    publish(local, counters);
}

/// It was carried out.
pub(super) fn entered(vcpu: Vcpu, local: &mut Local, counters: &CounterSet) {
    let mode = mode();
    let (Some(bitmaps), true) = (vcpu.shadowing_for_l2(), mode != Mode::Off) else {
        return;
    };
    let memory = &mut local.l2fields;
    memory.stale |= memory.learner.switched();
    if mode == Mode::On {
        // SAFETY: nested_vmx_run() has entered L2 and fetched its shadow VMCS.
        unsafe { memory.serve(vcpu, bitmaps, true) };
        if memory.is_serving() {
            counters.path::<NUMBER>().taken.bump();
        }
    }
    publish(local, counters);
}

/// L1 is about to enter L2: makes KVM's copy of L2's shadow VMCS what the page in L1's memory is, ahead of time and without waiting. `false` if KVM has to do it.
///
/// With KVM's SRCU lock held, in KVM_RUN.
#[cfg(MTK_GVA_WALK)]
#[inline(always)]
pub(super) fn read_ahead(vcpu: Vcpu, m: Vmcs12, local: &mut Local) -> bool {
    let address = field!(m, vmcs_link_pointer);
    if !m.has_shadow_vmcs() || address == u64::MAX {
        return true;
    }
    // SAFETY: By this function's contract nobody else uses the copy: L2 does not run.
    mode() == Mode::On && unsafe { copies::read_ahead(vcpu, address, &mut local.l2fields.known) }
}

/// L1 has not entered L2 after all. It may fail to, and what it does to the page then need not be announced: only of one that it has entered L2 with it is known.
#[cfg(MTK_GVA_WALK)]
#[cold]
pub(super) fn not_entered(local: &mut Local) {
    local.l2fields.known.forget();
}

/// L1 has entered L2 by a VMRESUME for which `read_ahead` said yes.
///
/// # Safety
///
/// As for `Memory::serve`.
#[cfg(MTK_GVA_WALK)]
#[inline(always)]
pub(super) unsafe fn entered_ahead(vcpu: Vcpu, local: &mut Local, counters: &CounterSet) {
    if vcpu.has_l2_shadow() {
        local.l2fields.known.enter();
        counters.path::<NUMBER>().taken.bump();
        if has_learned(local) {
            entered(vcpu, local, counters);
        }
    }
}

/// L2 is about to exit to L1: has what it has written to its shadow VMCS in the page in L1's memory, ahead of time and without waiting. `false`: KVM has to do it, and
/// finds everything as it was, or up to date.
///
/// # Safety
///
/// vmcs02 is loaded on this CPU by the current task; with KVM's SRCU lock held, in KVM_RUN.
#[cfg(MTK_GVA_WALK)]
#[inline(always)]
pub(super) unsafe fn write_ahead(vcpu: Vcpu, m: Vmcs12, local: &mut Local) -> bool {
    if !vcpu.has_l2_shadow() {
        return true;
    }
    if mode() != Mode::On || vcpu.shadow_page_address() != field!(m, vmcs_link_pointer) {
        return false;
    }
    // SAFETY: By this function's contract.
    unsafe { local.l2fields.write_ahead(vcpu) }
}

/// The exit for which `write_ahead` said yes has been made. If KVM's copy to memory did not come by here, nothing is known of it.
#[cfg(MTK_GVA_WALK)]
#[inline(always)]
pub(super) fn left(local: &mut Local) {
    if local.l2fields.written_ahead.take().is_some() {
        local.l2fields.known.forget();
    }
}

/// Handler of sync_vmcs02_to_vmcs12(): L2 exits to L1, or its state is asked for.
#[no_mangle]
extern "C" fn mtk_on_sync_vmcs02(
    raw: *mut bindings::kvm_vcpu,
    _vmcs12: usize,
    _cont: Continuation,
) -> Verdict {
    // SAFETY: The hooked function's own argument; kvm_vcpu is loaded with vmcs02.
    let vcpu = unsafe { Vcpu::from_hook(raw) };
    state::with(vcpu, |local, counters| {
        // KVM_GET_NESTED_STATE calls it as well, and L2 goes on.
        let goes_on = vcpu.guest_mode();
        if !goes_on {
            // SAFETY: In this very handler.
            unsafe { local.fields.left_l2(vcpu) };
        }
        if local.l2fields.is_serving() {
            // SAFETY: vmcs02 is loaded here.
            unsafe {
                local.l2fields.save(vcpu);
                if goes_on {
                    local.l2fields.go_on();
                } else {
                    local.l2fields.stop(vcpu);
                }
            }
            publish(local, counters);
        } else if mode() == Mode::Check && !local.l2fields.learner.learned().is_empty() {
            let count = counters.path::<NUMBER>();
            if vcpu.has_l2_shadow() {
                // SAFETY: As above.
                unsafe { local.l2fields.compare(vcpu, count) };
            }
        }
    });
    super::nested_switch::pages::exited(vcpu);
    Verdict::STOCK
}

/// VMX operation of L1 ends, and vmcs02 is about to be freed. L2 can only be served still if its last entry failed
/// in the processor.
///
/// # Safety
///
/// The vCPU is loaded on this CPU by this task.
pub(super) unsafe fn end(vcpu: Vcpu) {
    copies::forget(vcpu);
    state::with(vcpu, |local, counters| {
        // SAFETY: By this function's contract.
        unsafe { local.l2fields.stop(vcpu) };
        publish(local, counters);
    });
}

/// Gives the vCPU back to the stock code, with L2 running or not.
///
/// # Safety
///
/// The vCPU is loaded on this CPU by this task.
pub(super) unsafe fn withdraw(vcpu: Vcpu) {
    state::with(vcpu, |local, counters| {
        // SAFETY: By this function's contract; while L2 is served it is vmcs02 that is loaded, or will be
        // loaded by `stop`.
        unsafe {
            if !vcpu.vmcs01_is_loaded() {
                local.l2fields.save(vcpu);
            }
            local.l2fields.stop(vcpu);
        }
        publish(local, counters);
    });
}

/// The vCPU is about to be freed, and is not loaded.
pub(super) fn retire(vcpu: Vcpu) {
    if state::with(vcpu, |_, counters| counters.l2fields.is_serving()) != Some(true) {
        return;
    }
    let args = [vcpu.key()];
    // Whoever else gives vCPUs back (`drain`) does it under the mutex, too, which nobody holds for long when the VM is gone.
    let held = loop {
        // SAFETY: The vCPU is freed after this function.
        if let Some(held) = unsafe { Held::try_take(vcpu.key() as *mut _) } {
            break held;
        }
        // SAFETY: Process context.
        unsafe { bindings::msleep(1) };
    };
    // SAFETY: As nested_vmx_free_vcpu() itself is about to do.
    unsafe {
        if CallId::VCPU_LOAD.call(args).is_some() {
            withdraw(vcpu);
            CallId::VCPU_PUT.call(args);
        }
    }
    drop(held);
}

/// On each entry of the guest while the path is being switched off.
pub(super) fn leave(vcpu: Vcpu) {
    if super::mode(NUMBER) == Mode::Off {
        // SAFETY: The vCPU is about to run, so it is loaded.
        unsafe { withdraw(vcpu) };
    }
}

fn drain() {
    copies::end_epoch();
    super::drain::drain(
        // Those that start to serve.
        &[
            HookId::NESTED_RUN,
            HookId::HANDLE_VMREAD,
            HookId::HANDLE_VMWRITE,
        ],
        |counters| counters.l2fields.is_serving(),
        // SAFETY: `drain` has the vCPU loaded.
        |vcpu| unsafe { withdraw(vcpu) },
    );
}

static REPORTED: AtomicBool = AtomicBool::new(false);

#[cold]
fn report(counters: &Counters, number: Number, served: u64, stock: u64) {
    counters.mismatches.bump();
    let name = FIELDS.get(number as usize).map_or("?", |f| f.name);
    if !REPORTED.swap(true, Ordering::Relaxed) {
        pr_warn!("l2fields: {name} would read {served:#x} in L2, stock {stock:#x}\n");
    }
}
