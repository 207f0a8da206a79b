// SPDX-License-Identifier: GPL-2.0
//! `/sys/kernel/debug/matryoshka/`: exit accounting.
//!
//! `exits_enable` takes 0 or 1; `exits` has a line for each basic exit reason that occurred:
//! reason, exits from L1, exits from L2 and deeper. `learned` has a line for each vCPU and path that learns VMCS
//! fields: thread, path, fields. Reading `ept02` walks EPT02 of every VM and says what is wrong with it. `alloc_fault` takes a number N
//! and has the Nth allocation for a vCPU from then on fail, once; it shows how many allocations there were and how many were made to
//! fail, for the module and for vCPUs.

use crate::{alloc, control, path, policy, state};
use kernel::{
    c_str,
    debugfs::{Dir, File},
    fmt,
    prelude::*,
    uaccess::UserSliceReader,
};

/// The files; dropping them removes them.
#[pin_data]
pub(crate) struct Files {
    #[pin]
    exits: File<()>,
    #[pin]
    enable: File<()>,
    #[pin]
    learned: File<()>,
    #[pin]
    ept02: File<()>,
    #[pin]
    alloc_fault: File<()>,
    _dir: Dir,
}

fn show_exits(_: &(), f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let Ok(total) = path::total_exits() else {
        return Err(fmt::Error);
    };
    for (reason, l1, l2) in total.rows() {
        writeln!(f, "{reason} {l1} {l2}")?;
    }
    Ok(())
}

fn show_learned(_: &(), f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let mut result = Ok(());
    // No vCPU's state goes meanwhile.
    state::for_each_counters(|set| {
        let thread = set.fields.thread();
        for (name, learned) in [
            ("fields", set.fields.learned.get()),
            ("l2fields", set.l2fields.learned.get()),
        ] {
            if result.is_ok() && !learned.is_empty() {
                result = write!(f, "{thread} {name} ")
                    .and_then(|()| path::learned::write_names(&learned, f));
            }
        }
    });
    result
}

fn show_ept02(_: &(), f: &mut fmt::Formatter<'_>) -> fmt::Result {
    path::prefault::walk::show(f)
}

fn show_enable(_: &(), f: &mut fmt::Formatter<'_>) -> fmt::Result {
    writeln!(f, "{}", u8::from(control::accounting()))
}

fn store_enable(_: &(), reader: &mut UserSliceReader) -> Result {
    let mut text = [0u8; 8];
    let text = text.get_mut(..reader.len()).ok_or(EINVAL)?;
    reader.read_slice(text)?;
    match text.trim_ascii_end() {
        b"0" => control::set_accounting(false),
        b"1" => control::set_accounting(true),
        _ => Err(EINVAL),
    }
}

fn show_alloc_fault(_: &(), f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let counts = [&alloc::MODULE, &alloc::VCPU].map(alloc::Purpose::counts);
    let [(module, module_failed), (vcpu, vcpu_failed)] = counts;
    writeln!(f, "module {module} {module_failed}")?;
    writeln!(f, "vcpu {vcpu} {vcpu_failed}")
}

fn store_alloc_fault(_: &(), reader: &mut UserSliceReader) -> Result {
    let mut text = [0u8; 8];
    let text = text.get_mut(..reader.len()).ok_or(EINVAL)?;
    reader.read_slice(text)?;
    let number = policy::knob::number(text).ok_or(EINVAL)?;
    alloc::VCPU.arm(u32::from(number));
    Ok(())
}

impl Files {
    /// Makes the files. Without debugfs there are none, which is no error.
    pub(crate) fn new() -> impl PinInit<Self, Error> {
        let dir = Dir::new(c_str!("matryoshka"));
        try_pin_init!(Self {
            exits <- dir.read_callback_file(c_str!("exits"), (), &show_exits),
            enable <- dir.read_write_callback_file(c_str!("exits_enable"), (), &show_enable, &store_enable),
            learned <- dir.read_callback_file(c_str!("learned"), (), &show_learned),
            ept02 <- dir.read_callback_file(c_str!("ept02"), (), &show_ept02),
            alloc_fault <- dir.read_write_callback_file(
                c_str!("alloc_fault"), (), &show_alloc_fault, &store_alloc_fault,
            ),
            _dir: dir,
        })
    }
}
