// SPDX-License-Identifier: GPL-2.0
//! Guest-physical memory, through the memory slots of the VM and the address space of its VMM.

use super::{srcu::ReadLock, vcpu::read, Vcpu};
use crate::{bindings, hook::CallId};
use core::{arch::asm, marker::PhantomData, mem::offset_of};

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;

/// Reads guest memory. Remembers the slot that served last.
///
/// # Invariants
///
/// KVM's SRCU lock is held for as long as this lives, by the caller of the hooked function, so that slots
/// stay as they are; the current task has the VMM's address space.
pub(crate) struct GuestMemory {
    vcpu: Vcpu,
    slot: Window,
}

/// An ordinary slot: its first address, its length in bytes and where the VMM has it.
#[derive(Clone, Copy)]
pub(crate) struct Window {
    base: u64,
    len: u64,
    host: u64,
}

impl Window {
    /// No slot.
    pub(crate) const EMPTY: Self = Self {
        base: 0,
        len: 0,
        host: 0,
    };
}

impl Vcpu {
    /// A number that changes before any memory slot does (`kvm_memslots->generation`): while it is the same, an
    /// address is where it was. `None` in SMM, which may have slots of its own.
    ///
    /// KVM's SRCU lock is held.
    #[inline(always)]
    pub(crate) fn slots_generation(self) -> Option<u64> {
        if self.in_smm() {
            return None;
        }
        let kvm = read!(self, vcpu.kvm);
        // SAFETY: A vCPU's VM outlives it; slots that are in force are not freed under the lock.
        unsafe {
            let slots = (&raw const (*kvm).memslots[0])
                .cast::<*const bindings::kvm_memslots>()
                .read_volatile();
            Some((&raw const (*slots).generation).read_volatile())
        }
    }
}

impl GuestMemory {
    /// # Safety
    ///
    /// In a handler of an exit, where KVM holds its SRCU lock and the task is the vCPU's.
    pub(crate) unsafe fn new(vcpu: Vcpu) -> Self {
        // INVARIANT: By this function's contract.
        Self {
            vcpu,
            slot: Window::EMPTY,
        }
    }

    /// As `new`, with a slot that `slot` gave before.
    ///
    /// # Safety
    ///
    /// As for `new`; the memory slots are those that they were then.
    #[inline(always)]
    pub(crate) unsafe fn with_slot(vcpu: Vcpu, slot: Window) -> Self {
        // INVARIANT: By this function's contract.
        Self { vcpu, slot }
    }

    /// The slot that served last.
    #[inline(always)]
    pub(crate) fn slot(&self) -> Window {
        self.slot
    }

    /// Where the VMM has this address; `None` if it is in no ordinary slot.
    #[inline(always)]
    pub(crate) fn host_address(&mut self, gpa: u64) -> Option<u64> {
        let offset = gpa.wrapping_sub(self.slot.base);
        if offset < self.slot.len {
            return Some(self.slot.host.wrapping_add(offset));
        }
        self.find_slot(gpa)
    }

    #[inline(never)]
    fn find_slot(&mut self, gpa: u64) -> Option<u64> {
        let args = [self.vcpu.key(), (gpa >> 12) as usize];
        // SAFETY: As KVM itself calls it, under its SRCU lock.
        let slot = unsafe { CallId::GFN_TO_MEMSLOT.call(args) }?;
        // SAFETY: By the type's invariants a slot that KVM named is alive.
        let slot = unsafe { (slot as *const bindings::kvm_memory_slot).as_ref() }?;
        // Not one that is read-only: stock VMPTRLD refuses a VMCS there (gfn_to_hva_many() wants to write). Nor one of KVM's own, in
        // which stock finds no page table (kvm_is_visible_memslot()).
        let is_ordinary = slot.flags & !bindings::KVM_MEM_LOG_DIRTY_PAGES == 0
            && i64::from(slot.id) < bindings::MTK_USER_MEM_SLOTS as i64;
        if !is_ordinary {
            return None;
        }
        self.slot = Window {
            base: slot.base_gfn << 12,
            len: (slot.npages as u64) << 12,
            host: slot.userspace_addr as u64,
        };
        let offset = gpa.wrapping_sub(self.slot.base);
        (offset < self.slot.len).then(|| self.slot.host.wrapping_add(offset))
    }

    /// Reads eight bytes that do not cross a page. May sleep.
    #[inline(always)]
    pub(crate) fn read_u64(&mut self, gpa: u64) -> Option<u64> {
        read_host_u64(self.host_address(gpa)?)
    }

    /// The page that this address is in, to be read by words.
    #[inline(always)]
    pub(crate) fn page(&mut self, gpa: u64) -> Option<GuestPage<'_>> {
        let host = self.host_address(gpa & !(PAGE as u64 - 1))?;
        Some(GuestPage {
            host,
            _memory: PhantomData,
        })
    }

    /// Reads the page at `gpa`. `false`, with the page half-written, if it cannot be read. May sleep.
    ///
    /// # Safety
    ///
    /// `to` is valid for writes of a page.
    pub(crate) unsafe fn read_page(&mut self, gpa: u64, to: *mut u8) -> bool {
        let Some(address) = self.host_address(gpa) else {
            return false;
        };
        // SAFETY: By this function's contract.
        unsafe { copy_from_host(address, to, PAGE) }
    }
}

/// A page of guest memory.
pub(crate) struct GuestPage<'a> {
    host: u64,
    _memory: PhantomData<&'a mut GuestMemory>,
}

impl GuestPage<'_> {
    /// Reads the word of this number. May sleep.
    #[inline(always)]
    pub(crate) fn read_u64(&self, index: usize) -> Option<u64> {
        read_host_u64(
            self.host
                .wrapping_add((index as u64 * 8) & (PAGE as u64 - 1)),
        )
    }
}

/// Reads eight bytes of the current task's memory, of the VMM's in KVM_RUN. May sleep.
#[inline(always)]
pub(crate) fn read_host_u64(address: u64) -> Option<u64> {
    let (failed, value): (u64, u64);
    // SAFETY: __get_user_8() takes the address in RAX, checks that it is user space's, and returns
    // zero or an error in RAX and the value in RDX; it changes no other register.
    unsafe {
        asm!(
            "call __get_user_8",
            inout("rax") address => failed,
            out("rdx") value,
        );
    }
    (failed == 0).then_some(value)
}

/// Copies bytes from the current task's memory, from the VMM's in KVM_RUN. `false`, with what could not be read zeroed, if there is not all of
/// it. May sleep.
///
/// The kernel crate's way (`UserSlice`) has CONFIG_HARDENED_USERCOPY look up the object that `to` is in on each call, 206 instructions. In C the
/// compiler leaves that out where the number of bytes is a constant, and so does this: here each caller has a page.
///
/// # Safety
///
/// `to` is valid for writes of as many bytes.
#[inline(always)]
pub(crate) unsafe fn copy_from_host(address: u64, to: *mut u8, len: usize) -> bool {
    // SAFETY: By this function's contract; what is not user space's is refused.
    unsafe { bindings::_copy_from_user(to.cast(), address as *const _, len) == 0 }
}

/// The other way round. `false` if some could not be written.
///
/// # Safety
///
/// `from` is valid for reads of as many bytes.
#[inline(always)]
pub(crate) unsafe fn copy_to_host(address: u64, from: *const u8, len: usize) -> bool {
    // SAFETY: By this function's contract; what is not user space's is refused.
    unsafe { bindings::_copy_to_user(address as *mut _, from.cast(), len) == 0 }
}

/// KVM's SRCU lock, held.
pub(crate) struct SrcuGuard(ReadLock);

impl SrcuGuard {
    /// Takes the lock for reading, which KVM itself may hold already.
    pub(crate) fn take(vcpu: Vcpu) -> Self {
        let kvm = read!(vcpu, vcpu.kvm);
        // SAFETY: A vCPU's VM outlives it.
        Self(unsafe { ReadLock::take(kvm) })
    }

    /// `kvm_write_guest_page()`: writes a page of the VM's ordinary memory (not SMRAM) and marks it
    /// dirty. `false`: it could not be written. May sleep.
    ///
    /// # Safety
    ///
    /// `from` is valid for reads of a page, and the current task has the VMM's address space and a vCPU
    /// of the VM loaded.
    pub(crate) unsafe fn write_page(&self, gpa: u64, from: *const u8) -> bool {
        if let Some(address) = self.unlogged_page(gpa) {
            // SAFETY: By this function's contract.
            return unsafe { copy_to_host(address, from, PAGE) };
        }
        // SAFETY: By this function's contract.
        unsafe { self.write(gpa, from, 0, PAGE) }
    }

    /// Where the VMM has this page, if it is in a slot without any flag: writes to it are not logged, so that marking it dirty does nothing.
    #[inline(always)]
    fn unlogged_page(&self, gpa: u64) -> Option<u64> {
        let gfn = gpa >> 12;
        let args = [self.0.kvm() as usize, gfn as usize];
        // SAFETY: As KVM itself calls it, under its SRCU lock.
        let slot = unsafe { CallId::VM_GFN_TO_MEMSLOT.call(args) }?;
        // SAFETY: A slot that KVM named is alive under the lock.
        let slot = unsafe { (slot as *const bindings::kvm_memory_slot).as_ref() }?;
        let offset = gfn.wrapping_sub(slot.base_gfn);
        (slot.flags == 0 && offset < slot.npages as u64)
            .then(|| (slot.userspace_addr as u64).wrapping_add(offset << 12))
    }

    /// The VMCS in this page is clear from now on, as `handle_vmclear()` makes it.
    ///
    /// # Safety
    ///
    /// As for `write_page`.
    pub(crate) unsafe fn clear_launch_state(&self, gpa: u64) -> bool {
        let clear = 0u32;
        let from = core::ptr::from_ref(&clear).cast();
        // SAFETY: By this function's contract.
        unsafe { self.write(gpa, from, offset_of!(bindings::vmcs12, launch_state), 4) }
    }

    /// # Safety
    ///
    /// As for `write_page`, for as many bytes, which fit in the page.
    unsafe fn write(&self, gpa: u64, from: *const u8, offset: usize, len: usize) -> bool {
        let (kvm, gfn) = (self.0.kvm() as usize, (gpa >> 12) as usize);
        // SAFETY: By this function's contract and under SRCU.
        let error =
            unsafe { CallId::WRITE_GUEST_PAGE.call([kvm, gfn, from as usize, offset, len]) };
        error.is_some_and(|error| error as i32 == 0)
    }
}
