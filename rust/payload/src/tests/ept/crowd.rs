// SPDX-License-Identifier: GPL-2.0-or-later
//! Up to four processors whose children touch the same pages through the same tables at once: mapped beforehand, or by
//! whichever parent is told first; all in the same order, from different ends, or each a part. Each must find what is there.
//! How many instructions it takes, all processors together, is told if they share one of the host's.

use core::cell::UnsafeCell;

use protocol::ports::touch;

use super::super::log;
use super::super::model::fold;
use super::tables::{frame, plain, Tables};
use super::toucher::{Access, Toucher, VIOLATION};
use super::world::World;
use crate::memory::PAGE;
use crate::second::{self, MOST};
use crate::vmx::ept::LowMemory;
use crate::vmx::ops::{vmclear, vmptrld, VmxError};
use crate::{control, cpu, line};

const GROUP: &str = "ept_crowd";
const PAGES: u64 = 1024;

/// The group.
pub fn run(level: u32) -> Result<(), VmxError> {
    super::group(GROUP, || {
        if !second::available() {
            log!("{}/no second processor", GROUP);
            return Ok(());
        }
        let pages = if level > 1 { 128 } else { PAGES };
        for demand in [false, true] {
            for order in [Order::Same, Order::Parts, Order::Ends] {
                Crowd::new(pages, demand, order)?.run()?;
            }
        }
        control::touch(touch::DISCARD, 0);
        Ok(())
    })
}

#[derive(Clone, Copy)]
enum Order {
    Same,
    Parts,
    Ends,
}

impl Order {
    fn name(self) -> &'static str {
        match self {
            Order::Same => "the same order",
            Order::Parts => "parts",
            Order::Ends => "both ends",
        }
    }

    /// The page that processor `cpu` of `cpus` touches as number `at`.
    fn page(self, at: u64, pages: u64, cpu: u64, cpus: u64) -> u64 {
        match self {
            Order::Same => at,
            Order::Parts => (at + cpu * (pages / cpus)) % pages,
            Order::Ends if cpu % 2 == 1 => pages - 1 - at,
            Order::Ends => at,
        }
    }
}

/// What one processor has, and what became of it.
struct Member {
    toucher: Toucher,
    violations: u64,
    wrong: u64,
}

struct Crowd {
    tables: UnsafeCell<Tables>,
    members: [UnsafeCell<Option<Member>>; MOST],
    pages: u64,
    demand: bool,
    order: Order,
}

impl Crowd {
    fn new(pages: u64, demand: bool, order: Order) -> Result<Crowd, VmxError> {
        let mut tables = Tables::new(LowMemory::new(), pages, true);
        // Fills the frames.
        World::new(GROUP, pages);
        for page in 0..pages {
            tables.set(1, page, if demand { 0 } else { plain(frame(page)) });
        }
        tables.invalidate(true)?;
        let cpus = second::count() as u64;
        let crowd = Crowd {
            members: core::array::from_fn(|cpu| {
                let mut toucher = Toucher::new(GROUP, pages as usize);
                for at in 0..pages {
                    toucher.push(Access::Read, order.page(at, pages, cpu as u64, cpus), 0);
                }
                UnsafeCell::new(Some(Member {
                    toucher,
                    violations: 0,
                    wrong: 0,
                }))
            }),
            tables: UnsafeCell::new(tables),
            pages,
            demand,
            order,
        };
        for cpu in 0..second::count() {
            crowd.on(cpu, &|member, tables| {
                // What fails here shows in the first entry.
                member.wrong += member.toucher.prepare(tables).is_err() as u64;
            });
        }
        Ok(crowd)
    }

    /// Does something with one processor's part on that processor, while no other works.
    fn on(&self, cpu: usize, what: &dyn Fn(&mut Member, &mut Tables)) {
        let work = |number: usize| {
            // SAFETY: nobody else works, and nothing else of ours borrows these.
            let (member, tables) =
                unsafe { (&mut *self.members[number].get(), &mut *self.tables.get()) };
            if let Some(member) = member {
                what(member, tables);
            }
        };
        match cpu {
            0 => work(0),
            _ => second::one(cpu, &work),
        }
    }

    fn run(self) -> Result<(), VmxError> {
        let start = cpu::rdtsc();
        let (demand, tables) = (self.demand, self.tables.get());
        let work = |number: usize| {
            // SAFETY: each processor has its own member; tables are written below by single words alone, and
            // two that write the same word write the same.
            let (member, tables) = unsafe { (&mut *self.members[number].get(), &*tables) };
            let Some(member) = member else { return };
            let (violations, wrong) = (&mut member.violations, &mut member.wrong);
            // SAFETY: prepared on this processor, where it is current.
            let good = unsafe {
                member.toucher.run_beside(|reason, address| {
                    let page = address.wrapping_sub(super::tables::WINDOW) / PAGE;
                    if reason != VIOLATION || !demand || page >= self.pages {
                        return false;
                    }
                    *violations += 1;
                    tables.map_now(page, plain(frame(page)));
                    true
                })
            };
            *wrong += !good as u64;
        };
        // SAFETY: as said in it.
        unsafe { second::all(&work) };
        let ticks = cpu::rdtsc() - start;
        super::reachable(GROUP, self.order.name());
        let (mut sum, mut wrong, mut violations) = (0, 0, 0);
        for cpu in 0..second::count() {
            // SAFETY: all have done their work.
            let Some(member) = (unsafe { &*self.members[cpu].get() }) else {
                continue;
            };
            wrong += member.wrong;
            violations += member.violations;
            for step in member.toucher.steps() {
                let must = super::world::tagged(step.page());
                wrong += (step.done == 0 || step.value != must) as u64;
                sum = fold(sum, step.value);
            }
        }
        for cpu in 0..second::count() {
            self.on(cpu, &|member, _| {
                let _ = vmclear(member.toucher.bed.child.vmcs);
            });
        }
        let mapped = if self.demand { "on demand" } else { "mapped" };
        log!(
            "{}/{} {}, {} processors: sum {:#x}, wrong {}{}",
            GROUP,
            mapped,
            self.order.name(),
            second::count(),
            sum,
            wrong,
            if wrong == 0 { "" } else { ": FAIL" }
        );
        line!(
            "note {}/{} {}: {} instructions a page, {} violations",
            GROUP,
            mapped,
            self.order.name(),
            ticks / self.pages / second::count() as u64,
            violations
        );
        // As before: a current VMCS.
        vmptrld(crate::vmx::new_region()).or(Ok(()))
    }
}
