// SPDX-License-Identifier: GPL-2.0
//! The decisions of the kernel module that need no kernel: `src/policy` of the module itself, the
//! same files, built for the host so that unit, property and fuzz tests can get at them.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]
#![allow(clippy::precedence, reason = "as the kernel's own lints do")]

#[path = "../../../src/policy/mod.rs"]
mod policy;

pub use policy::*;
