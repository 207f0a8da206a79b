// SPDX-License-Identifier: GPL-2.0
//! Reads small files and directories of sysfs from inside the kernel: BTF, other modules' parameters and the list of livepatches have no
//! interface that is exported to modules.

use crate::{alloc, bindings};
use kernel::{prelude::*, str::CStr};

/// Nothing that the module reads is near this: the kernel's BTF is some 6 MiB.
const MAX_SIZE: usize = 64 << 20;
const CHUNK: usize = 64 << 10;

/// An open file; dropping it closes it.
struct File(*mut bindings::file);

impl File {
    fn open(path: &CStr) -> Result<Self> {
        // SAFETY: `path` is a NUL-terminated string.
        let file = unsafe {
            bindings::filp_open(path.as_char_ptr(), 0 /* O_RDONLY */, 0)
        };
        let code = file as isize;
        if (-4095..0).contains(&code) {
            return Err(Error::from_errno(code as i32));
        }
        Ok(Self(file))
    }

    fn read(&self, buf: &mut [u8], pos: &mut i64) -> Result<usize> {
        // SAFETY: `buf` is valid for writes of its length and the file is open.
        let n = unsafe { bindings::kernel_read(self.0, buf.as_mut_ptr().cast(), buf.len(), pos) };
        usize::try_from(n).map_err(|_| Error::from_errno(n as i32))
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // SAFETY: Opened by `open` and closed only here.
        unsafe { bindings::filp_close(self.0, core::ptr::null_mut()) };
    }
}

/// Whether there is a file or directory `path` that can be opened.
///
/// Process context.
pub(crate) fn exists(path: &CStr) -> bool {
    File::open(path).is_ok()
}

/// What iterate_dir() hands to `found`.
#[repr(C)]
struct Lister<'a> {
    context: bindings::dir_context,
    found: &'a mut dyn FnMut(&[u8]),
}

/// # Safety
///
/// iterate_dir() calls this with the context of a `Lister`.
unsafe extern "C" fn lister_actor(
    context: *mut bindings::dir_context,
    name: *const kernel::ffi::c_char,
    length: kernel::ffi::c_int,
    _offset: i64,
    _inode: u64,
    _kind: kernel::ffi::c_uint,
) -> bool {
    // SAFETY: The context is the first member of a `Lister` that `list` has borrowed for the call; the name has `length` bytes.
    let (lister, name) = unsafe {
        (
            &mut *context.cast::<Lister<'_>>(),
            core::slice::from_raw_parts(name.cast::<u8>(), usize::try_from(length).unwrap_or(0)),
        )
    };
    (lister.found)(name);
    true
}

/// Hands the names in the directory `path` to `found`, which must not open anything there; `.` and `..` are among them.
///
/// Process context. Errors are the kernel's for opening and reading it.
pub(crate) fn list(path: &CStr, found: &mut dyn FnMut(&[u8])) -> Result {
    let directory = File::open(path)?;
    let mut lister = Lister {
        context: bindings::dir_context {
            actor: Some(lister_actor),
            ..Default::default()
        },
        found,
    };
    // SAFETY: The file is open, and the context outlives the call. It is given by the address of the whole.
    let ret = unsafe { bindings::iterate_dir(directory.0, (&raw mut lister).cast()) };
    if ret < 0 {
        return Err(Error::from_errno(ret));
    }
    Ok(())
}

/// The whole content of `path`.
///
/// Process context. Errors are the kernel's for opening and reading it, `EFBIG` for a file over
/// 64 MiB, `ENOMEM`.
pub(crate) fn read(path: &CStr) -> Result<KVVec<u8>> {
    let file = File::open(path)?;
    let mut data = KVVec::new();
    alloc::MODULE.gate()?;
    let mut chunk = KVVec::from_elem(0u8, CHUNK, GFP_KERNEL)?;
    let mut pos = 0;
    loop {
        let n = file.read(&mut chunk, &mut pos)?;
        let Some(part) = chunk.get(..n).filter(|p| !p.is_empty()) else {
            return Ok(data);
        };
        if data.len() + n > MAX_SIZE {
            return Err(EFBIG);
        }
        if data.is_empty() {
            // The others are alike, and many.
            alloc::MODULE.gate()?;
        }
        data.extend_from_slice(part, GFP_KERNEL)?;
    }
}
