// SPDX-License-Identifier: GPL-2.0
//! What nested_vmx_enter_non_root_mode() does for an L2 in 64-bit mode, where KVM uses EPT and unrestricted guest.
//!
//! `plan` finds out whether it can be done here and with what, `rare` has what is seldom done besides, `compare` is for mode `check`. The
//! rest does it.

mod compare;
mod plan;
mod rare;

pub(crate) use rare::prepare;

use super::{
    efer::{ENTRY_CONTROLS as EFER_ENTRY, EXIT_CONTROLS as EFER_EXIT},
    fields::encoding::*,
    roots::Root,
    vcpu::{read, BP_ENABLED},
    vmcs12::field,
    vmx, Vcpu, Vmcs12,
};
use crate::{
    bindings,
    hook::CallId,
    policy::{
        controls::{
            pin::{POSTED_INTERRUPTS, PREEMPTION_TIMER},
            primary::{INTERRUPT_WINDOW, MSR_BITMAPS, NMI_WINDOW, TPR_SHADOW, TSC_OFFSETTING},
            secondary::{EPT, INTERRUPT_DELIVERY, TSC_SCALING, UNRESTRICTED_GUEST, VPID},
            vm_entry::{LOAD_BNDCFGS, LOAD_PAT},
        },
        entry::{self, Controls},
        host_state::DR7,
        registers::{CR4_IN_CPUID, CR4_UMIP, HF_GUEST},
        role::Key,
    },
};
use core::sync::atomic::Ordering;

/// DR7_BP_EN_MASK: the breakpoints' enable bits.
const BREAKPOINTS: u64 = 0xff;
/// DR7_VOLATILE.
const DR7_VOLATILE: u64 = 0xffff_2bff;
/// GUEST_INTR_STATE_NMI: NMIs are blocked.
const BLOCKED_NMI: u64 = 1 << 3;
/// Shift of the preemption timer's units against the TSC's, VMX_MISC_EMULATED_PREEMPTION_TIMER_RATE.
const TIMER_RATE: u32 = 5;

const FLUSH_GUEST: u64 = 1 << bindings::MTK_REQ_TLB_FLUSH_GUEST;
const EVENT: u64 = 1 << bindings::MTK_REQ_EVENT;

const RFLAGS: u32 = 1 << bindings::MTK_REG_RFLAGS;
const CR0: u32 = 1 << bindings::MTK_REG_CR0;
const CR4: u32 = 1 << bindings::MTK_REG_CR4;
/// Registers that go into the VMCS before L2 runs.
const DIRTY: u32 =
    1 << bindings::MTK_REG_RSP | 1 << bindings::MTK_REG_RIP | 1 << bindings::MTK_REG_CR3;
/// Registers that are in KVM's cache afterwards.
const AVAILABLE: u32 = RFLAGS | CR0 | CR4 | DIRTY;

/// What the stock function made of what vmcs12 had, the last time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Derived {
    cr0: u64,
    guest_cr0: u64,
    cr4: u64,
    guest_cr4: u64,
    /// Exception bitmap of vmcs12, and whether KVM has #NM exit for its own purposes.
    wanted_exceptions: u64,
    no_xfd_exits: bool,
    exceptions: u64,
    /// What decides the mode of the guest's MMU, see `Vcpu::ept_mode`, and that mode.
    ept_mode: u64,
    roles: (u64, u32),
}

impl Derived {
    /// KVM emulates CR4.UMIP, by a control.
    #[inline(always)]
    fn emulates_umip(&self) -> bool {
        self.cr4 & !self.guest_cr4 & CR4_UMIP != 0
    }
}

/// An entry of L2, all of which was looked at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    /// Without the bits that EFER makes.
    controls: Controls,
    wanted: Controls,
    /// L2's EFER.
    pub(crate) efer: u64,
    derived: Derived,
    /// L1's CR3, and what it has in IA32_DEBUGCTL if that stays in force.
    cr3: u64,
    debugctl: Option<u64>,
    owned_cr0: u64,
    /// The mode of the guest's paging.
    pub(crate) paging: Key,
    clear_bndcfgs: bool,
    /// L1 has changed other fields as well, or another vmcs12 was entered before.
    dirty: bool,
}

impl Entry {
    /// L1's EPT translates L2's addresses.
    #[inline(always)]
    pub(crate) fn has_ept(&self) -> bool {
        self.wanted.secondary & EPT != 0
    }

    /// It was made.
    #[inline(always)]
    pub(crate) fn made(&self) -> Made {
        Made {
            ept: self.has_ept(),
            timer: self.wanted.pin & PREEMPTION_TIMER != 0,
            root: None,
        }
    }

    /// KVM looks at L2's segments before it enters L2.
    #[inline(always)]
    pub(crate) fn wants_valid_segments(&self) -> bool {
        self.wanted.secondary & UNRESTRICTED_GUEST == 0
    }

    /// Whether an interrupt or NMI window of L1's was open.
    #[inline(always)]
    fn had_window(vcpu: Vcpu) -> bool {
        read!(vcpu, vmcs01.controls_shadow.exec) & (INTERRUPT_WINDOW | NMI_WINDOW) != 0
    }
}

/// What is left to know of an entry that was made, for `Vcpu::finish_entry`.
#[derive(Clone, Copy)]
pub(crate) struct Made {
    ept: bool,
    timer: bool,
    /// The root that is to be used, if KVM is not to look for one.
    root: Option<Root>,
}

impl Made {
    /// With this root, which is the right one.
    #[inline(always)]
    pub(crate) fn with_root(self, root: Option<Root>) -> Self {
        Self { root, ..self }
    }

    /// The address of the root of EPT02 that was looked for, if one was.
    #[inline(always)]
    pub(crate) fn ept02(self) -> Option<u64> {
        self.root.filter(|_| self.ept).map(Root::address)
    }

    /// L1's EPT translates L2's addresses.
    #[inline(always)]
    pub(crate) fn has_ept(self) -> bool {
        self.ept
    }
}

/// See `Vcpu::entry_state`.
struct State {
    rsp: usize,
    rip: usize,
    rflags: usize,
    cr3: usize,
    /// IA32_PAT, if it is loaded.
    pat: Option<u64>,
    /// L1's virtual-processor identifier for L2, if it uses one.
    vpid: Option<u16>,
    /// `posted_intr_nv`: the vector that notifies of posted interrupts.
    vector: u16,
    unmasked_nmi: bool,
}

impl Vcpu {
    /// `vmx_switch_vmcs()`. `false` if it could not be called.
    ///
    /// # Safety
    ///
    /// The vCPU is loaded by this task, and the other of its two VMCSs is current.
    #[inline(always)]
    pub(crate) unsafe fn switch_vmcs(self, to_vmcs02: bool) -> bool {
        let vmx = self.raw();
        // SAFETY: Only addresses are taken, and by this function's contract.
        unsafe {
            let vmcs = if to_vmcs02 {
                &raw mut (*vmx).nested.vmcs02
            } else {
                &raw mut (*vmx).vmcs01
            };
            CallId::SWITCH_VMCS.call([self.key(), vmcs as usize])
        }
        .is_some()
    }

    /// Every field of vmcs02 that is written, but for controls and EFER, with its value.
    #[inline(always)]
    fn entry_fields(self, m: Vmcs12, e: &Entry, mut f: impl FnMut(u64, u64)) {
        let host =
            read!(self, vcpu.arch.host_debugctl) & u64::from(bindings::MTK_HOST_OWNED_DEBUGCTL);
        if e.controls.primary & TPR_SHADOW != 0 {
            f(TPR_THRESHOLD, field!(m, tpr_threshold));
        }
        if e.controls.secondary & INTERRUPT_DELIVERY != 0 {
            f(GUEST_INTR_STATUS, field!(m, guest_intr_status));
        }
        f(
            VM_ENTRY_INTR_INFO_FIELD,
            field!(m, vm_entry_intr_info_field),
        );
        f(
            VM_ENTRY_EXCEPTION_ERROR_CODE,
            field!(m, vm_entry_exception_error_code),
        );
        f(
            VM_ENTRY_INSTRUCTION_LEN,
            field!(m, vm_entry_instruction_len),
        );
        f(
            GUEST_INTERRUPTIBILITY_INFO,
            field!(m, guest_interruptibility_info),
        );
        f(GUEST_DR7, self.entry_dr7(m, e));
        f(GUEST_IA32_DEBUGCTL, e.debugctl.unwrap_or(0) | host);
        if e.clear_bndcfgs {
            f(GUEST_BNDCFGS, 0);
        }
        f(GUEST_RFLAGS, field!(m, guest_rflags));
        f(EXCEPTION_BITMAP, e.derived.exceptions);
        f(CR0_GUEST_HOST_MASK, !e.owned_cr0);
        if e.wanted.entry & LOAD_PAT != 0 {
            f(GUEST_IA32_PAT, field!(m, guest_ia32_pat));
        } else if read!(self, vmcs01.controls_shadow.vm_entry) & LOAD_PAT != 0 {
            f(GUEST_IA32_PAT, read!(self, vcpu.arch.pat));
        }
        f(TSC_OFFSET, self.entry_tsc_offset(m, e));
        if read!(self, vmcs01.controls_shadow.secondary_exec) & TSC_SCALING != 0 {
            f(TSC_MULTIPLIER, read!(self, vcpu.arch.l1_tsc_scaling_ratio));
        }
        let (mask, shadow) = (field!(m, cr0_guest_host_mask), field!(m, cr0_read_shadow));
        f(GUEST_CR0, e.derived.guest_cr0);
        f(
            CR0_READ_SHADOW,
            entry::read_shadow(field!(m, guest_cr0), mask, shadow),
        );
        let (mask, shadow) = (field!(m, cr4_guest_host_mask), field!(m, cr4_read_shadow));
        f(GUEST_CR4, e.derived.guest_cr4);
        f(
            CR4_READ_SHADOW,
            entry::read_shadow(field!(m, guest_cr4), mask, shadow),
        );
        f(GUEST_CR3, field!(m, guest_cr3));
    }

    /// The DR7 that L2 has.
    #[inline(always)]
    fn entry_dr7(self, m: Vmcs12, e: &Entry) -> u64 {
        let dr7 = if e.debugctl.is_none() {
            field!(m, guest_dr7)
        } else {
            read!(self, vcpu.arch.dr7) as u64
        };
        dr7 & DR7_VOLATILE | DR7
    }

    /// `kvm_calc_nested_tsc_offset()` without scaling.
    #[inline(always)]
    fn entry_tsc_offset(self, m: Vmcs12, e: &Entry) -> u64 {
        let l1 = read!(self, vcpu.arch.l1_tsc_offset);
        if e.wanted.primary & TSC_OFFSETTING != 0 {
            l1.wrapping_add(field!(m, tsc_offset))
        } else {
            l1
        }
    }

    /// Sets the controls of vmcs02, as KVM does where they are not what they have been, but for the bits that EFER makes.
    ///
    /// # Safety
    ///
    /// vmcs02 is current.
    #[inline(always)]
    unsafe fn set_entry_controls(self, controls: &Controls) {
        // SAFETY: By the invariants of `Vcpu` and this function's contract; KVM's copies are kept right.
        unsafe {
            let shadow = &raw mut (*self.raw()).nested.vmcs02.controls_shadow;
            macro_rules! set {
                ($member:ident, $encoding:expr, $value:expr) => {
                    let value = $value;
                    if (*shadow).$member != value {
                        vmx::vmwrite_basic($encoding, u64::from(value));
                        (*shadow).$member = value;
                    }
                };
            }
            set!(pin, PIN_BASED_VM_EXEC_CONTROL, controls.pin);
            set!(exec, CPU_BASED_VM_EXEC_CONTROL, controls.primary);
            set!(
                secondary_exec,
                SECONDARY_VM_EXEC_CONTROL,
                controls.secondary
            );
            let entry = controls.entry | (*shadow).vm_entry & EFER_ENTRY;
            set!(vm_entry, VM_ENTRY_CONTROLS, entry);
            let exit = controls.exit | (*shadow).vm_exit & EFER_EXIT;
            set!(vm_exit, VM_EXIT_CONTROLS, exit);
        }
    }

    /// The registers and the like of L2 that are in KVM's memory as well.
    #[inline(always)]
    fn entry_state(m: Vmcs12, e: &Entry) -> State {
        State {
            rsp: field!(m, guest_rsp) as usize,
            rip: field!(m, guest_rip) as usize,
            rflags: field!(m, guest_rflags) as usize,
            cr3: field!(m, guest_cr3) as usize,
            pat: (e.wanted.entry & LOAD_PAT != 0).then(|| field!(m, guest_ia32_pat)),
            vpid: (e.wanted.secondary & VPID != 0).then(|| field!(m, virtual_processor_id) as u16),
            vector: if e.wanted.pin & POSTED_INTERRUPTS != 0 {
                field!(m, posted_intr_nv) as u16
            } else {
                u16::MAX
            },
            unmasked_nmi: field!(m, guest_interruptibility_info) & BLOCKED_NMI == 0,
        }
    }

    /// Does what nested_vmx_enter_non_root_mode() does from the change to vmcs02 on, but for guest pages and MSR bitmap, EFER,
    /// the description of the guest's paging, and `finish_entry`.
    ///
    /// # Safety
    ///
    /// In the handler of nested_vmx_enter_non_root_mode(), vmcs02 has just been made current, after `enter_dirty`, `e` is `plan_entry`'s for
    /// this vmcs12 and `would_derive` said yes to what it was made of; KVM uses EPT and unrestricted guest.
    #[inline(always)]
    pub(crate) unsafe fn enter(self, m: Vmcs12, e: &Entry) {
        let dr7 = self.entry_dr7(m, e);
        let tsc_offset = self.entry_tsc_offset(m, e);
        let state = Self::entry_state(m, e);
        // SAFETY: By this function's contract.
        unsafe { self.set_entry_controls(&e.controls) };
        self.entry_fields(m, e, |field, value| {
            // SAFETY: By this function's contract vmcs02 is current, and these are the values that KVM would write.
            unsafe { vmx::vmwrite_basic(field, value) };
        });
        if e.dirty {
            // SAFETY: By this function's contract.
            unsafe { self.finish_dirty(m) };
        }
        let vmx = self.raw();
        // SAFETY: By the invariants of `Vcpu` all of this is this thread's.
        unsafe {
            let nested = &raw mut (*vmx).nested;
            if let Some(debugctl) = e.debugctl {
                (*nested).pre_vmenter_debugctl = debugctl;
            }
            if e.clear_bndcfgs {
                (*nested).pre_vmenter_bndcfgs = 0;
            }
            (*nested).pre_vmenter_cr3 = e.cr3 as usize;
            (*nested).pi_pending = false;
            (*nested).posted_intr_nv = state.vector;
            (*nested).vmcs02.nmi_known_unmasked = state.unmasked_nmi;
            (*nested).preemption_timer_expired = false;
            (*vmx).vcpu.stat.guest_mode = 1;
            (*vmx).rflags = state.rflags;
            (*vmx).vt.emulation_required = false;
            let arch = &raw mut (*vmx).vcpu.arch;
            (*arch).hflags |= HF_GUEST as u32;
            (*arch).dr7 = dr7 as usize;
            (*arch).switch_db_regs &= !BP_ENABLED;
            if dr7 & BREAKPOINTS != 0 {
                (*arch).switch_db_regs |= BP_ENABLED;
            }
            (*arch).cr0_guest_owned_bits = e.owned_cr0 as usize;
            if let Some(pat) = state.pat {
                (*arch).pat = pat;
            }
            (*arch).tsc_offset = tsc_offset;
            (*arch).tsc_scaling_ratio = (*arch).l1_tsc_scaling_ratio;
            if e.has_ept() {
                // nested_ept_init_mmu_context(), its part that changes anything.
                (*arch).mmu = &raw mut (*arch).guest_mmu;
            }
            (*arch).cr0 = e.derived.cr0 as usize;
            if ((*arch).cr4 as u64 ^ e.derived.cr4) & CR4_IN_CPUID != 0 {
                (*arch).cpuid_dynamic_bits_dirty = true;
            }
            (*arch).cr4 = e.derived.cr4 as usize;
            (*arch).cr3 = state.cr3;
            (*arch).regs[bindings::MTK_REG_RSP as usize] = state.rsp;
            (*arch).rip = state.rip;
            let available = (&raw mut (*arch).regs_avail).cast::<u32>();
            available.write(available.read() | AVAILABLE);
            let dirty = (&raw mut (*arch).regs_dirty).cast::<u32>();
            dirty.write(dirty.read() | DIRTY);
            // nested_vmx_transition_tlb_flush(), L0 using EPT.
            match state.vpid {
                Some(vpid) if vpid == (*nested).last_vpid => (),
                Some(vpid) => {
                    (*nested).last_vpid = vpid;
                    self.request(FLUSH_GUEST);
                }
                None => self.request(FLUSH_GUEST),
            }
        }
    }

    /// What is left to do after `enter`: the root of L0's own tables, whether an event has to be looked for, L1's preemption
    /// timer.
    ///
    /// Must not be called within `state::with`: a hooked function is among those that are called here. May sleep.
    ///
    /// # Safety
    ///
    /// In the handler of nested_vmx_enter_non_root_mode(), after everything else.
    #[inline(always)]
    pub(crate) unsafe fn finish_entry(self, m: Vmcs12, made: Made) {
        if let Some(root) = made.root {
            // SAFETY: It was looked for in the same handler, for this entry.
            unsafe { self.use_root(root) };
        } else {
            let pgd = if made.ept {
                field!(m, ept_pointer)
            } else {
                field!(m, guest_cr3)
            };
            // SAFETY: As the stock function calls it, with its own arguments.
            unsafe { CallId::NEW_PGD.call([self.key(), pgd as usize]) };
        }
        // Stock asks kvm_apic_has_interrupt() for a truth value, and gets -1 for none: it makes the request on each entry. Whatever else the
        // request would find (windows, the monitor trap flag, timers, SMIs) makes one itself.
        if Entry::had_window(self) || self.has_init_or_sipi() || self.has_interrupt() {
            self.request(EVENT);
        }
        if made.timer {
            let timer = field!(m, vmx_preemption_timer_value);
            // SAFETY: By this function's contract.
            unsafe { self.start_preemption_timer(timer) };
        }
    }

    /// Whether the local APIC has an interrupt for L1.
    #[inline(always)]
    fn has_interrupt(self) -> bool {
        if self.has_no_interrupt() {
            return false;
        }
        // SAFETY: As the stock function calls it.
        let vector = unsafe { CallId::HAS_INTERRUPT.call([self.key()]) };
        vector.is_none_or(|vector| vector as i32 != -1)
    }

    /// vmx_calc_preemption_timer_value() and vmx_start_preemption_timer(), for a value that is not 0.
    ///
    /// # Safety
    ///
    /// L1 has just entered L2.
    #[inline(always)]
    unsafe fn start_preemption_timer(self, value: u64) {
        // SAFETY: Reads a register.
        let now = unsafe { core::arch::x86_64::_rdtsc() };
        let vmx = self.raw();
        // SAFETY: By the invariants of `Vcpu`, as KVM itself does, whose timer was set up at VMXON.
        unsafe {
            let l1 = CallId::READ_L1_TSC.call([self.key(), now as usize]);
            let scaled = l1.unwrap_or(now as usize) as u64 >> TIMER_RATE;
            (*vmx).nested.preemption_timer_deadline = value.wrapping_add(scaled);
            (*vmx).nested.has_preemption_timer_deadline = true;
            let khz = (*vmx).vcpu.arch.virtual_tsc_khz;
            if khz == 0 {
                return;
            }
            let timeout = (value << TIMER_RATE).wrapping_mul(1_000_000) / u64::from(khz);
            bindings::hrtimer_start_range_ns(
                &raw mut (*vmx).nested.preemption_timer,
                bindings::ktime_get().wrapping_add_unsigned(timeout),
                0,
                bindings::hrtimer_mode_HRTIMER_MODE_ABS_PINNED,
            );
        }
    }
}
