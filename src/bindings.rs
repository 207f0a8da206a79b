// SPDX-License-Identifier: GPL-2.0
//! KVM's private structures and the kernel interfaces that the kernel crate does not wrap yet,
//! made by bindgen from `include/kvm_bindings.h` at build time.
//!
//! Nothing outside `hook`, `kvm`, `kfile`, `sysfs` and `layout` should need this module: they wrap
//! what they use in safe types.

#![allow(
    clippy::all,
    clippy::as_ptr_cast_mut,
    clippy::as_underscore,
    clippy::borrow_as_ptr,
    clippy::cast_lossless,
    clippy::ptr_as_ptr,
    clippy::ref_as_ptr,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    improper_ctypes,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    rustdoc::all,
    unreachable_pub,
    unsafe_op_in_unsafe_fn
)]

use kernel::ffi;
use pin_init::MaybeZeroable;

// The kernel crate maps these to `usize` and `isize`; `rust/bindgen_parameters` leaves them out.
type __kernel_size_t = usize;
type __kernel_ssize_t = isize;
type __kernel_ptrdiff_t = isize;

include!(env!("MTK_BINDINGS"));
