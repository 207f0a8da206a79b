// SPDX-License-Identifier: GPL-2.0-or-later
//! How another process asks for a running stack to be saved: a socket, and what goes over it.
//!
//! The socket's name is in the abstract namespace, so it goes with the process. One request is a line of JSON, as is each
//! answer.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::image::Draft;
use crate::{Error, Result};

/// What the names begin with; the number of the process follows.
const NAME: &str = "matryoshka-";
/// How long to wait for a request to be said, and for an answer to be taken.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest request.
const LINE_MAX: u64 = 16 << 10;

/// What is asked for.
#[derive(Debug, Serialize, Deserialize)]
enum Request {
    /// Save into this file (an absolute name) and end.
    Save(PathBuf),
}

/// What is answered.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// It goes on: bytes done, and in all.
    Progress(u64, u64),
    /// The machine is in the file and has ended.
    Saved,
    /// It is not, and runs on unless this says otherwise.
    Refused(String),
    /// There can be no such file; it runs on.
    NoSuchFile(String),
}

/// Where requests come in.
#[derive(Debug)]
pub struct Door(UnixListener);

/// A request to save that was accepted.
#[derive(Debug)]
pub(crate) struct Job {
    stream: UnixStream,
    pub(crate) draft: Draft,
}

impl Door {
    /// Opens this process's.
    pub fn open() -> Result<Door> {
        let name = format!("{NAME}{}", std::process::id());
        SocketAddr::from_abstract_name(name)
            .and_then(|name| UnixListener::bind_addr(&name))
            .map(Door)
            .map_err(|source| match source.raw_os_error() {
                Some(libc::ENOSYS | libc::EAFNOSUPPORT) => {
                    Error::Stack("this kernel has no Unix sockets".into())
                }
                _ => Error::Os {
                    what: "the socket for `matryoshka save`",
                    source,
                },
            })
    }

    /// The descriptor to wait for.
    pub(crate) fn fd(&self) -> i32 {
        self.0.as_raw_fd()
    }

    /// Takes a request in. Nothing if it was refused.
    pub(crate) fn accept(&self) -> Option<Job> {
        let (mut stream, _) = self.0.accept().ok()?;
        match request(&stream) {
            Ok(draft) => Some(Job { stream, draft }),
            Err(e) => {
                let why = e.to_string();
                let refusal = match e {
                    Error::Usage(_) => Answer::NoSuchFile(why),
                    _ => Answer::Refused(why),
                };
                answer(&mut stream, &refusal);
                None
            }
        }
    }
}

fn request(stream: &UnixStream) -> Result<Draft> {
    let refused = |why: &str| Error::Stack(why.into());
    // SAFETY: has no preconditions.
    let own = unsafe { libc::geteuid() };
    match peer(stream) {
        Some(user) if user == own || user == 0 => {}
        _ => return Err(refused("the stack belongs to another user")),
    }
    let mut line = String::new();
    stream
        .set_read_timeout(Some(PATIENCE))
        .and_then(|()| BufReader::new(stream.take(LINE_MAX)).read_line(&mut line))
        .map_err(|_| refused("no request came"))?;
    match serde_json::from_str(&line) {
        Ok(Request::Save(path)) if path.is_absolute() => Draft::create(&path),
        _ => Err(refused("a request that this version does not know")),
    }
}

/// The user at the other end.
fn peer(stream: &UnixStream) -> Option<libc::uid_t> {
    let mut who = libc::ucred {
        pid: 0,
        uid: libc::uid_t::MAX,
        gid: 0,
    };
    let mut size = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `size` bytes to the structure.
    let r = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut who).cast(),
            &mut size,
        )
    };
    (r == 0).then_some(who.uid)
}

/// Whoever asked may have gone, or stopped reading: then they are told no more, and the request stands.
fn answer(stream: &mut UnixStream, what: &Answer) {
    let Ok(mut line) = serde_json::to_vec(what) else {
        return;
    };
    line.push(b'\n');
    let said = stream
        .set_write_timeout(Some(PATIENCE))
        .and_then(|()| stream.write_all(&line));
    if said.is_err() {
        let _ = stream.shutdown(Shutdown::Both);
    }
}

impl Job {
    /// Splits it into what is written and who is told.
    pub(crate) fn split(self) -> (Draft, Asker) {
        (self.draft, Asker(self.stream))
    }
}

/// Who asked.
#[derive(Debug)]
pub(crate) struct Asker(UnixStream);

impl Asker {
    pub(crate) fn progress(&mut self, done: u64, all: u64) {
        answer(&mut self.0, &Answer::Progress(done, all));
    }

    pub(crate) fn saved(mut self) {
        answer(&mut self.0, &Answer::Saved);
    }

    pub(crate) fn refuse(mut self, why: String) {
        answer(&mut self.0, &Answer::Refused(why));
    }
}

/// The processes that run a stack which can be saved.
pub fn running() -> Vec<u32> {
    let text = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let mut all: Vec<u32> = text
        .lines()
        .filter_map(|line| {
            line.rsplit(' ')
                .next()?
                .strip_prefix('@')?
                .strip_prefix(NAME)?
                .parse()
                .ok()
        })
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Asks the stack of process `pid` to save itself into `file`, an absolute name, and to end. `progress` gets bytes done and
/// in all.
pub fn save(pid: u32, file: &Path, mut progress: impl FnMut(u64, u64)) -> Result<()> {
    let lost = |source: std::io::Error| match source.kind() {
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
            Error::Stack("the stack came to its end first".into())
        }
        _ => Error::Os {
            what: "the connection to the stack",
            source,
        },
    };
    let mut stream = SocketAddr::from_abstract_name(format!("{NAME}{pid}"))
        .and_then(|name| UnixStream::connect_addr(&name))
        .map_err(|_| Error::Stack(format!("process {pid} runs no stack that can be saved")))?;
    let mut line = serde_json::to_vec(&Request::Save(file.to_owned()))
        .map_err(|e| Error::Stack(format!("{}: {e}", file.display())))?;
    line.push(b'\n');
    stream.write_all(&line).map_err(lost)?;
    for line in BufReader::new(stream).lines() {
        match serde_json::from_str(&line.map_err(lost)?) {
            Ok(Answer::Progress(done, all)) => progress(done, all),
            Ok(Answer::Saved) => return Ok(()),
            Ok(Answer::Refused(why)) => return Err(Error::Stack(why)),
            Ok(Answer::NoSuchFile(why)) => return Err(Error::Usage(why)),
            Err(e) => return Err(Error::Stack(format!("an answer that is none: {e}"))),
        }
    }
    Err(Error::Stack(
        "the stack went away before it said that it is saved; the file is not there".into(),
    ))
}
