// SPDX-License-Identifier: GPL-2.0
//! What vcpu_enter_guest() prepares before its inner loop, and so what a switch between L1 and L2 inside the loop must leave as it
//! is, or do itself.
//!
//! Outside of the loop KVM carries out requests, loads the root of the guest's table, the guest's extended state, protection keys and debug
//! registers, and MSRs (vmx_prepare_switch_to_guest()). Behind it, with interrupts off, only vmx_vcpu_run() comes.

use super::{
    fields::encoding::{
        EXIT_QUALIFICATION, GUEST_INTERRUPTIBILITY_INFO, GUEST_SS_AR_BYTES, VMX_INSTRUCTION_INFO,
        VM_EXIT_INSTRUCTION_LEN, VM_EXIT_INTR_INFO,
    },
    guest_memory::GuestMemory,
    roots::{self, LOAD_PGD},
    vcpu::read,
    vmcs12::field,
    vmx, Vcpu, Vmcs12,
};
use crate::{
    bindings,
    hook::{self, CallId},
    policy::{
        controls::{primary::MSR_BITMAPS, secondary::PML},
        reflect,
        registers::{CR4_OSXSAVE, CR4_PKE},
    },
};
use core::{
    arch::asm,
    mem::offset_of,
    sync::atomic::{AtomicPtr, AtomicU64, Ordering},
};

/// Requests for the TLB to be flushed of what it has of the guest that is to run.
const FLUSHES: u64 =
    1 << bindings::MTK_REQ_TLB_FLUSH_CURRENT | 1 << bindings::MTK_REQ_TLB_FLUSH_GUEST;
/// VECTORING_INFO_VALID_MASK (SDM table 26-18).
const VECTORING: u32 = 1 << 31;
/// Blocking by MOV SS (SDM table 26-3).
const MOV_SS: u64 = 1 << 1;
/// XFEATURE_MASK_PKRU.
const XCR0_PKRU: u64 = 1 << 9;
/// MSR_MISC_FEATURES_ENABLES_CPUID_FAULT.
const CPUID_FAULT: u64 = 1 << 0;
/// MSR_IA32_XSS.
const IA32_XSS: u32 = 0xda0;

/// `kvm_host.xcr0` and `kvm_host.xss`: what the host has. `NEVER` if that is not known.
static HOST_XCR0: AtomicU64 = AtomicU64::new(NEVER);
static HOST_XSS: AtomicU64 = AtomicU64::new(NEVER);
/// No value of the two: bit 63 of both is reserved.
const NEVER: u64 = u64::MAX;

/// `force_flush_and_sync_on_reuse`; null if it, or one of KVM's functions, was not found.
static FLUSH_ON_REUSE: AtomicPtr<u8> = AtomicPtr::new(core::ptr::null_mut());

/// Finds out what does not change while kvm_intel is loaded. Reads a file.
pub(crate) fn prepare() {
    host_registers();
    roots::prepare();
    let calls = [
        CallId::NESTED_VMEXIT,
        CallId::LOAD_PGD,
        CallId::FLUSH_LOCAL,
        CallId::ENTER_GUEST,
        CallId::SYNC_SHADOW,
    ];
    let parameter = hook::variable(c"kvm:force_flush_and_sync_on_reuse")
        .filter(|_| calls.iter().all(|call| call.is_available()));
    FLUSH_ON_REUSE.store(parameter.unwrap_or(0) as *mut u8, Ordering::Relaxed);
}

/// Reads what the host has in the two registers, which it set for good when its processors came up. Process context.
fn host_registers() {
    use core::arch::x86_64::{__cpuid, __cpuid_count};
    const OSXSAVE: u32 = 1 << 27;
    const XSAVES: u32 = 1 << 3;
    // SAFETY: Every 64-bit processor has leaf 1.
    if unsafe { __cpuid(1) }.ecx & OSXSAVE == 0 {
        return;
    }
    let (low, high): (u32, u32);
    // SAFETY: The processor and the kernel have XSAVE, and XCR0 is register 0. KVM loads the guest's with interrupts off only.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack))
    };
    HOST_XCR0.store(u64::from(high) << 32 | u64::from(low), Ordering::Relaxed);
    // SAFETY: With XSAVE there is leaf 13.
    let xss = match unsafe { __cpuid_count(0xd, 1) }.eax & XSAVES {
        0 => 0,
        // SAFETY: As CPUID says, the register is there.
        _ => unsafe { vmx::rdmsr(IA32_XSS) },
    };
    HOST_XSS.store(xss, Ordering::Relaxed);
}

/// Whether the functions are there that a switch inside the loop needs, and KVM's parameter `flush_on_reuse`, by which it flushes more, is off.
#[inline(always)]
pub(crate) fn is_able() -> bool {
    let parameter = FLUSH_ON_REUSE.load(Ordering::Relaxed);
    // SAFETY: KVM's own variable, which stays as long as handlers run; root may set it at any time.
    !parameter.is_null() && unsafe { parameter.read_volatile() } == 0
}

impl Vcpu {
    /// `vcpu->requests`, which other threads make as well.
    #[inline(always)]
    fn requests(self) -> u64 {
        // SAFETY: By the invariants of `Vcpu`; read in one go.
        unsafe { (&raw const (*self.raw()).vcpu.requests).read_volatile() }
    }

    /// Whether KVM has nothing to do before the guest runs on, nor does something on each exit that leaves the loop (the TPR in L1's memory, a TSC that runs after the guest's,
    /// Xen's events), the last exit came with nothing that is still to be delivered, and neither debug registers of the guest's are loaded nor another CPU has one of the two VMCSs.
    #[inline(always)]
    pub(crate) fn is_settled(self) -> bool {
        self.requests() == 0
            && read!(self, vcpu.arch.switch_db_regs) == 0
            && read!(self, vcpu.arch.apic_attention) == 0
            && !read!(self, vcpu.arch.tsc_always_catchup)
            && !self.has_xen_info()
            && read!(self, idt_vectoring_info) & VECTORING == 0
            && !read!(self, vt.emulation_required)
            && read!(self, vmcs01.soft_vnmi_blocked) | read!(self, nested.vmcs02.soft_vnmi_blocked)
                == 0
            && read!(self, nested.vmcs02.cpu) == read!(self, vmcs01.cpu)
    }

    /// Whether KVM looks for events of Xen's on each exit: L1 has said where its `vcpu_info` is (kvm_xen_has_interrupt()).
    #[inline(always)]
    fn has_xen_info(self) -> bool {
        #[cfg(CONFIG_KVM_XEN)]
        {
            read!(self, vcpu.arch.xen.vcpu_info_cache.active)
        }
        #[cfg(not(CONFIG_KVM_XEN))]
        {
            false
        }
    }

    /// Whether vmcs01 logs pages that are written (PML): KVM looks at the log on an exit of L1, and not on one of L2.
    #[inline(always)]
    pub(crate) fn logs_pages(self) -> bool {
        read!(self, vmcs01.controls_shadow.secondary_exec) & PML != 0
    }

    /// Whether the extended state that is loaded is right for a guest with this CR4 as well (kvm_load_xfeatures(), kvm_load_guest_pkru()): what
    /// KVM loads, and takes back when the loop ends, depends on two bits of it.
    #[inline(always)]
    pub(crate) fn keeps_extended_state(self, cr4: u64) -> bool {
        let differs = (read!(self, vcpu.arch.cr4) as u64 ^ cr4) & (CR4_OSXSAVE | CR4_PKE);
        differs == 0 || self.has_host_extended_state(differs)
    }

    /// The same where these bits differ.
    #[inline(never)]
    fn has_host_extended_state(self, differs: u64) -> bool {
        let xcr0 = read!(self, vcpu.arch.xcr0);
        let same = xcr0 == HOST_XCR0.load(Ordering::Relaxed)
            && read!(self, vcpu.arch.ia32_xss) == HOST_XSS.load(Ordering::Relaxed);
        (differs & CR4_OSXSAVE == 0 || same) && (differs & CR4_PKE == 0 || xcr0 & XCR0_PKRU != 0)
    }

    /// Whether none of the breakpoints in this DR7 of L2's, or in L1's, is enabled.
    #[inline(always)]
    pub(crate) fn has_no_breakpoints(self, dr7: u64) -> bool {
        const ENABLED: u64 = 0xff;
        (dr7 | read!(self, vcpu.arch.dr7) as u64) & ENABLED == 0
    }

    /// Whether a counter of the guest's counts branches, as which VMLAUNCH and VMRESUME go (kvm_pmu_branch_retired()).
    #[inline(always)]
    pub(crate) fn counts_branches(self) -> bool {
        let counters = read!(self, vcpu.arch.pmu.pmc_counting_branches);
        counters.iter().any(|&word| word != 0)
    }

    /// Whether L0 has CPUID fault in the guest.
    #[inline(always)]
    pub(crate) fn cpuid_faults(self) -> bool {
        read!(self, vcpu.arch.msr_misc_features_enables) & CPUID_FAULT != 0
    }

    /// Whether the guest, L1, may enter L2 as far as its own state goes: nested_vmx_check_permission(), and no blocking by MOV SS.
    ///
    /// # Safety
    ///
    /// L1 has just exited, with vmcs01 current.
    #[inline(always)]
    pub(crate) unsafe fn may_enter_l2(self) -> bool {
        // SAFETY: By this function's contract; every processor has these fields.
        let vmread = |field| unsafe { vmx::vmread_basic(field) };
        self.vmxon()
            && vmread(GUEST_SS_AR_BYTES) & 3 << 5 == 0
            && vmread(GUEST_INTERRUPTIBILITY_INFO) & MOV_SS == 0
    }

    /// Sets `nested_run_pending`: L1's VMRESUME is being carried out (KVM_NESTED_RUN_PENDING), and as nested_vmx_run() does
    /// before, that no deadline of the preemption timer is known; or that it is not.
    #[inline(always)]
    pub(crate) fn set_run_pending(self, pending: bool) {
        // SAFETY: By the invariants of `Vcpu` these are this thread's.
        unsafe {
            (&raw mut (*self.raw()).vcpu.arch.nested_run_pending).write(u8::from(pending));
            (&raw mut (*self.raw()).nested.has_preemption_timer_deadline).write(false);
        }
    }

    /// nested_vmx_vmexit(): L2 exits to L1, as it has exited from the processor. `false` if KVM's function is missing.
    ///
    /// Must not be called within `state::with`: hooked functions are among those that KVM calls here.
    ///
    /// # Safety
    ///
    /// L2 has just exited for this `reason`, which is L1's, with nothing the matter (`is_settled`), and vmcs02 is current.
    #[inline(always)]
    pub(crate) unsafe fn exit_to_l1(self, reason: u32) -> bool {
        // SAFETY: By this function's contract; every processor has these fields.
        let vmread = |field| unsafe { vmx::vmread_basic(field) } as usize;
        let args = [
            self.key(),
            reason as usize,
            vmread(VM_EXIT_INTR_INFO),
            vmread(EXIT_QUALIFICATION),
            vmread(VM_EXIT_INSTRUCTION_LEN),
        ];
        // SAFETY: As KVM itself calls it.
        unsafe { CallId::NESTED_VMEXIT.call(args) }.is_some()
    }

    /// Whether L1 wants to see the VMREAD or VMWRITE by which L2 has just exited, given the address of its bitmap
    /// (nested_vmx_exit_handled_vmcs_access()). `None` if that cannot be read now.
    ///
    /// # Safety
    ///
    /// vmcs02 is current, and L1 uses VMCS shadowing for L2.
    #[inline(always)]
    pub(crate) unsafe fn sees_access(self, bitmap: u64, memory: &mut GuestMemory) -> Option<bool> {
        // SAFETY: By this function's contract.
        let info = unsafe { vmx::vmread(VMX_INSTRUCTION_INFO) }?;
        // Register 2 names the field (SDM table 29-14).
        let field = self.gpr((info >> 28 & 0xf) as usize)?;
        // Outside 64-bit mode KVM leaves out the high half.
        if field >> 32 != 0 {
            return None;
        }
        let Some((word, bit)) = reflect::place(field) else {
            return Some(true);
        };
        // KVM reads a byte, of a page whose address was checked to be one.
        let word = memory.read_u64(bitmap.wrapping_add(word * 8))?;
        Some(word >> bit & 1 != 0)
    }

    /// Whether L1 wants to see the RDMSR or WRMSR by which L2 has just exited (nested_vmx_exit_handled_msr()). `None` if its bitmap cannot be read now.
    ///
    /// # Safety
    ///
    /// KVM's SRCU lock is held.
    #[inline(always)]
    pub(crate) unsafe fn sees_msr(
        self,
        m: Vmcs12,
        write: bool,
        memory: &mut GuestMemory,
    ) -> Option<bool> {
        const RCX: usize = 1;
        if m.primary_controls() & MSR_BITMAPS == 0 {
            return Some(true);
        }
        let Some((word, bit)) = reflect::msr_place(self.gpr(RCX)? as u32, write) else {
            return Some(true);
        };
        let word = memory.read_u64(field!(m, msr_bitmap).wrapping_add(word * 8))?;
        Some(word >> bit & 1 != 0)
    }

    /// Does what is to be done outside the loop after a switch inside it: the root goes into the VMCS, the TLB is flushed, MSRs go into the processor, vmcs12 to the
    /// shadow VMCS. Returns whether there is nothing else to be done, which KVM has to do.
    ///
    /// Must not be called within `state::with`: a hooked function is among those that KVM calls here.
    ///
    /// # Safety
    ///
    /// Interrupts are off, KVM's SRCU lock is held, and a guest in 64-bit mode is to run, KVM using EPT and unrestricted guest, by a root that `use_root` has put to use.
    #[inline(always)]
    pub(crate) unsafe fn settle_switch(self) -> bool {
        let requests = self.requests();
        if requests & LOAD_PGD != 0 {
            // The request goes first, as in kvm_check_request().
            // SAFETY: By the invariants of `Vcpu`; other threads make requests as well, with locked instructions.
            let word = unsafe { AtomicU64::from_ptr(&raw mut (*self.raw()).vcpu.requests) };
            word.fetch_and(!LOAD_PGD, Ordering::SeqCst);
            let mmu = read!(self, vcpu.arch.mmu);
            // SAFETY: KVM's own pointer to one of the vCPU's MMUs; by this function's contract.
            unsafe { self.load_root((*mmu).root.hpa) };
        }
        if requests & FLUSHES != 0 {
            // SAFETY: As KVM calls it, with the VMCS of the guest that is to run current.
            unsafe { CallId::FLUSH_LOCAL.call([self.key()]) };
        }
        if !read!(self, guest_uret_msrs_loaded) {
            // SAFETY: As KVM calls it before the loop; the guest's state has been loaded, so that only MSRs and the shadow VMCS are left.
            unsafe { CallId::ENTER_GUEST.call([self.key()]) };
        } else if !self.guest_mode() && !self.sync_shadow() {
            return false;
        }
        requests & !(LOAD_PGD | FLUSHES) == 0
    }
}

/// `kvm_request_l1tf_flush_l1d()`: the L1 data cache of this CPU is flushed before a guest runs, if that is how the host goes about it.
///
/// # Safety
///
/// Preemption is off.
#[inline(always)]
pub(crate) unsafe fn request_l1d_flush() {
    #[cfg(CONFIG_CPU_MITIGATIONS)]
    // SAFETY: A byte of this CPU's own, which an interrupt may set as well.
    unsafe {
        asm!(
            "mov byte ptr gs:[rip + irq_stat + {flag}], 1",
            flag = const offset_of!(bindings::irq_cpustat_t, kvm_cpu_l1tf_flush_l1d),
            options(nostack, preserves_flags),
        );
    }
}
