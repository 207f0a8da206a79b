// SPDX-License-Identifier: GPL-2.0-or-later
//! The five functions that compiled code calls without being asked to. On the host's target they come
//! from the C library, which is not there. String instructions, so that the compiler cannot turn the
//! body of one into a call of itself.

use core::arch::asm;

/// # Safety
/// As in C.
#[no_mangle]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    // SAFETY: the caller's ranges are valid and do not overlap; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep movsb", inout("rcx") bytes => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As in C.
#[no_mangle]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= bytes {
        // SAFETY: copying upwards does not overwrite what is still to be read.
        return unsafe { memcpy(to, from, bytes) };
    }
    // SAFETY: copying downwards does not either; bytes is above 0 here. The flag is cleared again.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") bytes => _,
            inout("rdi") to.add(bytes - 1) => _, inout("rsi") from.add(bytes - 1) => _,
            options(nostack));
    }
    to
}

/// # Safety
/// As in C.
#[no_mangle]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, bytes: usize) -> *mut u8 {
    // SAFETY: the caller's range is valid.
    unsafe {
        asm!("rep stosb", inout("rcx") bytes => _, inout("rdi") to => _, in("al") byte as u8,
            options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As in C.
#[no_mangle]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, bytes: usize) -> i32 {
    let (after_a, after_b): (*const u8, *const u8);
    let differ: u8;
    // SAFETY: the caller's ranges are valid. The comparison first sets ZF, for no bytes at all.
    unsafe {
        asm!("cmp rcx, rcx", "repe cmpsb", "setne {differ}", inout("rcx") bytes => _,
            inout("rsi") a => after_a, inout("rdi") b => after_b, differ = out(reg_byte) differ,
            options(nostack));
        if differ == 0 {
            0
        } else {
            *after_a.sub(1) as i32 - *after_b.sub(1) as i32
        }
    }
}

/// # Safety
/// As in C.
#[no_mangle]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, bytes: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(a, b, bytes) }
}
