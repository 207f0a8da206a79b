// SPDX-License-Identifier: GPL-2.0
//! The three modes of a path.

/// What a path does; switchable at run time in `/sys/kernel/matryoshka/paths/<path>/mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mode {
    /// Not attached: the stock code runs as if the module were not there.
    Off = 0,
    /// The path answers where it can.
    On = 1,
    /// The stock code answers; the path's own answer is compared with it.
    Check = 2,
}

impl Mode {
    /// All modes, in the order of their numbers.
    pub const ALL: [Mode; 3] = [Mode::Off, Mode::On, Mode::Check];

    /// The name that sysfs shows and takes.
    pub const fn name(self) -> &'static str {
        match self {
            Mode::Off => "off",
            Mode::On => "on",
            Mode::Check => "check",
        }
    }

    /// Reads what somebody wrote to sysfs: a mode's name, with white space around it allowed.
    pub fn parse(text: &[u8]) -> Option<Mode> {
        let text = text.trim_ascii();
        Mode::ALL.into_iter().find(|m| m.name().as_bytes() == text)
    }

    /// The mode with this number; `None` for a number that is not one.
    pub const fn from_number(n: u8) -> Option<Mode> {
        match n {
            0 => Some(Mode::Off),
            1 => Some(Mode::On),
            2 => Some(Mode::Check),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Mode;

    #[test]
    fn names_round_trip() {
        for mode in Mode::ALL {
            assert_eq!(Mode::parse(mode.name().as_bytes()), Some(mode));
            assert_eq!(Mode::from_number(mode as u8), Some(mode));
        }
        assert_eq!(Mode::parse(b"  check\n"), Some(Mode::Check));
    }

    #[test]
    fn anything_else_is_refused() {
        for bad in [&b""[..], b"On", b"onn", b"o n", b"1", b"off\0"] {
            assert_eq!(Mode::parse(bad), None, "{bad:?}");
        }
        assert_eq!(Mode::from_number(3), None);
    }
}
