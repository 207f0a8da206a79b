// SPDX-License-Identifier: GPL-2.0
//! Roots of L0's own tables, found and put to use where no lock may be waited for: what kvm_mmu_new_pgd() and vmx_load_mmu_pgd() do in the
//! plain case.

use super::{
    ept02::shadow_page,
    fields::encoding::{EPT_POINTER, GUEST_CR3},
    vcpu::read,
    vmx, Vcpu,
};
use crate::{bindings, hook::CallId, layout, policy::registers::EFER_LMA};
use core::sync::atomic::{AtomicBool, Ordering};

/// A request for the vCPU's root to be put into the VMCS.
pub(super) const LOAD_PGD: u64 = 1 << bindings::MTK_REQ_LOAD_MMU_PGD;
/// No root (`INVALID_PAGE`).
const NO_ROOT: u64 = u64::MAX;

/// Nobody but the processor wants to know of a root (`hv_track_root_tdp()`: the host runs on Hyper-V, which is told when it is to flush).
static PLAIN_ROOTS: AtomicBool = AtomicBool::new(false);
/// `enable_ept_ad_bits`.
static AD_FLAGS: AtomicBool = AtomicBool::new(false);

/// Finds out how a root is put into the VMCS, each time kvm_intel has been loaded. Reads a file.
pub(super) fn prepare() {
    AD_FLAGS.store(layout::module_flag("kvm_intel", "eptad"), Ordering::Relaxed);
    PLAIN_ROOTS.store(!runs_on_hyperv(), Ordering::Relaxed);
}

/// Whether the hypervisor below, if there is one, says that it is Hyper-V.
fn runs_on_hyperv() -> bool {
    const SIGNATURE: [[u8; 4]; 3] = [*b"Micr", *b"osof", *b"t Hv"];
    if !super::runs_on_hypervisor() {
        return false;
    }
    // SAFETY: A hypervisor has this leaf.
    let leaf = unsafe { core::arch::x86_64::__cpuid(0x4000_0000) };
    [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes) == SIGNATURE
}

/// A root that KVM has for a guest.
#[derive(Clone, Copy)]
pub(crate) struct Root {
    /// 0: it is the current one. Otherwise the number, from 1, of one that was before.
    place: usize,
    hpa: u64,
    nested: bool,
}

impl Root {
    /// Its physical address.
    #[inline(always)]
    pub(crate) fn address(self) -> u64 {
        self.hpa
    }
}

impl Vcpu {
    /// The root that kvm_mmu_new_pgd() finds for L1's EPT with this pointer, without having to give one up.
    #[inline(always)]
    pub(crate) fn root_for_ept(self, eptp: u64) -> Option<Root> {
        let mmu = self.mmu_of(true);
        // SAFETY: A union of integers, this thread's.
        let role = unsafe { (&raw const (*mmu).root_role).cast::<u32>().read() };
        self.find_root(true, role, |pgd| pgd == eptp)
    }

    /// The one that it finds for a guest without nested paging, given the role. One root serves whatever the guest has in CR3 (`role.direct`).
    #[inline(always)]
    pub(crate) fn root_of_role(self, role: u32) -> Option<Root> {
        self.find_root(false, role, |_| true)
    }

    /// The MMU for L1's EPT, or the other one.
    #[inline(always)]
    fn mmu_of(self, nested: bool) -> *mut bindings::kvm_mmu {
        // SAFETY: Only addresses are taken.
        unsafe {
            let arch = &raw mut (*self.raw()).vcpu.arch;
            if nested {
                &raw mut (*arch).guest_mmu
            } else {
                &raw mut (*arch).root_mmu
            }
        }
    }

    /// fast_pgd_switch(), which does not change anything here.
    #[inline(always)]
    fn find_root(self, nested: bool, role: u32, is_pgd: impl Fn(u64) -> bool) -> Option<Root> {
        let mmu = self.mmu_of(nested);
        let fits = |root: &bindings::kvm_mmu_root_info| {
            root.hpa != NO_ROOT && is_pgd(root.pgd) && Self::role_of(root.hpa) == Some(role)
        };
        // SAFETY: One of the vCPU's MMUs; plain data, this thread's.
        let (current, previous) = unsafe { (&(*mmu).root, &(*mmu).prev_roots) };
        let found = |place: usize, hpa: u64| Root { place, hpa, nested };
        if fits(current) {
            return Some(found(0, current.hpa));
        }
        // A root without an account of it, such as the page of zeroes, is given up first.
        if current.hpa != NO_ROOT && Self::role_of(current.hpa).is_none() {
            return None;
        }
        (1..)
            .zip(previous)
            .find(|(_, root)| fits(root))
            .map(|(place, root)| found(place, root.hpa))
    }

    /// kvm_mmu_new_pgd(), which finds this root. Its role is not looked at again: another thread may have made it invalid since, for which there is a request by now,
    /// and KVM's function would look for another, give one up, and wait for mmu_lock, whose holder may wait for this CPU.
    ///
    /// # Safety
    ///
    /// Found by `root_for_ept` or `root_of_role` in this very handler, and of the MMU that is in use now.
    #[inline(always)]
    pub(crate) unsafe fn use_root(self, root: Root) {
        let mmu = self.mmu_of(root.nested);
        // SAFETY: By the invariants of `Vcpu` and this function's contract these are this thread's.
        unsafe {
            if root.place != 0 {
                Self::rotate(&mut (*mmu).root, &mut (*mmu).prev_roots, root.place);
            }
            // vcpu_clear_mmio_info(vcpu, MMIO_GVA_ANY)
            (&raw mut (*self.raw()).vcpu.arch.mmio_gva).write(0);
            if root.nested {
                // __clear_sp_write_flooding_count(); a root of EPT02 is no direct one, nor the TDP MMU's, which has something else there.
                let page = shadow_page(root.hpa);
                let count = &raw mut (*page)
                    .__bindgen_anon_3
                    .__bindgen_anon_1
                    .write_flooding_count;
                (&raw mut (*count).counter).write_volatile(0);
            }
        }
        self.request(LOAD_PGD);
    }

    /// Makes the root at `place` - 1 of those that were in use the current one: cached_root_find_and_keep_current() and
    /// cached_root_find_without_current().
    #[cold]
    fn rotate(
        current: &mut bindings::kvm_mmu_root_info,
        previous: &mut [bindings::kvm_mmu_root_info],
        place: usize,
    ) {
        if current.hpa != NO_ROOT {
            for root in previous.iter_mut().take(place) {
                core::mem::swap(current, root);
            }
            return;
        }
        if let Some(rest) = previous.get_mut(place.wrapping_sub(1)..) {
            if let Some(found) = rest.first_mut() {
                core::mem::swap(current, found);
            }
            rest.rotate_left(1);
            if let Some(last) = rest.last_mut() {
                last.hpa = NO_ROOT;
            }
        }
    }

    /// `root_to_sp(root)->role.word`.
    #[inline(always)]
    fn role_of(root: u64) -> Option<u32> {
        let page = shadow_page(root);
        if page.is_null() {
            return None;
        }
        // SAFETY: KVM's own account of a page that it uses as a root, of which the vCPU holds a reference. The role is a union of integers; another
        // thread may make it an invalid one at any time, so it is read in one go.
        Some(unsafe { (&raw const (*page).role).cast::<u32>().read_volatile() })
    }

    /// kvm_mmu_load_pgd(): vmx_load_mmu_pgd() in the plain case.
    ///
    /// # Safety
    ///
    /// As for `settle_switch`; `root` is that of the MMU in use.
    #[inline(always)]
    pub(super) unsafe fn load_root(self, root: u64) {
        const CR3: u32 = 1 << bindings::MTK_REG_CR3;
        let page = shadow_page(root);
        let plain = !page.is_null()
            && PLAIN_ROOTS.load(Ordering::Relaxed)
            && read!(self, vcpu.arch.efer) & EFER_LMA != 0;
        if !plain {
            // SAFETY: By this function's contract.
            return unsafe { self.load_root_slowly(root) };
        }
        // SAFETY: As in `role_of`; of the bits that are looked at none changes.
        let role = unsafe { (&raw const (*page).role).read_volatile().__bindgen_anon_1 };
        // construct_eptp(): write-back, the length of the walk, accessed and dirty flags.
        let mut eptp = root | 6;
        eptp |= if role.level() == 5 { 4 << 3 } else { 3 << 3 };
        if role.ad_disabled() == 0 && AD_FLAGS.load(Ordering::Relaxed) {
            eptp |= 1 << 6;
        }
        // SAFETY: The register bits are the low word of a bitmap; by the invariants of `Vcpu` this thread's.
        let dirty = unsafe {
            (&raw const (*self.raw()).vcpu.arch.regs_dirty)
                .cast::<u32>()
                .read()
        };
        let cr3 = read!(self, vcpu.arch.cr3) as u64;
        // SAFETY: By this function's contract: the values that KVM would write.
        unsafe {
            vmx::vmwrite_basic(EPT_POINTER, eptp);
            if dirty & CR3 != 0 {
                vmx::vmwrite_basic(GUEST_CR3, cr3);
            }
        }
    }

    /// # Safety
    ///
    /// As for `load_root`.
    #[cold]
    unsafe fn load_root_slowly(self, root: u64) {
        let mmu = read!(self, vcpu.arch.mmu);
        // SAFETY: KVM's own pointer to one of the vCPU's MMUs; the role is a union of integers.
        let level = unsafe { (*mmu).root_role.__bindgen_anon_1.level() } as usize;
        // SAFETY: As KVM calls it, with the VMCS of the guest that is to run current.
        unsafe { CallId::LOAD_PGD.call([self.key(), root as usize, level]) };
    }
}
