// SPDX-License-Identifier: GPL-2.0-or-later
//! One virtual machine: made from a [`Config`], run to its [`Exit`].

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::RawFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::boot::Entry;
use crate::device::{Bus, BusState, Host, Irq};
use crate::door::{Door, Job};
use crate::image::{self, Contents};
use crate::memory::Memory;
use crate::missing::Missing;
use crate::shuffle::{self, Shuffler};
use crate::state::{VcpuState, VmState};
use crate::terminal::{self, Escape};
use crate::work::{self, Work};
use crate::{dump, stats, vcpu, vm};
use crate::{Error, Result};

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
    /// Then keep them, but reset the vCPU before its state is put back.
    pub reset: bool,
    /// Every vCPU begins at the entry, with its number in RSI, instead of waiting for INIT and SIPI.
    pub all_begin: bool,
    /// Move the vCPUs' threads from one processor of the host to the other all the time.
    pub roam: bool,
    /// Make, move and delete a memory slot that the guest does not use all the time, and have the host look for its
    /// memory anew (fork).
    pub churn: bool,
    /// Hand out the pages of the touch region through userfaultfd.
    pub missing: bool,
    /// Where another process may ask for the machine to be saved.
    pub door: Option<Arc<Door>>,
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
            reset: false,
            all_begin: false,
            roam: false,
            churn: false,
            missing: false,
            door: None,
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
    /// Somebody asked for it to be saved, and it is.
    Saved,
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
            Exit::Saved => write!(f, "was saved"),
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
    /// Its devices, if it was read from a file.
    bus: Option<BusState>,
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
            return Err(Error::Usage(
                "only a machine with one CPU can be shuffled".into(),
            ));
        }
        let vm = vm::create(kvm, &config, &mem)?;
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
            bus: None,
        })
    }

    /// Makes the machine that was saved in the file `path`. What makes up the guest comes from there, of `config` the rest.
    /// Gives what its owner had said beside it ([`Host::save`]).
    pub fn restore(
        kvm: &Kvm,
        config: Config,
        path: &Path,
        progress: impl FnMut(u64, u64),
    ) -> Result<(Machine, serde_json::Value)> {
        let (mem, contents) = image::read(path, progress)?;
        let config = Config {
            cpus: u8::try_from(contents.vcpus.len()).unwrap_or(0),
            pit: contents.pit,
            all_begin: contents.all_begin,
            shuffle: None,
            ..config
        };
        if config.cpus == 0 || config.cpus > MAX_CPUS {
            return Err(Error::Image {
                path: path.to_owned(),
                what: format!(
                    "has {} vCPUs; 1 to {MAX_CPUS} are possible",
                    contents.vcpus.len()
                ),
            });
        }
        let vm = vm::create(kvm, &config, &mem)?;
        let mut vcpus = Vec::new();
        for (id, state) in contents.vcpus.iter().enumerate() {
            let vcpu = vm
                .create_vcpu(id as u64)
                .map_err(Error::kvm("KVM_CREATE_VCPU"))?;
            state.restore(&vcpu)?;
            vcpus.push(vcpu);
        }
        contents.vm.restore(&vm)?;
        let machine = Machine {
            vcpus,
            vm,
            mem,
            config,
            bus: Some(contents.bus),
        };
        Ok((machine, contents.owner))
    }

    /// Gives it a terminal, as [`Config::terminal`].
    pub fn set_terminal(&mut self, terminal: Option<RawFd>) {
        self.config.terminal = terminal;
    }

    /// Runs the machine to its end, each vCPU in a thread of its own.
    pub fn run(self, host: &mut dyn Host) -> Result<Report> {
        let Machine {
            mut vcpus,
            mut vm,
            mem,
            config,
            bus: state,
        } = self;
        let irq = EventFd::new(0).map_err(|_| Error::os("eventfd"))?;
        let another = || irq.try_clone().map_err(|_| Error::os("eventfd"));
        vm::connect(&vm, &irq)?;
        // A VM that is replaced now and then is the shuffler's.
        let (mut shuffler, fixed) = match config.shuffle {
            None => (None, Some(&vm)),
            Some(seed) => (
                Some(Shuffler::new(&mut vm, &mem, &config, another()?, seed)?),
                None,
            ),
        };
        let mut bus = Bus::new(
            Irq(another()?),
            config.terminal.is_some(),
            host,
            &mem,
            fixed,
        );
        if let Some(state) = &state {
            bus.restore(state, Irq(another()?))?;
        }
        let mut shared = Shared::new(bus, &config, &mem)?;
        shared.vm = fixed;
        if config.missing {
            shared.missing = mem.missing()?;
        }

        shared.bus().started();
        let exit = loop {
            let exit = run_once(&mut vcpus, shuffler.as_mut(), &shared);
            let asked = shared
                .job
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            let Some((draft, mut asker)) = asked.map(Job::split) else {
                break exit;
            };
            if exit != Exit::Saved {
                asker.refuse(format!("the stack had come to its end: it {exit}"));
                break exit;
            }
            let saved = contents(&config, &mem, fixed, &vcpus, &shared).and_then(|contents| {
                draft.write(&mem, &contents, |done, all| asker.progress(done, all))
            });
            match saved {
                Ok(_) => {
                    asker.saved();
                    break exit;
                }
                // Everything is where it was: it goes on.
                Err(e) => asker.refuse(e.to_string()),
            }
        };
        shared.bus().flush();
        let moves = shared.moves.load(Ordering::Relaxed);
        let churns = shared.churns.load(Ordering::Relaxed);
        let given = (shared.missing.as_ref()).map_or(0, |m| m.given.load(Ordering::Relaxed));
        drop(shared);
        let shuffles = shuffler.map_or_else(Default::default, |shuffler| shuffler.counts());

        let mut totals = stats::read(&vm).unwrap_or_default();
        for v in &vcpus {
            for (k, n) in stats::read(v).unwrap_or_default() {
                *totals.entry(k).or_insert(0) += n;
            }
        }
        Ok(Report {
            exit,
            stats: totals,
            shuffles,
            moves,
            churns,
            given,
        })
    }
}

/// What the threads of a machine share.
pub(crate) struct Shared<'a> {
    config: &'a Config,
    bus: Mutex<Bus<'a>>,
    /// Readable when they are to end.
    pub(crate) over: EventFd,
    stop: AtomicBool,
    /// They end to be saved, so nothing may be left half done.
    saving: AtomicBool,
    /// A new VM is due.
    due: shuffle::Due,
    /// Who asked for it to be saved.
    job: Mutex<Option<Job>>,
    running: AtomicUsize,
    /// The signal that gets a vCPU out of KVM_RUN.
    kick: libc::c_int,
    /// The pthread id of each vCPU's thread once it runs, 0 before.
    ids: Vec<AtomicU64>,
    tids: Vec<AtomicI32>,
    work: Work,
    moves: AtomicU64,
    churns: AtomicU64,
    /// The VM, unless it is replaced now and then.
    vm: Option<&'a VmFd>,
    mem: &'a Memory,
    missing: Option<Missing>,
    deadline: Option<Instant>,
}

impl<'a> Shared<'a> {
    fn new(bus: Bus<'a>, config: &'a Config, mem: &'a Memory) -> Result<Shared<'a>> {
        Ok(Shared {
            config,
            bus: Mutex::new(bus),
            over: EventFd::new(0).map_err(|_| Error::os("eventfd"))?,
            stop: AtomicBool::new(false),
            saving: AtomicBool::new(false),
            due: shuffle::Due::default(),
            job: Mutex::new(None),
            running: AtomicUsize::new(0),
            kick: install_kick()?,
            ids: (0..config.cpus).map(|_| AtomicU64::new(0)).collect(),
            tids: (0..config.cpus).map(|_| AtomicI32::new(0)).collect(),
            work: Work::default(),
            moves: AtomicU64::new(0),
            churns: AtomicU64::new(0),
            vm: None,
            mem,
            missing: None,
            // A time limit that no clock reaches is none.
            deadline: config
                .limit
                .and_then(|limit| Instant::now().checked_add(limit)),
        })
    }

    pub(crate) fn bus(&self) -> MutexGuard<'_, Bus<'a>> {
        self.bus.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gets the vCPU of that number out of KVM_RUN, if it runs.
    fn kick(&self, number: usize) {
        match self.ids[number].load(Ordering::Acquire) {
            0 => {}
            // SAFETY: vCPUs' threads are joined no earlier than at the end of the scope that whoever calls this belongs
            // to, so the id is valid; the signal has a handler that does nothing.
            id => unsafe {
                libc::pthread_kill(id, self.kick);
            },
        }
    }

    pub(crate) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}

/// Runs the vCPUs until the machine ends or is to be saved.
fn run_once(
    vcpus: &mut [VcpuFd],
    mut shuffler: Option<&mut Shuffler<'_>>,
    shared: &Shared<'_>,
) -> Exit {
    let (tx, rx) = mpsc::channel();
    shared.running.store(vcpus.len(), Ordering::Release);
    let exit = std::thread::scope(|s| {
        if let Some(fd) = shared.config.terminal {
            let tx = tx.clone();
            let mut escape = shared.config.escape.then(Escape::default);
            s.spawn(move || {
                if terminal::read(fd, &mut escape, shared) {
                    // The receiver outlives us: it is what ends this scope.
                    let _ = tx.send(Exit::Done(terminal::STATUS));
                }
            });
        }
        if let Some(door) = &shared.config.door {
            let tx = tx.clone();
            s.spawn(move || {
                while terminal::wait_for(door.fd(), &shared.over) {
                    if let Some(job) = door.accept() {
                        *shared.job.lock().unwrap_or_else(PoisonError::into_inner) = Some(job);
                        let _ = tx.send(Exit::Saved);
                        return;
                    }
                }
            });
        }
        if let Some(seed) = shared.config.shuffle {
            s.spawn(move || {
                let mut numbers = shuffle::Numbers::new(!seed);
                while !shared.stopped() {
                    std::thread::sleep(shared.due.pause(&mut numbers, shared.config));
                    // Making a VM may take longer than that, and the guest must get on.
                    if shared.due.now() {
                        shared.kick(0);
                    }
                }
            });
        }
        if shared.config.roam {
            s.spawn(move || {
                let (mut numbers, cpus) = (shuffle::Numbers::new(1), work::processors());
                while cpus.len() > 1 && !shared.stopped() {
                    std::thread::sleep(Duration::from_micros(numbers.around(work::MOVE_US)));
                    let pick = |n: u64, of: usize| n as usize % of;
                    let tid = &shared.tids[pick(numbers.around(1 << 20), shared.tids.len())];
                    let cpu = cpus[pick(numbers.around(1 << 20), cpus.len())];
                    match tid.load(Ordering::Acquire) {
                        0 => {}
                        tid => {
                            let moved = work::move_to(tid, cpu);
                            shared.moves.fetch_add(moved.into(), Ordering::Relaxed);
                        }
                    }
                }
            });
        }
        if let (true, Some(vm)) = (shared.config.churn, shared.vm) {
            s.spawn(move || {
                let mut numbers = shuffle::Numbers::new(2);
                let mut took = Duration::ZERO;
                while !shared.stopped() {
                    let pause = Duration::from_micros(numbers.around(4 * work::MOVE_US));
                    // A kernel with KCSAN takes so long to fork that the guest would never get its pages back in time.
                    std::thread::sleep(pause.max(took * 4));
                    let turn = shared.churns.load(Ordering::Relaxed);
                    let begun = Instant::now();
                    let done = shared.mem.churn(vm, turn);
                    took = begun.elapsed();
                    shared.churns.fetch_add(done.into(), Ordering::Relaxed);
                }
            });
        }
        if let Some(missing) = &shared.missing {
            s.spawn(move || missing.serve(&shared.stop));
        }
        let threads: Vec<_> = vcpus
            .iter_mut()
            .enumerate()
            .map(|(number, vcpu)| {
                let tx = tx.clone();
                // There is one vCPU if there is a shuffler.
                let shuffle = shuffler.take().map(|shuffler| (shuffler, &shared.due));
                s.spawn(move || {
                    // SAFETY: has no preconditions.
                    shared.ids[number].store(unsafe { libc::pthread_self() }, Ordering::Release);
                    // SAFETY: as above.
                    shared.tids[number].store(unsafe { libc::gettid() }, Ordering::Release);
                    let place = vcpu::Place {
                        bus: &shared.bus,
                        work: &shared.work,
                        number,
                        stop: &shared.stop,
                        saving: &shared.saving,
                    };
                    let exit = vcpu::run(vcpu, &place, shuffle);
                    let dump = exit.is_none().then(|| dump::registers(vcpu));
                    if let Some(exit) = exit {
                        // The receiver only goes away after all of us have.
                        let _ = tx.send(exit);
                    }
                    shared.running.fetch_sub(1, Ordering::Release);
                    dump
                })
            })
            .collect();

        let first = match shared.deadline {
            None => rx.recv().ok(),
            Some(at) => match rx.recv_timeout(at.saturating_duration_since(Instant::now())) {
                Ok(exit) => Some(exit),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => None,
            },
        };
        shared
            .saving
            .store(first == Some(Exit::Saved), Ordering::Release);
        shared.stop.store(true, Ordering::Release);
        let _ = shared.over.write(1);
        // A vCPU may be about to enter KVM_RUN when it is kicked and miss it, so
        // kick until all have noticed.
        while shared.running.load(Ordering::Acquire) != 0 {
            for number in 0..shared.ids.len() {
                shared.kick(number);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let dumps: Vec<String> = threads
            .into_iter()
            .filter_map(|t| t.join().ok().flatten())
            .collect();
        match first {
            // A vCPU may come to an end of its own while it gets ready to be saved.
            Some(Exit::Saved) => rx.try_recv().unwrap_or(Exit::Saved),
            Some(exit) => exit,
            None => Exit::TimedOut {
                dump: dumps.concat(),
            },
        }
    });
    // For another time.
    let _ = shared.over.read();
    for id in &shared.ids {
        id.store(0, Ordering::Release);
    }
    for tid in &shared.tids {
        tid.store(0, Ordering::Release);
    }
    shared.stop.store(false, Ordering::Release);
    shared.saving.store(false, Ordering::Release);
    exit
}

/// The machine as it goes into a file. Its vCPUs are at rest.
fn contents(
    config: &Config,
    mem: &Memory,
    vm: Option<&VmFd>,
    vcpus: &[VcpuFd],
    shared: &Shared<'_>,
) -> Result<Contents> {
    let vm = vm.ok_or_else(|| Error::Stack("a machine that is shuffled cannot be saved".into()))?;
    if config.cpus > 1 && config.all_begin {
        return Err(Error::Stack(
            "a payload with two processors cannot be saved".into(),
        ));
    }
    let kvm = Machine::open_kvm()?;
    let (bus, owner) = shared.bus().save()?;
    Ok(Contents {
        kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")
            .unwrap_or_default()
            .trim()
            .to_owned(),
        mib: mem.mib(),
        touch_pages: mem.touch_pages(),
        pit: config.pit,
        all_begin: config.all_begin,
        vm: VmState::save(vm, config.pit)?,
        vcpus: vcpus
            .iter()
            .map(|vcpu| VcpuState::save(&kvm, vcpu))
            .collect::<Result<_>>()?,
        bus,
        owner,
    })
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
