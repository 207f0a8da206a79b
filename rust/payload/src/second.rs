// SPDX-License-Identifier: GPL-2.0-or-later
//! The second processor. It waits in the VMM for work and otherwise does nothing, so that there is one
//! thread of execution unless a test wants two.
//!
//! Statics that assume one processor (the guard of instructions that may fault, the child's stack
//! pointer) are safe as long as the first one waits. Work that runs beside it must use none of them.

use core::cell::Cell;

use protocol::ports;

use crate::{cpu, paging, trap, vmx};

/// What the second processor is to do.
#[derive(Clone, Copy)]
struct Given(Option<*mut (dyn FnMut() + 'static)>);

struct Shared {
    given: Cell<Given>,
    vmxon: Cell<u64>,
    ready: Cell<bool>,
}

// SAFETY: the first processor writes before it gives work, which the second one reads after it was given;
// giving and waiting go through the VMM, which orders them.
unsafe impl Sync for Shared {}

static SHARED: Shared = Shared {
    given: Cell::new(Given(None)),
    vmxon: Cell::new(0),
    ready: Cell::new(false),
};

/// Is there a second processor, in VMX operation?
pub fn available() -> bool {
    SHARED.ready.get()
}

/// Its VMXON region.
pub fn vmxon_region() -> u64 {
    SHARED.vmxon.get()
}

/// Gives it what it needs for VMX operation.
pub fn start() {
    SHARED.vmxon.set(vmx::new_region());
    let mut entered = false;
    run(&mut || {
        trap::init_second();
        paging::load();
        cpu::enable_xsave();
        entered = vmx::enable().is_ok() && vmx::ops::vmxon(vmxon_region()).is_ok();
    });
    SHARED.ready.set(entered);
}

/// Has the second processor do something while the first one waits for it.
pub fn run(work: &mut dyn FnMut()) {
    // SAFETY: it is done with when this returns.
    unsafe { begin(work) };
    wait();
}

/// Has it begin something, and goes on.
///
/// # Safety
/// `work` and what it borrows must live, and be left alone, until [`wait`] has returned; and it must not
/// use what only one processor can use.
pub unsafe fn begin(work: &mut dyn FnMut()) {
    // SAFETY: only forgets the lifetime, for which the caller vouches.
    let work: *mut (dyn FnMut() + 'static) = unsafe { core::mem::transmute(work) };
    SHARED.given.set(Given(Some(work)));
    cpu::out32(ports::GIVE_WORK, 1);
}

/// Waits until it has done what it was given.
pub fn wait() {
    cpu::in32(ports::NEXT_WORK);
}

/// The second processor's life, on a stack of its own.
pub extern "C" fn main() -> ! {
    loop {
        if cpu::in32(ports::NEXT_WORK) == 0 {
            continue;
        }
        if let Given(Some(work)) = SHARED.given.get() {
            // SAFETY: the first processor keeps it alive until we ask for the next work.
            unsafe { (*work)() };
        }
    }
}
