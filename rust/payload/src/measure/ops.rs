// SPDX-License-Identifier: GPL-2.0-or-later
//! The operations that are sampled one by one.

use core::arch::asm;
use core::hint::black_box;

use protocol::{backdoor, op::PHASES, ports, Op};

use super::Meter;
use crate::cpu;
use crate::vmx::child::{self, How, Registers};
use crate::vmx::ops::{raw, vmclear, vmptrld, vmread, VmxError};
use crate::vmx::setup::{Child, Features};
use crate::vmx::{exit, field};

/// Length of VMCALL.
const VMCALL_LENGTH: u64 = 3;

/// What happens to each operation: sampled many times, or profiled once.
trait Sink {
    fn take(&mut self, operation: impl FnMut());
    /// The same without any operation before the first that counts.
    fn take_cold(&mut self, operation: impl FnMut());
}

struct Samples<'a>(&'a mut Meter, u32);

impl Sink for Samples<'_> {
    #[inline(always)]
    fn take(&mut self, operation: impl FnMut()) {
        self.0
            .collect(super::warm_up(self.0.level), self.1, operation);
    }

    fn take_cold(&mut self, operation: impl FnMut()) {
        self.0.collect(0, self.1, operation);
    }
}

/// The level that the operation runs at.
struct Profiler(u32);

impl Sink for Profiler {
    fn take(&mut self, mut operation: impl FnMut()) {
        for _ in 0..super::warm_up(self.0) {
            operation();
        }
        self.take_cold(operation);
    }

    fn take_cold(&mut self, mut operation: impl FnMut()) {
        // SAFETY: `Meter::profile` has seen that the backdoor answers.
        unsafe { cpu::xgetbv_known(backdoor::PROFILE_START) };
        operation();
        // SAFETY: as above.
        unsafe { cpu::xgetbv_known(backdoor::PROFILE_STOP) };
    }
}

/// The child of the hypercall operations.
extern "C" fn calling_child() -> ! {
    loop {
        // SAFETY: VMCALL exits; the payload resumes behind it, with every register as it was.
        unsafe { asm!("vmcall", options(nomem, nostack)) };
    }
}

/// Makes `child` current and launches it to its first VMCALL.
pub(super) fn start(
    child: &Child,
    features: Features,
    registers: &mut Registers,
) -> Result<(), VmxError> {
    child.prepare(features, calling_child)?;
    // SAFETY: the child executes VMCALL and a jump, and HOST_RIP is as `prepare` sets it.
    unsafe { child::enter(How::Launch, registers) }?;
    expect_vmcall()
}

/// Says whether the last exit was the VMCALL that it should have been.
fn expect_vmcall() -> Result<(), VmxError> {
    let reason = vmread(field::VM_EXIT_REASON)?;
    assert!(
        reason == exit::VMCALL,
        "the child left for reason {reason:#x}, not for a VMCALL"
    );
    Ok(())
}

impl Meter {
    pub(super) fn one_by_one(&mut self, op: Op, count: u32) -> Result<(), VmxError> {
        let context = self.context(op)?;
        perform(op, &context, &mut Samples(self, count))
    }

    pub(super) fn one_profiled(&mut self, op: Op) -> Result<(), VmxError> {
        let context = self.context(op)?;
        perform(op, &context, &mut Profiler(self.level))
    }

    fn context(&mut self, op: Op) -> Result<Context, VmxError> {
        let features = match op {
            Op::HypercallEpt => self.modern(),
            _ => Features::default(),
        };
        Ok(Context {
            children: self.children,
            features,
        })
    }
}

/// What an operation works on.
struct Context {
    children: [Child; 2],
    features: Features,
}

fn perform(op: Op, context: &Context, sink: &mut impl Sink) -> Result<(), VmxError> {
    let mut registers = Registers::default();
    let [first, second] = context.children;
    // Every operation is measured with a current VMCS whose child has run, also those that have nothing to
    // do with it: a level below that has shadowing on for us copies the shadow VMCS on each of our
    // exits, so without one the same operation is a cheaper one.
    start(&first, context.features, &mut registers)?;
    match op {
        Op::Hypercall | Op::HypercallLean | Op::HypercallEpt => {
            if op == Op::Hypercall {
                sink.take(|| hypercall(&mut registers, true));
            } else {
                sink.take(|| hypercall(&mut registers, false));
            }
            expect_vmcall()?;
        }
        Op::KvmHypercall => sink.take(|| {
            let number = u64::MAX; // none of KVM's
                                   // SAFETY: the parent's KVM answers -KVM_ENOSYS in RAX and changes nothing else.
            unsafe {
                asm!(
                    "push rbx", "xor ebx, ebx", "vmcall", "pop rbx",
                    inout("rax") number => _,
                    in("rcx") 0, in("rdx") 0, in("rsi") 0,
                );
            }
        }),
        Op::Cpuid => sink.take(|| {
            black_box(cpu::cpuid(0, 0));
        }),
        Op::Pio => sink.take(|| cpu::out32(ports::NOP, 0)),
        Op::VmreadShadowed => {
            sink.take(|| {
                // SAFETY: in root operation with a current VMCS.
                black_box(unsafe { raw::vmread(field::GUEST_RIP) });
            });
        }
        Op::VmreadUnshadowed => {
            sink.take(|| {
                // SAFETY: as above.
                black_box(unsafe { raw::vmread(field::GUEST_ES_SELECTOR) });
            });
        }
        Op::VmwriteUnshadowed => {
            let value = vmread(field::GUEST_ES_SELECTOR)?;
            // SAFETY: as above.
            sink.take(|| unsafe { raw::vmwrite(field::GUEST_ES_SELECTOR, value) });
        }
        Op::VmptrldSame => {
            // SAFETY: as above.
            sink.take(|| unsafe { raw::vmptrld(&first.vmcs) });
        }
        Op::VmptrldSwitch => {
            start(&second, context.features, &mut registers)?;
            vmptrld(first.vmcs)?;
            let (mut current, mut other) = (first.vmcs, second.vmcs);
            sink.take(|| {
                core::mem::swap(&mut current, &mut other);
                // SAFETY: as above.
                unsafe { raw::vmptrld(&current) }
            });
            vmclear(second.vmcs)?;
            vmptrld(first.vmcs)?;
        }
        Op::VmclearVmptrld => {
            // SAFETY: as above.
            sink.take(|| unsafe {
                raw::vmclear(&first.vmcs);
                raw::vmptrld(&first.vmcs);
            });
        }
        Op::Phases | Op::PhasesShort => {
            let length = op.phase().unwrap_or(0);
            sink.take_cold(|| {
                for fields in &PHASE_FIELDS {
                    for _ in 0..length {
                        use_fields(fields);
                        hypercall(&mut registers, false);
                    }
                }
            });
            expect_vmcall()?;
        }
        Op::TouchWarm | Op::TouchLarge | Op::TouchReflected | Op::TouchUnmapped | Op::TouchCold => {
            unreachable!("touch operations are not sampled one by one")
        }
        Op::Boot => unreachable!("no list of operations can have it"),
    }
    Ok(())
}

/// What is read and written in each phase: guest-state, host-state and control fields, none of which stock KVM shadows.
const PHASE_FIELDS: [[u32; 12]; PHASES as usize] = [
    // Selectors, bases and limits of the host and the guest.
    [
        0x0c00, 0x0c02, 0x0c04, 0x0c06, 0x0c08, 0x0c0a, 0x0c0c, 0x4c00, 0x6c00, 0x6c02, 0x6c04,
        0x6c0a,
    ],
    [
        0x0800, 0x0804, 0x0806, 0x0808, 0x080a, 0x080c, 0x080e, 0x4800, 0x4804, 0x4806, 0x4808,
        0x480a,
    ],
    // Addresses and counts.
    [
        0x2000, 0x2002, 0x2006, 0x2008, 0x200a, 0x2010, 0x4006, 0x4008, 0x400a, 0x400e, 0x4010,
        0x4014,
    ],
    // Some of each.
    [
        0x0c00, 0x0c04, 0x0c08, 0x0c0c, 0x2000, 0x2006, 0x200a, 0x4006, 0x400a, 0x6806, 0x680a,
        0x680c,
    ],
];

/// Reads all of these fields and writes every other one, with the value that it has.
#[inline(always)]
fn use_fields(fields: &[u32]) {
    for (number, &field) in fields.iter().enumerate() {
        // SAFETY: in root operation with a current VMCS; a field that the parent lacks fails without effect.
        unsafe {
            let value = raw::vmread(field);
            if number % 2 == 0 {
                raw::vmwrite(field, value);
            } else {
                black_box(value);
            }
        }
    }
}

/// One hypercall of the child, from its VMCALL's exit to the next one's.
#[inline(always)]
fn hypercall(registers: &mut Registers, write_host: bool) {
    // SAFETY: in root operation; the child is launched and stands at a VMCALL, behind which it is
    // resumed to run into the next one.
    unsafe {
        let rip = raw::vmread(field::GUEST_RIP);
        raw::vmwrite(field::GUEST_RIP, rip + VMCALL_LENGTH);
        child::resume(registers, write_host);
    }
}
