// SPDX-License-Identifier: GPL-2.0-or-later
//! What this host is, as far as a figure means nothing without it.

use std::fs;

/// The running kernel's release.
pub fn kernel() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    release.trim().to_owned()
}

/// The processor's own name.
pub fn cpu_model() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == "model name").then(|| value.trim().to_owned())
    });
    model.unwrap_or_else(|| "unknown".into())
}

/// Resident memory of this process, the VMM of L1 and of all that is inside it, in KiB.
pub fn resident_kib() -> Option<u64> {
    let pages = fs::read_to_string("/proc/self/statm").ok()?;
    let resident: u64 = pages.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(resident * (vmm::memory::PAGE as u64 / 1024))
}

/// The emulator, if there is one: only the laboratory's counts instructions.
pub fn emulator(counts_instructions: bool) -> &'static str {
    match counts_instructions {
        true => "bochs",
        false => "none",
    }
}
