// SPDX-License-Identifier: GPL-2.0-or-later
//! What L0 tells the payload to do next, and how the levels between are to be set for it.

/// How the module is to be set while a round runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Config {
    /// Not loaded anywhere.
    Stock = 0,
    /// Loaded on L0, every path off.
    Idle = 1,
    /// Loaded on L0, every available path on.
    L0 = 2,
    /// Loaded and on at every level that runs a hypervisor kernel.
    All = 3,
    /// Loaded on L0, every available path in check mode.
    Check = 4,
}

impl Config {
    /// Every config, in the order in which a run should visit them.
    pub const EVERY: [Config; 5] = [
        Config::Stock,
        Config::Idle,
        Config::L0,
        Config::All,
        Config::Check,
    ];

    /// The name used in results and on command lines.
    pub const fn name(self) -> &'static str {
        match self {
            Config::Stock => "stock",
            Config::Idle => "idle",
            Config::L0 => "l0",
            Config::All => "all",
            Config::Check => "check",
        }
    }

    /// The config of that name.
    pub fn from_name(name: &str) -> Option<Config> {
        Config::EVERY
            .into_iter()
            .find(|config| config.name() == name)
    }

    /// The config of that number.
    pub fn from_u8(number: u8) -> Option<Config> {
        Config::EVERY
            .into_iter()
            .find(|config| *config as u8 == number)
    }
}

/// One word read from [`ports::COMMAND`](crate::ports::COMMAND): bits 7:0 what to do, bits 15:8 the
/// config, bits 31:16 the round's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Nothing more: the payload ends.
    End,
    /// Measure all requested operations.
    Run {
        /// How every level sets its module before the payload sees the word.
        config: Config,
        /// Echoed in each row, so that a config can be measured more than once.
        round: u16,
    },
    /// Run the correctness tests.
    Test {
        /// As in [`Command::Run`].
        config: Config,
        /// As in [`Command::Run`].
        round: u16,
    },
    /// Warm up, then one operation between the backdoor's profile start and stop.
    Profile {
        /// As in [`Command::Run`].
        config: Config,
        /// As in [`Command::Run`].
        round: u16,
    },
}

impl Command {
    /// The word that goes through the port.
    pub const fn encode(self) -> u32 {
        let (op, config, round) = match self {
            Command::End => return 0,
            Command::Run { config, round } => (1, config, round),
            Command::Test { config, round } => (2, config, round),
            Command::Profile { config, round } => (3, config, round),
        };
        op | ((config as u32) << 8) | ((round as u32) << 16)
    }

    /// The command in a word, or the word itself if it is none. All ones, which is what a port that
    /// nobody serves gives, is none.
    pub fn decode(word: u32) -> Result<Command, u32> {
        let config = Config::from_u8((word >> 8) as u8).ok_or(word)?;
        let round = (word >> 16) as u16;
        match word as u8 {
            0 => Ok(Command::End),
            1 => Ok(Command::Run { config, round }),
            2 => Ok(Command::Test { config, round }),
            3 => Ok(Command::Profile { config, round }),
            _ => Err(word),
        }
    }

    /// How the levels must be set for it; `None` if that does not matter.
    pub const fn config(self) -> Option<Config> {
        match self {
            Command::End => None,
            Command::Run { config, .. }
            | Command::Test { config, .. }
            | Command::Profile { config, .. } => Some(config),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_survives_the_port() {
        for config in Config::EVERY {
            for command in [
                Command::Run { config, round: 0 },
                Command::Test { config, round: 7 },
                Command::Profile {
                    config,
                    round: u16::MAX,
                },
            ] {
                assert_eq!(Command::decode(command.encode()), Ok(command));
                assert_eq!(command.config(), Some(config));
            }
        }
        assert_eq!(Command::decode(Command::End.encode()), Ok(Command::End));
    }

    #[test]
    fn an_unserved_port_is_no_command() {
        assert_eq!(Command::decode(u32::MAX), Err(u32::MAX));
        assert_eq!(Command::decode(0x0000_0501), Err(0x0501));
    }
}
