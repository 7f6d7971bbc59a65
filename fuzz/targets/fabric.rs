//! A fabric manager and a host that do things in any order, with faults and restarts, and the device as judge: the
//! storm of the driver's own tests, driven by coverage.
#![no_main]

use std::time::Duration;

use arbitrary::Arbitrary;
use dax_backend::model::FaultKind;
use libfuzzer_sys::fuzz_target;

#[path = "../../dax-backend/tests/device/course.rs"]
mod course;

use course::{Step, Storm};

#[derive(Arbitrary, Debug)]
enum Doing {
    Offer { count: u8, tag: u8 },
    OfferNonsense { start: u64, len: u64 },
    OfferSlowly { count: u8 },
    TakeBack { which: u8, forced: bool },
    GiveBack { which: u8 },
    Fault { command: Command, fault: Fault },
    Restart,
    Poll,
}

#[derive(Arbitrary, Debug)]
#[repr(u16)]
enum Command {
    Records = 0x0100,
    Clear = 0x0101,
    Configuration = 0x4800,
    ExtentList = 0x4801,
    Answer = 0x4802,
    Release = 0x4803,
}

#[derive(Arbitrary, Debug)]
enum Fault {
    Refused,
    Busy,
    Retry,
    Exhausted,
    Vendor,
    Hang,
    HangExecuted,
    Length(u16),
    Delay,
    GenerationChange,
}

impl Fault {
    fn kind(&self) -> FaultKind {
        match self {
            Self::Refused => FaultKind::ReturnCode(0x04),
            Self::Busy => FaultKind::ReturnCode(0x05),
            Self::Retry => FaultKind::ReturnCode(0x06),
            Self::Exhausted => FaultKind::ReturnCode(0x1d),
            Self::Vendor => FaultKind::ReturnCode(0x7777),
            Self::Hang => FaultKind::Hang,
            Self::HangExecuted => FaultKind::HangExecuted,
            Self::Length(len) => FaultKind::OutputLength(u32::from(*len) % 600),
            // Longer than the driver waits.
            Self::Delay => FaultKind::Delay(Duration::from_millis(2)),
            Self::GenerationChange => FaultKind::GenerationChange,
        }
    }
}

impl Doing {
    fn step(self) -> Step {
        // As many as the driver's tests have: more than the log holds.
        let count = |count: u8| 1 + u64::from(count) % 12;
        match self {
            Self::Offer { count: n, tag } => Step::Offer {
                count: count(n),
                tag: tag % 4,
            },
            Self::OfferNonsense { start, len } => Step::OfferNonsense { start, len },
            Self::OfferSlowly { count: n } => Step::OfferSlowly {
                count: count(n).clamp(2, 5),
            },
            Self::TakeBack { which, forced } => Step::TakeBack {
                which: which.into(),
                forced,
            },
            Self::GiveBack { which } => Step::GiveBack {
                which: which.into(),
            },
            Self::Fault { command, fault } => Step::Fault {
                opcode: command as u16,
                kind: fault.kind(),
            },
            Self::Restart => Step::Restart,
            Self::Poll => Step::Poll,
        }
    }
}

fuzz_target!(|doings: Vec<Doing>| {
    let mut storm = Storm::new();
    for doing in doings.into_iter().take(60) {
        storm.take(doing.step());
    }
    storm.end();
});
