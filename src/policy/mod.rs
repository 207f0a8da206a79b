// SPDX-License-Identifier: GPL-2.0
//! Pure decisions: no kernel types, no allocation, no unsafe. The host builds this same directory
//! (`rust/policy`) for unit, property and fuzz tests.

pub mod ahead;
pub mod btf;
pub mod controls;
pub mod detour;
pub mod entry;
pub mod ept;
pub mod ept_trail;
pub mod host_state;
pub mod knob;
pub mod learn;
pub mod masks;
pub mod mode;
pub mod msr_bitmap;
pub mod operand;
pub mod page_copy;
pub mod pause;
pub mod reach;
pub mod reflect;
pub mod registers;
pub mod role;
pub mod segments;
pub mod set;
pub mod trial;
pub mod vpids;
pub mod ways;
pub mod window;
