// SPDX-License-Identifier: GPL-2.0
//! Finds the address of a kernel function that is not exported.

use super::Function;
use crate::{alloc, bindings};
use kernel::{prelude::*, str::CString};

/// The address where ftrace knows the function, or `None` when the running kernel has no function
/// of that name that can be probed.
///
/// A kprobe that is registered and dropped at once gives the address; `kallsyms_lookup_name` is
/// not exported. The probe lives for a moment, disabled, and its handler is never set.
pub(super) fn address(function: Function) -> Option<usize> {
    let name = CString::try_from_fmt(fmt!(
        "{}:{}",
        function.module().to_str().ok()?,
        function.symbol().to_str().ok()?
    ))
    .ok()?;
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
