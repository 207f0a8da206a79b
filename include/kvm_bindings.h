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
#include <linux/kobject.h>
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/notifier.h>
#include <linux/rcupdate.h>
#include <linux/sysfs.h>
#include "vmx/vmx.h"
#include "vmx/nested.h"
#include "vmx/vmcs12.h"
#include "mmu.h"
#include "mmu/mmu_internal.h"

#include <linux/version.h>
#include "hook_abi.h"

/* 7.3 dropped the EX from the names of the lazily read registers. */
enum {
#if LINUX_VERSION_CODE >= KERNEL_VERSION(7, 3, 0)
	MTK_REG_RFLAGS = VCPU_REG_RFLAGS,
	MTK_REG_SEGMENTS = VCPU_REG_SEGMENTS,
#else
	MTK_REG_RFLAGS = VCPU_EXREG_RFLAGS,
	MTK_REG_SEGMENTS = VCPU_EXREG_SEGMENTS,
#endif
};
