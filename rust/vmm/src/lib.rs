// SPDX-License-Identifier: GPL-2.0-or-later
//! A small virtual machine monitor on the rust-vmm crates.
//!
//! It does one thing: run one level of a nested stack. What it runs is either
//! Linux, started by the kernel's 64-bit boot protocol, or a bare-metal payload
//! in 64-bit mode. The guest talks to it through the control device
//! ([`control`]), which is what makes a stack out of single machines: console
//! text, commands and the exit status travel through it from level to level.
//!
//! * [`machine`] builds and runs one virtual machine,
//! * [`stack`] knows what to run at which level of a stack, and makes the
//!   initramfs of the next one out of the files this level was given,
//! * [`module`] speaks to the Matryoshka module through sysfs.

pub mod backdoor;
pub mod boot;
pub mod clock;
pub mod console;
pub mod control;
pub mod cpio;
pub mod cpuid;
pub mod device;
pub mod door;
pub mod dump;
pub mod error;
pub mod files;
mod image;
pub mod machine;
pub mod memory;
mod missing;
pub mod module;
pub mod mptable;
pub mod parent;
pub mod payload;
pub mod shuffle;
pub mod stack;
mod state;
pub mod stats;
mod terminal;
mod vcpu;
mod vm;
mod work;

pub use error::{Error, Result};
