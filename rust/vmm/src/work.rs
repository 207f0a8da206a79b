// SPDX-License-Identifier: GPL-2.0-or-later
//! Work that a payload's first processor gives its second one, and moving both across the host's.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// How long to wait before looking whether the machine is to end.
const LOOK: Duration = Duration::from_millis(20);
/// Microseconds from one move to the next, on average.
pub(crate) const MOVE_US: u64 = 400;

#[derive(Debug, Default)]
struct State {
    given: Option<u32>,
    busy: bool,
}

/// What passes between two processors of a payload.
#[derive(Debug, Default)]
pub(crate) struct Work {
    state: Mutex<State>,
    changed: Condvar,
}

impl Work {
    /// The first processor gives a word.
    pub(crate) fn give(&self, word: u32) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.given = Some(word);
        state.busy = true;
        self.changed.notify_all();
    }

    /// The second one waits for it (`second`), or the first for the second's being done with it. 0 if
    /// the machine ends meanwhile.
    pub(crate) fn next(&self, second: bool, stop: &AtomicBool) -> u32 {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if second && state.given.is_none() {
            state.busy = false;
            self.changed.notify_all();
        }
        while !stop.load(Ordering::Acquire) {
            match second {
                true => {
                    if let Some(word) = state.given.take() {
                        return word;
                    }
                }
                false if !state.busy => return 0,
                false => {}
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
                assert_eq!(work.next(true, &stop), 7);
                assert_eq!(work.next(true, &stop), 8);
                assert_eq!(work.next(true, &stop), 0);
            });
            work.give(7);
            work.next(false, &stop);
            work.give(8);
            work.next(false, &stop);
            stop.store(true, Ordering::Release);
        });
        assert!(!processors().is_empty());
    }
}
