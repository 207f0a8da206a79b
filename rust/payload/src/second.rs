// SPDX-License-Identifier: GPL-2.0-or-later
//! The other processors. They wait in the VMM for work and otherwise do nothing, so that there is one
//! thread of execution unless a test wants more.
//!
//! Statics that assume one processor (the guard of instructions that may fault, the child's stack
//! pointer) are safe as long as the first one waits and one other works. Work that runs beside others must use none of them.

use core::cell::Cell;

use protocol::ports;

use crate::{cpu, paging, trap, vmx};

/// Most processors.
pub const MOST: usize = 4;
/// Words of work: that of the second processor, and that of a crowd.
const ALONE: u32 = 1;
const TOGETHER: u32 = 2;

/// What the second processor is to do.
#[derive(Clone, Copy)]
struct Given(Option<*mut (dyn FnMut() + 'static)>);

/// What each processor of a crowd is to do; it is told its number.
#[derive(Clone, Copy)]
struct Crowd(Option<*const (dyn Fn(usize) + 'static)>);

struct Shared {
    given: Cell<Given>,
    crowd: Cell<Crowd>,
    vmxon: Cell<[u64; MOST]>,
    ready: Cell<usize>,
}

// SAFETY: the first processor writes before it gives work, which the others read after it was given;
// giving and waiting go through the VMM, which orders them.
unsafe impl Sync for Shared {}

static SHARED: Shared = Shared {
    given: Cell::new(Given(None)),
    crowd: Cell::new(Crowd(None)),
    vmxon: Cell::new([0; MOST]),
    ready: Cell::new(1),
};

/// Is there a second processor, in VMX operation?
pub fn available() -> bool {
    count() > 1
}

/// How many processors there are in VMX operation, with the first.
pub fn count() -> usize {
    SHARED.ready.get()
}

/// The second one's VMXON region.
pub fn vmxon_region() -> u64 {
    SHARED.vmxon.get()[1]
}

/// Gives the others, of `count` in all, what they need for VMX operation.
pub fn start(count: usize) {
    let mut regions = [0; MOST];
    for number in 1..count.min(MOST) {
        regions[number] = vmx::new_region();
        SHARED.vmxon.set(regions);
        let entered = Cell::new(false);
        one(number, &|number| {
            trap::init_other(number);
            paging::load();
            cpu::enable_xsave();
            let region = SHARED.vmxon.get()[number];
            entered.set(vmx::enable().is_ok() && vmx::ops::vmxon(region).is_ok());
        });
        if !entered.get() {
            return;
        }
        SHARED.ready.set(number + 1);
    }
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
    give(ALONE, 1 << 1);
}

/// Has one processor do something while the first one waits for it.
pub fn one(number: usize, work: &dyn Fn(usize)) {
    // SAFETY: it is done with when this returns, and nobody else works.
    unsafe { begin_crowd(1 << number, work) };
    wait();
}

/// Has all others do something, each on its own, and the first one as well; returns when all have.
///
/// # Safety
/// `work` must be such that several processors can do it at a time.
pub unsafe fn all(work: &dyn Fn(usize)) {
    let others = (1 << count()) - 2;
    // SAFETY: by the caller's promise; waited for below.
    unsafe { begin_crowd(others, work) };
    work(0);
    wait();
}

/// # Safety
/// As [`begin`] and [`all`].
unsafe fn begin_crowd(mask: u32, work: &dyn Fn(usize)) {
    // SAFETY: only forgets the lifetime, for which the caller vouches.
    let work: *const (dyn Fn(usize) + 'static) = unsafe { core::mem::transmute(work) };
    SHARED.crowd.set(Crowd(Some(work)));
    give(TOGETHER, mask);
}

fn give(word: u32, mask: u32) {
    cpu::out32(ports::GIVE_WORK, word | mask << 8);
}

/// Waits until they have done what they were given.
pub fn wait() {
    cpu::in32(ports::NEXT_WORK);
}

/// The life of any other processor, on a stack of its own.
pub extern "C" fn main(number: u64) -> ! {
    loop {
        match cpu::in32(ports::NEXT_WORK) {
            ALONE => {
                if let Given(Some(work)) = SHARED.given.get() {
                    // SAFETY: the first processor keeps it alive until we ask for the next work.
                    unsafe { (*work)() };
                }
            }
            TOGETHER => {
                if let Crowd(Some(work)) = SHARED.crowd.get() {
                    // SAFETY: as above.
                    unsafe { (*work)(number as usize) };
                }
            }
            _ => {}
        }
    }
}
