// SPDX-License-Identifier: GPL-2.0
//! Learned fields: the VMCS fields that this L1 reads and writes again and again are shadowed, so
//! that its VMREADs and VMWRITEs of them do not leave it (SDM volume 3, 26.10 and 32.3).
//!
//! Stock KVM shadows a fixed list for everybody. Here each vCPU has VMREAD and VMWRITE bitmaps of
//! its own: the stock list and what `policy::learn` found to pay. The shadow VMCS carries the
//! learned fields as well, so the two copies between it and vmcs12 are made here, as long as a vCPU
//! is *extended*:
//!
//! - nested_sync_vmcs12_to_shadow(): vmcs12 is up to date. The set may change only here.
//! - copy_shadow_to_vmcs12(): the shadow VMCS is up to date. KVM calls it wherever anything is
//!   about to look at vmcs12 while L1 runs: VMLAUNCH and VMRESUME, VMPTRLD, VMCLEAR, VMXOFF and
//!   KVM_GET_NESTED_STATE. So nothing more is needed to keep others from seeing stale fields.
//!
//! What a VMWRITE exit of the stock code would have done beside the write is made up for in the
//! second: if a learned field has changed, the guest state that KVM left in vmcs02 is fetched and
//! vmcs12 marked dirty, so that vmcs02 is prepared in full.
//!
//! A VMREAD that exits all the same is counted under its reason and, into a register, answered here (`kvm::vmread`).
//!
//! `kvm::fields` says for each field whether and when it may be learned. Those that KVM leaves in
//! vmcs02 are fetched before each copy to the shadow VMCS while one of them is learned.

mod copies;
pub(super) mod extension;
mod knobs;
pub(super) mod lists;
mod memory;
mod shadow;

pub(crate) use knobs::init;
pub(crate) use memory::{Memory, Shared};

use super::Path;
use crate::{
    bindings,
    hook::{CallId, Continuation, HookId, InFlight, Verdict},
    kvm::{
        families::family,
        fields::{self, encoding::VMX_INSTRUCTION_INFO, Number, FIELDS},
        vmread::Read,
        vmx, Vcpu,
    },
    policy::mode::Mode,
    state,
};
use core::sync::atomic::{AtomicBool, Ordering};
use extension::Extension;
use kernel::{c_str, prelude::*};

/// This path's number in `PATHS`.
pub(super) const NUMBER: usize = 1;

/// Most that is allocated for one vCPU, in bytes as the allocator rounds them.
pub(super) const MOST: usize = core::mem::size_of::<Extension>().next_power_of_two();

/// Most fields that are shadowed beside the stock list.
const BUDGET: u8 = 96;
/// Room for the stock list, of each width; stock KVM has 38 fields in all.
const STOCK: usize = 32;
/// Room for learned fields, of each width.
const LEARNED: usize = BUDGET as usize;

pub(super) const PATH: Path = Path {
    name: c_str!("fields"),
    about: c_str!("VMCS fields that L1 uses often are shadowed"),
    hooks: &[
        HookId::COPY_SHADOW,
        HookId::SYNC_SHADOW,
        HookId::HANDLE_VMREAD,
        HookId::HANDLE_VMWRITE,
        HookId::SYNC_VMCS02,
        HookId::FREE_NESTED,
        HookId::HANDLE_VMPTRLD,
    ],
    guest_hooks: &[],
    extra_hooks: &[],
    calls: &[
        CallId::VCPU_LOAD,
        CallId::VCPU_PUT,
        CallId::WAKE_UP,
        CallId::LOAD_VMCS,
        CallId::SYNC_RARE,
        CallId::FIELD_OFFSET,
        CallId::SET_RFLAGS,
        CallId::SKIP_INSTRUCTION,
    ],
    drain: Some(drain),
    drain_hooks: &[HookId::ENTER_GUEST],
    reasons: &["no_state", "unknown_field", "never", "learning", "evmcs"],
    knobs: &knobs::FILES,
};

/// Why an access of L1 was left to the stock code; names in `PATH.reasons`.
#[derive(Clone, Copy)]
enum Reason {
    /// No memory or no room for the vCPU's state.
    NoState,
    /// L1 named a field that vmcs12 does not have.
    UnknownField,
    /// A field whose access must be seen.
    Never,
    /// A field that is not, or not yet, worth shadowing.
    Learning,
    /// L1 uses an enlightened VMCS.
    Evmcs,
}

/// The path's mode.
#[inline(always)]
fn mode() -> Mode {
    super::mode(NUMBER)
}

/// Gives the vCPU back to the stock code.
///
/// # Safety
///
/// The vCPU is loaded on this CPU by this task.
unsafe fn withdraw(vcpu: Vcpu) {
    state::with(vcpu, |local, counters| {
        let (regions, count) = (&mut local.regions, counters.path::<NUMBER>());
        // SAFETY: By this function's contract.
        unsafe {
            local
                .fields
                .withdraw(vcpu, regions, count, &counters.fields)
        };
    });
}

/// On each entry of the guest while the path is being switched off.
pub(super) fn leave(vcpu: Vcpu) {
    if super::mode(NUMBER) == Mode::Off {
        // SAFETY: The vCPU is about to run, so it is loaded.
        unsafe { withdraw(vcpu) };
    }
}

fn drain() {
    super::drain::drain(
        &[],
        |counters| counters.fields.is_extended(),
        // SAFETY: `drain` has the vCPU loaded.
        |vcpu| unsafe { withdraw(vcpu) },
    );
}

/// VMX operation ends on this vCPU.
pub(super) fn forget_entry(vcpu: Vcpu) {
    state::with(vcpu, |local, _| local.fields.forget_entry());
}

/// Handler of copy_shadow_to_vmcs12(): the shadow VMCS is up to date.
#[no_mangle]
extern "C" fn mtk_on_copy_shadow(vmx: *mut bindings::vcpu_vmx, _cont: Continuation) -> Verdict {
    // SAFETY: The hooked function's own argument; kvm_vcpu is the first member of vcpu_vmx.
    let vcpu = unsafe { Vcpu::from_hook(vmx.cast()) };
    let mode = mode();
    let handled = state::with(vcpu, |local, counters| {
        let memory = &mut local.fields;
        let extended = counters.fields.is_extended() && vcpu.vmcs01_is_loaded();
        let pages = vcpu.pages().filter(|_| extended)?;
        let count = counters.path::<NUMBER>();
        // SAFETY: KVM is about to do the same, at the same place.
        unsafe {
            memory.save_quietly(vcpu, pages, count);
            if vcpu.enters_l2() {
                memory.enter_l2(pages);
            }
        }
        count.taken.bump();
        Some(())
    });
    match handled {
        Some(Some(())) => return Verdict::handled(0),
        _ if mode != Mode::Off && vcpu.vmcs01_is_loaded() => make_room(vcpu, HookId::COPY_SHADOW),
        _ => {}
    }
    Verdict::STOCK
}

/// L1 enters L2: copies its shadow VMCS to vmcs12, as the handler above does. `false`: the handler has to, or the stock code.
///
/// # Safety
///
/// L1 has just exited by VMRESUME, with vmcs01 current.
#[cfg(MTK_GVA_WALK)]
#[inline(always)]
pub(super) unsafe fn save_for_entry(
    vcpu: Vcpu,
    local: &mut super::Local,
    counters: &super::CounterSet,
) -> bool {
    let memory = &mut local.fields;
    let able = mode() == Mode::On
        && counters.fields.is_extended()
        && !memory.is_checking()
        && vcpu.vmcs01_is_loaded()
        && !vcpu.evmcs_is_mapped()
        && vcpu.current_vmptr() != u64::MAX;
    let Some(pages) = vcpu.pages().filter(|_| able) else {
        return false;
    };
    let count = counters.path::<NUMBER>();
    // SAFETY: KVM would do the same next.
    unsafe { memory.save_quietly(vcpu, pages, count) };
    memory.enter_l2(pages);
    count.taken.bump();
    true
}

/// Handler of nested_sync_vmcs12_to_shadow(): vmcs12 is up to date, L1 is about to run, preemption
/// is off. The only place where the set of fields changes.
#[no_mangle]
extern "C" fn mtk_on_sync_shadow(vcpu: *mut bindings::kvm_vcpu, _cont: Continuation) -> Verdict {
    // SAFETY: The hooked function's own argument.
    let vcpu = unsafe { Vcpu::from_hook(vcpu) };
    let mode = mode();
    let handled = state::with(vcpu, |local, counters| {
        let memory = &mut local.fields;
        let vmcs12 = vcpu.vmcs12()?;
        memory.extension.as_ref()?;
        if vcpu.evmcs_is_mapped() || !vcpu.vmcs01_is_loaded() {
            return None;
        }
        let count = counters.path::<NUMBER>();
        if mode == Mode::Off || memory.unfit {
            // Being given back: vmcs12 is up to date, so this is as good a place as any. Going on
            // to the stock copy while extended would leave old values in the learned fields.
            // SAFETY: L1 is about to run here, so the vCPU is loaded by this task.
            unsafe { memory.withdraw(vcpu, &mut local.regions, count, &counters.fields) };
            return None;
        }
        // SAFETY: KVM is about to use the shadow VMCS, at the same place, with vmcs01 current.
        unsafe { memory.explore(vcpu) };
        memory.obey(vcpu);
        memory.switched();
        if memory.must_rebuild(mode == Mode::Check) {
            // SAFETY: L1 is about to run here, so the vCPU is loaded by this task.
            unsafe { local.regions.settle(vcpu, memory, count) };
        }
        // SAFETY: KVM is about to do the same, at the same place, with vmcs01 current.
        unsafe { memory.restore(vcpu, vmcs12, mode == Mode::Check, &counters.fields, count) };
        if memory.unfit {
            // SAFETY: As above.
            unsafe { memory.withdraw(vcpu, &mut local.regions, count, &counters.fields) };
            return None;
        }
        vcpu.set_vmcs12_newer(false);
        Some(())
    });
    match handled {
        Some(Some(())) => Verdict::handled(0),
        _ => Verdict::STOCK,
    }
}

/// L1 executes a VMPTRLD that stock code carries out: makes the vCPU's extension, so that what L1 writes to its first VMCS does not
/// exit any more.
#[cold]
pub(super) fn prepare(vcpu: Vcpu) {
    let able = mode() != Mode::Off
        && vcpu.vmxon()
        && vcpu.vmcs01_is_loaded()
        && !vcpu.evmcs_is_mapped()
        && vcpu.pages().is_some();
    if able {
        make_room(vcpu, HookId::HANDLE_VMPTRLD);
    }
}

/// Makes the vCPU's extension, which the next copy from vmcs12 puts to use. May sleep.
#[cold]
fn make_room(vcpu: Vcpu, hook: HookId) {
    let section = InFlight::enter(hook);
    let made = state::ensure(vcpu, &section)
        && match state::with(vcpu, |local, _| {
            local.fields.unfit || local.fields.extension.is_some()
        }) {
            Some(true) => true,
            _ => match Extension::new(vcpu) {
                Ok(extension) => {
                    state::with(vcpu, |local, _| {
                        local.fields.adopt(extension);
                    });
                    true
                }
                Err(_) => false,
            },
        };
    if !made {
        super::count_stateless(NUMBER, Reason::NoState as usize);
    }
}

/// Whether KVM lets L1 use the field on this host, at the place where we expect it.
pub(super) fn kvm_knows(number: Number) -> bool {
    let Some(field) = FIELDS.get(number as usize) else {
        return false;
    };
    // SAFETY: A pure function of a number.
    let offset = unsafe { CallId::FIELD_OFFSET.call([field.encoding as usize, 0, 0]) };
    offset.is_some_and(|o| o as i16 == field.offset as i16)
}

/// L1, or L2 where L1 does not want to see it, has executed VMREAD or VMWRITE of a field that is not shadowed.
///
/// # Safety
///
/// In the handler of handle_vmread() or handle_vmwrite(), whose continuation `cont` is.
unsafe fn accessed(vcpu: Vcpu, write: bool, cont: Continuation) -> Verdict {
    let id = if write {
        HookId::HANDLE_VMWRITE
    } else {
        HookId::HANDLE_VMREAD
    };
    let nested = vcpu.guest_mode();
    let mode = mode();
    if (mode == Mode::Off && !nested) || vcpu.current_vmptr() == u64::MAX {
        return Verdict::STOCK;
    }
    // SAFETY: By this function's contract: in a handler of an exit the exited VMCS is current.
    let info = unsafe { vmx::vmread(VMX_INSTRUCTION_INFO) };
    // Register 2 names the field (SDM table 29-14).
    let encoding = info.and_then(|info| vcpu.gpr((info >> 28 & 0xf) as usize));
    if nested && write {
        super::l2fields::copies::note_vmwrite(vcpu, encoding);
    }
    let (Some(info), Some(encoding)) = (info, encoding) else {
        return Verdict::STOCK;
    };
    if nested {
        if !super::l2fields::accessed(vcpu, id, encoding) {
            return Verdict::STOCK;
        }
        let section = InFlight::enter(id);
        // SAFETY: This handler's continuation and the hooked function's own argument.
        let value = unsafe { section.call_stock(cont, [vcpu.key(), 0, 0]) };
        super::l2fields::renew(vcpu, &section);
        return Verdict::handled(value);
    }

    let mut read = None;
    let room = state::with(vcpu, |local, counters| {
        let count = counters.path::<NUMBER>();
        let memory = &mut local.fields;
        let Some(number) = fields::by_encoding(encoding) else {
            count.fall_back(Reason::UnknownField as usize);
            return true;
        };
        if vcpu.evmcs_is_mapped() || vcpu.shadow_vmcs().is_none() {
            count.fall_back(Reason::Evmcs as usize);
            return true;
        }
        let Some(field) = FIELDS.get(number as usize) else {
            return true;
        };
        let class = field.class;
        // What KVM leaves in vmcs02 until it is asked for is the stock code's to fetch.
        let late = class.is_late() && vcpu.has_late_fields();
        if !write && !late && encoding == u64::from(field.encoding) {
            read = vcpu
                .vmcs12()
                .filter(|_| memory.knows(number))
                .and_then(|m| vcpu.plan_vmread(m, field, info));
        }
        let left_out = memory.is_left_out(number);
        if !left_out && !memory.may_shadow(vcpu, class) {
            count.fall_back(Reason::Never as usize);
            return memory.unfit || memory.extension.is_some();
        }
        if write {
            memory.written.insert(number);
        }
        count.fall_back(Reason::Learning as usize);
        let joined = if left_out {
            let family = family(number);
            memory.stock.touched_of(number, false, &family)
        } else {
            memory.knows(number) && {
                let family = memory.known_of(&family(number));
                let costly = class.is_late();
                memory.learner.touched_of(number, costly, &family)
            }
        };
        if joined {
            memory.stale = true;
            // Without an extension the shadow VMCS has what the stock code put there, and the copy
            // that makes vmcs12 newer is the stock code's to make: wait for the next switch.
            if memory.extension.is_some() && counters.fields.is_extended() {
                // SAFETY: L1 has exited, so vmcs01 is loaded and the shadow VMCS up to date.
                unsafe { memory.make_vmcs12_newer(vcpu, count) };
            }
        }
        memory.extension.is_some()
    });
    if room != Some(true) {
        make_room(vcpu, id);
    }
    match (read, mode) {
        (Some(read), Mode::On) => vcpu
            .finish_vmread(read)
            .map_or(Verdict::STOCK, Verdict::handled),
        (Some(read), Mode::Check) => check_read(vcpu, read, id, cont),
        _ => Verdict::STOCK,
    }
}

static REPORTED: AtomicBool = AtomicBool::new(false);

/// Lets the stock code carry out a VMREAD, and compares.
#[cold]
fn check_read(vcpu: Vcpu, read: Read, id: HookId, cont: Continuation) -> Verdict {
    let section = InFlight::enter(id);
    // SAFETY: This handler's continuation and the hooked function's own argument.
    let value = unsafe { section.call_stock(cont, [vcpu.key()]) };
    state::with(vcpu, |_, counters| {
        let count = counters.path::<NUMBER>();
        count.checked.bump();
        if !vcpu.has_read(read) {
            count.mismatches.bump();
            if !REPORTED.swap(true, Ordering::Relaxed) {
                pr_warn!("fields: a VMREAD gave something else than vmcs12 has\n");
            }
        }
    });
    Verdict::handled(value)
}

/// Handler of handle_vmread(): learns, and lets the stock function run.
#[no_mangle]
extern "C" fn mtk_on_handle_vmread(raw: *mut bindings::kvm_vcpu, cont: Continuation) -> Verdict {
    // SAFETY: The hooked function's own argument, in its handler.
    unsafe { accessed(Vcpu::from_hook(raw), false, cont) }
}

/// Handler of handle_vmwrite(): learns, and lets the stock function run.
#[no_mangle]
extern "C" fn mtk_on_handle_vmwrite(raw: *mut bindings::kvm_vcpu, cont: Continuation) -> Verdict {
    // SAFETY: The hooked function's own argument, in its handler.
    unsafe { accessed(Vcpu::from_hook(raw), true, cont) }
}
