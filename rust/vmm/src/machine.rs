// SPDX-License-Identifier: GPL-2.0-or-later
//! One virtual machine: made from a [`Config`], run to its [`Exit`].

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use kvm_bindings::{kvm_pit_config, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::Entry;
use crate::device::{Bus, Host, Irq, COM1_IRQ};
use crate::memory::Memory;
use crate::shuffle::{self, Shuffler};
use crate::work::{self, Work};
use crate::{dump, stats, vcpu};
use crate::{Error, Result};

/// Three pages that KVM needs for real mode on old CPUs, out of every guest's way.
const TSS_ADDR: usize = 0xfffb_d000;
/// One page for the same purpose.
const IDENTITY_MAP_ADDR: u64 = 0xfffb_c000;
/// The most vCPUs: what the MP table has room for below 640 KiB.
pub const MAX_CPUS: u8 = 32;

/// What kind of machine.
#[derive(Debug, Clone)]
pub struct Config {
    /// vCPUs, 1 to [`MAX_CPUS`].
    pub cpus: u8,
    /// Whether there is a PIT (Linux may want one, a payload does not).
    pub pit: bool,
    /// COM1 is a terminal: its output goes up raw, and this descriptor is read for
    /// its input.
    pub terminal: Option<RawFd>,
    /// Ctrl-A x typed there ends the machine, Ctrl-A Ctrl-A is a Ctrl-A.
    pub escape: bool,
    /// End the machine after this time, if it has not ended itself.
    pub limit: Option<Duration>,
    /// Replace VM and vCPU by new ones now and then, at points that this seed decides
    /// ([`shuffle`]). Only with one CPU.
    pub shuffle: Option<u64>,
    /// Every vCPU begins at the entry, with its number in RSI, instead of waiting for INIT and SIPI.
    pub all_begin: bool,
    /// Move the vCPUs' threads from one processor of the host to the other all the time.
    pub roam: bool,
    /// Make, move and delete a memory slot that the guest does not use all the time, and have the host look for its
    /// memory anew (fork).
    pub churn: bool,
    /// Hand out the pages of the touch region through userfaultfd.
    pub missing: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            cpus: 1,
            pit: true,
            terminal: None,
            escape: false,
            limit: None,
            shuffle: None,
            all_begin: false,
            roam: false,
            churn: false,
            missing: false,
        }
    }
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// The guest said so through the control device.
    Done(u32),
    /// The guest reset itself: a reboot, which is also what a panic ends in.
    Reset,
    /// Triple fault.
    Shutdown {
        /// Registers.
        dump: String,
    },
    /// KVM or the hardware could not go on.
    Failed {
        /// Why.
        what: String,
        /// Registers.
        dump: String,
    },
    /// The time limit was reached.
    TimedOut {
        /// Registers of all vCPUs.
        dump: String,
    },
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Exit::Done(status) => write!(f, "ended with status {status}"),
            Exit::Reset => write!(
                f,
                "reset itself (a panic or a reboot; see its last console lines)"
            ),
            Exit::Shutdown { dump } => write!(f, "shut down by a triple fault\n{dump}"),
            Exit::Failed { what, dump } => write!(f, "could not go on: {what}\n{dump}"),
            Exit::TimedOut { dump } => write!(f, "did not end within its time limit\n{dump}"),
        }
    }
}

/// How a machine ended and what it took.
#[derive(Debug)]
pub struct Report {
    /// The end.
    pub exit: Exit,
    /// KVM's statistics of the VM and of all vCPUs, the latter added up; empty where
    /// the kernel has none.
    pub stats: BTreeMap<String, u64>,
    /// How often the machine was replaced by a new one.
    pub shuffles: shuffle::Counts,
    /// How often a vCPU was moved to another processor.
    pub moves: u64,
    /// How often the spare memory slot changed.
    pub churns: u64,
    /// Pages that were handed out through userfaultfd.
    pub given: u64,
}

/// A machine ready to run.
pub struct Machine {
    // Field order is drop order: KVM's descriptors before the memory they use.
    vcpus: Vec<VcpuFd>,
    vm: VmFd,
    mem: Memory,
    config: Config,
}

impl Machine {
    /// Opens KVM. Apart from [`Machine::new`] so that a caller can find out early.
    pub fn open_kvm() -> Result<Kvm> {
        let kvm = Kvm::new().map_err(|e| Error::NoKvm {
            source: std::io::Error::from_raw_os_error(e.errno()),
        })?;
        match kvm.get_api_version() {
            v if v == KVM_API_VERSION as i32 => Ok(kvm),
            v => Err(Error::ApiVersion(v)),
        }
    }

    /// Makes the machine around `mem`, which holds what `entry` starts.
    pub fn new(kvm: &Kvm, config: Config, mem: Memory, entry: &Entry) -> Result<Machine> {
        if config.cpus == 0 || config.cpus > MAX_CPUS {
            return Err(Error::Stack(format!(
                "{} CPUs; 1 to {MAX_CPUS} are possible",
                config.cpus
            )));
        }
        if config.cpus != 1 && config.shuffle.is_some() {
            return Err(Error::Stack(
                "only a machine with one CPU can be shuffled".into(),
            ));
        }
        let vm = new_vm(kvm, &config, &mem)?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(Error::kvm("KVM_GET_SUPPORTED_CPUID"))?;
        let vcpus = (0..config.cpus)
            .map(|id| vcpu::create(kvm, &vm, id, &config, entry, &cpuid))
            .collect::<Result<_>>()?;
        Ok(Machine {
            vcpus,
            vm,
            mem,
            config,
        })
    }

    /// Runs the machine to its end, each vCPU in a thread of its own.
    pub fn run(mut self, host: &mut dyn Host) -> Result<Report> {
        let irq = EventFd::new(0).map_err(|_| Error::os("eventfd"))?;
        connect(&self.vm, &irq)?;
        let due = AtomicBool::new(false);
        let (mut shuffler, vm) = match self.config.shuffle {
            None => (None, Some(&self.vm)),
            Some(seed) => {
                let shuffler = Shuffler::new(
                    &mut self.vm,
                    &self.mem,
                    &self.config,
                    irq.try_clone().map_err(|_| Error::os("eventfd"))?,
                    seed,
                )?;
                (Some(shuffler), None)
            }
        };
        let bus = Mutex::new(Bus::new(
            Irq(irq),
            self.config.terminal.is_some(),
            host,
            &self.mem,
            vm,
        ));
        let over = EventFd::new(0).map_err(|_| Error::os("eventfd"))?;
        let stop = AtomicBool::new(false);
        let running = AtomicUsize::new(self.vcpus.len());
        let kick = install_kick()?;
        // The pthread id of each vCPU's thread once it runs, 0 before.
        let ids: Vec<AtomicU64> = self.vcpus.iter().map(|_| AtomicU64::new(0)).collect();
        let tids: Vec<AtomicI32> = self.vcpus.iter().map(|_| AtomicI32::new(0)).collect();
        let work = Work::default();
        let moves = AtomicU64::new(0);
        let churns = AtomicU64::new(0);
        let missing = match self.config.missing {
            true => self.mem.missing()?,
            false => None,
        };
        let (tx, rx) = mpsc::channel();

        bus.lock().unwrap_or_else(PoisonError::into_inner).started();
        let exit = std::thread::scope(|s| {
            if let Some(fd) = self.config.terminal {
                let (bus, over, tx) = (&bus, &over, tx.clone());
                let mut escape = self.config.escape.then(Escape::default);
                s.spawn(move || {
                    if read_terminal(fd, &mut escape, bus, over) {
                        // The receiver outlives us: it is what ends this scope.
                        let _ = tx.send(Exit::Done(TERMINAL_STATUS));
                    }
                });
            }
            if let Some(seed) = self.config.shuffle {
                let (stop, due, id) = (&stop, &due, &ids[0]);
                s.spawn(move || {
                    let mut numbers = shuffle::Numbers::new(!seed);
                    while !stop.load(Ordering::Acquire) {
                        std::thread::sleep(shuffle::pause(&mut numbers));
                        // Making a VM may take longer than that, and the guest must get on.
                        if due.swap(true, Ordering::Relaxed) {
                            continue;
                        }
                        match id.load(Ordering::Acquire) {
                            0 => {}
                            // SAFETY: as below. The vCPU's thread is joined after `stop` is set, at the
                            // latest with this one at the end of the scope.
                            id => unsafe {
                                libc::pthread_kill(id, kick);
                            },
                        }
                    }
                });
            }
            if self.config.roam {
                let (stop, tids, moves) = (&stop, &tids, &moves);
                s.spawn(move || {
                    let (mut numbers, cpus) = (shuffle::Numbers::new(1), work::processors());
                    while cpus.len() > 1 && !stop.load(Ordering::Acquire) {
                        std::thread::sleep(Duration::from_micros(numbers.around(work::MOVE_US)));
                        let pick = |n: u64, of: usize| n as usize % of;
                        let tid = &tids[pick(numbers.around(1 << 20), tids.len())];
                        let cpu = cpus[pick(numbers.around(1 << 20), cpus.len())];
                        match tid.load(Ordering::Acquire) {
                            0 => {}
                            tid => {
                                moves.fetch_add(work::move_to(tid, cpu).into(), Ordering::Relaxed);
                            }
                        }
                    }
                });
            }
            if let (true, Some(vm)) = (self.config.churn, vm) {
                let (stop, churns, mem) = (&stop, &churns, &self.mem);
                s.spawn(move || {
                    let mut numbers = shuffle::Numbers::new(2);
                    while !stop.load(Ordering::Acquire) {
                        std::thread::sleep(Duration::from_micros(
                            numbers.around(4 * work::MOVE_US),
                        ));
                        let done = mem.churn(vm, churns.load(Ordering::Relaxed));
                        churns.fetch_add(done.into(), Ordering::Relaxed);
                    }
                });
            }
            if let Some(missing) = &missing {
                let stop = &stop;
                s.spawn(move || missing.serve(stop));
            }
            // There is one vCPU if there is a shuffler.
            let mut shuffler = shuffler.as_mut();
            let threads: Vec<_> = self
                .vcpus
                .iter_mut()
                .zip(&ids)
                .enumerate()
                .map(|(number, (vcpu, id))| {
                    let (bus, stop, running, tx) = (&bus, &stop, &running, tx.clone());
                    let (tid, work) = (&tids[number], &work);
                    let shuffle = shuffler.take().map(|shuffler| (shuffler, &due));
                    s.spawn(move || {
                        // SAFETY: has no preconditions.
                        id.store(unsafe { libc::pthread_self() }, Ordering::Release);
                        // SAFETY: as above.
                        tid.store(unsafe { libc::gettid() }, Ordering::Release);
                        let place = vcpu::Place { bus, work, number };
                        let exit = vcpu::run(vcpu, &place, stop, shuffle);
                        let dump = exit.is_none().then(|| dump::registers(vcpu));
                        if let Some(exit) = exit {
                            // The receiver only goes away after all of us have.
                            let _ = tx.send(exit);
                        }
                        running.fetch_sub(1, Ordering::Release);
                        dump
                    })
                })
                .collect();

            let first = match self.config.limit {
                None => rx.recv().ok(),
                Some(d) => match rx.recv_timeout(d) {
                    Ok(exit) => Some(exit),
                    Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => None,
                },
            };
            stop.store(true, Ordering::Release);
            let _ = over.write(1);
            // A vCPU may be about to enter KVM_RUN when it is kicked and miss it, so
            // kick until all have noticed.
            while running.load(Ordering::Acquire) != 0 {
                for id in ids
                    .iter()
                    .map(|id| id.load(Ordering::Acquire))
                    .filter(|&id| id != 0)
                {
                    // SAFETY: the thread has not been joined, so its id is valid; the
                    // signal has a handler that does nothing.
                    unsafe { libc::pthread_kill(id, kick) };
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            let dumps: Vec<String> = threads
                .into_iter()
                .filter_map(|t| t.join().ok().flatten())
                .collect();
            first.unwrap_or(Exit::TimedOut {
                dump: dumps.concat(),
            })
        });
        bus.lock().unwrap_or_else(PoisonError::into_inner).flush();
        drop(bus);
        let shuffles = shuffler.map_or_else(Default::default, |shuffler| shuffler.counts());

        let mut totals = stats::read(&self.vm).unwrap_or_default();
        for v in &self.vcpus {
            for (k, n) in stats::read(v).unwrap_or_default() {
                *totals.entry(k).or_insert(0) += n;
            }
        }
        Ok(Report {
            exit,
            stats: totals,
            shuffles,
            moves: moves.into_inner(),
            churns: churns.into_inner(),
            given: missing.map_or(0, |missing| missing.given.into_inner()),
        })
    }
}

/// Makes a VM with its interrupt controllers and its memory, and no vCPU yet.
pub(crate) fn new_vm(kvm: &Kvm, config: &Config, mem: &Memory) -> Result<VmFd> {
    let vm = kvm.create_vm().map_err(Error::kvm("KVM_CREATE_VM"))?;
    vm.set_tss_address(TSS_ADDR)
        .map_err(Error::kvm("KVM_SET_TSS_ADDR"))?;
    vm.set_identity_map_address(IDENTITY_MAP_ADDR)
        .map_err(Error::kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.create_irq_chip()
        .map_err(Error::kvm("KVM_CREATE_IRQCHIP"))?;
    if config.pit {
        // The dummy answers port 0x61 in the kernel instead of here.
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        vm.create_pit2(pit).map_err(Error::kvm("KVM_CREATE_PIT2"))?;
    }
    mem.register(&vm)?;
    Ok(vm)
}

/// Connects COM1's interrupt to a VM.
pub(crate) fn connect(vm: &VmFd, irq: &EventFd) -> Result<()> {
    vm.register_irqfd(irq, COM1_IRQ)
        .map_err(Error::kvm("KVM_IRQFD"))
}

/// Takes it away again.
pub(crate) fn disconnect(vm: &VmFd, irq: &EventFd) -> Result<()> {
    vm.unregister_irqfd(irq, COM1_IRQ)
        .map_err(Error::kvm("KVM_IRQFD"))
}

/// Installs the handler of the signal that gets a vCPU out of KVM_RUN.
fn install_kick() -> Result<libc::c_int> {
    extern "C" fn nothing(_: libc::c_int) {}
    let signal = libc::SIGRTMIN();
    // SAFETY: an all-zero sigaction is valid; the handler touches nothing, so it is
    // safe at any point of any thread.
    let r = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        libc::sigaction(signal, &action, std::ptr::null_mut())
    };
    if r != 0 {
        return Err(Error::os("sigaction"));
    }
    Ok(signal)
}

/// The status of a machine that was ended from the terminal: as of a program that
/// was ended by SIGINT.
const TERMINAL_STATUS: u32 = 130;

/// The escape character of a terminal, Ctrl-A.
const ESCAPE: u8 = 1;

/// Looks for the escape in what is typed.
#[derive(Default)]
struct Escape {
    seen: bool,
}

impl Escape {
    /// Gives what is to be passed on, or nothing when the machine is to end.
    fn filter(&mut self, typed: &[u8]) -> Option<Vec<u8>> {
        let mut out = Vec::with_capacity(typed.len());
        for &b in typed {
            match (std::mem::take(&mut self.seen), b) {
                (false, ESCAPE) => self.seen = true,
                (true, b'x' | b'X') => return None,
                (true, b) if b != ESCAPE => out.extend([ESCAPE, b]),
                (_, b) => out.push(b),
            }
        }
        Some(out)
    }
}

/// Feeds what is typed at `fd` to COM1 until `over` becomes readable. True when the
/// escape was typed.
fn read_terminal(fd: RawFd, escape: &mut Option<Escape>, bus: &Mutex<Bus>, over: &EventFd) -> bool {
    use std::os::fd::AsRawFd;
    let mut polls = [
        libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        },
        libc::pollfd {
            fd: over.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        },
    ];
    let mut buf = [0u8; 64];
    loop {
        // SAFETY: the array is ours and its length is the one given.
        if unsafe { libc::poll(polls.as_mut_ptr(), 2, -1) } < 0 || polls[1].revents != 0 {
            return false;
        }
        // SAFETY: reads at most the buffer's length into the buffer.
        let n = unsafe { libc::read(fd, buf.as_mut_ptr().cast(), buf.len()) };
        if n <= 0 {
            return false;
        }
        let typed = match escape {
            None => buf[..n as usize].to_vec(),
            Some(e) => match e.filter(&buf[..n as usize]) {
                Some(typed) => typed,
                None => return true,
            },
        };
        let mut rest = &typed[..];
        while !rest.is_empty() {
            let taken = bus
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .type_in(rest);
            rest = &rest[taken..];
            if taken == 0 {
                // The guest has not read its 64 bytes yet.
                std::thread::sleep(Duration::from_millis(10));
                if over.read().is_ok() {
                    return false;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_escape_is_found_across_reads() {
        let mut e = Escape::default();
        assert_eq!(e.filter(b"ab\x01"), Some(b"ab".to_vec()));
        assert_eq!(e.filter(b"x"), None);
    }

    #[test]
    fn other_uses_of_the_escape_character_pass() {
        let mut e = Escape::default();
        assert_eq!(e.filter(b"\x01\x01"), Some(b"\x01".to_vec()));
        assert_eq!(e.filter(b"\x01c"), Some(b"\x01c".to_vec()));
        assert_eq!(e.filter(b"x"), Some(b"x".to_vec()));
    }
}
