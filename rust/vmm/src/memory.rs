// SPDX-License-Identifier: GPL-2.0-or-later
//! Guest memory: the main memory and the touch region.

use std::ptr::null_mut;

use kvm_bindings::{kvm_userspace_memory_region, KVM_MEM_LOG_DIRTY_PAGES};
use kvm_ioctls::VmFd;
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use crate::control::TOUCH_BASE;
use crate::missing::Missing;
use crate::{Error, Result};

/// Bytes in a 4 KiB page.
pub const PAGE: usize = 4096;
/// Bytes in a 2 MiB page: mappings are aligned to it, so that the host can back
/// guest memory with huge pages. A nested level then takes one EPT violation
/// where it would take 512.
const HUGE: usize = 2 << 20;
/// RAM below 4 GiB ends here; the APICs and the TSS live above.
const LOW_RAM_END: u64 = 0xc000_0000;
const HIGH_RAM_START: u64 = 1 << 32;

/// The most main memory in MiB: 16 TiB, more than any host lends and far from what an address holds.
pub const MOST_MIB: u64 = 16 << 20;
/// The least that the tool gives a Linux, in MiB: with less its kernel and what it unpacks have no room.
pub const LEAST_MIB: u64 = 64;

/// Pages of the memory slot that comes and goes where no guest looks, and where that is.
const SPARE_PAGES: usize = 64;
const SPARE_BASE: u64 = 0xb000_0000;

/// An anonymous mapping of this process, aligned to 2 MiB.
#[derive(Debug)]
struct Mapping {
    raw: *mut libc::c_void,
    raw_len: usize,
    start: *mut u8,
    len: usize,
}

// SAFETY: the mapping is plain memory owned by this value; nothing in it is tied
// to the thread that made it.
unsafe impl Send for Mapping {}
// SAFETY: as above, and the value offers no access to the memory through `&self`
// other than the madvise calls, which the kernel serialises.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(len: usize, advice: libc::c_int) -> Result<Self> {
        let raw_len = len + HUGE;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice
        // replaces nothing.
        let raw = unsafe {
            libc::mmap(
                null_mut(),
                raw_len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if raw == libc::MAP_FAILED {
            return Err(Error::Memory(format!(
                "cannot map {} MiB: {}",
                len >> 20,
                std::io::Error::last_os_error()
            )));
        }
        let start = (raw as usize).next_multiple_of(HUGE) as *mut u8;
        let m = Mapping {
            raw,
            raw_len,
            start,
            len,
        };
        // Only speed depends on whether the kernel takes this one.
        m.advise(len, advice);
        // As QEMU does: a host with KSM at work may merge guests' pages. A kernel without KSM says no.
        m.advise(len, libc::MADV_MERGEABLE);
        Ok(m)
    }

    /// Gives advice about the first `len` bytes.
    fn advise(&self, len: usize, advice: libc::c_int) -> bool {
        // SAFETY: the range lies in this mapping; of the advice used here only
        // MADV_DONTNEED changes contents, and those belong to the guest.
        unsafe { libc::madvise(self.start.cast(), len.min(self.len), advice) == 0 }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and every user of it (the VM's file
        // descriptors, the vm-memory regions) is dropped before, see `Memory`.
        unsafe { libc::munmap(self.raw, self.raw_len) };
    }
}

/// The memory of one guest.
#[derive(Debug)]
pub struct Memory {
    // Field order is drop order: views first, the mappings under them last.
    guest: GuestMemoryMmap,
    touch: Option<Mapping>,
    spare: Mapping,
    main: Vec<Mapping>,
}

impl Memory {
    /// Makes `mib` MiB of main memory (split around the hole below 4 GiB) and a
    /// touch region of `touch_pages` pages of 4 KiB at [`TOUCH_BASE`].
    ///
    /// # Errors
    /// [`Error::Usage`]: more than there can be. [`Error::Memory`]: there is not as much to be had.
    pub fn new(mib: u64, touch_pages: u32) -> Result<Self> {
        if !(1..=MOST_MIB).contains(&mib) {
            return Err(Error::Usage(format!(
                "guest memory: {mib} MiB; 1 to {MOST_MIB} are possible"
            )));
        }
        let size = mib << 20;
        let touch_len = touch_pages as usize * PAGE;
        if touch_len != 0 && (size > TOUCH_BASE || touch_len as u64 > LOW_RAM_END - TOUCH_BASE) {
            return Err(Error::Usage(
                "guest memory: a touch region needs main memory of at most 1 GiB below it and at most 2 GiB of its own"
                    .into(),
            ));
        }
        let mut main = Vec::new();
        let mut regions = Vec::new();
        let low = size.min(LOW_RAM_END);
        for (base, len) in [(0, low), (HIGH_RAM_START, size - low)] {
            if len != 0 {
                let m = Mapping::new(len as usize, libc::MADV_HUGEPAGE)?;
                regions.push(region(&m, base)?);
                main.push(m);
            }
        }
        let touch = match touch_len {
            0 => None,
            // Small pages: the region exists to be faulted in one by one.
            n => Some(Mapping::new(n, libc::MADV_NOHUGEPAGE)?),
        };
        let guest = GuestMemoryMmap::from_regions(regions)
            .map_err(|e| Error::Memory(format!("regions: {e}")))?;
        Ok(Memory {
            guest,
            touch,
            spare: Mapping::new(SPARE_PAGES * PAGE, libc::MADV_NOHUGEPAGE)?,
            main,
        })
    }

    /// Main memory, for loading things into it.
    pub fn guest(&self) -> &GuestMemoryMmap {
        &self.guest
    }

    /// The RAM ranges (start, length) of main memory in ascending order.
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        self.guest
            .iter()
            .map(|r| (r.start_addr().0, r.len()))
            .collect()
    }

    /// 4 KiB pages in the touch region.
    pub fn touch_pages(&self) -> u32 {
        self.touch.as_ref().map_or(0, |m| (m.len / PAGE) as u32)
    }

    /// Takes the backing of the touch region's first `pages` pages away (0: of all
    /// of them); `populate` backs them anew at once, so that only this machine's
    /// EPT lacks them. False when it cannot be done.
    pub fn discard_touch(&self, pages: u32, populate: bool) -> bool {
        let Some(m) = &self.touch else { return false };
        let len = match pages as usize * PAGE {
            0 => m.len,
            n => n.min(m.len),
        };
        m.advise(len, libc::MADV_DONTNEED)
            && (!populate || m.advise(len, libc::MADV_POPULATE_WRITE))
    }

    /// Lets the VM log which pages of the touch region are written, or not any more.
    pub(crate) fn log_touch(&self, vm: &VmFd, log: bool) -> bool {
        let Some(m) = &self.touch else { return false };
        let region = kvm_userspace_memory_region {
            slot: self.touch_slot(),
            flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: TOUCH_BASE,
            memory_size: m.len as u64,
            userspace_addr: m.start as u64,
        };
        // SAFETY: the slot as it is, but for its flags; see `register`.
        unsafe { vm.set_user_memory_region(region) }.is_ok()
    }

    /// Changes something about memory that the guest cannot notice; `turn` says what. False if that cannot be done.
    pub(crate) fn churn(&self, vm: &VmFd, turn: u64) -> bool {
        let slot = |base: u64, len: usize, flags| {
            let region = kvm_userspace_memory_region {
                slot: self.touch_slot() + 1,
                flags,
                guest_phys_addr: SPARE_BASE + base,
                memory_size: len as u64,
                userspace_addr: self.spare.start as u64,
            };
            // SAFETY: a slot of its own, whose mapping outlives the VM as that of all others.
            unsafe { vm.set_user_memory_region(region) }.is_ok()
        };
        match turn % 5 {
            0 => slot(0, self.spare.len, 0),
            1 => slot(self.spare.len as u64 * 2, self.spare.len, 0),
            2 => slot(
                self.spare.len as u64 * 2,
                self.spare.len,
                KVM_MEM_LOG_DIRTY_PAGES,
            ),
            3 => slot(0, 0, 0),
            // A copy on write of all memory: KVM is told to let go of each page.
            _ => crate::work::fork_once(),
        }
    }

    /// Whoever hands out the pages of the touch region from now on, if there is one.
    pub(crate) fn missing(&self) -> Result<Option<Missing>> {
        self.touch
            .as_ref()
            .map(|m| Missing::new(m.start as u64, m.len))
            .transpose()
    }

    /// Puts the touch region's memory slot to a guest-physical address, with these flags; `None` takes it away.
    pub(crate) fn slot_touch(&self, vm: &VmFd, to: Option<(u64, u32)>) -> bool {
        let Some(m) = &self.touch else { return false };
        let (guest_phys_addr, flags) = to.unwrap_or((TOUCH_BASE, 0));
        let region = kvm_userspace_memory_region {
            slot: self.touch_slot(),
            flags,
            guest_phys_addr,
            memory_size: if to.is_some() { m.len as u64 } else { 0 },
            userspace_addr: m.start as u64,
        };
        // SAFETY: the slot as `register` made it, elsewhere, with other flags, or without memory.
        unsafe { vm.set_user_memory_region(region) }.is_ok()
    }

    /// The log of the touch region since the last time: a bit for each page.
    pub(crate) fn touch_log(&self, vm: &VmFd) -> Option<Vec<u64>> {
        let m = self.touch.as_ref()?;
        vm.get_dirty_log(self.touch_slot(), m.len).ok()
    }

    /// A number for each of the first `pages` pages of the touch region (0: of all of them) that tells what is in it.
    pub(crate) fn touch_sums(&self, pages: u32) -> Vec<u64> {
        let Some(m) = &self.touch else {
            return Vec::new();
        };
        let all = m.len / PAGE;
        let count = if pages == 0 {
            all
        } else {
            all.min(pages as usize)
        };
        (0..count)
            .map(|page| {
                // SAFETY: within the mapping. Who else writes to it is the guest, whose vCPU waits for this.
                let words = unsafe {
                    std::slice::from_raw_parts(m.start.add(page * PAGE).cast::<u64>(), PAGE / 8)
                };
                words.iter().fold(0, |sum: u64, &word| {
                    (sum.rotate_left(7) ^ word).wrapping_mul(0x0000_0100_0000_01b3)
                })
            })
            .collect()
    }

    /// Start and length of every mapping, main memory first.
    pub(crate) fn regions(&self) -> Vec<(*mut u8, usize)> {
        self.main
            .iter()
            .chain(&self.touch)
            .map(|m| (m.start, m.len))
            .collect()
    }

    /// MiB of main memory.
    pub(crate) fn mib(&self) -> u64 {
        self.guest.iter().map(|r| r.len()).sum::<u64>() >> 20
    }

    /// Number of the touch region's memory slot: the one behind those of main memory.
    fn touch_slot(&self) -> u32 {
        self.guest.num_regions() as u32
    }

    /// Gives all of it to the VM as memory slots.
    pub(crate) fn register(&self, vm: &VmFd) -> Result<()> {
        let mut slots: Vec<(u64, u64, u64)> = self
            .guest
            .iter()
            .map(|r| (r.start_addr().0, r.len(), r.as_ptr() as u64))
            .collect();
        if let Some(m) = &self.touch {
            slots.push((TOUCH_BASE, m.len as u64, m.start as u64));
        }
        for (slot, (guest_phys_addr, memory_size, userspace_addr)) in slots.into_iter().enumerate()
        {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr,
                memory_size,
                userspace_addr,
            };
            // SAFETY: the range is a mapping of this process that outlives the VM:
            // `Machine` drops its VM before its `Memory`.
            unsafe { vm.set_user_memory_region(region) }
                .map_err(Error::kvm("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }
}

/// A vm-memory region over a mapping, at guest-physical `base`.
fn region(m: &Mapping, base: u64) -> Result<GuestRegionMmap> {
    // SAFETY: start and length lie within the mapping, which outlives the region
    // (see the field order of `Memory`).
    let r = unsafe {
        MmapRegion::build_raw(
            m.start,
            m.len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        )
    }
    .map_err(|e| Error::Memory(format!("region: {e}")))?;
    GuestRegionMmap::new(r, GuestAddress(base)).map_err(|e| Error::Memory(format!("region: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn main_memory_is_split_around_the_hole() {
        let m = Memory::new(4096, 0).unwrap();
        assert_eq!(
            m.ranges(),
            vec![(0, LOW_RAM_END), (HIGH_RAM_START, 1 << 30)]
        );
        assert_eq!(m.touch_pages(), 0);
        assert!(!m.discard_touch(0, false));
    }

    #[test]
    fn memory_reads_back() {
        let m = Memory::new(4, 0).unwrap();
        m.guest()
            .write_obj(0x1234_5678u32, GuestAddress(0x1000))
            .unwrap();
        assert_eq!(
            m.guest().read_obj::<u32>(GuestAddress(0x1000)).unwrap(),
            0x1234_5678
        );
    }

    #[test]
    fn touch_region_needs_room() {
        assert_eq!(Memory::new(64, 16).unwrap().touch_pages(), 16);
        assert!(Memory::new(2048, 16).is_err());
    }

    #[test]
    fn discarded_touch_region_reads_zero() {
        let m = Memory::new(4, 2).unwrap();
        let p = m.touch.as_ref().unwrap().start;
        // SAFETY: both pages belong to the touch mapping made above.
        unsafe { p.write(7) };
        assert!(m.discard_touch(0, true));
        // SAFETY: as above.
        assert_eq!(unsafe { p.read() }, 0);
    }
}
