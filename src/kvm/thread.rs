// SPDX-License-Identifier: GPL-2.0
//! Sending a vCPU's thread out of KVM_RUN.

use crate::bindings;
use core::sync::atomic::{AtomicUsize, Ordering};
use kernel::{sync::rcu, task::TASK_INTERRUPTIBLE};

// The flags are the first word of a task.
const _: () = assert!(core::mem::offset_of!(bindings::task_struct, thread_info) == 0);

/// Makes the thread of this number (in the initial namespace) leave an interruptible wait and
/// KVM_RUN as if a signal were pending, without one: what `set_notify_signal()` does, but for the interrupt to one that runs, which its
/// next tick does as well. A number that
/// belongs to nobody, or to somebody else by now, does no harm: at worst a system call is restarted.
pub(crate) fn interrupt(thread: i32) {
    let _guard = rcu::read_lock();
    // SAFETY: Under RCU; a task that is found stays while the guard lives.
    unsafe {
        let pid = bindings::find_pid_ns(thread, &raw mut bindings::init_pid_ns);
        let task = bindings::pid_task(pid, bindings::pid_type_PIDTYPE_PID);
        if !task.is_null() {
            let flags = AtomicUsize::from_ptr(task.cast());
            flags.fetch_or(1 << bindings::TIF_NOTIFY_SIGNAL, Ordering::SeqCst);
            // It looks at the flag before it sleeps, and a wait that ends early for nothing begins anew.
            let state = (&raw const (*task).__state).read_volatile();
            if state & TASK_INTERRUPTIBLE as u32 != 0 {
                bindings::wake_up_process(task);
            }
        }
    }
}
