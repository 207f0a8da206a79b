// SPDX-License-Identifier: GPL-2.0-or-later
//! What is shown of a vCPU that came to a bad end.

use std::fmt::Write;

use kvm_bindings as kvm;
use kvm_ioctls::VcpuFd;

/// The registers of a vCPU as text, several lines, each ended by a newline.
pub fn registers(vcpu: &VcpuFd) -> String {
    let mut s = String::new();
    // Writing to a String cannot fail.
    if let Ok(r) = vcpu.get_regs() {
        let _ = writeln!(
            s,
            "rip {:016x}  rsp {:016x}  rflags {:08x}",
            r.rip, r.rsp, r.rflags
        );
        let _ = writeln!(
            s,
            "rax {:016x}  rbx {:016x}  rcx {:016x}  rdx {:016x}",
            r.rax, r.rbx, r.rcx, r.rdx
        );
        let _ = writeln!(
            s,
            "rsi {:016x}  rdi {:016x}  rbp {:016x}  r8  {:016x}",
            r.rsi, r.rdi, r.rbp, r.r8
        );
        let _ = writeln!(
            s,
            "r9  {:016x}  r10 {:016x}  r11 {:016x}  r12 {:016x}",
            r.r9, r.r10, r.r11, r.r12
        );
        let _ = writeln!(
            s,
            "r13 {:016x}  r14 {:016x}  r15 {:016x}",
            r.r13, r.r14, r.r15
        );
    }
    if let Ok(r) = vcpu.get_sregs() {
        let _ = writeln!(
            s,
            "cr0 {:x}  cr2 {:x}  cr3 {:x}  cr4 {:x}  efer {:x}",
            r.cr0, r.cr2, r.cr3, r.cr4, r.efer
        );
        let seg = |n: &str, x: &kvm::kvm_segment| {
            format!(
                "{n} {:04x} base {:x} limit {:x} type {:x} l {} db {}",
                x.selector, x.base, x.limit, x.type_, x.l, x.db
            )
        };
        let _ = writeln!(s, "{}  |  {}", seg("cs", &r.cs), seg("ss", &r.ss));
        let _ = writeln!(
            s,
            "gdt {:x}+{:x}  idt {:x}+{:x}  tr {:04x}",
            r.gdt.base, r.gdt.limit, r.idt.base, r.idt.limit, r.tr.selector
        );
    }
    s
}

/// The name of a KVM_INTERNAL_ERROR_* number.
pub fn internal_error(suberror: u32) -> &'static str {
    match suberror {
        kvm::KVM_INTERNAL_ERROR_EMULATION => "KVM could not emulate an instruction",
        kvm::KVM_INTERNAL_ERROR_SIMUL_EX => "a second exception while delivering one",
        kvm::KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit while delivering an event",
        kvm::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "an exit reason KVM does not know",
        _ => "an error KVM has no name for",
    }
}

/// The name of the hardware's reason for a failed VM entry (SDM volume 3C,
/// appendix C; bit 31 of the exit reason is set on all of them).
pub fn entry_failure(reason: u64) -> &'static str {
    match reason & 0xffff {
        33 => "VM-entry failure due to invalid guest state",
        34 => "VM-entry failure due to MSR loading",
        41 => "VM-entry failure due to machine-check event",
        _ => "VM-instruction error or unknown reason",
    }
}
