// SPDX-License-Identifier: GPL-2.0-or-later
//! The laboratory emulator's backdoor.
//!
//! XGETBV does not exit in VMX non-root operation, so these counters can be read at any depth
//! without disturbing what they count. A machine without them raises #GP (or #UD with
//! CR4.OSXSAVE clear), which the caller must be ready for.

/// ECX for XGETBV: EDX:EAX is the number of VM exits the CPU has made, all of them into L0.
pub const EXITS: u32 = 0x4d54_5200;
/// ECX for XGETBV: start of the region to profile.
pub const PROFILE_START: u32 = 0x4d54_5201;
/// ECX for XGETBV: end of the region to profile.
pub const PROFILE_STOP: u32 = 0x4d54_5202;
/// ECX for XGETBV: is the backdoor there? EDX:EAX is then [`PRESENT_MAGIC`].
pub const PRESENT: u32 = 0x4d54_5203;
/// What [`PRESENT`] answers.
pub const PRESENT_MAGIC: u64 = 0x4d54_524b;
