// SPDX-License-Identifier: GPL-2.0
//! Whether an exit of L2 is L1's: of those exits for which that takes a look at vmcs12 at most
//! (nested_vmx_l0_wants_exit() and nested_vmx_l1_wants_exit()).

use super::controls::primary::{HLT_EXITING, IO_BITMAPS, UNCONDITIONAL_IO};

/// Who decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// L1, whatever it has asked for.
    L1,
    /// L1, unless CPUID faults in L2 (IA32_MISC_FEATURES_ENABLES), which L0 looks at.
    L1UnlessFaulting,
    /// L1, if it has set this primary processor-based control.
    L1If(u32),
    /// L1, if it has set the first of these controls and not the second: then its bitmaps of I/O ports say so.
    L1IfNot(u32, u32),
    /// L1's bitmap of MSRs, for reads or for writes, if it uses one.
    MsrBitmap {
        /// The exit is one by WRMSR.
        write: bool,
    },
    /// L1's bitmap of VMREADs.
    VmreadBitmap,
    /// L1's bitmap of VMWRITEs.
    VmwriteBitmap,
    /// Not one of these exits.
    Unknown,
}

/// Who decides about an exit of L2, given the exit reason with all its modifiers (SDM volume 3, appendix C).
#[inline(always)]
pub const fn owner(reason: u32) -> Owner {
    match reason {
        10 => Owner::L1UnlessFaulting,
        12 => Owner::L1If(HLT_EXITING),
        // VMCALL, VMCLEAR, VMLAUNCH, VMPTRLD, VMPTRST; VMRESUME; VMXOFF, VMXON; INVEPT; INVVPID.
        18..=22 | 24 | 26 | 27 | 50 | 53 => Owner::L1,
        23 => Owner::VmreadBitmap,
        25 => Owner::VmwriteBitmap,
        30 => Owner::L1IfNot(UNCONDITIONAL_IO, IO_BITMAPS),
        31 => Owner::MsrBitmap { write: false },
        32 => Owner::MsrBitmap { write: true },
        _ => Owner::Unknown,
    }
}

/// Where the bit of a field is in a bitmap of VMREADs or VMWRITEs (SDM volume 3, 26.6.15): the number of the aligned word of 64 bits and the
/// bit in it. `None` for what is beyond the bitmap, and always exits.
#[inline(always)]
pub const fn place(field: u64) -> Option<(u64, u32)> {
    if field >> 15 != 0 {
        return None;
    }
    Some((field >> 6, (field & 63) as u32))
}

/// Where the bit of an MSR is in a bitmap of MSRs (SDM volume 3, 26.6.9), as `place`. `None` for one that is not in it, and always exits.
#[inline(always)]
pub const fn msr_place(msr: u32, write: bool) -> Option<(u64, u32)> {
    const HIGH: u32 = 0xc000_0000;
    const MSRS: u32 = 0x2000;
    let (index, quarter) = if msr >= HIGH {
        (msr - HIGH, 1)
    } else {
        (msr, 0)
    };
    if index >= MSRS {
        return None;
    }
    let quarter = if write { quarter + 2 } else { quarter };
    Some((quarter * 128 + (index >> 6) as u64, index & 63))
}
