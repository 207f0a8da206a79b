/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What bindgen reads: KVM's private headers of the kernel that the module is built for, and the
 * few kernel interfaces that the kernel crate does not wrap yet. The layouts that come out are
 * compared with the running kernel's BTF before anything is hooked (src/layout.rs).
 */
#include <linux/kvm_host.h>
#include <linux/delay.h>
#include <linux/fs.h>
#include <linux/ftrace.h>
#include <linux/gfp.h>
#include <linux/kobject.h>
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/notifier.h>
#include <linux/pid.h>
#include <linux/pid_namespace.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/srcu.h>
#include <linux/sysfs.h>
#include "vmx/vmx.h"
#include "vmx/nested.h"
#include "vmx/vmcs12.h"
#include "mmu.h"
#include "mmu/mmu_internal.h"

#include "hook_abi.h"

/* Macros that bindgen cannot work out. */
enum {
	MTK_GFP_ZEROED = GFP_KERNEL_ACCOUNT | __GFP_ZERO | __GFP_NOWARN,
	MTK_FEATURE_SHSTK = X86_FEATURE_SHSTK,
	MTK_FEATURE_IBT = X86_FEATURE_IBT,
	MTK_HOST_OWNED_DEBUGCTL = VMX_HOST_OWNED_DEBUGCTL_BITS,
	MTK_NR_URET_MSRS = MAX_NR_USER_RETURN_MSRS,
	MTK_MMU_ROOTS_ALL = KVM_MMU_ROOTS_ALL,
	MTK_MMU_CR0_ROLE_BITS = KVM_MMU_CR0_ROLE_BITS,
	MTK_MMU_CR4_ROLE_BITS = KVM_MMU_CR4_ROLE_BITS,
	MTK_VMCS12_REVISION = VMCS12_REVISION,
};

/* Bits of kvm_vcpu_arch.regs_avail. */
enum {
	MTK_REG_RSP = VCPU_REGS_RSP,
	MTK_REG_RIP = VCPU_REG_RIP,
	MTK_REG_CR0 = VCPU_REG_CR0,
	MTK_REG_CR3 = VCPU_REG_CR3,
	MTK_REG_CR4 = VCPU_REG_CR4,
	MTK_REG_RFLAGS = VCPU_REG_RFLAGS,
	MTK_REG_SEGMENTS = VCPU_REG_SEGMENTS,
};
