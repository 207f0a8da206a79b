// SPDX-License-Identifier: GPL-2.0
//! `/sys/kernel/matryoshka/`: see `Documentation/ABI/testing/sysfs-kernel-matryoshka`.
//!
//! Readable by all (but `hooks`, which has kernel addresses) and writable by root only. A file shows at most one page.

use crate::{
    alloc, bindings, control,
    path::{self, nested_switch},
    policy::{detour::Rate, mode::Mode},
    state,
};
use core::fmt::{self, Write};
use kernel::{c_str, ffi, prelude::*, str::CStr};

/// What an attribute shows.
#[derive(Clone, Copy)]
enum Kind {
    Version,
    KernelMatch,
    Hooks,
    Vcpus,
    Detour,
    Mode,
    State,
    Taken,
    Checked,
    Mismatches,
    SavedExits,
    Fallbacks,
    Knob(Show, Store),
}

/// Writes a knob's value.
type Show = fn(&mut dyn Write) -> fmt::Result;
/// Takes what was written to a knob.
type Store = fn(&[u8]) -> Result;

/// `struct kobj_attribute`, whose two pointers are plain in some kernels and in unions in others.
#[repr(C)]
struct KobjAttribute {
    attr: bindings::attribute,
    show: ShowFn,
    store: Option<StoreFn>,
}

type ShowFn =
    unsafe extern "C" fn(*mut bindings::kobject, *mut KobjAttribute, *mut ffi::c_char) -> isize;
type StoreFn = unsafe extern "C" fn(
    *mut bindings::kobject,
    *mut KobjAttribute,
    *const ffi::c_char,
    usize,
) -> isize;

const _: () = assert!(
    core::mem::size_of::<KobjAttribute>() == core::mem::size_of::<bindings::kobj_attribute>()
);

/// A file. The kernel's part comes first: `show` and `store` get a pointer to it back.
#[repr(C)]
pub(crate) struct Attribute {
    raw: KobjAttribute,
    kind: Kind,
}

// SAFETY: sysfs only reads the attribute (and lockdep its address); `kind` is plain data.
unsafe impl Sync for Attribute {}

impl Attribute {
    /// A knob of a path: readable by all, writable by root.
    pub(crate) const fn knob(name: &'static CStr, show: Show, store: Store) -> Self {
        Self::new(name, Kind::Knob(show, store), 0o644)
    }

    /// A number of a path that only some paths have: readable by all.
    pub(crate) const fn figure(name: &'static CStr, show: Show) -> Self {
        Self::new(name, Kind::Knob(show, |_| Err(EPERM)), 0o444)
    }

    const fn new(name: &'static CStr, kind: Kind, mode: u16) -> Self {
        // SAFETY: All-zero is valid for `attribute`: null pointers and numbers.
        let mut attr: bindings::attribute = unsafe { core::mem::zeroed() };
        attr.name = name.to_bytes_with_nul().as_ptr().cast();
        attr.mode = mode;
        let store: Option<StoreFn> = if mode & 0o200 != 0 { Some(store) } else { None };
        Self {
            raw: KobjAttribute { attr, show, store },
            kind,
        }
    }
}

static TOP: [Attribute; 5] = [
    Attribute::new(c"version", Kind::Version, 0o444),
    Attribute::new(c"kernel_match", Kind::KernelMatch, 0o444),
    Attribute::new(c"hooks", Kind::Hooks, 0o400),
    Attribute::new(c"vcpus", Kind::Vcpus, 0o444),
    Attribute::new(c"detour", Kind::Detour, 0o644),
];

static PER_PATH: [Attribute; 7] = [
    Attribute::new(c"mode", Kind::Mode, 0o644),
    Attribute::new(c"state", Kind::State, 0o444),
    Attribute::new(c"taken", Kind::Taken, 0o444),
    Attribute::new(c"checked", Kind::Checked, 0o444),
    Attribute::new(c"mismatches", Kind::Mismatches, 0o444),
    Attribute::new(c"saved_exits", Kind::SavedExits, 0o444),
    Attribute::new(c"fallbacks", Kind::Fallbacks, 0o444),
];

/// A page that sysfs gave us to fill; what does not fit is cut.
struct Page<'a> {
    buf: &'a mut [u8],
    used: usize,
}

impl Write for Page<'_> {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        let room = self.buf.get_mut(self.used..).unwrap_or_default();
        let n = room.len().min(s.len());
        if let (Some(to), Some(from)) = (room.get_mut(..n), s.as_bytes().get(..n)) {
            to.copy_from_slice(from);
        }
        self.used += n;
        Ok(())
    }
}

/// The path whose directory this is, by its name.
fn path_of(kobj: *mut bindings::kobject) -> Option<usize> {
    // SAFETY: sysfs passes the kobject whose file is in use; its name is set once, at creation.
    let name = unsafe { CStr::from_char_ptr((*kobj).name) };
    path::PATHS
        .iter()
        .position(|p| p.name.to_bytes() == name.to_bytes())
}

fn write_page(kobj: *mut bindings::kobject, kind: Kind, out: &mut Page<'_>) -> fmt::Result {
    let number = path_of(kobj).unwrap_or(0);
    match kind {
        Kind::Version => writeln!(out, "{}", crate::VERSION),
        Kind::KernelMatch => control::describe_match(out),
        Kind::Hooks => control::describe_hooks(out),
        Kind::Vcpus => writeln!(
            out,
            "{} {} {}",
            state::count(),
            core::mem::size_of::<state::VcpuState>(),
            state::MOST
        ),
        Kind::Detour => {
            let rate = nested_switch::detour();
            writeln!(out, "{} {}", rate.every, rate.seed)
        }
        Kind::Mode => writeln!(out, "{}", control::wanted(number).name()),
        Kind::State => control::describe_path(number, out),
        Kind::Taken => writeln!(out, "{}", path::total(number).taken.get()),
        Kind::Checked => writeln!(out, "{}", path::total(number).checked.get()),
        Kind::Mismatches => writeln!(out, "{}", path::total(number).mismatches.get()),
        Kind::SavedExits => writeln!(out, "{}", path::total(number).saved_exits.get()),
        Kind::Fallbacks => {
            let total = path::total(number);
            let reasons = path::PATHS.get(number).map_or(&[][..], |p| p.reasons);
            for (reason, count) in reasons.iter().zip(&total.fallbacks) {
                writeln!(out, "{reason} {}", count.get())?;
            }
            Ok(())
        }
        Kind::Knob(show, _) => show(out),
    }
}

/// Shows an attribute.
///
/// # Safety
///
/// Only sysfs calls this, with an attribute of ours and a page to fill.
unsafe extern "C" fn show(
    kobj: *mut bindings::kobject,
    attr: *mut KobjAttribute,
    buf: *mut ffi::c_char,
) -> isize {
    // SAFETY: `attr` is the first member of one of our `Attribute`s, which are all static.
    let kind = unsafe { (*attr.cast::<Attribute>()).kind };
    // SAFETY: sysfs passes a whole page (SYSFS_SHOW).
    let buf = unsafe { core::slice::from_raw_parts_mut(buf.cast::<u8>(), kernel::page::PAGE_SIZE) };
    let mut page = Page { buf, used: 0 };
    // `Page` cuts and never fails.
    let _ = write_page(kobj, kind, &mut page);
    page.used as isize
}

/// Takes what was written to an attribute.
///
/// # Safety
///
/// Only sysfs calls this, with an attribute of ours and `count` bytes that were written.
unsafe extern "C" fn store(
    kobj: *mut bindings::kobject,
    attr: *mut KobjAttribute,
    buf: *const ffi::c_char,
    count: usize,
) -> isize {
    // SAFETY: As in `show`.
    let kind = unsafe { (*attr.cast::<Attribute>()).kind };
    // SAFETY: sysfs passes `count` bytes that were copied from user space.
    let text = unsafe { core::slice::from_raw_parts(buf.cast::<u8>(), count) };
    let result = match (kind, path_of(kobj)) {
        (Kind::Mode, Some(number)) => Mode::parse(text)
            .ok_or(EINVAL)
            .and_then(|mode| control::set_mode(number, mode)),
        (Kind::Knob(_, store), _) => store(text),
        (Kind::Detour, _) => Rate::parse(text)
            .ok_or(EINVAL)
            .map(nested_switch::set_detour),
        _ => Err(EINVAL),
    };
    match result {
        Ok(()) => count as isize,
        Err(e) => e.to_errno() as isize,
    }
}

/// A directory in sysfs; dropping it removes it and waits for its open files' operations.
struct Dir(*mut bindings::kobject);

impl Dir {
    fn new(
        name: &CStr,
        parent: *mut bindings::kobject,
        files: &'static [Attribute],
    ) -> Result<Self> {
        // SAFETY: `name` is NUL-terminated and `parent` a live kobject.
        let kobj = unsafe { bindings::kobject_create_and_add(name.as_char_ptr(), parent) };
        if kobj.is_null() {
            return Err(ENOMEM);
        }
        let dir = Self(kobj);
        dir.add(files)?;
        Ok(dir)
    }

    fn add(&self, files: &'static [Attribute]) -> Result {
        for file in files {
            // SAFETY: The kobject is live and the attribute static.
            let ret = unsafe {
                bindings::sysfs_create_file_ns(self.0, &file.raw.attr, core::ptr::null_mut())
            };
            if ret < 0 {
                return Err(Error::from_errno(ret));
            }
        }
        Ok(())
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        // SAFETY: The only reference that this module holds.
        unsafe { bindings::kobject_put(self.0) };
    }
}

/// The whole tree; dropping it removes it.
pub(crate) struct Tree {
    // In order of removal: children first.
    _per_path: KVec<Dir>,
    _paths: Dir,
    _top: Dir,
}

// SAFETY: The kobjects are only created and removed here; sysfs takes its own locks.
unsafe impl Send for Tree {}
// SAFETY: As above.
unsafe impl Sync for Tree {}

impl Tree {
    /// Makes `/sys/kernel/matryoshka` with everything in it.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: `kernel_kobj` is set early in boot and never goes.
        let top = Dir::new(c_str!("matryoshka"), unsafe { bindings::kernel_kobj }, &TOP)?;
        let paths = Dir::new(c_str!("paths"), top.0, &[])?;
        alloc::MODULE.gate()?;
        let mut per_path = KVec::with_capacity(path::COUNT, GFP_KERNEL)?;
        for p in path::PATHS {
            let dir = Dir::new(p.name, paths.0, &PER_PATH)?;
            dir.add(p.knobs)?;
            per_path.push(dir, GFP_KERNEL)?;
        }
        Ok(Self {
            _per_path: per_path,
            _paths: paths,
            _top: top,
        })
    }
}
