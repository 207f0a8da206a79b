// SPDX-License-Identifier: GPL-2.0-or-later
//! A saved machine in a file.
//!
//! The first page says what it is and where the rest is, and is written last, so that what was not finished is not taken
//! for an image. Behind it comes memory, region by region as it is (pages of zeros are holes), then everything else as JSON.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::device::BusState;
use crate::memory::{Memory, PAGE};
use crate::state::{VcpuState, VmState};
use crate::{Error, Result};

/// How a file begins.
const MAGIC: &[u8; 16] = b"MATRYOSHKA STACK";
/// Version of the format.
const VERSION: u64 = 2;
/// Bytes that are moved at once: a huge page, as memory is aligned to it.
const CHUNK: usize = 2 << 20;
/// More JSON than any machine has.
const JSON_MAX: u64 = 64 << 20;

/// A machine, except memory, and what its owner needs to go on.
#[derive(Serialize, Deserialize)]
pub(crate) struct Contents {
    /// The kernel that it was saved on, for people.
    pub(crate) kernel: String,
    /// MiB of main memory.
    pub(crate) mib: u64,
    /// Pages of the touch region.
    pub(crate) touch_pages: u32,
    /// Whether there is a PIT.
    pub(crate) pit: bool,
    /// Whether every vCPU began at once.
    pub(crate) all_begin: bool,
    pub(crate) vm: VmState,
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) bus: BusState,
    /// The owner's.
    pub(crate) owner: serde_json::Value,
}

/// A file that is being written; unless it is finished, nothing of it stays.
#[derive(Debug)]
pub(crate) struct Draft {
    file: File,
    part: PathBuf,
    path: PathBuf,
    finished: bool,
}

impl Draft {
    /// Begins `path`, which must not exist, so that finding out that it cannot be written costs nothing.
    pub(crate) fn create(path: &Path) -> Result<Draft> {
        if path.exists() {
            return Err(Error::Image {
                path: path.to_owned(),
                what: "exists; choose another name, or remove it".into(),
            });
        }
        let mut part = path.as_os_str().to_owned();
        part.push(".part");
        let part = PathBuf::from(part);
        // A guest's memory is nobody else's business.
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&part)
            .map_err(Error::file(&part))?;
        Ok(Draft {
            file,
            part,
            path: path.to_owned(),
            finished: false,
        })
    }

    /// Writes everything; `progress` gets bytes done and bytes in all. Gives the file's name.
    pub(crate) fn write(
        mut self,
        mem: &Memory,
        contents: &Contents,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<PathBuf> {
        let json = serde_json::to_vec(contents).map_err(|e| {
            Error::Stack(format!("the machine's state cannot be written down: {e}"))
        })?;
        let regions = mem.regions();
        let total: u64 = regions.iter().map(|&(_, len)| len as u64).sum();
        let (mut at, mut sum) = (PAGE as u64, SUM);
        for (start, len) in regions {
            for offset in (0..len).step_by(CHUNK) {
                // SAFETY: within a mapping of `mem`, which is borrowed; no vCPU runs meanwhile.
                let chunk = unsafe {
                    std::slice::from_raw_parts(start.add(offset), CHUNK.min(len - offset))
                };
                for (number, page) in chunk.chunks(PAGE).enumerate() {
                    if page.iter().any(|&byte| byte != 0) {
                        sum = add(sum, page);
                        self.file
                            .write_all_at(page, at + (number * PAGE) as u64)
                            .map_err(Error::file(&self.part))?;
                    }
                }
                at += chunk.len() as u64;
                progress(at - PAGE as u64, total);
            }
        }
        let mut first = Vec::with_capacity(PAGE);
        first.extend_from_slice(MAGIC);
        for word in [VERSION, at, json.len() as u64, add(sum, &json)] {
            first.extend_from_slice(&word.to_le_bytes());
        }
        self.file
            .write_all_at(&json, at)
            .and_then(|()| self.file.write_all_at(&first, 0))
            .and_then(|()| self.file.sync_all())
            .and_then(|()| std::fs::rename(&self.part, &self.path))
            .map_err(Error::file(&self.part))?;
        self.finished = true;
        Ok(std::mem::take(&mut self.path))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.finished {
            // There is nobody to tell, and nothing else to do.
            let _ = std::fs::remove_file(&self.part);
        }
    }
}

/// Reads a file: memory, and the rest.
pub(crate) fn read(path: &Path, mut progress: impl FnMut(u64, u64)) -> Result<(Memory, Contents)> {
    let bad = |what: &str| Error::Image {
        path: path.to_owned(),
        what: what.into(),
    };
    let mut file = File::open(path).map_err(Error::file(path))?;
    let mut first = [0u8; 48];
    let length = file.metadata().map_err(Error::file(path))?.len();
    if file.read_exact(&mut first).is_err() || !first.starts_with(MAGIC) {
        return Err(bad("is no saved stack"));
    }
    let mut words = first[MAGIC.len()..]
        .chunks_exact(8)
        .map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")));
    let mut word = || words.next().expect("four words");
    let (version, at, size, expected) = (word(), word(), word(), word());
    if version != VERSION {
        return Err(bad(&format!(
            "is of version {version} of the format, and this tool reads {VERSION}"
        )));
    }
    if size > JSON_MAX || at.checked_add(size) != Some(length) {
        return Err(bad("is cut off, or damaged"));
    }
    let mut json = vec![0u8; size as usize];
    file.seek(SeekFrom::Start(at))
        .and_then(|_| file.read_exact(&mut json))
        .map_err(Error::file(path))?;
    let contents: Contents = serde_json::from_slice(&json)
        .map_err(|e| bad(&format!("is damaged: its description says {e}")))?;
    let mem = Memory::new(contents.mib, contents.touch_pages)?;
    let regions = mem.regions();
    let total: u64 = regions.iter().map(|&(_, len)| len as u64).sum();
    if total + PAGE as u64 != at {
        return Err(bad("is damaged: its memory has another size than it says"));
    }
    let (mut from, mut sum) = (PAGE as u64, SUM);
    let mut buffer = vec![0u8; CHUNK];
    for (start, len) in regions {
        for offset in (0..len).step_by(CHUNK) {
            let chunk = &mut buffer[..CHUNK.min(len - offset)];
            file.read_exact_at(chunk, from).map_err(Error::file(path))?;
            for (number, page) in chunk.chunks(PAGE).enumerate() {
                // Pages that were never touched stay so.
                if page.iter().any(|&byte| byte != 0) {
                    sum = add(sum, page);
                    // SAFETY: within a mapping of `mem`, of which nothing else knows yet.
                    unsafe {
                        start
                            .add(offset + number * PAGE)
                            .copy_from_nonoverlapping(page.as_ptr(), page.len());
                    }
                }
            }
            from += chunk.len() as u64;
            progress(from - PAGE as u64, total);
        }
    }
    if add(sum, &json) != expected {
        return Err(bad("is damaged: its checksum is another"));
    }
    Ok((mem, contents))
}

/// Start of a sum (FNV-1a over words).
const SUM: u64 = 0xcbf2_9ce4_8422_2325;

/// Adds bytes to a sum.
fn add(sum: u64, bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(sum, |sum, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        (sum ^ u64::from_le_bytes(word)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
