// SPDX-License-Identifier: GPL-2.0
//! The BTF reader on whatever the fuzzer makes of a file. Give it real ones to start from:
//! `mkdir -p corpus/btf && cp /sys/kernel/btf/kvm* corpus/btf/`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use policy::btf::{Blob, Btf};

fuzz_target!(|data: &[u8]| {
    // The first byte says where base ends and split begins.
    let Some((&at, rest)) = data.split_first() else {
        return;
    };
    let at = rest.len() * usize::from(at) / 256;
    let (base, split) = rest.split_at(at);
    let (Some(base), Some(split)) = (Blob::new(base), Blob::new(split).or(Blob::new(base))) else {
        return;
    };
    let btf = Btf::new(base, split);
    for name in [&b"vcpu_vmx"[..], b"kvm", b"nested_vmx_check_controls", b""] {
        let mut found = [None; 4];
        btf.structures(|_| name, &mut found[..2]);
        btf.kernel_structures(|_| name, &mut found[2..]);
        for s in found.into_iter().flatten() {
            let _ = (s.size(), s.offset_of(b"vcpu"), s.offset_of(b""));
        }
        btf.function_args(|_| name, &mut [None; 3]);
    }
});
