// SPDX-License-Identifier: GPL-2.0
//! What the administrator may set: how many fields are shadowed, when a field pays, and which always or
//! never are. Takes effect on each vCPU when its L1 is entered next.

use super::BUDGET;
use crate::{
    kvm::fields::{self, Class, FIELDS},
    path::learned::write_names,
    policy::{knob, learn::Config, set::Set},
    sysfs::Attribute,
};
use core::{
    fmt::{self, Write},
    sync::atomic::{AtomicU32, Ordering},
};
use kernel::{prelude::*, str::CStr};

kernel::sync::global_lock! {
    // SAFETY: `init` is called once, by the module's own init, before any handler can run.
    unsafe(uninit) static RULES: SpinLock<Config> = Config::new(BUDGET);
}

/// Counts the changes of `RULES`; never 0 but after four billion of them.
static GENERATION: AtomicU32 = AtomicU32::new(1);

/// Must be called once before anything else here.
///
/// # Safety
///
/// Not more than once in the module's life.
pub(crate) unsafe fn init() {
    // SAFETY: By this function's contract.
    unsafe { RULES.init() };
}

/// Number of the rules in force, which changes with them.
#[inline(always)]
pub(super) fn generation() -> u32 {
    GENERATION.load(Ordering::Relaxed)
}

/// The rules in force and their number.
#[cold]
pub(super) fn rules() -> (Config, u32) {
    let rules = RULES.lock();
    (*rules, generation())
}

/// The files of this path beside those that every path has.
pub(crate) static FILES: [Attribute; 4] = [
    knob(c"budget", show_budget, store_budget),
    knob(c"window", show_window, store_window),
    knob(c"pinned", show_pinned, store_pinned),
    knob(c"forbidden", show_forbidden, store_forbidden),
];

const fn knob(
    name: &'static CStr,
    show: fn(&mut dyn Write) -> fmt::Result,
    store: fn(&[u8]) -> Result,
) -> Attribute {
    Attribute::knob(name, show, store)
}

fn change(f: impl FnOnce(&mut Config)) -> Result {
    let mut rules = RULES.lock();
    f(&mut rules);
    GENERATION.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

fn show_budget(out: &mut dyn Write) -> fmt::Result {
    writeln!(out, "{}", rules().0.budget)
}

fn store_budget(text: &[u8]) -> Result {
    let most = knob::number(text).filter(|&n| n <= u16::from(BUDGET));
    let most = most.ok_or(EINVAL)?;
    change(|rules| rules.budget = most as u8)
}

fn show_window(out: &mut dyn Write) -> fmt::Result {
    writeln!(out, "{}", rules().0.window)
}

fn store_window(text: &[u8]) -> Result {
    let window = knob::number(text).filter(|n| Config::WINDOWS.contains(n));
    let window = window.ok_or(EINVAL)?;
    change(|rules| rules.window = window)
}

fn show_pinned(out: &mut dyn Write) -> fmt::Result {
    write_names(&rules().0.pinned, out)
}

fn store_pinned(text: &[u8]) -> Result {
    let pinned = parse(text, |class| class != Class::Seen)?;
    change(|rules| rules.pinned = pinned)
}

fn show_forbidden(out: &mut dyn Write) -> fmt::Result {
    write_names(&rules().0.forbidden, out)
}

fn store_forbidden(text: &[u8]) -> Result {
    let forbidden = parse(text, |_| true)?;
    change(|rules| rules.forbidden = forbidden)
}

/// A list of fields, by name or by encoding, all of which `may` be on it.
fn parse(text: &[u8], may: fn(Class) -> bool) -> Result<Set> {
    let mut set = Set::EMPTY;
    for word in knob::words(text) {
        let by_name = || {
            (0..)
                .zip(FIELDS)
                .find(|(_, field)| field.name.as_bytes().eq_ignore_ascii_case(word))
                .map(|(number, _)| number)
        };
        let number = match knob::number(word) {
            Some(encoding) => fields::by_encoding(u64::from(encoding)),
            None => by_name(),
        };
        let number = number.ok_or(EINVAL)?;
        let class = FIELDS.get(number as usize).ok_or(EINVAL)?.class;
        if !may(class) {
            return Err(EINVAL);
        }
        set.insert(number);
    }
    Ok(set)
}
