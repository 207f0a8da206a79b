// SPDX-License-Identifier: GPL-2.0-or-later
//! The files a stack is made of, and where they are.
//!
//! | file | what |
//! | ---- | ---- |
//! | `DIR/matryoshka.ko` | the module for the kernel of this level, if /lib/modules has none for it |
//! | `DIR/payload` | the bare-metal payload |
//! | `DIR/guest/vmlinux` (or bzImage, vmlinuz) | the kernel of the Linux levels |
//! | `DIR/guest/irqbypass.ko`, `kvm.ko`, `kvm-intel.ko` | its KVM |
//! | `DIR/guest/matryoshka.ko` | the module for it |
//! | `DIR/extra/N` | additional files on their way to an innermost Linux |
//!
//! with DIR /lib/matryoshka by default. A guest gets the same tree, so what was
//! `DIR/guest` on the host is there once more for the next level.

use std::fs;
use std::path::{Path, PathBuf};

use crate::stack::Inner;
use crate::{module, Error, Result};

/// Where the files are by default.
pub const DIR: &str = "/lib/matryoshka";
/// How they get there.
pub const INSTALL: &str = "make build && sudo make install fills /lib/matryoshka";
/// Modules in the order in which they must be loaded.
pub const KVM_MODULES: [&str; 3] = ["irqbypass", "kvm", "kvm-intel"];
/// Names of a guest kernel in the order of preference: what need not unpack itself
/// comes first.
pub const KERNELS: [&str; 3] = ["vmlinux", "bzImage", "vmlinuz"];

/// The files.
#[derive(Debug, Clone)]
pub struct Files {
    dir: PathBuf,
    guest: PathBuf,
    tool: PathBuf,
    kernel: Option<PathBuf>,
    payload: PathBuf,
    /// What of it the user has named.
    named: Vec<PathBuf>,
    /// Sources of the additional files for an innermost Linux; where they go is in the
    /// stack's specification ([`crate::stack::Spec::extra`]).
    pub extra: Vec<PathBuf>,
}

impl Files {
    /// The files under `dir`, which is [`DIR`] unless a test or a user says
    /// otherwise; `tool` is this very program.
    pub fn new(dir: &Path, tool: &Path) -> Files {
        let guest = dir.join("guest");
        let kernel = KERNELS.iter().map(|k| guest.join(k)).find(|p| p.is_file());
        Files {
            dir: dir.to_owned(),
            kernel,
            payload: dir.join("payload"),
            guest,
            tool: tool.to_owned(),
            named: Vec::new(),
            extra: Vec::new(),
        }
    }

    /// The files of a command line: those below [`DIR`] and this very program, but guests' kernel and modules, and the
    /// payload, from where the user says.
    pub fn chosen(guest: Option<&Path>, payload: Option<&Path>) -> Files {
        let mut files = Files::new(Path::new(DIR), Path::new("/proc/self/exe"));
        if let Some(guest) = guest {
            files = files.with_guest(guest);
        }
        if let Some(payload) = payload {
            files = files.with_payload(payload);
        }
        files
    }

    /// Takes kernel and modules of the Linux levels from a directory that the user has named.
    pub fn with_guest(mut self, guest: &Path) -> Files {
        self.guest = guest.to_owned();
        self.named.push(guest.to_owned());
        self.kernel = KERNELS.iter().map(|k| guest.join(k)).find(|p| p.is_file());
        self
    }

    /// Takes the payload that the user has named.
    pub fn with_payload(mut self, payload: &Path) -> Files {
        self.payload = payload.to_owned();
        self.named.push(payload.to_owned());
        self
    }

    /// Puts files that the user has named into an innermost Linux.
    pub fn with_extra(mut self, extra: Vec<PathBuf>) -> Files {
        self.named.extend(extra.iter().cloned());
        self.extra = extra;
        self
    }

    /// Looks at what the user has named, before anything is done with it.
    ///
    /// # Errors
    /// [`Error::Usage`]: it is not there, cannot be read or cannot be what it is named for.
    pub fn check(&self) -> Result<()> {
        for path in &self.named {
            let found = fs::metadata(path).and_then(|data| match () {
                _ if data.is_dir() => fs::read_dir(path).map(drop),
                _ if data.is_file() => fs::File::open(path).map(drop),
                // Opening a pipe would take it from who reads it later.
                _ => Ok(()),
            });
            found.map_err(|e| self.blame(Error::file(path)(e)))?;
        }
        if self.is_named(&self.guest) {
            self.kernel()?;
        }
        if self.is_named(&self.payload) {
            crate::payload::check(self.payload()?).map_err(|e| self.blame(e))?;
        }
        match self.extra.iter().find(|path| path.is_dir()) {
            Some(path) => Err(Error::Usage(format!(
                "{} is a directory; only files can be put into a guest",
                path.display()
            ))),
            None => Ok(()),
        }
    }

    /// Whether the user has named this file, or a directory that it is in.
    fn is_named(&self, path: &Path) -> bool {
        self.named.iter().any(|named| path.starts_with(named))
    }

    /// What is wrong with a file that the user has named is wrong with the command line, and not with this host.
    pub(crate) fn blame(&self, e: Error) -> Error {
        match &e {
            Error::File { path, .. } | Error::Image { path, .. } if self.is_named(path) => {
                Error::Usage(e.to_string())
            }
            _ => e,
        }
    }

    /// Something that should be in `place` is not there.
    fn missing(&self, place: &Path, what: String) -> Error {
        match self.is_named(place) {
            true => Error::Usage(what),
            false => Error::Stack(what),
        }
    }

    /// Takes the `n` additional files from where the level below has put them.
    pub fn with_relayed(mut self, n: usize) -> Files {
        self.extra = (0..n)
            .map(|i| self.dir.join(format!("extra/{i}")))
            .collect();
        self
    }

    /// This program.
    pub fn tool(&self) -> &Path {
        &self.tool
    }

    /// The module for the kernel of this level. It need not be there.
    ///
    /// What is in /lib/modules is for the kernel that runs. The file in our own directory is for the one that ran when it was put there,
    /// but the lab's hosts and all guests have no other.
    pub fn module_here(&self) -> PathBuf {
        self.module_or(module::installed())
    }

    fn module_or(&self, installed: Option<PathBuf>) -> PathBuf {
        installed.unwrap_or_else(|| self.dir.join("matryoshka.ko"))
    }

    /// The kernel of the Linux levels.
    pub fn kernel(&self) -> Result<&Path> {
        self.kernel.as_deref().ok_or_else(|| {
            let what = format!(
                "no guest kernel: {} has none of {}\n  {INSTALL}; or --guest DIR",
                self.guest.display(),
                KERNELS.join(", ")
            );
            self.missing(&self.guest, what)
        })
    }

    /// The payload.
    pub fn payload(&self) -> Result<&Path> {
        if self.payload.is_file() {
            return Ok(&self.payload);
        }
        let what = format!(
            "no payload: {} is not there, or no file\n  {INSTALL}; or --payload FILE",
            self.payload.display()
        );
        Err(self.missing(&self.payload, what))
    }

    /// A KVM module of the Linux levels by name, compressed or not.
    pub fn guest_module(&self, name: &str) -> Option<PathBuf> {
        ["ko", "ko.xz", "ko.zst"]
            .iter()
            .map(|e| self.guest.join(format!("{name}.{e}")))
            .find(|p| p.is_file())
    }

    /// What goes into a guest's initramfs as (path there, source): its KVM and what
    /// it runs, unless it is the `innermost`; the kernel too when what it runs is
    /// another Linux (`more`).
    pub fn for_guest(
        &self,
        more: bool,
        innermost: bool,
        inner: &Inner,
    ) -> Result<Vec<(String, PathBuf)>> {
        let mut out = Vec::new();
        let mut put = |name: &str, src: &Path| out.push((format!("{DIR}/{name}"), src.to_owned()));
        let name_of = |p: &Path| {
            p.file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned()
        };
        // An innermost Linux gets them as well when they are there: somebody may
        // want to start a guest by hand.
        for name in KVM_MODULES {
            match self.guest_module(name) {
                Some(p) => put(&format!("guest/{}", name_of(&p)), &p),
                // irqbypass may be built in.
                None if innermost || name == "irqbypass" => {}
                None => {
                    let what = format!(
                        "{} has no {name}.ko, so nothing can run inside that guest\n  {INSTALL}; or --guest DIR",
                        self.guest.display()
                    );
                    return Err(self.missing(&self.guest, what));
                }
            }
        }
        let module = self.guest.join("matryoshka.ko");
        if module.is_file() {
            put("guest/matryoshka.ko", &module);
        }
        if more {
            let k = self.kernel()?;
            put(&format!("guest/{}", name_of(k)), k);
        }
        if !innermost && matches!(inner, Inner::Payload { .. }) {
            put("payload", self.payload()?);
        }
        Ok(out)
    }

    /// MiB of everything that can get into an initramfs, rounded up.
    pub fn total_mib(&self) -> u64 {
        let size = |p: &Path| fs::metadata(p).map_or(0, |m| m.len());
        let mut bytes =
            size(&self.tool) + size(&self.payload) + size(&self.guest.join("matryoshka.ko"));
        bytes += self.kernel.as_deref().map_or(0, size);
        bytes += KVM_MODULES
            .iter()
            .filter_map(|m| self.guest_module(m))
            .map(|p| size(&p))
            .sum::<u64>();
        bytes += self.extra.iter().map(|p| size(p)).sum::<u64>();
        (bytes >> 20) + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(tag: &str, files: &[&str]) -> PathBuf {
        let root = std::env::temp_dir().join(format!("mtk-files-{tag}-{}", std::process::id()));
        fs::create_dir_all(root.join("guest")).unwrap();
        for f in files {
            fs::write(root.join(f), b"x").unwrap();
        }
        root
    }

    #[test]
    fn what_is_missing_is_named() {
        let root = tree("missing", &[]);
        let f = Files::new(&root, Path::new("/bin/true"));
        assert!(f
            .kernel()
            .unwrap_err()
            .to_string()
            .contains("vmlinux, bzImage, vmlinuz"));
        assert!(f.payload().unwrap_err().to_string().contains("--payload"));
        let e = f
            .for_guest(
                false,
                false,
                &Inner::Payload {
                    args: String::new(),
                },
            )
            .unwrap_err();
        assert!(e.to_string().contains("kvm.ko"), "{e}");
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn what_the_user_named_is_the_users() {
        let root = tree("named", &[]);
        let f = Files::new(&root, Path::new("/bin/true"));
        assert!(matches!(f.payload(), Err(Error::Stack(_))));
        assert!(matches!(f.kernel(), Err(Error::Stack(_))));
        let (guest, payload) = (root.join("guest"), root.join("p"));
        let f = f.with_guest(&guest).with_payload(&payload);
        assert!(matches!(f.check(), Err(Error::Usage(_))));
        assert!(matches!(f.payload(), Err(Error::Usage(_))));
        assert!(matches!(f.kernel(), Err(Error::Usage(_))));
        let wrong = |path: PathBuf| Error::Image {
            path,
            what: "is none".into(),
        };
        assert!(matches!(f.blame(wrong(payload)), Error::Usage(_)));
        assert!(matches!(
            f.blame(wrong(guest.join("vmlinux"))),
            Error::Usage(_)
        ));
        assert!(matches!(
            f.blame(wrong(root.join("q"))),
            Error::Image { .. }
        ));
        let says = |f: &Files| f.check().unwrap_err().to_string();
        fs::write(root.join("guest/bzImage"), b"x").unwrap();
        fs::write(root.join("p"), b"root:x:0:0").unwrap();
        let f = f.with_guest(&guest);
        assert!(says(&f).contains("is not a payload"), "{}", says(&f));
        fs::write(root.join("p"), b"\x7fELF").unwrap();
        assert!(f.check().is_ok());
        let with = |extra: &Path| f.clone().with_extra(vec![extra.to_owned()]);
        assert!(says(&with(&root.join("nothing"))).contains("nothing: No such file"));
        assert!(says(&with(&root)).contains("is a directory"));
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn the_installed_module_is_the_running_kernels() {
        let root = tree("module", &["matryoshka.ko"]);
        let f = Files::new(&root, Path::new("/bin/true"));
        assert_eq!(f.module_or(None), root.join("matryoshka.ko"));
        let installed = PathBuf::from("/lib/modules/7.3/updates/matryoshka.ko");
        assert_eq!(f.module_or(Some(installed.clone())), installed);
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn each_level_gets_what_it_needs() {
        let all = [
            "payload",
            "guest/vmlinux",
            "guest/kvm.ko",
            "guest/kvm-intel.ko.xz",
            "guest/matryoshka.ko",
        ];
        let root = tree("needs", &all);
        let f = Files::new(&root, Path::new("/bin/true"));
        let inner = Inner::Payload {
            args: String::new(),
        };
        let names = |more, innermost| -> Vec<String> {
            f.for_guest(more, innermost, &inner)
                .unwrap()
                .into_iter()
                .map(|x| x.0)
                .collect()
        };
        let last = names(false, false);
        assert!(last.contains(&"/lib/matryoshka/payload".to_owned()));
        assert!(last.contains(&"/lib/matryoshka/guest/kvm-intel.ko.xz".to_owned()));
        assert!(!last.contains(&"/lib/matryoshka/guest/vmlinux".to_owned()));
        assert!(names(true, false).contains(&"/lib/matryoshka/guest/vmlinux".to_owned()));
        fs::remove_dir_all(root).unwrap();
    }
}
