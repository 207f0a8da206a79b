// SPDX-License-Identifier: GPL-2.0-or-later
//! Starting a bare-metal ELF payload.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress};

use crate::boot::{write_tables, Entry};
use crate::memory::Memory;
use crate::{Error, Result};

/// Main memory of a payload's machine in MiB.
pub const PAYLOAD_MIB: u64 = 64;
/// Guest-physical address of the information block, whose address is in RDI.
pub const INFO: u64 = 0x2000;
/// The most that may lie at [`INFO`]; the stack comes down from 0x8000.
pub const INFO_MAX: usize = 0x2000;

/// Whether the file can be a payload at all, for who wants to know before there is a machine to load it into.
///
/// # Errors
/// [`Error::Image`]: it is no ELF file.
pub fn check(path: &Path) -> Result<()> {
    let mut magic = Vec::new();
    let file = File::open(path).map_err(Error::file(path))?;
    file.take(4)
        .read_to_end(&mut magic)
        .map_err(Error::file(path))?;
    match &magic[..] {
        b"\x7fELF" => Ok(()),
        _ => Err(Error::Image {
            path: path.to_owned(),
            what: "is not a payload (64-bit ELF at 1 MiB or above)".into(),
        }),
    }
}

/// Loads the ELF file `path` at its physical addresses and `info` at [`INFO`].
///
/// The payload is entered in 64-bit mode at its ELF entry point with interrupts
/// off, the first 4 GiB mapped to themselves, a stack of 16 KiB and RDI = [`INFO`].
pub fn load_payload(mem: &Memory, path: &Path, info: &[u8]) -> Result<Entry> {
    let image = |what: String| Error::Image {
        path: path.to_owned(),
        what,
    };
    if info.len() > INFO_MAX {
        return Err(Error::Stack(format!(
            "information block of {} bytes",
            info.len()
        )));
    }
    let mut f = File::open(path).map_err(Error::file(path))?;
    let r = Elf::load(mem.guest(), None, &mut f, Some(GuestAddress(0x10_0000))).map_err(|e| {
        image(format!(
            "is not a payload (64-bit ELF at 1 MiB or above): {e}"
        ))
    })?;
    mem.guest()
        .write_slice(info, GuestAddress(INFO))
        .map_err(|e| Error::Memory(format!("information block: {e}")))?;
    write_tables(mem)?;
    Ok(Entry {
        rip: r.kernel_load.0,
        rsi: 0,
        rdi: INFO,
    })
}
