// SPDX-License-Identifier: GPL-2.0-or-later
//! The VMX instructions outside and inside VMX operation, and every way for each to fail.

use super::bed::{calls, Bed};
use super::log;
use crate::cpu;
use crate::vmx::child::How;
use crate::vmx::ops::{
    invept, invvpid, vmclear, vmptrld, vmptrst, vmread, vmwrite, vmxoff, vmxon, VmxError,
};
use crate::vmx::setup::Features;
use crate::vmx::{self, field};

/// How a result is logged.
struct Shown<T>(Result<T, VmxError>);

impl<T: core::fmt::LowerHex> core::fmt::Display for Shown<T> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match &self.0 {
            Ok(value) => write!(f, "{value:#x}"),
            Err(error) => error.fmt(f),
        }
    }
}

fn note(name: &str, result: Result<(), VmxError>) {
    match result {
        Ok(()) => log!("instructions/{}: VMsucceed", name),
        Err(error) => log!("instructions/{}: {}", name, error),
    }
}

/// The group.
pub fn run() -> Result<(), VmxError> {
    let mut bed = Bed::new("instructions");
    let beyond = 1u64 << cpu::physical_bits();
    let bad = [
        ("misaligned", bed.page | 8),
        ("beyond memory", beyond),
        ("not canonical", 1 << 63),
    ];

    note("vmxon again", vmxon(vmx::vmxon_region()));
    // With a current VMCS the same failure has a number.
    vmclear(bed.child.vmcs)?;
    vmptrld(bed.child.vmcs)?;
    note("vmxon again, current VMCS", vmxon(vmx::vmxon_region()));
    log!(
        "instructions/vmptrst: {}",
        Shown(vmptrst().map(|p| (p == bed.child.vmcs) as u8))
    );
    for (name, address) in bad {
        note_at("vmclear", name, vmclear(address));
        note_at("vmptrld", name, vmptrld(address));
    }
    note("vmclear of the VMXON region", vmclear(vmx::vmxon_region()));
    note("vmptrld of the VMXON region", vmptrld(vmx::vmxon_region()));
    note("vmptrld of a wrong revision", vmptrld(bed.page));
    log!(
        "instructions/vmptrst after failures: {}",
        Shown(vmptrst().map(|p| (p == bed.child.vmcs) as u8))
    );
    components();
    invalidations(&bed);
    entries(&mut bed)?;

    vmclear(bed.child.vmcs)?;
    note("vmread without VMCS", vmread(field::GUEST_RIP).map(|_| ()));
    note("vmwrite without VMCS", vmwrite(field::GUEST_RIP, 0));
    log!(
        "instructions/vmlaunch without VMCS: {}",
        bed.enter_by(How::Launch)
    );
    log!(
        "instructions/vmresume without VMCS: {}",
        bed.enter_by(How::Resume)
    );
    log!("instructions/vmptrst without VMCS: {}", Shown(vmptrst()));
    note("vmptrld misaligned without VMCS", vmptrld(bed.page | 8));

    outside(&bed, beyond)
}

fn note_at(instruction: &str, what: &str, result: Result<(), VmxError>) {
    match result {
        Ok(()) => log!("instructions/{} {}: VMsucceed", instruction, what),
        Err(error) => log!("instructions/{} {}: {}", instruction, what, error),
    }
}

fn components() {
    for encoding in [
        0x0004,
        0x0814,
        0x20ff,
        0x4826,
        0x4828,
        0x6fff,
        0x1_0000,
        0xffff_ffff,
    ] {
        log!(
            "instructions/vmread {:#06x}: {}",
            encoding,
            Shown(vmread(encoding))
        );
        note_at("vmwrite", "of an odd component", vmwrite(encoding, 0));
    }
    note(
        "vmwrite of a read-only field",
        vmwrite(field::VM_EXIT_REASON, 0x12),
    );
    log!(
        "instructions/read-only field then: {}",
        Shown(vmread(field::VM_EXIT_REASON))
    );
}

fn invalidations(bed: &Bed) {
    let pointer = bed.ept.pointer();
    for kind in [0, 1, 2, 3, u64::MAX] {
        note_at("invept", "good pointer", invept(kind, [pointer, 0]));
        note_at("invept", "pointer 0", invept(kind, [0, 0]));
        note_at(
            "invept",
            "reserved bits",
            invept(kind, [pointer | 0xf80, 0]),
        );
    }
    for kind in [0, 1, 2, 3, 4, u64::MAX] {
        note_at("invvpid", "VPID 1", invvpid(kind, [1, 0x1000]));
        note_at("invvpid", "VPID 0", invvpid(kind, [0, 0x1000]));
        note_at(
            "invvpid",
            "reserved bits",
            invvpid(kind, [1 << 16 | 1, 0x1000]),
        );
        note_at(
            "invvpid",
            "address not canonical",
            invvpid(kind, [1, 1 << 63]),
        );
    }
}

fn entries(bed: &mut Bed) -> Result<(), VmxError> {
    bed.prepare(Features::default(), calls)?;
    log!(
        "instructions/vmresume before vmlaunch: {}",
        bed.enter_by(How::Resume)
    );
    log!("instructions/vmlaunch: {}", bed.enter_by(How::Launch));
    bed.skip()?;
    log!("instructions/vmlaunch again: {}", bed.enter_by(How::Launch));
    log!(
        "instructions/error number stays: {}",
        Shown(vmread(field::VM_INSTRUCTION_ERROR))
    );
    log!("instructions/vmresume: {}", bed.enter_by(How::Resume));
    bed.skip()?;
    log!(
        "instructions/vmresume behind MOV SS: {}",
        bed.enter_by(How::ResumeBehindMovSs)
    );
    bed.good("vmresume behind MOV SS")?;
    vmclear(bed.child.vmcs)?;
    vmptrld(bed.child.vmcs)?;
    log!(
        "instructions/vmresume after vmclear: {}",
        bed.enter_by(How::Resume)
    );
    log!(
        "instructions/vmlaunch after vmclear: {}",
        bed.enter_by(How::Launch)
    );
    Ok(())
}

/// Everything is #UD outside VMX operation, but VMXON, whose region has rules of its own.
fn outside(bed: &Bed, beyond: u64) -> Result<(), VmxError> {
    vmxoff()?;
    note("vmxoff outside", vmxoff());
    note("vmclear outside", vmclear(bed.page));
    note("vmptrld outside", vmptrld(bed.page));
    note("vmread outside", vmread(field::GUEST_RIP).map(|_| ()));
    note("vmwrite outside", vmwrite(field::GUEST_RIP, 0));
    note("invept outside", invept(2, [0, 0]));
    note("invvpid outside", invvpid(2, [0, 0]));
    note("vmxon misaligned", vmxon(vmx::vmxon_region() | 8));
    note("vmxon beyond memory", vmxon(beyond));
    note("vmxon of a wrong revision", vmxon(bed.page));
    let cr4 = cpu::cr4();
    // SAFETY: outside VMX operation VMXE may be cleared, and comes back two lines below.
    unsafe { cpu::write_cr4(cr4 & !vmx::CR4_VMXE) };
    note("vmxon with CR4.VMXE clear", vmxon(vmx::vmxon_region()));
    // SAFETY: the value that was there.
    unsafe { cpu::write_cr4(cr4) };
    note("vmxon", vmxon(vmx::vmxon_region()));
    Ok(())
}
