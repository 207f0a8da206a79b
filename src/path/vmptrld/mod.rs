// SPDX-License-Identifier: GPL-2.0
//! VMCSs stay loaded: an L1 that alternates between VMCSs finds the one that it loads where it left it.
//!
//! Stock KVM has room for one vmcs12 per vCPU. On each VMPTRLD it copies the current one out of the shadow
//! VMCS, writes it to guest memory, reads the other one, and copies that to the shadow VMCS before L1 runs
//! on. The SDM lets a processor keep more than one VMCS active and its data anywhere until VMCLEAR
//! (volume 3, 26.1), and so does this path: it keeps some vmcs12s, each with a shadow VMCS of its own, and
//! VMPTRLD exchanges pointers.
//!
//! Guest memory gets what is kept here when somebody may look:
//!
//! - VMCLEAR of that VMCS;
//! - VMXOFF, and whatever else ends VMX operation (free_nested());
//! - the vCPU leaves KVM_RUN (vcpu_put()): its VMM may read, save or change memory, or run
//!   KVM_SET_NESTED_STATE. Nothing is kept beyond;
//! - the path or the path `fields` is switched off, or the module goes.
//!
//! A shadow VMCS of L1's own, which KVM reads from memory when L2 is entered, is never kept. An operand or an
//! operation that is not plain goes to the stock code, after everything has been written back.
//!
//! Needs the path `fields`, whose copies it saves and whose lists say what a shadow VMCS carries.

mod descriptor;
pub(super) mod fast;
mod regions;
pub(super) mod roots;

pub(crate) use regions::Regions;
pub(super) use regions::MOST;

use super::{fields, l2fields::copies, nested_switch::pages, CounterSet, Counters, Local, Path};
use crate::{
    bindings,
    hook::{CallId, Continuation, HookId, InFlight, Verdict},
    kvm::{
        guest_memory::{GuestMemory, SrcuGuard},
        nested::Header,
        Vcpu,
    },
    policy::mode::Mode,
    state,
    sysfs::Attribute,
};
use core::sync::atomic::{AtomicBool, Ordering};
use kernel::{c_str, prelude::*};
use regions::{Copier, NONE};

/// This path's number in `PATHS`.
const NUMBER: usize = 2;

pub(super) const PATH: Path = Path {
    name: c_str!("vmptrld"),
    about: c_str!("VMCSs that L1 alternates between stay loaded"),
    hooks: &[
        HookId::VCPU_PUT,
        HookId::FREE_NESTED,
        HookId::HANDLE_VMCLEAR,
        HookId::HANDLE_VMPTRLD,
        HookId::READ_VIRT,
    ],
    guest_hooks: &[],
    extra_hooks: &[HookId::NEW_EPTP, HookId::VCPU_RUN],
    calls: &[
        CallId::WAKE_UP,
        CallId::LOAD_VMCS,
        CallId::SYNC_RARE,
        CallId::SET_CURRENT_VMPTR,
        CallId::DISABLE_SHADOW,
        CallId::SET_RFLAGS,
        CallId::SKIP_INSTRUCTION,
        CallId::FREE_ROOTS,
        CallId::GFN_TO_MEMSLOT,
        CallId::WRITE_GUEST_PAGE,
        CallId::SYNC_ROOTS,
        CallId::SYNC_SHADOW,
    ],
    drain: Some(drain),
    drain_hooks: &[HookId::HANDLE_EXIT],
    reasons: &["not_extended", "operand", "invalid", "no_memory"],
    knobs: &FILES,
};

static FILES: [Attribute; 1] = [Attribute::figure(c"reentered", |out| {
    writeln!(out, "{}", super::total(NUMBER).short.get())
})];

/// Why a VMPTRLD or VMCLEAR was left to the stock code; names in `PATH.reasons`.
#[derive(Clone, Copy)]
enum Reason {
    /// The path `fields` is not at work on this vCPU, or L1 uses an enlightened VMCS.
    NotExtended,
    /// The operand, or the paging that leads to it, is out of the ordinary.
    Operand,
    /// The stock code is going to refuse.
    Invalid,
    /// No memory for another VMCS.
    NoMemory,
}

/// What another thread may know about a vCPU.
pub(crate) struct Shared {
    /// Guest memory lacks something that is kept.
    holding: AtomicBool,
}

impl Shared {
    pub(crate) const fn new() -> Self {
        Self {
            holding: AtomicBool::new(false),
        }
    }
}

/// The path's mode.
#[inline(always)]
fn mode() -> Mode {
    super::mode(NUMBER)
}

/// Whether the vCPU is in a state that this path knows; L2 runs with vmcs02. To act, the path `fields` must not be in mode `check`.
fn is_able(vcpu: Vcpu, counters: &CounterSet) -> bool {
    counters.fields.is_extended()
        && vcpu.vmxon()
        && vcpu.vmcs01_is_loaded()
        && !vcpu.evmcs_is_mapped()
        && vcpu.pages().is_some()
}

/// The address that the operand of a VMPTRLD or VMCLEAR of L1 names, if the path is able to carry it out.
///
/// # Safety
///
/// L1 has just exited by the instruction; KVM's SRCU lock is held.
#[inline(always)]
unsafe fn operand(
    vcpu: Vcpu,
    memory: &mut GuestMemory,
    local: &mut Local,
    counters: &CounterSet,
) -> Result<u64, Reason> {
    if !is_able(vcpu, counters) || local.fields.is_checking() {
        return Err(Reason::NotExtended);
    }
    let vmptr = vcpu
        .vmptr_operand(memory, &mut local.regions.trail)
        .ok_or(Reason::Operand)?;
    // First: the mark for "no current VMCS" is no address, but a guest may well name it.
    if !vcpu.is_page_address(vmptr) || vmptr == vcpu.vmxon_ptr() {
        return Err(Reason::Invalid);
    }
    Ok(vmptr)
}

/// VMPTRLD by L1 of a VMCS that is kept in slot `at`, or in none. On `Err` nothing has changed.
///
/// # Safety
///
/// As for `operand`, which gave `vmptr`.
#[inline(always)]
unsafe fn load(
    vcpu: Vcpu,
    vmptr: u64,
    at: Option<usize>,
    memory: &mut GuestMemory,
    local: &mut Local,
    counters: &CounterSet,
) -> Result<(), Reason> {
    let before = vcpu.current_vmptr();
    if vmptr != before {
        let mut copier = Copier::new(vcpu, &mut local.fields, counters);
        let at = match at {
            Some(at) => at,
            // SAFETY: By this function's contract.
            None => unsafe { fetch(vmptr, memory, &mut local.regions, &mut copier)? },
        };
        // SAFETY: By this function's contract; everything else was looked at above.
        unsafe { local.regions.swap(at, vmptr, &mut copier) }.ok_or(Reason::NoMemory)?;
    }
    copies::suspect(vcpu, local, before);
    Ok(())
}

/// Reads a VMCS from guest memory into a slot of its own.
///
/// # Safety
///
/// As for `load`.
#[inline(never)]
unsafe fn fetch(
    vmptr: u64,
    memory: &mut GuestMemory,
    regions: &mut Regions,
    copier: &mut Copier<'_>,
) -> Result<usize, Reason> {
    let header = memory.read_u64(vmptr).ok_or(Reason::Invalid)?;
    let header = Header(header as u32);
    if !header.is_ours() || (header.is_shadow() && !copier.vcpu.may_shadow()) {
        return Err(Reason::Invalid);
    }
    // SAFETY: By this function's contract.
    let at = unsafe { regions.make_room(copier) }.ok_or(Reason::NoMemory)?;
    let pages = regions.pages(at).ok_or(Reason::NoMemory)?;
    // SAFETY: The pages wait for a VMCS, and are whole.
    if !unsafe { memory.read_page(vmptr, pages.vmcs12.cast()) } {
        return Err(Reason::Invalid);
    }
    Ok(at)
}

/// VMCLEAR by L1. `Err`: the stock code is to do it; a VMCS that was kept is in memory by then.
///
/// # Safety
///
/// As for `operand`, which gave `vmptr`.
#[inline(always)]
unsafe fn clear(
    vcpu: Vcpu,
    vmptr: u64,
    local: &mut Local,
    counters: &CounterSet,
) -> Result<(), Reason> {
    if vmptr == vcpu.current_vmptr() {
        // SAFETY: By this function's contract. What cannot be written is lost, as in nested_release_vmcs12().
        unsafe {
            write_current(vcpu, vmptr, local, counters)?;
            drop_current(vcpu, local);
        }
        return Ok(());
    }
    let mut copier = Copier::new(vcpu, &mut local.fields, counters);
    let srcu = SrcuGuard::take(vcpu);
    // SAFETY: By this function's contract.
    unsafe {
        if let Some(at) = local.regions.position(vmptr) {
            local.regions.evict(at, &mut copier, &srcu);
        }
        srcu.clear_launch_state(vmptr);
    }
    Ok(())
}

/// Writes the current VMCS to its place in guest memory, clear. `Ok(false)`: it cannot be written.
///
/// # Safety
///
/// As for `clear`; `vmptr` is the current VMCS's address.
#[inline(always)]
unsafe fn write_current(
    vcpu: Vcpu,
    vmptr: u64,
    local: &mut Local,
    counters: &CounterSet,
) -> Result<bool, Reason> {
    let copier = Copier::new(vcpu, &mut local.fields, counters);
    let pages = vcpu.pages().ok_or(Reason::NotExtended)?;
    // What nested_release_vmcs12() and handle_vmclear() write.
    // SAFETY: By this function's contract; the pages are whole and the current VMCS's.
    unsafe {
        copier.fields.quietly(|| vcpu.fetch_late_fields());
        copier.fields.make_vmcs12_newer(vcpu, copier.count);
        let launch_state = &raw mut (*pages.vmcs12).launch_state;
        let was = launch_state.read_unaligned();
        launch_state.write_unaligned(0);
        let written = SrcuGuard::take(vcpu).write_page(vmptr, pages.vmcs12.cast());
        if !written {
            // It is still L1's, if the caller does not go on.
            launch_state.write_unaligned(was);
        }
        Ok(written)
    }
}

/// There is no current VMCS any more; it is in guest memory.
///
/// # Safety
///
/// As for `clear`.
#[inline(always)]
unsafe fn drop_current(vcpu: Vcpu, local: &mut Local) {
    // SAFETY: By this function's contract.
    let drop = || unsafe { vcpu.drop_current_vmptr(true) };
    local.fields.quietly(drop);
    local.regions.roots.keep(vcpu);
}

/// Writes everything that is kept back to guest memory.
///
/// # Safety
///
/// The vCPU is loaded by this task, which has its VMM's address space if anything is kept.
unsafe fn evict_all(vcpu: Vcpu, local: &mut Local, counters: &CounterSet) {
    let mut copier = Copier::new(vcpu, &mut local.fields, counters);
    // SAFETY: By this function's contract.
    unsafe { local.regions.evict_all(&mut copier) };
    local.regions.roots.drop_all(vcpu);
    local.regions.publish(&counters.vmptrld);
}

/// What the handlers of both instructions have in common: `act` in mode `on`, `compare` in mode `check`.
#[inline(always)]
fn handle(
    raw: *mut bindings::kvm_vcpu,
    id: HookId,
    cont: Continuation,
    act: impl FnOnce(Vcpu, &mut Local, &CounterSet) -> Result<(), Reason>,
) -> Verdict {
    let section = InFlight::enter(id);
    // SAFETY: The hooked function's own argument.
    let vcpu = unsafe { Vcpu::from_hook(raw) };
    let mode = mode();
    let done = state::with(vcpu, |local, counters| {
        if mode == Mode::Off || local.regions.images != (mode == Mode::Check) {
            // SAFETY: KVM is about to carry out an instruction of L1.
            unsafe { evict_all(vcpu, local, counters) };
            local.regions.images = false;
        }
        if mode != Mode::On {
            return false;
        }
        let count = counters.path::<NUMBER>();
        match act(vcpu, local, counters) {
            Ok(()) => {
                count.taken.bump();
                local.regions.publish(&counters.vmptrld);
                local.run.answered();
                true
            }
            Err(reason) => {
                count.fall_back(reason as usize);
                // SAFETY: As above.
                unsafe { evict_all(vcpu, local, counters) };
                false
            }
        }
    });
    match done {
        Some(true) => vcpu.vm_succeed().map_or(Verdict::STOCK, Verdict::handled),
        _ if mode == Mode::Check => compare(vcpu, &section, cont),
        _ => Verdict::STOCK,
    }
}

/// Mode `check`: the stock code carries the instruction out. It has to find the operand that we find, and in
/// memory what we would have kept.
#[cold]
fn compare(vcpu: Vcpu, section: &InFlight, cont: Continuation) -> Verdict {
    let before = vcpu.current_vmptr();
    let expected = state::with(vcpu, |local, counters| {
        if !is_able(vcpu, counters) {
            return None;
        }
        local.regions.images = true;
        let count = counters.path::<{ fields::NUMBER }>();
        let (pages, vmcs12) = (vcpu.pages()?, vcpu.vmcs12()?);
        // SAFETY: As in `load`; this is what the stock code does first if another VMCS becomes current.
        unsafe {
            let vmptr = vcpu.vmptr_operand(&mut GuestMemory::new(vcpu), &mut local.regions.trail);
            if before != NONE && !vmcs12.is_shadow() && vmptr.is_some_and(|v| v != before) {
                local.fields.quietly(|| vcpu.fetch_late_fields());
                local.fields.make_vmcs12_newer(vcpu, count);
                let mut copier = Copier::new(vcpu, &mut local.fields, counters);
                local.regions.keep_image(before, pages.vmcs12, &mut copier);
            }
            Some(vmptr)
        }
    });
    // SAFETY: This handler's continuation and the hooked function's own argument.
    let value = unsafe { section.call_stock(cont, [vcpu.key(), 0, 0]) };
    let now = vcpu.current_vmptr();
    state::with(vcpu, |local, counters| {
        let count = counters.path::<NUMBER>();
        let forget = |local: &mut Local, vmptr: u64| {
            if let Some(at) = local.regions.position(vmptr) {
                local.regions.forget(at);
            }
        };
        match expected.flatten().flatten() {
            Some(vmptr) if now != NONE && now != before => {
                // VMPTRLD of another one.
                count.checked.bump();
                let same = vcpu.pages().and_then(|pages| {
                    // SAFETY: KVM's page, which it has just filled.
                    unsafe { local.regions.compare_image(now, pages.vmcs12) }
                });
                if vmptr != now || same == Some(false) {
                    report(count, vmptr, now);
                }
            }
            // VMCLEAR of the current one, an instruction that failed, or one that changed nothing.
            Some(vmptr) => {
                if now == NONE && before != NONE {
                    count.checked.bump();
                    if vmptr != before {
                        report(count, vmptr, before);
                    }
                }
                forget(local, vmptr);
                forget(local, before);
            }
            // SAFETY: As in `handle`.
            None => unsafe { evict_all(vcpu, local, counters) },
        }
        local.regions.publish(&counters.vmptrld);
    });
    Verdict::handled(value)
}

static REPORTED: AtomicBool = AtomicBool::new(false);

#[cold]
fn report(counters: &Counters, vmptr: u64, stock: u64) {
    counters.mismatches.bump();
    if !REPORTED.swap(true, Ordering::Relaxed) {
        pr_warn!(
            "vmptrld: VMCS {vmptr:#x} kept differs from {stock:#x} loaded by the stock code\n"
        );
    }
}

/// Handler of handle_vmptrld().
#[no_mangle]
extern "C" fn mtk_on_handle_vmptrld(raw: *mut bindings::kvm_vcpu, cont: Continuation) -> Verdict {
    let mut loaded = false;
    let act = |vcpu: Vcpu, local: &mut Local, counters: &CounterSet| {
        // SAFETY: In this very handler.
        unsafe {
            let mut memory = GuestMemory::new(vcpu);
            let vmptr = operand(vcpu, &mut memory, local, counters)?;
            let at = local.regions.position(vmptr);
            load(vcpu, vmptr, at, &mut memory, local, counters)?;
        }
        loaded = true;
        Ok(())
    };
    let verdict = handle(raw, HookId::HANDLE_VMPTRLD, cont, act);
    if !loaded || !verdict.is_handled() {
        // SAFETY: The hooked function's own argument.
        let vcpu = unsafe { Vcpu::from_hook(raw) };
        copies::forget(vcpu);
        fields::prepare(vcpu);
    }
    verdict
}

/// Handler of handle_vmclear().
#[no_mangle]
extern "C" fn mtk_on_handle_vmclear(raw: *mut bindings::kvm_vcpu, cont: Continuation) -> Verdict {
    // SAFETY: The hooked function's own argument.
    copies::forget(unsafe { Vcpu::from_hook(raw) });
    let act = |vcpu: Vcpu, local: &mut Local, counters: &CounterSet| {
        // SAFETY: In this very handler.
        unsafe {
            let vmptr = operand(vcpu, &mut GuestMemory::new(vcpu), local, counters)?;
            clear(vcpu, vmptr, local, counters)
        }
    };
    handle(raw, HookId::HANDLE_VMCLEAR, cont, act)
}

/// Writes back what is kept for the vCPU, in the handler of `hook`.
fn flush(vcpu: Vcpu, hook: HookId) {
    let holding = || {
        state::with(vcpu, |_, counters| {
            counters.vmptrld.holding.load(Ordering::Relaxed)
        })
    };
    if holding() == Some(true) {
        let _section = InFlight::enter(hook);
        // SAFETY: The vCPU is loaded, and something is kept only within KVM_RUN.
        state::with(vcpu, |local, counters| unsafe {
            evict_all(vcpu, local, counters)
        });
    }
}

/// Handler of free_nested(): VMX operation ends.
#[no_mangle]
extern "C" fn mtk_on_free_nested(raw: *mut bindings::kvm_vcpu, _cont: Continuation) -> Verdict {
    // SAFETY: The hooked function's own argument.
    let vcpu = unsafe { Vcpu::from_hook(raw) };
    flush(vcpu, HookId::FREE_NESTED);
    // SAFETY: free_nested() runs with the vCPU loaded.
    unsafe {
        pages::release(vcpu, HookId::FREE_NESTED);
        super::l2fields::end(vcpu);
    }
    fields::forget_entry(vcpu);
    Verdict::STOCK
}

/// Handler of vcpu_put(): the vCPU leaves KVM_RUN, or another ioctl.
#[no_mangle]
extern "C" fn mtk_on_vcpu_put(raw: *mut bindings::kvm_vcpu, _cont: Continuation) -> Verdict {
    // SAFETY: The hooked function's own argument.
    let vcpu = unsafe { Vcpu::from_hook(raw) };
    flush(vcpu, HookId::VCPU_PUT);
    // SAFETY: vcpu_put() has not begun, so the vCPU is loaded still.
    unsafe { pages::release(vcpu, HookId::VCPU_PUT) };
    copies::forget(vcpu);
    Verdict::STOCK
}

/// On each exit while the path is being switched off: nothing may be kept any more.
pub(super) fn leave(vcpu: Vcpu) {
    if super::mode(NUMBER) == Mode::Off {
        flush(vcpu, HookId::HANDLE_EXIT);
    }
}

/// One that runs writes it back on its next exit.
fn drain() {
    super::drain::wait_until_none(
        &[HookId::HANDLE_VMPTRLD, HookId::HANDLE_VMCLEAR],
        |counters| counters.vmptrld.holding.load(Ordering::Acquire),
    );
}
