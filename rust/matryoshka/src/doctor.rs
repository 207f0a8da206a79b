// SPDX-License-Identifier: GPL-2.0-or-later
//! `matryoshka doctor`: is this host fit, and if not, what to do.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use vmm::files::{DIR, INSTALL, KERNELS};
use vmm::module;

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

    /// The kernel's configuration, if one can be found.
    fn configuration(&self) -> Option<String> {
        let places = [
            format!("/boot/config-{}", self.release),
            format!("/lib/modules/{}/config", self.release),
            format!("/usr/lib/modules/{}/config", self.release),
        ];
        places.iter().find_map(|p| self.read(p))
    }

    /// A kernel configuration option, as far as a configuration can be found: `Some(true)` for y or m.
    fn config(&self, option: &str) -> Option<bool> {
        let text = self.configuration()?;
        Some(text.lines().any(|l| {
            l.strip_prefix(option)
                .is_some_and(|rest| matches!(rest, "=y" | "=m"))
        }))
    }

    /// Which of KVM's two parts the kernel has built in, as its configuration or its list of such modules says.
    fn built_in(&self) -> Vec<&'static str> {
        let config = self.configuration().unwrap_or_default();
        let list = self.read(&format!("/lib/modules/{}/modules.builtin", self.release));
        let list = list.unwrap_or_default();
        [
            ("kvm", "CONFIG_KVM=y", "/kvm.ko"),
            ("kvm_intel", "CONFIG_KVM_INTEL=y", "/kvm-intel.ko"),
        ]
        .into_iter()
        .filter(|(_, option, file)| {
            config.lines().any(|l| l == *option) || list.lines().any(|l| l.ends_with(file))
        })
        .map(|(name, ..)| name)
        .collect()
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

    // kvm_intel's parameters are given to modprobe, or to the kernel if that has it built in.
    let built_in = host.built_in();
    let fixed = built_in.contains(&"kvm_intel");
    let parameter = |text: &str| match fixed {
        true => format!("boot with kvm_intel.{text}"),
        false => format!("load kvm_intel with {text}"),
    };

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
            &format!(
                "nested guests without EPT are hopeless; {} if the CPU has it",
                parameter("ept=1")
            ),
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
            &format!(
                "without it every VMREAD and VMWRITE of L1 exits; {} if the CPU has it",
                parameter("enable_shadow_vmcs=1")
            ),
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
            match fixed {
                true => "kvm_intel is built in: the kernel log says why it does not work here",
                false => "modprobe kvm_intel; the kernel log says why if it fails",
            },
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
            match fixed {
                true => "boot with kvm_intel.nested=1",
                false => {
                    "modprobe -r kvm_intel && modprobe kvm_intel nested=1 (for good: options kvm_intel nested=1 in \
                     /etc/modprobe.d)"
                }
            },
        )),
        None if fixed => out.push(Check::new(
            "nested VMX",
            Bad,
            "kvm_intel is built in, and not at work",
            "the kernel log says why",
        )),
        None => out.push(Check::new("nested VMX", Bad, "kvm_intel is not loaded", "modprobe kvm_intel nested=1")),
    }

    if !built_in.is_empty() {
        out.push(Check::new(
            "KVM as modules",
            Bad,
            format!("built in: {}", built_in.join(", ")),
            "the module needs the BTF of kvm and kvm_intel, which only modules have: use a kernel with CONFIG_KVM=m \
             and CONFIG_KVM_INTEL=m",
        ));
    }

    // KVM says N where it does not use it, and kernels without Hyper-V's interfaces do not have it.
    if let Some(used) = host.parameter("kvm_intel", "enlightened_vmcs") {
        out.push(Check::new(
            "enlightened VMCS",
            flag(!used, Bad),
            if used {
                "KVM uses Hyper-V's"
            } else {
                "not used"
            },
            &format!(
                "the module cannot read such a VMCS and refuses to load: {}",
                parameter("enlightened_vmcs=0")
            ),
        ));
    }

    let missing: Vec<&str> = ["vmlinux", "kvm", "kvm_intel"]
        .into_iter()
        .filter(|m| !host.exists(&format!("/sys/kernel/btf/{m}")))
        .collect();
    out.push(Check::new(
        "BTF",
        flag(missing.is_empty(), Bad),
        if missing.is_empty() { "kernel, kvm and kvm_intel".into() } else { format!("none for {}", missing.join(", ")) },
        match built_in.is_empty() {
            true => {
                "the module checks its layouts against BTF: load kvm_intel, or use a kernel with CONFIG_DEBUG_INFO_BTF \
                 and CONFIG_DEBUG_INFO_BTF_MODULES"
            }
            false => {
                "the module checks its layouts against BTF: use a kernel with KVM as modules, CONFIG_DEBUG_INFO_BTF \
                 and CONFIG_DEBUG_INFO_BTF_MODULES"
            }
        },
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
        (
            "kprobes",
            "CONFIG_KPROBES",
            "register_kprobe",
            "the module finds KVM's functions with them: use a kernel built with it",
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
    let version = host.read("/sys/kernel/matryoshka/version");
    let modprobe = module::places(&host.release).find(|p| host.exists(p));
    let insmod = format!("{DIR}/matryoshka.ko");
    let rule = match (locked, signed) {
        (true, _) => "not allowed: locked down",
        (_, true) => "not allowed: signatures enforced",
        _ => "allowed",
    };
    let sign =
        "sign matryoshka.ko with a key this kernel trusts, or switch Secure Boot off on a lab host";
    out.push(match (locked || signed, &version, &modprobe) {
        // The one that is loaded was let in.
        (false, ..) | (_, Some(_), _) => Check::new("unsigned modules", Ok, rule, ""),
        // The one that is installed may be; only loading it tells.
        (_, None, Some(_)) => Check::new(
            "unsigned modules",
            Warn,
            rule,
            &format!("modprobe matryoshka; if it is refused: {sign}"),
        ),
        (_, None, None) => Check::new("unsigned modules", Bad, rule, sign),
    });

    out.push(match (version, modprobe) {
        (Some(v), _) => Check::new("module", Ok, format!("loaded, version {v}"), ""),
        (None, Some(f)) => Check::new(
            "module",
            Warn,
            format!("not loaded; {f}"),
            "modprobe matryoshka",
        ),
        // modprobe does not look there, and insmod takes no options of /etc/modprobe.d.
        (None, None) if host.exists(&insmod) => Check::new(
            "module",
            Warn,
            format!("not loaded; {insmod}"),
            &format!("insmod {insmod}; or make modules_install, then modprobe matryoshka"),
        ),
        (None, None) => Check::new(
            "module",
            Warn,
            "neither loaded nor installed",
            "make modules && sudo make modules_install, then modprobe matryoshka",
        ),
    });

    let guest = format!("{DIR}/guest");
    let kernel = KERNELS.iter().any(|k| host.exists(&format!("{guest}/{k}")));
    out.push(Check::new(
        "guest kernel",
        flag(kernel, Warn),
        if kernel { &guest } else { "none" },
        &format!("nest and bench start guests with it: {INSTALL}; or --guest DIR"),
    ));
    let missing: Vec<&str> = ["kvm", "kvm-intel"]
        .into_iter()
        .filter(|m| {
            let file = |end| host.exists(&format!("{guest}/{m}.{end}"));
            !["ko", "ko.xz", "ko.zst"].into_iter().any(file)
        })
        .collect();
    out.push(Check::new(
        "guest KVM",
        flag(missing.is_empty(), Warn),
        match missing.is_empty() {
            true => guest,
            false => format!("no {}", missing.join(", no ")),
        },
        &format!("depth 2 and more needs these modules: {INSTALL}; or --guest DIR"),
    ));
    let payload = host.exists(&format!("{DIR}/payload"));
    out.push(Check::new(
        "payload",
        flag(payload, Warn),
        if payload { DIR } else { "none" },
        &format!("nest and bench run it innermost: {INSTALL}; or --payload FILE"),
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

    const GOOD: [(&str, &str); 15] = [
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
            "CONFIG_RUST=y\nCONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS=y\nCONFIG_KPROBES=y\n",
        ),
        (
            "/sys/kernel/security/lockdown",
            "[none] integrity confidentiality\n",
        ),
        ("/sys/kernel/matryoshka/version", "0.1\n"),
        ("/lib/matryoshka/guest/vmlinux", ""),
        ("/lib/matryoshka/guest/kvm.ko", ""),
        ("/lib/matryoshka/guest/kvm-intel.ko.xz", ""),
        ("/lib/matryoshka/payload", ""),
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
        assert_eq!(t.verdict("kprobes"), Verdict::Bad);
    }

    #[test]
    fn a_module_that_is_loaded_was_let_in() {
        let (version, lockdown) = (
            "/sys/kernel/matryoshka/version",
            "/sys/kernel/security/lockdown",
        );
        let mut files = GOOD.to_vec();
        files.retain(|f| f.0 != lockdown);
        files.push((lockdown, "none [integrity] confidentiality\n"));
        let t = Tree::new("locked-loaded", &files);
        assert_eq!(t.verdict("unsigned modules"), Verdict::Ok);
        files.retain(|f| f.0 != version);
        let t = Tree::new("locked", &files);
        assert_eq!(t.verdict("unsigned modules"), Verdict::Bad);
        files.push(("/lib/modules/7.3/updates/dkms/matryoshka.ko", ""));
        let t = Tree::new("locked-installed", &files);
        assert_eq!(t.verdict("unsigned modules"), Verdict::Warn);
    }

    #[test]
    fn enlightened_vmcs_is_in_the_way() {
        let mut files = GOOD.to_vec();
        let file = "/sys/module/kvm_intel/parameters/enlightened_vmcs";
        files.push((file, "N\n"));
        let t = Tree::new("evmcs-n", &files);
        assert_eq!(t.verdict("enlightened VMCS"), Verdict::Ok);
        files.pop();
        files.push((file, "Y\n"));
        let t = Tree::new("evmcs-y", &files);
        assert_eq!(t.verdict("enlightened VMCS"), Verdict::Bad);
    }

    #[test]
    fn nobody_modprobes_what_is_built_in() {
        let builtin = "kernel/arch/x86/kvm/kvm.ko\nkernel/arch/x86/kvm/kvm-intel.ko\n";
        for (tag, file, text) in [
            ("builtin-list", "/lib/modules/7.3/modules.builtin", builtin),
            (
                "builtin-config",
                "/boot/config-7.3",
                "CONFIG_KVM=y\nCONFIG_KVM_INTEL=y\n",
            ),
        ] {
            let t = Tree::new(
                tag,
                &[(file, text), ("/proc/cpuinfo", "vmx flags : vpid\n")],
            );
            assert_eq!(t.verdict("KVM as modules"), Verdict::Bad);
            for c in check(&t.0).iter().filter(|c| c.name != "module") {
                assert!(
                    !c.todo.contains("modprobe") && !c.todo.contains("load kvm"),
                    "{c:?}"
                );
            }
        }
    }

    #[test]
    fn what_is_installed_is_loaded_with_its_options() {
        let todo = |t: &Tree| {
            let all = check(&t.0);
            let module = all.into_iter().find(|c| c.name == "module");
            module.unwrap().todo
        };
        let mut files = vec![("/lib/matryoshka/matryoshka.ko", "")];
        let t = Tree::new("insmod", &files);
        assert!(todo(&t).starts_with("insmod /lib/matryoshka/matryoshka.ko"));
        files.push(("/lib/modules/7.3/updates/dkms/matryoshka.ko.xz", ""));
        let t = Tree::new("modprobe", &files);
        assert_eq!(todo(&t), "modprobe matryoshka");
    }

    #[test]
    fn what_stacks_are_made_of_is_looked_for() {
        for (path, name) in [
            ("/lib/matryoshka/guest/vmlinux", "guest kernel"),
            ("/lib/matryoshka/guest/kvm-intel.ko.xz", "guest KVM"),
            ("/lib/matryoshka/payload", "payload"),
        ] {
            let mut files = GOOD.to_vec();
            files.retain(|f| f.0 != path);
            let t = Tree::new(&name.replace(' ', "-"), &files);
            assert_eq!(t.verdict(name), Verdict::Warn);
        }
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
