// SPDX-License-Identifier: GPL-2.0-or-later
//! The innermost guest of a nested stack: a small hypervisor with one guest of its own.
//!
//! It runs on no operating system, so that nothing but what it does itself shows up in its counts. It
//! asks its VMM what to do, measures or tests, and prints result lines; `protocol` says how.
#![no_std]
#![no_main]
// Shifts bind tighter than & and these tighter than |, as in C; the bit fields here are read that way.
#![allow(clippy::precedence)]

mod console;
mod control;
mod cpu;
mod measure;
mod memory;
mod paging;
mod runtime;
mod second;
mod start;
mod tests;
mod trap;
mod vmx;

use protocol::{backdoor, Command, PayloadInfo};

use control::Exit;

/// Called by the start-up code on the boot stack.
#[no_mangle]
extern "C" fn payload_main(info: *const PayloadInfo) -> ! {
    trap::init();
    paging::init();
    cpu::enable_xsave();
    // SAFETY: the VMM promises a PayloadInfo in the identity-mapped first MiB, which nothing here writes.
    let info = unsafe { &*info };
    if info.magic != PayloadInfo::MAGIC || info.version != PayloadInfo::VERSION {
        error!(
            "the VMM speaks another protocol (magic {:#x}, version {})",
            info.magic, info.version
        );
        control::done(Exit::Protocol);
    }
    // SAFETY: `memory` is what the VMM says is there, and nothing has been allocated yet.
    unsafe { memory::init(info.memory) };
    let backdoor = cpu::xgetbv(backdoor::PRESENT) == Ok(backdoor::PRESENT_MAGIC);
    line!(
        "hello level={} exits={}",
        info.level,
        if backdoor { "yes" } else { "no" }
    );
    if let Err(why) = vmx::init() {
        error!("{why}");
        control::done(Exit::NoVmx);
    }
    if let Some(cpus) = info.arg("cpus").and_then(|cpus| cpus.parse().ok()) {
        second::start(cpus);
    }
    let mut meter = measure::Meter::new(info, backdoor);
    let mut failed = false;
    loop {
        match control::next_command() {
            Ok(Command::End) => break,
            Ok(Command::Run { config, round }) => {
                failed |= !meter.run(info.arg("ops").unwrap_or(""), config, round);
            }
            Ok(Command::Profile { .. }) => {
                failed |= !meter.profile(info.arg("profile").unwrap_or("hypercall"));
            }
            Ok(Command::Test { round, .. }) => tests::run(
                info.arg("tests").unwrap_or("all"),
                info.level,
                info.arg("fuzz").and_then(tests::fuzz::Request::parse),
                round.into(),
            ),
            Err(word) => {
                error!("no such command: {word:#x}");
                control::done(Exit::Protocol);
            }
        }
    }
    control::done(if failed { Exit::Failed } else { Exit::Success })
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    error!("panic: {}", info);
    control::done(Exit::Fault)
}
