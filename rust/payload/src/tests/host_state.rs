// SPDX-License-Identifier: GPL-2.0-or-later
//! Consistency checks of the host-state area (SDM volume 3, 28.2.2 to 28.2.4), violated one at a time.
//! Each is an error 8; the state is never loaded.

use super::bed::{calls, Bed};
use super::controls::Title;
use crate::cpu;
use crate::vmx::field::*;
use crate::vmx::ops::{vmread, VmxError};
use crate::vmx::setup::Features;

/// No canonical address, with 48 bits or 57.
const NOT_CANONICAL: u64 = 1 << 63;

/// The group.
pub fn run() -> Result<(), VmxError> {
    let mut bed = Bed::new("host_state");
    for (name, features) in [
        ("start", Features::default()),
        ("start with EPT", bed.modern()),
    ] {
        bed.prepare(features, calls)?;
        bed.good(name)?;
        all(&mut bed)?;
    }
    Ok(())
}

fn all(bed: &mut Bed) -> Result<(), VmxError> {
    let exit = vmread(VM_EXIT_CONTROLS)?;
    bed.flip("CR0.PE clear", HOST_CR0, 0, 1)?;
    bed.flip("CR0.PG clear", HOST_CR0, 0, 1 << 31)?;
    bed.flip("CR0.NE clear", HOST_CR0, 0, 1 << 5)?;
    bed.flip("CR0 bit 63", HOST_CR0, 1 << 63, 0)?;
    bed.flip("CR4.VMXE clear", HOST_CR4, 0, 1 << 13)?;
    bed.flip("CR4.PAE clear", HOST_CR4, 0, 1 << 5)?;
    bed.flip("CR4 bit 31", HOST_CR4, 1 << 31, 0)?;
    bed.violate(
        "CR4.CET with CR0.WP clear",
        &[
            (HOST_CR4, vmread(HOST_CR4)? | 1 << 23),
            (HOST_CR0, vmread(HOST_CR0)? & !(1 << 16)),
        ],
    )?;
    bed.flip("CR3 beyond", HOST_CR3, 1 << cpu::physical_bits(), 0)?;
    bed.violate("SYSENTER_ESP", &[(HOST_IA32_SYSENTER_ESP, NOT_CANONICAL)])?;
    bed.violate("SYSENTER_EIP", &[(HOST_IA32_SYSENTER_EIP, NOT_CANONICAL)])?;
    let pat = 0x0007_0406_0007_0406;
    bed.violate(
        "PAT good",
        &[(VM_EXIT_CONTROLS, exit | 1 << 19), (HOST_IA32_PAT, pat)],
    )?;
    bed.violate(
        "PAT",
        &[(VM_EXIT_CONTROLS, exit | 1 << 19), (HOST_IA32_PAT, pat | 2)],
    )?;
    bed.violate(
        "PERF_GLOBAL_CTRL",
        &[
            (VM_EXIT_CONTROLS, exit | 1 << 12),
            (HOST_IA32_PERF_GLOBAL_CTRL, 1 << 63),
        ],
    )?;
    bed.flip("not a 64-bit host", VM_EXIT_CONTROLS, 0, 1 << 9)?;
    let selectors = [
        ("CS", HOST_CS_SELECTOR),
        ("SS", HOST_SS_SELECTOR),
        ("DS", HOST_DS_SELECTOR),
        ("ES", HOST_ES_SELECTOR),
        ("FS", HOST_FS_SELECTOR),
        ("GS", HOST_GS_SELECTOR),
        ("TR", HOST_TR_SELECTOR),
    ];
    for (name, field) in selectors {
        for (what, bits) in [(" RPL 3", 3), (" TI", 4)] {
            let mut title = Title::new();
            title.push(name);
            title.push(what);
            bed.flip(title.as_str(), field, bits, 0)?;
        }
    }
    bed.violate("CS 0", &[(HOST_CS_SELECTOR, 0)])?;
    bed.violate("TR 0", &[(HOST_TR_SELECTOR, 0)])?;
    bed.violate("SS 0", &[(HOST_SS_SELECTOR, 0)])?;
    bed.violate("FS base", &[(HOST_FS_BASE, NOT_CANONICAL)])?;
    bed.violate("GS base", &[(HOST_GS_BASE, NOT_CANONICAL)])?;
    bed.violate("GDTR base", &[(HOST_GDTR_BASE, NOT_CANONICAL)])?;
    bed.violate("IDTR base", &[(HOST_IDTR_BASE, NOT_CANONICAL)])?;
    bed.violate("TR base", &[(HOST_TR_BASE, NOT_CANONICAL)])?;
    bed.violate("RIP", &[(HOST_RIP, NOT_CANONICAL)])?;
    let load = (VM_EXIT_CONTROLS, exit | 1 << 21);
    bed.violate("EFER good", &[load, (HOST_IA32_EFER, 0x500)])?;
    bed.violate("EFER reserved", &[load, (HOST_IA32_EFER, 0x500 | 1 << 1)])?;
    bed.violate("EFER.LMA clear", &[load, (HOST_IA32_EFER, 0x100)])?;
    bed.violate("EFER.LME clear", &[load, (HOST_IA32_EFER, 0x400)])?;
    let load = (VM_EXIT_CONTROLS, exit | 1 << 28);
    bed.violate("S_CET", &[load, (HOST_S_CET, 1 << 9)])?;
    bed.violate("SSP", &[load, (HOST_SSP, 3)])?;
    bed.violate("SSP table", &[load, (HOST_INTR_SSP_TABLE, NOT_CANONICAL)])
}
