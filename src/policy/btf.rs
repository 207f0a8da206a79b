// SPDX-License-Identifier: GPL-2.0
//! Reads BTF, the kernel's own description of its types (`Documentation/bpf/btf.rst`), just far
//! enough to answer: how big is a structure, where is a member, how many arguments has a function.
//!
//! A module's BTF is split: its type numbers and string offsets go on where the kernel's (the
//! base's) end. Every access is bounds-checked; a malformed file gives `None`, never a panic.

const MAGIC: u16 = 0xeb9f;

const KIND_INT: u32 = 1;
const KIND_PTR: u32 = 2;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_FWD: u32 = 7;
const KIND_FUNC: u32 = 12;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_FLOAT: u32 = 16;
const KIND_DECL_TAG: u32 = 17;
const KIND_TYPE_TAG: u32 = 18;
const KIND_ENUM64: u32 = 19;

fn u16_at(data: &[u8], at: usize) -> Option<u16> {
    let bytes = data.get(at..at.checked_add(2)?)?;
    Some(u16::from_le_bytes(bytes.try_into().ok()?))
}

fn u32_at(data: &[u8], at: usize) -> Option<u32> {
    let bytes = data.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

/// One BTF blob: its type section and its strings.
#[derive(Clone, Copy)]
pub struct Blob<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// What follows a record of each kind, for kinds that are newer than this code. Empty in a blob
    /// made before 7.3.
    layout: &'a [u8],
}

/// One type record.
#[derive(Clone, Copy)]
struct Record<'a> {
    name: u32,
    info: u32,
    size_or_type: u32,
    extra: &'a [u8],
}

impl Record<'_> {
    /// Seven bits since 7.3 and five before, when the other two were zero.
    fn kind(&self) -> u32 {
        (self.info >> 24) & 0x7f
    }

    /// 24 bits since 7.3 and 16 before, when the other eight were zero.
    fn vlen(&self) -> usize {
        (self.info & 0x00ff_ffff) as usize
    }

    /// Bytes that follow the record's head. `None` for a kind that neither this code nor the blob's
    /// own layout section knows: nothing after it can be read.
    fn extra_len(&self, layout: &[u8]) -> Option<usize> {
        let known = match self.kind() {
            KIND_INT | KIND_VAR | KIND_DECL_TAG => 4,
            KIND_ARRAY => 12,
            KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => self.vlen() * 12,
            KIND_ENUM | KIND_FUNC_PROTO => self.vlen() * 8,
            KIND_PTR | KIND_FWD..=KIND_FUNC | KIND_FLOAT | KIND_TYPE_TAG => 0,
            newer => {
                let at = newer as usize * 4;
                let info = usize::from(*layout.get(at)?);
                let element = usize::from(*layout.get(at + 1)?);
                info.checked_add(element.checked_mul(self.vlen())?)?
            }
        };
        Some(known)
    }

    /// Set where the upper byte of a member's offset is the width of a bit field.
    fn has_bitfields(&self) -> bool {
        self.info >> 31 != 0
    }
}

impl<'a> Blob<'a> {
    /// Takes a blob as `/sys/kernel/btf/<module>` gives it; `None` if it is not BTF.
    pub fn new(data: &'a [u8]) -> Option<Self> {
        if u16_at(data, 0)? != MAGIC {
            return None;
        }
        let header = u32_at(data, 4)? as usize;
        let body = data.get(header..)?;
        let section = |off: usize| -> Option<&'a [u8]> {
            let start = u32_at(data, off)? as usize;
            let len = u32_at(data, off.checked_add(4)?)? as usize;
            body.get(start..start.checked_add(len)?)
        };
        Some(Self {
            types: section(8)?,
            strings: section(16)?,
            layout: if header >= 32 { section(24)? } else { &[] },
        })
    }

    fn records(&self) -> Records<'a> {
        Records {
            rest: self.types,
            layout: self.layout,
        }
    }
}

struct Records<'a> {
    rest: &'a [u8],
    layout: &'a [u8],
}

impl<'a> Iterator for Records<'a> {
    type Item = Record<'a>;

    fn next(&mut self) -> Option<Record<'a>> {
        let (name, info) = (u32_at(self.rest, 0)?, u32_at(self.rest, 4)?);
        let size_or_type = u32_at(self.rest, 8)?;
        let head = Record {
            name,
            info,
            size_or_type,
            extra: &[],
        };
        let len = head.extra_len(self.layout)?;
        let end = 12usize.checked_add(len)?;
        let extra = self.rest.get(12..end)?;
        self.rest = self.rest.get(end..)?;
        Some(Record { extra, ..head })
    }
}

/// The types of a module, on top of the kernel's.
pub struct Btf<'a> {
    base: Blob<'a>,
    split: Blob<'a>,
}

impl<'a> Btf<'a> {
    /// Puts a module's BTF on the kernel's.
    pub fn new(base: Blob<'a>, split: Blob<'a>) -> Self {
        Self { base, split }
    }

    fn name_is(&self, offset: u32, name: &[u8]) -> bool {
        let offset = offset as usize;
        let tail = match offset.checked_sub(self.base.strings.len()) {
            None => self.base.strings.get(offset..),
            Some(in_split) => self.split.strings.get(in_split..),
        };
        let Some(tail) = tail else { return false };
        // Most differ in length.
        tail.get(name.len()) == Some(&0) && tail.get(..name.len()) == Some(name)
    }

    /// The module's own structures of these names, in their places in `found`, where nothing is yet; a place stays empty if there is
    /// none. `name` gives the name that a place is for.
    ///
    /// One structure at a time would mean a pass over all types for each.
    pub fn structures<'b, 'n>(
        &'b self,
        name: impl Fn(usize) -> &'n [u8],
        found: &mut [Option<Structure<'b, 'a>>],
    ) {
        self.find(self.split.records(), name, found);
    }

    /// The same among the kernel's, which has many more.
    pub fn kernel_structures<'b, 'n>(
        &'b self,
        name: impl Fn(usize) -> &'n [u8],
        found: &mut [Option<Structure<'b, 'a>>],
    ) {
        self.find(self.base.records(), name, found);
    }

    fn find<'b, 'n>(
        &'b self,
        records: Records<'a>,
        name: impl Fn(usize) -> &'n [u8],
        found: &mut [Option<Structure<'b, 'a>>],
    ) {
        if found.iter().all(Option::is_some) {
            return;
        }
        for record in records.filter(|r| r.kind() == KIND_STRUCT) {
            for (number, slot) in found.iter_mut().enumerate() {
                if slot.is_none() && self.name_is(record.name, name(number)) {
                    *slot = Some(Structure { btf: self, record });
                }
            }
        }
    }

    /// How many arguments each of these functions of the module takes: `name` gives the name of the function that a
    /// number stands for, of which there are as many as in `args`. `None` for one that is not there, and for one whose
    /// arguments the compiler has changed: pahole leaves such functions out.
    ///
    /// One function at a time would mean a pass over all types for each.
    pub fn function_args<'n>(&self, name: impl Fn(usize) -> &'n [u8], args: &mut [Option<usize>]) {
        /// More than any number of arguments: `args` has the number of a type for now.
        const TYPE: usize = 1 << 32;
        args.fill(None);
        for record in self.split.records().filter(|r| r.kind() == KIND_FUNC) {
            for (number, slot) in args.iter_mut().enumerate() {
                if slot.is_none() && self.name_is(record.name, name(number)) {
                    *slot = Some(TYPE + record.size_or_type as usize);
                }
            }
        }
        // Prototypes may be shared with the kernel, whose types come first.
        let types = self.base.records().chain(self.split.records());
        for (id, record) in (1..).zip(types) {
            if record.kind() != KIND_FUNC_PROTO {
                continue;
            }
            for slot in args.iter_mut().filter(|slot| **slot == Some(TYPE + id)) {
                *slot = Some(record.vlen());
            }
        }
        for slot in args {
            *slot = slot.filter(|&n| n < TYPE);
        }
    }
}

/// A structure in BTF.
#[derive(Clone, Copy)]
pub struct Structure<'b, 'a> {
    btf: &'b Btf<'a>,
    record: Record<'a>,
}

impl Structure<'_, '_> {
    /// Its size in bytes.
    pub fn size(&self) -> usize {
        self.record.size_or_type as usize
    }

    /// Offset in bytes of a direct member; `None` if there is none or it is a bit field that does
    /// not start at a byte.
    pub fn offset_of(&self, member: &[u8]) -> Option<usize> {
        for entry in self.record.extra.chunks_exact(12) {
            if !self.btf.name_is(u32_at(entry, 0)?, member) {
                continue;
            }
            let raw = u32_at(entry, 8)?;
            let bits = if self.record.has_bitfields() {
                raw & 0x00ff_ffff
            } else {
                raw
            };
            return (bits % 8 == 0).then_some((bits / 8) as usize);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blob(types: &[u32], strings: &[u8]) -> Vec<u8> {
        let type_len = types.len() as u32 * 4;
        let mut out = Vec::new();
        out.extend(MAGIC.to_le_bytes());
        out.extend([1, 0]);
        for word in [24, 0, type_len, type_len, strings.len() as u32] {
            out.extend(u32::to_le_bytes(word));
        }
        types.iter().for_each(|t| out.extend(t.to_le_bytes()));
        out.extend(strings);
        out
    }

    /// Base: an int (1) and a function prototype of two arguments (2).
    /// Split: struct `pair` of two ints (3) and a function `f` of that prototype (4).
    fn sample() -> (Vec<u8>, Vec<u8>) {
        let base = blob(
            &[
                1,
                KIND_INT << 24,
                4,
                32,
                0,
                (KIND_FUNC_PROTO << 24) | 2,
                1,
                0,
                1,
                0,
                1,
            ],
            b"\0int\0a\0",
        );
        // Base strings are 7 bytes long, so the split strings start at offset 7.
        let split = blob(
            &[
                8,
                (KIND_STRUCT << 24) | 2,
                8,
                5,
                1,
                0,
                13,
                1,
                32,
                15,
                KIND_FUNC << 24,
                2,
            ],
            b"\0pair\0b\0f\0",
        );
        (base, split)
    }

    fn structure<'b, 'a>(btf: &'b Btf<'a>, name: &[u8]) -> Option<Structure<'b, 'a>> {
        let mut found = [None];
        btf.structures(|_| name, &mut found);
        found[0]
    }

    fn kernel_structure<'b, 'a>(btf: &'b Btf<'a>, name: &[u8]) -> Option<Structure<'b, 'a>> {
        let mut found = [None];
        btf.kernel_structures(|_| name, &mut found);
        found[0]
    }

    fn args(btf: &Btf, name: &[u8]) -> Option<usize> {
        let mut found = [Some(99)];
        btf.function_args(|_| name, &mut found);
        found[0]
    }

    #[test]
    fn reads_split_types_over_the_base() {
        let (base, split) = sample();
        let btf = Btf::new(Blob::new(&base).unwrap(), Blob::new(&split).unwrap());
        let pair = structure(&btf, b"pair").unwrap();
        assert_eq!(pair.size(), 8);
        assert_eq!(pair.offset_of(b"a"), Some(0));
        assert_eq!(pair.offset_of(b"b"), Some(4));
        assert_eq!(pair.offset_of(b"c"), None);
        assert_eq!(args(&btf, b"f"), Some(2));
        assert_eq!(args(&btf, b"g"), None);
        assert!(structure(&btf, b"pai").is_none());
        assert!(kernel_structure(&btf, b"pair").is_none());
        let mut both = [None; 2];
        btf.function_args(|n| [&b"f"[..], b"f"][n], &mut both);
        assert_eq!(both, [Some(2); 2]);
    }

    /// A blob with the header of 7.3, whose layout section says that a record of kind 20 is followed
    /// by 4 bytes and 8 for each element.
    fn newer(types: &[u32], layout: &[u8]) -> Vec<u8> {
        let type_len = types.len() as u32 * 4;
        let strings = b"\0s\0";
        let strings_len = strings.len() as u32;
        let mut out = Vec::new();
        out.extend(MAGIC.to_le_bytes());
        out.extend([1, 0]);
        let layout_len = layout.len() as u32;
        for word in [
            32,
            layout_len,
            type_len,
            layout_len + type_len,
            strings_len,
            0,
            layout_len,
        ] {
            out.extend(u32::to_le_bytes(word));
        }
        out.extend(layout);
        types.iter().for_each(|t| out.extend(t.to_le_bytes()));
        out.extend(strings);
        out
    }

    #[test]
    fn the_layout_section_carries_over_newer_kinds() {
        let mut layout = [0u8; 21 * 4];
        layout[80] = 4;
        layout[81] = 8;
        let types = [
            0,
            (20 << 24) | 2,
            0,
            1,
            2,
            3,
            4,
            5,
            1,
            KIND_STRUCT << 24,
            16,
        ];
        let (base, _) = sample();
        let base = Blob::new(&base).unwrap();
        let known = newer(&types, &layout);
        let btf = Btf::new(base, Blob::new(&known).unwrap());
        // The split strings start at offset 7.
        assert!(structure(&btf, b"s").is_none());
        let alone = Btf::new(Blob::new(&known).unwrap(), base);
        assert_eq!(kernel_structure(&alone, b"s").map(|s| s.size()), Some(16));

        let unknown = newer(&types, &layout[..80]);
        let stopped = Btf::new(Blob::new(&unknown).unwrap(), base);
        assert!(kernel_structure(&stopped, b"s").is_none());
    }

    #[test]
    fn more_than_64_ki_elements_are_counted() {
        let members = 0x1_0001u32;
        let mut types = vec![1, (KIND_ENUM << 24) | members, 4];
        types.extend((0..members * 2).map(|_| 0));
        types.extend([1, KIND_STRUCT << 24, 24]);
        let blob_bytes = blob(&types, b"\0s\0");
        let empty = blob(&[], b"");
        let btf = Btf::new(Blob::new(&blob_bytes).unwrap(), Blob::new(&empty).unwrap());
        assert_eq!(kernel_structure(&btf, b"s").map(|s| s.size()), Some(24));
    }

    #[test]
    fn a_cut_file_never_panics() {
        let (base, split) = sample();
        for cut in 0..split.len() {
            let Some(short) = Blob::new(&split[..cut]) else {
                continue;
            };
            let btf = Btf::new(Blob::new(&base).unwrap(), short);
            let _ = structure(&btf, b"pair").map(|s| s.offset_of(b"b"));
            let _ = args(&btf, b"f");
        }
    }
}
