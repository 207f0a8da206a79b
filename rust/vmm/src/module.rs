// SPDX-License-Identifier: GPL-2.0-or-later
//! The Matryoshka module as user space sees it: loading, unloading and
//! /sys/kernel/matryoshka (Documentation/ABI).

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use protocol::Config;
use serde::{Deserialize, Serialize};

use crate::files::INSTALL;
use crate::{Error, Result};

/// The module's name.
pub const NAME: &str = "matryoshka";
/// Where its sysfs directory is.
pub const SYSFS: &str = "/sys/kernel/matryoshka";
/// What to do about a module that is not there.
pub const GET_IT: &str = "make modules, then sudo make modules_install or sudo make install";
/// What to do about a setting that this user may not change.
const ROOT_ONLY: &str = "the module's settings belong to root: try again with sudo";

/// One path as sysfs shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PathStatus {
    /// Name of its directory.
    pub name: String,
    /// off, on or check.
    pub mode: String,
    /// Whether it can work on this kernel, and if not why.
    pub state: String,
    /// Every other attribute: counters (numbers) and knobs.
    pub values: BTreeMap<String, String>,
}

/// The module's sysfs directory.
#[derive(Debug, Clone)]
pub struct Module {
    root: PathBuf,
}

impl Default for Module {
    fn default() -> Self {
        Module { root: SYSFS.into() }
    }
}

impl Module {
    /// The directory at another place, for tests.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Module { root: root.into() }
    }

    /// Whether the module is loaded.
    pub fn present(&self) -> bool {
        self.root.is_dir()
    }

    /// The module's own attributes (version, kernel_match, ...) by name.
    pub fn attributes(&self) -> Result<BTreeMap<String, String>> {
        attributes(&self.root)
    }

    /// All paths, by name.
    pub fn paths(&self) -> Result<Vec<PathStatus>> {
        let dir = self.root.join("paths");
        let mut out = Vec::new();
        for e in fs::read_dir(&dir).map_err(Error::file(&dir))? {
            let e = e.map_err(Error::file(&dir))?;
            if !e.path().is_dir() {
                continue;
            }
            let mut values = attributes(&e.path())?;
            out.push(PathStatus {
                name: e.file_name().to_string_lossy().into_owned(),
                mode: values.remove("mode").unwrap_or_default(),
                state: values.remove("state").unwrap_or_default(),
                values,
            });
        }
        out.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(out)
    }

    /// Writes one attribute of a path (`mode` or a knob).
    pub fn set(&self, path: &str, attribute: &str, value: &str) -> Result<()> {
        let plain = |s: &str| !s.is_empty() && !s.contains('/') && !s.starts_with('.');
        let dir = self.root.join("paths").join(path);
        if !plain(path) || !dir.is_dir() {
            let known: Vec<_> = self.paths()?.into_iter().map(|p| p.name).collect();
            return Err(Error::Module(format!(
                "no path is called {path:?}; there are: {}",
                known.join(", ")
            )));
        }
        let file = dir.join(attribute);
        if !plain(attribute) || !file.is_file() {
            let known: Vec<_> = attributes(&dir)?.into_keys().collect();
            return Err(Error::Module(format!(
                "path {path} has no attribute {attribute:?}; it has: {}",
                known.join(", ")
            )));
        }
        fs::write(&file, value).map_err(|e| Error::Module(refusal(&file, value, &e)))
    }

    /// Sets the mode of every path that can work on this kernel.
    pub fn set_all(&self, mode: &str) -> Result<()> {
        for p in self
            .paths()?
            .iter()
            .filter(|p| !p.state.starts_with("unavailable"))
        {
            if p.mode != mode {
                self.set(&p.name, "mode", mode)?;
            }
        }
        Ok(())
    }
}

/// Why the attribute `file` of a path was not set to `value`.
fn refusal(file: &Path, value: &str, e: &io::Error) -> String {
    let name = file.display();
    match e.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => format!("{name}: {e}: {ROOT_ONLY}"),
        Some(libc::EOPNOTSUPP) => {
            let state = fs::read_to_string(file.with_file_name("state")).unwrap_or_default();
            format!("{name}: it cannot work here: {}", state.trim())
        }
        _ => format!("{name} does not take {value:?}: {e}; Documentation/ABI says what it takes"),
    }
}

/// The readable files of a directory, without trailing newline.
fn attributes(dir: &Path) -> Result<BTreeMap<String, String>> {
    let mut out = BTreeMap::new();
    for e in fs::read_dir(dir).map_err(Error::file(dir))? {
        let e = e.map_err(Error::file(dir))?;
        if !e.path().is_file() {
            continue;
        }
        // Write-only attributes exist and are nobody's fault.
        if let Ok(text) = fs::read_to_string(e.path()) {
            out.insert(
                e.file_name().to_string_lossy().into_owned(),
                text.trim_end().to_owned(),
            );
        }
    }
    Ok(out)
}

/// A knob of a path and what to set it to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Knob {
    /// The path's name.
    pub path: String,
    /// The knob's.
    pub name: String,
    /// Its value, as it is written to sysfs.
    pub value: String,
}

impl std::str::FromStr for Knob {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let parts = text.split_once('=').and_then(|(knob, value)| {
            let (path, name) = knob.split_once('/')?;
            Some((path, name, value))
        });
        match parts {
            Some((path, name, value)) if name != "mode" && ![path, name, value].contains(&"") => {
                Ok(Knob {
                    path: path.into(),
                    name: name.into(),
                    value: value.into(),
                })
            }
            Some((_, "mode", _)) => Err("modes are the configuration's (--config)".into()),
            _ => Err(format!(
                "{text:?} is not PATH/KNOB=VALUE, as in direct/populate=16"
            )),
        }
    }
}

/// Sets knobs at this level, where the module is loaded.
pub fn tune(knobs: &[Knob]) -> Result<()> {
    let module = Module::default();
    if !module.present() {
        return Ok(());
    }
    knobs
        .iter()
        .try_for_each(|knob| module.set(&knob.path, &knob.name, &knob.value))
}

/// Where modprobe may find the module for a kernel of this release.
pub fn places(release: &str) -> impl Iterator<Item = String> + '_ {
    ["updates", "updates/dkms", "extra"]
        .into_iter()
        .flat_map(|dir| ["ko", "ko.xz", "ko.zst"].map(|end| (dir, end)))
        .map(move |(dir, end)| format!("/lib/modules/{release}/{dir}/{NAME}.{end}"))
}

/// The module that is installed for the running kernel.
pub fn installed() -> Option<PathBuf> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    let mut files = places(release.trim()).map(PathBuf::from);
    files.find(|file| file.is_file())
}

/// Loads a module file with parameters (finit_module). That it is loaded already
/// is no error.
pub fn load(file: &Path, params: &str) -> Result<()> {
    /// The kernel unpacks compressed module files itself when told so.
    const MODULE_INIT_COMPRESSED_FILE: libc::c_int = 4;
    let f = File::open(file).map_err(Error::file(file))?;
    let flags = match file.extension().and_then(|e| e.to_str()) {
        Some("ko") => 0,
        _ => MODULE_INIT_COMPRESSED_FILE,
    };
    let params = CString::new(params).map_err(|_| Error::Module("parameters with a NUL".into()))?;
    // SAFETY: the descriptor is open and the string ends in NUL; the call reads both
    // and nothing else of this process.
    let r = unsafe {
        libc::syscall(
            libc::SYS_finit_module,
            f.as_raw_fd(),
            params.as_ptr(),
            flags,
        )
    };
    if r == 0 {
        return Ok(());
    }
    let e = io::Error::last_os_error();
    let hint = match e.raw_os_error() {
        Some(libc::EEXIST) => return Ok(()),
        Some(libc::EPERM) => ": loading modules needs root (CAP_SYS_MODULE), and no lockdown",
        Some(libc::ENOEXEC) => ": it was built for another kernel",
        Some(libc::ENOENT) => ": it needs a symbol or module that is not there; see the kernel log",
        Some(libc::EOPNOTSUPP) if flags != 0 => {
            ": this kernel does not unpack module files; modprobe does, so modprobe it first"
        }
        Some(libc::EOPNOTSUPP | libc::ENODEV) => {
            ": the hardware lacks what it needs; see the kernel log"
        }
        Some(libc::EKEYREJECTED) => ": it is not signed and this kernel wants that",
        _ => "; see the kernel log",
    };
    Err(Error::Module(format!(
        "cannot load {}: {e}{hint}",
        file.display()
    )))
}

/// Unloads a module by name (delete_module). That it is not loaded is no error, for
/// whoever asks. One that is still in use is tried again for a second.
pub fn unload(name: &str) -> Result<()> {
    // The kernel asks for root before it looks whether there is anything to unload.
    let all = Path::new("/sys/module");
    if all.is_dir() && !all.join(name).exists() {
        return Ok(());
    }
    let c = CString::new(name).map_err(|_| Error::Module("a name with a NUL".into()))?;
    let mut e = io::Error::from_raw_os_error(0);
    for _ in 0..100 {
        // SAFETY: the string ends in NUL and is only read.
        if unsafe { libc::syscall(libc::SYS_delete_module, c.as_ptr(), libc::O_NONBLOCK) } == 0 {
            return Ok(());
        }
        e = io::Error::last_os_error();
        match e.raw_os_error() {
            Some(libc::ENOENT) => return Ok(()),
            Some(libc::EAGAIN | libc::EBUSY) => std::thread::sleep(Duration::from_millis(10)),
            _ => break,
        }
    }
    let hint = match e.raw_os_error() {
        Some(libc::EPERM) => ": unloading modules needs root (CAP_SYS_MODULE)",
        _ => "",
    };
    Err(Error::Module(format!("cannot unload {name}: {e}{hint}")))
}

/// What a configuration means at a level: `None` for not loaded, else the mode of
/// every path.
pub fn mode_at(config: Config, level: u32) -> Option<&'static str> {
    match (config, level) {
        (Config::Idle, 0) => Some("off"),
        (Config::L0, 0) | (Config::All, _) => Some("on"),
        (Config::Check, 0) => Some("check"),
        _ => None,
    }
}

/// Brings this level's module into the state that `config` wants, loading it from
/// `file` where needed.
pub fn apply(config: Config, level: u32, file: &Path) -> Result<()> {
    let module = Module::default();
    match mode_at(config, level) {
        None => unload(NAME),
        Some(mode) => {
            if !module.present() {
                if !file.exists() {
                    return Err(Error::Module(format!(
                        "L{level} has none to load: {} is not there\n  {}",
                        file.display(),
                        if level == 0 { GET_IT } else { INSTALL },
                    )));
                }
                load(file, "")?;
            }
            module.set_all(mode)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A made-up sysfs directory that goes away with the test.
    struct Tree(PathBuf);

    impl Tree {
        fn new(tag: &str) -> Self {
            let root = std::env::temp_dir().join(format!("mtk-sysfs-{tag}-{}", std::process::id()));
            let checks = root.join("paths/checks");
            fs::create_dir_all(&checks).unwrap();
            fs::create_dir_all(root.join("paths/broken")).unwrap();
            for (f, v) in [
                ("version", "0.1\n"),
                ("paths/checks/mode", "off\n"),
                ("paths/checks/state", "ready\n"),
                ("paths/checks/taken", "12\n"),
                ("paths/broken/mode", "off\n"),
                ("paths/broken/state", "unavailable: no symbol\n"),
            ] {
                fs::write(root.join(f), v).unwrap();
            }
            Tree(root)
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn paths_are_read() {
        let t = Tree::new("read");
        let m = Module::at(&t.0);
        assert!(m.present());
        assert_eq!(m.attributes().unwrap()["version"], "0.1");
        let p = m.paths().unwrap();
        assert_eq!(p.len(), 2);
        assert_eq!(
            (p[1].name.as_str(), p[1].mode.as_str(), p[1].state.as_str()),
            ("checks", "off", "ready")
        );
        assert_eq!(p[1].values["taken"], "12");
    }

    #[test]
    fn only_available_paths_are_set() {
        let t = Tree::new("set");
        let m = Module::at(&t.0);
        m.set_all("check").unwrap();
        assert_eq!(
            fs::read_to_string(t.0.join("paths/checks/mode")).unwrap(),
            "check"
        );
        assert_eq!(
            fs::read_to_string(t.0.join("paths/broken/mode")).unwrap(),
            "off\n"
        );
    }

    #[test]
    fn wrong_names_list_the_right_ones() {
        let t = Tree::new("names");
        let m = Module::at(&t.0);
        let e = m.set("chekcs", "mode", "on").unwrap_err().to_string();
        assert!(e.contains("broken, checks"), "{e}");
        let e = m.set("checks", "moed", "on").unwrap_err().to_string();
        assert!(e.contains("mode, state, taken"), "{e}");
        assert!(m.set("../paths/checks", "mode", "on").is_err());
        assert!(m.set("checks", "../checks/mode", "on").is_err());
    }

    #[test]
    fn a_refusal_says_why() {
        let t = Tree::new("refusal");
        let mode = t.0.join("paths/broken/mode");
        let says = |errno| refusal(&mode, "on", &io::Error::from_raw_os_error(errno));
        assert!(says(libc::EACCES).contains("sudo"));
        assert!(says(libc::EOPNOTSUPP).ends_with("unavailable: no symbol"));
        assert!(says(libc::EINVAL).contains("Documentation/ABI"));
    }

    #[test]
    fn knobs_are_parsed() {
        let knob = "direct/populate=16".parse::<Knob>().unwrap();
        assert_eq!(
            (&*knob.path, &*knob.name, &*knob.value),
            ("direct", "populate", "16")
        );
        for bad in ["", "direct", "direct=1", "direct/=1", "/x=1", "direct/x="] {
            assert!(bad.parse::<Knob>().is_err(), "{bad}");
        }
        let e = "direct/mode=on".parse::<Knob>().unwrap_err();
        assert!(e.contains("--config"), "{e}");
    }

    #[test]
    fn configs_mean_what_the_protocol_says() {
        assert_eq!(mode_at(Config::Stock, 0), None);
        assert_eq!(mode_at(Config::Idle, 0), Some("off"));
        assert_eq!(mode_at(Config::Idle, 1), None);
        assert_eq!(mode_at(Config::L0, 0), Some("on"));
        assert_eq!(mode_at(Config::L0, 2), None);
        assert_eq!(mode_at(Config::All, 2), Some("on"));
        assert_eq!(mode_at(Config::Check, 0), Some("check"));
    }
}
