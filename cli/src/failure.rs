//! How `dcm` fails: 2 when it was called wrongly, 1 when something went wrong.
#![forbid(unsafe_code)]

use std::fmt;

/// Why `dcm` did not do what was asked.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The command line or the environment is wrong.
    Usage(String),
    /// Everything else.
    Runtime(anyhow::Error),
}

impl Failure {
    pub(crate) fn code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Runtime(_) => 1,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(message) => f.write_str(message),
            Self::Runtime(error) => write!(f, "{error:#}"),
        }
    }
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Runtime(error.into())
    }
}
