// SPDX-License-Identifier: GPL-2.0
//! What is written to a knob.

/// The words of a list, with commas or white space between them. The one word `none` is no word.
pub fn words(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let between = |c: &u8| *c == b',' || c.is_ascii_whitespace();
    let none = text.trim_ascii() == b"none";
    text.split(between)
        .filter(move |word| !word.is_empty() && !none)
}

/// A number, decimal or hexadecimal after `0x`, with white space around it.
pub fn number(text: &[u8]) -> Option<u16> {
    let text = text.trim_ascii();
    let (digits, radix) = match text {
        [b'0', b'x' | b'X', digits @ ..] => (digits, 16),
        digits => (digits, 10),
    };
    // from_str_radix() would take a sign.
    if !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    u16::from_str_radix(core::str::from_utf8(digits).ok()?, radix).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &[u8]) -> Vec<&[u8]> {
        words(text).collect()
    }

    #[test]
    fn words_come_apart_at_commas_and_white_space() {
        let expected: [&[u8]; 3] = [b"guest_rip", b"0x681c", b"x"];
        assert_eq!(list(b" guest_rip,0x681c\t,, x\n"), expected);
        assert!(list(b"").is_empty());
        assert!(list(b" \n,").is_empty());
        assert!(list(b"none\n").is_empty());
        assert_eq!(list(b"none x").len(), 2);
    }

    #[test]
    fn numbers_are_decimal_or_hexadecimal() {
        assert_eq!(number(b"32\n"), Some(32));
        assert_eq!(number(b" 0x681C "), Some(0x681c));
        assert_eq!(number(b"65535"), Some(65535));
        for bad in [
            &b""[..],
            b"0x",
            b"65536",
            b"-1",
            b"+1",
            b"12 13",
            b"1f",
            b"0x+1",
            b"\xff",
        ] {
            assert_eq!(number(bad), None, "{bad:?}");
        }
    }
}
