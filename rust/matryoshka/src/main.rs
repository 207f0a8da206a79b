// SPDX-License-Identifier: GPL-2.0
//! The tool.
fn main() {}
