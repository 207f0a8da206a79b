// SPDX-License-Identifier: GPL-2.0-or-later
//! The MultiProcessor table (Intel MultiProcessor Specification 1.4).
//!
//! A guest without ACPI learns its CPUs, its I/O APIC and where the ISA
//! interrupts go from this. Without it Linux falls back to the 8259 and loses
//! its interrupts once it runs a guest of its own.

/// Where the table is put: the last KiB below 640 KiB, which is one of the
/// places where an operating system looks for it.
pub const MPTABLE_START: u64 = 0x9_fc00;
/// The I/O APIC's address, in KVM's in-kernel irqchip as on every PC.
const IOAPIC_ADDR: u32 = 0xfec0_0000;
const LAPIC_ADDR: u32 = 0xfee0_0000;
const SPEC_1_4: u8 = 4;
const APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;

const ENTRY_CPU: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_INTSRC: u8 = 3;
const ENTRY_LINTSRC: u8 = 4;

/// Interrupt types of the interrupt entries.
const INT: u8 = 0;
const NMI: u8 = 1;
const EXTINT: u8 = 3;

/// Makes the bytes of floating pointer and configuration table for `cpus`
/// processors with APIC ids 0..cpus, to be placed at [`MPTABLE_START`].
///
/// Without `ioapic` the guest knows of no interrupts but those of its local APICs.
/// That is enough where no device interrupts, and spares it some 600 exits (Linux
/// reads and writes each pin of the I/O APIC a dozen times).
pub fn build(cpus: u8, ioapic: bool) -> Vec<u8> {
    let ioapic_id = cpus;
    let mut entries: Vec<Vec<u8>> = Vec::new();

    for id in 0..cpus {
        // Bit 0: usable, bit 1: the boot processor.
        let flags = 1 | if id == 0 { 2 } else { 0 };
        let mut e = vec![ENTRY_CPU, id, APIC_VERSION, flags];
        e.extend_from_slice(&0x600u32.to_le_bytes()); // signature: family 6
        e.extend_from_slice(&0x201u32.to_le_bytes()); // features: FPU and APIC
        e.extend_from_slice(&[0; 8]);
        entries.push(e);
    }
    let mut bus = vec![ENTRY_BUS, 0];
    bus.extend_from_slice(b"ISA   ");
    entries.push(bus);
    if ioapic {
        let mut e = vec![ENTRY_IOAPIC, ioapic_id, IOAPIC_VERSION, 1];
        e.extend_from_slice(&IOAPIC_ADDR.to_le_bytes());
        entries.push(e);
    }
    // ISA interrupt 0 (the timer) arrives at pin 2, as on a PC; pin 2 of the 8259 is the
    // cascade and has no line of its own. Even without an I/O APIC there must be one
    // entry, or Linux complains and makes up fifteen.
    for irq in (0..16u8).filter(|&i| i == 0 || (ioapic && i != 2)) {
        let pin = if irq == 0 { 2 } else { irq };
        entries.push(vec![ENTRY_INTSRC, INT, 0, 0, 0, irq, ioapic_id, pin]);
    }
    entries.push(vec![ENTRY_LINTSRC, EXTINT, 0, 0, 0, 0, 0, 0]);
    entries.push(vec![ENTRY_LINTSRC, NMI, 0, 0, 0, 0, 0xff, 1]);

    let body: Vec<u8> = entries.concat();
    let mut table = Vec::with_capacity(44 + body.len());
    table.extend_from_slice(b"PCMP");
    table.extend_from_slice(&((44 + body.len()) as u16).to_le_bytes());
    table.extend_from_slice(&[SPEC_1_4, 0]);
    table.extend_from_slice(b"MATRYOSH");
    table.extend_from_slice(b"NESTED VM   ");
    table.extend_from_slice(&[0; 6]); // no OEM table
    table.extend_from_slice(&(entries.len() as u16).to_le_bytes());
    table.extend_from_slice(&LAPIC_ADDR.to_le_bytes());
    table.extend_from_slice(&[0; 4]);
    table.extend_from_slice(&body);
    table[7] = checksum(&table);

    let mut out = Vec::with_capacity(16 + table.len());
    out.extend_from_slice(b"_MP_");
    out.extend_from_slice(&(MPTABLE_START as u32 + 16).to_le_bytes());
    out.extend_from_slice(&[1, SPEC_1_4, 0, 0, 0, 0, 0, 0]);
    out[10] = checksum(&out);
    out.extend_from_slice(&table);
    out
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |s, b| s.wrapping_add(*b))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(b: &[u8]) -> u8 {
        b.iter().fold(0u8, |s, x| s.wrapping_add(*x))
    }

    #[test]
    fn both_checksums_are_zero() {
        for cpus in [1, 2, 16] {
            let t = build(cpus, true);
            assert_eq!(sum(&t[..16]), 0);
            assert_eq!(sum(&t[16..]), 0);
        }
    }

    #[test]
    fn length_and_count_match_the_entries() {
        let t = build(3, true);
        let len = u16::from_le_bytes([t[20], t[21]]) as usize;
        assert_eq!(len, t.len() - 16);
        let count = u16::from_le_bytes([t[16 + 34], t[16 + 35]]);
        let (mut at, mut n) = (16 + 44, 0);
        while at < t.len() {
            at += if t[at] == ENTRY_CPU { 20 } else { 8 };
            n += 1;
        }
        assert_eq!((at, n), (t.len(), count));
        // 3 CPUs, a bus, an I/O APIC, 15 ISA interrupts, 2 local ones.
        assert_eq!(count, 3 + 1 + 1 + 15 + 2);
    }

    #[test]
    fn without_io_apic_one_interrupt_is_left() {
        let t = build(1, false);
        assert_eq!(u16::from_le_bytes([t[16 + 34], t[16 + 35]]), 1 + 1 + 1 + 2);
        assert_eq!(t.len(), 16 + 44 + 20 + 8 + 8 + 16);
        assert_eq!(sum(&t[16..]), 0);
    }

    #[test]
    fn fits_below_640_kib() {
        assert!(MPTABLE_START as usize + build(32, true).len() <= 0xa_0000);
    }

    #[test]
    fn timer_goes_to_pin_two() {
        let t = build(1, true);
        let first_int = 16 + 44 + 20 + 8 + 8;
        assert_eq!(
            &t[first_int..first_int + 8],
            &[ENTRY_INTSRC, INT, 0, 0, 0, 0, 1, 2]
        );
    }
}
