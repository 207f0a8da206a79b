// SPDX-License-Identifier: GPL-2.0-or-later
//! Work that a payload's first processor gives the others, and moving both across the host's.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// How long to wait before looking whether the machine is to end.
const LOOK: Duration = Duration::from_millis(20);
/// Microseconds from one move to the next, on average.
pub(crate) const MOVE_US: u64 = 400;

/// Most processors that work can be given.
const MOST: usize = 8;

#[derive(Debug, Default)]
struct State {
    /// What each processor is given.
    given: [u32; MOST],
    /// A bit for each processor that has not done what it was given.
    busy: u32,
}

/// What passes between the processors of a payload.
#[derive(Debug, Default)]
pub(crate) struct Work {
    state: Mutex<State>,
    changed: Condvar,
}

impl Work {
    /// The first processor gives a word: bits 7:0 what, bits 31:8 a bit for each processor that is to have it.
    pub(crate) fn give(&self, word: u32) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mask = word >> 8;
        for (number, given) in state.given.iter_mut().enumerate() {
            if (mask >> number) & 1 != 0 {
                *given = word & 0xff;
            }
        }
        state.busy |= mask;
        self.changed.notify_all();
    }

    /// Another processor (`number` above 0) waits for it, or the first for the others' being done with it. 0 if
    /// the machine ends meanwhile.
    pub(crate) fn next(&self, number: usize, stop: &AtomicBool) -> u32 {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.given.get(number) == Some(&0) {
            state.busy &= !(1 << number);
            self.changed.notify_all();
        }
        while !stop.load(Ordering::Acquire) {
            match number {
                0 if state.busy == 0 => return 0,
                0 => {}
                _ => {
                    let given = state.given.get_mut(number).map(std::mem::take);
                    if let Some(word) = given.filter(|&word| word != 0) {
                        return word;
                    }
                }
            }
            let waited = self.changed.wait_timeout(state, LOOK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        0
    }
}

/// The host's processors that this process may run on.
pub(crate) fn processors() -> Vec<usize> {
    // SAFETY: an all-zero set is an empty one; the kernel writes at most its size.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set);
        set
    };
    (0..libc::CPU_SETSIZE as usize)
        // SAFETY: below the set's size.
        .filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) })
        .collect()
}

/// Moves a thread to a processor. False if that cannot be.
pub(crate) fn move_to(thread: libc::pid_t, cpu: usize) -> bool {
    // SAFETY: the set is ours; `cpu` is one of `processors`. A thread that is gone is an error, no more.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(thread, size_of::<libc::cpu_set_t>(), &set) == 0
    }
}

/// Makes a child that ends at once. False if there can be none.
pub(crate) fn fork_once() -> bool {
    // SAFETY: the child does nothing but end, which is allowed after a fork of a process with threads.
    unsafe {
        match libc::fork() {
            -1 => false,
            0 => libc::_exit(0),
            child => {
                let mut status = 0;
                libc::waitpid(child, &mut status, 0) == child
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_given_done_and_waited_for() {
        let (work, stop) = (Work::default(), AtomicBool::new(false));
        std::thread::scope(|s| {
            s.spawn(|| {
                assert_eq!(work.next(1, &stop), 7);
                assert_eq!(work.next(1, &stop), 8);
                assert_eq!(work.next(1, &stop), 0);
            });
            s.spawn(|| {
                assert_eq!(work.next(3, &stop), 8);
                assert_eq!(work.next(3, &stop), 0);
            });
            work.give(7 | (1 << 9));
            work.next(0, &stop);
            work.give(8 | (0b1010 << 8));
            work.next(0, &stop);
            stop.store(true, Ordering::Release);
        });
        assert!(!processors().is_empty());
    }
}
