// SPDX-License-Identifier: GPL-2.0
//! The hook engine: attaches the trampolines of `include/hooks.h` to KVM's functions with ftrace
//! direct calls and takes them off again, under load, without losing a task inside one.
//!
//! Life of a trampoline. `attach` resolves the function and registers the direct call. `detach`
//! unregisters it and waits for an RCU-tasks grace period, after which no task is
//! between the patched call and the handler's first instruction, unless it has slept in the
//! handler. A handler therefore never sleeps outside an [`InFlight`] section, and `detach` waits
//! for these to drain. What is left then are tasks in the few instructions from the end of such a
//! section to the trampoline's return; [`settle`] waits for them before the module goes.
//!
//! A handler runs on the vCPU's own thread with the vCPU's mutex held, so that the vCPU's state is
//! its own. What it must not do: panic, take a lock that a sysfs writer holds while detaching,
//! allocate without bound.

mod resolve;

use crate::{alloc, bindings};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use kernel::{prelude::*, str::CStr};

/// The BTF of the kernel itself, where it lies; `None` if it cannot be found.
pub(crate) fn kernel_btf() -> Option<&'static [u8]> {
    let start = resolve::data(c"__start_BTF")?;
    let stop = resolve::data(c"__stop_BTF")?;
    let size = stop.checked_sub(start).filter(|&n| n <= 64 << 20)?;
    // SAFETY: The kernel's own read-only data between two symbols of its linker script, mapped for good, as
    // /sys/kernel/btf/vmlinux shows it.
    Some(unsafe { core::slice::from_raw_parts(start as *const u8, size) })
}

/// The address of a variable of a module's, by `module:name`, where the kernel lists such (CONFIG_KALLSYMS_ALL).
#[cfg(MTK_GVA_WALK)]
pub(crate) fn variable(name: &CStr) -> Option<usize> {
    resolve::data(name)
}

/// How many lines `include/hooks.h` has.
pub(crate) const COUNT: usize = bindings::mtk_hook_id_MTK_HOOK_COUNT as usize;

/// How many functions the module calls without hooking them.
pub(crate) const CALLS: usize = bindings::mtk_call_id_MTK_CALL_COUNT as usize;

/// A KVM function that one of the tables in `include/hooks.h` names.
#[derive(Clone, Copy)]
pub(crate) struct Function(&'static bindings::mtk_hook_entry);

// SAFETY: The entry is read-only data, and so are the strings that it points to.
unsafe impl Send for Function {}
// SAFETY: As above.
unsafe impl Sync for Function {}

impl Function {
    /// Name of the module that holds the function.
    pub(crate) fn module(self) -> &'static CStr {
        // SAFETY: trampoline.S makes this a NUL-terminated string in read-only data.
        unsafe { CStr::from_char_ptr(self.0.module) }
    }

    /// Name of the function.
    pub(crate) fn symbol(self) -> &'static CStr {
        // SAFETY: As in `module`.
        unsafe { CStr::from_char_ptr(self.0.symbol) }
    }

    /// Number of arguments that the function takes.
    pub(crate) fn nargs(self) -> usize {
        self.0.nargs
    }
}

/// A line of the table of hook points.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct HookId(usize);

/// A line of the table of functions that are only called.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct CallId(usize);

macro_rules! call_ids {
    ($($(#[$meta:meta])* $name:ident = $id:ident;)*) => {
        impl CallId {
            $(
                #[doc = concat!("The function `", stringify!($id), "`.")]
                $(#[$meta])*
                pub(crate) const $name: CallId = CallId(bindings::$id as usize);
            )*
        }
    };
}

call_ids! {
    VCPU_LOAD = mtk_call_id_MTK_CALL_vcpu_load;
    VCPU_PUT = mtk_call_id_MTK_CALL_vcpu_put;
    WAKE_UP = mtk_call_id_MTK_CALL_wake_up;
    LOAD_VMCS = mtk_call_id_MTK_CALL_load_vmcs;
    FIELD_OFFSET = mtk_call_id_MTK_CALL_field_offset;
    SYNC_RARE = mtk_call_id_MTK_CALL_sync_rare;
    SET_CURRENT_VMPTR = mtk_call_id_MTK_CALL_set_current_vmptr;
    DISABLE_SHADOW = mtk_call_id_MTK_CALL_disable_shadow;
    SET_RFLAGS = mtk_call_id_MTK_CALL_set_rflags;
    SKIP_INSTRUCTION = mtk_call_id_MTK_CALL_skip_instruction;
    FREE_ROOTS = mtk_call_id_MTK_CALL_free_roots;
    GFN_TO_MEMSLOT = mtk_call_id_MTK_CALL_gfn_to_memslot;
    VM_GFN_TO_MEMSLOT = mtk_call_id_MTK_CALL_vm_gfn_to_memslot;
    WRITE_GUEST_PAGE = mtk_call_id_MTK_CALL_write_guest_page;
    READ_GUEST_ATOMIC = mtk_call_id_MTK_CALL_read_guest_atomic;
    TOPUP_MMU_CACHES = mtk_call_id_MTK_CALL_topup_mmu_caches;
    PREFETCH_SPTES = mtk_call_id_MTK_CALL_prefetch_sptes;
    SET_SPTE = mtk_call_id_MTK_CALL_set_spte;
    RELEASE_DIRTY = mtk_call_id_MTK_CALL_release_dirty;
    TDP_MMU_MAP = mtk_call_id_MTK_CALL_tdp_mmu_map;
    TRY_TO_UNSYNC = mtk_call_id_MTK_CALL_try_to_unsync;
    EPT_PAGE_FAULT = mtk_call_id_MTK_CALL_ept_page_fault;
    NEW_PGD = mtk_call_id_MTK_CALL_new_pgd;
    UNMAP = mtk_call_id_MTK_CALL_unmap;
    SET_INTERCEPT = mtk_call_id_MTK_CALL_set_intercept;
    SWITCH_VMCS = mtk_call_id_MTK_CALL_switch_vmcs;
    HAS_INTERRUPT = mtk_call_id_MTK_CALL_has_interrupt;
    READ_L1_TSC = mtk_call_id_MTK_CALL_read_l1_tsc;
    TRANSITION_FLUSH = mtk_call_id_MTK_CALL_transition_flush;
    ALLOCATE_VPID = mtk_call_id_MTK_CALL_allocate_vpid;
    FREE_VPID = mtk_call_id_MTK_CALL_free_vpid;
    SYNC_ROOTS = mtk_call_id_MTK_CALL_sync_roots;
    SYNC_SHADOW = mtk_call_id_MTK_CALL_sync_shadow;
    #[cfg_attr(not(MTK_GVA_WALK), expect(dead_code))]
    INJECT_EPT_FAULT = mtk_call_id_MTK_CALL_inject_ept_fault;
    #[cfg_attr(not(MTK_GVA_WALK), expect(dead_code))]
    NESTED_VMEXIT = mtk_call_id_MTK_CALL_nested_vmexit;
    #[cfg_attr(not(MTK_GVA_WALK), expect(dead_code))]
    LOAD_PGD = mtk_call_id_MTK_CALL_load_pgd;
    #[cfg_attr(not(MTK_GVA_WALK), expect(dead_code))]
    FLUSH_LOCAL = mtk_call_id_MTK_CALL_flush_local;
    #[cfg_attr(not(MTK_GVA_WALK), expect(dead_code))]
    ENTER_GUEST = mtk_call_id_MTK_CALL_enter_guest;
}

static CALL_ADDRESSES: [AtomicUsize; CALLS] = [const { AtomicUsize::new(0) }; CALLS];

impl CallId {
    /// All functions that are only called, in the table's order.
    pub(crate) fn all() -> impl Iterator<Item = CallId> {
        (0..CALLS).map(CallId)
    }

    /// The function itself.
    pub(crate) fn function(self) -> Function {
        // SAFETY: As in `HookId::function`, for the other table.
        Function(unsafe {
            &*(&raw const bindings::mtk_call_table)
                .cast::<bindings::mtk_hook_entry>()
                .add(self.0)
        })
    }

    /// Finds the function in the running kernel, each time kvm_intel has been loaded. `false` if it
    /// is not there.
    pub(crate) fn resolve(self) -> bool {
        let address = resolve::address(self.function());
        if let Some(a) = CALL_ADDRESSES.get(self.0) {
            a.store(address.unwrap_or(0), Ordering::Relaxed);
        }
        address.is_some()
    }

    /// Calls the function; `None` if it was not found.
    ///
    /// # Safety
    ///
    /// As the function itself demands; its module stays loaded meanwhile.
    #[inline(always)]
    pub(crate) unsafe fn call<const N: usize>(self, args: [usize; N]) -> Option<usize> {
        let address = CALL_ADDRESSES.get(self.0)?.load(Ordering::Relaxed);
        if address == 0 {
            return None;
        }
        let arg = |n: usize| args.get(n).copied().unwrap_or(0);
        // SAFETY: By this function's contract; the address is the function's start (or just past
        // its ENDBR), where a return may go as well as a call.
        Some(unsafe {
            if N <= 2 {
                bindings::mtk_call_stock2(address, arg(0), arg(1))
            } else if N <= 5 {
                bindings::mtk_call_stock(address, arg(0), arg(1), arg(2), arg(3), arg(4))
            } else {
                let (a0, a1, a2, a3) = (arg(0), arg(1), arg(2), arg(3));
                bindings::mtk_call_stock7(address, a0, a1, a2, a3, arg(4), arg(5), arg(6))
            }
        })
    }

    /// Whether the function is there, with the arguments that the table expects.
    #[inline(always)]
    pub(crate) fn is_available(self) -> bool {
        let address = CALL_ADDRESSES.get(self.0);
        address.is_some_and(|a| a.load(Ordering::Relaxed) != 0)
    }

    /// Has `call` and `is_available` say that the function is not there.
    pub(crate) fn forget(self) {
        if let Some(a) = CALL_ADDRESSES.get(self.0) {
            a.store(0, Ordering::Relaxed);
        }
    }
}

macro_rules! hook_ids {
    ($($name:ident = $id:ident;)*) => {
        impl HookId {
            $(
                #[doc = concat!("The hook point `", stringify!($id), "`.")]
                pub(crate) const $name: HookId = HookId(bindings::$id as usize);
            )*
        }
    };
}

hook_ids! {
    CHECK_CONTROLS = mtk_hook_id_MTK_HOOK_check_controls;
    CHECK_HOST_STATE = mtk_hook_id_MTK_HOOK_check_host_state;
    CHECK_GUEST_STATE = mtk_hook_id_MTK_HOOK_check_guest_state;
    GUEST_STATE_VALID = mtk_hook_id_MTK_HOOK_guest_state_valid;
    FREE_VCPU = mtk_hook_id_MTK_HOOK_free_vcpu;
    VCPU_IOCTL = mtk_hook_id_MTK_HOOK_vcpu_ioctl;
    HANDLE_EXIT = mtk_hook_id_MTK_HOOK_handle_exit;
    HANDLE_VMREAD = mtk_hook_id_MTK_HOOK_handle_vmread;
    HANDLE_VMWRITE = mtk_hook_id_MTK_HOOK_handle_vmwrite;
    COPY_SHADOW = mtk_hook_id_MTK_HOOK_copy_shadow;
    SYNC_SHADOW = mtk_hook_id_MTK_HOOK_sync_shadow;
    HANDLE_VMPTRLD = mtk_hook_id_MTK_HOOK_handle_vmptrld;
    HANDLE_VMCLEAR = mtk_hook_id_MTK_HOOK_handle_vmclear;
    FREE_NESTED = mtk_hook_id_MTK_HOOK_free_nested;
    VCPU_PUT = mtk_hook_id_MTK_HOOK_vcpu_put;
    NESTED_RUN = mtk_hook_id_MTK_HOOK_nested_run;
    SYNC_VMCS02 = mtk_hook_id_MTK_HOOK_sync_vmcs02;
    ENTER_GUEST = mtk_hook_id_MTK_HOOK_enter_guest;
    EPT_PAGE_FAULT = mtk_hook_id_MTK_HOOK_ept_page_fault;
    TDP_PAGE_FAULT = mtk_hook_id_MTK_HOOK_tdp_page_fault;
    INIT_MMU = mtk_hook_id_MTK_HOOK_init_mmu;
    SET_EFER = mtk_hook_id_MTK_HOOK_set_efer;
    LOAD_HOST_STATE = mtk_hook_id_MTK_HOOK_load_host_state;
    ENTER_NON_ROOT = mtk_hook_id_MTK_HOOK_enter_non_root;
    GET_PAGES = mtk_hook_id_MTK_HOOK_get_pages;
    RECALC_INTERCEPTS = mtk_hook_id_MTK_HOOK_recalc_intercepts;
    SET_MSR = mtk_hook_id_MTK_HOOK_set_msr;
    VCPU_RUN = mtk_hook_id_MTK_HOOK_vcpu_run;
    HAS_INTERRUPT = mtk_hook_id_MTK_HOOK_has_interrupt;
    SYNC_PIR = mtk_hook_id_MTK_HOOK_sync_pir;
    READ_CACHED = mtk_hook_id_MTK_HOOK_read_cached;
    WRITE_CACHED = mtk_hook_id_MTK_HOOK_write_cached;
    READ_VIRT = mtk_hook_id_MTK_HOOK_read_virt;
    FLUSH_GUEST = mtk_hook_id_MTK_HOOK_flush_guest;
    NEW_EPTP = mtk_hook_id_MTK_HOOK_new_eptp;
}

impl HookId {
    /// All hook points, in the table's order.
    pub(crate) fn all() -> impl Iterator<Item = HookId> {
        (0..COUNT).map(HookId)
    }

    /// The function that is hooked here.
    pub(crate) fn function(self) -> Function {
        // SAFETY: trampoline.S defines the table with exactly `COUNT` entries in read-only data,
        // and a `HookId` is only made from the enum that the same list generates.
        Function(unsafe {
            &*(&raw const bindings::mtk_hook_table)
                .cast::<bindings::mtk_hook_entry>()
                .add(self.0)
        })
    }

    fn trampoline(self) -> usize {
        self.function().0.trampoline
    }

    /// Name of the function.
    pub(crate) fn symbol(self) -> &'static CStr {
        self.function().symbol()
    }

    fn hook(self) -> &'static Hook {
        &HOOKS[self.0]
    }

    /// Where the function was found; 0 while the hook is off.
    pub(crate) fn address(self) -> usize {
        self.hook().address.load(Ordering::Relaxed)
    }

    /// Whether its trampoline is on the function.
    #[inline(always)]
    pub(crate) fn is_attached(self) -> bool {
        self.address() != 0
    }

    /// How many tasks sleep, or may sleep, in this hook's handler right now.
    pub(crate) fn in_flight(self) -> u32 {
        self.hook().in_flight.load(Ordering::Relaxed)
    }

    /// Whether a livepatch has taken the function over since it was hooked, or before.
    pub(crate) fn livepatched(self) -> bool {
        self.hook().livepatched.load(Ordering::Relaxed)
    }
}

/// What a handler answers; the trampoline reads it from RAX and RDX.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Verdict {
    handled: usize,
    value: usize,
}

impl Verdict {
    /// Let the stock function run.
    pub(crate) const STOCK: Verdict = Verdict {
        handled: 0,
        value: 0,
    };

    /// Whether the stock function does not run.
    #[inline(always)]
    pub(crate) const fn is_handled(self) -> bool {
        self.handled != 0
    }

    /// Whether the caller gets 0 from the handler.
    #[inline(always)]
    pub(crate) const fn is_zero(self) -> bool {
        self.handled == 1 && self.value == 0
    }

    /// Return `value` to the function's caller instead of running the stock function.
    #[inline(always)]
    pub(crate) const fn handled(value: usize) -> Verdict {
        Verdict { handled: 1, value }
    }
}

/// Where the stock function goes on when its trampoline does not handle the call.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct Continuation(usize);

/// State of one hook point.
struct Hook {
    /// Tasks inside a section that may sleep.
    in_flight: AtomicU32,
    /// A livepatch has taken the function over.
    livepatched: AtomicBool,
    /// Address of the function, 0 while detached.
    address: AtomicUsize,
}

static HOOKS: [Hook; COUNT] = [const {
    Hook {
        in_flight: AtomicU32::new(0),
        livepatched: AtomicBool::new(false),
        address: AtomicUsize::new(0),
    }
}; COUNT];

/// A section of a handler that may sleep; `detach` waits until all have ended.
pub(crate) struct InFlight(HookId);

impl InFlight {
    /// Opens the section.
    #[inline]
    pub(crate) fn enter(id: HookId) -> Self {
        id.hook().in_flight.fetch_add(1, Ordering::Acquire);
        Self(id)
    }

    /// Runs the stock function past its ftrace call site and returns its RAX.
    ///
    /// # Safety
    ///
    /// `cont` is the continuation that the trampoline of this hook passed to the running handler,
    /// and `args` are arguments that the stock function may be called with.
    pub(crate) unsafe fn call_stock<const N: usize>(
        &self,
        cont: Continuation,
        args: [usize; N],
    ) -> usize {
        const { assert!(N <= 5) };
        let arg = |n: usize| args.get(n).copied().unwrap_or(0);
        // SAFETY: By this function's contract. Unused argument registers are caller-saved, so
        // passing more than the function takes is harmless.
        unsafe { bindings::mtk_call_stock(cont.0, arg(0), arg(1), arg(2), arg(3), arg(4)) }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.hook().in_flight.fetch_sub(1, Ordering::Release);
    }
}

/// Why a hook could not be attached.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum AttachError {
    /// The running kernel has no function of that name, or only a variant that the compiler
    /// changed (`.isra.0`, `.constprop.0`).
    NoSymbol,
    /// BPF or another module already has a direct call on the function.
    Busy,
    /// No memory.
    NoMemory,
    /// ftrace refused for another reason, with its error code.
    Ftrace(i32),
}

/// A direct call that is registered; `detach` takes it off.
pub(crate) struct Attached {
    id: HookId,
    ops: KBox<bindings::ftrace_ops>,
}

// SAFETY: `ftrace_ops` is only touched by `attach` and `drop`, and ftrace takes its own locks.
unsafe impl Send for Attached {}

impl Attached {
    /// Puts the trampoline of `id` on its function.
    pub(crate) fn attach(id: HookId) -> Result<Self, AttachError> {
        let address = resolve::address(id.function()).ok_or(AttachError::NoSymbol)?;
        let ops = bindings::ftrace_ops {
            ops_func: Some(share_with_livepatch),
            ..Default::default()
        };
        alloc::MODULE.gate().map_err(|_| AttachError::NoMemory)?;
        let mut ops = KBox::new(ops, GFP_KERNEL).map_err(|_| AttachError::NoMemory)?;

        let hook = id.hook();
        hook.livepatched.store(false, Ordering::Relaxed);

        // SAFETY: `ops` is zeroed but for `ops_func`, is not registered, and its box does not move.
        let mut ret = unsafe { bindings::ftrace_set_filter_ip(&mut *ops, address, 0, 0) };
        if ret == 0 {
            // SAFETY: As above; the trampoline keeps the ABI that ftrace demands of a direct call
            // and lives until `drop` has seen the last task leave it.
            ret = unsafe { bindings::register_ftrace_direct(&mut *ops, id.trampoline()) };
        }
        if ret != 0 {
            // SAFETY: Frees the filter hash that `ftrace_set_filter_ip` may have allocated; `ops`
            // is not registered.
            unsafe { bindings::ftrace_free_filter(&mut *ops) };
            return Err(match ret {
                r if r == EBUSY.to_errno() => AttachError::Busy,
                r if r == ENOMEM.to_errno() => AttachError::NoMemory,
                r => AttachError::Ftrace(r),
            });
        }
        // Not before: handlers ask `is_attached`, and rely on a hook that was once there for as long as their path is on.
        hook.address.store(address, Ordering::Relaxed);
        Ok(Self { id, ops })
    }

    /// The hook point that this keeps attached.
    pub(crate) fn id(&self) -> HookId {
        self.id
    }
}

impl Attached {
    /// Takes the trampoline off its function, without waiting for anybody.
    fn unregister(&mut self) {
        // ftrace would wait for two grace periods here, for each hook; `wait` does it for all.
        self.ops.flags &= !(bindings::FTRACE_OPS_FL_DYNAMIC as kernel::ffi::c_ulong);
        // SAFETY: `attach` registered `ops` with this trampoline. The filter, which ftrace may
        // still read, is freed after the grace periods.
        let ret = unsafe {
            bindings::unregister_ftrace_direct(&mut *self.ops, self.id.trampoline(), false)
        };
        if ret != 0 {
            // ftrace turned itself off after a bug elsewhere (-ENODEV). The call site may still
            // point here and nothing can change that any more.
            pr_err!(
                "ftrace refuses to release {:?}: {}\n",
                self.id.symbol(),
                ret
            );
        }
    }
}

/// Waits until every task has left the handlers of hooks that were unregistered, but for the tail
/// of a trampoline.
fn wait() {
    // What ftrace does for ops that are freed: tasks that are preempted in a trampoline must run on.
    // SAFETY: Process context; may sleep.
    unsafe {
        bindings::synchronize_rcu_tasks_rude();
        bindings::synchronize_rcu_tasks();
    }
}

/// Rounds of about a millisecond after which those who sleep in a section are asked to leave.
const PATIENCE: u32 = 200;

/// Takes hooks off together and returns when nobody is inside any of them. `send_out` is called again and again where that takes
/// long: a vCPU may wait for a page that does not come.
pub(crate) fn detach(hooks: &mut [Option<Attached>; COUNT], send_out: impl Fn()) {
    if hooks.iter().all(Option::is_none) {
        return;
    }
    hooks.iter_mut().flatten().for_each(Attached::unregister);
    wait();
    let mut rounds = 0u32;
    for slot in hooks {
        if let Some(attached) = slot {
            let hook = attached.id.hook();
            while hook.in_flight.load(Ordering::Acquire) != 0 {
                rounds = rounds.saturating_add(1);
                if rounds % PATIENCE == 0 {
                    send_out();
                }
                // SAFETY: Process context without locks that a handler takes.
                unsafe { bindings::msleep(1) };
            }
            // SAFETY: Unregistered, and nobody reads it any more after the grace periods.
            unsafe { bindings::ftrace_free_filter(&mut *attached.ops) };
            hook.address.store(0, Ordering::Relaxed);
        }
        *slot = None;
    }
}

/// Waits until no handler that runs with preemption off, and began before, runs any more. One that runs a guest in between may: it has to look at what
/// has changed again afterwards.
///
/// To RCU a CPU on which preemption is off is in a reader, but while it runs a guest. (synchronize_rcu_tasks_rude() is an empty function where no task can be
/// traced where RCU does not watch, CONFIG_ARCH_WANTS_NO_INSTR.)
pub(crate) fn wait_for_atomic_handlers() {
    // SAFETY: Process context; may sleep.
    unsafe { bindings::synchronize_rcu() };
}

/// Waits until no task is in any trampoline or handler, all hooks being off: the last thing before what handlers look at, or
/// this module's text, is freed.
pub(crate) fn settle() {
    // SAFETY: Process context; may sleep.
    unsafe { bindings::synchronize_rcu_tasks() };
}

/// ftrace asks here when a livepatch (which changes the continuation) comes to or leaves a function
/// that we have a direct call on. We share: the trampoline goes on wherever ftrace says. Until the patch's module is loaded to
/// its end, when `control` switches all paths off, handlers answer as the unpatched function would, as it is called by tasks that the patch has
/// not reached yet.
///
/// # Safety
///
/// Only ftrace calls this, with ops that `attach` registered.
unsafe extern "C" fn share_with_livepatch(
    ops: *mut bindings::ftrace_ops,
    _ip: usize,
    cmd: bindings::ftrace_ops_cmd,
) -> kernel::ffi::c_int {
    let livepatched = match cmd {
        bindings::ftrace_ops_cmd_FTRACE_OPS_CMD_ENABLE_SHARE_IPMODIFY_SELF
        | bindings::ftrace_ops_cmd_FTRACE_OPS_CMD_ENABLE_SHARE_IPMODIFY_PEER => true,
        bindings::ftrace_ops_cmd_FTRACE_OPS_CMD_DISABLE_SHARE_IPMODIFY_PEER => false,
        _ => return EINVAL.to_errno(),
    };
    // SAFETY: ftrace passes the ops that `attach` registered; `direct_call` holds our trampoline.
    let trampoline = unsafe { (*ops).direct_call };
    for id in HookId::all().filter(|id| id.trampoline() == trampoline) {
        id.hook().livepatched.store(livepatched, Ordering::Relaxed);
    }
    0
}
