// SPDX-License-Identifier: GPL-2.0-or-later
//! Starting a guest in 64-bit mode: Linux by its 64-bit boot protocol
//! (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"), and the state of
//! the boot processor that it shares with the bare-metal payloads.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress};

use crate::control::MAILBOX;
use crate::memory::Memory;
use crate::mptable::MPTABLE_START;
use crate::{Error, Result};

/// Guest-physical addresses of what the loader leaves below 1 MiB.
const GDT: u64 = 0x500;
/// Initial stack of the boot processor; grows down from here.
pub const STACK_TOP: u64 = 0x8000;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PD: u64 = 0xb000; // four pages, one per GiB
const ZERO_PAGE: u64 = 0x1_0000;
const CMDLINE: u64 = 0x2_0000;
/// Bytes of command line that Linux takes (COMMAND_LINE_SIZE), with the NUL.
pub const CMDLINE_MAX: usize = 2048;
const LOW_RAM_END: u64 = MAILBOX;
const HIGH_RAM: u64 = 0x10_0000;
/// Where a bzImage's protected-mode part is put, its preferred address.
const BZIMAGE_START: u64 = 0x100_0000;
/// Offset of the 64-bit entry point in a bzImage's protected-mode part.
const BZIMAGE_ENTRY64: u64 = 0x200;
const E820_RAM: u32 = 1;

const CR0_PE: u64 = 1;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Where the boot processor begins and with what in its registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// First instruction.
    pub rip: u64,
    /// RSI: the zero page for Linux.
    pub rsi: u64,
    /// RDI: the information block for a payload.
    pub rdi: u64,
}

/// Loads a kernel (vmlinux ELF or bzImage), an initramfs, a command line and an MP
/// table.
///
/// The kernel needs `initramfs` as a whole in memory; it is put at the end of RAM
/// below 4 GiB, page-aligned, where it is in nobody's way.
pub fn load_linux(
    mem: &Memory,
    kernel: &Path,
    initramfs: &[u8],
    cmdline: &str,
    mptable: &[u8],
) -> Result<Entry> {
    let image = |what: String| Error::Image {
        path: kernel.to_owned(),
        what,
    };
    let mut f = File::open(kernel).map_err(Error::file(kernel))?;
    let mut magic = [0u8; 4];
    f.read_exact(&mut magic).map_err(Error::file(kernel))?;
    f.seek(SeekFrom::Start(0)).map_err(Error::file(kernel))?;
    let guest = mem.guest();
    let high = Some(GuestAddress(HIGH_RAM));

    let mut params = boot_params::default();
    let (rip, end) = if &magic == b"\x7fELF" {
        let r = Elf::load(guest, None, &mut f, high)
            .map_err(|e| image(format!("cannot be loaded as vmlinux: {e}")))?;
        params.hdr.header = 0x5372_6448; // "HdrS"
        params.hdr.boot_flag = 0xaa55;
        params.hdr.version = 0x020f;
        (r.kernel_load.0, r.kernel_end)
    } else {
        let r = BzImage::load(guest, Some(GuestAddress(BZIMAGE_START)), &mut f, high)
            .map_err(|e| image(format!("is neither a vmlinux ELF nor a bzImage: {e}")))?;
        let hdr = r
            .setup_header
            .ok_or_else(|| image("has no setup header".into()))?;
        // XLF_KERNEL_64: there is a 64-bit entry point.
        if hdr.xloadflags & 1 == 0 {
            return Err(image("is a 32-bit kernel".into()));
        }
        params.hdr = hdr;
        let init_size = u64::from(hdr.init_size);
        (
            BZIMAGE_START + BZIMAGE_ENTRY64,
            r.kernel_end.max(BZIMAGE_START + init_size),
        )
    };
    if cmdline.len() >= CMDLINE_MAX {
        return Err(Error::Usage(format!(
            "kernel command line of {} bytes; Linux takes {}",
            cmdline.len(),
            CMDLINE_MAX - 1
        )));
    }

    let low_end = mem.ranges()[0].1;
    let initrd_at = low_end
        .checked_sub(initramfs.len() as u64)
        .map(|a| a & !0xfff)
        .filter(|&a| a >= end.next_multiple_of(0x1000))
        .ok_or_else(|| {
            Error::Usage(format!(
                "guest memory: {} MiB hold the kernel up to {} MiB but not the initramfs of {} MiB above it: give more memory",
                low_end >> 20,
                end >> 20,
                initramfs.len() >> 20
            ))
        })?;

    params.hdr.type_of_loader = 0xff;
    params.hdr.loadflags |= 1; // LOADED_HIGH
    params.hdr.ramdisk_image = initrd_at as u32;
    params.hdr.ramdisk_size = initramfs.len() as u32;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    params.hdr.cmdline_size = cmdline.len() as u32;
    for (i, (addr, size)) in e820(&mem.ranges()).into_iter().enumerate() {
        params.e820_table[i] = boot_e820_entry {
            addr,
            size,
            type_: E820_RAM,
        };
        params.e820_entries = i as u8 + 1;
    }

    let put = |bytes: &[u8], at: u64| {
        guest
            .write_slice(bytes, GuestAddress(at))
            .map_err(|e| Error::Memory(format!("writing {} bytes at {at:#x}: {e}", bytes.len())))
    };
    put(initramfs, initrd_at)?;
    put(cmdline.as_bytes(), CMDLINE)?;
    put(&[0], CMDLINE + cmdline.len() as u64)?;
    put(mptable, MPTABLE_START)?;
    guest
        .write_obj(params, GuestAddress(ZERO_PAGE))
        .map_err(|e| Error::Memory(format!("zero page: {e}")))?;
    write_tables(mem)?;
    Ok(Entry {
        rip,
        rsi: ZERO_PAGE,
        rdi: 0,
    })
}

/// The memory map: main memory less the hole from the mailbox to 1 MiB.
fn e820(ranges: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut map = vec![(0, LOW_RAM_END)];
    for &(start, len) in ranges {
        let from = start.max(HIGH_RAM);
        if start + len > from {
            map.push((from, start + len - from));
        }
    }
    map
}

/// Writes the GDT and page tables that map the first 4 GiB to themselves with
/// 2 MiB pages.
pub(crate) fn write_tables(mem: &Memory) -> Result<()> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let mut tables = vec![0u64; (PD - PML4) as usize / 8];
    tables[0] = PDPT | PRESENT_WRITABLE;
    for i in 0..4 {
        tables[(PDPT - PML4) as usize / 8 + i] = (PD + i as u64 * 0x1000) | PRESENT_WRITABLE;
    }
    tables.extend((0..4 * 512).map(|i: u64| (i << 21) | LARGE | PRESENT_WRITABLE));
    let gdt = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    for (at, words) in [(PML4, &tables[..]), (GDT, &gdt[..])] {
        let bytes: Vec<u8> = words.iter().flat_map(|w: &u64| w.to_le_bytes()).collect();
        mem.guest()
            .write_slice(&bytes, GuestAddress(at))
            .map_err(|e| Error::Memory(format!("tables: {e}")))?;
    }
    Ok(())
}

/// Sets segments, control registers and EFER for 64-bit mode with paging on.
pub(crate) fn long_mode(sregs: &mut kvm_sregs) {
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 0x10, // __BOOT_CS
        type_: 11,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: 0x18,
        type_: 3,
        l: 0,
        db: 1,
        ..code
    };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}

/// General registers for `entry`: interrupts off, a small stack.
pub(crate) fn registers(entry: &Entry) -> kvm_regs {
    kvm_regs {
        rip: entry.rip,
        rsi: entry.rsi,
        rdi: entry.rdi,
        rsp: STACK_TOP,
        rflags: 2,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_map_leaves_the_mailbox_out() {
        assert_eq!(
            e820(&[(0, 64 << 20)]),
            vec![(0, 0x9_e000), (0x10_0000, (64 << 20) - 0x10_0000)]
        );
        let split = e820(&[(0, 0xc000_0000), (1 << 32, 1 << 30)]);
        assert_eq!(split[2], (1 << 32, 1 << 30));
    }

    #[test]
    fn identity_map_covers_four_gib() {
        let mem = Memory::new(2, 0).unwrap();
        write_tables(&mem).unwrap();
        let read = |a| mem.guest().read_obj::<u64>(GuestAddress(a)).unwrap();
        assert_eq!(read(PML4), PDPT | 3);
        assert_eq!(read(PDPT + 24), (PD + 0x3000) | 3);
        assert_eq!(read(PD + 2047 * 8), (2047 << 21) | 0x83);
    }

    #[test]
    fn not_a_kernel_is_said_so() {
        let p = std::env::temp_dir().join(format!("mtk-notakernel-{}", std::process::id()));
        std::fs::write(&p, vec![0u8; 4096]).unwrap();
        let mem = Memory::new(2, 0).unwrap();
        let e = load_linux(&mem, &p, &[], "", &[]).unwrap_err().to_string();
        std::fs::remove_file(&p).unwrap();
        assert!(e.contains("neither a vmlinux ELF nor a bzImage"), "{e}");
    }
}
