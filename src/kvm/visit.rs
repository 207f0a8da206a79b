// SPDX-License-Identifier: GPL-2.0
//! Work in another process's address space.

use crate::{alloc, bindings};
use core::pin::Pin;
use kernel::{mm::Mm, prelude::*, sync::Completion};

/// What a kernel thread is to do.
struct Visit<'a> {
    mm: *mut bindings::mm_struct,
    work: &'a mut (dyn FnMut() + Send),
    done: Pin<&'a Completion>,
}

/// The thread's function.
///
/// # Safety
///
/// `data` is a `Visit` that lives until `done`.
unsafe extern "C" fn run(data: *mut kernel::ffi::c_void) -> kernel::ffi::c_int {
    // SAFETY: By this function's contract; whoever made it waits.
    let visit = unsafe { &mut *data.cast::<Visit<'_>>() };
    // SAFETY: A kernel thread without an address space of its own; `mm` has a user meanwhile.
    unsafe { bindings::kthread_use_mm(visit.mm) };
    (visit.work)();
    // SAFETY: As above.
    unsafe { bindings::kthread_unuse_mm(visit.mm) };
    visit.done.complete_all();
    // `visit` may be gone now. Not before kthread_stop(), which needs the thread to be there.
    // SAFETY: In a kernel thread.
    while !unsafe { bindings::kthread_should_stop() } {
        // SAFETY: As above.
        unsafe { bindings::msleep(1) };
    }
    0
}

/// Does something with `mm` as the current address space, in a kernel thread that is gone when this returns. An address
/// space that no process uses any more is not visited (ESRCH).
///
/// # Safety
///
/// `mm` exists.
pub(crate) unsafe fn visit(
    mm: *mut bindings::mm_struct,
    work: &mut (dyn FnMut() + Send),
) -> Result {
    // SAFETY: By this function's contract.
    let user = unsafe { Mm::from_raw(mm.cast()) }
        .mmget_not_zero()
        .ok_or(ESRCH)?;
    alloc::MODULE.gate()?;
    let done = KBox::pin_init(Completion::new(), GFP_KERNEL)?;
    let mut visit = Visit {
        mm,
        work,
        done: done.as_ref(),
    };
    // SAFETY: The function and its argument outlive the thread, which is stopped below.
    let task = unsafe {
        bindings::kthread_create_on_node(
            Some(run),
            (&raw mut visit).cast(),
            -1,
            kernel::c_str!("mtk_walk").as_char_ptr(),
        )
    };
    if (task as isize) < 0 && (task as isize) >= -4095 {
        return Err(Error::from_errno(task as isize as i32));
    }
    // SAFETY: A thread that has just been made.
    unsafe { bindings::wake_up_process(task) };
    done.wait_for_completion();
    // SAFETY: It does not end before this.
    unsafe { bindings::kthread_stop(task) };
    drop(user);
    Ok(())
}
