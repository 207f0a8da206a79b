// SPDX-License-Identifier: GPL-2.0-or-later
//! Changes to the current VMCS and to what it names that an entry normally survives.

use super::arena::{get, page, put, Arena, CODE64, DATA, PAGES, TASK, TOUCHED};
use super::fields::OF_CHILDREN;
use super::log::Log;
use super::world::{bitmap, list, World};
use super::Numbers;
use crate::memory::PAGE;
use crate::vmx::field::*;
use crate::vmx::ops::{vmread, vmwrite, VmxError};

/// Exceptions worth a bit in the bitmap.
const EXCEPTIONS: [u64; 9] = [0, 1, 3, 6, 7, 8, 12, 13, 14];
/// Bits of the primary controls to turn on and off, as far as they are allowed.
const PRIMARY: [u64; 16] = [2, 3, 9, 10, 15, 16, 19, 20, 22, 23, 24, 25, 27, 28, 29, 30];
/// Of the secondary ones: descriptor tables, RDTSCP, WBINVD, RDRAND, INVPCID, RDSEED, XSAVES, TSC scaling.
const SECONDARY: [u64; 8] = [2, 3, 6, 11, 12, 16, 20, 25];
/// Of the exit controls: debug controls, PERF_GLOBAL_CTRL, interrupt acknowledgement, PAT, EFER (saved), timer.
const EXIT: [u64; 6] = [2, 12, 15, 18, 20, 22];
/// Of the entry controls: debug controls, PAT.
const ENTRY: [u64; 2] = [2, 14];
/// Secondary: virtualize APIC accesses, VMCS shadowing, page-modification log.
const APIC_ACCESSES: u64 = 1 << 0;
const SHADOWING: u64 = 1 << 14;
const PML: u64 = 1 << 17;
/// Primary: TPR shadow. Pin-based: NMI exiting, virtual NMIs, preemption timer.
const TPR_SHADOW: u64 = 1 << 21;
const NMI_EXITING: u64 = 1 << 3;
const VIRTUAL_NMIS: u64 = 1 << 5;
pub const TIMER: u64 = 1 << 6;

fn any(numbers: &mut Numbers, of: &[u64]) -> u64 {
    of[numbers.below(of.len())]
}

/// Flips a bit, if it may be 1.
fn flip(field: u32, bit: u64, allowed: u64) -> Result<(), VmxError> {
    if allowed >> bit & 1 == 1 {
        vmwrite(field, vmread(field)? ^ 1 << bit)?;
    }
    Ok(())
}

fn set(field: u32, bits: u64, on: bool) -> Result<(), VmxError> {
    let value = vmread(field)?;
    vmwrite(field, if on { value | bits } else { value & !bits })
}

/// Makes one change.
pub fn edit(world: &mut World, numbers: &mut Numbers, log: &mut Log) -> Result<(), VmxError> {
    let which = numbers.below(34);
    log.does("edit", &[which as u64]);
    let allowed = world.allowed;
    match which {
        0 => {
            let mut bits = 0;
            for _ in 0..numbers.below(4) {
                bits |= 1 << any(numbers, &EXCEPTIONS);
            }
            vmwrite(EXCEPTION_BITMAP, bits)
        }
        1 => {
            vmwrite(PAGE_FAULT_ERROR_CODE_MASK, any(numbers, &[0, 2, 1, 0x13]))?;
            vmwrite(PAGE_FAULT_ERROR_CODE_MATCH, any(numbers, &[0, 2, 1]))
        }
        2 => {
            let nmis = any(numbers, &[0, NMI_EXITING, NMI_EXITING | VIRTUAL_NMIS]);
            set(PIN_BASED_VM_EXEC_CONTROL, NMI_EXITING | VIRTUAL_NMIS, false)?;
            set(PIN_BASED_VM_EXEC_CONTROL, nmis & allowed.pin, true)
        }
        3 => {
            let timer = any(numbers, &[0, TIMER]) & allowed.pin;
            set(PIN_BASED_VM_EXEC_CONTROL, TIMER, false)?;
            set(PIN_BASED_VM_EXEC_CONTROL, timer, true)?;
            vmwrite(VMX_PREEMPTION_TIMER_VALUE, any(numbers, &[0, 0xffff_ffff]))
        }
        4 => flip(PIN_BASED_VM_EXEC_CONTROL, 0, allowed.pin),
        5..10 => {
            let bit = any(numbers, &PRIMARY);
            flip(CPU_BASED_VM_EXEC_CONTROL, bit, allowed.primary)
        }
        10 | 11 => {
            let bit = any(numbers, &SECONDARY);
            flip(SECONDARY_VM_EXEC_CONTROL, bit, allowed.secondary)
        }
        12 => {
            vmwrite(
                HOST_IA32_PAT,
                any(numbers, &[0x0007_0406_0007_0406, 0x0606]),
            )?;
            flip(VM_EXIT_CONTROLS, any(numbers, &EXIT), allowed.exit)
        }
        13 => {
            vmwrite(
                GUEST_IA32_PAT,
                any(numbers, &[0x0007_0406_0007_0406, 0x0606]),
            )?;
            flip(VM_ENTRY_CONTROLS, any(numbers, &ENTRY), allowed.entry)
        }
        14 => {
            // EFER as the child has it anyhow, and the payload's own at the exit.
            let efer = match vmread(VM_ENTRY_CONTROLS)? >> 9 & 1 {
                1 => 0x500,
                _ => 0,
            };
            vmwrite(GUEST_IA32_EFER, efer | any(numbers, &[0, 1, 0x800]))?;
            flip(VM_ENTRY_CONTROLS, 15, allowed.entry)
        }
        15 => {
            vmwrite(HOST_IA32_EFER, any(numbers, &[0x500, 0x501, 0xd01]))?;
            flip(VM_EXIT_CONTROLS, 21, allowed.exit)
        }
        16 => {
            vmwrite(
                CR0_GUEST_HOST_MASK,
                any(numbers, &[0, 8, 0xa, 1 << 31 | 1, !0]),
            )?;
            let shadow = vmread(GUEST_CR0)? ^ any(numbers, &[0, 8, 2]);
            vmwrite(CR0_READ_SHADOW, shadow)
        }
        17 => {
            let mask = any(numbers, &[0, 0x80, 0x2000, 0x2020, !0]);
            vmwrite(CR4_GUEST_HOST_MASK, mask)?;
            let shadow = vmread(GUEST_CR4)? ^ any(numbers, &[0, 0x80, 0x2000]);
            vmwrite(CR4_READ_SHADOW, shadow)
        }
        18 => {
            vmwrite(CR3_TARGET_COUNT, numbers.below(5) as u64)?;
            // KVM has no such values.
            vmwrite(CR3_TARGET_VALUE0, vmread(GUEST_CR3)?).or(Ok(()))
        }
        19 => {
            let bits = any(numbers, &[8, 2, 1 << 16, 1 << 18]);
            vmwrite(GUEST_CR0, vmread(GUEST_CR0)? ^ bits)
        }
        20 => {
            let bits = any(numbers, &[0x80, 8, 4, 0x400, 0x40]);
            vmwrite(GUEST_CR4, vmread(GUEST_CR4)? ^ bits)
        }
        21 => segment(numbers),
        22 => {
            let field = GUEST_SYSENTER_ESP + 2 * numbers.below(2) as u32;
            vmwrite(field, numbers.next() >> 20)?;
            vmwrite(GUEST_SYSENTER_CS, numbers.next())?;
            vmwrite(GUEST_DR7, any(numbers, &[0x400, 0x401, 0x2400, 0x700]))
        }
        23 => {
            let flags = any(
                numbers,
                &[2, 0x202, 0x202, 0x102, 0x302, 0x4_0002, 0x1_0202],
            );
            vmwrite(GUEST_RFLAGS, flags)?;
            let blocked = any(numbers, &[0, 0, 1, 2, 8]);
            vmwrite(GUEST_INTERRUPTIBILITY_INFO, blocked)?;
            vmwrite(
                GUEST_PENDING_DBG_EXCEPTIONS,
                any(numbers, &[0, 0, 0x1001, 0x4000]),
            )
        }
        24 => {
            vmwrite(HOST_FS_BASE, numbers.next() >> 17)?;
            vmwrite(
                HOST_GS_BASE,
                any(numbers, &[0, 0x1000, 0xffff_8000_0000_0000]),
            )?;
            vmwrite(HOST_IA32_SYSENTER_ESP, numbers.next() >> 17)?;
            vmwrite(HOST_IA32_SYSENTER_CS, numbers.next() & 0xffff)
        }
        25 => {
            // Data selectors that the payload can do without.
            let selector = any(numbers, &[0, 0x10]);
            vmwrite(HOST_FS_SELECTOR, selector)?;
            vmwrite(HOST_GS_SELECTOR, any(numbers, &[0, 0x10]))?;
            vmwrite(
                HOST_CR4,
                vmread(HOST_CR4)? ^ any(numbers, &[0x80, 0x400, 4, 8]),
            )
        }
        26 => {
            vmwrite(TSC_OFFSET, numbers.next())?;
            vmwrite(TSC_MULTIPLIER, any(numbers, &[1 << 48, 1 << 47, 3 << 48])).or(Ok(()))
        }
        27 => lists(world, numbers),
        28 => {
            let tpr = numbers.below(16) as u64;
            put(world.lists + list::APIC * PAGE + 0x80, tpr << 4);
            let threshold = if numbers.below(4) == 0 {
                tpr + 1
            } else {
                tpr / 2
            };
            vmwrite(TPR_THRESHOLD, threshold & 15)?;
            let on = numbers.below(3) > 0;
            set(CPU_BASED_VM_EXEC_CONTROL, TPR_SHADOW & allowed.primary, on)
        }
        29 => {
            let on = numbers.below(2) == 0;
            set(
                SECONDARY_VM_EXEC_CONTROL,
                APIC_ACCESSES & allowed.secondary,
                on,
            )?;
            vmwrite(APIC_ACCESS_ADDR, world.arena.at(page::REST))
        }
        30 => {
            vmwrite(VIRTUAL_PROCESSOR_ID, any(numbers, &[1, 2, 0xffff]))?;
            let ept = vmread(EPT_POINTER)?;
            if ept == 0 {
                return Ok(());
            }
            let other = world.arena.epts[numbers.below(2)].ept.pointer();
            vmwrite(EPT_POINTER, other ^ any(numbers, &[0, 0, 0, 0x40]))
        }
        31 => {
            let on = numbers.below(3) > 0;
            set(SECONDARY_VM_EXEC_CONTROL, SHADOWING & allowed.secondary, on)?;
            let link = if numbers.below(8) > 0 {
                world.shadow
            } else {
                !0
            };
            vmwrite(VMCS_LINK_POINTER, link)
        }
        32 => {
            let on = numbers.below(3) > 0;
            set(SECONDARY_VM_EXEC_CONTROL, PML & allowed.secondary, on)?;
            vmwrite(GUEST_PML_INDEX, any(numbers, &[511, 511, 1, 0, 0xffff])).or(Ok(()))
        }
        _ => {
            // Registers for the child's instructions.
            let address = super::code::address(numbers, &world.arena);
            let value = numbers.next();
            let registers = &mut world.vmcs().registers;
            registers.rax = address;
            registers.rbx = value;
            registers.r8[numbers.below(8)] = value;
            Ok(())
        }
    }
}

/// A segment register with something that is valid, or about to be.
fn segment(numbers: &mut Numbers) -> Result<(), VmxError> {
    // ES, SS, DS, FS, GS, LDTR; the other ones carry the child.
    let at = any(numbers, &[0, 6, 8, 10, 12]) as u32;
    vmwrite(
        GUEST_ES_SELECTOR + at,
        any(numbers, &[0, DATA, DATA | 3, CODE64, TASK]),
    )?;
    vmwrite(GUEST_ES_BASE + at, any(numbers, &[0, 0x1000, 0x7fff_f000]))?;
    vmwrite(
        GUEST_ES_LIMIT + at,
        any(numbers, &[0xffff_ffff, 0xffff, 0xf_ffff]),
    )?;
    let rights = match at {
        12 => any(numbers, &[0x82, 0x1_0000, 0x1_0082]),
        _ => any(
            numbers,
            &[0xc093, 0x4093, 0x1_0000, 0x1_c093, 0xc091, 0xc0f3],
        ),
    };
    vmwrite(GUEST_ES_AR_BYTES + at, rights)
}

/// Lists of MSRs. An entry that cannot be stored or loaded at an exit is a VMX abort, which ends L1, so only the list
/// for entries has bad ones.
fn lists(world: &mut World, numbers: &mut Numbers) -> Result<(), VmxError> {
    const GOOD: [u64; 4] = [0xc000_0102, 0xc000_0081, 0xc000_0084, 0xc000_0082];
    const BAD: [u64; 4] = [0xc000_0100, 0x800, 0x1_c000_0102, 0xdead_beef];
    let which = numbers.below(3) as u64;
    let count = numbers.below(4) as u64;
    for at in 0..count {
        let good = any(numbers, &GOOD);
        let bad = which == list::ENTRY_LOAD && numbers.below(6) == 0;
        let msr = if bad { any(numbers, &BAD) } else { good };
        let value = any(numbers, &[0, 0x1000, 0x7fff_0000_0000]) + at;
        world.list_entry(which, at, msr, value);
    }
    let field = match which {
        list::ENTRY_LOAD => VM_ENTRY_MSR_LOAD_COUNT,
        list::EXIT_STORE => VM_EXIT_MSR_STORE_COUNT,
        _ => VM_EXIT_MSR_LOAD_COUNT,
    };
    vmwrite(field, count)
}

/// Changes a bit of a bitmap.
pub fn bit(world: &World, numbers: &mut Numbers, log: &Log) {
    let (page, bit) = match numbers.below(4) {
        0 => {
            let msr = any(numbers, &super::code::MSRS);
            let high = if msr >= 0xc000_0000 { 0x2000 } else { 0 };
            let write = any(numbers, &[0, 0x4000]);
            (bitmap::MSR, (msr & 0x1fff) + high + write)
        }
        1 => (
            bitmap::IO,
            any(numbers, &[0x80, 0x4d10, 0x4d30, 0xfffe, 0x81]),
        ),
        which => (
            bitmap::VMREAD + which as u64 - 2,
            any(numbers, &OF_CHILDREN) & 0x7fff,
        ),
    };
    log.does("bit", &[page, bit]);
    let word = world.bitmaps + page * PAGE + bit / 64 * 8;
    put(word, get(word) ^ 1 << (bit & 63));
}

/// Changes an entry of an EPT, or all back, and invalidates: whether an old entry is still used is up to the processor.
pub fn ept(world: &World, numbers: &mut Numbers, log: &mut Log) -> Result<(), VmxError> {
    let tables = world.arena.epts[if numbers.below(4) == 0 { 1 } else { 0 }];
    for _ in 0..1 + numbers.below(4) {
        // Data and the touch region, now and then what the child cannot do without.
        let page = match numbers.below(8) {
            0 => numbers.below(PAGES as usize) as u64,
            1..4 => page::DATA + numbers.below(4) as u64,
            _ => PAGES + numbers.below(TOUCHED as usize + 8) as u64,
        };
        let entry = tables.entry(page);
        let original = match tables.original(page) {
            0 => touch(page),
            original => original,
        };
        let kind = numbers.below(12);
        log.does("EPT entry", &[page, kind as u64]);
        put(
            entry,
            match kind {
                0 => 0,
                1 => original & !2,
                2 => original & !4,
                3 => original & !0x300,
                4 => original & !0x200,
                5 => original & !6,
                6 => original & !1,
                7 => original & !7 | 2,
                8 => original & !0x38 | 2 << 3,
                9 => original | 1 << 51,
                10 => original ^ 0x1000,
                _ => original,
            },
        );
    }
    world.invalidate()
}

fn touch(page: u64) -> u64 {
    protocol::ports::TOUCH_BASE + (page - PAGES) * PAGE | crate::vmx::ept::LEAF
}

/// Writes to memory that children see.
pub fn memory(arena: &Arena, numbers: &mut Numbers) {
    let offset = numbers.next() & 0xff8;
    let page = match numbers.below(2) {
        0 => arena.at(page::DATA + numbers.below(4) as u64),
        _ => protocol::ports::TOUCH_BASE + numbers.below(TOUCHED as usize) as u64 * PAGE,
    };
    put(page + offset, numbers.next());
}
