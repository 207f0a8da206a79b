// SPDX-License-Identifier: GPL-2.0
//! The whole-page copies of L2's shadow VMCS that KVM makes when L1 enters L2 and when L2 exits to L1: of what has not
//! changed nothing is copied.
//!
//! KVM's copy and the page in L1's memory hold the same after each of KVM's copies, in either direction. From then on
//! the page changes when L1 clears, loads or unloads the VMCS that is in it (SDM volume 3, 26.11.1: software has to use
//! VMCLEAR, VMPTRLD and VMWRITE for an active VMCS, and a shadow VMCS is active while a link pointer that was used names
//! it), and KVM's copy when L2 executes VMWRITE, which either exits (`note_vmwrite`) or is served (`Memory::save`). Who
//! else changes either of them is told apart by the key: another page, another memory slot, a page that the VMM took
//! away. Of a page whose writes are logged nothing is known, so that each exit marks it dirty. What is known ends with
//! KVM_RUN, with VMX operation, with VMCLEAR, with VMPTRLD of that page or of another one after it, and with a copy by stock code
//! while the path is off. Behind any other VMPTRLD the fields are read anew, for with this module in L1 they may be others
//! (`kvm::region`); what is behind the fields is not.
//!
//! The page is up to date after each exit to L1, so that there is nothing to give back when the path is switched off.

use super::{mode, Reason, NUMBER};
use crate::{
    hook::{Continuation, HookId, InFlight, Verdict},
    kvm::{
        fields::{self, FIELDS},
        shadow_copy::{self, LEN},
        vmcs12_pages::Stamp,
        Vcpu,
    },
    path::{nested_switch, Counters, Local},
    policy::{mode::Mode, page_copy::PageCopy},
    state,
};
use core::{
    ops::Range,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};
use kernel::prelude::*;

/// What must be as it was for the page to be the same memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    page: u64,
    stamp: Stamp,
    epoch: u64,
}

/// What is known of a vCPU's copy.
pub(crate) type Known = PageCopy<Key>;

/// How often the path has been switched off: what was known before may have changed while hooks were off.
static EPOCH: AtomicU64 = AtomicU64::new(0);

/// The path has been switched off, and its hooks are still on.
pub(super) fn end_epoch() {
    EPOCH.fetch_add(1, Ordering::SeqCst);
}

/// The key as it is now; `None` where nothing may be concluded.
#[inline(always)]
fn key(vcpu: Vcpu) -> Option<Key> {
    // Before anything else: a look at the rest that comes later is at least as new.
    let epoch = EPOCH.load(Ordering::Acquire);
    if !vcpu.is_in_run() {
        return None;
    }
    Some(Key {
        page: vcpu.shadow_page_address(),
        stamp: vcpu.memory_stamp()?,
        epoch,
    })
}

/// Whether this is one of KVM's copies of a shadow VMCS, for a vCPU that has a state. All other calls of the two
/// functions, which are for a few bytes, end here.
#[inline(always)]
fn owner(cache: usize, data: usize) -> Option<Vcpu> {
    let raw = shadow_copy::owner_of(cache);
    if !state::has(raw as usize) {
        return None;
    }
    // SAFETY: What has a state is a vCPU that lives, so the cache that was passed is its own: KVM makes or writes its
    // copy of the shadow VMCS, on the vCPU's thread with the vCPU loaded.
    let vcpu = unsafe { Vcpu::from_hook(raw) };
    let copy = vcpu.shadow_vmcs12().map(|copy| copy as usize);
    (copy == Some(data)).then_some(vcpu)
}

/// The handler of either function; `way` is the direction of its copies.
#[inline(always)]
fn copy(way: Copying, args: [usize; 4], cont: Continuation) -> Verdict {
    let [_, cache, data, len] = args;
    if len != LEN {
        return Verdict::STOCK;
    }
    let Some(vcpu) = owner(cache, data) else {
        return Verdict::STOCK;
    };
    if way == Copying::Out && write_was_ahead(vcpu) {
        return Verdict::handled(0);
    }
    let mode = mode();
    let key = key(vcpu);
    let done = state::with(vcpu, |local, counters| {
        let known = &mut local.l2fields.known;
        if mode == Mode::Off {
            known.forget();
            return None;
        }
        let plan = key.and_then(|key| Some((key, way.bytes(known, key)?)));
        let Some((key, bytes)) = plan.filter(|_| mode == Mode::On) else {
            return Some(Err(reason(known)));
        };
        if nested_switch::sends_away(&mut local.nested_switch, counters) {
            return Some(Err(Reason::Detour));
        }
        match way {
            Copying::In => {
                if !bytes.is_empty() {
                    let _section = InFlight::enter(HookId::READ_CACHED);
                    // SAFETY: In this very handler.
                    if !unsafe { vcpu.read_shadow_page(bytes) } {
                        return Some(Err(Reason::CopyUnusual));
                    }
                }
                known.enter();
            }
            Copying::Out => {
                if !bytes.is_empty() {
                    let _section = InFlight::enter(HookId::WRITE_CACHED);
                    // SAFETY: In this very handler.
                    if !unsafe { vcpu.write_shadow_page(bytes) } {
                        return Some(Err(Reason::CopyUnusual));
                    }
                }
                known.exit(key);
            }
        }
        counters.path::<NUMBER>().taken.bump();
        Some(Ok(()))
    });
    match done.flatten() {
        Some(Ok(())) => Verdict::handled(0),
        Some(Err(reason)) => copy_all(way, vcpu, key, reason, cont, args),
        None => Verdict::STOCK,
    }
}

/// KVM's copy of L2's shadow VMCS, at this address, before KVM would read it: the same for as long as L1 does not run. `false` if the stock code
/// has to read it.
///
/// # Safety
///
/// The copy is nobody else's to use; KVM's SRCU lock is held.
#[cfg(MTK_GVA_WALK)]
#[inline(always)]
pub(super) unsafe fn read_ahead(vcpu: Vcpu, address: u64, known: &mut Known) -> bool {
    let Some(key) = key(vcpu).filter(|key| key.page == address) else {
        return false;
    };
    let (bytes, all) = match known.to_read(key) {
        Some(bytes) => (bytes, false),
        None => (0..LEN, true),
    };
    // SAFETY: By this function's contract. Only of an unlogged page, whose slot is that of the key.
    if !bytes.is_empty() && !unsafe { vcpu.read_shadow_page(bytes) } {
        known.forget();
        return false;
    }
    if all {
        known.exit(key);
    } else {
        known.renewed();
    }
    true
}

/// What the page in L1's memory lacks of KVM's copy, before KVM would write it; the page holds the same then, with the key that is returned. `None` if the stock code has to write it.
///
/// # Safety
///
/// As for `read_ahead`.
#[cfg(MTK_GVA_WALK)]
#[inline(always)]
pub(super) unsafe fn write_ahead(vcpu: Vcpu, known: &mut Known) -> Option<Key> {
    let key = key(vcpu)?;
    let bytes = known.to_write(key)?;
    // SAFETY: By this function's contract.
    if !bytes.is_empty() && !unsafe { vcpu.write_shadow_page(bytes) } {
        return None;
    }
    known.written();
    Some(key)
}

/// Whether `write_ahead` has done it for the exit that is being made.
#[inline(always)]
fn write_was_ahead(vcpu: Vcpu) -> bool {
    let done = state::with(vcpu, |local, counters| {
        let key = local.l2fields.written_ahead.take()?;
        local.l2fields.known.exit(key);
        counters.path::<NUMBER>().taken.bump();
        Some(())
    });
    done.flatten().is_some()
}

/// Handler of kvm_read_guest_cached().
#[no_mangle]
extern "C" fn mtk_on_read_cached(
    kvm: usize,
    cache: usize,
    data: usize,
    len: usize,
    cont: Continuation,
) -> Verdict {
    copy(Copying::In, [kvm, cache, data, len], cont)
}

/// Handler of kvm_write_guest_cached().
#[no_mangle]
extern "C" fn mtk_on_write_cached(
    kvm: usize,
    cache: usize,
    data: usize,
    len: usize,
    cont: Continuation,
) -> Verdict {
    copy(Copying::Out, [kvm, cache, data, len], cont)
}

/// Why a copy could not be spared, or shortened.
fn reason(known: &Known) -> Reason {
    if known.is_known() {
        Reason::CopyChanged
    } else {
        Reason::CopyNew
    }
}

/// The direction of a copy.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Copying {
    /// From L1's memory to KVM's copy.
    In,
    /// From KVM's copy to L1's memory.
    Out,
}

impl Copying {
    /// The bytes that have to be copied, maybe none; `None` for all of them.
    #[inline(always)]
    fn bytes(self, known: &Known, key: Key) -> Option<Range<usize>> {
        match self {
            Copying::In => known.to_read(key),
            Copying::Out => known.to_write(key),
        }
    }
}

/// Lets the stock code copy the whole page; `reason` matters in mode `on`.
#[cold]
#[inline(never)]
fn copy_all(
    way: Copying,
    vcpu: Vcpu,
    key: Option<Key>,
    reason: Reason,
    cont: Continuation,
    args: [usize; 4],
) -> Verdict {
    let section = InFlight::enter(match way {
        Copying::In => HookId::READ_CACHED,
        Copying::Out => HookId::WRITE_CACHED,
    });
    let checking = mode() == Mode::Check;
    state::with(vcpu, |local, counters| {
        let known = &local.l2fields.known;
        if !checking {
            counters.path::<NUMBER>().fall_back(reason as usize);
            return;
        }
        key.and_then(|key| way.bytes(known, key))
            .into_iter()
            .for_each(|but| compare(vcpu, but, counters.path::<NUMBER>()));
    });
    // SAFETY: This handler's continuation and the hooked function's own arguments.
    let value = unsafe { section.call_stock(cont, args) };
    // Writes are logged for as long as the stamp is the same, or not.
    let key = key.filter(|_| vcpu.shadow_page_host().is_some());
    state::with(vcpu, |local, _| {
        let known = &mut local.l2fields.known;
        match (key, value as i32, way) {
            (Some(key), 0, Copying::In) => known.enter_anew(key),
            (Some(key), 0, Copying::Out) => known.exit(key),
            // As it was before, half-way, or not to be known.
            _ => known.forget(),
        }
    });
    Verdict::handled(value)
}

static REPORTED: AtomicBool = AtomicBool::new(false);

/// Mode `check`: the page and KVM's copy, of which the same is known but for some bytes.
fn compare(vcpu: Vcpu, but: Range<usize>, count: &Counters) {
    // SAFETY: In the handler of either function.
    let same = unsafe { vcpu.compare_shadow_page(but) };
    if let Some(same) = same {
        count.checked.bump();
        if !same {
            count.mismatches.bump();
            if !REPORTED.swap(true, Ordering::Relaxed) {
                pr_warn!(
                    "l2fields: the shadow VMCS of L2 has changed where nothing was known to\n"
                );
            }
        }
    }
}

/// L2 executes a VMWRITE that KVM carries out in its copy, of the field with this encoding if the encoding is known.
pub(in crate::path) fn note_vmwrite(vcpu: Vcpu, encoding: Option<u64>) {
    state::with(vcpu, |local, _| {
        let known = &mut local.l2fields.known;
        let field = encoding
            .and_then(fields::by_encoding)
            .and_then(|number| FIELDS.get(usize::from(number)));
        match field {
            Some(field) => known.change(field.offset, field.width() as u16),
            None => known.forget(),
        }
    });
}

/// L1 has executed VMPTRLD, with `before` as its current VMCS.
#[inline(always)]
pub(in crate::path) fn suspect(vcpu: Vcpu, local: &mut Local, before: u64) {
    let (page, known) = (vcpu.shadow_page_address(), &mut local.l2fields.known);
    if !known.is_known() {
        return;
    }
    if before == page || vcpu.current_vmptr() == page {
        known.forget();
    } else {
        known.suspect(shadow_copy::FIELDS_END);
    }
}

/// What is known of the vCPU's copy may not be true any more: L1 executes VMCLEAR or VMXOFF, or the vCPU leaves KVM_RUN.
#[inline(always)]
pub(in crate::path) fn forget(vcpu: Vcpu) {
    state::with(vcpu, |local, _| forget_in(local));
}

/// As `forget`, within `state::with`.
#[inline(always)]
pub(in crate::path) fn forget_in(local: &mut Local) {
    local.l2fields.known.forget();
}
