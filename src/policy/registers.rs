// SPDX-License-Identifier: GPL-2.0
//! Bits of control registers, IA32_EFER and RFLAGS (SDM volume 3, 2.2.1, 2.3 and 2.5), and of `hflags`, where KVM has what a vCPU is
//! in. Here and nowhere else, as wide as the VMCS has the registers.

/// CR0.PE: protected mode.
pub const CR0_PE: u64 = 1 << 0;
/// CR0.WP: supervisor writes heed read-only pages.
pub const CR0_WP: u64 = 1 << 16;
/// CR0.PG: paging.
pub const CR0_PG: u64 = 1 << 31;

/// CR4.PSE: 4-MiB pages in 32-bit paging; KVM's role has it in every mode.
pub const CR4_PSE: u64 = 1 << 4;
/// CR4.PAE.
pub const CR4_PAE: u64 = 1 << 5;
/// CR4.UMIP: no SGDT and the like for users.
pub const CR4_UMIP: u64 = 1 << 11;
/// CR4.LA57: five levels, linear addresses of 57 bits.
pub const CR4_LA57: u64 = 1 << 12;
/// CR4.OSXSAVE.
pub const CR4_OSXSAVE: u64 = 1 << 18;
/// CR4.SMEP.
pub const CR4_SMEP: u64 = 1 << 20;
/// CR4.SMAP.
pub const CR4_SMAP: u64 = 1 << 21;
/// CR4.PKE.
pub const CR4_PKE: u64 = 1 << 22;
/// CR4.LAM_SUP: bits 62:48 of a supervisor's linear addresses may be tags.
pub const CR4_LAM_SUP: u64 = 1 << 28;
/// The bits of CR4 that CPUID shows.
pub const CR4_IN_CPUID: u64 = CR4_OSXSAVE | CR4_PKE;

/// IA32_EFER.LME: 64-bit mode as soon as paging is on.
pub const EFER_LME: u64 = 1 << 8;
/// IA32_EFER.LMA: 64-bit mode, and its paging.
pub const EFER_LMA: u64 = 1 << 10;
/// IA32_EFER.NXE: bit 63 of a paging-structure entry is not reserved.
pub const EFER_NX: u64 = 1 << 11;

/// RFLAGS.TF: a trap after each instruction.
pub const RFLAGS_TF: u64 = 1 << 8;
/// RFLAGS.IF: interrupts are on.
pub const RFLAGS_IF: u64 = 1 << 9;
/// RFLAGS.VM: virtual-8086 mode.
pub const RFLAGS_VM: u64 = 1 << 17;

/// KVM's HF_GUEST_MASK: L2 runs.
pub const HF_GUEST: u64 = 1 << 0;
/// KVM's HF_SMM_MASK: the vCPU is in SMM.
pub const HF_SMM: u64 = 1 << 1;

/// What every guest in 64-bit mode has in CR0: PE and PG.
pub const PROTECTED_AND_PAGED: u64 = CR0_PE | CR0_PG;
/// And in IA32_EFER: LME and LMA.
pub const LONG_MODE: u64 = EFER_LME | EFER_LMA;
