// SPDX-License-Identifier: GPL-2.0-or-later
//! The port I/O devices of a machine: COM1, the reset lines, the control device.

use kvm_bindings::KVM_MEM_READONLY;
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::console::{Collected, Lines};
use crate::control as ctl;
use crate::machine::Exit;
use crate::memory::{Memory, PAGE};
use crate::{Error, Result};

/// Where the module says what a walk of EPT02 finds.
const EPT02: &str = "/sys/kernel/debug/matryoshka/ept02";
/// COM1's first port.
const COM1: u16 = 0x3f8;
/// COM1's interrupt on a PC.
pub(crate) const COM1_IRQ: u32 = 4;
/// Keyboard controller: command port, and the command that pulses the CPU's
/// reset line.
const I8042_COMMAND: u16 = 0x64;
const I8042_RESET: u8 = 0xfe;
/// Data port of the real-time clock. It reads as zero, "not updating": as ones Linux
/// would wait a second for the update to end before it finds no clock.
const RTC_DATA: u16 = 0x71;
/// Reset control register of a PC chipset; bit 2 resets the CPU.
const RESET_CONTROL: u16 = 0xcf9;
const RESET_CPU: u8 = 1 << 2;

/// Where a console line came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The serial port: the guest's kernel.
    Serial,
    /// The control device: a payload, or the tool in the guest.
    Control,
}

/// What a machine needs from whoever runs it.
pub trait Host: Send {
    /// A line of console text.
    fn line(&mut self, source: Source, line: &str);
    /// Raw console bytes for L0's standard output.
    fn raw(&mut self, bytes: &[u8]);
    /// The guest wants the next command.
    fn command(&mut self) -> u32;
    /// The guest is about to execute its first instruction.
    fn started(&mut self) {}
    /// The init of a Linux guest runs.
    fn up(&mut self) {}
    /// What the host needs to go on with this machine in another process.
    fn save(&mut self) -> serde_json::Value {
        serde_json::Value::Null
    }
}

/// What the devices hold, in a file.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BusState {
    /// COM1's registers, in the order of `SerialState`.
    serial: [u8; 9],
    typed: Vec<u8>,
    serial_line: Vec<u8>,
    text_line: Vec<u8>,
}

/// Raises COM1's interrupt through an irqfd.
#[derive(Debug)]
pub(crate) struct Irq(pub EventFd);

impl Trigger for Irq {
    type E = std::io::Error;

    fn trigger(&self) -> std::io::Result<()> {
        self.0.write(1)
    }
}

/// What the machine does after an access.
pub(crate) enum Flow {
    /// It goes on.
    Go,
    /// It ends.
    End(Exit),
}

/// What the touch region's memory slot is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Slot {
    None,
    Ordinary,
    /// One that can be read only, which cannot be changed.
    Fixed,
}

/// The devices.
pub(crate) struct Bus<'a> {
    serial: Serial<Irq, NoEvents, Collected>,
    /// COM1 is a terminal: its bytes go up as they are instead of line by line.
    serial_raw: bool,
    serial_lines: Lines,
    text: Lines,
    host: &'a mut dyn Host,
    mem: &'a Memory,
    /// The VM, unless it is replaced now and then.
    vm: Option<&'a VmFd>,
    /// What was in the pages of the touch region when they were looked at last.
    sums: Vec<u64>,
    /// What a comparison with the log of writes, or a walk of EPT02, found.
    compared: u32,
    /// The touch region's memory slot.
    slot: Slot,
    /// The entry that was changed behind KVM's back: where, and what it was.
    planted: Option<(GuestAddress, u64)>,
    /// KVM keeps a log of writes.
    logging: bool,
}

impl<'a> Bus<'a> {
    pub(crate) fn new(
        irq: Irq,
        serial_raw: bool,
        host: &'a mut dyn Host,
        mem: &'a Memory,
        vm: Option<&'a VmFd>,
    ) -> Self {
        Bus {
            serial: Serial::new(irq, Collected::default()),
            serial_raw,
            serial_lines: Lines::default(),
            text: Lines::default(),
            host,
            mem,
            vm,
            sums: Vec::new(),
            compared: 0,
            slot: Slot::Ordinary,
            planted: None,
            logging: false,
        }
    }

    /// What the devices hold, and what the host needs.
    pub(crate) fn save(&mut self) -> Result<(BusState, serde_json::Value)> {
        if self.logging || self.slot != Slot::Ordinary || self.planted.is_some() {
            return Err(Error::Stack(
                "the guest has its writes logged or its memory moved just now; it runs on: try again later".into(),
            ));
        }
        let s = self.serial.state();
        let state = BusState {
            serial: [
                s.baud_divisor_low,
                s.baud_divisor_high,
                s.interrupt_enable,
                s.interrupt_identification,
                s.line_control,
                s.line_status,
                s.modem_control,
                s.modem_status,
                s.scratch,
            ],
            typed: s.in_buffer,
            serial_line: self.serial_lines.rest().to_vec(),
            text_line: self.text.rest().to_vec(),
        };
        Ok((state, self.host.save()))
    }

    /// Makes the devices what they were; `irq` is COM1's interrupt.
    pub(crate) fn restore(&mut self, state: &BusState, irq: Irq) -> Result<()> {
        let [low, high, enable, ident, line_control, line_status, modem_control, modem_status, scratch] =
            state.serial;
        let serial = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: ident,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer: state.typed.clone(),
        };
        self.serial = Serial::from_state(&serial, irq, NoEvents, Collected::default())
            .map_err(|_| Error::Stack("the serial port in the file is no serial port".into()))?;
        self.serial_lines.push(&state.serial_line, |_| {});
        self.text.push(&state.text_line, |_| {});
        Ok(())
    }

    /// Tells the host that the guest begins.
    pub(crate) fn started(&mut self) {
        self.host.started();
    }

    /// An OUT of `data` (several elements of a string instruction at once).
    pub(crate) fn out(&mut self, port: u16, data: &[u8]) -> Flow {
        let word = || {
            let mut w = [0u8; 4];
            let n = data.len().min(4);
            w[..n].copy_from_slice(&data[..n]);
            u32::from_le_bytes(w)
        };
        match port {
            COM1..0x400 => {
                for &b in data {
                    // The only failure is that of the interrupt's eventfd, which
                    // has a counter of 64 bits to overflow first.
                    let _ = self.serial.write((port - COM1) as u8, b);
                }
                self.serial_output();
            }
            I8042_COMMAND if data[0] == I8042_RESET => return Flow::End(Exit::Reset),
            RESET_CONTROL if data[0] & RESET_CPU != 0 => return Flow::End(Exit::Reset),
            ctl::CONSOLE => {
                let host = &mut self.host;
                self.text.push(data, |l| host.line(Source::Control, l));
            }
            ctl::UP => self.host.up(),
            ctl::TEXT => {
                let bytes = self.mailbox(word());
                let host = &mut self.host;
                self.text.push(&bytes, |l| host.line(Source::Control, l));
            }
            ctl::RAW => {
                let bytes = self.mailbox(word());
                self.host.raw(&bytes);
            }
            ctl::DONE => return Flow::End(Exit::Done(word())),
            ctl::TOUCH => {
                let (what, pages) = ctl::touch::unpack(word());
                if !self.touch(what, pages) {
                    self.host.line(
                        Source::Control,
                        "vmm: a request for the touch region failed; figures that follow mean nothing",
                    );
                }
            }
            _ => {}
        }
        Flow::Go
    }

    /// An IN. Ports where nobody lives read as ones.
    pub(crate) fn input(&mut self, port: u16, data: &mut [u8]) {
        match port {
            COM1..0x400 => {
                for b in data {
                    *b = self.serial.read((port - COM1) as u8);
                }
            }
            ctl::COMMAND => fill(data, self.host.command()),
            ctl::TOUCH => fill(data, self.compared),
            ctl::TOUCH_PAGES => fill(data, self.mem.touch_pages()),
            RTC_DATA => data.fill(0),
            _ => data.fill(0xff),
        }
    }

    /// Offers typed bytes to COM1; gives back how many it took.
    pub(crate) fn type_in(&mut self, bytes: &[u8]) -> usize {
        self.serial.enqueue_raw_bytes(bytes).unwrap_or(0)
    }

    /// Passes on lines that have no end yet.
    pub(crate) fn flush(&mut self) {
        let host = &mut self.host;
        self.text.flush(|l| host.line(Source::Control, l));
        self.serial_lines.flush(|l| host.line(Source::Serial, l));
    }

    /// A request for the touch region. False if it could not be fulfilled.
    fn touch(&mut self, what: u8, pages: u32) -> bool {
        match (what, self.vm) {
            (ctl::touch::DISCARD | ctl::touch::POPULATE, _) => {
                self.mem.discard_touch(pages, what == ctl::touch::POPULATE)
            }
            (ctl::touch::LOG, Some(vm)) => {
                self.sums = self.mem.touch_sums(pages);
                self.logging = self.mem.log_touch(vm, true);
                self.logging
            }
            (ctl::touch::UNLOG, Some(vm)) => {
                self.logging = false;
                self.mem.log_touch(vm, false)
            }
            (ctl::touch::COMPARE, Some(vm)) => {
                let Some(log) = self.mem.touch_log(vm) else {
                    return false;
                };
                let now = self.mem.touch_sums(pages);
                let logged = |page: usize| {
                    log.get(page / 64)
                        .is_some_and(|w| (w >> (page % 64)) & 1 != 0)
                };
                let lacks =
                    |&(page, (now, then)): &(usize, (&u64, &u64))| now != then && !logged(page);
                let lost = now.iter().zip(&self.sums).enumerate().filter(lacks).count();
                let all = log.iter().map(|word| word.count_ones()).sum::<u32>();
                self.sums = now;
                self.compared = (lost as u32).min(0xffff) | (all.min(0xffff) << 16);
                true
            }
            (ctl::touch::WALK, _) => {
                self.compared = self.walk();
                true
            }
            (ctl::touch::PLANT, _) => self.plant(pages),
            (ctl::touch::READ_ONLY, Some(vm)) => {
                self.renew_slot(vm, Some((ctl::TOUCH_BASE, KVM_MEM_READONLY)), Slot::Fixed)
            }
            (ctl::touch::GONE, Some(vm)) => self.renew_slot(vm, None, Slot::None),
            (ctl::touch::MOVE, Some(vm)) => {
                let to = Some((ctl::TOUCH_BASE + u64::from(pages) * PAGE as u64, 0));
                match self.slot {
                    Slot::Ordinary => self.mem.slot_touch(vm, to),
                    _ => self.renew_slot(vm, to, Slot::Ordinary),
                }
            }
            _ => false,
        }
    }

    /// Takes the touch region's slot away if it is there, and makes a new one.
    fn renew_slot(&mut self, vm: &VmFd, to: Option<(u64, u32)>, new: Slot) -> bool {
        let had = core::mem::replace(&mut self.slot, new) != Slot::None;
        (!had || self.mem.slot_touch(vm, None)) && (to.is_none() || self.mem.slot_touch(vm, to))
    }

    /// Has the module here, if there is one, walk EPT02: what is wrong, and in the upper half how many entries it saw.
    fn walk(&mut self) -> u32 {
        let Ok(text) = std::fs::read_to_string(EPT02) else {
            return 0;
        };
        for line in text.lines().filter(|line| line.starts_with("violation:")) {
            self.host.line(Source::Control, &format!("vmm: {line}"));
        }
        let number = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok())
                .unwrap_or(0)
                .min(0xffff) as u32
        };
        number("violations ") | (number("entries ") << 16)
    }

    /// Takes the rights out of the first entry of the table in that frame, or gives those of the last one back.
    fn plant(&mut self, frame: u32) -> bool {
        const RIGHTS: u64 = 7;
        let memory = self.mem.guest();
        if let Some((at, entry)) = self.planted.take() {
            return memory.write_obj(entry, at).is_ok();
        }
        let at = GuestAddress(u64::from(frame) * PAGE as u64);
        let Ok(entry) = memory.read_obj::<u64>(at) else {
            return false;
        };
        self.planted = Some((at, entry));
        memory.write_obj(entry & !RIGHTS, at).is_ok()
    }

    /// The first `n` bytes of the mailbox, or as many as it has.
    fn mailbox(&self, n: u32) -> Vec<u8> {
        let mut bytes = vec![0; (n as usize).min(ctl::MAILBOX_SIZE)];
        match self
            .mem
            .guest()
            .read_slice(&mut bytes, GuestAddress(ctl::MAILBOX))
        {
            Ok(()) => bytes,
            Err(_) => Vec::new(),
        }
    }

    fn serial_output(&mut self) {
        let out = std::mem::take(&mut self.serial.writer_mut().0);
        if out.is_empty() {
            return;
        }
        if self.serial_raw {
            self.host.raw(&out);
        } else {
            let host = &mut self.host;
            self.serial_lines
                .push(&out, |l| host.line(Source::Serial, l));
        }
    }
}

/// Puts a little-endian word into an IN's buffer, whatever its width.
fn fill(data: &mut [u8], word: u32) {
    for (d, s) in data.iter_mut().zip(word.to_le_bytes().iter().cycle()) {
        *d = *s;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Record {
        lines: Vec<(Source, String)>,
        raw: Vec<u8>,
    }

    impl Host for Record {
        fn line(&mut self, source: Source, line: &str) {
            self.lines.push((source, line.into()));
        }
        fn raw(&mut self, bytes: &[u8]) {
            self.raw.extend_from_slice(bytes);
        }
        fn command(&mut self) -> u32 {
            0x0301
        }
    }

    fn with_bus(raw: bool, f: impl FnOnce(&mut Bus)) -> Record {
        let mem = Memory::new(2, 3).unwrap();
        let mut host = Record::default();
        let mut bus = Bus::new(Irq(EventFd::new(0).unwrap()), raw, &mut host, &mem, None);
        f(&mut bus);
        bus.flush();
        drop(bus);
        host
    }

    #[test]
    fn text_of_both_kinds_becomes_lines() {
        let r = with_bus(false, |b| {
            b.out(ctl::CONSOLE, b"one\ntw");
            b.out(COM1, b"k");
            b.out(COM1, b"\n");
            b.out(ctl::CONSOLE, b"o\n");
            b.mem
                .guest()
                .write_slice(b"three\n??", GuestAddress(ctl::MAILBOX))
                .unwrap();
            b.out(ctl::TEXT, &6u32.to_le_bytes());
        });
        let want = [
            (Source::Control, "one"),
            (Source::Serial, "k"),
            (Source::Control, "two"),
            (Source::Control, "three"),
        ];
        assert_eq!(r.lines, want.map(|(s, l)| (s, l.to_owned())));
    }

    #[test]
    fn a_terminal_is_passed_on_as_it_is() {
        let r = with_bus(true, |b| {
            b.out(COM1, b"$ ");
        });
        assert_eq!(r.raw, b"$ ");
    }

    #[test]
    fn words_are_answered() {
        with_bus(false, |b| {
            let mut w = [0u8; 4];
            b.input(ctl::COMMAND, &mut w);
            assert_eq!(u32::from_le_bytes(w), 0x0301);
            b.input(ctl::TOUCH_PAGES, &mut w);
            assert_eq!(u32::from_le_bytes(w), 3);
            b.input(0x1234, &mut w);
            assert_eq!(w, [0xff; 4]);
        });
    }

    #[test]
    fn what_is_saved_is_what_is_restored() {
        let mut saved = BusState::default();
        with_bus(false, |b| {
            b.out(COM1 + 7, &[0x5a]);
            b.out(COM1, b"half");
            b.out(ctl::CONSOLE, b"a line");
            saved = b.save().unwrap().0;
        });
        let r = with_bus(false, |b| {
            b.restore(&saved, Irq(EventFd::new(0).unwrap())).unwrap();
            let mut scratch = [0];
            b.input(COM1 + 7, &mut scratch);
            assert_eq!(scratch, [0x5a]);
            assert_eq!(b.save().unwrap().0, saved);
        });
        let want = [(Source::Control, "a line"), (Source::Serial, "half")];
        assert_eq!(r.lines, want.map(|(s, l)| (s, l.to_owned())));
    }

    #[test]
    fn ends_are_recognised() {
        with_bus(false, |b| {
            assert!(matches!(
                b.out(ctl::DONE, &7u32.to_le_bytes()),
                Flow::End(Exit::Done(7))
            ));
            assert!(matches!(b.out(0x64, &[0xfe]), Flow::End(Exit::Reset)));
            assert!(matches!(b.out(0xcf9, &[0x06]), Flow::End(Exit::Reset)));
            assert!(matches!(b.out(0x64, &[0x20]), Flow::Go));
        });
    }
}
