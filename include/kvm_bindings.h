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
#include <linux/hrtimer.h>
#include <linux/kobject.h>
#include <linux/kprobes.h>
#include <linux/kthread.h>
#include <linux/mm.h>
#include <linux/mm_types.h>
#include <linux/module.h>
#include <linux/notifier.h>
#include <linux/pid.h>
#include <linux/pid_namespace.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/srcu.h>
#include <linux/sysfs.h>
#include <linux/timekeeping.h>
#include <linux/tracepoint.h>
#include <linux/uaccess.h>
#include "vmx/vmx.h"
#include "vmx/nested.h"
#include "vmx/vmcs12.h"
#include "mmu.h"
#include "mmu/mmu_internal.h"
#include "mmu/spte.h"

#include "hook_abi.h"

/* Macros that bindgen cannot work out. */
enum {
	MTK_GFP_ZEROED = GFP_KERNEL_ACCOUNT | __GFP_ZERO | __GFP_NOWARN,
	MTK_FEATURE_SHSTK = X86_FEATURE_SHSTK,
	MTK_FEATURE_IBT = X86_FEATURE_IBT,
	MTK_HOST_OWNED_DEBUGCTL = VMX_HOST_OWNED_DEBUGCTL_BITS,
	MTK_MSR_DEBUGCTL = MSR_IA32_DEBUGCTLMSR,
	MTK_NR_URET_MSRS = MAX_NR_USER_RETURN_MSRS,
	MTK_MMU_ROOTS_ALL = KVM_MMU_ROOTS_ALL,
	MTK_POSSIBLE_CR4_GUEST_BITS = KVM_POSSIBLE_CR4_GUEST_BITS,
	MTK_MMU_CR0_ROLE_BITS = KVM_MMU_CR0_ROLE_BITS,
	MTK_MMU_CR4_ROLE_BITS = KVM_MMU_CR4_ROLE_BITS,
	MTK_VMCS12_REVISION = VMCS12_REVISION,
	MTK_VMCS12_SIZE = VMCS12_SIZE,
	MTK_FOLL_WRITE = FOLL_WRITE,
	MTK_PG_RESERVED = PG_reserved,
	MTK_PG_DIRTY = PG_dirty,
	MTK_MAPPING_ANON = FOLIO_MAPPING_ANON,
	MTK_PTE_SPECIAL = _PAGE_SPECIAL,
	MTK_DEFAULT_VM = KVM_X86_DEFAULT_VM,
	MTK_TDX_VM = KVM_X86_TDX_VM,
	/* KVM_REQ_LOAD_MMU_PGD and others, which are statement expressions. */
	MTK_REQ_LOAD_MMU_PGD = KVM_REQUEST_ARCH_BASE + 5,
	MTK_REQ_EVENT = KVM_REQUEST_ARCH_BASE + 6,
	MTK_REQ_TLB_FLUSH_CURRENT = KVM_REQUEST_ARCH_BASE + 26,
	MTK_REQ_TLB_FLUSH_GUEST = KVM_REQUEST_ARCH_BASE + 27,
	MTK_RET_PF_RETRY = RET_PF_RETRY,
	MTK_RET_PF_EMULATE = RET_PF_EMULATE,
	MTK_RET_PF_FIXED = RET_PF_FIXED,
	MTK_RET_PF_SPURIOUS = RET_PF_SPURIOUS,
	MTK_RET_PF_WRITE_PROTECTED = RET_PF_WRITE_PROTECTED,
	MTK_EX_TYPE_DEFAULT = EX_TYPE_DEFAULT,
	MTK_FASTPATH_NONE = EXIT_FASTPATH_NONE,
	MTK_FASTPATH_REENTER = EXIT_FASTPATH_REENTER_GUEST,
	MTK_FASTPATH_HANDLED = EXIT_FASTPATH_EXIT_HANDLED,
	MTK_FASTPATH_USERSPACE = EXIT_FASTPATH_EXIT_USERSPACE,
	MTK_GUEST_MODE_WORK = XFER_TO_GUEST_MODE_WORK,
	MTK_IN_GUEST_MODE = IN_GUEST_MODE,
	MTK_RUN_FORCE_IMMEDIATE_EXIT = KVM_RUN_FORCE_IMMEDIATE_EXIT,
	MTK_ACC_READ = ACC_READ_MASK,
	MTK_ACC_WRITE = ACC_WRITE_MASK,
	MTK_ACC_EXEC = ACC_EXEC_MASK,
	MTK_ACC_USER_EXEC = ACC_USER_EXEC_MASK,
};

/* What EPT02 and other shadow page tables are made of. */
enum {
	MTK_SPTE_NONPRESENT = SHADOW_NONPRESENT_VALUE,
	MTK_SPTE_PRESENT = SPTE_MMU_PRESENT_MASK,
	MTK_SPTE_HUGE = PT_PAGE_SIZE_MASK,
	MTK_MMU_HASH = KVM_NUM_MMU_PAGES,
	MTK_MEMSLOT_INVALID = KVM_MEMSLOT_INVALID,
	MTK_USER_MEM_SLOTS = KVM_USER_MEM_SLOTS,
};

/* Why an entry that KVM makes for a guest's memory may be written through or not. */
enum mtk_spte_write {
	MTK_SPTE_HOST_WRITABLE = EPT_SPTE_HOST_WRITABLE,
	MTK_SPTE_MMU_WRITABLE = EPT_SPTE_MMU_WRITABLE,
	MTK_SPTE_AD_MASK = SPTE_TDP_AD_MASK,
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
