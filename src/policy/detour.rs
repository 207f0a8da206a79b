// SPDX-License-Identifier: GPL-2.0
//! A test knob: send a call to the stock code now and then, at random, so that each way of going back and
//! forth between the stock code and a path comes up.

/// One in how many calls takes the detour, and from where the random numbers start. Fits one word, so that it can
/// be changed while it is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rate {
    /// One call in this many; 0 for none.
    pub every: u32,
    /// The same seed gives the same choice for the same calls of a vCPU.
    pub seed: u32,
}

impl Rate {
    /// The rate as one word; 0 is off.
    pub const fn to_word(self) -> u64 {
        ((self.every as u64) << 32) | self.seed as u64
    }

    /// The other way round.
    pub const fn from_word(word: u64) -> Self {
        Self {
            every: (word >> 32) as u32,
            seed: word as u32,
        }
    }

    /// Reads `EVERY` or `EVERY SEED`, decimal; `None` if it is anything else.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let mut numbers = text
            .split(u8::is_ascii_whitespace)
            .filter(|word| !word.is_empty());
        let every = number(numbers.next()?)?;
        let seed = match numbers.next() {
            Some(word) => number(word)?,
            None => 0,
        };
        numbers.next().is_none().then_some(Self { every, seed })
    }
}

fn number(digits: &[u8]) -> Option<u32> {
    digits.iter().try_fold(0u32, |n, digit| {
        let digit = digit.is_ascii_digit().then(|| u32::from(digit - b'0'))?;
        n.checked_mul(10)?.checked_add(digit)
    })
}

/// One vCPU's random numbers (xorshift64*).
#[derive(Clone, Copy, Debug, Default)]
pub struct Detour {
    word: u64,
    state: u64,
}

impl Detour {
    /// Before the first number.
    pub const NEW: Detour = Detour { word: 0, state: 0 };

    /// Whether this call is to take the detour. `word` is a [`Rate`] that is not 0.
    pub fn take(&mut self, word: u64) -> bool {
        let rate = Rate::from_word(word);
        if self.word != word || self.state == 0 {
            // Not 0, which xorshift would never leave; spread over the word.
            self.state = (u64::from(rate.seed) | 1 << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            self.word = word;
        }
        let mut x = self.state;
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        self.state = x;
        let random = (x.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32;
        // Multiplied instead of divided: `random * every` is below 2^32 for one in `every`.
        rate.every != 0 && u64::from(random) * u64::from(rate.every) >> 32 == 0
    }
}
