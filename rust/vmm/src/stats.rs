// SPDX-License-Identifier: GPL-2.0-or-later
//! KVM's binary statistics (KVM_GET_STATS_FD, Documentation/virt/kvm/api.rst).

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

/// _IO(KVMIO, 0xce)
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;
const HEADER: usize = 24;
/// struct kvm_stats_desc up to its name: flags, exponent, size, offset, bucket_size.
const DESC: usize = 16;

/// The statistics behind a VM's or vCPU's descriptor by name. Of a histogram only
/// the first value is kept. `None` when this kernel does not have them.
pub fn read(fd: &impl AsRawFd) -> Option<BTreeMap<String, u64>> {
    // SAFETY: the request takes no argument; it returns a new descriptor or -1.
    let raw = unsafe { libc::ioctl(fd.as_raw_fd(), KVM_GET_STATS_FD, 0) };
    if raw < 0 {
        return None;
    }
    // SAFETY: the kernel has just given us this descriptor, nobody else owns it.
    let file = unsafe { File::from_raw_fd(raw) };
    parse(|buf, at| file.read_exact_at(buf, at)).ok()
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

fn parse(read_at: impl Fn(&mut [u8], u64) -> io::Result<()>) -> io::Result<BTreeMap<String, u64>> {
    let mut h = [0u8; HEADER];
    read_at(&mut h, 0)?;
    let (name_size, num, desc_at, data_at) = (
        u32_at(&h, 4) as usize,
        u32_at(&h, 8) as usize,
        u32_at(&h, 16),
        u32_at(&h, 20),
    );
    let mut descs = vec![0u8; num * (DESC + name_size)];
    read_at(&mut descs, u64::from(desc_at))?;
    let mut out = BTreeMap::new();
    for d in descs.chunks_exact(DESC + name_size) {
        let name: Vec<u8> = d[DESC..].iter().copied().take_while(|&c| c != 0).collect();
        let mut v = [0u8; 8];
        read_at(&mut v, u64::from(data_at) + u64::from(u32_at(d, 8)))?;
        out.insert(
            String::from_utf8_lossy(&name).into_owned(),
            u64::from_le_bytes(v),
        );
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_made_up_file() {
        let mut f = Vec::new();
        // flags, name_size, num_desc, id_offset, desc_offset, data_offset
        for w in [0u32, 8, 2, 24, 32, 80] {
            f.extend_from_slice(&w.to_le_bytes());
        }
        f.extend_from_slice(b"kvm-1\0\0\0");
        for (i, name) in [b"exits\0\0\0", b"io_exits"].iter().enumerate() {
            f.extend_from_slice(&0u32.to_le_bytes());
            f.extend_from_slice(&[0, 0, 1, 0]);
            f.extend_from_slice(&(i as u32 * 8).to_le_bytes());
            f.extend_from_slice(&0u32.to_le_bytes());
            f.extend_from_slice(*name);
        }
        f.extend_from_slice(&42u64.to_le_bytes());
        f.extend_from_slice(&7u64.to_le_bytes());
        let m = parse(|b, at| {
            b.copy_from_slice(&f[at as usize..at as usize + b.len()]);
            Ok(())
        })
        .unwrap();
        assert_eq!(m["exits"], 42);
        assert_eq!(m["io_exits"], 7);
    }
}
