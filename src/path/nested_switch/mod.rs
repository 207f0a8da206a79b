// SPDX-License-Identifier: GPL-2.0
//! The switch between L1 and L2: what KVM works out anew on each entry and exit of L2, though nothing that it is
//! worked out from has changed.
//!
//! Each part stands at one function of KVM, remembers what the stock function did for which inputs, and does the
//! same when the inputs come again. Any call may as well go to the stock function: what the parts leave behind is
//! what stock left behind for the same inputs. The test knob (`policy::detour`) makes use of that.
//!
//! - [`enter`]: nested_vmx_enter_non_root_mode(), all of an entry of L2;
//! - [`mmu`]: kvm_init_mmu(), the description of the guest's paging;
//! - [`ept_mmu`]: kvm_init_shadow_ept_mmu(), the same for L1's EPT;
//! - [`inner`]: both directions without leaving KVM's inner loop;
//! - [`efer`]: vmx_set_efer(), EFER and the MSRs that are loaded with the guest;
//! - [`host_state`]: load_vmcs12_host_state(), what L1 finds after an exit of L2;
//! - [`pages`]: nested_get_vmcs12_pages(), the guest pages that a vmcs12 names;
//! - [`interrupts`]: kvm_apic_has_interrupt() and vmx_sync_pir_to_irr(), whether an interrupt waits;
//! - [`debugctl`]: L1's reads of IA32_DEBUGCTL;
//! - [`vpids`]: in a guest, vmx_flush_tlb_guest(), what the TLB has of L1 or L2.

pub(crate) mod debugctl;
mod efer;
mod enter;
#[cfg(MTK_GVA_WALK)]
pub(super) mod ept_mmu;
mod host_state;
#[cfg(MTK_GVA_WALK)]
pub(super) mod inner;
mod interrupts;
mod mmu;
pub(crate) mod pages;
mod vpids;

use super::{CounterSet, Counters, Path};
#[cfg(MTK_GVA_WALK)]
use crate::policy::pause::Pause;
use crate::{
    hook::{CallId, HookId, InFlight},
    kvm::Vcpu,
    policy::{
        detour::{Detour, Rate},
        mode::Mode,
    },
    state,
    sysfs::Attribute,
};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use kernel::c_str;

/// This path's number in `PATHS`.
const NUMBER: usize = 6;

pub(super) const PATH: Path = Path {
    name: c_str!("nested_switch"),
    about: c_str!("what a switch between L1 and L2 leaves unchanged is not made again"),
    hooks: &[
        HookId::INIT_MMU,
        HookId::SET_EFER,
        HookId::LOAD_HOST_STATE,
        HookId::VCPU_PUT,
        HookId::FREE_NESTED,
        HookId::SYNC_VMCS02,
        HookId::GET_PAGES,
        HookId::ENTER_NON_ROOT,
        HookId::RECALC_INTERCEPTS,
        HookId::SET_MSR,
        HookId::VCPU_RUN,
        HookId::HAS_INTERRUPT,
        HookId::SYNC_PIR,
    ],
    guest_hooks: &[HookId::FLUSH_GUEST],
    extra_hooks: &[HookId::NEW_EPTP],
    calls: &[
        CallId::NEW_PGD,
        CallId::TRANSITION_FLUSH,
        CallId::VCPU_LOAD,
        CallId::VCPU_PUT,
        CallId::WAKE_UP,
        CallId::GFN_TO_MEMSLOT,
        CallId::UNMAP,
        CallId::SET_INTERCEPT,
        CallId::LOAD_VMCS,
        CallId::ALLOCATE_VPID,
        CallId::FREE_VPID,
        CallId::SWITCH_VMCS,
        CallId::HAS_INTERRUPT,
        CallId::READ_L1_TSC,
    ],
    drain: Some(drain),
    drain_hooks: &[HookId::HANDLE_EXIT],
    knobs: &FILES,
    reasons: &["no_state", "new", "changed", "unusual", "detour"],
};

static FILES: [Attribute; 1] = [Attribute::figure(c"reentered", |out| {
    writeln!(out, "{}", super::total(NUMBER).short.get())
})];

/// Why a call was left to the stock code; names in `PATH.reasons`.
#[derive(Clone, Copy)]
enum Reason {
    /// No memory or no room for the vCPU's state.
    NoState,
    /// Nothing is remembered yet.
    New,
    /// An input differs from those that are remembered.
    Changed,
    /// A situation that this path does not handle.
    Unusual,
    /// The test knob wants it so.
    Detour,
}

/// Reads what the path needs to know about kvm_intel, each time it has been loaded.
pub(crate) fn prepare() {
    host_state::prepare();
    #[cfg(MTK_GVA_WALK)]
    {
        crate::kvm::entry::prepare();
        crate::kvm::inner_loop::prepare();
    }
    pages::prepare();
    vpids::prepare();
}

/// Must be called once before any handler can run.
///
/// # Safety
///
/// Not more than once in the module's life.
pub(crate) unsafe fn init() {
    // SAFETY: By this function's contract.
    unsafe { vpids::init() };
}

/// The test knob, a `Rate` as one word; 0, the default, is off.
static DETOUR: AtomicU64 = AtomicU64::new(0);

/// The test knob as it stands.
pub(crate) fn detour() -> Rate {
    Rate::from_word(DETOUR.load(Ordering::Relaxed))
}

/// Sets the test knob.
pub(crate) fn set_detour(rate: Rate) {
    DETOUR.store(rate.to_word(), Ordering::Relaxed);
}

/// What is remembered for one vCPU.
pub(crate) struct Memory {
    detour: Detour,
    /// After VMRESUMEs that were not for [`inner`], some are left to the handler of the exit at once.
    #[cfg(MTK_GVA_WALK)]
    pause: Pause,
    mmu: mmu::Memory,
    #[cfg(MTK_GVA_WALK)]
    ept_mmu: ept_mmu::Memory,
    efer: efer::Memory,
    enter: enter::Memory,
    host_state: host_state::Memory,
    pages: pages::Memory,
    debugctl: debugctl::Memory,
    vpids: vpids::Memory,
}

/// What another thread may know about a vCPU.
pub(crate) struct Shared {
    pages: pages::Shared,
    debugctl: debugctl::Shared,
    vpids: vpids::Shared,
}

impl Shared {
    pub(crate) const fn new() -> Self {
        Self {
            pages: pages::Shared::new(),
            debugctl: debugctl::Shared::new(),
            vpids: vpids::Shared::new(),
        }
    }
}

impl Memory {
    /// Nothing yet.
    pub(crate) const NEW: Memory = Memory {
        detour: Detour::NEW,
        #[cfg(MTK_GVA_WALK)]
        pause: Pause::new(),
        mmu: mmu::Memory::NEW,
        #[cfg(MTK_GVA_WALK)]
        ept_mmu: ept_mmu::Memory::NEW,
        efer: efer::Memory::NEW,
        enter: enter::Memory::NEW,
        host_state: host_state::Memory::NEW,
        pages: pages::Memory::NEW,
        debugctl: debugctl::Memory::NEW,
        vpids: vpids::Memory::NEW,
    };

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.mmu.clear();
        #[cfg(MTK_GVA_WALK)]
        self.ept_mmu.clear();
        self.efer.clear();
        self.enter.clear();
        self.host_state.clear();
        self.pages.clear();
        self.debugctl.clear();
    }
}

/// On each exit while the path is being switched off: nothing may be kept any more.
pub(super) fn leave(vcpu: Vcpu) {
    if super::mode(NUMBER) == Mode::Off {
        // SAFETY: The vCPU has just exited, so it is loaded.
        unsafe { pages::release(vcpu, HookId::HANDLE_EXIT) };
        vpids::withdraw(vcpu);
    }
}

/// In the handler of vmx_vcpu_run(), with interrupts off. Whether to call `settle`.
#[inline(always)]
pub(super) fn has_to_settle(vcpu: Vcpu) -> bool {
    vpids::are_worthwhile() || debugctl::must_close(vcpu)
}

/// Settles what is to be before the guest runs.
pub(super) fn settle(vcpu: Vcpu) {
    vpids::before_run(vcpu);
    debugctl::before_run(vcpu);
}

fn drain() {
    super::drain::wait_until_none(&[HookId::GET_PAGES, HookId::SYNC_VMCS02], |counters| {
        counters.nested_switch.pages.is_holding()
    });
    super::drain::drain(
        &[HookId::LOAD_HOST_STATE],
        |counters| counters.nested_switch.debugctl.is_open(),
        debugctl::withdraw,
    );
    super::drain::drain(
        &[HookId::FLUSH_GUEST],
        |counters| counters.nested_switch.vpids.is_holding(),
        vpids::withdraw,
    );
}

/// Whether the test knob sends this call of the vCPU to the stock code.
#[inline(always)]
fn takes_detour(numbers: &mut Detour, counters: &Counters) -> bool {
    let word = DETOUR.load(Ordering::Relaxed);
    let takes = word != 0 && numbers.take(word);
    if takes {
        counters.fall_back(Reason::Detour as usize);
    }
    takes
}

/// As `takes_detour`, for other paths.
#[inline(always)]
pub(super) fn sends_away(memory: &mut Memory, counters: &CounterSet) -> bool {
    takes_detour(&mut memory.detour, counters.path::<NUMBER>())
}

/// The path's mode.
#[inline(always)]
fn mode() -> Mode {
    super::mode(NUMBER)
}

/// Whether the vCPU has a state. One is made when L2 runs for the first time: then the vCPU is one of kvm_intel's, and
/// complete.
fn ensure(vcpu: Vcpu, section: &InFlight) -> bool {
    if state::with(vcpu, |_, _| ()).is_some() {
        return true;
    }
    let made = vcpu.guest_mode() && state::ensure(vcpu, section);
    if !made && vcpu.guest_mode() {
        super::count_stateless(NUMBER, Reason::NoState as usize);
    }
    made
}

/// Whether the first mismatch of this part is still to be reported; `reported` is the part's own.
fn mismatch(counters: &Counters, reported: &AtomicBool) -> bool {
    counters.mismatches.bump();
    !reported.swap(true, Ordering::Relaxed)
}
