//! One thing that was looked at.
#![forbid(unsafe_code)]

use std::fmt;

use serde::Serialize;

/// How it stands with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Verdict {
    /// As it should be.
    Ok,
    /// It works, and could work better.
    Hint,
    /// Something does not work without it.
    Missing,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// What was looked at.
    pub(crate) what: &'static str,
    /// How it stands.
    pub(crate) verdict: Verdict,
    /// What is there.
    pub(crate) found: String,
    /// What follows from it, if it is not as it should be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) follows: Option<String>,
    /// The command that mends it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) mend: Option<String>,
}

impl Finding {
    pub(crate) fn ok(what: &'static str, found: impl Into<String>) -> Self {
        Self {
            what,
            verdict: Verdict::Ok,
            found: found.into(),
            follows: None,
            mend: None,
        }
    }

    pub(crate) fn hint(what: &'static str, found: impl Into<String>, follows: &str) -> Self {
        Self {
            verdict: Verdict::Hint,
            follows: Some(follows.to_owned()),
            ..Self::ok(what, found)
        }
    }

    pub(crate) fn missing(what: &'static str, found: impl Into<String>, follows: &str) -> Self {
        Self {
            verdict: Verdict::Missing,
            ..Self::hint(what, found, follows)
        }
    }

    pub(crate) fn mend(self, command: impl Into<String>) -> Self {
        Self {
            mend: Some(command.into()),
            ..self
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.verdict {
            Verdict::Ok => "ok",
            Verdict::Hint => "hint",
            Verdict::Missing => "MISSING",
        };
        writeln!(f, "{mark:<8} {:<18} {}", self.what, self.found)?;
        if let Some(follows) = &self.follows {
            writeln!(f, "{:<27} {follows}", "")?;
        }
        if let Some(mend) = &self.mend {
            writeln!(f, "{:<27} $ {mend}", "")?;
        }
        Ok(())
    }
}
