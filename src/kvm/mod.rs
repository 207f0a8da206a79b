// SPDX-License-Identifier: GPL-2.0
//! Safe views of KVM's structures, for use inside a hook's handler.

#[cfg(MTK_GVA_WALK)]
pub(crate) mod absent;
mod batch;
mod controls;
pub(crate) mod efer;
#[cfg(MTK_GVA_WALK)]
pub(crate) mod entry;
pub(crate) mod ept02;
pub(crate) mod ept12;
pub(crate) mod families;
pub(crate) mod fast_exit;
pub(crate) mod fields;
pub(crate) mod guest_memory;
pub(crate) mod host_pages;
pub(crate) mod host_state;
mod host_tables;
#[cfg(MTK_GVA_WALK)]
pub(crate) mod inner_loop;
pub(crate) mod lapic;
pub(crate) mod mmu;
mod mmu_lock;
pub(crate) mod nested;
pub(crate) mod region;
#[cfg(MTK_GVA_WALK)]
pub(crate) mod roots;
pub(crate) mod shadow_copy;
pub(crate) mod shadow_mmu;
pub(crate) mod shadow_page;
mod skip;
mod srcu;
pub(crate) mod tdp;
pub(crate) mod thread;
pub(crate) mod vcpu;
pub(crate) mod visit;
pub(crate) mod vmcs02;
pub(crate) mod vmcs12;
pub(crate) mod vmcs12_pages;
pub(crate) mod vmread;
pub(crate) mod vmx;
pub(crate) mod vpids;
pub(crate) mod write_protected;

use crate::layout;
use core::sync::atomic::{AtomicBool, Ordering};

static ON_HYPERVISOR: AtomicBool = AtomicBool::new(false);
static USES_EPT: AtomicBool = AtomicBool::new(false);
static UNRESTRICTED: AtomicBool = AtomicBool::new(false);

/// Finds out what does not change while kvm_intel is loaded. Reads a file.
pub(crate) fn prepare() {
    // SAFETY: Every 64-bit processor has leaf 1.
    let leaf = unsafe { core::arch::x86_64::__cpuid(1) };
    ON_HYPERVISOR.store(leaf.ecx >> 31 != 0, Ordering::Relaxed);
    USES_EPT.store(layout::module_flag("kvm_intel", "ept"), Ordering::Relaxed);
    UNRESTRICTED.store(
        layout::module_flag("kvm_intel", "unrestricted_guest"),
        Ordering::Relaxed,
    );
}

/// Whether kvm_intel was loaded with EPT on.
pub(crate) fn uses_ept() -> bool {
    USES_EPT.load(Ordering::Relaxed)
}

/// Whether kvm_intel runs guests as unrestricted ones.
#[inline(always)]
pub(crate) fn has_unrestricted_guest() -> bool {
    UNRESTRICTED.load(Ordering::Relaxed)
}

/// Whether this kernel runs on a hypervisor (CPUID.1:ECX bit 31).
#[inline(always)]
pub(crate) fn runs_on_hypervisor() -> bool {
    ON_HYPERVISOR.load(Ordering::Relaxed)
}

pub(crate) use vcpu::{Held, Vcpu};
pub(crate) use vmcs12::Vmcs12;
