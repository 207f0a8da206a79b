// SPDX-License-Identifier: GPL-2.0
//! The BTF reader against blobs that are made up, and against blobs that are broken.

use policy::btf::{Blob, Btf, Structure};
use proptest::prelude::*;

/// A type in a made-up blob. Types that the reader must only step over are one variant.
#[derive(Clone, Debug)]
enum Type {
    Struct {
        name: String,
        size: u32,
        /// Name, bit offset, bit-field width (0: none).
        members: Vec<(String, u32, u8)>,
    },
    Func {
        name: String,
        args: usize,
    },
    Filler {
        kind: u32,
        vlen: u32,
    },
}

/// One blob being written.
#[derive(Default)]
struct Writer {
    types: Vec<u32>,
    count: u32,
    strings: Vec<u8>,
}

impl Writer {
    fn string(&mut self, text: &str, base: u32) -> u32 {
        let at = base + self.strings.len() as u32;
        self.strings.extend(text.as_bytes());
        self.strings.push(0);
        at
    }

    /// Appends the records of `ty`; `first` is the blob's first type number and `strings` the length of
    /// the strings below.
    fn push(&mut self, ty: &Type, first: u32, strings: u32) {
        match ty {
            Type::Struct {
                name,
                size,
                members,
            } => {
                let name = self.string(name, strings);
                let bitfields = members.iter().any(|&(_, _, width)| width != 0);
                let info = (u32::from(bitfields) << 31) | (4 << 24) | members.len() as u32;
                self.types.extend([name, info, *size]);
                for (member, bits, width) in members {
                    let member = self.string(member, strings);
                    let offset = if bitfields {
                        (u32::from(*width) << 24) | bits
                    } else {
                        *bits
                    };
                    self.types.extend([member, 1, offset]);
                }
                self.count += 1;
            }
            Type::Func { name, args } => {
                let name = self.string(name, strings);
                self.types.extend([0, (13 << 24) | *args as u32, 1]);
                self.types
                    .extend(std::iter::repeat_n([0, 1], *args).flatten());
                self.types.extend([name, 12 << 24, first + self.count]);
                self.count += 2;
            }
            Type::Filler { kind, vlen } => {
                let words = match kind {
                    1 | 14 | 17 => 1,
                    3 => 3,
                    5 | 15 | 19 => vlen * 3,
                    6 => vlen * 2,
                    _ => 0,
                };
                self.types.extend([0, (kind << 24) | vlen, 1]);
                self.types.extend((0..words).map(|w| w * 0x0101_0101));
                self.count += 1;
            }
        }
    }

    fn finish(&self) -> Vec<u8> {
        let types = self.types.len() as u32 * 4;
        let mut out = vec![0x9f, 0xeb, 1, 0];
        for word in [24, 0, types, types, self.strings.len() as u32] {
            out.extend(u32::to_le_bytes(word));
        }
        out.extend(self.types.iter().flat_map(|word| word.to_le_bytes()));
        out.extend(&self.strings);
        out
    }
}

/// The bytes of base and split with these types, names in the order given.
fn blobs(base: &[Type], split: &[Type]) -> (Vec<u8>, Vec<u8>) {
    let mut low = Writer {
        strings: vec![0],
        ..Writer::default()
    };
    for ty in base {
        low.push(ty, 1, 0);
    }
    let mut high = Writer::default();
    for ty in split {
        high.push(ty, low.count + 1, low.strings.len() as u32);
    }
    (low.finish(), high.finish())
}

fn members() -> impl Strategy<Value = Vec<(String, u32, u8)>> {
    let one = (0u32..0x00ff_ffff, prop_oneof![3 => Just(0u8), 1 => 1u8..64]);
    prop::collection::vec(one, 0..8).prop_map(|list| {
        let named = |(n, (bits, width)): (usize, (u32, u8))| (format!("m{n}"), bits, width);
        list.into_iter().enumerate().map(named).collect()
    })
}

fn a_type() -> impl Strategy<Value = Type> {
    let kinds = prop::sample::select(vec![
        1u32, 2, 3, 5, 6, 7, 8, 9, 10, 11, 14, 15, 16, 17, 18, 19,
    ]);
    prop_oneof![
        (any::<u32>(), members()).prop_map(|(size, members)| Type::Struct {
            name: String::new(),
            size,
            members
        }),
        (0usize..6).prop_map(|args| Type::Func {
            name: String::new(),
            args
        }),
        (kinds, 0u32..5).prop_map(|(kind, vlen)| Type::Filler { kind, vlen }),
    ]
}

/// Gives every type a name of its own; one may be the beginning of another (`t1`, `t10`).
fn named(mut list: Vec<Type>, mark: &str) -> Vec<Type> {
    for (n, ty) in list.iter_mut().enumerate() {
        if let Type::Struct { name, .. } | Type::Func { name, .. } = ty {
            *name = format!("{mark}{n}");
        }
    }
    list
}

fn structure<'b, 'a>(btf: &'b Btf<'a>, name: &[u8], kernel: bool) -> Option<Structure<'b, 'a>> {
    let mut found = [None];
    match kernel {
        false => btf.structures(|_| name, &mut found),
        true => btf.kernel_structures(|_| name, &mut found),
    }
    found[0]
}

fn args_of(btf: &Btf<'_>, name: &[u8]) -> Option<usize> {
    let mut found = [Some(99)];
    btf.function_args(|_| name, &mut found);
    found[0]
}

/// Asks for everything that `types` have, the module's or the `kernel`'s, and for what they do not.
fn compare(btf: &Btf<'_>, types: &[Type], kernel: bool) -> Result<(), TestCaseError> {
    for ty in types {
        match ty {
            Type::Struct {
                name,
                size,
                members,
            } => {
                let found = structure(btf, name.as_bytes(), kernel);
                let other = structure(btf, name.as_bytes(), !kernel);
                prop_assert!(other.is_none());
                prop_assert!(found.is_some(), "{} is lost", name);
                let found = found.unwrap();
                prop_assert_eq!(found.size(), *size as usize);
                for (member, bits, _) in members {
                    let expected = (bits % 8 == 0).then_some(*bits as usize / 8);
                    prop_assert_eq!(found.offset_of(member.as_bytes()), expected);
                }
                prop_assert_eq!(found.offset_of(b"m"), None);
                prop_assert_eq!(args_of(btf, name.as_bytes()), None);
            }
            Type::Func { name, args } => {
                prop_assert_eq!(args_of(btf, name.as_bytes()), (!kernel).then_some(*args));
                prop_assert!(structure(btf, name.as_bytes(), false).is_none());
            }
            Type::Filler { .. } => {}
        }
    }
    Ok(())
}

/// Asks a few questions of a blob that may be broken in any way.
fn poke(base: &[u8], split: &[u8]) {
    if let (Some(base), Some(split)) = (Blob::new(base), Blob::new(split)) {
        let btf = Btf::new(base, split);
        for name in [&b""[..], b"b0", b"s0", b"s1", b"s10", b"\xff\0"] {
            for s in [false, true]
                .into_iter()
                .filter_map(|kernel| structure(&btf, name, kernel))
            {
                let _ = (s.size(), s.offset_of(b"m0"), s.offset_of(b""));
            }
            let _ = args_of(&btf, name);
        }
    }
}

proptest! {
    #[test]
    fn made_up_blobs_are_read_right(
        base in prop::collection::vec(a_type(), 0..20),
        split in prop::collection::vec(a_type(), 0..20),
    ) {
        let (base, split) = (named(base, "b"), named(split, "s"));
        let (low, high) = blobs(&base, &split);
        let btf = Btf::new(Blob::new(&low).unwrap(), Blob::new(&high).unwrap());
        compare(&btf, &base, true)?;
        compare(&btf, &split, false)?;
        // All at once as well, and what is there already stays.
        let names: Vec<&[u8]> = split
            .iter()
            .filter_map(|ty| match ty {
                Type::Struct { name, .. } => Some(name.as_bytes()),
                _ => None,
            })
            .collect();
        let mut all = vec![None; names.len()];
        btf.structures(|n| names[n], &mut all);
        prop_assert!(all.iter().all(Option::is_some));
        btf.kernel_structures(|_| b"b0", &mut all);
        for (name, one) in names.iter().zip(&all) {
            prop_assert_eq!(one.unwrap().size(), structure(&btf, name, false).unwrap().size());
        }
    }

    #[test]
    fn a_broken_blob_never_panics(
        base in prop::collection::vec(a_type(), 0..8),
        split in prop::collection::vec(a_type(), 0..8),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
        keep in any::<prop::sample::Index>(),
        cut in any::<bool>(),
    ) {
        let (low, mut high) = blobs(&named(base, "b"), &named(split, "s"));
        for (at, byte) in changes {
            let at = at.index(high.len());
            high[at] = byte;
        }
        if cut {
            high.truncate(keep.index(high.len()));
        }
        poke(&low, &high);
        poke(&high, &low);
        poke(&high, &high);
    }

    #[test]
    fn arbitrary_bytes_never_panic(
        head in prop::collection::vec(any::<u32>(), 7), body in prop::collection::vec(any::<u8>(), 0..400),
        small in any::<bool>(),
    ) {
        let mut bytes = vec![0x9f, 0xeb, 1, 0];
        for word in head {
            // Sections that lie inside the blob get further than those that do not.
            bytes.extend((if small { word % 128 } else { word }).to_le_bytes());
        }
        bytes.extend(body);
        poke(&bytes, &bytes);
    }
}
