// SPDX-License-Identifier: GPL-2.0
//! Another VPID instead of INVVPID, where that exits.
//!
//! With each switch between an L1 and its L2 that has no VPID of its own, or another than the last one, KVM flushes what the TLB has of
//! the guest (nested_vmx_transition_tlb_flush(), vmx_flush_tlb_guest()): one INVVPID each way. For a KVM that is a guest each is an exit
//! to the hypervisor below. Here the vCPU gets some VPIDs more from KVM's own store, and instead of a flush the next of these
//! (`policy::vpids`); with the path `fields` in the hypervisor below, the VMWRITE of it does not exit.
//!
//! Only with EPT. Then what the TLB tags with VPIDs are combined mappings, all of which KVM flushes by INVEPT when a vCPU comes to another CPU
//! (vmx_flush_tlb_all()), so that "flushed on this CPU" is true of the CPU that the vCPU is on.
//!
//! KVM uses `vmx->vpid` for vmcs01 and often for vmcs02, so one of these has an old VPID when the other has got a new one. It is written
//! there before that VMCS runs ([`before_run`]) or the path lets go of the vCPU ([`withdraw`]).

use super::{mismatch, mode, takes_detour, Reason, NUMBER};
use crate::{
    bindings,
    hook::{Continuation, HookId, InFlight, Verdict},
    kvm::{
        self, vmx,
        vpids::{self, Tag},
        Vcpu,
    },
    layout,
    path::{CounterSet, Local},
    policy::{
        mode::Mode,
        vpids::{Price, Spare, FEWEST, MOST},
    },
    state,
};
use core::sync::atomic::{AtomicBool, Ordering};
use kernel::prelude::*;

const HOOK: HookId = HookId::FLUSH_GUEST;

/// Whether INVVPID exits and other VPIDs can take its place. On bare metal nothing here costs more than a look at this.
static WORTHWHILE: AtomicBool = AtomicBool::new(false);

kernel::sync::global_lock! {
    // SAFETY: `init` is called once, by the module's own init, before any handler can run.
    unsafe(uninit) static QUIET: SpinLock<()> = ();
}

/// Must be called once before anything else here.
///
/// # Safety
///
/// Not more than once in the module's life.
pub(super) unsafe fn init() {
    // SAFETY: By this function's contract.
    unsafe { QUIET.init() };
}

/// Reads what this needs to know about kvm_intel and the processor, each time it has been loaded.
pub(super) fn prepare() {
    let worthwhile = kvm::runs_on_hypervisor()
        && kvm::uses_ept()
        && layout::module_flag("kvm_intel", "vpid")
        // SAFETY: It uses both.
        && unsafe { vpids::can_flush_all() };
    WORTHWHILE.store(worthwhile, Ordering::Relaxed);
}

/// What is kept for one vCPU.
pub(super) struct Memory {
    spare: Spare,
    price: Price,
    /// vmcs01 may have another VPID than KVM means.
    vmcs01_is_old: bool,
    /// vmcs02 may.
    vmcs02_is_old: bool,
    /// No VPIDs were to be had.
    poor: bool,
}

impl Memory {
    pub(super) const NEW: Memory = Memory {
        spare: Spare::new(),
        price: Price::new(),
        vmcs01_is_old: false,
        vmcs02_is_old: false,
        poor: false,
    };

    /// Whether there are VPIDs to spare, made so the first time.
    fn has_spare(&mut self, counters: &CounterSet) -> bool {
        if self.spare.count() == 0 && !self.poor {
            while self.spare.count() < MOST {
                let Some(vpid) = vpids::allocate() else { break };
                self.spare.add(vpid);
            }
            if self.spare.count() < FEWEST {
                self.release();
                self.poor = true;
            } else {
                counters.fields.note_thread();
                counters
                    .nested_switch
                    .vpids
                    .0
                    .store(true, Ordering::Release);
            }
        }
        self.spare.count() != 0
    }

    /// Gives the VPIDs to spare back to KVM.
    fn release(&mut self) {
        while let Some(vpid) = self.spare.remove() {
            // SAFETY: No VMCS has one to spare, once those that are old were written.
            unsafe { vpids::free(vpid) };
        }
    }

    /// A flush of what the TLB has of the guest that is about to run. `Err`: the stock code's to do.
    ///
    /// # Safety
    ///
    /// In the handler of vmx_flush_tlb_guest().
    #[inline]
    unsafe fn flush(&mut self, vcpu: Vcpu, counters: &CounterSet) -> Result<(), Reason> {
        if !self.has_spare(counters) || !self.price.is_fair() {
            return Err(Reason::Unusual);
        }
        let tag = vcpu.current_tag();
        let old = vcpu.vpid(tag);
        if old == 0 {
            return Err(Reason::Unusual);
        }
        let Some(new) = self.spare.exchange(old) else {
            // SAFETY: By this function's contract, and `prepare` has seen that there is such a flush.
            return if unsafe { vmx::invvpid_all() } {
                self.spare.flushed();
                Ok(())
            } else {
                Err(Reason::Unusual)
            };
        };
        // SAFETY: One of ours for one of KVM's. What is current is what the guest is about to run on.
        unsafe {
            vcpu.set_vpid(tag, new);
            let start = vmx::rdtsc();
            vcpu.write_current_vpid();
            self.price.paid(vmx::rdtsc().wrapping_sub(start));
        }
        let vmcs01 = vcpu.vmcs01_is_loaded();
        if tag == Tag::L1 {
            self.vmcs01_is_old = !vmcs01;
            self.vmcs02_is_old = vmcs01;
        } else {
            self.vmcs02_is_old = false;
        }
        counters.path::<NUMBER>().saved_exits.bump();
        Ok(())
    }

    /// Has the current VMCS have the VPID that KVM means.
    ///
    /// # Safety
    ///
    /// As for `Vcpu::write_current_vpid`.
    #[inline]
    unsafe fn settle(&mut self, vcpu: Vcpu) {
        let old = if vcpu.vmcs01_is_loaded() {
            &mut self.vmcs01_is_old
        } else {
            &mut self.vmcs02_is_old
        };
        if core::mem::take(old) {
            // SAFETY: By this function's contract.
            unsafe { vcpu.write_current_vpid() };
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // The vCPU is about to be freed, or was given back before.
        self.release();
    }
}

/// What another thread may know about a vCPU: that it has VPIDs to spare.
pub(crate) struct Shared(AtomicBool);

impl Shared {
    pub(crate) const fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    pub(super) fn is_holding(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

static REPORTED: AtomicBool = AtomicBool::new(false);

/// Handler of vmx_flush_tlb_guest().
#[no_mangle]
extern "C" fn mtk_on_flush_guest(raw: *mut bindings::kvm_vcpu, _cont: Continuation) -> Verdict {
    if !WORTHWHILE.load(Ordering::Relaxed) {
        return Verdict::STOCK;
    }
    // SAFETY: The hooked function's own argument, on the vCPU's thread with the vCPU loaded.
    let vcpu = unsafe { Vcpu::from_hook(raw) };
    // A thread that has just switched the path off waits for it.
    let section = InFlight::enter(HOOK);
    let flushed = state::with(vcpu, |local: &mut Local, counters| {
        let memory = &mut local.nested_switch;
        let count = counters.path::<NUMBER>();
        match mode() {
            Mode::On if vcpu.vmxon() && !takes_detour(&mut memory.detour, count) => {
                // SAFETY: In this very handler.
                match unsafe { memory.vpids.flush(vcpu, counters) } {
                    Ok(()) => {
                        count.taken.bump();
                        true
                    }
                    Err(reason) => {
                        count.fall_back(reason as usize);
                        false
                    }
                }
            }
            Mode::Check if vcpu.vmxon() => {
                // SAFETY: In this very handler.
                unsafe { memory.vpids.settle(vcpu) };
                count.checked.bump();
                // SAFETY: As above.
                let right = unsafe { vcpu.has_current_vpid() };
                if !right && mismatch(count, &REPORTED) {
                    pr_warn!("nested_switch: a VMCS has another VPID than KVM means\n");
                }
                false
            }
            _ => false,
        }
    });
    drop(section);
    match flushed {
        Some(true) => Verdict::handled(0),
        _ => Verdict::STOCK,
    }
}

/// Whether anything is done here at all.
#[inline(always)]
pub(super) fn are_worthwhile() -> bool {
    WORTHWHILE.load(Ordering::Relaxed)
}

/// In the handler of vmx_vcpu_run(), with interrupts off.
pub(super) fn before_run(vcpu: Vcpu) {
    if are_worthwhile() {
        state::with(vcpu, |local: &mut Local, _| {
            // SAFETY: The current VMCS is about to run; what is old has had a VPID.
            unsafe { local.nested_switch.vpids.settle(vcpu) };
        });
    }
}

/// Gives the vCPU back to the stock code.
pub(super) fn withdraw(vcpu: Vcpu) {
    state::with(vcpu, |local: &mut Local, counters| {
        let memory = &mut local.nested_switch.vpids;
        let holding = &counters.nested_switch.vpids.0;
        if !holding.load(Ordering::Relaxed) {
            return;
        }
        let quiet = QUIET.lock();
        // SAFETY: The vCPU is loaded on this CPU, with preemption off here.
        unsafe { vcpu.write_both_vpids() };
        drop(quiet);
        (memory.vmcs01_is_old, memory.vmcs02_is_old) = (false, false);
        memory.release();
        holding.store(false, Ordering::Release);
    });
}
