// SPDX-License-Identifier: GPL-2.0
//! What is special about answering an exit where stock KVM answers those of its fast path (`fastpath_t`): behind
//! vmx_vcpu_run(), after which vcpu_enter_guest() runs the guest again without leaving its inner loop.
//!
//! Interrupts are off there, KVM's SRCU lock is not held, and the guest's debug registers, extended state and PKRU are
//! loaded.

use super::{
    fields::encoding::VMX_INSTRUCTION_INFO, guest_memory::GuestMemory, vcpu::read, vmx, vpids::Tag,
    Vcpu,
};
use crate::{
    bindings,
    hook::CallId,
    policy::{
        controls::secondary,
        operand::{is_plain_address, Trail},
        registers::CR4_PKE,
    },
};
use core::{marker::PhantomData, mem::size_of};
use kernel::current;

/// What vmx_vcpu_run() tells its caller (`enum exit_fastpath_completion`).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fastpath(u32);

impl Fastpath {
    /// The exit is to be handled.
    pub(crate) const NONE: Self = Self(bindings::MTK_FASTPATH_NONE);
    /// It was, and the guest can run on.
    pub(crate) const REENTER: Self = Self(bindings::MTK_FASTPATH_REENTER);
    /// It was, and the guest can run on after a turn of the outer loop.
    pub(crate) const HANDLED: Self = Self(bindings::MTK_FASTPATH_HANDLED);
    /// It was, and user space is to see the vCPU.
    pub(crate) const USERSPACE: Self = Self(bindings::MTK_FASTPATH_USERSPACE);

    /// What the stock function returned.
    #[inline(always)]
    pub(crate) fn from_stock(rax: usize) -> Self {
        Self(rax as u32)
    }

    /// As the stock function returns it.
    #[inline(always)]
    pub(crate) fn to_stock(self) -> usize {
        self.0 as usize
    }
}

/// The current task's accesses to its user space fail where they would have to wait: `pagefault_disable()`.
pub(crate) struct NoFaults(PhantomData<*mut ()>);

impl NoFaults {
    /// From here on.
    #[inline(always)]
    pub(crate) fn new() -> Self {
        Self::add(1);
        Self(PhantomData)
    }

    #[inline(always)]
    fn add(n: i32) {
        let task = current!().as_ptr().cast::<bindings::task_struct>();
        // SAFETY: The current task's own count, which no other task looks at; an interrupt leaves it as it finds it.
        unsafe {
            let count = &raw mut (*task).pagefault_disabled;
            count.write_volatile(count.read_volatile().wrapping_add(n));
        }
    }
}

impl Drop for NoFaults {
    #[inline(always)]
    fn drop(&mut self) {
        Self::add(-1);
    }
}

/// POSTED_INTR_ON: an interrupt was posted.
const POSTED: u64 = 1 << 0;
/// What a task has to do before it runs a guest.
const WORK: usize = bindings::MTK_GUEST_MODE_WORK as usize;

/// VMX_VPID_INVVPID_BIT of `vpid_caps`; the types (SDM volume 3, 32.3) are bits from 8 on.
const INVVPID: u32 = 1 << 0;
const TYPES: u32 = 8;
/// An address, and whatever its context has.
const INDIVIDUAL_ADDRESS: u64 = 0;
const SINGLE_CONTEXT: u64 = 1;
const ALL_CONTEXTS: u64 = 2;
const SINGLE_CONTEXT_BUT_GLOBAL: u64 = 3;

impl Vcpu {
    /// Whether nothing beside the exit reason wants to be looked at: no VMfail, the VMM neither debugs the guest nor waits to interrupt it, the guest
    /// does not count instructions (its counters may be in the processor, as for `kvm_pmu_is_fastpath_emulation_allowed()`),
    /// and the processor lets the kernel access what the VMM may access.
    #[inline(always)]
    pub(crate) fn has_plain_exit(self) -> bool {
        read!(self, fail) == 0
            && read!(self, vcpu.guest_debug) == 0
            && !self.counts_instructions()
            && self.has_host_pkru()
            && !self.wants_window()
    }

    /// Whether the VMM has an interrupt of its own for the guest and waits for a moment at which it can be delivered
    /// (`dm_request_for_irq_injection()`), or keeps the guest's local APIC: KVM looks for such a moment on each exit.
    #[inline(always)]
    fn wants_window(self) -> bool {
        let run = read!(self, vcpu.run);
        // SAFETY: The page that KVM shares with its VMM, which lives as long as the vCPU. User space writes it, so it is read in one go.
        let asked = unsafe { (&raw const (*run).request_interrupt_window).read_volatile() };
        asked != 0 || read!(self, vcpu.arch.apic).is_null()
    }

    /// Whether the guest can be run again at once, as KVM itself finds out between two runs (kvm_vcpu_exit_request(); it also looks for posted
    /// interrupts). If not, KVM is to look.
    ///
    /// Whoever makes something to be looked at from now on interrupts this CPU, which ends the run.
    #[inline(always)]
    pub(crate) fn may_run_on(self) -> bool {
        let task = current!().as_ptr().cast::<bindings::task_struct>();
        // SAFETY: By the invariants of `Vcpu`, and the current task's own flags. Other threads write all of them, so each is read in one go.
        let (mode, requests, posted, flags) = unsafe {
            let vmx = self.raw();
            (
                (&raw const (*vmx).vcpu.mode).read_volatile(),
                (&raw const (*vmx).vcpu.requests).read_volatile(),
                (&raw const (*vmx).vt.pi_desc.__bindgen_anon_1.control).read_volatile(),
                (&raw const (*task).thread_info.flags).read_volatile(),
            )
        };
        mode == bindings::MTK_IN_GUEST_MODE as i32
            && requests == 0
            && posted & POSTED == 0
            && flags & WORK == 0
    }

    /// Counts an exit that KVM does not see, in its own statistics.
    #[inline(always)]
    pub(crate) fn count_exit(self) {
        // SAFETY: By the invariants of `Vcpu` this thread alone writes it.
        unsafe {
            let exits = &raw mut (*self.raw()).vcpu.stat.exits;
            exits.write(exits.read().wrapping_add(1));
        }
    }

    /// Whether the protection keys in force are the VMM's. KVM loads the guest's for the inner loop, and does not know what the guest has
    /// made of them before the loop ends.
    #[inline(always)]
    fn has_host_pkru(self) -> bool {
        // As vmx_vcpu_run() has just written it to the VMCS.
        let loaded = read!(self, loaded_vmcs);
        // SAFETY: KVM's own pointer to one of the vCPU's two `loaded_vmcs`.
        let cr4 = unsafe { (*loaded).host_state.cr4 } as u64;
        // SAFETY: CR4.PKE is on where this is executed.
        cr4 & CR4_PKE == 0 || unsafe { vmx::rdpkru() } == read!(self, vcpu.arch.host_pkru)
    }

    /// Copies vmcs12 to the shadow VMCS if L1 is to find it there, as vmx_prepare_switch_to_guest() does. `false`: it was
    /// not done.
    ///
    /// Must not be called within `state::with`: the function is a hooked one.
    #[inline(always)]
    pub(crate) fn sync_shadow(self) -> bool {
        if !self.vmcs12_is_newer() {
            return true;
        }
        // SAFETY: vmcs01 is current on this CPU, with preemption off, and L1 is about to run.
        unsafe { CallId::SYNC_SHADOW.call([self.key()]) }.is_some()
    }

    /// INVVPID of L1 in the plain case, but for the end of it: handle_invvpid() and what it calls. `None`: nothing has
    /// happened that must not happen twice.
    ///
    /// # Safety
    ///
    /// L1, which is in VMX operation, has just exited by INVVPID, with vmcs01 current and preemption off.
    pub(crate) unsafe fn invvpid(self, memory: &mut GuestMemory, trail: &mut Trail) -> Option<()> {
        let caps = read!(self, nested.msrs.vpid_caps);
        if read!(self, nested.msrs.secondary_ctls_high) & secondary::VPID == 0
            || caps & INVVPID == 0
        {
            return None;
        }
        // SAFETY: By this function's contract.
        let info = unsafe { vmx::vmread(VMX_INSTRUCTION_INFO) }? as u32;
        // Register 2 has the type (SDM table 29-13).
        let kind = self.gpr((info >> 28) as usize)?;
        if kind > SINGLE_CONTEXT_BUT_GLOBAL || caps >> (TYPES + kind as u32) & 1 == 0 {
            return None;
        }
        let address = self.operand_address(info, size_of::<[u64; 2]>())?;
        let [vpid, linear] = self.descriptor_at(address, memory, trail)?;
        let valid = vpid >> 16 == 0
            && (vpid != 0 || kind == ALL_CONTEXTS)
            && (kind != INDIVIDUAL_ADDRESS || is_plain_address(linear, 1));
        // Whichever VPID L1 names, all of L2's translations have vpid02. On another CPU KVM puts it off.
        let vpid02 = self.vpid(Tag::L2);
        if !valid || vpid02 == 0 || !self.vmcs02_is_here() {
            return None;
        }
        let (kind, linear) = match kind {
            INDIVIDUAL_ADDRESS => (INDIVIDUAL_ADDRESS, linear),
            _ => (SINGLE_CONTEXT, 0),
        };
        // SAFETY: By this function's contract. A processor without this type fails, and the stock code knows what to do.
        unsafe { vmx::invvpid(kind, vpid02, linear) }.then_some(())
    }

    /// Whether vmcs02 was last loaded on the CPU that vmcs01 is loaded on.
    fn vmcs02_is_here(self) -> bool {
        read!(self, nested.vmcs02.cpu) == read!(self, vmcs01.cpu)
    }
}
