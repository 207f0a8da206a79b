/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The functions that the livepatch of selftests/livepatch.sh takes over: MTK_PATCHED(X) expands X(module, function) for
 * each, those of one module together. A function of each kind that the module hooks: one that it answers, one that it
 * answers and keeps state for, one that it replaces whole with others inside, and one of kvm.ko.
 */
#ifndef MTK_PATCHED_H
#define MTK_PATCHED_H

#define MTK_PATCHED_KVM_INTEL(X)					\
	X(kvm_intel, nested_vmx_check_host_state)			\
	X(kvm_intel, nested_vmx_check_guest_state)			\
	X(kvm_intel, nested_vmx_enter_non_root_mode)			\
	X(kvm_intel, copy_shadow_to_vmcs12)				\
	X(kvm_intel, nested_sync_vmcs12_to_shadow)

#define MTK_PATCHED_KVM(X)						\
	X(kvm, kvm_init_mmu)

#define MTK_PATCHED(X) MTK_PATCHED_KVM_INTEL(X) MTK_PATCHED_KVM(X)

#ifndef __ASSEMBLY__
/* pass.S */
#define MTK_DECLARE(module, function) void mtk_lp_##function(void);
MTK_PATCHED(MTK_DECLARE)
#endif

#endif
