// SPDX-License-Identifier: GPL-2.0-or-later
//! Single instructions that Rust has no words for.

use core::arch::asm;

use crate::trap::{self, Fault};

/// CR4.OSXSAVE.
const CR4_OSXSAVE: u64 = 1 << 18;

/// Time-stamp counter.
#[inline(always)]
pub fn rdtsc() -> u64 {
    let (low, high): (u64, u64);
    // SAFETY: reads a counter; allowed at CPL 0.
    unsafe { asm!("rdtsc", out("rax") low, out("rdx") high, options(nostack)) };
    high << 32 | low
}

/// XGETBV of any register number; a machine without the backdoor faults on its numbers.
pub fn xgetbv(number: u32) -> Result<u64, Fault> {
    let (low, high): (u64, u64);
    // SAFETY: a fault resumes at label 2, where both outputs have some value that is then dropped.
    unsafe {
        asm!(
            trap::guard!("xgetbv"),
            guard = sym trap::GUARD,
            scratch = out(reg) _,
            inout("rax") 0u64 => low,
            inout("rdx") 0u64 => high,
            in("ecx") number,
        );
    }
    trap::guarded(high << 32 | low & 0xffff_ffff)
}

/// XGETBV of a number that is known to answer: no guard, so it can stand in a measured loop.
///
/// # Safety
/// [`xgetbv`] must have succeeded on the same number.
#[inline(always)]
pub unsafe fn xgetbv_known(number: u32) -> u64 {
    let (low, high): (u64, u64);
    // SAFETY: does not fault, by the caller's promise.
    unsafe { asm!("xgetbv", out("rax") low, out("rdx") high, in("ecx") number, options(nostack)) };
    high << 32 | low
}

/// CPUID as (EAX, EBX, ECX, EDX).
#[inline(always)]
pub fn cpuid(leaf: u32, subleaf: u32) -> (u32, u32, u32, u32) {
    // SAFETY: every processor with long mode has CPUID.
    let answer = unsafe { core::arch::x86_64::__cpuid_count(leaf, subleaf) };
    (answer.eax, answer.ebx, answer.ecx, answer.edx)
}

/// Physical address width, from CPUID 80000008H.
pub fn physical_bits() -> u32 {
    cpuid(0x8000_0008, 0).0 & 0xff
}

/// Makes XGETBV usable where the processor has it. Without it the backdoor stays unknown, nothing else.
///
/// XCR0 gets every feature there is, as any operating system does: a KVM below switches XCR0 on each
/// exit of a guest whose value differs from its own, which would be in every figure.
pub fn enable_xsave() {
    if cpuid(1, 0).2 & 1 << 26 == 0 {
        return;
    }
    let (low, _, _, high) = cpuid(0xd, 0);
    // SAFETY: CPUID says that the bit and the features may be set; they enable instructions and nothing else.
    unsafe {
        write_cr4(cr4() | CR4_OSXSAVE);
        asm!("xsetbv", in("ecx") 0, in("eax") low, in("edx") high, options(nostack));
    }
}

/// RDMSR.
pub fn rdmsr(msr: u32) -> Result<u64, Fault> {
    let (low, high): (u64, u64);
    // SAFETY: reading an MSR changes no state we depend on; #GP resumes at label 2.
    unsafe {
        asm!(
            trap::guard!("rdmsr"),
            guard = sym trap::GUARD,
            scratch = out(reg) _,
            inout("rax") 0u64 => low,
            inout("rdx") 0u64 => high,
            in("ecx") msr,
        );
    }
    trap::guarded(high << 32 | low & 0xffff_ffff)
}

/// WRMSR.
///
/// # Safety
/// The value must not take away what the payload runs on.
pub unsafe fn wrmsr(msr: u32, value: u64) -> Result<(), Fault> {
    // SAFETY: by the caller's promise; #GP resumes at label 2.
    unsafe {
        asm!(
            trap::guard!("wrmsr"),
            guard = sym trap::GUARD,
            scratch = out(reg) _,
            in("eax") value as u32,
            in("edx") (value >> 32) as u32,
            in("ecx") msr,
        );
    }
    trap::guarded(())
}

/// OUT of 32 bits.
#[inline(always)]
pub fn out32(port: u16, value: u32) {
    // SAFETY: only called with ports of the control device, which touches no memory the compiler knows of
    // without the touch region's owner asking for it.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack)) };
}

/// IN of 32 bits.
#[inline(always)]
pub fn in32(port: u16) -> u32 {
    let value;
    // SAFETY: as `out32`.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack)) };
    value
}

macro_rules! control_register {
    ($read:ident, $name:literal) => {
        #[doc = concat!("Reads ", $name, ".")]
        pub fn $read() -> u64 {
            let value;
            // SAFETY: reading a control register at CPL 0 has no effect.
            unsafe { asm!(concat!("mov {}, ", $name), out(reg) value, options(nostack)) };
            value
        }
    };
}
control_register!(cr0, "cr0");
control_register!(cr2, "cr2");
control_register!(cr3, "cr3");
control_register!(cr4, "cr4");

/// Writes CR0.
///
/// # Safety
/// Protection, paging and SSE must stay on.
pub unsafe fn write_cr0(value: u64) {
    // SAFETY: by the caller's promise.
    unsafe { asm!("mov cr0, {}", in(reg) value, options(nostack)) };
}

/// Writes CR4.
///
/// # Safety
/// PAE and SSE must stay on.
pub unsafe fn write_cr4(value: u64) {
    // SAFETY: by the caller's promise.
    unsafe { asm!("mov cr4, {}", in(reg) value, options(nostack)) };
}

/// Writes CR3.
///
/// # Safety
/// The tables must map everything in use at the same addresses.
pub unsafe fn write_cr3(value: u64) {
    // SAFETY: by the caller's promise.
    unsafe { asm!("mov cr3, {}", in(reg) value, options(nostack)) };
}

/// Makes the debug status register, CR2 and CR8 what they are after a reset.
pub fn reset_debug() {
    // SAFETY: registers that only report, and a priority that nothing here is below: there are no interrupts.
    unsafe {
        asm!("mov dr6, {}", in(reg) 0xffff_0ff0u64, options(nostack));
        asm!("mov cr2, {0}", "mov cr8, {0}", in(reg) 0u64, options(nostack));
    }
}

/// The selectors in ES, SS, DS, FS and GS.
pub fn selectors() -> [u64; 5] {
    let (es, ss, ds, fs, gs): (u64, u64, u64, u64, u64);
    // SAFETY: reads registers.
    unsafe {
        asm!("mov {0:e}, es", "mov {1:e}, ss", "mov {2:e}, ds", "mov {3:e}, fs", "mov {4:e}, gs",
            out(reg) es, out(reg) ss, out(reg) ds, out(reg) fs, out(reg) gs, options(nostack));
    }
    [es, ss, ds, fs, gs]
}

/// DR6.
pub fn dr6() -> u64 {
    let value;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, dr6", out(reg) value, options(nostack)) };
    value
}

/// DR7.
pub fn dr7() -> u64 {
    let value;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, dr7", out(reg) value, options(nostack)) };
    value
}

/// Loads the data selector into FS and GS.
pub fn reset_segments() {
    // SAFETY: the flat data segment; nothing here uses either register.
    unsafe {
        asm!("mov fs, {0:e}", "mov gs, {0:e}", in(reg) trap::DATA as u32, options(nostack));
    }
}
