// SPDX-License-Identifier: GPL-2.0-or-later
//! Nested EPT: what a child can reach through tables that its parent builds and edits, what the processor
//! notes in them, and what an exit says. Whoever fills the shadow of these tables ahead of faults must
//! leave all of this as it is.

pub mod around;
pub mod behind;
pub mod beside;
pub mod crowd;
pub mod edits;
pub mod flags;
pub mod logging;
pub mod pages;
pub mod planted;
pub mod resume;
pub mod rights;
pub mod roots;
pub mod slots;
mod tables;
pub mod toucher;
pub mod walks;
mod world;

use crate::vmx::ops::VmxError;
use tables::{capabilities, CAP_EPT};

/// Can this processor do what these groups are about?
fn available() -> bool {
    capabilities() & CAP_EPT == CAP_EPT
}

/// Runs a group where there is EPT with INVEPT in both ways.
fn group(name: &str, run: impl FnOnce() -> Result<(), VmxError>) -> Result<(), VmxError> {
    if !available() {
        super::log!("{}/not available", name);
        return Ok(());
    }
    let result = run();
    reachable(name, "in the end");
    result
}

/// Does the shadow of the tables let a child reach nothing that they do not? Where no module can tell, nothing is said.
fn reachable(name: &str, when: &str) {
    let (wrong, seen) = crate::control::walk();
    if wrong != 0 {
        super::log!(
            "{}/{}: FAIL: {} of {} entries of EPT02",
            name,
            when,
            wrong,
            seen
        );
    }
}
