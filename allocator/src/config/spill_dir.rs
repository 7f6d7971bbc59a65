//! The directory of the setting `spill_dir`.
#![forbid(unsafe_code)]

use core::ffi::CStr;
use core::fmt;

/// An absolute path to a directory, inline: settings are read without a heap.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SpillDir([u8; Self::MAX + 1]);

impl SpillDir {
    /// Bytes that the path may have.
    pub const MAX: usize = 255;

    /// `None`: it is not absolute, or too long.
    pub fn new(path: &str) -> Option<Self> {
        let mut bytes = [0; Self::MAX + 1];
        let fits = path.starts_with('/') && path.len() <= Self::MAX && !path.contains('\0');
        if !fits {
            return None;
        }
        bytes[..path.len()].copy_from_slice(path.as_bytes());
        Some(Self(bytes))
    }

    /// The path.
    pub fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or(c"/")
    }
}

impl fmt::Debug for SpillDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_c_str().fmt(f)
    }
}
