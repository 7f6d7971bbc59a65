//! Extents: the runs of device memory that Dynamic Capacity is made of.

#![forbid(unsafe_code)]

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::address::DpaRange;

/// The UUID that names a group of extents; all zero for untagged capacity.
///
/// Chosen by the orchestrator and unique on the host while it is live
/// (CXL r3.1 8.2.9.2.1.6, "Tag").
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ExtentTag(pub [u8; 16]);

impl ExtentTag {
    /// The tag of capacity that has none.
    pub const NULL: Self = Self([0; 16]);

    /// Whether this is the null tag: such extents are independent of each other.
    pub const fn is_null(&self) -> bool {
        u128::from_ne_bytes(self.0) == 0
    }
}

impl From<uuid::Uuid> for ExtentTag {
    fn from(uuid: uuid::Uuid) -> Self {
        Self(uuid.into_bytes())
    }
}

impl fmt::Display for ExtentTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_null() {
            f.write_str("untagged")
        } else {
            fmt::Display::fmt(&uuid::Uuid::from_bytes(self.0), f)
        }
    }
}

impl fmt::Debug for ExtentTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ExtentTag({self})")
    }
}

/// A run of device memory, offered or held (CXL r3.1 8.2.9.9.9.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Extent {
    /// Where it lies.
    pub range: DpaRange,
    /// What it belongs to.
    pub tag: ExtentTag,
    /// Its place among the extents of a shared tag; 0 for capacity that is not shared.
    pub shared_seq: u16,
}

impl Extent {
    /// An extent with no tag.
    pub const fn untagged(range: DpaRange) -> Self {
        Self {
            range,
            tag: ExtentTag::NULL,
            shared_seq: 0,
        }
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.range)?;
        if !self.tag.is_null() {
            write!(f, " tag {} #{}", self.tag, self.shared_seq)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sixteen_zero_bytes_are_the_null_tag() {
        assert!(ExtentTag::NULL.is_null());
        let mut tag = ExtentTag::NULL;
        tag.0[15] = 1;
        assert!(!tag.is_null());
        assert_eq!(tag.to_string(), "00000000-0000-0000-0000-000000000001");
    }
}
