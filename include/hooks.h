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
 * nargs   how many arguments it takes (1 to 5). It is compared with the prototype in the running
 *         kernel's BTF before the function is touched.
 *
 * The trampolines (src/hook/trampoline.S) and the engine (src/hook/) expand this same list.
 * Add a line here and its constant in src/hook/mod.rs, and write mtk_on_<id>() in the path that
 * wants it; nothing else.
 */
#define MTK_HOOKS(HOOK)							\
	HOOK(check_controls, kvm_intel, nested_vmx_check_controls, 2)	\
	HOOK(check_host_state, kvm_intel, nested_vmx_check_host_state, 2) \
	HOOK(check_guest_state, kvm_intel, nested_vmx_check_guest_state, 3) \
	HOOK(guest_state_valid, kvm_intel, __vmx_guest_state_valid, 1)	\
	HOOK(free_vcpu, kvm_intel, nested_vmx_free_vcpu, 1)		\
	HOOK(vcpu_ioctl, kvm, kvm_arch_vcpu_ioctl, 3)			\
	HOOK(handle_exit, kvm_intel, vmx_handle_exit, 2)		\
	HOOK(handle_vmread, kvm_intel, handle_vmread, 1)		\
	HOOK(handle_vmwrite, kvm_intel, handle_vmwrite, 1)		\
	HOOK(copy_shadow, kvm_intel, copy_shadow_to_vmcs12, 1)		\
	HOOK(sync_shadow, kvm_intel, nested_sync_vmcs12_to_shadow, 1)	\
	HOOK(handle_vmptrld, kvm_intel, handle_vmptrld, 1)		\
	HOOK(handle_vmclear, kvm_intel, handle_vmclear, 1)		\
	HOOK(free_nested, kvm_intel, free_nested, 1)			\
	HOOK(vcpu_put, kvm, vcpu_put, 1)				\
	HOOK(nested_run, kvm_intel, nested_vmx_run, 2)			\
	HOOK(sync_vmcs02, kvm_intel, sync_vmcs02_to_vmcs12, 2)		\
	HOOK(enter_guest, kvm_intel, vmx_prepare_switch_to_guest, 1)	\
	HOOK(ept_page_fault, kvm, ept_page_fault, 2)			\
	HOOK(tdp_page_fault, kvm, kvm_tdp_page_fault, 2)		\
	HOOK(init_mmu, kvm, kvm_init_mmu, 1)				\
	HOOK(set_efer, kvm_intel, vmx_set_efer, 2)			\
	HOOK(load_host_state, kvm_intel, load_vmcs12_host_state, 2)	\
	HOOK(enter_non_root, kvm_intel, nested_vmx_enter_non_root_mode, 2) \
	HOOK(get_pages, kvm_intel, nested_get_vmcs12_pages, 1)		\
	HOOK(recalc_intercepts, kvm_intel, vmx_recalc_intercepts, 1)	\
	HOOK(set_msr, kvm_intel, vmx_set_msr, 2)			\
	HOOK(vcpu_run, kvm_intel, vmx_vcpu_run, 2)			\
	HOOK(has_interrupt, kvm, kvm_apic_has_interrupt, 1)		\
	HOOK(sync_pir, kvm_intel, vmx_sync_pir_to_irr, 1)		\
	HOOK(read_cached, kvm, kvm_read_guest_cached, 4)		\
	HOOK(write_cached, kvm, kvm_write_guest_cached, 4)		\
	HOOK(read_virt, kvm, kvm_read_guest_virt, 5)			\
	HOOK(flush_guest, kvm_intel, vmx_flush_tlb_guest, 1)		\
	HOOK(new_eptp, kvm_intel, nested_ept_new_eptp, 1)

/*
 * KVM functions that Matryoshka calls: CALL(id, module, symbol, nargs), with the same checks, none to 5
 * arguments, or 7. Each is reached by a return, never by an indirect call (IBT).
 */
#define MTK_CALLS(CALL)							\
	CALL(vcpu_load, kvm, vcpu_load, 1)				\
	CALL(vcpu_put, kvm, vcpu_put, 1)				\
	CALL(wake_up, kvm, kvm_vcpu_wake_up, 1)				\
	CALL(load_vmcs, kvm_intel, vmx_vcpu_load_vmcs, 2)		\
	CALL(sync_rare, kvm_intel, sync_vmcs02_to_vmcs12_rare, 2)	\
	CALL(field_offset, kvm_intel, get_vmcs12_field_offset, 1)	\
	CALL(set_current_vmptr, kvm_intel, set_current_vmptr, 2)	\
	CALL(disable_shadow, kvm_intel, vmx_disable_shadow_vmcs, 1)	\
	CALL(set_rflags, kvm_intel, vmx_set_rflags, 2)			\
	CALL(skip_instruction, kvm, kvm_skip_emulated_instruction, 1)	\
	CALL(free_roots, kvm, kvm_mmu_free_roots, 3)			\
	CALL(gfn_to_memslot, kvm, kvm_vcpu_gfn_to_memslot, 2)		\
	CALL(vm_gfn_to_memslot, kvm, gfn_to_memslot, 2)			\
	CALL(write_guest_page, kvm, kvm_write_guest_page, 5)		\
	CALL(read_guest_atomic, kvm, kvm_vcpu_read_guest_atomic, 4)	\
	CALL(topup_mmu_caches, kvm, mmu_topup_memory_caches, 2)		\
	CALL(prefetch_sptes, kvm, kvm_mmu_prefetch_sptes, 5)		\
	CALL(set_spte, kvm, mmu_set_spte, 7)				\
	CALL(release_dirty, kvm, kvm_release_page_dirty, 1)		\
	CALL(tdp_mmu_map, kvm, kvm_tdp_mmu_map, 2)			\
	CALL(try_to_unsync, kvm, mmu_try_to_unsync_pages, 5)		\
	CALL(ept_page_fault, kvm, ept_page_fault, 2)			\
	CALL(new_pgd, kvm, kvm_mmu_new_pgd, 2)				\
	CALL(unmap, kvm, kvm_vcpu_unmap, 2)				\
	CALL(set_intercept, kvm_intel, vmx_set_intercept_for_msr, 4)	\
	CALL(switch_vmcs, kvm_intel, vmx_switch_vmcs, 2)		\
	CALL(has_interrupt, kvm, kvm_apic_has_interrupt, 1)		\
	CALL(read_l1_tsc, kvm, kvm_read_l1_tsc, 2)			\
	CALL(transition_flush, kvm_intel, nested_vmx_transition_tlb_flush, 3) \
	CALL(allocate_vpid, kvm_intel, allocate_vpid, 0)		\
	CALL(free_vpid, kvm_intel, free_vpid, 1)			\
	CALL(sync_roots, kvm, kvm_mmu_sync_roots, 1)			\
	CALL(sync_shadow, kvm_intel, nested_sync_vmcs12_to_shadow, 1)	\
	CALL(inject_ept_fault, kvm_intel, nested_ept_inject_page_fault, 3) \
	CALL(nested_vmexit, kvm_intel, __nested_vmx_vmexit, 5)		\
	CALL(load_pgd, kvm_intel, vmx_load_mmu_pgd, 3)			\
	CALL(flush_local, kvm, kvm_service_local_tlb_flush_requests, 1)	\
	CALL(enter_guest, kvm_intel, vmx_prepare_switch_to_guest, 1)
