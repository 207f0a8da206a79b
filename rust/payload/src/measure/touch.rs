// SPDX-License-Identifier: GPL-2.0-or-later
//! First touches of pages, counted over whole passes: levels below fill several entries at one fault,
//! so single touches fall into two kinds, and what they cost on average per page is what a guest feels.
//!
//! A pass counts as a whole: where a level below fills entries ahead, a page costs nothing because another one
//! has cost more, and not the same one in each pass. Timer ticks of every level fall into it, as they do for any guest.

use core::arch::asm;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering::Relaxed};

use protocol::ports::{touch, TOUCH_BASE};
use protocol::{backdoor, Op, OpSpec, Pattern, Sample, Summary};

use super::Meter;
use crate::control;
use crate::cpu;
use crate::memory::PAGE;
use crate::vmx::child::{self, How, Registers};
use crate::vmx::ept::Ept;
use crate::vmx::ops::{vmread, vmwrite, VmxError};
use crate::vmx::setup::Features;
use crate::vmx::{exit, field};

/// Distance of the strided pattern, in pages.
const STRIDE: usize = 16;
/// Pages of a pass that is profiled.
const PROFILED: u32 = 2048;

/// What a child is to touch, and what it cost. A child shares the payload's memory, so this is how
/// the two talk.
struct Work {
    meter: AtomicPtr<Meter>,
    pages: AtomicU64,
    pass: AtomicU64,
    done: AtomicU64,
    /// The next pass is one between the profiler's marks.
    profile: AtomicBool,
}

static WORK: Work = Work {
    meter: AtomicPtr::new(core::ptr::null_mut()),
    pages: AtomicU64::new(0),
    pass: AtomicU64::new(0),
    done: AtomicU64::new(0),
    profile: AtomicBool::new(false),
};

/// Touches the pages named by `order`. A write, since a read of untouched memory may be served by a
/// shared page of zeros.
#[inline(always)]
fn touch_all(order: &[u32]) {
    for &page in order {
        // SAFETY: a page of the touch region, which holds no Rust object.
        unsafe { ((TOUCH_BASE + page as u64 * PAGE) as *mut u64).write_volatile(page as u64) };
    }
}

/// The child of the touch operations: one pass for each time it is resumed.
extern "C" fn touching_child() -> ! {
    // The first round only makes this code, its stack and its data known to the levels below.
    call();
    loop {
        let meter = WORK.meter.load(Relaxed);
        // SAFETY: the payload stored a pointer to its meter and does not use it until we exit again.
        let meter = unsafe { &mut *meter };
        let pages = WORK.pages.load(Relaxed) as usize;
        // The order itself must not be what faults.
        let sum = meter.order[..pages]
            .iter()
            .fold(0u64, |sum, &page| sum + page as u64);
        core::hint::black_box(sum);
        meter.pass(WORK.pass.load(Relaxed) as usize, pages);
        WORK.done.store(1, Relaxed);
        call();
    }
}

fn call() {
    // SAFETY: VMCALL exits; the payload resumes behind it, with every register as it was.
    unsafe { asm!("vmcall", options(nostack)) };
}

impl Meter {
    /// Measures a touch operation: ticks per page of the best, the middle and the worst pass, and thousandths of an
    /// exit per page of the best.
    pub(super) fn touch(&mut self, spec: OpSpec) -> Result<(Summary, u64), VmxError> {
        let pattern = spec.pattern.unwrap_or(Pattern::Sequential);
        let room = self.touch_pages / pattern.span(1) as u64;
        let pages = (spec.count as u64).min(room);
        assert!(pages > 0, "this VMM gives no touch region");
        let span = pattern.span(pages as u32);
        fill_order(&mut self.order[..pages as usize], pattern);
        // As with the other operations, a current VMCS whose child has run.
        super::ops::start(
            &self.children[0],
            Features::default(),
            &mut Registers::default(),
        )?;
        let passes = (spec.passes as usize).min(self.samples.len() - 1);
        // The first pass of all finds every level without tables of earlier ones, as no other does: it does not count.
        for pass in core::iter::once(0).chain(0..passes) {
            match spec.op {
                Op::TouchWarm | Op::TouchLarge | Op::TouchReflected => {
                    self.child_pass(spec.op, pass, pages)?
                }
                _ => self.own_pass(spec.op, pass, pages, span),
            }
        }
        // Touched once more nothing is missing: that is what the loop itself costs.
        touch_all(&self.order[..pages as usize]);
        self.pass(passes, pages as usize);
        let (measured, rest) = self.samples.split_at_mut(passes);
        let loop_cost = rest[0].ticks;
        measured.sort_unstable_by_key(|sample| sample.ticks);
        let best = measured[0];
        let per_page = |sample: Sample| sample.ticks.saturating_sub(loop_cost).div_ceil(pages);
        let summary = Summary {
            min: per_page(best),
            median: per_page(measured[passes / 2]),
            max: per_page(measured[passes - 1]),
            n: (pages * passes as u64) as u32,
            disturbed: 0,
            worst: per_page(measured[passes - 1]),
            exits: best.exits / pages,
        };
        Ok((summary, best.exits * 1000 / pages))
    }

    /// Touches the first `pages` pages of the order, and keeps what it cost as that of pass number `pass`.
    fn pass(&mut self, pass: usize, pages: usize) {
        let profile = WORK.profile.swap(false, Relaxed);
        if profile {
            // SAFETY: `Meter::profile` has seen that the backdoor answers.
            unsafe { cpu::xgetbv_known(backdoor::PROFILE_START) };
        }
        let order = &self.order[..pages];
        let sample = self.sample(&mut || touch_all(order));
        self.samples[pass] = sample;
        if profile {
            // SAFETY: as above.
            unsafe { cpu::xgetbv_known(backdoor::PROFILE_STOP) };
        }
    }

    /// The last of a few passes, between the profiler's marks.
    pub(super) fn touch_profiled(&mut self, op: Op) -> Result<(), VmxError> {
        let spec = |passes| OpSpec {
            op,
            count: PROFILED,
            pattern: None,
            passes,
        };
        self.touch(spec(2))?;
        WORK.profile.store(true, Relaxed);
        self.touch(spec(1))?;
        Ok(())
    }

    /// The payload touches its own region, which the VMM has dropped or populated.
    fn own_pass(&mut self, op: Op, pass: usize, pages: u64, span: u32) {
        let what = if op == Op::TouchCold {
            touch::DISCARD
        } else {
            touch::POPULATE
        };
        control::touch(what, span);
        self.pass(pass, pages as usize);
    }

    /// The child touches the region through tables that nobody has shadowed yet.
    fn child_pass(&mut self, op: Op, pass: usize, pages: u64) -> Result<(), VmxError> {
        let order = &self.order[..pages as usize];
        if op == Op::TouchLarge {
            // What L0 makes of a large page is found again by the next tables that have it, with all its entries.
            control::touch(touch::POPULATE, self.touch_pages as u32);
        }
        // L0 must have the pages: what is missing is only the child's mapping of them.
        touch_all(order);
        let ept = Ept::new(self.low, self.touch_pages);
        if op == Op::TouchWarm {
            order.iter().for_each(|&page| ept.map(page as u64));
        }
        if op == Op::TouchLarge {
            order.iter().for_each(|&page| ept.map_large(page as u64));
        }
        WORK.meter.store(self, Relaxed);
        WORK.pages.store(pages, Relaxed);
        WORK.pass.store(pass as u64, Relaxed);
        WORK.done.store(0, Relaxed);
        let features = Features {
            ept: Some(ept.pointer()),
            vpid: Some(1),
            unrestricted: true,
        };
        let child = self.children[0];
        child.prepare(features, touching_child)?;
        let mut registers = Registers::default();
        // SAFETY: the child runs `touching_child` on its own stack and writes WORK and the touch region only.
        unsafe { child::enter(How::Launch, &mut registers) }?;
        loop {
            match vmread(field::VM_EXIT_REASON)? {
                exit::VMCALL if WORK.done.load(Relaxed) != 0 => return Ok(()),
                exit::VMCALL => {
                    let length = vmread(field::VM_EXIT_INSTRUCTION_LEN)?;
                    vmwrite(field::GUEST_RIP, vmread(field::GUEST_RIP)? + length)?;
                }
                exit::EPT_VIOLATION => {
                    let address = vmread(field::GUEST_PHYSICAL_ADDRESS)?;
                    ept.map((address - TOUCH_BASE) / PAGE);
                }
                other => panic!("the child left for reason {other:#x}"),
            }
            // SAFETY: as for the launch.
            unsafe { child::enter(How::Resume, &mut registers) }?;
        }
    }
}

/// Writes each page number once, in the pattern's order.
pub fn fill_order(order: &mut [u32], pattern: Pattern) {
    let pages = order.len();
    match pattern {
        Pattern::Sequential => (0..pages).for_each(|at| order[at] = at as u32),
        Pattern::Strided => {
            let numbers = (0..STRIDE).flat_map(|first| (first..pages).step_by(STRIDE));
            order
                .iter_mut()
                .zip(numbers)
                .for_each(|(slot, page)| *slot = page as u32);
        }
        Pattern::Sparse => (0..pages).for_each(|at| order[at] = at as u32 * Pattern::SPARSE),
        Pattern::Random => {
            (0..pages).for_each(|at| order[at] = at as u32);
            // Fisher-Yates with xorshift64: the same order on every machine and in every run.
            let mut state = 0x4d54_5200_2545_f491u64;
            for at in (1..pages).rev() {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                order.swap(at, (state % (at as u64 + 1)) as usize);
            }
        }
    }
}
