// SPDX-License-Identifier: GPL-2.0
//! Checks remembered: on each VMLAUNCH and VMRESUME of L1, KVM checks the controls, the host state
//! and the guest state of vmcs12 (SDM volume 3, 28.2 and 28.3). When everything that a check reads
//! is as it was when the check last passed, it passes again, and this path says so without running
//! it. A check that failed is never remembered: the stock code makes the failure.
//!
//! The inputs of each check are listed below, field by field, from the stock functions. What they
//! read beside vmcs12 comes in two kinds:
//!
//! - what the guest or another thread can change while the vCPU runs is an input like any other
//!   (CR4.LA57, nested_run_pending, disabled_quirks);
//! - what only an ioctl on the vCPU can change (CPUID and what follows from it, the VMX capability
//!   MSRs, IA32_PERF_CAPABILITIES, eVMCS) makes the vCPU's memory void: kvm_arch_vcpu_ioctl() is
//!   hooked, and everything but KVM_RUN, plain register access and KVM_SET_GUEST_DEBUG passes there.

use super::Path;
use crate::{
    bindings,
    hook::{Continuation, HookId, InFlight, Verdict},
    kvm::{guest_memory::read_host_u64, nested::Header, vmcs12::field, Vcpu, Vmcs12},
    layout,
    policy::{
        controls::primary::TPR_SHADOW,
        mode::Mode,
        segments::Inputs as SegmentInputs,
        ways::{Ways, NO_KEY},
    },
    state,
};
use core::sync::atomic::{AtomicBool, Ordering};
use kernel::{c_str, prelude::*};

/// This path's number in `PATHS`.
const NUMBER: usize = 0;

/// How many vmcs12s per vCPU are remembered.
const WAYS: usize = 4;

pub(super) const PATH: Path = Path {
    name: c_str!("checks"),
    about: c_str!("checks of an unchanged vmcs12 are not made again"),
    hooks: &[
        HookId::CHECK_CONTROLS,
        HookId::CHECK_HOST_STATE,
        HookId::CHECK_GUEST_STATE,
        HookId::GUEST_STATE_VALID,
    ],
    guest_hooks: &[],
    extra_hooks: &[],
    calls: &[],
    drain: None,
    drain_hooks: &[],
    reasons: &[
        "no_state", "no_vmptr", "new", "changed", "unusual", "failed",
    ],
    knobs: &[],
};

/// Why a call was left to the stock code; names in `PATH.reasons`.
#[derive(Clone, Copy)]
enum Reason {
    /// No memory or no room for the vCPU's state.
    NoState,
    /// There is no current VMCS to remember something for.
    NoVmptr,
    /// Nothing is remembered for this vmcs12 yet.
    New,
    /// An input differs from when the check last passed.
    Changed,
    /// A situation that this path does not handle, see `Check::usual`.
    Unusual,
    /// The check failed.
    Failed,
}

/// The kvm_intel parameter warn_on_missed_cc: then the check of the controls reads the virtual
/// APIC page, which the guest can change at any time.
static WARN_ON_MISSED_CC: AtomicBool = AtomicBool::new(false);

/// Reads what the path needs to know about kvm_intel, each time it has been loaded.
pub(crate) fn prepare() {
    let warn = layout::module_flag("kvm_intel", "warn_on_missed_cc");
    WARN_ON_MISSED_CC.store(warn, Ordering::Relaxed);
}

/// What one check reads.
trait Inputs: Copy + Default {
    /// The hook point of the check.
    const HOOK: HookId;
    /// Its name in a report.
    const NAME: &'static str;
    /// Where it is remembered.
    fn slot(remembered: &mut Remembered) -> &mut Option<Self>;
    /// Takes the inputs as they are now. `None` if they cannot be had or the situation is unusual.
    fn capture(vcpu: Vcpu, vmcs12: Vmcs12) -> Option<Self>;
    /// Whether the inputs are now what they were.
    fn unchanged(&self, vcpu: Vcpu, vmcs12: Vmcs12) -> bool;
    /// What the check reads in the guest's memory, which may change at any time, is good now. May sleep.
    #[inline(always)]
    fn memory_is_good(_vcpu: Vcpu, _vmcs12: Vmcs12) -> bool {
        true
    }
    /// Prints them for a report.
    fn report(&self);
}

/// Declares the inputs of a check: fields of vmcs12 and, after a semicolon, methods of `Vcpu`.
macro_rules! inputs {
    (
        $(#[$doc:meta])*
        $name:ident in $slot:ident, $hook:expr, usual $usual:expr, $(memory $memory:expr,)?
        { $($field:ident),* $(,)? ; $($extra:ident),* }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default)]
        struct $name { $($field: u64,)* $($extra: u64,)* }

        impl Inputs for $name {
            const HOOK: HookId = $hook;
            const NAME: &'static str = stringify!($slot);

            #[inline(always)]
            fn slot(remembered: &mut Remembered) -> &mut Option<Self> {
                &mut remembered.$slot
            }

            fn capture(vcpu: Vcpu, vmcs12: Vmcs12) -> Option<Self> {
                let _ = vcpu;
                let now = Self {
                    $($field: field!(vmcs12, $field),)*
                    $($extra: u64::from(vcpu.$extra()),)*
                };
                let usual: fn(&Self, Vcpu) -> bool = $usual;
                usual(&now, vcpu).then_some(now)
            }

            #[inline(always)]
            fn unchanged(&self, vcpu: Vcpu, vmcs12: Vmcs12) -> bool {
                let _ = vcpu;
                // One compare and branch for each: gathering the differences first makes the
                // compiler hold them all at once and spill most.
                true $(&& field!(vmcs12, $field) == self.$field)*
                    $(&& u64::from(vcpu.$extra()) == self.$extra)*
            }

            $(
                #[inline(always)]
                fn memory_is_good(vcpu: Vcpu, vmcs12: Vmcs12) -> bool {
                    let good: fn(Vcpu, Vmcs12) -> bool = $memory;
                    good(vcpu, vmcs12)
                }
            )?

            fn report(&self) {
                $(pr_warn!("  {} = {:#x}\n", stringify!($field), self.$field);)*
                $(pr_warn!("  {} = {:#x}\n", stringify!($extra), self.$extra);)*
            }
        }
    };
}

/// INTR_INFO_VALID_MASK (SDM table 26-17).
const INTR_INFO_VALID: u64 = 1 << 31;
/// INVALID_GPA: "no shadow VMCS" in the VMCS link pointer.
const NO_LINK: u64 = u64::MAX;

inputs! {
    /// Inputs of nested_vmx_check_controls().
    ///
    /// Event injection is left to the stock code: its fields change with each event. Of the VPID it is asked whether it is 0.
    Controls in controls, HookId::CHECK_CONTROLS,
    usual |now, vcpu| {
        now.vm_entry_intr_info_field & INTR_INFO_VALID == 0
            && !vcpu.enlightened_vmcs()
            && (now.cpu_based_vm_exec_control & u64::from(TPR_SHADOW) == 0
                || !WARN_ON_MISSED_CC.load(Ordering::Relaxed))
    },
    {
        pin_based_vm_exec_control, cpu_based_vm_exec_control, secondary_vm_exec_control,
        cr3_target_count, io_bitmap_a, io_bitmap_b, msr_bitmap, virtual_apic_page_addr,
        tpr_threshold, apic_access_addr, posted_intr_nv, posted_intr_desc_addr, pml_address,
        vmread_bitmap, vmwrite_bitmap, ept_pointer, vm_function_control,
        eptp_list_address, tsc_multiplier, vm_exit_controls, vm_exit_msr_load_count,
        vm_exit_msr_load_addr, vm_exit_msr_store_count, vm_exit_msr_store_addr,
        vm_entry_controls, vm_entry_msr_load_count, vm_entry_msr_load_addr,
        vm_entry_intr_info_field;
        names_vpid
    }
}

inputs! {
    /// Inputs of nested_vmx_check_host_state().
    HostState in host_state, HookId::CHECK_HOST_STATE,
    usual |_now, _vcpu| true,
    {
        vm_exit_controls, vm_entry_controls, host_cr0, host_cr3, host_cr4,
        host_ia32_sysenter_esp, host_ia32_sysenter_eip, host_ia32_pat,
        host_ia32_perf_global_ctrl, host_ia32_efer, host_rip, host_cs_selector,
        host_ss_selector, host_ds_selector, host_es_selector, host_fs_selector,
        host_gs_selector, host_tr_selector, host_fs_base, host_gs_base, host_gdtr_base,
        host_idtr_base, host_tr_base, host_s_cet, host_ssp, host_ssp_tbl;
        cr4_la57
    }
}

inputs! {
    /// Inputs of nested_vmx_check_guest_state().
    ///
    /// A debugctl with unknown bits may print, and is left to the stock code.
    GuestState in guest_state, HookId::CHECK_GUEST_STATE,
    usual |now, _vcpu| now.guest_ia32_debugctl == 0,
    memory |vcpu, vmcs12| {
        field!(vmcs12, vmcs_link_pointer) == NO_LINK || link_is_good(vcpu, vmcs12)
    },
    {
        vm_entry_controls, secondary_vm_exec_control, guest_cr0, guest_cr4,
        guest_ia32_debugctl, guest_dr7, guest_ia32_pat, vmcs_link_pointer,
        guest_ia32_perf_global_ctrl, guest_ia32_efer, guest_bndcfgs, guest_s_cet, guest_ssp,
        guest_ssp_tbl, guest_activity_state;
        nested_run_pending, disabled_quirks
    }
}

/// What is remembered for one vmcs12: the inputs with which each check last passed.
pub(crate) struct Remembered {
    controls: Option<Controls>,
    host_state: Option<HostState>,
    guest_state: Option<GuestState>,
    segments: Option<SegmentInputs>,
}

impl Remembered {
    const NEW: Remembered = Remembered {
        controls: None,
        host_state: None,
        guest_state: None,
        segments: None,
    };
}

impl Default for Remembered {
    fn default() -> Self {
        Self::NEW
    }
}

/// Whether the header of the shadow VMCS that the link pointer names is what nested_vmx_check_vmcs_link_ptr() wants, read where
/// that would read it. May sleep.
#[inline(never)]
fn link_is_good(vcpu: Vcpu, vmcs12: Vmcs12) -> bool {
    let _section = InFlight::enter(HookId::CHECK_GUEST_STATE);
    // The stock check runs if KVM would have to find the page first, or cannot.
    vcpu.shadow_page_at(field!(vmcs12, vmcs_link_pointer))
        .and_then(|host| read_host_u64(host as u64))
        .map(|header| Header(header as u32))
        .is_some_and(|header| header.is_ours() && header.is_shadow() == vmcs12.has_shadow_vmcs())
}

/// What is remembered for one vCPU.
pub(crate) struct Memory(Ways<Remembered, WAYS>);

impl Memory {
    pub(crate) const NEW: Memory = Memory(Ways::new([const { Remembered::NEW }; WAYS]));

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}

/// A report is printed once for each check; the counter has them all.
static REPORTED: [AtomicBool; 4] = [const { AtomicBool::new(false) }; 4];

fn first_report(which: HookId) -> bool {
    let at = PATH.hooks.iter().position(|&h| h == which).unwrap_or(0);
    REPORTED
        .get(at)
        .is_some_and(|r| !r.swap(true, Ordering::Relaxed))
}

/// The handler of the three checks of vmcs12.
#[inline(always)]
fn check<I: Inputs>(vcpu: Vcpu, vmcs12: Vmcs12, third: usize, cont: Continuation) -> Verdict {
    if super::mode(NUMBER) == Mode::On {
        let hit = state::with(vcpu, |local, counters| {
            I::slot(local.checks.0.get(vcpu.current_vmptr())?)
                .as_ref()
                .filter(|was| was.unchanged(vcpu, vmcs12))?;
            I::memory_is_good(vcpu, vmcs12).then_some(())?;
            counters.path::<NUMBER>().taken.bump();
            Some(())
        });
        if let Some(Some(())) = hit {
            return Verdict::handled(0);
        }
    }
    check_slowly::<I>(vcpu, vmcs12, third, cont)
}

/// Whether the check of the guest state would pass: its inputs are those with which it last did. May sleep.
#[cfg_attr(not(MTK_GVA_WALK), expect(dead_code))]
#[inline(always)]
pub(super) fn guest_state_holds(vcpu: Vcpu, m: Vmcs12, memory: &mut Memory) -> bool {
    if super::mode(NUMBER) != Mode::On {
        return false;
    }
    // No closures here and below: those are not always inlined.
    match memory.0.get(vcpu.current_vmptr()) {
        Some(Remembered {
            guest_state: Some(was),
            ..
        }) => was.unchanged(vcpu, m) && GuestState::memory_is_good(vcpu, m),
        _ => false,
    }
}

/// Whether the checks of the controls and of the host state would pass.
#[cfg(MTK_GVA_WALK)]
#[inline(always)]
pub(super) fn controls_and_host_state_hold(vcpu: Vcpu, m: Vmcs12, memory: &mut Memory) -> bool {
    if super::mode(NUMBER) != Mode::On {
        return false;
    }
    match memory.0.get(vcpu.current_vmptr()) {
        Some(Remembered {
            controls: Some(controls),
            host_state: Some(host_state),
            ..
        }) => controls.unchanged(vcpu, m) && host_state.unchanged(vcpu, m),
        _ => false,
    }
}

/// Whether `__vmx_guest_state_valid()` would say yes for an L2 in protected mode whose vmcs02 is loaded.
#[cfg_attr(not(MTK_GVA_WALK), expect(dead_code))]
#[inline(always)]
pub(super) fn segments_hold(vcpu: Vcpu, memory: &mut Memory) -> bool {
    match memory.0.get(vcpu.current_vmptr()) {
        Some(Remembered {
            segments: Some(was),
            ..
        }) => vcpu.segments_are(was),
        _ => false,
    }
}

/// Counts what `guest_state_holds` and `segments_hold` have answered.
#[cfg_attr(not(MTK_GVA_WALK), expect(dead_code))]
#[inline(always)]
pub(super) fn took(counters: &super::CounterSet) {
    counters.path::<NUMBER>().taken.bump();
}

/// Lets the stock code decide, and remembers or compares.
#[cold]
#[inline(never)]
fn check_slowly<I: Inputs>(
    vcpu: Vcpu,
    vmcs12: Vmcs12,
    third: usize,
    cont: Continuation,
) -> Verdict {
    if super::mode(NUMBER) == Mode::Off {
        return Verdict::STOCK;
    }
    let section = InFlight::enter(I::HOOK);
    if !state::ensure(vcpu, &section) {
        super::count_stateless(NUMBER, Reason::NoState as usize);
        return Verdict::STOCK;
    }
    // Before the stock code reads them: what another thread changes meanwhile then differs later.
    let now = I::capture(vcpu, vmcs12);
    let args = [vcpu.key(), vmcs12.as_ptr() as usize, third];
    // SAFETY: The continuation and the arguments of the hooked function, in its handler.
    let ret = unsafe { section.call_stock(cont, args) } as i32;

    let key = vcpu.current_vmptr();
    state::with(vcpu, |local, counters| {
        let counters = counters.path::<NUMBER>();
        let ways = &mut local.checks.0;
        let was = ways.get(key).and_then(|known| *I::slot(known));
        let predicted =
            was.filter(|was| was.unchanged(vcpu, vmcs12) && I::memory_is_good(vcpu, vmcs12));
        if let Some(inputs) = predicted {
            // In mode `on` this is a call that raced with the mode's change; compare it as well.
            counters.checked.bump();
            if ret != 0 {
                counters.mismatches.bump();
                if first_report(I::HOOK) {
                    pr_warn!(
                        "checks: {} of vmcs12 {:#x} was remembered as passed, the stock check returns {}\n",
                        I::NAME, key, ret
                    );
                    inputs.report();
                }
            }
        } else {
            let reason = match (key, now, was) {
                (NO_KEY, ..) => Reason::NoVmptr,
                _ if ret != 0 => Reason::Failed,
                (_, None, _) => Reason::Unusual,
                (_, _, None) => Reason::New,
                _ => Reason::Changed,
            };
            counters.fall_back(reason as usize);
        }
        if let Some(known) = ways.get_or_insert(key) {
            *I::slot(known) = now.filter(|_| ret == 0);
        }
    });
    Verdict::handled(ret as usize)
}

/// Handler of nested_vmx_check_controls().
#[no_mangle]
extern "C" fn mtk_on_check_controls(
    vcpu: *mut bindings::kvm_vcpu,
    vmcs12: *mut bindings::vmcs12,
    cont: Continuation,
) -> Verdict {
    // SAFETY: The hooked function's own arguments, in its handler.
    let (v, m) = unsafe { (Vcpu::from_hook(vcpu), Vmcs12::from_hook(vmcs12)) };
    check::<Controls>(v, m, 0, cont)
}

/// Handler of nested_vmx_check_host_state().
#[no_mangle]
extern "C" fn mtk_on_check_host_state(
    vcpu: *mut bindings::kvm_vcpu,
    vmcs12: *mut bindings::vmcs12,
    cont: Continuation,
) -> Verdict {
    // SAFETY: The hooked function's own arguments, in its handler.
    let (v, m) = unsafe { (Vcpu::from_hook(vcpu), Vmcs12::from_hook(vmcs12)) };
    check::<HostState>(v, m, 0, cont)
}

/// Handler of nested_vmx_check_guest_state().
#[no_mangle]
extern "C" fn mtk_on_check_guest_state(
    vcpu: *mut bindings::kvm_vcpu,
    vmcs12: *mut bindings::vmcs12,
    failure_code: *mut u32,
    cont: Continuation,
) -> Verdict {
    // SAFETY: The hooked function's own arguments, in its handler.
    let (v, m) = unsafe { (Vcpu::from_hook(vcpu), Vmcs12::from_hook(vmcs12)) };
    let verdict = check::<GuestState>(v, m, failure_code as usize, cont);
    // The stock function's own choice where it passes (ENTRY_FAIL_DEFAULT). Where the stock code
    // ran, a zero result means that this very value stands there already.
    if verdict.is_zero() {
        // SAFETY: The caller's variable, which the hooked function must write.
        unsafe { failure_code.write(0) };
    }
    verdict
}

/// Handler of __vmx_guest_state_valid(), which KVM asks twice on each entry of an L2 without
/// unrestricted guest. In protected mode it is a function of sixteen numbers.
#[no_mangle]
extern "C" fn mtk_on_guest_state_valid(
    vcpu: *mut bindings::kvm_vcpu,
    cont: Continuation,
) -> Verdict {
    // SAFETY: The hooked function's own argument, in its handler.
    let v = unsafe { Vcpu::from_hook(vcpu) };
    let mode = super::mode(NUMBER);
    if mode == Mode::Off || v.plain_protected_mode() != Some(true) {
        return Verdict::STOCK;
    }
    if mode == Mode::On {
        let hit = state::with(v, |local, counters| {
            let known = local.checks.0.get(v.current_vmptr())?;
            known.segments.as_ref().filter(|was| v.segments_are(was))?;
            counters.path::<NUMBER>().taken.bump();
            Some(())
        });
        if let Some(Some(())) = hit {
            return Verdict::handled(1);
        }
    }
    match v.segments() {
        Some(now) => valid_slowly(v, vcpu, now, cont),
        None => Verdict::STOCK,
    }
}

#[cold]
#[inline(never)]
fn valid_slowly(
    vcpu: Vcpu,
    raw: *mut bindings::kvm_vcpu,
    now: SegmentInputs,
    cont: Continuation,
) -> Verdict {
    let section = InFlight::enter(HookId::GUEST_STATE_VALID);
    // Interrupts are on and nothing is locked on every way here, but vmcs02 may be current and half
    // prepared: sleeping is allowed (KVM reads guest memory at this point too), making the state is
    // left to the checks that come before.
    // SAFETY: The continuation and the argument of the hooked function, in its handler.
    let ret = unsafe { section.call_stock(cont, [raw as usize, 0, 0]) } as u8 != 0;
    let key = vcpu.current_vmptr();
    let counted = state::with(vcpu, |local, counters| {
        let counters = counters.path::<NUMBER>();
        let known = local.checks.0.get(key);
        let same = known
            .and_then(|known| known.segments.as_ref())
            .map(|was| was.same(&now));
        if same == Some(true) {
            counters.checked.bump();
            if !ret {
                counters.mismatches.bump();
                if first_report(HookId::GUEST_STATE_VALID) {
                    pr_warn!(
                        "checks: segments of vmcs12 {:#x} were remembered as valid, the stock check says no: {:x?}\n",
                        key, now.0
                    );
                }
            }
        } else {
            let reason = match same {
                _ if key == NO_KEY => Reason::NoVmptr,
                _ if !ret => Reason::Failed,
                Some(_) => Reason::Changed,
                None => Reason::New,
            };
            counters.fall_back(reason as usize);
        }
        if let Some(known) = local.checks.0.get_or_insert(key) {
            known.segments = ret.then_some(now);
        }
    });
    if counted.is_none() {
        super::count_stateless(NUMBER, Reason::NoState as usize);
    }
    Verdict::handled(usize::from(ret))
}

/// Handler of kvm_arch_vcpu_ioctl(): whatever user space asks of the vCPU, nothing that was
/// concluded from its configuration is believed afterwards.
#[no_mangle]
extern "C" fn mtk_on_vcpu_ioctl(
    file: *mut bindings::file,
    _ioctl: usize,
    _arg: usize,
    _cont: Continuation,
) -> Verdict {
    // SAFETY: KVM's own file of a vCPU, whose mutex kvm_vcpu_ioctl() holds. A vCPU of another kind
    // (TDX) has no state, so nothing is done with it.
    let vcpu = unsafe { Vcpu::from_hook((*file).private_data.cast()) };
    state::with(vcpu, |local, _| local.invalidate());
    Verdict::STOCK
}

/// Handler of nested_vmx_free_vcpu(): the vCPU's state goes with it.
#[no_mangle]
extern "C" fn mtk_on_free_vcpu(vcpu: *mut bindings::kvm_vcpu, _cont: Continuation) -> Verdict {
    let section = InFlight::enter(HookId::FREE_VCPU);
    // SAFETY: The hooked function's own argument.
    super::l2fields::retire(unsafe { Vcpu::from_hook(vcpu) });
    state::forget(vcpu, &section);
    Verdict::STOCK
}
