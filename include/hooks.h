/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The one table of hook points: every KVM function that Matryoshka may attach to.
 *
 *   HOOK(id, module, symbol, nargs)
 *
 * id      names the trampoline (mtk_tramp_<id>), the Rust handler (mtk_on_<id>) and the enum
 *         constant (MTK_HOOK_<id>);
 * module  the module whose BTF and symbol table describe the function;
 * symbol  the function's name in the kernel's source. A compiler suffix (.isra.0, .constprop.0)
 *         may have changed its arguments, so only the plain name is accepted;
 * nargs   how many arguments it takes (1 to 3). It is compared with the prototype in the running
 *         kernel's BTF before the function is touched.
 *
 * The trampolines (src/hook/trampoline.S) and the engine (src/hook/) expand this same list.
 * Add a line here and write mtk_on_<id>() in the path that wants it; nothing else.
 */
#define MTK_HOOKS(HOOK)							\
	HOOK(check_controls, kvm_intel, nested_vmx_check_controls, 2)	\
	HOOK(check_host_state, kvm_intel, nested_vmx_check_host_state, 2) \
	HOOK(check_guest_state, kvm_intel, nested_vmx_check_guest_state, 3) \
	HOOK(guest_state_valid, kvm_intel, __vmx_guest_state_valid, 1)	\
	HOOK(free_vcpu, kvm_intel, nested_vmx_free_vcpu, 1)		\
	HOOK(vcpu_ioctl, kvm, kvm_arch_vcpu_ioctl, 3)			\
	HOOK(handle_exit, kvm_intel, vmx_handle_exit, 2)
