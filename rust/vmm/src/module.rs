// SPDX-License-Identifier: GPL-2.0-or-later
//! The Matryoshka module as user space sees it: loading, unloading and
//! /sys/kernel/matryoshka (Documentation/ABI).

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
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
    /// Names of those that are knobs: their files can be written to.
    pub knobs: BTreeSet<String>,
}

/// What became of a mode that every path was to take.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Settled {
    /// Paths that have it now.
    pub taken: usize,
    /// A line for each path that cannot work here, with the reason.
    pub unable: Vec<String>,
    /// A line for each path that did not take it for another reason.
    pub refused: Vec<String>,
}

impl Settled {
    /// Whether the mode holds as far as it can: some path has it, and those that have not cannot work here.
    pub fn good(&self) -> bool {
        self.taken > 0 && self.refused.is_empty()
    }
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
            let mode = values.remove("mode").unwrap_or_default();
            let state = values.remove("state").unwrap_or_default();
            let knobs = knobs(&e.path(), &values);
            out.push(PathStatus {
                name: e.file_name().to_string_lossy().into_owned(),
                mode,
                state,
                values,
                knobs,
            });
        }
        out.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(out)
    }

    /// Writes one attribute of a path (`mode` or a knob).
    ///
    /// # Errors
    /// [`Error::Usage`]: there is no such path, attribute or value. [`Error::Setting`]: the module does not take it now.
    pub fn set(&self, path: &str, attribute: &str, value: &str) -> Result<()> {
        let plain = |s: &str| !s.is_empty() && !s.contains('/') && !s.starts_with('.');
        let dir = self.root.join("paths").join(path);
        if !plain(path) || !dir.is_dir() {
            let known: Vec<_> = self.paths()?.into_iter().map(|p| p.name).collect();
            return Err(Error::Usage(format!(
                "no path is called {path:?}; there are: {}",
                known.join(", ")
            )));
        }
        let file = dir.join(attribute);
        if !plain(attribute) || !file.is_file() {
            let known: Vec<_> = attributes(&dir)?.into_keys().collect();
            return Err(Error::Usage(format!(
                "path {path} has no attribute {attribute:?}; it has: {}",
                known.join(", ")
            )));
        }
        if !writable(&file) {
            let mut knobs = knobs(&dir, &attributes(&dir)?);
            knobs.remove("mode");
            let knobs: Vec<_> = knobs.into_iter().collect();
            return Err(Error::Usage(format!(
                "{attribute} of path {path} is read-only; what can be set is its mode{}",
                match &knobs[..] {
                    [] => String::new(),
                    _ => format!(", and {}", knobs.join(", ")),
                }
            )));
        }
        fs::write(&file, value).map_err(|e| {
            let why = refusal(&file, value, &e);
            match e.raw_os_error() {
                Some(libc::EINVAL | libc::ERANGE) => Error::Usage(why),
                _ => Error::Setting(why),
            }
        })
    }

    /// Sets the mode of every path. One that cannot work here is asked again each time: what is in its way (another
    /// one's hook, say) may have gone. One that does not take it keeps none of the others from it.
    pub fn set_all(&self, mode: &str) -> Result<Settled> {
        self.settle(mode, |file| fs::write(file, mode))
    }

    /// [`Module::set_all`] with what writes the mode to a file.
    fn settle(&self, mode: &str, write: impl Fn(&Path) -> io::Result<()>) -> Result<Settled> {
        let mut settled = Settled::default();
        for p in self.paths()? {
            let unable = p.state.starts_with("unavailable") && mode != "off";
            if p.mode == mode && !unable {
                settled.taken += 1;
                continue;
            }
            let file = self.root.join("paths").join(&p.name).join("mode");
            match write(&file) {
                Ok(()) => settled.taken += 1,
                Err(e) => {
                    let why = refusal(&file, mode, &e);
                    match e.raw_os_error() {
                        Some(libc::EOPNOTSUPP) => settled.unable.push(why),
                        _ => settled.refused.push(why),
                    }
                }
            }
        }
        Ok(settled)
    }
}

/// Whether anybody may write to the file: of those in sysfs a knob, or a mode.
fn writable(file: &Path) -> bool {
    fs::metadata(file).is_ok_and(|data| data.permissions().mode() & 0o222 != 0)
}

/// Those of a directory's attributes that can be written to.
fn knobs(dir: &Path, values: &BTreeMap<String, String>) -> BTreeSet<String> {
    let names = values.keys().filter(|name| writable(&dir.join(name)));
    names.cloned().collect()
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
            let settled = module.set_all(mode)?;
            match settled.good() {
                true => Ok(()),
                false => {
                    let why = [settled.refused, settled.unable].concat();
                    Err(Error::Setting(format!(
                        "L{level}'s paths do not go to mode {mode}\n  {}",
                        why.join("\n  ")
                    )))
                }
            }
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
                let mode = if f.ends_with("/mode") { 0o644 } else { 0o444 };
                fs::set_permissions(root.join(f), fs::Permissions::from_mode(mode)).unwrap();
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
    fn all_paths_are_set_but_those_that_cannot_be() {
        let t = Tree::new("set");
        let m = Module::at(&t.0);
        let mode = |path: &str| fs::read_to_string(t.0.join(format!("paths/{path}/mode"))).unwrap();
        let but_broken = |errno| {
            move |file: &Path| match file.ends_with("broken/mode") {
                true => Err(io::Error::from_raw_os_error(errno)),
                false => fs::write(file, "check"),
            }
        };
        let settled = m.settle("check", but_broken(libc::EOPNOTSUPP)).unwrap();
        assert_eq!(
            (mode("checks").trim(), mode("broken").trim()),
            ("check", "off")
        );
        assert!(settled.good() && settled.taken == 1);
        assert!(settled.unable[0].ends_with("unavailable: no symbol"));
        // What is so already counts, and is not written once more.
        let settled = m.settle("check", but_broken(libc::EACCES)).unwrap();
        assert!(!settled.good() && settled.taken == 1);
        assert!(settled.refused[0].contains("broken/mode"));
        // What was in the way may have gone.
        assert_eq!(m.set_all("check").unwrap().taken, 2);
        assert_eq!(mode("broken"), "check");
        fs::write(t.0.join("paths/checks/mode"), "off").unwrap();
        let none = |_: &Path| Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        let settled = m.settle("on", none).unwrap();
        assert!(!settled.good() && settled.unable.len() == 2);
    }

    #[test]
    fn paths_that_cannot_work_are_off_already() {
        let t = Tree::new("off");
        let write = |_: &Path| panic!("nothing to write");
        assert!(Module::at(&t.0).settle("off", write).unwrap().good());
    }

    #[test]
    fn knobs_are_what_can_be_written_to() {
        let t = Tree::new("knobs");
        let m = Module::at(&t.0);
        fs::write(t.0.join("paths/checks/window"), "8\n").unwrap();
        let paths = m.paths().unwrap();
        assert_eq!(paths[1].knobs, BTreeSet::from(["window".to_owned()]));
        assert_eq!(paths[1].values["window"], "8");
        let e = m.set("checks", "taken", "0").unwrap_err();
        assert!(matches!(e, Error::Usage(_)), "{e}");
        let says = "taken of path checks is read-only; what can be set is its mode, and window";
        assert_eq!(e.to_string(), says);
        assert!(m.set("checks", "window", "16").is_ok());
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
