// SPDX-License-Identifier: GPL-2.0
//! The state that L1 finds after an exit of L2 (SDM volume 3, 29.5: loading host state), for an L1 in 64-bit mode.

use super::{
    controls::vm_exit::{
        CLEAR_BNDCFGS, HOST_ADDRESS_SPACE_SIZE, LOAD_CET, LOAD_EFER, LOAD_PAT,
        LOAD_PERF_GLOBAL_CTRL,
    },
    registers::{CR4_PAE, LONG_MODE, PROTECTED_AND_PAGED},
};

/// RFLAGS after an exit.
pub const RFLAGS: u64 = 2;
/// DR7 after an exit.
pub const DR7: u64 = 0x400;
/// Limit of GDTR and IDTR after an exit.
pub const TABLE_LIMIT: u64 = 0xffff;

/// What decides how L1's state is loaded: fields of vmcs12, and the EFER that L2 had.
#[derive(Clone, Copy, Debug)]
pub struct Inputs {
    /// VM-exit controls.
    pub controls: u64,
    /// VM-exit MSR-load count.
    pub msr_count: u64,
    /// Host CR0.
    pub cr0: u64,
    /// Host CR4.
    pub cr4: u64,
    /// Host IA32_EFER.
    pub efer: u64,
    /// IA32_EFER of L2 as it exits.
    pub guest_efer: u64,
}

/// What follows from [`Inputs`] and is not a constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// IA32_EFER of L1.
    pub efer: u64,
    /// IA32_PAT is loaded from vmcs12.
    pub load_pat: bool,
    /// IA32_BNDCFGS is cleared.
    pub clear_bndcfgs: bool,
}

impl Inputs {
    /// `None` for what is out of the ordinary: an L1 that is not in 64-bit mode, a list of MSRs to load, CET and
    /// performance counters.
    #[inline(always)]
    pub const fn plan(&self) -> Option<Plan> {
        const STOCK: u64 = (LOAD_PERF_GLOBAL_CTRL | LOAD_CET) as u64;
        const LONG: u64 = HOST_ADDRESS_SPACE_SIZE as u64;
        let efer = if self.controls & LOAD_EFER as u64 != 0 {
            self.efer
        } else {
            self.guest_efer | LONG_MODE
        };
        let plain = self.controls & (STOCK | LONG) == LONG
            && self.msr_count == 0
            && efer & LONG_MODE == LONG_MODE
            && self.cr0 & PROTECTED_AND_PAGED == PROTECTED_AND_PAGED
            && self.cr4 & CR4_PAE != 0;
        if !plain {
            return None;
        }
        Some(Plan {
            efer,
            load_pat: self.controls & LOAD_PAT as u64 != 0,
            clear_bndcfgs: self.controls & CLEAR_BNDCFGS as u64 != 0,
        })
    }
}

/// Access rights of a segment in the VMCS's format (SDM table 26-2).
const fn rights(kind: u64, system: bool, long: bool, big: bool, pages: bool) -> u64 {
    const PRESENT: u64 = 1 << 7;
    kind | PRESENT
        | if system { 0 } else { 1 << 4 }
        | if long { 1 << 13 } else { 0 }
        | if big { 1 << 14 } else { 0 }
        | if pages { 1 << 15 } else { 0 }
}

/// Access rights of CS after an exit to 64-bit mode: executable, readable, accessed; L and G.
pub const CS_RIGHTS: u64 = rights(11, false, true, false, true);
/// Access rights of DS, ES, FS, GS, SS: writable, accessed; D/B and G. The SDM leaves them undefined for
/// a null selector; these are KVM's.
pub const DATA_RIGHTS: u64 = rights(3, false, false, true, true);
/// Access rights of TR: a busy 64-bit TSS.
pub const TR_RIGHTS: u64 = rights(11, true, false, false, false);
/// Access rights of LDTR: unusable.
pub const LDTR_RIGHTS: u64 = 1 << 16;
/// Limit of CS and the data segments.
pub const FLAT: u64 = 0xffff_ffff;
/// Limit of TR.
pub const TSS_LIMIT: u64 = 0x67;
