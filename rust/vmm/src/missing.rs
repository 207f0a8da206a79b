// SPDX-License-Identifier: GPL-2.0-or-later
//! Memory whose pages a thread of the VMM hands out as they are missed: userfaultfd.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::memory::PAGE;
use crate::{Error, Result};

// <linux/userfaultfd.h>: no crate of ours has it.
const API: u64 = 0xaa;
const IOCTL_API: libc::c_ulong = 0xc018_aa3f;
const IOCTL_REGISTER: libc::c_ulong = 0xc020_aa00;
const IOCTL_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
const REGISTER_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;

/// `struct uffdio_api`: the API asked for, features, and what ioctls there are.
#[repr(C)]
struct Api([u64; 3]);

/// `struct uffdio_register` and `struct uffdio_zeropage`: start, length, mode, and what the kernel answers.
#[repr(C)]
struct Range([u64; 4]);

/// `struct uffd_msg`, of which only page faults are asked for.
#[repr(C)]
#[derive(Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u64,
}

/// Hands out pages of one mapping.
#[derive(Debug)]
pub(crate) struct Missing {
    fd: OwnedFd,
    /// How many have been handed out.
    pub(crate) given: AtomicU64,
}

impl Missing {
    /// For a mapping that nobody has touched yet.
    pub(crate) fn new(start: u64, len: usize) -> Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: takes flags and gives a descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) } as i32;
        if fd < 0 {
            return Err(Error::os("userfaultfd"));
        }
        // SAFETY: a new descriptor that nobody else has.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut api = Api([API, 0, 0]);
        let mut range = Range([start, len as u64, REGISTER_MISSING, 0]);
        // SAFETY: the structures are those of the requests. Faults of the mapping wait for `serve` from now on.
        let failed = unsafe {
            libc::ioctl(fd.as_raw_fd(), IOCTL_API, &mut api) != 0
                || libc::ioctl(fd.as_raw_fd(), IOCTL_REGISTER, &mut range) != 0
        };
        if failed {
            return Err(Error::os("UFFDIO_REGISTER"));
        }
        Ok(Missing {
            fd,
            given: AtomicU64::new(0),
        })
    }

    /// Hands out zeroed pages until `stop` is set.
    pub(crate) fn serve(&self, stop: &AtomicBool) {
        let mut poll = libc::pollfd {
            fd: self.fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        while !stop.load(Ordering::Acquire) {
            // SAFETY: one entry, ours.
            if unsafe { libc::poll(&mut poll, 1, 10) } <= 0 {
                continue;
            }
            let mut message = Message::default();
            let size = size_of::<Message>();
            // SAFETY: room for one message, of which any bytes are a value.
            let n = unsafe { libc::read(poll.fd, (&raw mut message).cast(), size) };
            if n != size as isize || message.event != EVENT_PAGEFAULT {
                continue;
            }
            let page = message.address & !(PAGE as u64 - 1);
            let mut range = Range([page, PAGE as u64, 0, 0]);
            // SAFETY: as above. EEXIST: somebody was faster. The faulting thread is woken.
            unsafe { libc::ioctl(poll.fd, IOCTL_ZEROPAGE, &mut range) };
            self.given.fetch_add(1, Ordering::Relaxed);
        }
    }
}
