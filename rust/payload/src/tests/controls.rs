// SPDX-License-Identifier: GPL-2.0-or-later
//! Consistency checks of the VM-execution, VM-exit and VM-entry control fields (SDM volume 3, 28.2.1),
//! violated one at a time. Each failure is an error 7 that must leave no trace: the next entry is good.

use super::bed::{calls, Bed};
use crate::cpu;
use crate::vmx::field::*;
use crate::vmx::ops::{vmread, VmxError};
use crate::vmx::setup::Features;

const PIN: u32 = PIN_BASED_VM_EXEC_CONTROL;
const PROC: u32 = CPU_BASED_VM_EXEC_CONTROL;
const SECOND: u32 = SECONDARY_VM_EXEC_CONTROL;

/// The group.
pub fn run() -> Result<(), VmxError> {
    let mut bed = Bed::new("controls");
    bed.prepare(Features::default(), calls)?;
    bed.good("start")?;
    capabilities(&mut bed)?;
    execution(&mut bed)?;
    entry_event(&mut bed)?;
    msr_lists(&mut bed)?;
    bed.prepare(bed.modern(), calls)?;
    bed.good("start with EPT")?;
    ept(&mut bed)
}

/// Bits that the capability MSRs do not allow.
fn capabilities(bed: &mut Bed) -> Result<(), VmxError> {
    bed.violate("pin-based all clear", &[(PIN, 0)])?;
    bed.flip("pin-based reserved", PIN, 1 << 31, 0)?;
    bed.violate("processor-based all clear", &[(PROC, 0)])?;
    bed.flip("processor-based reserved", PROC, 1 << 0, 0)?;
    bed.violate("secondary reserved", &[(SECOND, 1 << 31)])?;
    bed.violate("exit all clear", &[(VM_EXIT_CONTROLS, 0)])?;
    bed.flip("exit reserved", VM_EXIT_CONTROLS, 1 << 31, 0)?;
    bed.violate("entry all clear", &[(VM_ENTRY_CONTROLS, 0)])?;
    bed.flip("entry reserved", VM_ENTRY_CONTROLS, 1 << 31, 0)?;
    bed.flip("entry to SMM", VM_ENTRY_CONTROLS, 1 << 10, 0)?;
    bed.flip("deactivate dual-monitor", VM_ENTRY_CONTROLS, 1 << 11, 0)
}

fn execution(bed: &mut Bed) -> Result<(), VmxError> {
    let (pin, processor) = (vmread(PIN)?, vmread(PROC)?);
    let beyond = 1u64 << cpu::physical_bits();
    let page = bed.page;
    bed.violate("CR3 targets", &[(CR3_TARGET_COUNT, 5)])?;
    for (what, address) in [
        ("good", page),
        ("misaligned", page | 0x800),
        ("beyond", beyond),
    ] {
        let mut case = |name: &str, changes: &[(u32, u64)]| {
            let mut title = Title::new();
            title.push(name);
            title.push(" ");
            title.push(what);
            bed.violate(title.as_str(), changes)
        };
        case(
            "I/O bitmap A",
            &[
                (PROC, processor | 1 << 25),
                (IO_BITMAP_A, address),
                (IO_BITMAP_B, page),
            ],
        )?;
        case(
            "I/O bitmap B",
            &[
                (PROC, processor | 1 << 25),
                (IO_BITMAP_A, page),
                (IO_BITMAP_B, address),
            ],
        )?;
        case(
            "MSR bitmap",
            &[(PROC, processor | 1 << 28), (MSR_BITMAP, address)],
        )?;
        case(
            "virtual APIC page",
            &[
                (PROC, processor | 1 << 21),
                (VIRTUAL_APIC_PAGE_ADDR, address),
            ],
        )?;
        case(
            "APIC access page",
            &[(SECOND, 1 << 0), (APIC_ACCESS_ADDR, address)],
        )?;
        case(
            "VMREAD bitmap",
            &[
                (SECOND, 1 << 14),
                (VMREAD_BITMAP, address),
                (VMWRITE_BITMAP, page),
            ],
        )?;
        case(
            "VMWRITE bitmap",
            &[
                (SECOND, 1 << 14),
                (VMREAD_BITMAP, page),
                (VMWRITE_BITMAP, address),
            ],
        )?;
    }
    let shadow = (PROC, processor | 1 << 21);
    let apic_page = (VIRTUAL_APIC_PAGE_ADDR, page);
    bed.violate("TPR threshold", &[shadow, apic_page, (TPR_THRESHOLD, 0x10)])?;
    bed.violate(
        "x2APIC and APIC accesses",
        &[
            shadow,
            apic_page,
            (APIC_ACCESS_ADDR, page),
            (SECOND, 1 << 4 | 1),
        ],
    )?;
    bed.violate("x2APIC without TPR shadow", &[(SECOND, 1 << 4)])?;
    bed.violate(
        "register virtualization without TPR shadow",
        &[(SECOND, 1 << 8)],
    )?;
    bed.violate(
        "interrupt delivery without interrupt exiting",
        &[shadow, apic_page, (SECOND, 1 << 9)],
    )?;
    bed.violate(
        "interrupt delivery",
        &[shadow, apic_page, (SECOND, 1 << 9), (PIN, pin | 1)],
    )?;
    bed.violate(
        "posted interrupts without delivery",
        &[(PIN, pin | 1 << 7 | 1)],
    )?;
    bed.violate("virtual NMIs without NMI exiting", &[(PIN, pin | 1 << 5)])?;
    bed.violate("virtual NMIs", &[(PIN, pin | 1 << 5 | 1 << 3)])?;
    bed.violate(
        "NMI window without virtual NMIs",
        &[(PROC, processor | 1 << 22)],
    )?;
    bed.violate("PML without EPT", &[(SECOND, 1 << 17)])?;
    bed.violate("unrestricted guest without EPT", &[(SECOND, 1 << 7)])?;
    bed.violate(
        "mode-based execute control without EPT",
        &[(SECOND, 1 << 22)],
    )?;
    bed.violate("VPID 0", &[(SECOND, 1 << 5), (VIRTUAL_PROCESSOR_ID, 0)])?;
    bed.violate("VPID 1", &[(SECOND, 1 << 5), (VIRTUAL_PROCESSOR_ID, 1)])?;
    bed.flip(
        "save preemption timer without it",
        VM_EXIT_CONTROLS,
        1 << 22,
        0,
    )?;
    bed.violate(
        "VM functions reserved",
        &[(SECOND, 1 << 13), (VM_FUNCTION_CONTROL, 1 << 63)],
    )?;
    bed.violate(
        "EPTP switching without EPT",
        &[
            (SECOND, 1 << 13),
            (VM_FUNCTION_CONTROL, 1),
            (EPTP_LIST_ADDRESS, page),
        ],
    )?;
    bed.violate(
        "TSC multiplier 0",
        &[(SECOND, 1 << 25), (TSC_MULTIPLIER, 0)],
    )?;
    bed.violate(
        "TSC multiplier 1",
        &[(SECOND, 1 << 25), (TSC_MULTIPLIER, 1 << 48)],
    )
}

/// The event to inject (28.2.1.3). Entries that would succeed are left to the events group.
fn entry_event(bed: &mut Bed) -> Result<(), VmxError> {
    const VALID: u64 = 1 << 31;
    const ERROR_CODE: u64 = 1 << 11;
    let cases = [
        ("type reserved", VALID | 1 << 8 | 3, 0, 0),
        ("type other, vector 1", VALID | 7 << 8 | 1, 0, 0),
        ("NMI, vector 3", VALID | 2 << 8 | 3, 0, 0),
        ("exception, vector 32", VALID | 3 << 8 | 32, 0, 0),
        (
            "exception #GP without error code",
            VALID | 3 << 8 | 13,
            0,
            0,
        ),
        (
            "exception #UD with error code",
            VALID | 3 << 8 | 6 | ERROR_CODE,
            0,
            0,
        ),
        ("interrupt with error code", VALID | 0x30 | ERROR_CODE, 0, 0),
        (
            "error code too wide",
            VALID | 3 << 8 | 13 | ERROR_CODE,
            1 << 16,
            0,
        ),
        ("reserved bit 12", VALID | 3 << 8 | 6 | 1 << 12, 0, 0),
        ("reserved bit 30", VALID | 3 << 8 | 6 | 1 << 30, 0, 0),
        (
            "software interrupt of 16 bytes",
            VALID | 4 << 8 | 0x30,
            0,
            16,
        ),
        ("software exception of 16 bytes", VALID | 6 << 8 | 3, 0, 16),
        (
            "privileged exception of 16 bytes",
            VALID | 5 << 8 | 1,
            0,
            16,
        ),
    ];
    for (name, info, error, length) in cases {
        bed.violate(
            name,
            &[
                (VM_ENTRY_INTR_INFO_FIELD, info),
                (VM_ENTRY_EXCEPTION_ERROR_CODE, error),
                (VM_ENTRY_INSTRUCTION_LEN, length),
            ],
        )?;
    }
    Ok(())
}

fn msr_lists(bed: &mut Bed) -> Result<(), VmxError> {
    let page = bed.page;
    let beyond = 1u64 << cpu::physical_bits();
    let lists = [
        (
            "exit store",
            VM_EXIT_MSR_STORE_COUNT,
            VM_EXIT_MSR_STORE_ADDR,
        ),
        ("exit load", VM_EXIT_MSR_LOAD_COUNT, VM_EXIT_MSR_LOAD_ADDR),
        (
            "entry load",
            VM_ENTRY_MSR_LOAD_COUNT,
            VM_ENTRY_MSR_LOAD_ADDR,
        ),
    ];
    for (list, count, address) in lists {
        for (what, entries, at) in [
            ("misaligned", 1, page | 8),
            ("beyond", 1, beyond),
            ("across the end", 2, beyond - 16),
            ("too long", 1 << 20, page),
        ] {
            let mut title = Title::new();
            title.push(list);
            title.push(" list ");
            title.push(what);
            bed.violate(title.as_str(), &[(count, entries), (address, at)])?;
        }
    }
    Ok(())
}

/// Checks that only apply with EPT on.
fn ept(bed: &mut Bed) -> Result<(), VmxError> {
    let pointer = vmread(EPT_POINTER)?;
    let second = vmread(SECOND)?;
    let beyond = 1u64 << cpu::physical_bits();
    let page = bed.page;
    let pointers = [
        ("memory type 1", pointer & !7 | 1),
        ("memory type 7", pointer & !7 | 7),
        ("walk of 3", pointer & !0x38 | 2 << 3),
        ("walk of 6", pointer & !0x38 | 5 << 3),
        ("bit 7", pointer | 1 << 7),
        ("bit 11", pointer | 1 << 11),
        ("beyond", pointer | beyond),
    ];
    for (name, value) in pointers {
        let mut title = Title::new();
        title.push("EPT pointer ");
        title.push(name);
        bed.violate(title.as_str(), &[(EPT_POINTER, value)])?;
    }
    bed.violate(
        "PML misaligned",
        &[(SECOND, second | 1 << 17), (PML_ADDRESS, page | 8)],
    )?;
    bed.violate(
        "PML beyond",
        &[(SECOND, second | 1 << 17), (PML_ADDRESS, beyond)],
    )?;
    bed.violate(
        "PML",
        &[
            (SECOND, second | 1 << 17),
            (PML_ADDRESS, page),
            (GUEST_PML_INDEX, 511),
        ],
    )?;
    bed.violate(
        "EPTP list misaligned",
        &[
            (SECOND, second | 1 << 13),
            (VM_FUNCTION_CONTROL, 1),
            (EPTP_LIST_ADDRESS, page | 8),
        ],
    )?;
    bed.violate("VPID 0 with EPT", &[(VIRTUAL_PROCESSOR_ID, 0)])
}

/// A test's name put together of parts.
pub struct Title {
    text: [u8; 96],
    used: usize,
}

impl Title {
    /// Empty.
    pub fn new() -> Title {
        Title {
            text: [0; 96],
            used: 0,
        }
    }

    /// Adds a part; names are short enough.
    pub fn push(&mut self, part: &str) {
        self.text[self.used..self.used + part.len()].copy_from_slice(part.as_bytes());
        self.used += part.len();
    }

    /// All parts.
    pub fn as_str(&self) -> &str {
        core::str::from_utf8(&self.text[..self.used]).unwrap_or("?")
    }
}
