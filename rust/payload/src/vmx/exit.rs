// SPDX-License-Identifier: GPL-2.0-or-later
//! Basic exit reasons (SDM volume 3, appendix C) that the payload acts upon.

/// The child executed VMCALL.
pub const VMCALL: u64 = 18;
/// The child touched what the EPT does not allow.
pub const EPT_VIOLATION: u64 = 48;
