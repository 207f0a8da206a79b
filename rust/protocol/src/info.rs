// SPDX-License-Identifier: GPL-2.0-or-later
//! What the payload is handed at its entry point.

use crate::ports;

/// The payload is entered in 64-bit mode, interrupts off, the first 4 GiB identity-mapped, with RDI
/// holding the physical address of one of these. It must lie below 1 MiB, as must everything else
/// the VMM leaves in the payload's memory: the payload is linked at 1 MiB.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct PayloadInfo {
    /// [`PayloadInfo::MAGIC`].
    pub magic: u64,
    /// [`PayloadInfo::VERSION`].
    pub version: u32,
    /// The level at which the payload itself executes: 1 directly under L0.
    pub level: u32,
    /// Bytes of memory from address 0.
    pub memory: u64,
    /// Guest-physical address of the touch region, 0 if there is none.
    pub touch_base: u64,
    /// 4 KiB pages in it.
    pub touch_pages: u32,
    /// Bytes used in `args`.
    pub args_len: u32,
    /// What to measure and to test, as words `key=value` separated by blanks or, where a kernel's
    /// command line is in between, by semicolons; see
    /// [`op::parse_list`](crate::op::parse_list) for `ops=`.
    pub args: [u8; PayloadInfo::ARGS],
}

impl PayloadInfo {
    /// "MTKINFO1" in memory order.
    pub const MAGIC: u64 = u64::from_le_bytes(*b"MTKINFO1");
    /// Changes whenever the structure or the meaning of a port does.
    pub const VERSION: u32 = 1;
    /// Room for arguments.
    pub const ARGS: usize = 2048;

    /// A filled-in structure, or `None` if the arguments do not fit.
    pub fn new(level: u32, memory: u64, touch_pages: u32, args: &str) -> Option<PayloadInfo> {
        let mut info = PayloadInfo {
            magic: Self::MAGIC,
            version: Self::VERSION,
            level,
            memory,
            touch_base: if touch_pages == 0 {
                0
            } else {
                ports::TOUCH_BASE
            },
            touch_pages,
            args_len: args.len() as u32,
            args: [0; Self::ARGS],
        };
        info.args
            .get_mut(..args.len())?
            .copy_from_slice(args.as_bytes());
        Some(info)
    }

    /// The arguments, empty if they are damaged.
    pub fn args(&self) -> &str {
        let bytes = self.args.get(..self.args_len as usize).unwrap_or(&[]);
        core::str::from_utf8(bytes).unwrap_or("")
    }

    /// The value of the argument `key`, if it was given.
    pub fn arg(&self, key: &str) -> Option<&str> {
        self.args().split([' ', ';']).find_map(|word| {
            let (name, value) = word.split_once('=')?;
            (name == key).then_some(value)
        })
    }

    /// The bytes to place in guest memory.
    pub fn as_bytes(&self) -> &[u8] {
        // SAFETY: repr(C), the fields leave no padding (8+4+4+8+8+4+4 and bytes), and any byte of an
        // integer or a byte array may be read as u8. The slice borrows `self`.
        unsafe {
            core::slice::from_raw_parts((self as *const Self).cast(), core::mem::size_of::<Self>())
        }
    }
}

const _: () = assert!(core::mem::size_of::<PayloadInfo>() == 40 + PayloadInfo::ARGS);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_come_back() {
        let info = PayloadInfo::new(2, 64 << 20, 4096, "ops=cpuid:60 tests=all").unwrap();
        assert_eq!(info.arg("ops"), Some("cpuid:60"));
        assert_eq!(info.arg("tests"), Some("all"));
        assert_eq!(info.arg("op"), None);
        assert_eq!(info.touch_base, ports::TOUCH_BASE);
        let info = PayloadInfo::new(2, 0, 0, "ops=cpuid:60;tests=all").unwrap();
        assert_eq!(info.arg("tests"), Some("all"));
        assert_eq!(info.touch_base, 0);
        assert_eq!(&info.as_bytes()[..8], b"MTKINFO1");
    }

    #[test]
    fn too_long_is_refused() {
        let long = std::string::String::from_utf8(std::vec![b'x'; 2049]).unwrap();
        assert!(PayloadInfo::new(1, 0, 0, &long).is_none());
    }
}
