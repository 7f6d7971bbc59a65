//! Tags: names under which a lender knows some of its capacity.
#![forbid(unsafe_code)]

use core::fmt;
use core::str::FromStr;

/// The name of capacity that is asked for by name: a UUID, as a fabric manager
/// gives it to an allocation (CXL r3.1 8.2.9.2.1.6, "Tag").
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Tag([u8; 16]);

impl Tag {
    /// No tag: capacity for everybody.
    pub const NONE: Self = Self([0; 16]);

    /// The tag with these bytes, in the order in which a UUID is written.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0
    }

    /// Whether it is none: all bytes are 0.
    pub const fn is_none(self) -> bool {
        u128::from_ne_bytes(self.0) == 0
    }
}

/// A text that is no tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a tag is a UUID, 32 hexadecimal digits with or without hyphens, and not all zero")]
pub struct TagError;

impl FromStr for Tag {
    type Err = TagError;

    fn from_str(text: &str) -> Result<Self, TagError> {
        let grouped = text.len() == 36;
        let mut digits = 0;
        let mut number = 0u128;
        for (at, byte) in text.bytes().enumerate() {
            if grouped && [8, 13, 18, 23].contains(&at) {
                match byte {
                    b'-' => continue,
                    _ => return Err(TagError),
                }
            }
            let digit = char::from(byte).to_digit(16).ok_or(TagError)?;
            number = number << 4 | u128::from(digit);
            digits += 1;
        }
        match digits == 32 && number != 0 {
            true => Ok(Self(number.to_be_bytes())),
            false => Err(TagError),
        }
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            if [4, 6, 8, 10].contains(&at) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tag({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_written_as_a_uuid() {
        let text = "00112233-4455-6677-8899-aabbccddeeff";
        let tag: Tag = text.parse().unwrap();
        assert_eq!(tag.to_string(), text);
        assert_eq!(tag.to_bytes()[15], 0xff);
        assert_eq!("00112233445566778899AABBCCDDEEFF".parse(), Ok(tag));
    }

    #[test]
    fn what_is_no_uuid_is_no_tag() {
        for text in [
            "",
            "seven",
            "0011223344556677",
            "00112233_4455-6677-8899-aabbccddeeff",
            "00112233-4455-6677-8899-aabbccddeefg",
            "0-112233-4455-6677-8899-aabbccddeeff",
            "00000000-0000-0000-0000-000000000000",
            "001122334455-6677-8899-aabbccddeeff0",
        ] {
            assert_eq!(text.parse::<Tag>(), Err(TagError), "{text}");
        }
    }
}
