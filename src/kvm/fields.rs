// SPDX-License-Identifier: GPL-2.0
//! The one table of VMCS fields: encoding (SDM volume 3, appendix B), KVM's name in struct vmcs12,
//! and what kind of field it is to KVM. Everything else about fields is derived from it.

use self::encoding::{GUEST_BNDCFGS, GUEST_PENDING_DBG_EXCEPTIONS};
use crate::bindings;
use core::mem::offset_of;
use kernel::macros::paste;

/// What KVM does with a field of vmcs12, which decides whether L1 may access it unseen.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// Read and written by L1; KVM looks at it when L2 is entered and sets it when L2 exits.
    Plain,
    /// As `Plain`, but what vmcs02 gets does not depend on it.
    Aside,
    /// As `Plain`: a control that KVM changes while L2 runs or when it exits (prepare_vmcs12(), vmcs12_save_pending_event(), sync_vmcs02_to_vmcs12(),
    /// nested_vmx_eptp_switching()), as it does no other.
    Returned,
    /// Guest state that KVM leaves in vmcs02 until L1 asks (`is_vmcs12_ext_field()`). It may be
    /// shadowed if it is fetched on each exit of L2, which only frequent use pays for.
    Late,
    /// Access rights: KVM drops reserved bits on VMWRITE. They may be shadowed where the processor
    /// drops the same.
    AccessRights,
    /// Both of the last two.
    LateAccessRights,
    /// Information about a VM exit (SDM 26.9). It may be shadowed where L1 may write it (bit 29 of
    /// its IA32_VMX_MISC), for then L1 sees no difference.
    ExitInformation,
    /// KVM changes it while L1 runs: accesses must be seen.
    Seen,
}

impl Class {
    /// Whether vmcs12 has the field only after it was fetched from vmcs02.
    pub(crate) const fn is_late(self) -> bool {
        matches!(self, Class::Late | Class::LateAccessRights)
    }

    /// Whether KVM prepares vmcs02 in full after L1 wrote the field to any effect. Exit information
    /// has none, nor has a VPID, of which KVM has its own for L2.
    pub(crate) const fn matters_to_vmcs02(self) -> bool {
        !matches!(self, Class::ExitInformation | Class::Aside)
    }
}

/// A field.
#[derive(Clone, Copy)]
pub(crate) struct Field {
    /// Its encoding, for full access.
    pub(crate) encoding: u16,
    /// Its offset in struct vmcs12, in bytes.
    pub(crate) offset: u16,
    /// What kind of field it is to KVM.
    pub(crate) class: Class,
    /// KVM's name for it.
    pub(crate) name: &'static str,
}

impl Field {
    /// Width in bytes: encoding bits 14:13 (SDM table 26-21). Natural width is 8 here.
    #[inline(always)]
    pub(crate) const fn width(&self) -> usize {
        match self.encoding >> 13 & 3 {
            0 => 2,
            2 => 4,
            _ => 8,
        }
    }

    /// Whether vmcs12 may have another value when L2 has exited than it had when L2 was entered: guest state and
    /// information about the exit (encoding bits 11:10), and a few controls. KVM leaves the others, and all of host state,
    /// as L1 wrote them.
    pub(crate) const fn returns_from_l2(&self) -> bool {
        matches!(self.encoding >> 10 & 3, 1 | 2) || matches!(self.class, Class::Returned)
    }

    /// Whether it belongs to the guest's segments and descriptor tables and KVM leaves it in vmcs02. L1 uses all of these, or none: one
    /// that is a KVM writes them whenever its guest's guest exits to it (load_vmcs12_host_state()).
    pub(crate) const fn is_segment(&self) -> bool {
        self.class.is_late()
            && !matches!(
                self.encoding as u64,
                GUEST_BNDCFGS | GUEST_PENDING_DBG_EXCEPTIONS
            )
    }

    /// Whether the field has a second encoding for its high half.
    pub(crate) const fn has_high(&self) -> bool {
        self.encoding >> 13 & 3 == 1
    }
}

/// Number of a field: its place in [`FIELDS`].
pub(crate) type Number = u8;

macro_rules! fields {
    ($($encoding:literal $name:ident $class:ident;)*) => {
        /// All fields of vmcs12, by encoding.
        pub(crate) static FIELDS: &[Field] = &[$(Field {
            encoding: $encoding,
            offset: offset_of!(bindings::vmcs12, $name) as u16,
            class: Class::$class,
            name: stringify!($name),
        }),*];

        paste! {
            /// The encoding of each field, for full access, by the field's name in capital letters, as KVM writes it.
            #[allow(dead_code, reason = "the table is whole; not all fields are read or written by name")]
            pub(crate) mod encoding {
                $(pub(crate) const [<$name:upper>]: u64 = $encoding;)*
            }
        }

        /// Calls `f` with each field that sync_vmcs02_to_vmcs12_rare() fetches: those that KVM leaves in vmcs02, but for GUEST_BNDCFGS,
        /// which it takes for one of them and keeps in vmcs12 all the time.
        #[inline(always)]
        pub(crate) fn for_each_late(mut f: impl FnMut(&Field)) {
            $(if const { Class::$class.is_late() && $encoding != GUEST_BNDCFGS } {
                f(&Field {
                    encoding: $encoding,
                    offset: offset_of!(bindings::vmcs12, $name) as u16,
                    class: Class::$class,
                    name: stringify!($name),
                });
            })*
        }
    };
}

fields! {
    0x0000 virtual_processor_id Aside;
    0x0002 posted_intr_nv Plain;
    0x0800 guest_es_selector Late;
    0x0802 guest_cs_selector Late;
    0x0804 guest_ss_selector Late;
    0x0806 guest_ds_selector Late;
    0x0808 guest_fs_selector Late;
    0x080a guest_gs_selector Late;
    0x080c guest_ldtr_selector Late;
    0x080e guest_tr_selector Late;
    0x0810 guest_intr_status Plain;
    0x0812 guest_pml_index Plain;
    0x0c00 host_es_selector Plain;
    0x0c02 host_cs_selector Plain;
    0x0c04 host_ss_selector Plain;
    0x0c06 host_ds_selector Plain;
    0x0c08 host_fs_selector Plain;
    0x0c0a host_gs_selector Plain;
    0x0c0c host_tr_selector Plain;
    0x2000 io_bitmap_a Plain;
    0x2002 io_bitmap_b Plain;
    0x2004 msr_bitmap Plain;
    0x2006 vm_exit_msr_store_addr Plain;
    0x2008 vm_exit_msr_load_addr Plain;
    0x200a vm_entry_msr_load_addr Plain;
    0x200e pml_address Plain;
    0x2010 tsc_offset Plain;
    0x2012 virtual_apic_page_addr Plain;
    0x2014 apic_access_addr Plain;
    0x2016 posted_intr_desc_addr Plain;
    0x2018 vm_function_control Plain;
    0x201a ept_pointer Returned;
    0x201c eoi_exit_bitmap0 Plain;
    0x201e eoi_exit_bitmap1 Plain;
    0x2020 eoi_exit_bitmap2 Plain;
    0x2022 eoi_exit_bitmap3 Plain;
    0x2024 eptp_list_address Plain;
    0x2026 vmread_bitmap Plain;
    0x2028 vmwrite_bitmap Plain;
    0x202c xss_exit_bitmap Plain;
    0x202e encls_exiting_bitmap Plain;
    0x2032 tsc_multiplier Plain;
    0x2400 guest_physical_address ExitInformation;
    0x2800 vmcs_link_pointer Plain;
    0x2802 guest_ia32_debugctl Plain;
    0x2804 guest_ia32_pat Plain;
    0x2806 guest_ia32_efer Plain;
    0x2808 guest_ia32_perf_global_ctrl Plain;
    0x280a guest_pdptr0 Plain;
    0x280c guest_pdptr1 Plain;
    0x280e guest_pdptr2 Plain;
    0x2810 guest_pdptr3 Plain;
    0x2812 guest_bndcfgs Late;
    0x2c00 host_ia32_pat Plain;
    0x2c02 host_ia32_efer Plain;
    0x2c04 host_ia32_perf_global_ctrl Plain;
    0x4000 pin_based_vm_exec_control Plain;
    0x4002 cpu_based_vm_exec_control Plain;
    0x4004 exception_bitmap Plain;
    0x4006 page_fault_error_code_mask Plain;
    0x4008 page_fault_error_code_match Plain;
    0x400a cr3_target_count Plain;
    0x400c vm_exit_controls Plain;
    0x400e vm_exit_msr_store_count Plain;
    0x4010 vm_exit_msr_load_count Plain;
    0x4012 vm_entry_controls Returned;
    0x4014 vm_entry_msr_load_count Plain;
    0x4016 vm_entry_intr_info_field Returned;
    0x4018 vm_entry_exception_error_code Plain;
    0x401a vm_entry_instruction_len Returned;
    0x401c tpr_threshold Plain;
    0x401e secondary_vm_exec_control Plain;
    0x4400 vm_instruction_error Seen;
    0x4402 vm_exit_reason ExitInformation;
    0x4404 vm_exit_intr_info ExitInformation;
    0x4406 vm_exit_intr_error_code ExitInformation;
    0x4408 idt_vectoring_info_field ExitInformation;
    0x440a idt_vectoring_error_code ExitInformation;
    0x440c vm_exit_instruction_len ExitInformation;
    0x440e vmx_instruction_info ExitInformation;
    0x4800 guest_es_limit Late;
    0x4802 guest_cs_limit Late;
    0x4804 guest_ss_limit Late;
    0x4806 guest_ds_limit Late;
    0x4808 guest_fs_limit Late;
    0x480a guest_gs_limit Late;
    0x480c guest_ldtr_limit Late;
    0x480e guest_tr_limit Late;
    0x4810 guest_gdtr_limit Late;
    0x4812 guest_idtr_limit Late;
    0x4814 guest_es_ar_bytes LateAccessRights;
    0x4816 guest_cs_ar_bytes AccessRights;
    0x4818 guest_ss_ar_bytes AccessRights;
    0x481a guest_ds_ar_bytes LateAccessRights;
    0x481c guest_fs_ar_bytes LateAccessRights;
    0x481e guest_gs_ar_bytes LateAccessRights;
    0x4820 guest_ldtr_ar_bytes LateAccessRights;
    0x4822 guest_tr_ar_bytes LateAccessRights;
    0x4824 guest_interruptibility_info Plain;
    0x4826 guest_activity_state Plain;
    0x482a guest_sysenter_cs Plain;
    0x482e vmx_preemption_timer_value Plain;
    0x4c00 host_ia32_sysenter_cs Plain;
    0x6000 cr0_guest_host_mask Plain;
    0x6002 cr4_guest_host_mask Plain;
    0x6004 cr0_read_shadow Plain;
    0x6006 cr4_read_shadow Plain;
    0x6400 exit_qualification ExitInformation;
    0x640a guest_linear_address ExitInformation;
    0x6800 guest_cr0 Plain;
    0x6802 guest_cr3 Plain;
    0x6804 guest_cr4 Plain;
    0x6806 guest_es_base Late;
    0x6808 guest_cs_base Late;
    0x680a guest_ss_base Late;
    0x680c guest_ds_base Late;
    0x680e guest_fs_base Late;
    0x6810 guest_gs_base Late;
    0x6812 guest_ldtr_base Late;
    0x6814 guest_tr_base Late;
    0x6816 guest_gdtr_base Late;
    0x6818 guest_idtr_base Late;
    0x681a guest_dr7 Plain;
    0x681c guest_rsp Plain;
    0x681e guest_rip Plain;
    0x6820 guest_rflags Plain;
    0x6822 guest_pending_dbg_exceptions Late;
    0x6824 guest_sysenter_esp Plain;
    0x6826 guest_sysenter_eip Plain;
    0x6828 guest_s_cet Plain;
    0x682a guest_ssp Plain;
    0x682c guest_ssp_tbl Plain;
    0x6c00 host_cr0 Plain;
    0x6c02 host_cr3 Plain;
    0x6c04 host_cr4 Plain;
    0x6c06 host_fs_base Plain;
    0x6c08 host_gs_base Plain;
    0x6c0a host_tr_base Plain;
    0x6c0c host_gdtr_base Plain;
    0x6c0e host_idtr_base Plain;
    0x6c10 host_ia32_sysenter_esp Plain;
    0x6c12 host_ia32_sysenter_eip Plain;
    0x6c14 host_rsp Plain;
    0x6c16 host_rip Plain;
    0x6c18 host_s_cet Plain;
    0x6c1a host_ssp Plain;
    0x6c1c host_ssp_tbl Plain;
}

/// How many fields there are.
pub(crate) const COUNT: usize = FIELDS.len();

const NONE: Number = Number::MAX;

/// Width, type and the low six bits of the index: all that tells one field of ours from another.
const fn hash(encoding: u16) -> usize {
    ((encoding >> 13 & 3) as usize) << 8
        | ((encoding >> 10 & 3) as usize) << 6
        | (encoding >> 1 & 0x3f) as usize
}

static BY_HASH: [Number; 1024] = {
    let mut table = [NONE; 1024];
    let mut n = 0;
    while n < COUNT {
        let at = hash(FIELDS[n].encoding);
        assert!(table[at] == NONE, "two fields with one hash");
        table[at] = n as Number;
        n += 1;
    }
    assert!(COUNT < NONE as usize);
    table
};

/// The field with this encoding (full or high access), as VMREAD and VMWRITE name it; `None` for
/// what vmcs12 does not have.
#[inline]
pub(crate) fn by_encoding(encoding: u64) -> Option<Number> {
    let low = u16::try_from(encoding).ok()?;
    let number = *BY_HASH.get(hash(low))?;
    let field = FIELDS.get(number as usize)?;
    let full = if field.has_high() { low & !1 } else { low };
    (field.encoding == full).then_some(number)
}
