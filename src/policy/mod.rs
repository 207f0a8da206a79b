// SPDX-License-Identifier: GPL-2.0
//! Pure decisions: no kernel types, no allocation, no unsafe. The host builds this same directory
//! (`rust/policy`) for unit, property and fuzz tests.

pub mod btf;
pub mod detour;
pub mod host_state;
pub mod learn;
pub mod masks;
pub mod mode;
pub mod operand;
pub mod role;
pub mod segments;
pub mod ways;
