// SPDX-License-Identifier: GPL-2.0-or-later
//! Consistency checks of the guest-state area (SDM volume 3, 28.3.1), violated one at a time. Each is a
//! VM exit with the entry-failure bit, which loads the host state and leaves the VMCS as it was.

use super::bed::{calls, Bed};
use super::controls::Title;
use crate::cpu;
use crate::memory;
use crate::vmx::field::*;
use crate::vmx::ops::{vmread, vmwrite, VmxError};
use crate::vmx::setup::Features;
use crate::vmx::{self};

const NOT_CANONICAL: u64 = 1 << 63;

/// The group.
pub fn run() -> Result<(), VmxError> {
    let mut bed = Bed::new("guest_state");
    for (name, features) in [
        ("start", Features::default()),
        ("start with EPT", bed.modern()),
    ] {
        bed.prepare(features, calls)?;
        bed.good(name)?;
        registers(&mut bed)?;
        link_pointer(&mut bed)?;
        segments(&mut bed)?;
        msr_load(&mut bed)?;
    }
    Ok(())
}

fn registers(bed: &mut Bed) -> Result<(), VmxError> {
    let entry = vmread(VM_ENTRY_CONTROLS)?;
    bed.flip("CR0.PE clear", GUEST_CR0, 0, 1)?;
    bed.flip("CR0.NE clear", GUEST_CR0, 0, 1 << 5)?;
    bed.flip("CR0.PG clear in IA-32e mode", GUEST_CR0, 0, 1 << 31)?;
    bed.flip("CR0 bit 63", GUEST_CR0, 1 << 63, 0)?;
    bed.flip("CR4.VMXE clear", GUEST_CR4, 0, 1 << 13)?;
    bed.flip("CR4.PAE clear in IA-32e mode", GUEST_CR4, 0, 1 << 5)?;
    bed.flip("CR4 bit 31", GUEST_CR4, 1 << 31, 0)?;
    bed.violate(
        "CR4.CET with CR0.WP clear",
        &[
            (GUEST_CR4, vmread(GUEST_CR4)? | 1 << 23),
            (GUEST_CR0, vmread(GUEST_CR0)? & !(1 << 16)),
        ],
    )?;
    bed.flip("CR3 beyond", GUEST_CR3, 1 << cpu::physical_bits(), 0)?;
    let debug = (VM_ENTRY_CONTROLS, entry | 1 << 2);
    bed.violate("DEBUGCTL", &[debug, (GUEST_IA32_DEBUGCTL, 1 << 63)])?;
    bed.violate("DR7", &[debug, (GUEST_DR7, 1 << 32 | 0x400)])?;
    let pat = 0x0007_0406_0007_0406;
    let load = (VM_ENTRY_CONTROLS, entry | 1 << 14);
    bed.violate("PAT good", &[load, (GUEST_IA32_PAT, pat)])?;
    bed.violate("PAT", &[load, (GUEST_IA32_PAT, pat | 2)])?;
    let load = (VM_ENTRY_CONTROLS, entry | 1 << 13);
    bed.violate(
        "PERF_GLOBAL_CTRL",
        &[load, (GUEST_IA32_PERF_GLOBAL_CTRL, 1 << 63)],
    )?;
    let load = (VM_ENTRY_CONTROLS, entry | 1 << 15);
    bed.violate("EFER good", &[load, (GUEST_IA32_EFER, 0x500)])?;
    bed.violate("EFER reserved", &[load, (GUEST_IA32_EFER, 0x500 | 1 << 1)])?;
    bed.violate("EFER.LMA clear", &[load, (GUEST_IA32_EFER, 0x100)])?;
    bed.violate("EFER.LME clear", &[load, (GUEST_IA32_EFER, 0x400)])?;
    let load = (VM_ENTRY_CONTROLS, entry | 1 << 16);
    bed.violate("BNDCFGS reserved", &[load, (GUEST_BNDCFGS, 1 << 2)])?;
    bed.violate(
        "BNDCFGS not canonical",
        &[load, (GUEST_BNDCFGS, NOT_CANONICAL)],
    )?;
    let load = (VM_ENTRY_CONTROLS, entry | 1 << 20);
    bed.violate("S_CET", &[load, (GUEST_S_CET, 1 << 9)])?;
    bed.violate("SSP", &[load, (GUEST_SSP, 3)])?;
    bed.violate("activity state shutdown", &[(GUEST_ACTIVITY_STATE, 2)])?;
    bed.violate("activity state 4", &[(GUEST_ACTIVITY_STATE, 4)])?;
    bed.flip("RFLAGS bit 1 clear", GUEST_RFLAGS, 0, 2)?;
    bed.flip("RFLAGS bit 15", GUEST_RFLAGS, 1 << 15, 0)?;
    bed.flip("RFLAGS.VM in IA-32e mode", GUEST_RFLAGS, 1 << 17, 0)?;
    bed.violate("STI and MOV SS", &[(GUEST_INTERRUPTIBILITY_INFO, 3)])?;
    bed.violate("STI with IF clear", &[(GUEST_INTERRUPTIBILITY_INFO, 1)])?;
    bed.violate(
        "interruptibility reserved",
        &[(GUEST_INTERRUPTIBILITY_INFO, 1 << 5)],
    )?;
    bed.violate(
        "pending debug exceptions reserved",
        &[(GUEST_PENDING_DBG_EXCEPTIONS, 1 << 4)],
    )?;
    bed.violate("SYSENTER_ESP", &[(GUEST_SYSENTER_ESP, NOT_CANONICAL)])?;
    bed.violate("GDTR base", &[(GUEST_GDTR_BASE, NOT_CANONICAL)])?;
    bed.violate("GDTR limit", &[(GUEST_GDTR_LIMIT, 0x1_0000)])
}

fn link_pointer(bed: &mut Bed) -> Result<(), VmxError> {
    let region = memory::pages(1);
    let revision = |bits: u32| {
        // SAFETY: a page of ours that no VMCS has ever been in.
        unsafe { *(region as *mut u32) = vmx::revision() | bits };
    };
    bed.violate(
        "link pointer misaligned",
        &[(VMCS_LINK_POINTER, region | 8)],
    )?;
    bed.violate(
        "link pointer beyond",
        &[(VMCS_LINK_POINTER, 1 << cpu::physical_bits())],
    )?;
    bed.violate(
        "link pointer to a wrong revision",
        &[(VMCS_LINK_POINTER, region)],
    )?;
    revision(1 << 31);
    bed.violate(
        "link pointer to a shadow VMCS, no shadowing",
        &[(VMCS_LINK_POINTER, region)],
    )?;
    revision(0);
    bed.violate(
        "link pointer to an ordinary VMCS",
        &[(VMCS_LINK_POINTER, region)],
    )?;
    let (second, page) = (vmread(SECONDARY_VM_EXEC_CONTROL)?, bed.page);
    let shadowing = [
        (SECONDARY_VM_EXEC_CONTROL, second | 1 << 14),
        (VMREAD_BITMAP, page),
        (VMWRITE_BITMAP, page),
        (VMCS_LINK_POINTER, region),
    ];
    bed.violate("shadowing, link pointer to an ordinary VMCS", &shadowing)?;
    revision(1 << 31);
    bed.violate("shadowing, link pointer to a shadow VMCS", &shadowing)
}

fn segments(bed: &mut Bed) -> Result<(), VmxError> {
    const UNUSABLE: u64 = 1 << 16;
    let segments = [
        ("CS", GUEST_CS_AR_BYTES, GUEST_CS_SELECTOR, GUEST_CS_LIMIT),
        ("SS", GUEST_SS_AR_BYTES, GUEST_SS_SELECTOR, GUEST_SS_LIMIT),
        ("DS", GUEST_DS_AR_BYTES, GUEST_DS_SELECTOR, GUEST_DS_LIMIT),
        ("TR", GUEST_TR_AR_BYTES, GUEST_TR_SELECTOR, GUEST_TR_LIMIT),
        (
            "LDTR",
            GUEST_LDTR_AR_BYTES,
            GUEST_LDTR_SELECTOR,
            GUEST_LDTR_LIMIT,
        ),
    ];
    for (name, rights, selector, limit) in segments {
        let (good, named, reach) = (vmread(rights)?, vmread(selector)?, vmread(limit)?);
        for (what, change) in [
            (" unusable", (rights, good | UNUSABLE)),
            (" type 0", (rights, good & !0xf)),
            (" not present", (rights, good & !0x80)),
            (" system bit", (rights, good ^ 0x10)),
            (" DPL 3", (rights, good | 0x60)),
            (" reserved bits", (rights, good | 0x100)),
            (" D and L", (rights, good | 0x6000)),
            (" granularity", (rights, good ^ 0x8000)),
            (" selector TI", (selector, named | 4)),
            (" selector RPL 3", (selector, named | 3)),
            (" limit", (limit, reach & !0xfff | 0x7ff)),
        ] {
            let mut title = Title::new();
            title.push(name);
            title.push(what);
            bed.violate(title.as_str(), &[change])?;
        }
    }
    Ok(())
}

/// An MSR list that entry cannot load (28.4) fails with reason 34 and the entry's number.
fn msr_load(bed: &mut Bed) -> Result<(), VmxError> {
    const FS_BASE: u64 = 0xc000_0100;
    const SYSENTER_CS: u64 = 0x174;
    const NO_MSR: u64 = 0x1234_5678;
    let list = memory::pages(1);
    let entry = |at: u64, index: u64, value: u64| {
        // SAFETY: a page of ours, 256 entries of two words.
        unsafe {
            ((list + at * 16) as *mut u64).write_volatile(index);
            ((list + at * 16 + 8) as *mut u64).write_volatile(value);
        }
    };
    let with = |count| {
        [
            (VM_ENTRY_MSR_LOAD_COUNT, count),
            (VM_ENTRY_MSR_LOAD_ADDR, list),
        ]
    };
    entry(0, SYSENTER_CS, 0);
    bed.violate("MSR load good", &with(1))?;
    entry(1, FS_BASE, 0);
    bed.violate("MSR load of FS_BASE", &with(2))?;
    entry(1, NO_MSR, 0);
    bed.violate("MSR load of no MSR", &with(2))?;
    entry(1, SYSENTER_CS | 1 << 32, 0);
    bed.violate("MSR load reserved bits", &with(2))?;
    vmwrite(VM_ENTRY_MSR_LOAD_COUNT, 0)
}
