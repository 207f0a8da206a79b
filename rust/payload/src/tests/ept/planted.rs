// SPDX-License-Identifier: GPL-2.0-or-later
//! The walk of EPT02 can find something: the VMM takes rights out of EPT12 behind KVM's back, so that the shadow has
//! more than it should. What is found is logged; without a module it is nothing.

use protocol::ports::touch;

use super::super::log;
use super::tables::{frame, plain, Tables};
use super::toucher::{Access, Then, Toucher};
use crate::control;
use crate::memory::PAGE;
use crate::vmx::ept::LowMemory;
use crate::vmx::ops::VmxError;

const GROUP: &str = "ept_planted";
const PAGES: u64 = 64;

/// The group.
pub fn run() -> Result<(), VmxError> {
    let mut tables = Tables::new(LowMemory::new(), PAGES, true);
    let mut toucher = Toucher::new(GROUP, PAGES as usize);
    for page in 0..PAGES {
        tables.set(1, page, plain(frame(page)));
    }
    toucher.prepare(&tables)?;
    tables.invalidate(true)?;
    for page in 0..PAGES {
        toucher.push(Access::Write, page, page);
    }
    toucher.run("touched", |_, _, _| Ok(Then::Retry))?;
    say("before");
    for level in [3, 2, 1] {
        // The table that has the entry for page 0 at that level first.
        let table = match level {
            1 => tables.table(0),
            _ => tables.next(level + 1, 0),
        };
        control::touch(touch::PLANT, (table / PAGE) as u32);
        log!("{}/planted at level {}", GROUP, level);
        say("planted");
        control::touch(touch::PLANT, 0);
        say("given back");
    }
    Ok(())
}

fn say(when: &str) {
    let (wrong, seen) = control::walk();
    log!(
        "{}/{}: {} wrong, {}",
        GROUP,
        when,
        wrong,
        if seen > 0 { "walked" } else { "not walked" }
    );
}
