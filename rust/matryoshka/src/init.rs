// SPDX-License-Identifier: GPL-2.0-or-later
//! The tool as PID 1 of a guest: the init of one level of a stack.
//!
//! It mounts what it needs, loads KVM, runs the next level and hands that one's
//! exit status to its own parent. It never returns.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use vmm::console::{tag, Lines};
use vmm::files::{Files, DIR, KVM_MODULES};
use vmm::machine::Exit;
use vmm::parent::Parent;
use vmm::stack::{self, Handler, Inner, Local, Spec, SPEC_FILE};
use vmm::{module, Error};

use crate::term::Raw;
use crate::Code;

/// What every level needs, the parent's mailbox (/dev/mem) first of all.
fn mounts() -> Result<(), Error> {
    mount(c"devtmpfs", c"/dev")?;
    mount(c"proc", c"/proc")?;
    mount(c"sysfs", c"/sys")
}

/// Runs this level and ends the machine.
pub fn main() -> ! {
    let parent = match mounts().and_then(|()| Parent::open()) {
        Ok(p) => p,
        Err(e) => {
            eprintln!("matryoshka: as PID 1 with {SPEC_FILE}, but not in a guest of a stack: {e}");
            reboot();
        }
    };
    std::panic::set_hook(Box::new(move |info| {
        parent.line(&format!("matryoshka init: {info}"))
    }));
    let status = match level(parent) {
        Ok(status) => status,
        Err((level, e)) => {
            for line in format!("matryoshka: {e}").lines() {
                parent.line(&tag(level, line));
            }
            Code::Failed as u32
        }
    };
    parent.done(status);
    reboot();
}

fn level(parent: Parent) -> Result<u32, (u32, Error)> {
    parent.up();
    let spec = stack::read_spec(Path::new(SPEC_FILE)).map_err(|e| (0, e))?;
    let fail = |e| (spec.level, e);
    if spec.level == spec.depth && spec.inner == Inner::Boot {
        return Ok(Code::Ok as u32);
    }
    if spec.level == spec.depth {
        return innermost(&spec, parent).map_err(fail);
    }
    // Linux switches huge pages off below 512 MiB. The next level's memory wants them:
    // without, that guest takes eight times the EPT violations. Not every kernel has
    // the file, and nothing but speed depends on it.
    let _ = fs::write("/sys/kernel/mm/transparent_hugepage/enabled", "madvise");
    let _ = fs::write("/sys/kernel/mm/transparent_hugepage/defrag", "madvise");
    let files = Files::new(Path::new(DIR), Path::new("/init")).with_relayed(spec.extra.len());
    for name in KVM_MODULES {
        let params = match name {
            "kvm-intel" => "nested=1",
            // Not what a CPU without the iTLB erratum would do: splitting huge pages that
            // hold code costs hundreds of EPT violations per guest at each level.
            "kvm" => "nx_huge_pages=never",
            _ => "",
        };
        match files.guest_module(name) {
            Some(f) => module::load(&f, params).map_err(fail)?,
            None if name == "irqbypass" => {}
            None => return Err(fail(Error::Stack(format!("no {name}.ko in this guest")))),
        }
    }
    let console = match spec.interactive() {
        true => Some(
            fs::File::open("/dev/ttyS0")
                .map_err(Error::file(Path::new("/dev/ttyS0")))
                .map_err(fail)?,
        ),
        false => None,
    };
    let _raw = console.as_ref().and_then(|c| Raw::new(c.as_raw_fd()));
    let local = Local {
        terminal: console.as_ref().map(AsRawFd::as_raw_fd),
        limit: None,
        ..Local::default()
    };
    let outcome = stack::run(&spec, &files, local, &mut Relay(parent)).map_err(fail)?;
    if spec.verbose > 0 {
        parent.line(&tag(spec.level, &stats_line(&outcome.stats)));
    }
    match outcome.exit {
        Exit::Done(status) => Ok(status),
        bad => {
            let text = format!("matryoshka: L{} {bad}", spec.level + 1);
            for line in text.lines() {
                parent.line(&tag(spec.level, line));
            }
            Ok(Code::Guest as u32)
        }
    }
}

/// The guest's exits in one line: all, those of each kind that happened, and what
/// tells how its memory is mapped.
pub fn stats_line(stats: &BTreeMap<String, u64>) -> String {
    let Some(all) = stats.get("exits") else {
        return "this kernel does not count exits".into();
    };
    let kinds: Vec<String> = stats
        .iter()
        .filter(|(k, &n)| k.ends_with("_exits") && n != 0)
        .map(|(k, n)| format!("{} {n}", k.trim_end_matches("_exits")))
        .chain(
            ["pf_taken", "pages_4k", "pages_2m"]
                .iter()
                .filter_map(|&k| Some(format!("{k} {}", stats.get(k)?))),
        )
        .collect();
    format!("its guest made {all} exits ({})", kinds.join(", "))
}

/// A level in the middle: everything goes to the parent and comes from it.
struct Relay(Parent);

impl Handler for Relay {
    fn next_command(&mut self) -> u32 {
        self.0.command()
    }

    fn console_line(&mut self, level: u32, line: &str) {
        self.0.line(&tag(level, line));
    }

    fn raw(&mut self, bytes: &[u8]) {
        self.0.raw(bytes);
    }

    fn apply(&mut self, round: protocol::Config, level: u32, _: &Path) -> vmm::Result<()> {
        // In a guest the module for its own kernel is the one for the next guest's.
        module::apply(round, level, &Path::new(DIR).join("guest/matryoshka.ko"))
    }
}

/// The innermost Linux: a command whose output goes up line by line, or a shell.
fn innermost(spec: &Spec, parent: Parent) -> Result<u32, Error> {
    let Inner::Linux { command } = &spec.inner else {
        return Err(Error::Stack("a Linux where the payload should be".into()));
    };
    let busybox = Path::new("/bin/busybox");
    if busybox.exists() {
        // Its applets by name, as a shell needs them.
        let _ = Command::new(busybox)
            .args(["--install", "-s", "/bin"])
            .status();
    }
    // Commands are started by path and without a closure: std then uses posix_spawn.
    // Its other way needs a socket pair, and this kernel has no sockets.
    if spec.interactive() {
        let tty = Path::new("/dev/ttyS0");
        let open = || {
            fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open(tty)
                .map_err(Error::file(tty))
        };
        // A session of its own with the console as controlling terminal.
        let status = environment(&mut Command::new(busybox))
            .args(["setsid", "-c", "/bin/sh"])
            .stdin(open()?)
            .stdout(open()?)
            .stderr(open()?)
            .status()
            .map_err(Error::file(busybox))?;
        return Ok(exit_status(status));
    }
    let program = command.first().map_or("/bin/sh", String::as_str);
    let path = find(program, PATH).ok_or_else(|| {
        Error::Stack(format!(
            "no {program} in this guest; --file SRC=DST puts a file there"
        ))
    })?;
    let mut cmd = Command::new(&path);
    cmd.args(&command[1..]);
    environment(&mut cmd);
    let (mut reader, writer) = pipe()?;
    let clone = writer.try_clone().map_err(|source| Error::Os {
        what: "pipe",
        source,
    })?;
    cmd.stdin(Stdio::null()).stdout(clone).stderr(writer);
    let mut child = cmd.spawn().map_err(Error::file(&path))?;
    drop(cmd); // and with it our ends of the pipe for writing
    let mut lines = Lines::default();
    let mut buf = [0u8; 4096];
    while let Ok(n @ 1..) = reader.read(&mut buf) {
        lines.push(&buf[..n], |l| parent.line(&tag(spec.level, l)));
    }
    lines.flush(|l| parent.line(&tag(spec.level, l)));
    let status = child.wait().map_err(|source| Error::Os {
        what: "wait",
        source,
    })?;
    Ok(exit_status(status))
}

/// Where an innermost Linux has its programs.
const PATH: &str = "/bin:/sbin:/usr/bin:/usr/sbin";

/// What a program finds in its environment.
fn environment(c: &mut Command) -> &mut Command {
    c.env("PATH", PATH).env("HOME", "/").env("TERM", "linux")
}

/// The file behind a command's name, as execvp finds it.
fn find(program: &str, path: &str) -> Option<PathBuf> {
    if program.contains('/') {
        return Some(program.into()).filter(|p: &PathBuf| p.exists());
    }
    path.split(':')
        .map(|d| Path::new(d).join(program))
        .find(|p| p.exists())
}

/// A status as shells give it: 128 and the signal for a program that was killed.
fn exit_status(s: std::process::ExitStatus) -> u32 {
    match (s.code(), s.signal()) {
        (Some(c), _) => c as u32,
        (None, Some(sig)) => 128 + sig as u32,
        (None, None) => 1,
    }
}

/// A pipe's two ends, for reading and for writing.
fn pipe() -> Result<(fs::File, fs::File), Error> {
    let mut fds = [0; 2];
    // SAFETY: writes two descriptors into the array.
    if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(Error::Os {
            what: "pipe",
            source: std::io::Error::last_os_error(),
        });
    }
    // SAFETY: both descriptors are new and nobody else's.
    Ok(unsafe { (fs::File::from_raw_fd(fds[0]), fs::File::from_raw_fd(fds[1])) })
}

fn mount(kind: &'static CStr, at: &'static CStr) -> Result<(), Error> {
    // SAFETY: all three strings end in NUL and are only read; no data is passed.
    let r = unsafe {
        libc::mount(
            kind.as_ptr(),
            at.as_ptr(),
            kind.as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    // EBUSY: the kernel has mounted it already (CONFIG_DEVTMPFS_MOUNT).
    if r != 0 && std::io::Error::last_os_error().raw_os_error() != Some(libc::EBUSY) {
        return Err(Error::Os {
            what: "mount",
            source: std::io::Error::last_os_error(),
        });
    }
    Ok(())
}

/// Resets the machine, for when nobody below listens to the control device. Where that is refused (a container) there is nothing
/// to do but wait: PID 1 must not end.
fn reboot() -> ! {
    loop {
        // SAFETY: ends this machine, which is what PID 1 is for here; and waits for a signal.
        unsafe {
            libc::reboot(libc::RB_AUTOBOOT);
            libc::pause();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_as_in_a_shell() {
        assert_eq!(find("sh", "/nonexistent:/bin"), Some("/bin/sh".into()));
        assert_eq!(find("/bin/sh", ""), Some("/bin/sh".into()));
        assert_eq!(find("no-such-program", "/bin"), None);
        assert_eq!(find("/no/such/program", "/bin"), None);
    }

    #[test]
    fn stats_are_one_line() {
        let s = BTreeMap::from([
            ("exits".into(), 9),
            ("io_exits".into(), 4),
            ("halt_exits".into(), 0),
        ]);
        assert_eq!(stats_line(&s), "its guest made 9 exits (io 4)");
        assert!(stats_line(&BTreeMap::new()).contains("does not count"));
    }
}
