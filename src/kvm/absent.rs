// SPDX-License-Identifier: GPL-2.0
//! An EPT violation of L2 that is L1's to serve, because EPT12 has nothing there.
//!
//! KVM finds that out by a walk of EPT12, with a look-up of the memory slot at each level. Here the way down to the last level is
//! remembered (`policy::ept_trail`): each entry of it is read again, and if all are what they were, the last one decides.

use super::{
    ept02::PageFault,
    guest_memory::{read_host_u64, GuestMemory, Window},
    vcpu::read,
    vmcs12::field,
    Vcpu,
};
use crate::{
    bindings,
    hook::CallId,
    policy::{
        ept::{absent, Access, EXEC, USER_EXEC},
        ept_trail::{Start, Trail},
    },
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

/// What is remembered of EPT12.
pub(crate) struct Way {
    trail: Trail,
    /// Where L1's memory is, and the state of the slots that this is for.
    slot: (Window, u64),
}

impl Way {
    /// Nothing.
    pub(crate) const NONE: Way = Way {
        trail: Trail::NONE,
        slot: (Window::EMPTY, 0),
    };
}

/// An EPT violation that L1 is to be told of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Absent {
    gpa: u64,
    error_code: u64,
    /// As KVM's walk would make it; its injection takes some bits from the processor's instead.
    qualification: u64,
}

impl Vcpu {
    /// Whether EPT12 has nothing where L2 has faulted; `None` where it has, or KVM has to see for itself. May sleep.
    ///
    /// In the handler of ept_page_fault() on a shadow of EPT12, with KVM's SRCU lock held.
    #[inline]
    pub(crate) fn find_absent(self, way: &mut Way, fault: &PageFault) -> Option<Absent> {
        if fault.error_code & RESERVED != 0 {
            return None;
        }
        let table_rules =
            |level: usize| read!(self, vcpu.arch.ngpa_walk.fmt.rsvd_bits_mask[0][level - 1]);
        let bad = read!(self, vcpu.arch.ngpa_walk.fmt.bad_mt_xwr);
        let memory = self.slots_generation()?;
        let start = Start {
            memory,
            eptp: field!(self.vmcs12()?, ept_pointer),
            rules: [bad, table_rules(2)],
        };
        // is_rsvd_bits_set(), for an entry without bit 7.
        let is_reserved = |entry: u64, level: u32| {
            let executes = if entry & USER_EXEC != 0 { EXEC } else { 0 };
            entry & table_rules(level as usize) != 0 || bad >> ((entry | executes) & 0x3f) & 1 != 0
        };
        let slot = &mut way.slot;
        let place = |gpa| {
            let window = match *slot {
                (window, then) if then == memory => window,
                _ => Window::EMPTY,
            };
            // SAFETY: In a handler of an exit, with the lock held; the window is of these slots.
            let mut guest = unsafe { GuestMemory::with_slot(self, window) };
            let host = guest.host_address(gpa);
            *slot = (guest.slot(), memory);
            host
        };
        let trail = &mut way.trail;
        let entry = trail.entry(start, fault.gpa, is_reserved, place, read_host_u64)?;
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

    /// Tells L1, as ept_page_fault() does. May sleep.
    ///
    /// Must not be called within `state::with`: hooked functions are among those that KVM calls here.
    ///
    /// # Safety
    ///
    /// In the handler of ept_page_fault(), with KVM's SRCU lock held, and L2 has just made this access; KVM's function is there
    /// (`CallId::INJECT_EPT_FAULT`).
    pub(crate) unsafe fn reflect(self, what: &Absent) {
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
        unsafe { CallId::INJECT_EPT_FAULT.call(args) };
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
