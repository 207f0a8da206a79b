// SPDX-License-Identifier: GPL-2.0-or-later
//! `matryoshka doctor`: is this host fit, and if not, what to do.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use crate::status::table;
use crate::Code;

/// Look over this host: what nested guests and the module need, and what to do about what is
/// missing.
#[derive(Args, Debug)]
pub struct DoctorArgs {
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// What a check found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// As it should be.
    Ok,
    /// Works, but less well or with less.
    Warn,
    /// Does not work.
    Bad,
    /// Cannot be told from here.
    Unknown,
}

/// One line of the report.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    found: String,
    /// The next step, empty when there is nothing to do.
    todo: String,
}

impl Check {
    fn new(name: &'static str, verdict: Verdict, found: impl Into<String>, todo: &str) -> Check {
        let todo = if verdict == Verdict::Ok { "" } else { todo };
        Check {
            name,
            verdict,
            found: found.into(),
            todo: todo.into(),
        }
    }
}

/// The host under a root directory, so that tests can make one up.
struct Host {
    root: PathBuf,
    release: String,
}

impl Host {
    fn path(&self, p: &str) -> PathBuf {
        self.root.join(p.trim_start_matches('/'))
    }

    fn read(&self, p: &str) -> Option<String> {
        fs::read_to_string(self.path(p))
            .ok()
            .map(|s| s.trim().to_owned())
    }

    fn exists(&self, p: &str) -> bool {
        self.path(p).exists()
    }

    /// A boolean parameter of a module that is loaded.
    fn parameter(&self, module: &str, name: &str) -> Option<bool> {
        let v = self.read(&format!("/sys/module/{module}/parameters/{name}"))?;
        Some(matches!(v.as_str(), "Y" | "1"))
    }

    /// A kernel configuration option, as far as a configuration can be found: `Some(true)` for y or m.
    fn config(&self, option: &str) -> Option<bool> {
        let places = [
            format!("/boot/config-{}", self.release),
            format!("/lib/modules/{}/config", self.release),
            format!("/usr/lib/modules/{}/config", self.release),
        ];
        let text = places.iter().find_map(|p| self.read(p))?;
        Some(text.lines().any(|l| {
            l.strip_prefix(option)
                .is_some_and(|rest| matches!(rest, "=y" | "=m"))
        }))
    }

    /// Whether the running kernel has this symbol; `None` where it does not show its symbols.
    fn symbol(&self, name: &str) -> Option<bool> {
        let text = self.read("/proc/kallsyms").filter(|t| !t.is_empty())?;
        Some(
            text.lines()
                .any(|l| l.split_whitespace().nth(2) == Some(name)),
        )
    }

    /// Words of a line of /proc/cpuinfo.
    fn cpu_words(&self, line: &str) -> Vec<String> {
        self.read("/proc/cpuinfo")
            .unwrap_or_default()
            .lines()
            .find_map(|l| {
                let (k, v) = l.split_once(':')?;
                (k.trim() == line).then(|| v.split_whitespace().map(str::to_owned).collect())
            })
            .unwrap_or_default()
    }
}

fn check(host: &Host) -> Vec<Check> {
    use Verdict::{Bad, Ok, Unknown, Warn};
    let flag = |b: bool, else_: Verdict| if b { Ok } else { else_ };
    let mut out = Vec::new();

    let flags = host.cpu_words("flags");
    let vmx = flags.iter().any(|f| f == "vmx");
    let svm = flags.iter().any(|f| f == "svm");
    let virt = if vmx {
        "VMX"
    } else if svm {
        "AMD-V only"
    } else {
        "no VMX"
    };
    let todo = if svm {
        "Matryoshka is for Intel's VMX; use the lab (scripts/lab) on this machine"
    } else {
        "switch VT-x on in the firmware; in a cloud or VM ask for nested virtualization; or use the lab (make run), \
         which needs none"
    };
    out.push(Check::new("CPU", flag(vmx, Bad), virt, todo));

    let vmx_flags = host.cpu_words("vmx flags");
    let has = |f: &str| vmx_flags.iter().any(|x| x == f);
    if !vmx_flags.is_empty() {
        out.push(Check::new(
            "EPT",
            flag(
                has("ept") && host.parameter("kvm_intel", "ept") != Some(false),
                Bad,
            ),
            if has("ept") {
                "in the CPU"
            } else {
                "not in the CPU"
            },
            "nested guests without EPT are hopeless; load kvm_intel with ept=1 if the CPU has it",
        ));
        let shadow = has("shadow_vmcs");
        let used = host.parameter("kvm_intel", "enable_shadow_vmcs");
        out.push(Check::new(
            "shadow VMCS",
            flag(shadow && used != Some(false), Warn),
            match (shadow, used) {
                (false, _) => "not in the CPU",
                (true, Some(false)) => "in the CPU, switched off",
                (true, _) => "in the CPU",
            },
            "without it every VMREAD and VMWRITE of L1 exits; load kvm_intel with enable_shadow_vmcs=1 if the CPU \
             has it",
        ));
    }

    let dev = host.path("/dev/kvm");
    let open = fs::OpenOptions::new().read(true).write(true).open(&dev);
    match (&open, dev.exists()) {
        (Result::Ok(_), _) => out.push(Check::new("/dev/kvm", Ok, "opens", "")),
        (Err(_), false) => out.push(Check::new(
            "/dev/kvm",
            Bad,
            "not there",
            "modprobe kvm_intel; the kernel log says why if it fails",
        )),
        (Err(e), true) => out.push(Check::new(
            "/dev/kvm",
            Bad,
            e.to_string(),
            "join the group that owns it (usually kvm) or run as root",
        )),
    }

    match host.parameter("kvm_intel", "nested") {
        Some(on) => out.push(Check::new(
            "nested VMX",
            flag(on, Bad),
            if on { "on" } else { "off" },
            "modprobe -r kvm_intel && modprobe kvm_intel nested=1 (for good: options kvm_intel nested=1 in \
             /etc/modprobe.d)",
        )),
        None => out.push(Check::new("nested VMX", Bad, "kvm_intel is not loaded", "modprobe kvm_intel nested=1")),
    }

    let missing: Vec<&str> = ["vmlinux", "kvm", "kvm_intel"]
        .into_iter()
        .filter(|m| !host.exists(&format!("/sys/kernel/btf/{m}")))
        .collect();
    out.push(Check::new(
        "BTF",
        flag(missing.is_empty(), Bad),
        if missing.is_empty() { "kernel, kvm and kvm_intel".into() } else { format!("none for {}", missing.join(", ")) },
        "the module checks its layouts against BTF: load kvm_intel, or use a kernel with CONFIG_DEBUG_INFO_BTF and \
         CONFIG_DEBUG_INFO_BTF_MODULES",
    ));

    // A symbol that only a kernel with the option has, for where no configuration lies.
    for (name, option, symbol, todo) in [
        (
            "ftrace direct calls",
            "CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS",
            "register_ftrace_direct",
            "the module hooks KVM with them: use a kernel built with it",
        ),
        (
            "Rust in the kernel",
            "CONFIG_RUST",
            "rust_helper_mutex_lock",
            "the module is written in Rust: use a kernel built with it (Debian's from 7.x on)",
        ),
    ] {
        out.push(match host.config(option).or_else(|| host.symbol(symbol)) {
            Some(true) => Check::new(name, Ok, option, ""),
            Some(false) => Check::new(name, Bad, format!("no {option}"), todo),
            None => Check::new(
                name,
                Unknown,
                "neither configuration nor symbols of the kernel to be found",
                "look for it in the kernel's configuration",
            ),
        });
    }

    let lockdown = host
        .read("/sys/kernel/security/lockdown")
        .unwrap_or_default();
    let locked = ["[integrity]", "[confidentiality]"]
        .iter()
        .any(|l| lockdown.contains(l));
    let signed = host.parameter("module", "sig_enforce") == Some(true);
    out.push(Check::new(
        "unsigned modules",
        flag(!locked && !signed, Bad),
        match (locked, signed) {
            (true, _) => "locked down",
            (_, true) => "signatures enforced",
            _ => "allowed",
        },
        "sign matryoshka.ko with a key this kernel trusts, or switch Secure Boot off on a lab host",
    ));

    let version = host.read("/sys/kernel/matryoshka/version");
    let places = [
        "/lib/matryoshka/matryoshka.ko".to_owned(),
        format!("/lib/modules/{}/extra/matryoshka.ko", host.release),
        format!("/lib/modules/{}/updates/matryoshka.ko", host.release),
        format!("/lib/modules/{}/updates/dkms/matryoshka.ko", host.release),
    ];
    let file = places
        .iter()
        .flat_map(|p| [p.clone(), format!("{p}.xz"), format!("{p}.zst")])
        .find(|p| host.exists(p));
    out.push(match (version, file) {
        (Some(v), _) => Check::new("module", Ok, format!("loaded, version {v}"), ""),
        (None, Some(f)) => Check::new(
            "module",
            Warn,
            format!("not loaded; {f}"),
            &format!("insmod {f}"),
        ),
        (None, None) => Check::new(
            "module",
            Warn,
            "neither loaded nor installed",
            "make modules_install, then modprobe matryoshka",
        ),
    });
    let guest = ["vmlinux", "bzImage", "vmlinuz"]
        .iter()
        .any(|k| host.exists(&format!("/lib/matryoshka/guest/{k}")));
    out.push(Check::new(
        "guest kernel",
        flag(guest, Warn),
        if guest { "/lib/matryoshka/guest" } else { "none" },
        "nest needs one: the lab builds it (scripts/lab setup), --guest DIR names a directory that has one",
    ));
    out
}

fn release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease")
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// Runs the subcommand: 0 when nothing is bad.
pub fn run(args: DoctorArgs) -> Code {
    let checks = check(&Host {
        root: Path::new("/").into(),
        release: release(),
    });
    let fit = checks.iter().all(|c| c.verdict != Verdict::Bad);
    if args.json {
        println!(
            "{}",
            serde_json::json!({ "schema": 1, "fit": fit, "checks": checks })
        );
    } else {
        let mut t = table();
        for c in &checks {
            let verdict = match c.verdict {
                Verdict::Ok => "ok",
                Verdict::Warn => "warn",
                Verdict::Bad => "BAD",
                Verdict::Unknown => "?",
            };
            t.add_row([verdict, c.name, &c.found]);
        }
        println!("{t}");
        for c in checks.iter().filter(|c| !c.todo.is_empty()) {
            println!("\n{}: {}\n  {}", c.name, c.found, c.todo);
        }
        println!(
            "\n{}",
            if fit {
                "This host is fit."
            } else {
                "This host is not fit yet."
            }
        );
    }
    if fit {
        Code::Ok
    } else {
        Code::Unfit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Tree(Host);

    impl Tree {
        fn new(tag: &str, files: &[(&str, &str)]) -> Tree {
            let root =
                std::env::temp_dir().join(format!("mtk-doctor-{tag}-{}", std::process::id()));
            for (p, text) in files {
                let p = root.join(p.trim_start_matches('/'));
                fs::create_dir_all(p.parent().unwrap()).unwrap();
                fs::write(p, text).unwrap();
            }
            Tree(Host {
                root,
                release: "7.3".into(),
            })
        }

        fn verdict(&self, name: &str) -> Verdict {
            check(&self.0)
                .into_iter()
                .find(|c| c.name == name)
                .unwrap()
                .verdict
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0.root);
        }
    }

    const GOOD: [(&str, &str); 12] = [
        (
            "/proc/cpuinfo",
            "processor\t: 0\nflags\t\t: fpu vmx\nvmx flags\t: vnmi ept vpid shadow_vmcs\n\n",
        ),
        ("/dev/kvm", ""),
        ("/sys/module/kvm_intel/parameters/nested", "Y\n"),
        ("/sys/module/kvm_intel/parameters/ept", "Y\n"),
        ("/sys/module/kvm_intel/parameters/enable_shadow_vmcs", "Y\n"),
        ("/sys/kernel/btf/vmlinux", ""),
        ("/sys/kernel/btf/kvm", ""),
        ("/sys/kernel/btf/kvm_intel", ""),
        (
            "/boot/config-7.3",
            "CONFIG_RUST=y\nCONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS=y\n",
        ),
        (
            "/sys/kernel/security/lockdown",
            "[none] integrity confidentiality\n",
        ),
        ("/sys/kernel/matryoshka/version", "0.1\n"),
        ("/lib/matryoshka/guest/vmlinux", ""),
    ];

    #[test]
    fn a_good_host_is_all_ok() {
        let t = Tree::new("good", &GOOD);
        let bad: Vec<_> = check(&t.0)
            .into_iter()
            .filter(|c| c.verdict != Verdict::Ok)
            .collect();
        assert!(bad.is_empty(), "{bad:?}");
    }

    #[test]
    fn each_fault_is_found() {
        let with = |tag: &str, path: &str, text: &str| {
            let mut files = GOOD.to_vec();
            files.retain(|f| f.0 != path);
            files.push((path, text));
            Tree::new(tag, &files)
        };
        let t = with("nested", "/sys/module/kvm_intel/parameters/nested", "N\n");
        assert_eq!(t.verdict("nested VMX"), Verdict::Bad);
        let t = with(
            "lock",
            "/sys/kernel/security/lockdown",
            "none [integrity] confidentiality\n",
        );
        assert_eq!(t.verdict("unsigned modules"), Verdict::Bad);
        let t = with(
            "rust",
            "/boot/config-7.3",
            "# CONFIG_RUST is not set\nCONFIG_RUST_X=y\n",
        );
        assert_eq!(t.verdict("Rust in the kernel"), Verdict::Bad);
        let t = with("shadow", "/proc/cpuinfo", "flags : vmx\nvmx flags : ept\n");
        assert_eq!(t.verdict("shadow VMCS"), Verdict::Warn);
        assert_eq!(t.verdict("EPT"), Verdict::Ok);
    }

    #[test]
    fn symbols_stand_in_for_a_configuration() {
        let mut files = GOOD.to_vec();
        files.retain(|f| f.0 != "/boot/config-7.3");
        files.push(("/proc/kallsyms", "0 T register_ftrace_direct\n0 T other\n"));
        let t = Tree::new("symbols", &files);
        assert_eq!(t.verdict("ftrace direct calls"), Verdict::Ok);
        assert_eq!(t.verdict("Rust in the kernel"), Verdict::Bad);
    }

    #[test]
    fn an_empty_host_gets_advice_for_everything() {
        let t = Tree::new("empty", &[("/proc/cpuinfo", "flags : fpu\n")]);
        assert_eq!(t.verdict("CPU"), Verdict::Bad);
        assert_eq!(t.verdict("/dev/kvm"), Verdict::Bad);
        assert_eq!(t.verdict("ftrace direct calls"), Verdict::Unknown);
        for c in check(&t.0) {
            assert!(c.verdict == Verdict::Ok || !c.todo.is_empty(), "{c:?}");
        }
    }
}
