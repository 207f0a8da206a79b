// SPDX-License-Identifier: GPL-2.0-or-later
//! The VMX instructions, with every way in which they can fail.

use core::arch::asm;
use core::fmt;

use super::field;
use crate::trap::{self, Fault};

/// How a VMX instruction failed (SDM volume 3, chapter 32).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmxError {
    /// VMfailInvalid: CF, there is no current VMCS to hold an error number.
    Invalid,
    /// VMfailValid: ZF, and the VM-instruction error number.
    Valid(u32),
    /// An exception.
    Fault(Fault),
}

impl fmt::Display for VmxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VmxError::Invalid => f.write_str("VMfailInvalid"),
            VmxError::Valid(error) => write!(f, "VMfailValid({error})"),
            VmxError::Fault(fault) => fault.fmt(f),
        }
    }
}

impl From<Fault> for VmxError {
    fn from(fault: Fault) -> VmxError {
        VmxError::Fault(fault)
    }
}

/// The result of an instruction that left CF and ZF like that.
pub fn outcome(carry: bool, zero: bool) -> Result<(), VmxError> {
    if carry {
        Err(VmxError::Invalid)
    } else if zero {
        Err(VmxError::Valid(
            vmread(field::VM_INSTRUCTION_ERROR).unwrap_or(0) as u32,
        ))
    } else {
        Ok(())
    }
}

macro_rules! memory_operand {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        pub fn $name(address: u64) -> Result<(), VmxError> {
            let (carry, zero): (u8, u8);
            // SAFETY: the operand is a local; what the instruction does to the region at the address is the
            // processor's business, no Rust object lies there. A fault resumes behind it.
            unsafe {
                asm!(
                    trap::guard!(concat!(stringify!($name), " qword ptr [{operand}]")),
                    "setc {carry}",
                    "setz {zero}",
                    guard = sym trap::GUARD,
                    scratch = out(reg) _,
                    operand = in(reg) &address,
                    carry = out(reg_byte) carry,
                    zero = out(reg_byte) zero,
                );
            }
            trap::guarded(())?;
            outcome(carry != 0, zero != 0)
        }
    };
}

memory_operand! {
    /// VMXON.
    vmxon
}
memory_operand! {
    /// VMCLEAR.
    vmclear
}
memory_operand! {
    /// VMPTRLD.
    vmptrld
}

/// VMXOFF.
pub fn vmxoff() -> Result<(), VmxError> {
    let (carry, zero): (u8, u8);
    // SAFETY: leaves VMX operation, which nothing here relies on for memory safety.
    unsafe {
        asm!(
            trap::guard!("vmxoff"),
            "setc {carry}",
            "setz {zero}",
            guard = sym trap::GUARD,
            scratch = out(reg) _,
            carry = out(reg_byte) carry,
            zero = out(reg_byte) zero,
        );
    }
    trap::guarded(())?;
    outcome(carry != 0, zero != 0)
}

/// VMPTRST.
pub fn vmptrst() -> Result<u64, VmxError> {
    let mut address = 0u64;
    // SAFETY: writes the local only.
    unsafe {
        asm!(
            trap::guard!("vmptrst qword ptr [{operand}]"),
            guard = sym trap::GUARD,
            scratch = out(reg) _,
            operand = in(reg) &mut address,
        );
    }
    Ok(trap::guarded(address)?)
}

/// VMREAD to a register.
pub fn vmread(field: u32) -> Result<u64, VmxError> {
    let (value, carry, zero): (u64, u8, u8);
    // SAFETY: writes registers only.
    unsafe {
        asm!(
            trap::guard!("vmread {value}, {field}"),
            "setc {carry}",
            "setz {zero}",
            guard = sym trap::GUARD,
            scratch = out(reg) _,
            value = inout(reg) 0u64 => value,
            field = in(reg) field as u64,
            carry = out(reg_byte) carry,
            zero = out(reg_byte) zero,
        );
    }
    trap::guarded(())?;
    // The error number is itself read by VMREAD: no endless recursion on its own failure.
    if zero != 0 && field == field::VM_INSTRUCTION_ERROR {
        return Err(VmxError::Valid(0));
    }
    outcome(carry != 0, zero != 0)?;
    Ok(value)
}

/// VMREAD to memory, which need not be Rust's: a table of the payload's.
pub fn vmread_to(field: u32, place: *mut u64) -> Result<(), VmxError> {
    let (carry, zero): (u8, u8);
    // SAFETY: the guard takes a fault; the callers give eight bytes in which no Rust object lies.
    unsafe {
        asm!(
            trap::guard!("vmread qword ptr [{place}], {field}"),
            "setc {carry}",
            "setz {zero}",
            guard = sym trap::GUARD,
            scratch = out(reg) _,
            place = in(reg) place,
            field = in(reg) field as u64,
            carry = out(reg_byte) carry,
            zero = out(reg_byte) zero,
        );
    }
    trap::guarded(())?;
    outcome(carry != 0, zero != 0)
}

/// VMWRITE from a register.
pub fn vmwrite(field: u32, value: u64) -> Result<(), VmxError> {
    let (carry, zero): (u8, u8);
    // SAFETY: changes the current VMCS. Whoever enters a child answers for what it then does.
    unsafe {
        asm!(
            trap::guard!("vmwrite {field}, {value}"),
            "setc {carry}",
            "setz {zero}",
            guard = sym trap::GUARD,
            scratch = out(reg) _,
            value = in(reg) value,
            field = in(reg) field as u64,
            carry = out(reg_byte) carry,
            zero = out(reg_byte) zero,
        );
    }
    trap::guarded(())?;
    outcome(carry != 0, zero != 0)
}

macro_rules! invalidation {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        pub fn $name(kind: u64, descriptor: [u64; 2]) -> Result<(), VmxError> {
            let (carry, zero): (u8, u8);
            // SAFETY: reads the local; invalidating cached translations is always allowed.
            unsafe {
                asm!(
                    trap::guard!(concat!(stringify!($name), " {kind}, xmmword ptr [{operand}]")),
                    "setc {carry}",
                    "setz {zero}",
                    guard = sym trap::GUARD,
                    scratch = out(reg) _,
                    kind = in(reg) kind,
                    operand = in(reg) &descriptor,
                    carry = out(reg_byte) carry,
                    zero = out(reg_byte) zero,
                );
            }
            trap::guarded(())?;
            outcome(carry != 0, zero != 0)
        }
    };
}

invalidation! {
    /// INVEPT.
    invept
}
invalidation! {
    /// INVVPID.
    invvpid
}

/// The same instructions without guard or check, for measured loops.
pub mod raw {
    use super::*;

    /// VMREAD.
    ///
    /// # Safety
    /// In VMX root operation with a current VMCS.
    #[inline(always)]
    pub unsafe fn vmread(field: u32) -> u64 {
        let value;
        // SAFETY: by the caller's promise it does not fault.
        unsafe {
            asm!("vmread {}, {}", out(reg) value, in(reg) field as u64, options(nostack));
        }
        value
    }

    /// VMWRITE.
    ///
    /// # Safety
    /// As [`vmread`].
    #[inline(always)]
    pub unsafe fn vmwrite(field: u32, value: u64) {
        // SAFETY: by the caller's promise it does not fault.
        unsafe { asm!("vmwrite {}, {}", in(reg) field as u64, in(reg) value, options(nostack)) };
    }

    /// VMPTRLD.
    ///
    /// # Safety
    /// In VMX root operation.
    #[inline(always)]
    pub unsafe fn vmptrld(address: &u64) {
        // SAFETY: by the caller's promise it does not fault.
        unsafe { asm!("vmptrld qword ptr [{}]", in(reg) address, options(nostack)) };
    }

    /// VMCLEAR.
    ///
    /// # Safety
    /// In VMX root operation.
    #[inline(always)]
    pub unsafe fn vmclear(address: &u64) {
        // SAFETY: by the caller's promise it does not fault.
        unsafe { asm!("vmclear qword ptr [{}]", in(reg) address, options(nostack)) };
    }
}
