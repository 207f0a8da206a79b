// SPDX-License-Identifier: GPL-2.0-or-later
//! A saved machine in a file.
//!
//! The first page says what it is and where the rest is, and is written last, so that what was not finished is not taken
//! for an image. Behind it comes memory, region by region as it is (pages of zeros are holes), then everything else as JSON.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
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

/// A file that is being written; unless it is finished, nothing of it stays. It has no name until then, so that this holds
/// whatever ends the process; only where the file system cannot do that it has another name, and a signal leaves it behind.
#[derive(Debug)]
pub(crate) struct Draft {
    file: File,
    path: PathBuf,
    /// The other name, as long as there is something to remove.
    part: Option<PathBuf>,
}

impl Draft {
    /// Begins `path`, an absolute name, which must not exist, so that finding out that it cannot be written costs nothing.
    ///
    /// # Errors
    /// [`Error::Usage`]: there can be no such file.
    pub(crate) fn create(path: &Path) -> Result<Draft> {
        let directory = path
            .parent()
            .filter(|_| fs::symlink_metadata(path).is_err());
        let Some(directory) = directory else {
            return Err(refused(path, "exists; choose another name, or remove it"));
        };
        // Its name is given by way of /proc.
        if !Path::new("/proc/self/fd").is_dir() {
            return Draft::named(path);
        }
        let mut options = private();
        match options.custom_flags(libc::O_TMPFILE).open(directory) {
            Ok(file) => Ok(Draft {
                file,
                path: path.to_owned(),
                part: None,
            }),
            Err(e) => match e.raw_os_error() {
                // The file system, or the kernel, has no files without a name.
                Some(libc::EOPNOTSUPP | libc::EISDIR) => Draft::named(path),
                _ => Err(refused(path, e)),
            },
        }
    }

    /// The same with a name of its own, `path` and `.part`.
    fn named(path: &Path) -> Result<Draft> {
        let mut part = path.as_os_str().to_owned();
        part.push(".part");
        let part = PathBuf::from(part);
        // SAFETY: has no preconditions.
        let own = unsafe { libc::geteuid() };
        match fs::symlink_metadata(&part) {
            Ok(data) if data.is_file() && data.uid() == own => {
                // What an interrupted save has left.
                fs::remove_file(&part).map_err(|e| refused(&part, e))?;
            }
            Ok(_) => {
                return Err(refused(
                    &part,
                    "is in the way, and no file of yours; choose another name, or remove it",
                ))
            }
            Err(_) => {}
        }
        let mut options = private();
        let file = options.create_new(true).open(&part);
        Ok(Draft {
            file: file.map_err(|e| refused(&part, e))?,
            path: path.to_owned(),
            part: Some(part),
        })
    }

    /// Gives it its name, unless another one has got that meanwhile.
    fn finish(&mut self) -> io::Result<()> {
        self.file.sync_all()?;
        let Some(part) = &self.part else {
            let nameless = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            return link(Path::new(&nameless), &self.path);
        };
        if fs::symlink_metadata(&self.path).is_ok() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        fs::rename(part, &self.path)?;
        self.part = None;
        Ok(())
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
                            .map_err(Error::file(&self.path))?;
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
            .and_then(|()| self.finish())
            .map_err(Error::file(&self.path))?;
        Ok(std::mem::take(&mut self.path))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Some(part) = &self.part {
            // There is nobody to tell, and nothing else to do.
            let _ = fs::remove_file(part);
        }
    }
}

/// How a draft is opened: a guest's memory is nobody else's business.
fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true).mode(0o600);
    options
}

/// The file that was asked for cannot be.
fn refused(path: &Path, why: impl std::fmt::Display) -> Error {
    Error::Usage(format!("{}: {why}", path.display()))
}

/// Gives the file behind the link `from` the name `to`, which must be free.
fn link(from: &Path, to: &Path) -> io::Result<()> {
    let (from, to) = (
        CString::new(from.as_os_str().as_bytes())?,
        CString::new(to.as_os_str().as_bytes())?,
    );
    let (cwd, follow) = (libc::AT_FDCWD, libc::AT_SYMLINK_FOLLOW);
    // SAFETY: both strings end in NUL and are only read.
    match unsafe { libc::linkat(cwd, from.as_ptr(), cwd, to.as_ptr(), follow) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(tag: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("mtk-image-{tag}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        let mut names: Vec<_> = entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn only_what_is_finished_stays() {
        let dir = directory("finished");
        let path = dir.join("stack");
        for create in [Draft::create, Draft::named] {
            drop(create(&path).unwrap());
            assert_eq!(names(&dir), [""; 0]);
            let mut draft = create(&path).unwrap();
            draft.file.write_all_at(b"whole", 0).unwrap();
            draft.finish().unwrap();
            drop(draft);
            assert_eq!(names(&dir), ["stack"]);
            assert_eq!(fs::read(&path).unwrap(), b"whole");
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
            fs::remove_file(&path).unwrap();
        }
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn nothing_is_overwritten() {
        let dir = directory("overwritten");
        let path = dir.join("stack");
        for create in [Draft::create, Draft::named] {
            let mut draft = create(&path).unwrap();
            fs::write(&path, "another's").unwrap();
            let e = draft.finish().unwrap_err();
            assert_eq!(e.kind(), io::ErrorKind::AlreadyExists);
            drop(draft);
            assert_eq!(names(&dir), ["stack"]);
            assert_eq!(fs::read(&path).unwrap(), b"another's");
            fs::remove_file(&path).unwrap();
        }
        std::os::unix::fs::symlink("nowhere", &path).unwrap();
        let e = Draft::create(&path).unwrap_err();
        assert!(e.to_string().contains("exists"), "{e}");
        let e = Draft::create(&dir.join("nowhere/stack")).unwrap_err();
        assert!(matches!(e, Error::Usage(_)) && e.to_string().contains("No such file"));
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_stale_part_is_removed_and_what_is_none_is_not() {
        let dir = directory("stale");
        let (path, part) = (dir.join("stack"), dir.join("stack.part"));
        fs::write(&part, "left behind").unwrap();
        let draft = Draft::named(&path).unwrap();
        assert_eq!(fs::read(&part).unwrap(), b"");
        drop(draft);
        fs::write(dir.join("precious"), "kept").unwrap();
        std::os::unix::fs::symlink("precious", &part).unwrap();
        let e = Draft::named(&path).unwrap_err();
        assert!(e.to_string().contains("in the way"), "{e}");
        assert_eq!(fs::read(dir.join("precious")).unwrap(), b"kept");
        assert_eq!(names(&dir), ["precious", "stack.part"]);
        fs::remove_dir_all(dir).unwrap();
    }
}
