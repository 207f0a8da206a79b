// SPDX-License-Identifier: GPL-2.0-or-later
//! Two roots: two VMCSs by turns, one VMCS whose EPT pointer is rewritten, and a last-level table that both
//! share. What was filled for one must not be found through the other.

use super::super::model::Numbers;
use super::around::{any, entry};
use super::tables::{Tables, ACCESSED};
use super::toucher::Toucher;
use super::world::World;
use crate::vmx::ept::{LowMemory, RWX};
use crate::vmx::field::EPT_POINTER;
use crate::vmx::ops::{vmclear, vmptrld, vmwrite, VmxError};

const GROUP: &str = "ept_roots";
const PAGES: u64 = 512;
const BATCH: usize = 24;

/// The group.
pub fn run(level: u32) -> Result<(), VmxError> {
    super::group(GROUP, || {
        let turns = if level > 1 { 12 } else { 48 };
        for flags in [[true, true], [true, false], [false, false]] {
            if level == 1 || flags[0] != flags[1] {
                Roots::new(flags)?.run(turns)?;
            }
        }
        Ok(())
    })
}

struct Roots {
    tables: [Tables; 2],
    touchers: [Toucher; 2],
    world: World,
    numbers: Numbers,
}

impl Roots {
    fn new(flags: [bool; 2]) -> Result<Roots, VmxError> {
        let low = LowMemory::new();
        let mut roots = Roots {
            tables: flags.map(|flags| Tables::new(low, PAGES, flags)),
            touchers: [Toucher::new(GROUP, BATCH), Toucher::new(GROUP, BATCH)],
            world: World::new(GROUP, PAGES),
            numbers: Numbers::new(37 + flags[0] as u64 * 2 + flags[1] as u64),
        };
        for which in 0..2 {
            for page in 0..PAGES {
                let new = entry(&mut roots.numbers, PAGES);
                roots.tables[which].set(1, page, new);
            }
            roots.touchers[which].prepare(&roots.tables[which])?;
        }
        roots.tables[0].invalidate(true)?;
        Ok(roots)
    }

    fn run(&mut self, turns: u32) -> Result<(), VmxError> {
        // Two VMCSs, each with its own root.
        for turn in 0..turns {
            let which = self.numbers.below(2);
            let centre = self.numbers.below(PAGES as usize) as u64;
            self.accesses("two VMCSs", which, which, centre)?;
            if turn % 3 == 0 {
                self.accesses("two VMCSs, the same pages", which ^ 1, which ^ 1, centre)?;
            }
            self.edit(centre)?;
        }
        self.inspect("two VMCSs");
        // One VMCS, whose pointer changes without any invalidation.
        for _ in 0..turns {
            let root = self.numbers.below(2);
            let centre = self.numbers.below(PAGES as usize) as u64;
            self.current(0)?;
            vmwrite(EPT_POINTER, self.tables[root].pointer())?;
            self.accesses("one VMCS", 0, root, centre)?;
            if self.numbers.below(3) == 0 {
                self.edit(centre)?;
            }
        }
        self.inspect("one VMCS");
        // Both VMCSs with the same root.
        for which in 0..2 {
            self.current(which)?;
            vmwrite(EPT_POINTER, self.tables[1].pointer())?;
        }
        for turn in 0..turns / 2 {
            let centre = self.numbers.below(PAGES as usize) as u64;
            self.accesses("one root", turn as usize % 2, 1, centre)?;
            self.accesses("one root", turn as usize % 2 ^ 1, 1, centre)?;
            self.edit(centre)?;
        }
        self.inspect("one root");
        if self.tables[0].flags() == self.tables[1].flags() {
            self.shared(turns / 2)?;
        }
        for toucher in &self.touchers {
            vmclear(toucher.bed.child.vmcs)?;
        }
        self.tables[0].invalidate(true)?;
        self.world
            .report(match self.tables.each_ref().map(Tables::flags) {
                [true, true] => "both with flags",
                [false, false] => "both without flags",
                _ => "one with flags",
            });
        Ok(())
    }

    /// The second root's directory names the first one's table: what one changes holds for both.
    fn shared(&mut self, turns: u32) -> Result<(), VmxError> {
        let table = self.tables[0].table(0);
        self.tables[1].set(2, 0, table | RWX | ACCESSED);
        for which in 0..2 {
            self.current(which)?;
            vmwrite(EPT_POINTER, self.tables[which].pointer())?;
        }
        self.tables[0].invalidate(true)?;
        for turn in 0..turns {
            let which = turn as usize % 2;
            let centre = self.numbers.below(PAGES as usize) as u64;
            // The first root's tables say what either finds.
            self.accesses("a shared table", which, 0, centre)?;
            self.accesses("a shared table", which ^ 1, 0, centre)?;
            self.world.inspect("a shared table", Some(&self.tables[0]));
            self.edit(centre)?;
            // Single-context invalidation is of one root, and the table is under two.
            self.tables[0].invalidate(false)?;
            self.tables[1].invalidate(false)?;
        }
        self.tables[1].connect();
        Ok(())
    }

    fn current(&mut self, which: usize) -> Result<(), VmxError> {
        vmptrld(self.touchers[which].bed.child.vmcs)
    }

    /// Accesses by child `which` through a root around a page.
    fn accesses(
        &mut self,
        name: &str,
        which: usize,
        root: usize,
        centre: u64,
    ) -> Result<(), VmxError> {
        self.current(which)?;
        let (toucher, tables) = (&mut self.touchers[which], &mut self.tables[root]);
        while !toucher.full() {
            let page = (centre + self.numbers.below(20) as u64) % PAGES;
            let access = any(&mut self.numbers);
            self.world
                .push(toucher, tables, access, page, &mut self.numbers);
        }
        self.world.batch(name, toucher, tables)
    }

    /// Changes entries of one root and invalidates that root, or all.
    fn edit(&mut self, centre: u64) -> Result<(), VmxError> {
        let root = self.numbers.below(2);
        for _ in 0..6 {
            let page = (centre + self.numbers.below(20) as u64) % PAGES;
            let new = entry(&mut self.numbers, PAGES);
            self.tables[root].set(1, page, new);
        }
        let all = self.numbers.below(2) == 0;
        self.tables[root].invalidate(all)
    }

    fn inspect(&mut self, name: &str) {
        for tables in &self.tables {
            self.world.inspect(name, Some(tables));
        }
    }
}
