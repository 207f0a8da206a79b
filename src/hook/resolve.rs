// SPDX-License-Identifier: GPL-2.0
//! Finds the address of a kernel function that is not exported.

use super::Function;
use crate::{alloc, bindings};
use core::sync::atomic::{AtomicUsize, Ordering};
use kernel::{
    prelude::*,
    str::{CStr, CString},
};

/// The kernel's own functions that find others, none of which is exported; 0 until they are needed.
static KALLSYMS_LOOKUP_NAME: AtomicUsize = AtomicUsize::new(0);
static FTRACE_LOCATION: AtomicUsize = AtomicUsize::new(0);

/// The address where ftrace knows the function, or `None` when the running kernel has no function
/// of that name that can be traced or probed.
///
/// A kprobe that is registered and dropped at once gives it, but each takes a million instructions and more: the kernel
/// decodes all that it has of jump labels to be sure that the address is not in one. So two are used to find functions that
/// say the same, and the others only for what these do not find.
pub(super) fn address(function: Function) -> Option<usize> {
    let name = CString::try_from_fmt(fmt!(
        "{}:{}",
        function.module().to_str().ok()?,
        function.symbol().to_str().ok()?
    ))
    .ok()?;
    by_name(&name).or_else(|| by_probe(&name))
}

/// The address of something that is no function in the kernel itself; `None` where kallsyms does not list such (CONFIG_KALLSYMS_ALL).
pub(super) fn data(name: &CStr) -> Option<usize> {
    let lookup = once(&KALLSYMS_LOOKUP_NAME, c"kallsyms_lookup_name")?;
    // SAFETY: `unsigned long kallsyms_lookup_name(const char *)`; it takes what locks it needs.
    let address = unsafe { bindings::mtk_call_stock2(lookup, name.as_char_ptr() as usize, 0) };
    (address != 0).then_some(address as usize)
}

/// What kallsyms_lookup_name() and ftrace_location() say.
fn by_name(name: &CStr) -> Option<usize> {
    let lookup = once(&KALLSYMS_LOOKUP_NAME, c"kallsyms_lookup_name")?;
    let location = once(&FTRACE_LOCATION, c"ftrace_location")?;
    // SAFETY: `unsigned long kallsyms_lookup_name(const char *)`; it takes what locks it needs.
    let start = unsafe { bindings::mtk_call_stock2(lookup, name.as_char_ptr() as usize, 0) };
    if start == 0 {
        return None;
    }
    // SAFETY: `unsigned long ftrace_location(unsigned long)`; the same.
    let site = unsafe { bindings::mtk_call_stock2(location, start as usize, 0) };
    (site != 0).then_some(site as usize)
}

/// The address of a function of the kernel itself, which stays where it is.
fn once(known: &AtomicUsize, name: &CStr) -> Option<usize> {
    match known.load(Ordering::Relaxed) {
        0 => {
            let address = by_probe(name)?;
            known.store(address, Ordering::Relaxed);
            Some(address)
        }
        address => Some(address),
    }
}

/// The probe lives for a moment, disabled, and its handler is never set.
fn by_probe(name: &CStr) -> Option<usize> {
    let probe = bindings::kprobe {
        symbol_name: name.as_char_ptr(),
        // Never armed: that would have ftrace walk all functions of the kernel, twice.
        flags: bindings::KPROBE_FLAG_DISABLED,
        ..Default::default()
    };
    alloc::MODULE.gate().ok()?;
    let mut probe = KBox::new(probe, GFP_KERNEL).ok()?;
    // SAFETY: `probe` is zeroed but for its symbol's name, which outlives the registration.
    if unsafe { bindings::register_kprobe(&mut *probe) } < 0 {
        return None;
    }
    let address = probe.addr as usize;
    // SAFETY: Registered just above.
    unsafe { bindings::unregister_kprobe(&mut *probe) };
    Some(address)
}
