// SPDX-License-Identifier: GPL-2.0
//! Matryoshka: nested virtualization on stock KVM, made cheap at every depth.
//!
//! Where to look: `include/hooks.h` is the table of hook points, [`hook`] attaches them, [`path`]
//! has the accelerations, [`control`] decides what is attached when, [`policy`] has the pure
//! decisions. `Documentation/design.md` tells why.

mod alloc;
mod bindings;
mod control;
mod debugfs;
mod hook;
mod kfile;
mod kvm;
mod layout;
mod livepatch;
mod path;
#[allow(
    dead_code,
    unreachable_pub,
    reason = "written as the public interface of the crate that the host's tests build of it"
)]
mod policy;
mod state;
mod sysfs;
mod tracepoint;

use kernel::prelude::*;

/// Version of the module, as the kernel's log and sysfs show it. dkms.conf has it, too.
pub(crate) const VERSION: &str = "0.1.0";

module! {
    type: Matryoshka,
    name: "matryoshka",
    authors: ["The Matryoshka maintainers"],
    description: "Speeds up nested virtualization in stock KVM",
    license: "GPL",
    params: {
        paths: u8 {
            default: 0,
            description: "Mode of all paths at load: 0 off, 1 on, 2 check",
        },
        alloc_fault: u8 {
            default: 0,
            description: "Test knob: the allocation of this number, of those that loading makes, fails",
        },
        layout_fault: u8 {
            default: 0,
            description: "Test knob: expect the structure of this number to be 8 bytes larger than it is",
        },
    },
}

/// The loaded module. Fields are dropped in this order: first nobody can ask for anything any more,
/// then the hooks go.
struct Matryoshka {
    _debugfs: Pin<KBox<debugfs::Files>>,
    _sysfs: sysfs::Tree,
    _notifier: control::Notifier,
    _running: Running,
    _tracepoints: tracepoint::Notifier,
}

/// Takes everything off when it is dropped, also when loading fails half-way.
struct Running;

impl Drop for Running {
    fn drop(&mut self) {
        control::shut_down();
    }
}

/// A parameter's value, which is a reference in some kernels and plain in others.
fn number(value: impl core::borrow::Borrow<u8>) -> u8 {
    *value.borrow()
}

impl kernel::Module for Matryoshka {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        // SAFETY: The kernel runs this once for each load, and statics are new with each load.
        unsafe {
            state::init();
            control::init();
            path::fields::init();
            path::nested_switch::init();
        }
        let mode = policy::mode::Mode::from_number(number(module_parameters::paths.value()))
            .ok_or_else(|| {
                pr_err!("parameter paths must be 0 (off), 1 (on) or 2 (check)\n");
                EINVAL
            })?;
        alloc::MODULE.arm(u32::from(number(module_parameters::alloc_fault.value())));
        // First, and gone last: handlers look at what it finds.
        let tracepoints = tracepoint::Notifier::register()?;
        let running = Running;
        // Before kvm_intel is looked at, so that its leaving meanwhile is heard of.
        let notifier = control::Notifier::register()?;
        if layout::kvm_intel_is_loaded() {
            control::kvm_intel_came(usize::from(number(module_parameters::layout_fault.value())))?;
        } else {
            pr_info!("kvm_intel is not loaded; waiting for it\n");
        }
        let sysfs = sysfs::Tree::new()?;
        alloc::MODULE.gate()?;
        let debugfs = KBox::pin_init(debugfs::Files::new(), GFP_KERNEL)?;
        for (number, path) in path::PATHS.iter().enumerate() {
            // A path that cannot work here says so in the log and in its state.
            let _ = control::set_mode(number, mode);
            pr_debug!("path {}: {}\n", path.name, path.about);
        }
        pr_info!("{} loaded\n", VERSION);
        Ok(Self {
            _debugfs: debugfs,
            _sysfs: sysfs,
            _notifier: notifier,
            _running: running,
            _tracepoints: tracepoints,
        })
    }
}
