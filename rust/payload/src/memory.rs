// SPDX-License-Identifier: GPL-2.0-or-later
//! Zeroed pages, handed out from the end of the image on and never taken back one by one.

use core::cell::Cell;

/// Size of a page.
pub const PAGE: u64 = 4096;

extern "C" {
    static __image_end: u8;
}

struct Arena {
    next: Cell<u64>,
    end: Cell<u64>,
}

// SAFETY: one CPU, no interrupts, no threads.
unsafe impl Sync for Arena {}

static ARENA: Arena = Arena {
    next: Cell::new(0),
    end: Cell::new(0),
};

/// The VMM asks for pages of this size to back the memory with.
const LARGE: usize = 2 << 20;

/// Makes the memory behind the image available, and has it backed: otherwise it would depend on how much was
/// measured before what is resident after an operation.
///
/// # Safety
/// There must be `bytes` of memory from address 0, and nothing allocated yet.
pub unsafe fn init(bytes: u64) {
    ARENA.next.set(&raw const __image_end as u64);
    ARENA.end.set(bytes);
    for address in (ARENA.next.get()..bytes).step_by(LARGE) {
        // SAFETY: memory that nobody has been given yet.
        unsafe { (address as *mut u8).write_volatile(0) };
    }
}

/// `count` consecutive zeroed pages; their address, which is physical and linear alike.
pub fn pages(count: u64) -> u64 {
    let start = ARENA.next.get();
    let bytes = count * PAGE;
    assert!(
        start + bytes <= ARENA.end.get(),
        "the payload is out of memory"
    );
    ARENA.next.set(start + bytes);
    // SAFETY: between the image's end and the memory's, identity-mapped, handed out once.
    unsafe { core::ptr::write_bytes(start as *mut u8, 0, bytes as usize) };
    start
}

/// Remembers how much is in use.
pub fn mark() -> u64 {
    ARENA.next.get()
}

/// Gives back everything handed out since the mark.
///
/// # Safety
/// None of it may be in use any more, by the processor either.
pub unsafe fn release(mark: u64) {
    ARENA.next.set(mark);
}

/// A zeroed slice of plain numbers, never freed.
pub fn slice<T: Plain>(len: usize) -> &'static mut [T] {
    let bytes = (len * size_of::<T>()) as u64;
    let start = pages(bytes.div_ceil(PAGE).max(1));
    // SAFETY: the pages are exclusively ours, aligned, zeroed, and zero is a valid Plain.
    unsafe { core::slice::from_raw_parts_mut(start as *mut T, len) }
}

/// Types for which all zeros is a value.
///
/// # Safety
/// That must be so.
pub unsafe trait Plain: 'static {}
// SAFETY: an integer.
unsafe impl Plain for u64 {}
// SAFETY: an integer.
unsafe impl Plain for u32 {}
// SAFETY: two integers.
unsafe impl Plain for protocol::Sample {}
