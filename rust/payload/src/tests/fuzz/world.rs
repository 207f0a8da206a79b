// SPDX-License-Identifier: GPL-2.0-or-later
//! Three VMCSs, a shadow VMCS, bitmaps, lists and EPTs: what a program works on, and how it is made new.

use super::arena::{self, copy, fill, page, put, Arena, CODE32, CODE64, DATA, TASK};
use super::code::{self, SNIPPETS};
use super::fields::STALE;
use super::Numbers;
use crate::cpu;
use crate::memory::{self, PAGE};
use crate::vmx::child::Registers;
use crate::vmx::field::*;
use crate::vmx::ops::{invept, vmclear, vmptrld, vmread, vmwrite, VmxError};
use crate::vmx::setup::{Child, Features, IA32E_MODE_GUEST};
use crate::vmx::{self, capability};

/// VMCSs of a program.
pub const VMCSS: usize = 3;
/// Kinds of children: three modes of paging with five sets of features, and one without paging.
pub const KINDS: usize = 16;
/// CR0.PG, CR4.PSE and CR4.PAE.
const PG: u64 = 1 << 31;
const PSE: u64 = 1 << 4;
const PAE: u64 = 1 << 5;
/// Primary controls that are always on: HLT exiting, for nobody would wake the child; RDPMC and RDTSC exiting, since what
/// they give varies and a trap behind them would show it.
pub const ALWAYS: u64 = 1 << 7 | 1 << 11 | 1 << 12;
/// The type of an INVEPT of everything.
const ALL_CONTEXTS: u64 = 2;
/// MSRs that a child may change and the payload then has: with what they are made at the start of each program.
const MSRS: [u32; 12] = [
    0xc000_0100,
    0xc000_0101,
    0x174,
    0x175,
    0x176,
    0x277,
    0x1b,
    0xc000_0080,
    0xc000_0081,
    0xc000_0082,
    0xc000_0084,
    0xc000_0102,
];

/// One VMCS and its child.
pub struct Vmcs {
    /// Address of the region.
    pub region: u64,
    /// Its kind: see [`World::new`].
    pub kind: usize,
    /// VMRESUME is due.
    pub launched: bool,
    /// Where the snippets of its child begin.
    pub starts: [u64; SNIPPETS],
    /// The snippet to go on with if the child has lost its way.
    pub next: usize,
    /// Its child had PAE paging when it was entered last.
    pub pae: bool,
    /// Its child's registers.
    pub registers: Registers,
    /// Which one it is.
    number: u64,
}

/// What a capability MSR allows to be 1.
#[derive(Clone, Copy)]
pub struct Allowed {
    pub pin: u64,
    pub primary: u64,
    pub secondary: u64,
    pub exit: u64,
    pub entry: u64,
}

/// Everything.
pub struct World {
    pub arena: Arena,
    pub vmcs: [Vmcs; VMCSS],
    /// Which one is current.
    pub current: usize,
    /// Which one used the VPID last, with its CR3 and, with PAE paging, its PDPTEs.
    pub translated: Option<(usize, u64, [u64; 4])>,
    /// A shadow VMCS.
    pub shadow: u64,
    /// A VMCS for nothing but being the current one.
    pub spare: u64,
    /// Bitmaps: MSRs, I/O ports (two pages), VMREAD, VMWRITE.
    pub bitmaps: u64,
    /// Three lists of MSRs, the virtual APIC page, the page-modification log.
    pub lists: u64,
    pub allowed: Allowed,
    templates: u64,
    /// Words of a region that hold fields which are only noted where they are defined, and their bits.
    stale: [(u64, u64); STALE.len()],
    msrs: [u64; MSRS.len()],
    /// CR0 and CR4 of the payload.
    control: (u64, u64),
}

/// Pages of [`World::bitmaps`].
pub mod bitmap {
    pub const MSR: u64 = 0;
    pub const IO: u64 = 1;
    pub const VMREAD: u64 = 3;
    pub const VMWRITE: u64 = 4;
    pub const PAGES: u64 = 5;
}

/// Pages of [`World::lists`].
pub mod list {
    pub const ENTRY_LOAD: u64 = 0;
    pub const EXIT_STORE: u64 = 1;
    pub const EXIT_LOAD: u64 = 2;
    pub const APIC: u64 = 3;
    pub const LOG: u64 = 4;
    pub const PAGES: u64 = 5;
}

impl World {
    /// Allocates it and draws a template of each kind of VMCS: 0 to 14 are a mode (64-bit, PAE, 32-bit) times five
    /// plus a set of features (none, VPID, EPT, both, these and unrestricted guest), 15 has no paging.
    pub fn new() -> Result<World, VmxError> {
        let arena = Arena::new();
        let high = |msr| capability(msr) >> 32;
        let mut number = 0;
        let mut world = World {
            arena,
            vmcs: [(); VMCSS].map(|()| {
                number += 1;
                Vmcs {
                    region: vmx::new_region(),
                    kind: 0,
                    launched: false,
                    starts: [0; SNIPPETS],
                    next: 0,
                    pae: false,
                    registers: Registers::default(),
                    number: number - 1,
                }
            }),
            current: 0,
            translated: None,
            shadow: super::super::script::new_shadow(),
            spare: vmx::new_region(),
            bitmaps: memory::pages(bitmap::PAGES),
            lists: memory::pages(list::PAGES),
            allowed: Allowed {
                pin: high(0x48d),
                primary: high(0x48e),
                secondary: high(0x48b),
                exit: high(0x48f),
                entry: high(0x490),
            },
            templates: memory::pages(KINDS as u64),
            stale: [(0, 0); STALE.len()],
            msrs: MSRS.map(|msr| cpu::rdmsr(msr).unwrap_or(0)),
            control: (cpu::cr0(), cpu::cr4()),
        };
        world.find_stale()?;
        let child = Child::new();
        for kind in 0..KINDS {
            world.draw(&child, kind)?;
            copy(child.vmcs, world.template(kind), 1);
        }
        Ok(world)
    }

    fn template(&self, kind: usize) -> u64 {
        self.templates + kind as u64 * PAGE
    }

    /// Which words of a region hold the fields that are left out: those that change when the field does.
    fn find_stale(&mut self) -> Result<(), VmxError> {
        for (slot, field) in self.stale.iter_mut().zip(STALE) {
            let mut pages = [0; 2];
            for (page, value) in pages.iter_mut().zip([0, u64::MAX]) {
                *page = vmx::new_region();
                vmclear(*page)?;
                vmptrld(*page)?;
                vmwrite(field, value)?;
                vmclear(*page)?;
            }
            for word in 0..PAGE / 8 {
                let differ = arena::get(pages[0] + word * 8) ^ arena::get(pages[1] + word * 8);
                if differ != 0 {
                    *slot = (word, differ);
                }
            }
        }
        Ok(())
    }

    /// Makes the region of `child` that of a kind, clear.
    fn draw(&self, child: &Child, kind: usize) -> Result<(), VmxError> {
        let (mode, features) = match kind {
            15 => (3, 4),
            _ => (kind / 5, kind % 5),
        };
        let ept = self.arena.epts[0].ept.pointer();
        let features = Features {
            ept: (features >= 2).then_some(ept),
            vpid: (features == 1 || features >= 3).then_some(1),
            unrestricted: features == 4,
        };
        child.prepare(features, super::super::bed::calls)?;
        let wide = mode == 0;
        let set = |field, bits| vmwrite(field, vmread(field)? | bits);
        set(CPU_BASED_VM_EXEC_CONTROL, ALWAYS)?;
        let (cr0, cr4) = (cpu::cr0(), cpu::cr4());
        let at = |page| self.arena.at(page);
        let (cr0, cr3, cr4) = match mode {
            0 => (cr0, at(page::PML4), cr4),
            1 => (cr0, at(page::PAE), cr4),
            2 => (cr0, at(page::PD32), cr4 & !PAE | PSE),
            _ => (cr0 & !PG, 0, cr4),
        };
        if !wide {
            let entry = vmread(VM_ENTRY_CONTROLS)? & !IA32E_MODE_GUEST;
            vmwrite(VM_ENTRY_CONTROLS, entry)?;
            vmwrite(GUEST_IA32_EFER, 0)?;
        }
        for at in [0, 4, 6, 8, 10] {
            vmwrite(GUEST_ES_SELECTOR + at, DATA)?;
        }
        let (selector, rights) = if wide {
            (CODE64, 0xa09b)
        } else {
            (CODE32, 0xc09b)
        };
        for (field, value) in [
            (GUEST_CS_SELECTOR, selector),
            (GUEST_CS_AR_BYTES, rights),
            (GUEST_TR_SELECTOR, TASK),
            (GUEST_TR_BASE, self.arena.tss()),
            (GUEST_GDTR_BASE, at(page::GDT)),
            (GUEST_GDTR_LIMIT, 0x2f),
            (
                GUEST_IDTR_BASE,
                at(if wide { page::IDT } else { page::IDT32 }),
            ),
            (
                GUEST_IDTR_LIMIT,
                arena::VECTORS * if wide { 16 } else { 8 } - 1,
            ),
            (GUEST_CR0, cr0),
            (CR0_READ_SHADOW, cr0),
            (GUEST_CR3, cr3),
            (GUEST_CR4, cr4),
            (CR4_READ_SHADOW, cr4),
            (GUEST_PDPTR0, at(page::PD) | 1),
            (GUEST_PDPTR1, at(page::PD + 1) | 1),
            (GUEST_PDPTR2, 0),
            (GUEST_PDPTR3, 0),
            (MSR_BITMAP, self.bitmaps + bitmap::MSR * PAGE),
            (IO_BITMAP_A, self.bitmaps + bitmap::IO * PAGE),
            (IO_BITMAP_B, self.bitmaps + (bitmap::IO + 1) * PAGE),
            (VMREAD_BITMAP, self.bitmaps + bitmap::VMREAD * PAGE),
            (VMWRITE_BITMAP, self.bitmaps + bitmap::VMWRITE * PAGE),
            (VM_ENTRY_MSR_LOAD_ADDR, self.lists + list::ENTRY_LOAD * PAGE),
            (VM_EXIT_MSR_STORE_ADDR, self.lists + list::EXIT_STORE * PAGE),
            (VM_EXIT_MSR_LOAD_ADDR, self.lists + list::EXIT_LOAD * PAGE),
            (VIRTUAL_APIC_PAGE_ADDR, self.lists + list::APIC * PAGE),
            (APIC_ACCESS_ADDR, at(page::REST)),
        ] {
            vmwrite(field, value)?;
        }
        match vmwrite(PML_ADDRESS, self.lists + list::LOG * PAGE) {
            Ok(()) | Err(VmxError::Valid(_)) => {}
            other => return other,
        }
        vmclear(child.vmcs)
    }

    /// Makes everything as it is at the start of a program, with VMCS 0 current.
    pub fn reset(&mut self, numbers: &mut Numbers) -> Result<(), VmxError> {
        self.arena.reset();
        fill(self.bitmaps, 0, 3);
        fill(self.bitmaps + 3 * PAGE, u64::MAX, 2);
        fill(self.lists, 0, list::PAGES);
        fill(self.shadow, 0, 1);
        super::super::script::set_revision(self.shadow, vmx::revision() | 1 << 31);
        self.restore_processor();
        let _ = invept(ALL_CONTEXTS, [0; 2]);
        for number in (0..VMCSS).rev() {
            self.vmcs[number].kind = numbers.below(KINDS);
            self.vmcs[number].next = 0;
            self.vmcs[number].registers = Registers::default();
            let code = self.arena.at(page::CODE + number as u64);
            self.vmcs[number].starts = code::write(numbers, &self.arena, code);
            self.revive(number)?;
        }
        Ok(())
    }

    /// Makes the payload's own registers what they were: exits of a program's children may have changed them.
    pub fn restore_processor(&self) {
        cpu::reset_segments();
        // SAFETY: what was there when the payload ran by itself.
        unsafe {
            cpu::write_cr0(self.control.0);
            cpu::write_cr4(self.control.1);
        }
        for (msr, value) in MSRS.into_iter().zip(self.msrs) {
            // SAFETY: what was there when the payload ran by itself.
            let _ = unsafe { cpu::wrmsr(msr, value) };
        }
        cpu::reset_debug();
    }

    /// Makes a VMCS, which is clear or not, new and current.
    pub fn revive(&mut self, number: usize) -> Result<(), VmxError> {
        let region = self.vmcs[number].region;
        vmclear(region)?;
        copy(self.template(self.vmcs[number].kind), region, 1);
        vmptrld(region)?;
        self.current = number;
        self.vmcs[number].launched = false;
        self.lead()
    }

    /// The current VMCS.
    pub fn vmcs(&mut self) -> &mut Vmcs {
        &mut self.vmcs[self.current]
    }

    /// Top of the stack of the current VMCS's child.
    pub fn stack(&mut self) -> u64 {
        self.arena
            .at(page::STACK + self.vmcs[self.current].number + 1)
            - 64
    }

    /// Leads the current VMCS's child to its next snippet.
    pub fn lead(&mut self) -> Result<(), VmxError> {
        let stack = self.stack();
        let vmcs = self.vmcs();
        vmcs.next = (vmcs.next + 1) % SNIPPETS;
        vmwrite(GUEST_RIP, vmcs.starts[vmcs.next])?;
        vmwrite(GUEST_RSP, stack)?;
        vmwrite(GUEST_RFLAGS, 2)?;
        vmwrite(GUEST_INTERRUPTIBILITY_INFO, 0)
    }

    /// Invalidates what is cached of the EPTs.
    pub fn invalidate(&self) -> Result<(), VmxError> {
        invept(ALL_CONTEXTS, [0; 2])
    }

    /// The sum of a region, without fields that are not defined.
    pub fn region_sum(&self, region: u64) -> u64 {
        (0..PAGE / 8).fold(0, |sum, word| {
            let mut value = arena::get(region + word * 8);
            for (at, bits) in self.stale {
                if at == word {
                    value &= !bits;
                }
            }
            super::super::model::fold(sum, value)
        })
    }

    /// Writes an entry of a list of MSRs.
    pub fn list_entry(&self, list: u64, at: u64, msr: u64, value: u64) {
        let entry = self.lists + list * PAGE + at * 16;
        put(entry, msr);
        put(entry + 8, value);
    }
}
