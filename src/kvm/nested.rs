// SPDX-License-Identifier: GPL-2.0
//! What VMPTRLD and VMCLEAR of L1 read and change in a vCPU.

#[cfg(MTK_GVA_WALK)]
use super::vmcs12::field;
use super::{
    fields::encoding::{
        EXIT_QUALIFICATION, GUEST_CR3, GUEST_RFLAGS, GUEST_RSP, GUEST_SS_AR_BYTES,
        VMX_INSTRUCTION_INFO,
    },
    guest_memory::{read_host_u64, GuestMemory},
    vcpu::read,
    vmx, Vcpu, Vmcs12,
};
use crate::{
    bindings,
    hook::CallId,
    policy::{
        controls::secondary::VMCS_SHADOWING,
        operand::{self, Operand, Start, Trail},
        registers::{CR4_LAM_SUP, EFER_LMA, EFER_NX},
    },
};
use core::mem::size_of;

/// CF, PF, AF, ZF, SF and OF, which VMX instructions clear when they succeed.
const RFLAGS_STATUS: u64 = 0x8d5;

/// The kernel memory that stands for one VMCS of L1: its vmcs12 and the shadow VMCS that goes with it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pages {
    pub(crate) vmcs12: *mut bindings::vmcs12,
    pub(crate) shadow: *mut bindings::vmcs,
}

impl Vcpu {
    /// `vmx->nested.vmxon`: L1 is in VMX operation.
    pub(crate) fn vmxon(self) -> bool {
        read!(self, nested.vmxon)
    }

    /// `vmx->nested.vmxon_ptr`.
    pub(crate) fn vmxon_ptr(self) -> u64 {
        read!(self, nested.vmxon_ptr)
    }

    /// Whether a guest-physical address can be that of a VMCS: `page_address_valid()`.
    pub(crate) fn is_page_address(self, address: u64) -> bool {
        address & 0xfff == 0 && address & read!(self, vcpu.arch.reserved_gpa_bits) == 0
    }

    /// `nested_cpu_has_vmx_shadow_vmcs()`: L1 may use VMCS shadowing.
    pub(crate) fn may_shadow(self) -> bool {
        read!(self, nested.msrs.secondary_ctls_high) & VMCS_SHADOWING != 0
    }

    /// The guest-physical address that the memory operand of L1's VMPTRLD or VMCLEAR holds. `None` if
    /// anything about operand or paging is out of the ordinary: the stock code finds out what.
    ///
    /// May sleep. Must be called in the handler of an exit of L1, with KVM's SRCU lock held.
    pub(crate) fn vmptr_operand(self, memory: &mut GuestMemory, trail: &mut Trail) -> Option<u64> {
        // SAFETY: In a handler of an exit the exited VMCS is current.
        let info = unsafe { vmx::vmread(VMX_INSTRUCTION_INFO) }? as u32;
        let address = self.operand_address(info, size_of::<u64>())?;
        read_host_u64(self.find(address, memory, trail)?)
    }

    /// The linear address of the memory operand, of `len` bytes, of an instruction of L1 that has exited, given the
    /// instruction information. `None` where the stock code must decide.
    #[inline(always)]
    pub(super) fn operand_address(self, info: u32, len: usize) -> Option<u64> {
        // SAFETY: In a handler of an exit the exited VMCS is current, as the instruction information has shown; every
        // processor has these fields.
        let vmread = |field| unsafe { vmx::vmread_basic(field) };
        let operand = Operand::decode(info)?;
        if read!(self, vcpu.arch.cr4) as u64 & CR4_LAM_SUP != 0 {
            return None;
        }
        let register = |number: u8| {
            let rsp = bindings::MTK_REG_RSP;
            if u32::from(number) == rsp && !self.register_is_available(rsp) {
                vmread(GUEST_RSP)
            } else {
                read!(self, vcpu.arch.regs[number as usize & 0xf]) as u64
            }
        };
        operand.address(vmread(EXIT_QUALIFICATION), len as u64, register)
    }

    /// The sixteen bytes at a linear address of L1's, the descriptor of an INVEPT or INVVPID, as two words. `None` if anything
    /// about address or paging is out of the ordinary. The stock code has the address checked already for what depends on
    /// the instruction.
    ///
    /// As for `vmptr_operand`.
    pub(crate) fn descriptor_at(
        self,
        address: u64,
        memory: &mut GuestMemory,
        trail: &mut Trail,
    ) -> Option<[u64; 2]> {
        let plain = read!(self, vcpu.arch.efer) & EFER_LMA != 0
            && operand::is_plain_address(address, size_of::<[u64; 2]>() as u64);
        if !plain {
            return None;
        }
        let place = self.find(address, memory, trail)?;
        Some([read_host_u64(place)?, read_host_u64(place.wrapping_add(8))?])
    }

    /// Where the VMM has what is at a linear address, for a supervisor's read; long mode is on.
    fn find(self, address: u64, memory: &mut GuestMemory, trail: &mut Trail) -> Option<u64> {
        // SAFETY: In a handler of an exit the exited VMCS is current; every processor has these fields.
        let vmread = |field| unsafe { vmx::vmread_basic(field) };
        // With EPT, and only then, the guest's CR3 is in the VMCS.
        let mmu = read!(self, vcpu.arch.mmu);
        // SAFETY: KVM's own pointer to one of the vCPU's MMUs; the role is a union of integers.
        let direct = unsafe { (*mmu).root_role.__bindgen_anon_1.direct() };
        if direct == 0 || self.cr4_la57() || vmread(GUEST_SS_AR_BYTES) & 3 << 5 != 0 {
            return None;
        }
        let mut reserved = read!(self, vcpu.arch.reserved_gpa_bits);
        if read!(self, vcpu.arch.efer) & EFER_NX == 0 {
            reserved |= operand::EXECUTE_DISABLE;
        } else {
            reserved &= !operand::EXECUTE_DISABLE;
        }
        let start = Start {
            memory: self.slots_generation()?,
            cr3: vmread(GUEST_CR3),
            reserved,
        };
        let place = |address| memory.host_address(address);
        trail.walk(start, address, place, read_host_u64)
    }

    /// The pages that KVM uses for the current VMCS, or would for the next; `None` outside VMX operation
    /// and without VMCS shadowing.
    pub(crate) fn pages(self) -> Option<Pages> {
        let pages = Pages {
            vmcs12: read!(self, nested.cached_vmcs12),
            shadow: read!(self, vmcs01.shadow_vmcs),
        };
        (!pages.vmcs12.is_null() && !pages.shadow.is_null()).then_some(pages)
    }

    /// Makes KVM use other pages.
    ///
    /// # Safety
    ///
    /// There is no current VMCS, both shadow VMCSs are clear. The pages come from the
    /// allocators that KVM frees them with, and become KVM's; those that it had become the caller's.
    pub(crate) unsafe fn set_pages(self, pages: Pages) {
        // SAFETY: By the invariants of `Vcpu` and this function's contract.
        unsafe {
            let vmx = self.raw();
            (&raw mut (*vmx).nested.cached_vmcs12).write(pages.vmcs12);
            (&raw mut (*vmx).vmcs01.shadow_vmcs).write(pages.shadow);
        }
    }

    /// `set_current_vmptr()`. `fresh`: the shadow VMCS has what L1 wrote last, so that nothing has to be
    /// copied to it.
    ///
    /// # Safety
    ///
    /// vmcs01 is current, and KVM's pages are those of the VMCS at `vmptr`.
    pub(crate) unsafe fn set_current_vmptr(self, vmptr: u64, fresh: bool) {
        // SAFETY: By this function's contract, as in handle_vmptrld().
        unsafe { CallId::SET_CURRENT_VMPTR.call([self.key(), vmptr as usize]) };
        self.set_vmcs12_newer(!fresh);
    }

    /// What `nested_release_vmcs12()` does beside copying: afterwards there is no current VMCS.
    /// `disable`: turns VMCS shadowing off as well, which is not needed if another VMCS follows at once.
    ///
    /// # Safety
    ///
    /// vmcs01 is current.
    pub(crate) unsafe fn drop_current_vmptr(self, disable: bool) {
        // SAFETY: By this function's contract, as in nested_release_vmcs12().
        unsafe {
            if disable {
                CallId::DISABLE_SHADOW.call([self.key()]);
            }
            (&raw mut (*self.raw()).nested.posted_intr_nv).write(u16::MAX);
            (&raw mut (*self.raw()).nested.current_vmptr).write(u64::MAX);
        }
    }

    /// Whether there are roots for L1's EPT.
    #[inline(always)]
    pub(crate) fn has_guest_mmu_roots(self) -> bool {
        // What kvm_mmu_free_roots() looks at before it does any work (VALID_PAGE()).
        let previous = read!(self, vcpu.arch.guest_mmu.prev_roots);
        read!(self, vcpu.arch.guest_mmu.root.hpa) != u64::MAX
            || previous.iter().any(|root| root.hpa != u64::MAX)
    }

    /// Drops the roots of the guest's MMU, as `nested_release_vmcs12()` does. May sleep.
    pub(crate) fn free_guest_mmu_roots(self) {
        if self.has_guest_mmu_roots() {
            self.free_roots(bindings::MTK_MMU_ROOTS_ALL);
        }
    }

    /// Drops those roots of the guest's MMU that are not in use and at such a physical address. May sleep.
    pub(crate) fn free_previous_roots(self, which: impl Fn(u64) -> bool) {
        let previous = read!(self, vcpu.arch.guest_mmu.prev_roots);
        // KVM_MMU_ROOT_PREVIOUS(i) is bit i + 1.
        let bits = (1..).zip(&previous).fold(0, |bits, (bit, root)| {
            let goes = root.hpa != u64::MAX && which(root.hpa);
            bits | u32::from(goes) << bit
        });
        if bits != 0 {
            self.free_roots(bits);
        }
    }

    /// `kvm_mmu_free_roots()` of the guest's MMU.
    fn free_roots(self, roots: u32) {
        let kvm = read!(self, vcpu.kvm);
        // SAFETY: Only an address is taken; the arguments are KVM's own.
        unsafe {
            let mmu = &raw mut (*self.raw()).vcpu.arch.guest_mmu;
            CallId::FREE_ROOTS.call([kvm as usize, mmu as usize, roots as usize]);
        }
    }

    /// `nested_vmx_succeed()`: VMsucceed (SDM volume 3, 32.2), and on to the next instruction. Returns what
    /// the handler of the exit has to return; `None` if KVM's functions are missing.
    ///
    /// Must not be called within `state::with`: a hooked function is among those that KVM calls here.
    #[inline(always)]
    pub(crate) fn vm_succeed(self) -> Option<usize> {
        // The operand was one of 64-bit mode, so there is no emulation of real mode.
        let rflags = self.rflags()?;
        if rflags & RFLAGS_STATUS != 0 {
            self.set_rflags(rflags & !RFLAGS_STATUS)?;
        }
        if self.skip_plainly(rflags) {
            return Some(1);
        }
        // SAFETY: As above.
        unsafe { CallId::SKIP_INSTRUCTION.call([self.key()]) }
            .map(|handled| handled as u32 as usize)
    }
}

impl Vcpu {
    /// vmx_set_rflags() for L1, of a value that differs in no bit but RFLAGS_STATUS; `None` if KVM's function is missing.
    ///
    /// In a handler of an exit of L1.
    #[inline(always)]
    fn set_rflags(self, rflags: u64) -> Option<()> {
        if !super::has_unrestricted_guest() {
            // SAFETY: As in KVM's own function.
            return unsafe { CallId::SET_RFLAGS.call([self.key(), rflags as usize]) }.map(|_| ());
        }
        // SAFETY: By the invariants of `Vcpu` vmcs01 is current, and this thread alone uses KVM's copy.
        unsafe {
            (&raw mut (*self.raw()).rflags).write(rflags as usize);
            vmx::vmwrite_basic(GUEST_RFLAGS, rflags);
        }
        self.mark_register_available(bindings::MTK_REG_RFLAGS);
        Some(())
    }
}

impl Vmcs12 {
    /// Whether VMRESUME, not VMLAUNCH, is the instruction for it (SDM volume 3, 26.11.3).
    #[cfg(MTK_GVA_WALK)]
    #[inline(always)]
    pub(crate) fn is_launched(self) -> bool {
        const LAUNCHED: u64 = 1;
        field!(self, launch_state) == LAUNCHED
    }

    /// Whether L1 made this a shadow VMCS (SDM volume 3, 26.10).
    pub(crate) fn is_shadow(self) -> bool {
        // SAFETY: By the invariants of `Vmcs12`.
        let header = unsafe { self.as_ptr().cast::<u32>().read() };
        Header(header).is_shadow()
    }
}

/// The first word of a VMCS region (SDM volume 3, table 26-1).
#[derive(Clone, Copy)]
pub(crate) struct Header(pub(crate) u32);

impl Header {
    /// Bit 31, the shadow-VMCS indicator.
    pub(crate) fn is_shadow(self) -> bool {
        self.0 >> 31 != 0
    }

    /// Whether the revision identifier is KVM's.
    pub(crate) fn is_ours(self) -> bool {
        self.0 & !(1 << 31) == bindings::MTK_VMCS12_REVISION
    }
}
