// SPDX-License-Identifier: GPL-2.0-or-later
//! One virtual CPU: its state at the start and its loop of exits.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use kvm_bindings::{kvm_mp_state, kvm_msr_entry, CpuId, Msrs, KVM_MP_STATE_RUNNABLE};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};

use crate::boot::{self, Entry};
use crate::control::{GIVE_WORK, NEXT_WORK, NOP};
use crate::cpuid::{self, Topology};
use crate::device::{Bus, Flow};
use crate::dump;
use crate::machine::{Config, Exit};
use crate::shuffle::{Due, Shuffler};
use crate::work::Work;
use crate::{Error, Result};

const MSR_IA32_FEATURE_CONTROL: u32 = 0x3a;
const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MSR_IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
/// Locked, VMXON allowed outside SMX: what firmware leaves behind where VMX may be
/// used. KVM refuses VMXON without it.
const FEATURE_CONTROL_VMX: u64 = 0b101;
/// Fast strings; Linux gives up `rep movs` where the bit is clear.
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// MTRRs on, default type write-back.
const MTRR_WRITE_BACK: u64 = (1 << 11) | 6;

/// Makes vCPU `id`. The boot processor (id 0) gets `entry`; the others
/// wait for INIT and SIPI, or begin there as well.
pub(crate) fn create(
    kvm: &Kvm,
    vm: &VmFd,
    id: u8,
    config: &Config,
    entry: &Entry,
    cpuid: &CpuId,
) -> Result<VcpuFd> {
    let vcpu = vm
        .create_vcpu(id.into())
        .map_err(Error::kvm("KVM_CREATE_VCPU"))?;
    let mut cpuid = cpuid.clone();
    let topology = Topology {
        apic_id: id.into(),
        cpus: config.cpus.into(),
        tsc_khz: vcpu.get_tsc_khz().map_err(Error::kvm("KVM_GET_TSC_KHZ"))?,
        umip: cpuid::host_has_umip(),
        tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
    };
    cpuid::mend(cpuid.as_mut_slice(), &topology);
    vcpu.set_cpuid2(&cpuid)
        .map_err(Error::kvm("KVM_SET_CPUID2"))?;
    set_msrs(&vcpu, vmx(&cpuid))?;
    if id == 0 || config.all_begin {
        let mut sregs = vcpu.get_sregs().map_err(Error::kvm("KVM_GET_SREGS"))?;
        boot::long_mode(&mut sregs);
        vcpu.set_sregs(&sregs)
            .map_err(Error::kvm("KVM_SET_SREGS"))?;
        let mut regs = boot::registers(entry);
        if id != 0 {
            regs.rsi = id.into();
            let runnable = kvm_mp_state {
                mp_state: KVM_MP_STATE_RUNNABLE,
            };
            vcpu.set_mp_state(runnable)
                .map_err(Error::kvm("KVM_SET_MP_STATE"))?;
        }
        vcpu.set_regs(&regs).map_err(Error::kvm("KVM_SET_REGS"))?;
    }
    Ok(vcpu)
}

/// Whether the guest is told that it has VMX (CPUID leaf 1, ECX bit 5).
fn vmx(cpuid: &CpuId) -> bool {
    cpuid
        .as_slice()
        .iter()
        .any(|e| e.function == 1 && e.ecx & (1 << 5) != 0)
}

/// Sets what firmware would have set.
fn set_msrs(vcpu: &VcpuFd, vmx: bool) -> Result<()> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let mut list = vec![
        entry(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MSR_IA32_MTRR_DEF_TYPE, MTRR_WRITE_BACK),
    ];
    if vmx {
        list.push(entry(MSR_IA32_FEATURE_CONTROL, FEATURE_CONTROL_VMX));
    }
    for e in &mut list {
        let mut one = Msrs::from_entries(&[*e])
            .map_err(|_| Error::Memory("no memory for a list of MSRs".into()))?;
        // Bits that KVM has set in MISC_ENABLE (BTS and PEBS unavailable) stay.
        if e.index == MSR_IA32_MISC_ENABLE
            && vcpu
                .get_msrs(&mut one)
                .map_err(Error::kvm("KVM_GET_MSRS"))?
                == 1
        {
            e.data |= one.as_slice()[0].data;
        }
    }
    let msrs = Msrs::from_entries(&list)
        .map_err(|_| Error::Memory("no memory for a list of MSRs".into()))?;
    let n = vcpu.set_msrs(&msrs).map_err(Error::kvm("KVM_SET_MSRS"))?;
    if n != list.len() {
        return Err(Error::Stack(format!(
            "KVM does not take MSR {:#x}",
            list[n].index
        )));
    }
    Ok(())
}

/// What a vCPU is connected to.
pub(crate) struct Place<'a, 'b> {
    pub(crate) bus: &'a Mutex<Bus<'b>>,
    pub(crate) work: &'a Work,
    /// Its number, 0 for the boot processor.
    pub(crate) number: usize,
    /// The machine is to end, or to rest.
    pub(crate) stop: &'a AtomicBool,
    /// It is to be saved.
    pub(crate) saving: &'a AtomicBool,
}

/// Runs until the machine ends or is to stop; `None` for the latter. If it is to be saved, nothing of the last exit is then
/// left to be completed. With a shuffler, goes on in a new VM whenever the flag beside it says so.
pub(crate) fn run(
    vcpu: &mut VcpuFd,
    place: &Place,
    mut shuffle: Option<(&mut Shuffler, &Due)>,
) -> Option<Exit> {
    // A panic under the lock ends the process (panic=abort), so poison means little.
    let lock = || place.bus.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let settle = place.stop.load(Ordering::Acquire);
        if settle && !place.saving.load(Ordering::Acquire) {
            return None;
        }
        let due = settle
            || shuffle.as_mut().is_some_and(|(shuffler, due)| {
                shuffler.exit(due);
                due.is_now()
            });
        // With this KVM_RUN only completes what the last exit has left to do, and then says EINTR; or it
        // makes an exit of its own, such as for the next element of a string.
        vcpu.set_kvm_immediate_exit(due.into());
        let bad = match vcpu.run() {
            Ok(VcpuExit::IoOut(NOP, _)) => continue,
            Ok(VcpuExit::IoOut(GIVE_WORK, data)) => {
                place.work.give(word(data));
                continue;
            }
            // Not under the lock of the bus: it may take long.
            Ok(VcpuExit::IoIn(NEXT_WORK, data)) => {
                let next = place.work.next(place.number, place.stop).to_le_bytes();
                let n = data.len().min(next.len());
                data[..n].copy_from_slice(&next[..n]);
                continue;
            }
            Ok(VcpuExit::IoOut(port, data)) => match lock().out(port, data) {
                Flow::Go => continue,
                Flow::End(exit) => return Some(exit),
            },
            Ok(VcpuExit::IoIn(port, data)) => {
                lock().input(port, data);
                continue;
            }
            // Nobody lives in MMIO space outside the kernel's irqchip.
            Ok(VcpuExit::MmioRead(_, data)) => {
                data.fill(0xff);
                continue;
            }
            Ok(VcpuExit::MmioWrite(..)) => continue,
            // Only without an in-kernel irqchip or with interrupts off for good.
            Ok(VcpuExit::Hlt) => Bad::Other("the guest halted for good".into()),
            Ok(VcpuExit::Shutdown) => Bad::Shutdown,
            Ok(VcpuExit::SystemEvent(kind, _)) => Bad::Other(format!("system event {kind}")),
            Ok(VcpuExit::FailEntry(reason, cpu)) => Bad::FailEntry { reason, cpu },
            Ok(VcpuExit::InternalError) => Bad::Internal,
            Ok(VcpuExit::Intr) => continue,
            Ok(other) => Bad::Other(format!("exit to user space that nobody handles: {other:?}")),
            Err(e) if settle && matches!(e.errno(), libc::EINTR | libc::EAGAIN) => return None,
            Err(e) if e.errno() == libc::EINTR && due => Bad::Shuffle,
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => continue,
            Err(e) => Bad::Other(format!("KVM_RUN: {e}")),
        };
        let bad = match (bad, &mut shuffle) {
            (Bad::Shuffle, Some((shuffler, due))) => {
                let begun = Instant::now();
                let done = shuffler.shuffle(vcpu);
                // Only now, or the guest would not get on.
                due.done(begun);
                match done {
                    Ok(()) => continue,
                    Err(e) => Bad::Other(format!("it could not be saved and restored: {e}")),
                }
            }
            (bad, _) => bad,
        };
        return Some(explain(vcpu, bad));
    }
}

/// What an OUT of up to 32 bits writes.
fn word(data: &[u8]) -> u32 {
    let mut bytes = [0; 4];
    let n = data.len().min(bytes.len());
    bytes[..n].copy_from_slice(&data[..n]);
    u32::from_le_bytes(bytes)
}

/// An end that wants a dump, kept apart because the exit borrows the vCPU.
enum Bad {
    Shutdown,
    FailEntry {
        reason: u64,
        cpu: u32,
    },
    Internal,
    Other(String),
    /// No end at all: it is time for a new VM.
    Shuffle,
}

fn explain(vcpu: &mut VcpuFd, bad: Bad) -> Exit {
    let dump = dump::registers(vcpu);
    match bad {
        Bad::Shutdown => Exit::Shutdown { dump },
        Bad::FailEntry { reason, cpu } => Exit::Failed {
            what: format!(
                "KVM could not enter the guest on CPU {cpu}: {} (reason {reason:#x})",
                dump::entry_failure(reason)
            ),
            dump,
        },
        Bad::Internal => {
            // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, so `internal` is
            // the member of the union that the kernel has filled in.
            let e = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
            let n = (e.ndata as usize).min(e.data.len());
            Exit::Failed {
                what: format!(
                    "KVM internal error {}: {} (data {:x?})",
                    e.suberror,
                    dump::internal_error(e.suberror),
                    &e.data[..n]
                ),
                dump,
            }
        }
        Bad::Other(what) => Exit::Failed { what, dump },
        Bad::Shuffle => Exit::Failed {
            what: "nobody shuffles this machine".into(),
            dump,
        },
    }
}
