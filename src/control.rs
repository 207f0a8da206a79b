// SPDX-License-Identifier: GPL-2.0
//! Who may be attached when: modes that were asked for, the coming and going of kvm_intel, and what
//! follows for hooks and per-vCPU state. Everything here happens under one mutex that no handler
//! takes. What has to be read from files of the kernel's is read before, under a mutex of its own: our own files take
//! the first one inside the locks of a file.

use crate::{
    alloc, bindings,
    hook::{self, AttachError, Attached, Function, HookId},
    kvm, layout, livepatch,
    path::{self, checks, exits, nested_switch},
    policy::mode::Mode,
    state,
};
use core::fmt;
use kernel::prelude::*;

/// Why a path cannot work on this kernel.
#[derive(Clone, Copy)]
pub(crate) enum Trouble {
    /// The function is missing or the compiler changed its arguments.
    Prototype(Function),
    /// The hook could not be attached.
    Attach(HookId, AttachError),
}

fn missing(f: &mut fmt::Formatter<'_>, function: Function) -> fmt::Result {
    let name = function.symbol().to_str().unwrap_or("?");
    write!(
        f,
        "{name} is missing here or the compiler changed its arguments"
    )
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |id: HookId| id.symbol().to_str().unwrap_or("?");
        match *self {
            Trouble::Prototype(function) => missing(f, function),
            Trouble::Attach(id, AttachError::NoSymbol) => missing(f, id.function()),
            Trouble::Attach(id, AttachError::Busy) => write!(
                f,
                "{} already has another direct call (BPF fentry/fexit or another module)",
                name(id)
            ),
            Trouble::Attach(id, AttachError::NoMemory) => {
                write!(f, "no memory to hook {}", name(id))
            }
            Trouble::Attach(id, AttachError::Ftrace(e)) => {
                write!(f, "ftrace refused to hook {} (error {e})", name(id))
            }
        }
    }
}

/// Whether there is a kvm_intel that fits.
enum Target {
    /// kvm_intel is not loaded.
    Absent,
    /// It is loaded and its layout is the expected one.
    Ready(layout::Prototypes),
    /// It is loaded and different.
    Refused(layout::Mismatch),
}

struct Control {
    target: Target,
    wanted: [Mode; path::COUNT],
    trouble: [Option<Trouble>; path::COUNT],
    /// Exit accounting was asked for.
    accounting: bool,
    /// A livepatch changes KVM.
    patch: Option<livepatch::Name>,
    /// How often kvm_intel has gone.
    departures: u32,
    attached: [Option<Attached>; hook::COUNT],
}

kernel::sync::global_lock! {
    // SAFETY: `init` is called once, by the module's own init, before anything else here.
    unsafe(uninit) static CONTROL: Mutex<Control> = Control {
        target: Target::Absent,
        wanted: [Mode::Off; path::COUNT],
        trouble: [None; path::COUNT],
        accounting: false,
        patch: None,
        departures: 0,
        attached: [const { None }; hook::COUNT],
    };
}

kernel::sync::global_lock! {
    // SAFETY: As above.
    unsafe(uninit) static LOOKING: Mutex<()> = ();
}

/// Must be called once before anything else here.
///
/// # Safety
///
/// Not more than once in the module's life.
pub(crate) unsafe fn init() {
    // SAFETY: By this function's contract.
    unsafe {
        CONTROL.init();
        LOOKING.init();
    }
}

/// Looks at the kvm_intel that is loaded. May sleep, reads files.
fn look(fault: usize) -> Result<layout::Prototypes, layout::Mismatch> {
    let prototypes = layout::check(fault)?;
    checks::prepare();
    kvm::prepare();
    nested_switch::prepare();
    Ok(prototypes)
}

impl Control {
    fn needed(&self, id: HookId) -> bool {
        if !matches!(self.target, Target::Ready(_)) {
            return false;
        }
        let active = |n: usize| self.effective(n) != Mode::Off;
        let any = (0..path::COUNT).any(active);
        (path::COMMON_HOOKS.contains(&id) && (any || self.accounting))
            || (exits::ACCOUNTING.hooks.contains(&id) && self.accounting)
            || path::PATHS.iter().enumerate().any(|(n, p)| {
                let own = Iterator::chain(p.all_hooks(), p.extra_hooks.iter().copied());
                active(n) && own.into_iter().any(|own| own == id)
            })
    }

    /// The mode that a path can have now.
    fn effective(&self, number: usize) -> Mode {
        let possible = matches!(self.target, Target::Ready(_))
            && self.patch.is_none()
            && self.trouble.get(number).is_some_and(Option::is_none);
        if possible {
            self.wanted.get(number).copied().unwrap_or(Mode::Off)
        } else {
            Mode::Off
        }
    }

    fn is_attached(&self, id: HookId) -> bool {
        self.attached.iter().flatten().any(|a| a.id() == id)
    }

    fn detach_unneeded(&mut self) {
        let common = |id: HookId| path::COMMON_HOOKS.contains(&id);
        self.detach(|this, id| !common(id) && !this.needed(id));
        if path::COMMON_HOOKS.iter().any(|&id| self.needed(id)) {
            return;
        }
        if self.detach(|_, id| common(id)) {
            // A task that slept in a handler's section may be behind its end, and still look at a state.
            hook::settle();
        }
        // SAFETY: Every hook is off, and no task is in a handler.
        unsafe { state::forget_all() };
    }

    /// Takes off the hooks that `which` says, all at once. Whether there were any.
    fn detach(&mut self, which: impl Fn(&Self, HookId) -> bool) -> bool {
        let mut going = [const { None }; hook::COUNT];
        for (n, to) in going.iter_mut().enumerate() {
            let goes = |this: &Self| {
                let attached = this.attached.get(n)?.as_ref()?;
                Some(which(this, attached.id()))
            };
            if goes(self) == Some(true) {
                *to = self.attached.get_mut(n).and_then(Option::take);
            }
        }
        let any = going.iter().any(Option::is_some);
        // Waits until nobody is inside.
        hook::detach(&mut going, path::interrupt_all);
        any
    }

    fn attach(&mut self, id: HookId) -> Result<(), AttachError> {
        if self.is_attached(id) {
            return Ok(());
        }
        let attached = Attached::attach(id)?;
        if let Some(slot) = self.attached.iter_mut().find(|s| s.is_none()) {
            *slot = Some(attached);
        }
        Ok(())
    }

    /// Makes hooks and modes what they should be.
    fn apply(&mut self) {
        self.make_so();
        // A patch that was not found, since whoever loads it does not see our sysfs, is known to ftrace.
        if self.patch.is_none() && HookId::all().any(|id| self.is_attached(id) && id.livepatched())
        {
            self.patched(Some(livepatch::Name::UNKNOWN));
            self.make_so();
        }
    }

    /// Notes which livepatch changes KVM now, for `apply` to heed.
    fn patched(&mut self, patch: Option<livepatch::Name>) {
        match patch {
            _ if self.patch == patch => {}
            Some(name) => pr_notice!(
                "livepatch {} changes KVM: all paths are off until it is gone\n",
                Show(name)
            ),
            None => pr_notice!("no livepatch changes KVM any more\n"),
        }
        self.patch = patch;
    }

    /// Off comes first and on comes last, so that no handler ever finds a mode without the hooks that keep its state honest.
    fn make_so(&mut self) {
        for (n, p) in path::PATHS.iter().enumerate() {
            if self.effective(n) != Mode::Off {
                continue;
            }
            let was = path::mode(n);
            path::set_mode(n, Mode::Off);
            if let Some(drain) = p.drain.filter(|_| was != Mode::Off) {
                for &id in p.drain_hooks {
                    // Without it the drain waits until vCPUs leave KVM_RUN.
                    if self.attach(id).is_err() {
                        pr_warn!("cannot hook {:?} to switch a path off\n", id.symbol());
                    }
                }
                drain();
            }
        }
        self.detach_unneeded();

        for (n, p) in path::PATHS.iter().enumerate() {
            if self.effective(n) == Mode::Off {
                continue;
            }
            for id in p.all_hooks() {
                if let Err(e) = self.attach(id) {
                    let trouble = Trouble::Attach(id, e);
                    pr_warn!("path {} stays off: {}\n", Show(p.name), Show(trouble));
                    if let Some(t) = self.trouble.get_mut(n) {
                        *t = Some(trouble);
                    }
                    break;
                }
            }
            for &id in p.extra_hooks {
                let fits = matches!(&self.target, Target::Ready(found) if found.fits(id));
                if fits && self.attach(id).is_err() {
                    pr_info!(
                        "cannot hook {:?}; {} does without\n",
                        id.symbol(),
                        Show(p.name)
                    );
                }
            }
        }
        if self.accounting && matches!(self.target, Target::Ready(_)) {
            for id in exits::ACCOUNTING.all_hooks() {
                if let Err(e) = self.attach(id) {
                    self.accounting = false;
                    let trouble = Trouble::Attach(id, e);
                    pr_warn!("no exit accounting: {}\n", Show(trouble));
                    break;
                }
            }
        }
        // A path that failed half-way leaves hooks that nobody needs.
        self.detach_unneeded();
        for n in 0..path::COUNT {
            path::set_mode(n, self.effective(n));
        }
        exits::set_counting(self.accounting);
    }

    fn meet(&mut self, found: Result<layout::Prototypes, layout::Mismatch>) {
        match found {
            Ok(prototypes) => {
                for (n, p) in path::PATHS.iter().enumerate() {
                    let hook = p
                        .all_hooks()
                        .find(|&id| !prototypes.fits(id))
                        .map(|id| id.function());
                    let call = p.calls.iter().find(|&&id| !prototypes.can_call(id));
                    let bad = hook.or(call.map(|id| id.function()));
                    if let Some(t) = self.trouble.get_mut(n) {
                        *t = bad.map(Trouble::Prototype);
                    }
                }
                self.target = Target::Ready(prototypes);
            }
            Err(mismatch) => self.target = Target::Refused(mismatch),
        }
    }
}

/// Lets `core::fmt` things through the kernel's `fmt!`, and C strings without quotes.
struct Show<T>(T);

impl kernel::fmt::Display for Show<Trouble> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl kernel::fmt::Display for Show<&kernel::str::CStr> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.to_str().unwrap_or("?"))
    }
}

impl kernel::fmt::Display for Show<livepatch::Name> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl kernel::fmt::Display for Show<&layout::Mismatch> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self.0, f)
    }
}

/// kvm_intel is there (at load, or because it was loaded just now): look at it and attach what was
/// asked for. `EINVAL` if its layout differs, and the log has the structure's name; `ENOMEM`.
pub(crate) fn kvm_intel_came(fault: usize) -> Result {
    // Held until what was found is put to use: who looks later has the last word.
    let _looking = LOOKING.lock();
    let departures = CONTROL.lock().departures;
    let found = look(fault);
    let patch = livepatch::of_kvm();
    let mut control = CONTROL.lock();
    if control.departures != departures {
        // It is gone again, and the notifier tells of the next.
        return Ok(());
    }
    control.meet(found);
    control.patched(patch);
    control.apply();
    if let Target::Refused(mismatch) = &control.target {
        pr_err!("{}\n", Show(mismatch));
        return Err(match mismatch {
            layout::Mismatch::NoBtf(_, e) if *e == ENOMEM => ENOMEM,
            _ => EINVAL,
        });
    }
    Ok(())
}

/// Some module has come or gone, and with it a livepatch, perhaps.
fn livepatches_changed() {
    let _looking = LOOKING.lock();
    let patch = livepatch::of_kvm();
    let mut control = CONTROL.lock();
    // That nothing is found says nothing of a patch that never was: to try would be to run beside it.
    let hidden = patch.is_none() && control.patch == Some(livepatch::Name::UNKNOWN);
    if hidden || control.patch == patch {
        return;
    }
    control.patched(patch);
    control.apply();
}

/// kvm_intel is about to go (no vCPU is left): everything off, modes that were asked for kept.
pub(crate) fn kvm_intel_goes() {
    let mut control = CONTROL.lock();
    control.target = Target::Absent;
    control.departures = control.departures.wrapping_add(1);
    control.apply();
}

/// This module is about to go: everything off, drained and dropped.
pub(crate) fn shut_down() {
    let mut control = CONTROL.lock();
    control.wanted = [Mode::Off; path::COUNT];
    control.accounting = false;
    control.apply();
    drop(control);
    hook::settle();
}

/// EOPNOTSUPP, which the kernel crate of 7.2 has no name for.
fn unsupported() -> Error {
    Error::from_errno(-95)
}

/// Asks for a mode. `EOPNOTSUPP` when the path cannot work here (its `state` says why); while
/// kvm_intel is not loaded, or a livepatch changes KVM, the wish is kept.
pub(crate) fn set_mode(number: usize, mode: Mode) -> Result {
    let mut control = CONTROL.lock();
    if mode != Mode::Off {
        // A patch that cannot be found may be gone, and an attachment that failed may work now.
        if control.patch == Some(livepatch::Name::UNKNOWN) {
            control.patch = None;
        }
        if let Some(t) = control.trouble.get_mut(number) {
            if matches!(t, Some(Trouble::Attach(..))) {
                *t = None;
            }
        }
    }
    *control.wanted.get_mut(number).ok_or(EINVAL)? = mode;
    control.apply();
    let refused = matches!(control.target, Target::Refused(_));
    let fits = matches!(control.trouble.get(number), Some(None));
    let waits = matches!(control.target, Target::Absent) || (fits && control.patch.is_some());
    let works = control.effective(number) == mode || waits;
    if refused || !works {
        if let Some(w) = control.wanted.get_mut(number) {
            *w = Mode::Off;
        }
        return Err(unsupported());
    }
    Ok(())
}

/// The mode that was last asked for.
pub(crate) fn wanted(number: usize) -> Mode {
    CONTROL
        .lock()
        .wanted
        .get(number)
        .copied()
        .unwrap_or(Mode::Off)
}

/// Switches exit accounting.
pub(crate) fn set_accounting(on: bool) -> Result {
    let mut control = CONTROL.lock();
    control.accounting = on;
    control.apply();
    if control.accounting == on {
        Ok(())
    } else {
        Err(unsupported())
    }
}

/// Whether exit accounting is on.
pub(crate) fn accounting() -> bool {
    CONTROL.lock().accounting
}

/// Writes one word (and a reason) about the running kernel: `yes`, `no: …`, `unknown: …`.
pub(crate) fn describe_match(out: &mut dyn fmt::Write) -> fmt::Result {
    match &CONTROL.lock().target {
        Target::Ready(_) => writeln!(out, "yes"),
        Target::Refused(mismatch) => writeln!(out, "no: {mismatch}"),
        Target::Absent => writeln!(out, "unknown: kvm_intel is not loaded"),
    }
}

/// Writes the state of a path: `active`, `ready`, `waiting: …` or `unavailable: …`.
pub(crate) fn describe_path(number: usize, out: &mut dyn fmt::Write) -> fmt::Result {
    let control = CONTROL.lock();
    match (
        &control.target,
        control.trouble.get(number).copied().flatten(),
    ) {
        (Target::Absent, _) => writeln!(out, "waiting: kvm_intel is not loaded"),
        (Target::Refused(mismatch), _) => writeln!(out, "unavailable: {mismatch}"),
        (Target::Ready(_), Some(trouble)) => writeln!(out, "unavailable: {trouble}"),
        (Target::Ready(_), None) if control.patch.is_some() => {
            let name = control.patch.unwrap_or(livepatch::Name::UNKNOWN);
            writeln!(out, "waiting: livepatch {name} changes KVM")
        }
        (Target::Ready(_), None) if control.effective(number) == Mode::Off => {
            writeln!(out, "ready")
        }
        (Target::Ready(_), None) => writeln!(out, "active"),
    }
}

/// Writes a line for each hook point: module, function, prototype, attached or not, tasks inside.
pub(crate) fn describe_hooks(out: &mut dyn fmt::Write) -> fmt::Result {
    let control = CONTROL.lock();
    for id in HookId::all() {
        let prototype = match &control.target {
            Target::Ready(p) => {
                if p.fits(id) {
                    "known"
                } else {
                    "unfit"
                }
            }
            _ => "unknown",
        };
        writeln!(
            out,
            "{} {} {} {} {} {:#x}",
            id.function().module().to_str().unwrap_or("?"),
            id.symbol().to_str().unwrap_or("?"),
            prototype,
            match (control.is_attached(id), id.livepatched()) {
                (true, false) => "attached",
                (true, true) => "livepatched",
                (false, _) => "off",
            },
            id.in_flight(),
            id.address()
        )?;
    }
    Ok(())
}

/// Called by the kernel when any module comes or goes.
///
/// # Safety
///
/// Only the module notifier chain calls this, with a `struct module *`.
unsafe extern "C" fn module_event(
    _nb: *mut bindings::notifier_block,
    event: usize,
    data: *mut kernel::ffi::c_void,
) -> kernel::ffi::c_int {
    // SAFETY: The notifier chain of modules passes a `struct module *` whose name is a
    // NUL-terminated array.
    let name = unsafe {
        kernel::str::CStr::from_char_ptr(
            (&raw const (*data.cast::<bindings::module>()).name).cast(),
        )
    };
    if name.to_bytes() == b"kvm_intel" {
        match event as bindings::module_state {
            // Its init has run: symbols and BTF are in place.
            bindings::module_state_MODULE_STATE_LIVE => {
                let _ = kvm_intel_came(0);
            }
            bindings::module_state_MODULE_STATE_GOING => kvm_intel_goes(),
            _ => {}
        }
    } else if event as bindings::module_state != bindings::module_state_MODULE_STATE_COMING {
        livepatches_changed();
    }
    0 // NOTIFY_DONE
}

/// Registration with the kernel's module notifier; dropping it unregisters.
pub(crate) struct Notifier(KBox<bindings::notifier_block>);

// SAFETY: The block is only touched by the notifier chain's own functions.
unsafe impl Send for Notifier {}
// SAFETY: As above.
unsafe impl Sync for Notifier {}

impl Notifier {
    /// Starts listening.
    pub(crate) fn register() -> Result<Self> {
        let block = bindings::notifier_block {
            notifier_call: Some(module_event),
            ..Default::default()
        };
        alloc::MODULE.gate()?;
        let mut block = KBox::new(block, GFP_KERNEL)?;
        // SAFETY: The box does not move and is unregistered before it is freed.
        to_result(unsafe { bindings::register_module_notifier(&mut *block) })?;
        Ok(Self(block))
    }
}

impl Drop for Notifier {
    fn drop(&mut self) {
        // SAFETY: Registered by `register`.
        unsafe { bindings::unregister_module_notifier(&mut *self.0) };
    }
}

fn to_result(ret: kernel::ffi::c_int) -> Result {
    if ret < 0 {
        Err(Error::from_errno(ret))
    } else {
        Ok(())
    }
}
