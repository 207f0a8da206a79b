// SPDX-License-Identifier: GPL-2.0-or-later
//! The PDPTEs of a child with PAE paging, which VM entry takes from the VMCS (SDM volume 3, 28.3.2.4).
//!
//! Here a child runs without paging, and its parent turns PAE paging on by CR0, having written some other field. KVM takes the
//! PDPTEs over if that is one which it does not shadow, even if it had the same value. A field that the parent has written on many entries
//! before is one that somebody might shadow for it. (Where no such field is written, KVM enters with PDPTEs of another time; that
//! case is left out.)

use super::bed::{calls, Bed};
use super::log;
use crate::cpu;
use crate::memory;
use crate::vmx::field::*;
use crate::vmx::ops::{vmread, vmwrite, VmxError};
use crate::vmx::setup::IA32E_MODE_GUEST;

const PG: u64 = 1 << 31;
/// VMCALL, and back to it.
const CODE: u64 = 0x0000_00fb_ebc1_010f;
const CODE32_RIGHTS: u64 = 0xc09b;
const PRESENT: u64 = 1;
/// Present, writable, accessed, dirty, 2 MiB.
const LARGE: u64 = 0xe3;
/// Entries with a field written, so that it is worth shadowing.
const HABIT: u64 = 80;
/// Fields that stock KVM does not shadow, of different kinds.
const FIELDS: [(&str, u32); 4] = [
    ("SYSENTER_ESP", GUEST_SYSENTER_ESP),
    ("DR7", GUEST_DR7),
    ("FS base", GUEST_FS_BASE),
    ("IDTR limit", GUEST_IDTR_LIMIT),
];

fn put(address: u64, value: u64) {
    // SAFETY: a page that `memory` handed out to this module, in which no Rust object lies.
    unsafe { (address as *mut u64).write_volatile(value) };
}

/// A directory that maps the GiB of `address` as it is.
fn directory(address: u64) -> u64 {
    let page = memory::pages(1);
    let gib = address >> 30 << 30;
    for entry in 0..512 {
        put(page + entry * 8, (gib + (entry << 21)) | LARGE);
    }
    page
}

/// A 32-bit child, with paging off to begin with.
fn prepare(bed: &mut Bed, pdpte: u64) -> Result<(), VmxError> {
    bed.prepare(bed.modern(), calls)?;
    put(bed.page, CODE);
    let entry = vmread(VM_ENTRY_CONTROLS)? & !IA32E_MODE_GUEST;
    for (field, value) in [
        (VM_ENTRY_CONTROLS, entry),
        (GUEST_IA32_EFER, 0),
        (GUEST_CS_AR_BYTES, CODE32_RIGHTS),
        (GUEST_CR0, cpu::cr0() & !PG),
        (GUEST_CR3, memory::pages(1)),
        (GUEST_CR4, cpu::cr4()),
        (GUEST_RIP, bed.page),
    ] {
        vmwrite(field, value)?;
    }
    for at in 0..4 {
        vmwrite(
            GUEST_PDPTR0 + 2 * at,
            if at as u64 == bed.page >> 30 {
                pdpte
            } else {
                0
            },
        )?;
    }
    Ok(())
}

/// Turns the paging on or off, and enters.
fn enter(bed: &mut Bed, name: &str, paging: bool) -> Result<(), VmxError> {
    let cr0 = vmread(GUEST_CR0)?;
    vmwrite(GUEST_CR0, if paging { cr0 | PG } else { cr0 & !PG })?;
    vmwrite(GUEST_RIP, bed.page)?;
    let outcome = bed.enter();
    let wanted = if bed.called(&outcome) { "" } else { "FAIL: " };
    log!("pdptes/{}, paging {}: {}{}", name, paging, wanted, outcome);
    Ok(())
}

pub fn run() -> Result<(), VmxError> {
    let mut bed = Bed::new("pdptes");
    let (first, second) = (directory(bed.page), directory(bed.page));
    for (name, field) in FIELDS {
        prepare(&mut bed, first | PRESENT)?;
        let value = vmread(field)?;
        for number in 0..HABIT {
            vmwrite(field, value ^ (number & 1))?;
            bed.good(name)?;
            vmwrite(GUEST_RIP, bed.page)?;
        }
        let value = vmread(field)?;
        vmwrite(field, value)?;
        enter(&mut bed, name, true)?;
        // Without anything new, and back.
        enter(&mut bed, name, true)?;
        enter(&mut bed, name, false)?;
        // Another directory, of which this entry has no need; the one that has is told of nothing but the old value.
        vmwrite(GUEST_PDPTR0 + 2 * (bed.page >> 30) as u32, second | PRESENT)?;
        enter(&mut bed, name, false)?;
        put(first + (bed.page >> 21 & 511) * 8, 0);
        vmwrite(field, value)?;
        enter(&mut bed, name, true)?;
        put(
            first + (bed.page >> 21 & 511) * 8,
            bed.page >> 21 << 21 | LARGE,
        );
    }
    Ok(())
}
