// SPDX-License-Identifier: GPL-2.0-or-later
//! The laboratory emulator's exit counter ([`protocol::backdoor`]), read from user
//! space at any level.

use std::arch::asm;

use protocol::backdoor::{EXITS, PRESENT, PRESENT_MAGIC};

/// Whether this machine is the laboratory's emulator.
///
/// Elsewhere the instruction that asks raises #GP, which ends the process that
/// executes it. So a child does, once: what it finds is true of every level.
pub fn present() -> bool {
    // SAFETY: between fork and _exit the child makes no call but setrlimit and _exit;
    // it executes one instruction that either returns or ends it.
    unsafe {
        match libc::fork() {
            0 => {
                // Its end is no crash that anybody should get a core file of.
                let none = libc::rlimit {
                    rlim_cur: 0,
                    rlim_max: 0,
                };
                libc::setrlimit(libc::RLIMIT_CORE, &none);
                libc::_exit(i32::from(xgetbv(PRESENT) != PRESENT_MAGIC));
            }
            -1 => false,
            child => {
                let mut status = 0;
                libc::waitpid(child, &mut status, 0) == child
                    && libc::WIFEXITED(status)
                    && libc::WEXITSTATUS(status) == 0
            }
        }
    }
}

/// How many VM exits the emulated CPU has made so far, all of them into L0.
///
/// # Safety
///
/// [`present`] must have said yes on L0 of this machine; otherwise this ends the
/// process.
pub unsafe fn exits() -> u64 {
    // SAFETY: the caller knows that the instruction answers.
    unsafe { xgetbv(EXITS) }
}

/// This level's time stamp counter, after everything before it has retired.
pub fn ticks() -> u64 {
    // SAFETY: LFENCE and RDTSC are in every 64-bit CPU that has VMX, and change nothing.
    unsafe {
        std::arch::x86_64::_mm_lfence();
        std::arch::x86_64::_rdtsc()
    }
}

/// # Safety
///
/// The machine must accept this number.
unsafe fn xgetbv(number: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a register; the caller knows that it exists.
    unsafe {
        asm!("xgetbv", in("ecx") number, out("eax") low, out("edx") high, options(nomem, nostack));
    }
    (u64::from(high) << 32) | u64::from(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asking_is_survived() {
        // Whatever the answer is on the machine that runs the tests.
        present();
    }

    #[test]
    fn time_does_not_stand_still() {
        let t = ticks();
        assert!(ticks() > t);
    }
}
