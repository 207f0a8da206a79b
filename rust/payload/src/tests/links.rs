// SPDX-License-Identifier: GPL-2.0-or-later
//! VMCS link pointers and shadowing bitmaps that are bad, borderline or change owners, and operands of the
//! child's VMREAD and VMWRITE that cannot be reached.

use protocol::ports::TOUCH_BASE;

use super::log;
use super::model::{fold, page_sum, Model, Numbers};
use super::script::{
    available, new_shadow, set_revision, with_current, Form, Scripted, VMCS_SHADOWING,
};
use crate::cpu;
use crate::memory;
use crate::vmx::field::*;
use crate::vmx::ops::{vmclear, vmptrld, vmread, vmwrite, VmxError};
use crate::vmx::{self, vmxon_region};

/// A guest-physical page that nobody has given the payload memory for.
const UNBACKED: u64 = 0x3000_0000;
/// Not in the payload's page tables.
const UNMAPPED: u64 = 1 << 40;
const NOT_CANONICAL: u64 = 1 << 62;
const PF: u64 = 1 << 14;
const GP: u64 = 1 << 13;

/// The group.
pub fn run(level: u32) -> Result<(), VmxError> {
    if !available() {
        log!("links/not available");
        return Ok(());
    }
    let mut links = Links {
        mains: [(); 2].map(|()| Scripted::new("links", 64)),
        shadows: [(); 3].map(|()| new_shadow()),
        model: Model::new("links", 3)?,
        numbers: Numbers::new(5),
    };
    links.shadows.into_iter().try_for_each(vmclear)?;
    links.pointers()?;
    links.bitmaps()?;
    links.operands()?;
    links.owners(if level > 1 { 12 } else { 120 })?;
    for vmcs in links
        .shadows
        .into_iter()
        .chain([links.vmcs(0), links.vmcs(1)])
    {
        vmclear(vmcs)?;
    }
    for (number, shadow) in links.shadows.into_iter().enumerate() {
        log!(
            "links/shadow VMCS {}: region {:#x}",
            number,
            page_sum(shadow)
        );
    }
    log!("links/wrong {}", links.model.wrong());
    Ok(())
}

struct Links {
    mains: [Scripted; 2],
    shadows: [u64; 3],
    model: Model,
    numbers: Numbers,
}

impl Links {
    fn vmcs(&self, main: usize) -> u64 {
        self.mains[main].bed.child.vmcs
    }

    /// A few accesses, whose results are logged in full.
    fn probe(&mut self, main: usize, name: &str) -> Result<(), VmxError> {
        let main = &mut self.mains[main];
        main.clear();
        for (form, field) in [
            (Form::Read, 0x681e),
            (Form::Write, 0x0802),
            (Form::ReadMemory, 0x0802),
            (Form::Write, 0x4402),
            (Form::Read, 0x0004),
            (Form::Write, 0x0004),
            (Form::Read, 0x8000),
            (Form::Read, 0x4400),
        ] {
            main.push(form, field, 0x5a5a);
        }
        if !main.run(name)? {
            return Ok(());
        }
        let [a, b, c, d, e, f, g, h] = [0, 1, 2, 3, 4, 5, 6, 7].map(|at| {
            let step = main.steps()[at];
            Shown(step.left != 0, step.value, step.flags)
        });
        log!(
            "links/{}: {} {} {} {} {} {} {} {}",
            name,
            a,
            b,
            c,
            d,
            e,
            f,
            g,
            h
        );
        log!(
            "links/{}: {} exits {:#x}, parent's error number {:#x}",
            name,
            main.count,
            main.exits,
            vmread(VM_INSTRUCTION_ERROR)?
        );
        Ok(())
    }

    /// Everything that a link pointer can be.
    fn pointers(&mut self) -> Result<(), VmxError> {
        let shadow = self.shadows[0];
        let ordinary = vmx::new_region();
        let launched = self.vmcs(1);
        let (revised, data) = (new_shadow(), memory::pages(1));
        self.mains[1].prepare(false, shadow)?;
        self.mains[1].clear();
        self.mains[1].run("other child")?;
        vmclear(revised)?;
        set_revision(revised, vmx::revision() ^ 1 | 1 << 31);
        let current = self.vmcs(0);
        self.mains[0].prepare(true, shadow)?;
        self.mains[0].fill(false, false);
        let cases = [
            ("a shadow VMCS", shadow),
            ("none", u64::MAX),
            ("misaligned", shadow | 0x10),
            ("beyond memory", 1u64 << cpu::physical_bits()),
            ("not canonical", 1 << 63),
            ("zero", 0),
            ("unbacked", UNBACKED),
            ("current VMCS", current),
            ("an ordinary VMCS", ordinary),
            ("a launched VMCS", launched),
            ("VMXON region", vmxon_region()),
            ("no revision", data),
            ("wrong revision", revised),
        ];
        for fill in [false, true] {
            self.mains[0].fill(fill, fill);
            for (number, (name, link)) in cases.into_iter().enumerate() {
                vmwrite(VMCS_LINK_POINTER, link)?;
                self.probe(0, name)?;
                // Never twice the same: after a page without memory KVM 7.3 takes the one before it for bad as
                // well (kvm_gfn_to_hva_cache_init() leaves its address with no memory behind it).
                vmwrite(VMCS_LINK_POINTER, self.shadows[1 + number % 2])?;
                self.mains[0].clear();
                self.mains[0].run("good entry afterwards")?;
            }
        }
        // A shadow VMCS that ceases to be one while nobody looks.
        self.mains[0].fill(false, false);
        vmclear(shadow)?;
        set_revision(shadow, vmx::revision());
        self.probe(0, "no longer a shadow VMCS")?;
        set_revision(shadow, vmx::revision() | 1 << 31);
        self.probe(0, "a shadow VMCS again")?;
        // Without the control a link pointer is checked all the same, and nothing reaches it.
        let secondary = vmread(SECONDARY_VM_EXEC_CONTROL)?;
        vmwrite(SECONDARY_VM_EXEC_CONTROL, secondary & !VMCS_SHADOWING)?;
        for (name, link) in cases {
            vmwrite(VMCS_LINK_POINTER, link)?;
            let mut title = super::controls::Title::new();
            title.push("control clear, ");
            title.push(name);
            self.probe(0, title.as_str())?;
        }
        vmwrite(SECONDARY_VM_EXEC_CONTROL, secondary)?;
        vmwrite(VMCS_LINK_POINTER, shadow)?;
        self.probe(0, "control set again")
    }

    /// Everything that a bitmap's address can be.
    fn bitmaps(&mut self) -> Result<(), VmxError> {
        self.mains[0].prepare(true, self.shadows[0])?;
        self.mains[0].fill(false, false);
        let page = self.mains[0].read_bitmap;
        let ones = memory::pages(1);
        // SAFETY: a page of ours that only the processor reads.
        unsafe { core::ptr::write_bytes(ones as *mut u8, 0xff, 4096) };
        for (name, reads, writes) in [
            ("good bitmaps", page, self.mains[0].write_bitmap),
            ("one bitmap for both", page, page),
            ("ones for both", ones, ones),
            ("ones for reads", ones, page),
            ("unbacked VMREAD bitmap", UNBACKED, page),
            ("unbacked VMWRITE bitmap", page, UNBACKED),
            ("misaligned VMREAD bitmap", page | 8, page),
            ("misaligned VMWRITE bitmap", page, page | 0x800),
            (
                "VMREAD bitmap beyond memory",
                1 << cpu::physical_bits(),
                page,
            ),
            (
                "VMWRITE bitmap beyond memory",
                page,
                1 << cpu::physical_bits(),
            ),
            ("good bitmaps again", page, page),
        ] {
            vmwrite(VMREAD_BITMAP, reads)?;
            vmwrite(VMWRITE_BITMAP, writes)?;
            self.probe(0, name)?;
        }
        Ok(())
    }

    /// Operands in memory that the child cannot reach, for accesses that leave and such that do not, and
    /// of a field that there is and one that there is not.
    fn operands(&mut self) -> Result<(), VmxError> {
        for leave in [false, true] {
            for link in [self.shadows[0], u64::MAX] {
                for field in [0x681e, 0x0004] {
                    for (name, address) in [
                        ("unmapped", UNMAPPED),
                        ("not canonical", NOT_CANONICAL),
                        ("not in the EPT", TOUCH_BASE + 0x18),
                    ] {
                        for form in [Form::ReadTo, Form::WriteFrom] {
                            self.operand(name, leave, link, field, address, form)?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn operand(
        &mut self,
        name: &str,
        leave: bool,
        link: u64,
        field: u64,
        address: u64,
        form: Form,
    ) -> Result<(), VmxError> {
        let main = &mut self.mains[0];
        main.prepare(true, link)?;
        main.fill(leave, leave);
        vmwrite(EXCEPTION_BITMAP, PF | GP)?;
        main.clear();
        main.push(form, field, address);
        main.start();
        let outcome = main.bed.enter();
        if main.bed.called(&outcome) {
            let step = main.steps()[0];
            log!(
                "links/{}, leave {}, link {}, field {:#x}, {}: done, flags {:#x}",
                name,
                leave as u8,
                (link != u64::MAX) as u8,
                field,
                if form == Form::ReadTo {
                    "read"
                } else {
                    "write"
                },
                step.flags & super::script::FLAGS
            );
            return Ok(());
        }
        let access = if form == Form::ReadTo {
            "read"
        } else {
            "write"
        };
        if vmread(VM_EXIT_REASON)? == vmx::exit::EPT_VIOLATION {
            // KVM, where it emulates the access, gives the page and not the address, and not the bits of
            // advanced information either; the processor may give more.
            log!(
                "links/{}, leave {}, link {}, field {:#x}, {}: EPT violation {:#x} of page {:#x}",
                name,
                leave as u8,
                (link != u64::MAX) as u8,
                field,
                access,
                vmread(EXIT_QUALIFICATION)? & 0x1ff,
                vmread(GUEST_PHYSICAL_ADDRESS)? / memory::PAGE
            );
            return Ok(());
        }
        // Length and instruction information are undefined after exceptions.
        log!(
            "links/{}, leave {}, link {}, field {:#x}, {}: {} interruption {:#x}/{:#x}",
            name,
            leave as u8,
            (link != u64::MAX) as u8,
            field,
            access,
            outcome,
            vmread(VM_EXIT_INTR_INFO)?,
            vmread(VM_EXIT_INTR_ERROR_CODE)?
        );
        Ok(())
    }

    /// Two children and three shadow VMCSs in every combination, the parent looking into one of them now
    /// and then, with and without VMCLEAR.
    fn owners(&mut self, rounds: u64) -> Result<(), VmxError> {
        let [one, two, three] = self.shadows;
        self.mains[0].prepare(true, one)?;
        self.mains[0].fill(false, false);
        self.mains[1].prepare(false, two)?;
        self.mains[1].fill(false, false);
        for (number, shadow) in [one, two, three].into_iter().enumerate() {
            vmptrld(shadow)?;
            for at in 0..EVERY.len() {
                self.model.write(number, at, self.numbers.next())?;
            }
        }
        let mut sum = 0;
        for round in 0..rounds {
            let (main, number) = (self.numbers.below(2), self.numbers.below(3));
            let shadow = self.shadows[number];
            vmptrld(self.vmcs(main))?;
            vmwrite(VMCS_LINK_POINTER, shadow)?;
            let (model, numbers, scripted) =
                (&self.model, &mut self.numbers, &mut self.mains[main]);
            scripted.clear();
            // In some rounds the VMM may save the machine behind each write.
            let save = round % 4 == 1;
            for _ in 0..8 {
                let at = numbers.below(EVERY.len());
                if model.writable(at) {
                    scripted.push(Form::Read, EVERY[at].0 as u64, 0);
                    scripted.push(Form::Write, EVERY[at].0 as u64, numbers.next());
                    if save {
                        scripted.push(Form::Out, 0, 0);
                    }
                }
            }
            if !scripted.run("owners")? {
                continue;
            }
            for pair in self.mains[main].steps().chunks(if save { 3 } else { 2 }) {
                let at = EVERY
                    .iter()
                    .position(|&(encoding, _)| encoding as u64 == pair[0].field)
                    .unwrap_or(0);
                let expected = self.model.expected(number, at);
                if pair[0].value != expected {
                    log!(
                        "links/owners: FAIL: round {}: child {} reads {:#06x} {} of shadow VMCS {} as {:#x} instead of {:#x}",
                        round,
                        main,
                        pair[0].field,
                        EVERY[at].1,
                        number,
                        pair[0].value,
                        expected
                    );
                }
                sum = fold(sum, pair[0].value);
                self.model.written(number, at, pair[1].field, pair[1].value);
            }
            let look = self.numbers.below(4);
            if look < 3 {
                let shadow = self.shadows[look];
                let clear = self.numbers.below(2) == 0;
                let at = self.numbers.below(EVERY.len());
                let (model, numbers) = (&mut self.model, &mut self.numbers);
                with_current(shadow, self.mains[main].bed.child.vmcs, || {
                    for step in 0..16 {
                        model.check(look, (at + step) % EVERY.len(), "owners, parent");
                    }
                    model.write(look, at, numbers.next())?;
                    if clear {
                        vmclear(shadow)
                    } else {
                        Ok(())
                    }
                })?;
            }
        }
        for (number, shadow) in self.shadows.into_iter().enumerate() {
            vmptrld(shadow)?;
            let all = self.model.check_all(number, "owners");
            log!("links/owners: shadow VMCS {}: {:#x}", number, all);
        }
        log!("links/owners: {:#x}", sum);
        Ok(())
    }
}

/// How one access is logged.
struct Shown(bool, u64, u64);

impl core::fmt::Display for Shown {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.0 {
            true => f.write_str("left"),
            false => write!(f, "{:#x}/{:#x}", self.1, self.2),
        }
    }
}
