// SPDX-License-Identifier: GPL-2.0
//! Safe views of KVM's structures, for use inside a hook's handler.

pub(crate) mod efer;
pub(crate) mod fields;
pub(crate) mod guest_memory;
pub(crate) mod host_state;
pub(crate) mod mmu;
pub(crate) mod nested;
pub(crate) mod shadow_page;
pub(crate) mod thread;
pub(crate) mod vcpu;
pub(crate) mod vmcs02;
pub(crate) mod vmcs12;
pub(crate) mod vmx;

pub(crate) use vcpu::Vcpu;
pub(crate) use vmcs12::Vmcs12;
