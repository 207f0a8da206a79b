// SPDX-License-Identifier: GPL-2.0
//! What kvm_init_mmu() computes from the guest's paging mode: how the guest's page tables are walked and what
//! faults, and the role of L0's own tables for it.
//!
//! From 7.3 on there is one description of the walk, `gva_walk`, which L1 and L2 share. Before, it is part of
//! `root_mmu`, and of `nested_mmu` while L1's EPT is in use. From 7.3 on, too, the same is known of what
//! kvm_init_shadow_ept_mmu() computes for L1's EPT.

use super::{vcpu::read, Vcpu};
use crate::{
    bindings,
    policy::{registers::HF_GUEST, role},
};
use core::mem::{offset_of, size_of};

const _: () = {
    assert!(bindings::MTK_MMU_CR0_ROLE_BITS as u64 == role::CR0_BITS);
    assert!(bindings::MTK_MMU_CR4_ROLE_BITS as u64 == role::CR4_BITS);
};

/// Some words that lie together: where they begin in `struct kvm_vcpu_arch`, and how many there are.
type Span = (usize, usize);

#[cfg(MTK_GVA_WALK)]
mod layout {
    use super::*;
    use bindings::{kvm_mmu, kvm_page_format, kvm_pagewalk, kvm_vcpu_arch};

    const WALK: usize = offset_of!(kvm_vcpu_arch, gva_walk);
    const ROOT: usize = offset_of!(kvm_vcpu_arch, root_mmu);

    pub(super) const NESTED: [Span; 1] = [(WALK, size_of::<kvm_pagewalk>() / 8)];
    pub(super) const PLAIN: [Span; 4] = [
        NESTED[0],
        // page_fault and sync_spte.
        (ROOT, 2),
        // With the padding behind it.
        (ROOT + offset_of!(kvm_mmu, root_role), 1),
        (
            ROOT + offset_of!(kvm_mmu, fmt),
            size_of::<kvm_page_format>() / 8,
        ),
    ];
    /// Where the role of the root is among the words of `PLAIN`.
    pub(super) const ROOT_ROLE: usize = NESTED[0].1 + PLAIN[1].1;
    const _: () = assert!(PLAIN[2].0 == ROOT + offset_of!(kvm_mmu, root_role));
    const NESTED_WALK: usize = offset_of!(kvm_vcpu_arch, ngpa_walk);
    const GUEST: usize = offset_of!(kvm_vcpu_arch, guest_mmu);
    /// Of the functions that kvm_init_shadow_ept_mmu() sets as well each has one value only.
    pub(super) const SHADOW_EPT: [Span; 4] = [
        (NESTED_WALK + offset_of!(kvm_pagewalk, cpu_role), 1),
        (
            NESTED_WALK + offset_of!(kvm_pagewalk, fmt),
            size_of::<kvm_page_format>() / 8,
        ),
        (GUEST + offset_of!(kvm_mmu, root_role), 1),
        (
            GUEST + offset_of!(kvm_mmu, fmt),
            size_of::<kvm_page_format>() / 8,
        ),
    ];
    const _: () = {
        assert!(size_of::<bindings::kvm_cpu_role>() == 8);
        assert!(offset_of!(kvm_mmu, page_fault) == 0 && offset_of!(kvm_mmu, sync_spte) == 8);
        assert!(offset_of!(kvm_mmu, prev_roots) >= offset_of!(kvm_mmu, root_role) + 8);
        assert!(size_of::<kvm_pagewalk>() % 8 == 0 && size_of::<kvm_page_format>() % 8 == 0);
    };
}

#[cfg(not(MTK_GVA_WALK))]
mod layout {
    use super::*;
    use bindings::{kvm_mmu, kvm_vcpu_arch};

    const fn spans(mmu: usize) -> [Span; 4] {
        [
            // The six functions.
            (mmu, 6),
            // cpu_role, root_role and pkru_mask.
            (mmu + offset_of!(kvm_mmu, cpu_role), 2),
            (mmu + offset_of!(kvm_mmu, permissions), 4),
            // shadow_zero_check and guest_rsvd_check.
            (
                mmu + offset_of!(kvm_mmu, shadow_zero_check),
                (size_of::<kvm_mmu>() - offset_of!(kvm_mmu, shadow_zero_check)) / 8,
            ),
        ]
    }

    // What of a `kvm_mmu` init_kvm_nested_mmu() leaves alone in `nested_mmu`, nothing else writes either.
    pub(super) const NESTED: [Span; 4] = spans(offset_of!(kvm_vcpu_arch, nested_mmu));
    pub(super) const PLAIN: [Span; 4] = spans(offset_of!(kvm_vcpu_arch, root_mmu));
    const _: () = {
        assert!(offset_of!(kvm_mmu, get_guest_pgd) == 0 && offset_of!(kvm_mmu, root) == 48);
        assert!(offset_of!(kvm_mmu, pkru_mask) == offset_of!(kvm_mmu, cpu_role) + 12);
        assert!(offset_of!(kvm_mmu, prev_roots) >= offset_of!(kvm_mmu, cpu_role) + 16);
        assert!(offset_of!(kvm_mmu, pae_root) == offset_of!(kvm_mmu, permissions) + 32);
    };
}

use layout::{NESTED, PLAIN};

const fn words(spans: &[Span]) -> usize {
    let (mut sum, mut i) = (0, 0);
    while i < spans.len() {
        assert!(spans[i].0 % 8 == 0);
        assert!(spans[i].0 + 8 * spans[i].1 <= size_of::<bindings::kvm_vcpu_arch>());
        sum += spans[i].1;
        i += 1;
    }
    sum
}

/// Room for what kvm_init_mmu() computes in either case.
const WORDS: usize = words(&PLAIN);
const _: () = assert!(words(&NESTED) <= WORDS);

/// Number and address of each word of the vCPU that `spans` name.
#[inline(always)]
fn each(vcpu: Vcpu, spans: &'static [Span], mut f: impl FnMut(usize, *mut u64)) {
    // SAFETY: Only an address is taken.
    let arch = unsafe { &raw mut (*vcpu.raw()).vcpu.arch };
    let mut at = 0;
    for &(offset, count) in spans {
        for i in 0..count {
            f(at, arch.cast::<u8>().wrapping_add(offset + 8 * i).cast());
            at += 1;
        }
    }
}

/// Copies words of the vCPU.
#[inline(always)]
fn save(to: &mut [u64], vcpu: Vcpu, spans: &'static [Span]) {
    each(vcpu, spans, |at, word| {
        if let Some(to) = to.get_mut(at) {
            // SAFETY: By the invariants of `Vcpu`; `words` has checked that the spans are within it, and
            // only the vCPU's thread writes them.
            *to = unsafe { word.read() };
        }
    });
}

/// Gives the vCPU what `save` copied.
#[inline(always)]
fn restore(from: &[u64], vcpu: Vcpu, spans: &'static [Span]) {
    each(vcpu, spans, |at, word| {
        if let Some(from) = from.get(at) {
            // SAFETY: As in `save`. Volatile, so that no call of memcpy() is made of it.
            unsafe { word.write_volatile(*from) };
        }
    });
}

/// Whether the vCPU has now what `save` copied.
fn is_current(from: &[u64], vcpu: Vcpu, spans: &'static [Span]) -> bool {
    let mut same = true;
    each(vcpu, spans, |at, word| {
        // SAFETY: As in `save`.
        same &= from.get(at).copied() == Some(unsafe { word.read() });
    });
    same
}

/// A copy of what kvm_init_mmu() computed. It has pointers to KVM's functions, so it must not outlive KVM.
#[derive(Clone, Copy)]
pub(crate) struct MmuState([u64; WORDS]);

impl MmuState {
    /// Nothing yet.
    pub(crate) const EMPTY: MmuState = MmuState([0; WORDS]);

    #[inline(always)]
    fn spans(nested: bool) -> &'static [Span] {
        if nested {
            &NESTED
        } else {
            &PLAIN
        }
    }

    /// Copies what the vCPU has now.
    pub(crate) fn save(&mut self, vcpu: Vcpu, nested: bool) {
        save(&mut self.0, vcpu, Self::spans(nested));
    }

    /// Gives the vCPU what was copied.
    #[inline(always)]
    pub(crate) fn restore(&self, vcpu: Vcpu, nested: bool) {
        if nested {
            restore(&self.0, vcpu, &NESTED);
        } else {
            restore(&self.0, vcpu, &PLAIN);
        }
    }

    /// Whether the vCPU has now what was copied.
    pub(crate) fn is_current(&self, vcpu: Vcpu, nested: bool) -> bool {
        is_current(&self.0, vcpu, Self::spans(nested))
    }

    /// The role of L0's own table in what was copied, of a guest without nested paging (`root_mmu.root_role`).
    #[cfg(MTK_GVA_WALK)]
    #[inline(always)]
    pub(crate) fn root_role(&self) -> u32 {
        self.0[layout::ROOT_ROLE] as u32
    }
}

/// A copy of what kvm_init_shadow_ept_mmu() computed, but for the root.
#[cfg(MTK_GVA_WALK)]
#[derive(Clone, Copy)]
pub(crate) struct EptState([u64; words(&layout::SHADOW_EPT)]);

#[cfg(MTK_GVA_WALK)]
impl EptState {
    /// Nothing yet.
    pub(crate) const EMPTY: EptState = EptState([0; words(&layout::SHADOW_EPT)]);

    /// Copies what the vCPU has now.
    pub(crate) fn save(&mut self, vcpu: Vcpu) {
        save(&mut self.0, vcpu, &layout::SHADOW_EPT);
    }

    /// Gives the vCPU what was copied, unless it has that already.
    #[inline(always)]
    pub(crate) fn restore(&self, vcpu: Vcpu) {
        restore(&self.0, vcpu, &layout::SHADOW_EPT);
    }

    /// Whether the vCPU is prepared for the mode of the copy: what the stock function looks at.
    #[inline(always)]
    pub(crate) fn has_mode_of(&self, vcpu: Vcpu) -> bool {
        // SAFETY: By the invariants of `Vcpu`; a union of plain integers.
        let mode = unsafe {
            (&raw const (*vcpu.raw()).vcpu.arch.ngpa_walk.cpu_role)
                .cast::<u64>()
                .read()
        };
        self.0.first() == Some(&mode)
    }

    /// Whether the vCPU has now what was copied.
    pub(crate) fn is_current(&self, vcpu: Vcpu) -> bool {
        is_current(&self.0, vcpu, &layout::SHADOW_EPT)
    }
}

impl Vcpu {
    /// The paging mode for which kvm_init_mmu() is about to prepare, if it is one that can be remembered.
    #[inline(always)]
    pub(crate) fn mmu_key(self) -> Option<role::Key> {
        // The guest may own CR0.WP; then KVM reads it from the VMCS.
        if !self.register_is_available(bindings::MTK_REG_CR0) {
            return None;
        }
        role::Key::new(
            read!(self, vcpu.arch.cr0) as u64,
            read!(self, vcpu.arch.cr4) as u64,
            read!(self, vcpu.arch.efer),
            u64::from(read!(self, vcpu.arch.hflags)),
            self.mmu_is_nested(),
        )
    }

    /// The paging mode that L1 has with these registers, if it is one that can be remembered. L2 may not have been left yet.
    #[inline(always)]
    pub(crate) fn mmu_key_of(self, cr0: u64, cr4: u64, efer: u64) -> Option<role::Key> {
        let hflags = u64::from(read!(self, vcpu.arch.hflags)) & !HF_GUEST;
        role::Key::new(cr0, cr4, efer, hflags, false)
    }

    /// The root that is in use for L1's EPT, by its physical address: one EPT pointer has several, of different roles
    /// (`union kvm_mmu_page_role`). `None` while there is none.
    pub(crate) fn guest_mmu_root(self) -> Option<u64> {
        let root = read!(self, vcpu.arch.guest_mmu.root);
        (root.hpa != u64::MAX).then_some(root.hpa)
    }

    /// Whether the VM has tables that are *unsync*: KVM lets the guest write them and looks at them again when it has to.
    pub(crate) fn has_unsync_tables(self) -> bool {
        let kvm = read!(self, vcpu.kvm);
        // SAFETY: A vCPU's VM outlives it; other vCPUs count in this word, under `mmu_unsync_pages_lock` or `mmu_lock`.
        unsafe { (&raw const (*kvm).stat.mmu_unsync).read_volatile() != 0 }
    }

    /// `mmu_is_nested()`: the vCPU uses L1's EPT.
    #[inline(always)]
    pub(crate) fn mmu_is_nested(self) -> bool {
        // SAFETY: Only an address is taken.
        let guest_mmu = unsafe { &raw mut (*self.raw()).vcpu.arch.guest_mmu };
        core::ptr::eq(read!(self, vcpu.arch.mmu), guest_mmu)
    }
}
