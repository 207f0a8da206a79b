// SPDX-License-Identifier: GPL-2.0
//! The layout check: before anything is hooked, the structures that this module was compiled
//! against are compared with the BTF of the running kernel and of the loaded KVM modules.

use crate::{
    bindings,
    hook::{self, CallId, Function, HookId},
    kfile,
    policy::btf::{Blob, Btf},
};
use core::mem::{offset_of, size_of};
use kernel::{c_str, prelude::*, str::CStr, str::CString};

struct Expected {
    name: &'static str,
    size: usize,
    members: &'static [(&'static str, usize)],
}

macro_rules! expect {
    ($(
        $(#[$meta:meta])? $name:ident { $($(#[$member_meta:meta])? $member:ident),* $(,)? }
    )*) => {
        [$($(#[$meta])? Expected {
            name: stringify!($name),
            size: size_of::<bindings::$name>(),
            members: &[$(
                $(#[$member_meta])? (stringify!($member), offset_of!(bindings::$name, $member))
            ),*],
        }),*]
    };
}

/// Every structure that the module reads or writes, with the members that it touches.
const EXPECTED: &[Expected] = &expect! {
    vcpu_vmx {
        vcpu, vt, rflags, vmcs01, loaded_vmcs, rmode, segment_cache, nested, guest_uret_msrs,
        guest_uret_msrs_loaded,
        msr_autoload, msr_autostore, vpid, fail, idt_vectoring_info,
    }
    vmx_uret_msr { load_into_hardware }
    vmx_msrs { nr }
    vcpu_vt { pi_desc, exit_reason, emulation_required }
    nested_vmx {
        current_vmptr, cached_vmcs12, need_vmcs12_to_shadow_sync, dirty_vmcs12,
        need_sync_vmcs02_to_vmcs12_rare, vmcs02, msrs, vmxon, vmxon_ptr, posted_intr_nv,
        cached_shadow_vmcs12, shadow_vmcs12_cache, apic_access_page_map, virtual_apic_map, pi_desc_map, pi_desc,
        force_msr_bitmap_recalc, vpid02, smm,
        #[cfg(MTK_GVA_WALK)] vmcs02_initialized, #[cfg(MTK_GVA_WALK)] pi_pending,
        #[cfg(MTK_GVA_WALK)] preemption_timer, #[cfg(MTK_GVA_WALK)] preemption_timer_deadline,
        #[cfg(MTK_GVA_WALK)] has_preemption_timer_deadline, #[cfg(MTK_GVA_WALK)] preemption_timer_expired,
        #[cfg(MTK_GVA_WALK)] pre_vmenter_cr3, #[cfg(MTK_GVA_WALK)] pre_vmenter_debugctl,
        #[cfg(MTK_GVA_WALK)] pre_vmenter_bndcfgs, #[cfg(MTK_GVA_WALK)] last_vpid,
        #[cfg(MTK_GVA_WALK)] tsc_autostore_slot,
    }
    nested_vmx_msrs { misc_low, secondary_ctls_high, vpid_caps }
    loaded_vmcs { vmcs, shadow_vmcs, cpu, launched, controls_shadow, msr_bitmap, nmi_known_unmasked, soft_vnmi_blocked, host_state }
    vmcs_host_state { cr4 }
    vmcs_controls_shadow { vm_entry, vm_exit, pin, exec, secondary_exec }
    vmcs12 {
        io_bitmap_a, vmcs_link_pointer, cr0_guest_host_mask, guest_cr0, host_cr0,
        pin_based_vm_exec_control, secondary_vm_exec_control, guest_activity_state, virtual_processor_id, host_tr_selector,
        guest_pml_index,
    }
    kvm_vcpu { kvm, arch, run, mode, guest_debug, wants_to_run, requests, stat }
    kvm_vcpu_stat { exits, guest_mode }
    kvm_vcpu_arch {
        regs, regs_avail, cr0, cr4, efer, hflags, mmu, guest_mmu, nested_run_pending,
        reserved_gpa_bits, mmu_pte_list_desc_cache, root_mmu, regs_dirty, rip, cr0_guest_owned_bits, cr3,
        cr4_guest_owned_bits, host_debugctl, cpu_caps, cpuid_dynamic_bits_dirty, pat, pmu,
        switch_db_regs, dr7, apic, apic_base, #[cfg(MTK_GVA_WALK)] gva_walk,
        #[cfg(MTK_GVA_WALK)] ngpa_walk, tsc_offset, tsc_scaling_ratio, l1_tsc_offset, l1_tsc_scaling_ratio,
        virtual_tsc_khz, xfd_no_write_intercept, cr4_guest_rsvd_bits, host_pkru, xcr0, ia32_xss, mmio_gva, apic_attention,
        tsc_always_catchup, #[cfg(CONFIG_KVM_XEN)] xen,
        msr_misc_features_enables,
        #[cfg(not(MTK_GVA_WALK))] nested_mmu, #[cfg(not(MTK_GVA_WALK))] walk_mmu,
    }
    #[cfg(CONFIG_KVM_XEN)]
    kvm_vcpu_xen { vcpu_info_cache }
    gfn_to_pfn_cache { active }
    kvm_pmu { pmc_counting_instructions, pmc_counting_branches }
    kvm_lapic { pending_events, apicv_active, guest_apic_protected, highest_isr_cache, regs }
    pi_desc { pir, rsvd }
    kvm_mmu {
        root_role, root, prev_roots, page_fault, sync_spte, #[cfg(MTK_GVA_WALK)] fmt,
        #[cfg(not(MTK_GVA_WALK))] get_guest_pgd, #[cfg(not(MTK_GVA_WALK))] cpu_role,
        #[cfg(not(MTK_GVA_WALK))] permissions, #[cfg(not(MTK_GVA_WALK))] shadow_zero_check,
    }
    kvm_mmu_root_info { hpa, pgd }
    kvm_mmu_memory_cache { nobjs }
    #[cfg(MTK_GVA_WALK)]
    kvm_pagewalk { cpu_role, fmt }
    #[cfg(MTK_GVA_WALK)]
    kvm_page_format { rsvd_bits_mask, bad_mt_xwr }
    kvm { stat, arch, mm, srcu, memslots, mmu_invalidate_seq, mmu_invalidate_in_progress, online_vcpus }
    kvm_vm_stat { mmu_unsync }
    kvm_memslots { generation }
    gfn_to_hva_cache { generation, gpa, hva, memslot }
    kvm_host_map { pinned_page, page, hva, pfn, gfn, writable }
    kvm_memory_slot { base_gfn, npages, dirty_bitmap, userspace_addr, flags, id, arch }
    kvm_arch_memory_slot { gfn_write_track }
    kvm_arch { disabled_quirks, mmu_valid_gen, mmu_page_hash, vm_type }
    kvm_mmu_page { hash_link, tdp_mmu_page, unsync, role, gfn, spt, shadowed_translation }
    kvm_page_fault { addr, error_code, prefetch, write, present, rsvd, is_private, max_level, req_level, goal_level, gfn, slot, pfn, refcounted_page, map_writable }
    #[cfg(MTK_GVA_WALK)]
    x86_exception { vector, error_code_valid, error_code, nested_page_fault, async_page_fault, exit_qualification }
    page { flags }
    task_struct { thread_info, pagefault_disabled }
    thread_info { flags }
    msr_data { index }
};

/// Why the running kernel is not the one that this module was built for.
pub(crate) enum Mismatch {
    /// A file of BTF could not be read; its path and the error.
    NoBtf(&'static CStr, Error),
    /// The file is not BTF; its path.
    Malformed(&'static CStr),
    /// The kernel has no structure of this name.
    Missing(&'static str),
    /// Structure, its size here, its size there.
    Size(&'static str, usize, usize),
    /// Structure, member, its offset here, its offset there (`None`: no such member).
    Member(&'static str, &'static str, usize, Option<usize>),
    /// KVM's VMCSs are not the processor's: it runs on Hyper-V and has them in memory (`kvm_is_using_evmcs()`).
    Enlightened,
}

impl core::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match *self {
            Mismatch::NoBtf(path, e) => write!(
                f,
                "cannot read {} (error {}); the kernel needs CONFIG_DEBUG_INFO_BTF_MODULES and KVM as modules",
                path.to_str().unwrap_or("?"),
                e.to_errno()
            ),
            Mismatch::Malformed(path) => write!(f, "{} is not BTF", path.to_str().unwrap_or("?")),
            Mismatch::Missing(s) => write!(f, "this kernel has no struct {s}"),
            Mismatch::Size(s, here, there) => write!(
                f,
                "struct {s} has {there} bytes in this kernel and {here} where the module was built; rebuild it for this kernel"
            ),
            Mismatch::Member(s, m, here, Some(there)) => write!(
                f,
                "struct {s}: member {m} is at {there} in this kernel and at {here} where the module was built; rebuild it for this kernel"
            ),
            Mismatch::Member(s, m, _, None) => {
                write!(f, "struct {s}: this kernel has no member {m}; rebuild the module for it")
            }
            Mismatch::Enlightened => f.write_str(
                "KVM uses Hyper-V's enlightened VMCS, which this module cannot read or write; load kvm_intel with enlightened_vmcs=0",
            ),
        }
    }
}

const VMLINUX: &CStr = c_str!("/sys/kernel/btf/vmlinux");
const KVM: &CStr = c_str!("/sys/kernel/btf/kvm");
const KVM_INTEL: &CStr = c_str!("/sys/kernel/btf/kvm_intel");

/// Which hook points have, in the running kernel, the prototype that the table expects.
pub(crate) struct Prototypes {
    hooks: [bool; hook::COUNT],
    calls: [bool; hook::CALLS],
}

impl Prototypes {
    /// Whether the function of this hook point is as expected.
    pub(crate) fn fits(&self, id: HookId) -> bool {
        HookId::all()
            .zip(self.hooks)
            .any(|(other, ok)| other == id && ok)
    }

    /// Whether this function, which is only called, is there and as expected.
    pub(crate) fn can_call(&self, id: CallId) -> bool {
        CallId::all()
            .zip(self.calls)
            .any(|(other, ok)| other == id && ok)
    }
}

/// Compares everything. `fault` is for tests: the structure of that number (from 1) is expected 8
/// bytes larger than it is; 0 for none.
///
/// Process context; reads half a MiB into memory that is freed again, and 6 MiB more (Debian's kernel) where the kernel's own BTF is to be had as a file only.
/// (A guest's pages, once touched, are its hypervisor's to keep.)
pub(crate) fn check(fault: usize) -> Result<Prototypes, Mismatch> {
    // KVM sets it to N where it is not used.
    if module_flag("kvm_intel", "enlightened_vmcs") {
        return Err(Mismatch::Enlightened);
    }
    let load = |path| kfile::read(path).map_err(|e| Mismatch::NoBtf(path, e));
    let in_place = hook::kernel_btf().and_then(Blob::new);
    let read = match in_place {
        Some(_) => KVVec::new(),
        None => load(VMLINUX)?,
    };
    let base = in_place
        .or_else(|| Blob::new(&read))
        .ok_or(Mismatch::Malformed(VMLINUX))?;
    let (kvm, intel) = (load(KVM)?, load(KVM_INTEL)?);
    let kvm = Btf::new(base, Blob::new(&kvm).ok_or(Mismatch::Malformed(KVM))?);
    let intel = Btf::new(
        base,
        Blob::new(&intel).ok_or(Mismatch::Malformed(KVM_INTEL))?,
    );

    let name = |number: usize| EXPECTED.get(number).map_or(&b""[..], |e| e.name.as_bytes());
    let mut found = [None; EXPECTED.len()];
    intel.structures(name, &mut found);
    kvm.structures(name, &mut found);
    kvm.kernel_structures(name, &mut found);
    for ((number, want), found) in (1..).zip(EXPECTED).zip(found) {
        let found = found.ok_or(Mismatch::Missing(want.name))?;
        let size = if fault == number {
            want.size + 8
        } else {
            want.size
        };
        if found.size() != size {
            return Err(Mismatch::Size(want.name, size, found.size()));
        }
        for &(member, offset) in want.members {
            let there = found.offset_of(member.as_bytes());
            if there != Some(offset) {
                return Err(Mismatch::Member(want.name, member, offset, there));
            }
        }
    }

    let mut prototypes = Prototypes {
        hooks: [false; hook::COUNT],
        calls: [false; hook::CALLS],
    };
    let mut functions: [Option<Function>; hook::COUNT + hook::CALLS] =
        [None; hook::COUNT + hook::CALLS];
    let all = HookId::all().map(HookId::function);
    let all = Iterator::chain(all, CallId::all().map(CallId::function));
    for (slot, function) in functions.iter_mut().zip(all) {
        *slot = Some(function);
    }
    for (module, btf) in [(c"kvm", &kvm), (c"kvm_intel", &intel)] {
        let mut args = [None; hook::COUNT + hook::CALLS];
        let name = |number: usize| match functions.get(number) {
            Some(Some(f)) if f.module() == module => f.symbol().to_bytes(),
            _ => b"",
        };
        btf.function_args(name, &mut args);
        let fits = |number: usize| match (functions.get(number), args.get(number)) {
            (Some(Some(f)), Some(Some(args))) => f.module() == module && f.nargs() == *args,
            _ => false,
        };
        for (number, ok) in prototypes.hooks.iter_mut().enumerate() {
            *ok |= fits(number);
        }
        for (number, ok) in prototypes.calls.iter_mut().enumerate() {
            *ok |= fits(hook::COUNT + number);
        }
    }
    for (ok, id) in prototypes.calls.iter_mut().zip(CallId::all()) {
        if *ok {
            *ok = id.resolve();
        } else {
            id.forget();
        }
    }
    Ok(prototypes)
}

/// Whether a boolean parameter of a loaded module is on; one that does not exist is off.
pub(crate) fn module_flag(module: &str, parameter: &str) -> bool {
    let Ok(path) = CString::try_from_fmt(fmt!("/sys/module/{module}/parameters/{parameter}"))
    else {
        return false;
    };
    kfile::read(&path).is_ok_and(|text| text.first() == Some(&b'Y'))
}

/// Whether `kvm_intel` is loaded.
pub(crate) fn kvm_intel_is_loaded() -> bool {
    kfile::read(c_str!("/sys/module/kvm_intel/initstate"))
        .is_ok_and(|text| text.starts_with(b"live"))
}
