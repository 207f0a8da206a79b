// SPDX-License-Identifier: GPL-2.0-or-later
//! Correctness tests: what a guest hypervisor sees of VMX, as a log without anything that varies.
//!
//! Most lines say what happened, not whether it was right: the log of stock KVM is the reference, and the
//! log with the module must be the same to the byte. Only what holds on any processor is judged here,
//! and says FAIL when it does not hold.
//!
//! A group is a function in a module of its own; add it to [`GROUPS`].

mod apic;
mod bed;
mod controls;
mod copies;
mod ept;
mod events;
mod exits;
mod fields;
pub mod fuzz;
mod guest_state;
mod host_state;
mod instructions;
mod interrupts;
mod launches;
mod links;
mod model;
mod operands;
mod pages;
mod pair;
mod pdptes;
mod pending;
mod script;
mod shadowing;
mod touch;
mod turns;

use crate::vmx::ops::{vmclear, vmptrld, vmxoff, vmxon, VmxError};
use crate::{error, line, memory};

/// A named group of tests.
struct Group {
    name: &'static str,
    /// Is told the level at which the payload runs: an exit costs sixteen times as much at the next.
    run: fn(u32) -> Result<(), VmxError>,
}

/// Groups that are run by their names alone: what they log depends on the configuration.
const APART: [&str; 1] = ["ept_planted"];

const GROUPS: &[Group] = &[
    Group {
        name: "instructions",
        run: |_| instructions::run(),
    },
    Group {
        name: "operands",
        run: operands::run,
    },
    Group {
        name: "fields",
        run: |_| fields::run(),
    },
    Group {
        name: "controls",
        run: |_| controls::run(),
    },
    Group {
        name: "host_state",
        run: |_| host_state::run(),
    },
    Group {
        name: "guest_state",
        run: |_| guest_state::run(),
    },
    Group {
        name: "exits",
        run: |_| exits::run(),
    },
    Group {
        name: "events",
        run: |_| events::run(),
    },
    Group {
        name: "interrupts",
        run: interrupts::run,
    },
    Group {
        name: "pending",
        run: pending::run,
    },
    Group {
        name: "memory",
        run: |_| touch::run(),
    },
    Group {
        name: "turns",
        run: turns::run,
    },
    Group {
        name: "launches",
        run: launches::run,
    },
    Group {
        name: "pdptes",
        run: |_| pdptes::run(),
    },
    Group {
        name: "shadowing",
        run: shadowing::run,
    },
    Group {
        name: "links",
        run: links::run,
    },
    Group {
        name: "copies",
        run: copies::run,
    },
    Group {
        name: "pages",
        run: pages::run,
    },
    Group {
        name: "ept_rights",
        run: ept::rights::run,
    },
    Group {
        name: "ept_flags",
        run: ept::flags::run,
    },
    Group {
        name: "ept_around",
        run: ept::around::run,
    },
    Group {
        name: "ept_edits",
        run: ept::edits::run,
    },
    Group {
        name: "ept_behind",
        run: ept::behind::run,
    },
    Group {
        name: "ept_roots",
        run: ept::roots::run,
    },
    Group {
        name: "ept_resume",
        run: ept::resume::run,
    },
    Group {
        name: "ept_walks",
        run: ept::walks::run,
    },
    Group {
        name: "ept_pages",
        run: ept::pages::run,
    },
    Group {
        name: "ept_beside",
        run: ept::beside::run,
    },
    Group {
        name: "ept_logging",
        run: ept::logging::run,
    },
    Group {
        name: "ept_slots",
        run: ept::slots::run,
    },
    Group {
        name: "ept_crowd",
        run: ept::crowd::run,
    },
    Group {
        name: "ept_planted",
        run: |_| ept::planted::run(),
    },
    Group {
        name: "pair",
        run: pair::run,
    },
];

/// One line of the log.
macro_rules! log {
    ($format:literal $($arguments:tt)*) => {
        $crate::line!("test {}", format_args!($format $($arguments)*))
    };
}
use log;

/// Runs the groups named in `which`, separated by commas; `all` names them all but `fuzz`, of which it runs batch number
/// `batch`.
pub fn run(which: &str, level: u32, fuzz: Option<fuzz::Request>, batch: u64) {
    for name in which.split(',') {
        if !["all", "fuzz"].contains(&name) && !GROUPS.iter().any(|group| group.name == name) {
            error!("no such group of tests: {name}");
        }
    }
    // Every run begins in the same state: the same pages, and no current VMCS.
    let mark = memory::mark();
    // KVM 7.3 keeps a note that guest state has yet to be fetched through VMXOFF, and may spoil the first
    // VMCS after VMXON with it (vmx->nested.need_sync_vmcs02_to_vmcs12_rare). Loading another VMCS
    // before VMXOFF, as any hypervisor that clears its VMCSs does, settles that.
    let scratch = crate::vmx::new_region();
    for group in GROUPS {
        let _ = vmclear(scratch).and_then(|()| vmptrld(scratch));
        if let Err(why) = vmxoff().and_then(|()| vmxon(crate::vmx::vmxon_region())) {
            log!("{}: FAIL: VMX cannot be restarted: {}", group.name, why);
        }
        if which
            .split(',')
            .any(|name| name == group.name || name == "all" && !APART.contains(&group.name))
        {
            if let Err(why) = (group.run)(level) {
                // The group could not go on; that it could not is part of the log.
                log!("{}: FAIL: ended early: {}", group.name, why);
            }
        }
    }
    if which.split(',').any(|name| name == "fuzz") {
        let Some(request) = fuzz else {
            error!("the group fuzz wants fuzz=SEED:FIRST:COUNT");
            return;
        };
        if let Err(why) = fuzz::run(request, batch) {
            log!("fuzz: FAIL: ended early: {}", why);
        }
    }
    let _ = vmclear(scratch).and_then(|()| vmptrld(scratch));
    let _ = vmxoff().and_then(|()| vmxon(crate::vmx::vmxon_region()));
    // SAFETY: leaving VMX operation has ended the use of every VMCS and EPT table made since.
    unsafe { memory::release(mark) };
    line!("tests done");
}
