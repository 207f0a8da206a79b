// SPDX-License-Identifier: GPL-2.0
//! nested_vmx_enter_non_root_mode(): vmcs02 is prepared out of vmcs12 and vmcs01, and KVM's registers become L2's.
//!
//! The stock function works for every kind of L2, through the general function for each register. Here it is the plain case in
//! one piece: an L2 in 64-bit mode that L1 entered before. All that can speak against it is looked at first, while vmcs01 is still current, so that the stock function
//! finds what it would have found; but for the segments of an L2 without unrestricted guest, which are in vmcs02: it is made
//! current for them, and vmcs01 again if they are not what they were.
//!
//! What KVM makes of CR0, CR4, the exception bitmap and the kind of EPT is taken from the last time that the stock function was
//! through with the same. The guest state must be one that the path `checks` knows; EFER, paging and pages one that the
//! other parts do.

#[cfg(MTK_GVA_WALK)]
mod plain {
    use super::super::{
        ensure, ept_mmu, host_state, mismatch, mode, pages, takes_detour, Memory as Switch, Reason,
        NUMBER,
    };
    use crate::{
        bindings,
        hook::{Continuation, HookId, InFlight, Verdict},
        kvm::{
            entry::{Derived, Made},
            vmcs12::field,
            Vcpu, Vmcs12,
        },
        path::{checks, vmptrld::roots, CounterSet, Local},
        policy::{mode::Mode, ways::Ways},
        state,
        tracepoint::Tracepoint,
    };
    use core::sync::atomic::AtomicBool;
    use kernel::prelude::*;

    const HOOK: HookId = HookId::ENTER_NON_ROOT;

    /// How many vmcs12s per vCPU are remembered.
    const WAYS: usize = 4;

    /// What is kept for one vCPU, by the address of the vmcs12.
    pub(crate) struct Memory(Ways<Known, WAYS>);

    #[derive(Clone, Copy, Default)]
    struct Known(Option<Derived>);

    impl Memory {
        pub(crate) const NEW: Memory = Memory(Ways::new([Known(None); WAYS]));

        pub(crate) fn clear(&mut self) {
            self.0.clear();
        }
    }

    /// Enters L2 if it is one for us. `Err`: nothing has changed. `INNER`: without leaving KVM's inner loop, so that the root of L0's own table must be
    /// there.
    ///
    /// # Safety
    ///
    /// In the handler of nested_vmx_enter_non_root_mode() for a VMLAUNCH or VMRESUME of L1.
    #[inline(always)]
    pub(in super::super) unsafe fn enter<const INNER: bool>(
        vcpu: Vcpu,
        m: Vmcs12,
        local: &mut Local,
        counters: &CounterSet,
    ) -> Result<Made, Reason> {
        if !Tracepoint::NESTED_VMENTER.is_off() || !host_state::is_able() {
            return Err(Reason::Unusual);
        }
        let key = vcpu.current_vmptr();
        let Local {
            nested_switch:
                Switch {
                    detour,
                    mmu,
                    efer,
                    pages,
                    enter,
                    ..
                },
            checks,
            regions,
            ..
        } = local;
        let derived = enter.0.get(key).and_then(|known| known.0.as_ref());
        let derived = derived.ok_or(Reason::New)?;
        if !vcpu.would_derive(m, derived) {
            return Err(Reason::Changed);
        }
        // SAFETY: By this function's contract, with KVM's SRCU lock held.
        let plan = unsafe { pages::plan(vcpu, m, pages)? };
        // SAFETY: By this function's contract.
        let entry = unsafe { vcpu.plan_entry(m, derived, plan.has_bitmap()) };
        let entry = entry.ok_or(Reason::Unusual)?;
        let efer = efer.get(vcpu, entry.efer).ok_or(Reason::Changed)?;
        let paging = mmu.get(entry.paging).ok_or(Reason::Changed)?;
        let mut root = None;
        if INNER {
            let found = if entry.has_ept() {
                vcpu.root_for_ept(field!(m, ept_pointer))
                    .filter(|root| regions.roots.can_use(vcpu, root.address()))
            } else {
                vcpu.root_of_role(paging.root_role())
            };
            root = Some(found.ok_or(Reason::New)?);
        }
        if !checks::guest_state_holds(vcpu, m, checks) {
            return Err(Reason::Changed);
        }
        let count = counters.path::<NUMBER>();
        if takes_detour(detour, count) {
            return Err(Reason::Detour);
        }
        // SAFETY: By this function's contract; all that `Vcpu::enter` wants was looked at, and there is no way back from it.
        unsafe {
            if !vcpu.switch_vmcs(true) {
                return Err(Reason::Unusual);
            }
            vcpu.enter_dirty(m, &entry);
            if entry.wants_valid_segments() {
                if !checks::segments_hold(vcpu, checks) {
                    vcpu.switch_vmcs(false);
                    return Err(Reason::Changed);
                }
                checks::took(counters);
            }
            vcpu.enter(m, &entry);
            pages::give(vcpu, pages, &plan);
            efer.apply(vcpu);
        }
        paging.restore(vcpu, entry.paging.is_nested());
        checks::took(counters);
        count.taken.bump();
        Ok(entry.made().with_root(root))
    }

    /// Handler of nested_vmx_enter_non_root_mode().
    #[no_mangle]
    extern "C" fn mtk_on_enter_non_root(
        raw: *mut bindings::kvm_vcpu,
        from_vmentry: usize,
        cont: Continuation,
    ) -> Verdict {
        // SAFETY: The hooked function's own argument, in its handler.
        let vcpu = unsafe { Vcpu::from_hook(raw) };
        // A bool. Else L2 is entered by RSM or KVM_SET_NESTED_STATE.
        let (true, Some(m)) = (from_vmentry as u8 != 0, vcpu.vmcs12()) else {
            return Verdict::STOCK;
        };
        // Guest memory is read.
        let section = InFlight::enter(HOOK);
        let reason = match mode() {
            Mode::Off => return Verdict::STOCK,
            Mode::Check => None,
            Mode::On => {
                let entered = state::with(vcpu, |local, counters| {
                    // It concerns nobody as long as L1 runs; the stock function makes the same.
                    ept_mmu::put(&mut local.nested_switch, vcpu, counters.path::<NUMBER>());
                    // SAFETY: In this very handler.
                    let made = unsafe { enter::<false>(vcpu, m, local, counters) }?;
                    local.run.switched();
                    Ok((made, local.regions.roots.are_kept()))
                });
                match entered {
                    Some(Ok((made, kept))) => {
                        // SAFETY: As above, after everything else.
                        unsafe { vcpu.finish_entry(m, made) };
                        if kept && made.has_ept() {
                            roots::renew(vcpu, &section);
                        }
                        // NVMX_VMENTRY_SUCCESS
                        return Verdict::handled(0);
                    }
                    Some(Err(reason)) => Some(reason),
                    None => None,
                }
            }
        };
        enter_slowly(vcpu, m, &section, cont, reason)
    }

    static REPORTED: AtomicBool = AtomicBool::new(false);

    /// Lets the stock code do it, and remembers or compares.
    #[cold]
    #[inline(never)]
    fn enter_slowly(
        vcpu: Vcpu,
        m: Vmcs12,
        section: &InFlight,
        cont: Continuation,
        reason: Option<Reason>,
    ) -> Verdict {
        if !ensure(vcpu, section) && vcpu.vmcs01_is_loaded() {
            // Made when L2 has run.
            return Verdict::STOCK;
        }
        let key = vcpu.current_vmptr();
        // What it is not known for is not compared.
        let compares = matches!(reason, None | Some(Reason::Detour));
        let before = state::with(vcpu, |local, _| {
            if !compares {
                return None;
            }
            let derived = local.nested_switch.enter.0.get(key)?.0?;
            let bitmap = vcpu.uses_msr_bitmap(m);
            let known = vcpu.would_derive(m, &derived).then_some(derived)?;
            // SAFETY: L1 has executed VMLAUNCH or VMRESUME, and the stock function is yet to load vmcs02.
            unsafe { vcpu.plan_entry(m, &known, bitmap) }
        });
        // SAFETY: This handler's continuation and the hooked function's own arguments; true.
        let ret = unsafe { section.call_stock(cont, [vcpu.key(), 1, 0]) };
        let entered = ret as u32 == 0 && vcpu.guest_mode() && !vcpu.vmcs01_is_loaded();
        state::with(vcpu, |local, counters| {
            let count = counters.path::<NUMBER>();
            match before.flatten() {
                Some(entry) if entered => {
                    count.checked.bump();
                    if let Err(what) = vcpu.compare_entry(m, &entry) {
                        if mismatch(count, &REPORTED) {
                            pr_warn!(
                                "nested_switch: nested_vmx_enter_non_root_mode() left something else in field {what:#x} (below 0x100: in KVM) for {entry:x?}\n"
                            );
                        }
                    }
                }
                _ => (),
            }
            match reason {
                // The detour has counted itself.
                Some(Reason::Detour) => (),
                Some(reason) => count.fall_back(reason as usize),
                None if before.flatten().is_none() => count.fall_back(Reason::New as usize),
                None => (),
            }
            if let Some(known) = local.nested_switch.enter.0.get_or_insert(key) {
                // SAFETY: L2 was entered, with vmcs02.
                known.0 = unsafe { entered.then(|| vcpu.derived(m)) }.flatten();
            }
        });
        Verdict::handled(ret)
    }
}

#[cfg(MTK_GVA_WALK)]
pub(super) use plain::enter;
#[cfg(MTK_GVA_WALK)]
pub(crate) use plain::Memory;

/// Before 7.3 KVM describes paging in another way, and nothing is done here.
#[cfg(not(MTK_GVA_WALK))]
mod absent {
    use crate::{
        bindings,
        hook::{Continuation, Verdict},
    };

    /// Nothing.
    pub(crate) struct Memory;

    impl Memory {
        pub(crate) const NEW: Memory = Memory;

        pub(crate) fn clear(&mut self) {}
    }

    /// Handler of nested_vmx_enter_non_root_mode().
    #[no_mangle]
    extern "C" fn mtk_on_enter_non_root(
        _raw: *mut bindings::kvm_vcpu,
        _from_vmentry: usize,
        _cont: Continuation,
    ) -> Verdict {
        Verdict::STOCK
    }
}

#[cfg(not(MTK_GVA_WALK))]
pub(crate) use absent::Memory;
