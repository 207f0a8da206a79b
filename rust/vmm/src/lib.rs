// SPDX-License-Identifier: GPL-2.0
//! A small VMM on the rust-vmm crates.
