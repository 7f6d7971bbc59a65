//! Mailbox return codes.

#![forbid(unsafe_code)]

use std::fmt;

macro_rules! return_codes {
    ($($(#[$doc:meta])* $name:ident = $value:literal, $text:literal;)*) => {
        /// What a command came to (CXL r3.1 table 8-34, "Command Return Codes").
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum ReturnCode {
            $($(#[$doc])* $name,)*
            /// A code that this driver does not know.
            Unknown(u16),
        }

        impl From<u16> for ReturnCode {
            fn from(code: u16) -> Self {
                match code {
                    $($value => Self::$name,)*
                    other => Self::Unknown(other),
                }
            }
        }

        impl From<ReturnCode> for u16 {
            fn from(code: ReturnCode) -> Self {
                match code {
                    $(ReturnCode::$name => $value,)*
                    ReturnCode::Unknown(other) => other,
                }
            }
        }

        impl fmt::Display for ReturnCode {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $(Self::$name => write!(f, "{} ({:#04x})", $text, $value),)*
                    Self::Unknown(other) => write!(f, "unknown return code {other:#06x}"),
                }
            }
        }
    };
}

return_codes! {
    /// Done.
    Success = 0x00, "success";
    /// Started; the Background Command Status register tells the rest.
    BackgroundStarted = 0x01, "background operation started";
    /// An input value is wrong.
    InvalidInput = 0x02, "invalid input";
    /// The device does not have this command.
    Unsupported = 0x03, "unsupported";
    /// The device failed.
    InternalError = 0x04, "internal error";
    /// Try again.
    RetryRequired = 0x05, "retry required";
    /// Another operation is running; try again later.
    Busy = 0x06, "busy";
    /// The media is disabled.
    MediaDisabled = 0x07, "media disabled";
    /// A firmware transfer is in progress.
    FwTransferInProgress = 0x08, "firmware transfer in progress";
    /// A firmware part came out of order.
    FwTransferOutOfOrder = 0x09, "firmware transfer out of order";
    /// The firmware is not authentic.
    FwVerificationFailed = 0x0a, "firmware verification failed";
    /// There is no such firmware slot.
    FwInvalidSlot = 0x0b, "invalid firmware slot";
    /// The new firmware did not start; the old one is back.
    FwRolledBack = 0x0c, "firmware rolled back";
    /// The new firmware needs a cold reset.
    FwResetRequired = 0x0d, "firmware activation needs a cold reset";
    /// An event record handle is wrong or out of order.
    InvalidHandle = 0x0e, "invalid handle";
    /// A device physical address is wrong.
    InvalidPhysicalAddress = 0x0f, "invalid physical address";
    /// No more poison can be injected.
    InjectPoisonLimit = 0x10, "poison injection limit reached";
    /// The media has failed for good.
    PermanentMediaFailure = 0x11, "permanent media failure";
    /// A background operation was aborted.
    Aborted = 0x12, "aborted";
    /// Not in this security state.
    InvalidSecurityState = 0x13, "invalid security state";
    /// Wrong passphrase.
    IncorrectPassphrase = 0x14, "incorrect passphrase";
    /// Not on this mailbox.
    UnsupportedMailbox = 0x15, "not supported on this mailbox";
    /// The payload's length is wrong for the command.
    InvalidPayloadLength = 0x16, "invalid payload length";
    /// There is no such log.
    InvalidLog = 0x17, "invalid log";
    /// An asynchronous event interrupted the command.
    Interrupted = 0x18, "interrupted";
    /// There is no such feature version.
    UnsupportedFeatureVersion = 0x19, "unsupported feature version";
    /// The feature selection value is not supported.
    UnsupportedFeatureSelection = 0x1a, "unsupported feature selection value";
    /// A feature transfer is in progress.
    FeatureTransferInProgress = 0x1b, "feature transfer in progress";
    /// A feature part came out of order.
    FeatureTransferOutOfOrder = 0x1c, "feature transfer out of order";
    /// The device has run out of something, extents for example.
    ResourcesExhausted = 0x1d, "resources exhausted";
    /// The extent list is malformed.
    InvalidExtentList = 0x1e, "invalid extent list";
}

impl ReturnCode {
    /// Whether the same command may succeed a little later.
    pub fn is_transient(self) -> bool {
        matches!(self, Self::RetryRequired | Self::Busy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_keeps_its_value() {
        for raw in 0..=u16::MAX {
            assert_eq!(u16::from(ReturnCode::from(raw)), raw);
        }
        assert_eq!(ReturnCode::from(0x1d), ReturnCode::ResourcesExhausted);
        assert_eq!(ReturnCode::from(0x1e), ReturnCode::InvalidExtentList);
        assert_eq!(ReturnCode::from(0x1f), ReturnCode::Unknown(0x1f));
    }

    #[test]
    fn messages_carry_the_value() {
        assert_eq!(
            ReturnCode::InvalidPhysicalAddress.to_string(),
            "invalid physical address (0x0f)"
        );
        assert_eq!(
            ReturnCode::Unknown(0x123).to_string(),
            "unknown return code 0x0123"
        );
    }
}
