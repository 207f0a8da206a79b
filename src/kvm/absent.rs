// SPDX-License-Identifier: GPL-2.0
//! An EPT violation of L2 that is L1's to serve, because EPT12 has nothing there.
//!
//! KVM finds that out by a walk of EPT12 from its root. Where EPT02 has a shadow of the last-level table, the tables above are known: they
//! are as they were when KVM followed them, since it protects them against writes and drops what it made of them when they are
//! written (only last-level tables go out of sync, `mmu_try_to_unsync_pages()`). So only the last entry is read.

use super::{ept02::PageFault, vmcs12::field, Vcpu};
use crate::{
    bindings,
    hook::CallId,
    policy::ept::{absent, Access},
};

/// PFERR_WRITE_MASK, PFERR_USER_MASK, PFERR_FETCH_MASK and PFERR_SS_MASK.
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const FETCH: u64 = 1 << 4;
const SHADOW_STACK: u64 = 1 << 6;
/// PFERR_RSVD_MASK: EPT02 has a mark for MMIO there, or did not fit.
const RESERVED: u64 = 1 << 3;
/// PFERR_GUEST_PAGE_MASK: an access to one of L2's paging structures.
const PAGE_WALK: u64 = 1 << 33;
/// PF_VECTOR.
const VECTOR: u8 = 14;
/// Basic exit reason of an EPT violation.
const EPT_VIOLATION: u64 = 48;

/// An EPT violation that L1 is to be told of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Absent {
    gpa: u64,
    error_code: u64,
    /// As KVM's walk would make it; its injection takes some bits from the processor's instead.
    qualification: u64,
}

impl Vcpu {
    /// Whether EPT12 has nothing where L2 has faulted, as far as that can be told without a walk; `None` where KVM has to see for itself.
    ///
    /// In the handler of ept_page_fault(), with KVM's SRCU lock held.
    #[inline]
    pub(crate) fn find_absent(self, fault: &PageFault) -> Option<Absent> {
        const ENTRIES: u64 = super::ept02::ENTRIES as u64;
        if fault.error_code & RESERVED != 0 {
            return None;
        }
        let table = self.known_ept12_table(fault.gpa)?;
        let entry = self.read_entry((table << 12) + (fault.gpa >> 12) % ENTRIES * 8)?;
        let access = Access {
            write: fault.error_code & WRITE != 0,
            fetch: fault.error_code & FETCH != 0,
            walks: fault.error_code & PAGE_WALK != 0,
        };
        Some(Absent {
            gpa: fault.gpa,
            error_code: fault.error_code & (WRITE | USER | SHADOW_STACK),
            qualification: absent(entry, access)?,
        })
    }

    /// Tells L1, as ept_page_fault() does. `false` if KVM's function is missing. May sleep.
    ///
    /// Must not be called within `state::with`: hooked functions are among those that KVM calls here.
    ///
    /// # Safety
    ///
    /// In the handler of ept_page_fault(), with KVM's SRCU lock held, and L2 has just made this access.
    pub(crate) unsafe fn reflect(self, what: &Absent) -> bool {
        let mut exception = bindings::x86_exception {
            vector: VECTOR,
            error_code_valid: true,
            error_code: what.error_code,
            nested_page_fault: true,
            exit_qualification: what.qualification as usize,
            ..Default::default()
        };
        exception.__bindgen_anon_1.address = what.gpa;
        let from_hardware = 1;
        let args = [self.key(), (&raw mut exception) as usize, from_hardware];
        // SAFETY: By this function's contract, as __kvm_inject_emulated_page_fault() calls it where no entry was present; it keeps no pointer.
        unsafe { CallId::INJECT_EPT_FAULT.call(args) }.is_some()
    }

    /// Whether KVM has told L1 just that, once L1 is to run again.
    #[cold]
    pub(crate) fn was_reflected(self, what: &Absent) -> bool {
        // Bits 11:7 are the processor's.
        const MADE_UP: u64 = 0x7f;
        self.vmcs12().is_some_and(|m| {
            field!(m, vm_exit_reason) == EPT_VIOLATION
                && field!(m, guest_physical_address) == what.gpa
                && (field!(m, exit_qualification) ^ what.qualification) & MADE_UP == 0
        })
    }
}
