// SPDX-License-Identifier: GPL-2.0
//! EPT12, the table that L1 made for L2, as far as KVM may be asked to follow it ahead of an access.

use super::{ept02::PageFault, guest_memory, host_pages::Pages, vcpu::read, Vcpu};
use crate::{
    bindings,
    hook::CallId,
    policy::ept::{self, Step, ADDRESS, EPTP_FLAGS},
};
use core::mem::MaybeUninit;

/// A fault of L2 that KVM has told L1 of, to be asked for again when L1 has resumed L2.
#[derive(Clone, Copy)]
pub(crate) struct Reflected {
    fault: bindings::kvm_page_fault,
    /// Of KVM's tables: it changes when all are dropped, as they are when NX huge pages are switched, by which the fault was made.
    generation: u8,
}

impl Reflected {
    /// # Safety
    ///
    /// `ptr` is the argument of ept_page_fault(), which has just run.
    pub(crate) unsafe fn copy(vcpu: Vcpu, ptr: *const bindings::kvm_page_fault) -> Self {
        Self {
            // SAFETY: By this function's contract; plain data.
            fault: unsafe { ptr.read() },
            generation: vcpu.mmu_generation(),
        }
    }

    /// Has KVM make the entry of EPT02 that the fault wanted, with all tables above it, as it will at the next fault, if there is one in
    /// EPT12 now, the host has its page, and nobody can see it: no flag of EPT12 changes and no log of writes gets a page. Returns what it
    /// has made. `eptp` is L1's. May sleep.
    pub(crate) fn ask_again(&self, vcpu: Vcpu, eptp: u64) -> Option<PageFault> {
        // It wants a root, which is loaded only on the way to the guest if it is another one now.
        if self.generation != vcpu.mmu_generation() || !vcpu.has_root() {
            return None;
        }
        let gfn = vcpu.frame_of(eptp, self.fault.addr, self.fault.write)?;
        if !vcpu.has_plain(gfn) {
            return None;
        }
        let mut fault = bindings::kvm_page_fault {
            prefetch: true,
            ..self.fault
        };
        let args = [vcpu.key(), (&raw mut fault) as usize];
        // SAFETY: As KVM calls it for the fault itself, on the vCPU's thread; for a prefetch it injects nothing. Its handler leaves such a one alone.
        let ret = unsafe { CallId::EPT_PAGE_FAULT.call(args) }? as i32;
        let made = ret == bindings::MTK_RET_PF_FIXED as i32;
        // SAFETY: The function has just run.
        made.then(|| unsafe { PageFault::from_hook(&raw const fault) })
    }
}

impl Vcpu {
    fn mmu_generation(self) -> u8 {
        let kvm = read!(self, vcpu.kvm);
        // SAFETY: A vCPU's VM outlives it. Written under a lock that is not taken here, and one byte.
        unsafe { (&raw const (*kvm).arch.mmu_valid_gen).read_volatile() }
    }

    /// Whether the MMU that is in use has a root (`VALID_PAGE()`).
    fn has_root(self) -> bool {
        let mmu = read!(self, vcpu.arch.mmu);
        // SAFETY: It points to one of the vCPU's own.
        unsafe { (&raw const (*mmu).root.hpa).read() != u64::MAX }
    }

    /// Frame of L1's memory that EPT12 has for an address of L2, where a walk for such an access sets no flag.
    fn frame_of(self, eptp: u64, gpa: u64, write: bool) -> Option<u64> {
        // Bits 5:3 are the number of levels, less one.
        let levels = (eptp >> 3 & 7) as u32 + 1;
        if eptp & EPTP_FLAGS == 0 || !(4..=5).contains(&levels) {
            return None;
        }
        let mut table = eptp & ADDRESS;
        for level in (1..=levels).rev() {
            let shift = 12 + 9 * (level - 1);
            let entry = self.read_entry(table + (gpa >> shift & 511) * 8)?;
            match ept::step(entry, level, write)? {
                Step::Table(next) => table = next,
                Step::Page(base) => {
                    let within = gpa & ((1 << shift) - 1);
                    return Some((base & !((1 << shift) - 1) | within) >> 12);
                }
            }
        }
        None
    }

    fn read_entry(self, gpa: u64) -> Option<u64> {
        let mut entry = [MaybeUninit::uninit()];
        self.read_entries(gpa, &mut entry)?.first().copied()
    }

    /// Reads as many entries of a table of EPT12 as there is room for, from an address of L1 on, without sleeping; `None` if
    /// they cannot be read now, or are not all in one page.
    #[inline(always)]
    pub(super) fn read_entries(self, gpa: u64, to: &mut [MaybeUninit<u64>]) -> Option<&[u64]> {
        const PAGE: u64 = guest_memory::PAGE as u64;
        if gpa % 8 != 0 || gpa % PAGE + to.len() as u64 * 8 > PAGE {
            return None;
        }
        let args = [
            self.key(),
            gpa as usize,
            to.as_mut_ptr() as usize,
            core::mem::size_of_val(to),
        ];
        // SAFETY: As KVM's ept_gpte_changed() calls it; there is room for as much, and the page is not left.
        let ret = unsafe { CallId::READ_GUEST_ATOMIC.call(args) }?;
        if ret as i32 != 0 {
            return None;
        }
        // SAFETY: 0 says that all were written, and any value is one.
        Some(unsafe { core::slice::from_raw_parts(to.as_ptr().cast::<u64>(), to.len()) })
    }

    /// Whether the host has a page of L1's memory, for writing, in an ordinary slot whose writes nobody logs.
    fn has_plain(self, gfn: u64) -> bool {
        // SAFETY: As KVM itself calls it, under its SRCU lock, which keeps the slot alive.
        let slot = unsafe {
            CallId::GFN_TO_MEMSLOT
                .call([self.key(), gfn as usize])
                .and_then(|slot| (slot as *const bindings::kvm_memory_slot).as_ref())
        };
        let private = |id: i64| id >= bindings::MTK_USER_MEM_SLOTS as i64;
        let Some(slot) = slot.filter(|slot| slot.flags == 0 && !private(slot.id.into())) else {
            return false;
        };
        let offset = gfn.wrapping_sub(slot.base_gfn);
        let address = slot.userspace_addr.wrapping_add((offset as usize) << 12);
        Pages::look_up(address, 1).count() == 1
    }
}
