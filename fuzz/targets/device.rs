//! A device whose mailbox lies, once or for ever: whatever it says, the driver neither panics nor goes on for ever, and
//! once the device is honest a driver finds what is accepted.
#![no_main]

use std::sync::{Arc, Mutex};

use arbitrary::Arbitrary;
use dax_backend::address::DpaRange;
use dax_backend::capacity::CapacityDevice;
use dax_backend::device::{DcDevice, DeviceConfig};
use dax_backend::event_record::{DYNAMIC_CAPACITY_RECORD, RawRecord};
use dax_backend::extent::{Extent, ExtentTag};
use dax_backend::mmio::{Mmio, RegisterBlock};
use dax_backend::model::{
    AddPolicy, AddRequest, ModelConfig, ModelMmio, ReleasePolicy, SoftwareDevice,
};
use dax_backend::regs::mailbox as regs;
use fuzz::{Kept, impatient};
use libfuzzer_sys::fuzz_target;
use zerocopy::FromZeros;

/// Doorbells that one call of the driver may ring, several times what an honest device makes it ring.
const MOST_COMMANDS: u32 = 20_000;
const BLOCK: u64 = 2 << 20;

#[derive(Arbitrary, Debug, Clone, Copy)]
enum About {
    Identify,
    SupportedLogs,
    Log,
    Timestamp,
    Records,
    Clear,
    Configuration,
    ExtentList,
    Answer,
    Release,
    Anything,
}

impl About {
    fn is(self, opcode: u16) -> bool {
        let wanted = match self {
            Self::Identify => 0x4000,
            Self::SupportedLogs => 0x0400,
            Self::Log => 0x0401,
            Self::Timestamp => 0x0301,
            Self::Records => 0x0100,
            Self::Clear => 0x0101,
            Self::Configuration => 0x4800,
            Self::ExtentList => 0x4801,
            Self::Answer => 0x4802,
            Self::Release => 0x4803,
            Self::Anything => opcode,
        };
        wanted == opcode
    }
}

#[derive(Arbitrary, Debug, Clone)]
enum Untruth {
    Code(u16),
    Length(u16),
    Output(Vec<u8>),
    Bytes(u16, Vec<u8>),
}

#[derive(Arbitrary, Debug, Clone)]
struct Lie {
    about: About,
    forever: bool,
    untruth: Untruth,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Lie(Lie),
    Poll,
    Offer { extents: u8, tag: u8 },
    Record([u8; 32]),
    AskBack { which: u8, forced: bool },
    GiveBack { which: u8 },
    Restart,
    ResetDevice,
}

/// What lies there still are, and how many commands the driver has sent.
#[derive(Default)]
struct Lies {
    lies: Vec<Lie>,
    commands: u32,
}

struct Liar {
    real: ModelMmio,
    lies: Arc<Mutex<Lies>>,
    mailbox: Option<u32>,
    opcode: u16,
    now: Option<Untruth>,
}

impl Mmio for Liar {
    fn block_len(&self, block: RegisterBlock) -> u32 {
        self.real.block_len(block)
    }

    fn read32(&mut self, block: RegisterBlock, offset: u32) -> u32 {
        self.real.read32(block, offset)
    }

    fn read64(&mut self, block: RegisterBlock, offset: u32) -> u64 {
        let real = self.real.read64(block, offset);
        let Some(register) = self.mailbox.and_then(|mailbox| offset.checked_sub(mailbox)) else {
            return real;
        };
        if register == regs::STATUS {
            let code = match &self.now {
                Some(Untruth::Code(code)) => *code,
                // Whatever the command was, it has an output.
                Some(Untruth::Output(_)) => 0,
                _ => return real,
            };
            return regs::Status::from_bits(real)
                .with_return_code(code)
                .into_bits();
        }
        if register == regs::COMMAND {
            let length = match &self.now {
                Some(Untruth::Length(len)) => u32::from(*len),
                Some(Untruth::Output(bytes)) => bytes.len() as u32,
                _ => return real,
            };
            let said = regs::CommandRegister::from_bits(real);
            return said.with_payload_len(length & 0x1f_ffff).into_bits();
        }
        real
    }

    /// A doorbell.
    fn write32(&mut self, block: RegisterBlock, offset: u32, value: u32) {
        self.real.write32(block, offset, value);
        let mut lies = self.lies.lock().unwrap();
        lies.commands += 1;
        assert!(lies.commands < MOST_COMMANDS, "the driver goes on for ever");
        let mut about = lies.lies.iter();
        let found = about.position(|lie| lie.about.is(self.opcode));
        self.now = found.map(|index| match lies.lies[index].forever {
            true => lies.lies[index].untruth.clone(),
            false => lies.lies.remove(index).untruth,
        });
    }

    fn write64(&mut self, block: RegisterBlock, offset: u32, value: u64) {
        // The only register that is written so.
        self.mailbox = Some(offset - regs::COMMAND);
        self.opcode = value as u16;
        self.real.write64(block, offset, value);
    }

    fn read_payload(&mut self, offset: u32, payload: &mut [u8]) {
        let (at, bytes) = match &self.now {
            Some(Untruth::Output(bytes)) => (0, bytes),
            Some(Untruth::Bytes(at, bytes)) => (usize::from(*at), bytes),
            _ => return self.real.read_payload(offset, payload),
        };
        let whole = payload.len().min(512);
        self.real.read_payload(offset, &mut payload[..whole]);
        for (said, lie) in payload.iter_mut().skip(at).zip(bytes) {
            *said = *lie;
        }
    }

    fn write_payload(&mut self, offset: u32, payload: &[u8]) {
        self.real.write_payload(offset, payload);
    }
}

struct Scene {
    model: SoftwareDevice,
    lies: Arc<Mutex<Lies>>,
    journal: Kept,
    driver: Option<DcDevice<Liar>>,
}

impl Scene {
    fn open(&mut self, journal: Kept) -> Option<&mut DcDevice<Liar>> {
        if self.driver.is_none() {
            let config = DeviceConfig {
                journal: Box::new(journal),
                ..impatient()
            };
            let liar = Liar {
                real: self.model.mmio(),
                lies: Arc::clone(&self.lies),
                mailbox: None,
                opcode: 0,
                now: None,
            };
            self.driver = DcDevice::open(liar, config).ok();
        }
        self.driver.as_mut()
    }

    fn driver(&mut self) -> Option<&mut DcDevice<Liar>> {
        self.lies.lock().unwrap().commands = 0;
        self.open(self.journal.clone())
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Lie(lie) => self.lies.lock().unwrap().lies.push(lie),
            Step::Poll => {
                if let Some(driver) = self.driver() {
                    let _ = driver.poll();
                }
            }
            Step::Offer { extents, tag } => {
                let request = AddRequest {
                    policy: AddPolicy::Free(vec![BLOCK; usize::from(extents % 12)]),
                    region: 0,
                    tag: ExtentTag([tag % 3; 16]),
                };
                let _ = self.model.fabric().add(&request);
            }
            Step::Record(bytes) => self.model.fabric().push_record(record(bytes)),
            Step::AskBack { which, forced } => {
                let accepted = self.model.audit().accepted;
                if let Some(extent) = pick(&accepted, which) {
                    let policy = ReleasePolicy::Prescriptive(vec![extent.range]);
                    let _ = self.model.fabric().release(&policy, forced);
                }
            }
            Step::GiveBack { which } => {
                if let Some(driver) = self.driver() {
                    let range: Option<DpaRange> =
                        pick(driver.accepted(), which).map(|extent| extent.range);
                    if let Some(range) = range {
                        let _ = driver.release(&[range]);
                    }
                }
            }
            Step::Restart => self.driver = None,
            Step::ResetDevice => self.model.reset(),
        }
    }

    /// The device tells the truth again: a driver that knows nothing of before finds what is there.
    fn find_again(mut self) {
        self.lies.lock().unwrap().lies.clear();
        self.model.reset();
        for _ in 0..3 {
            if let Some(driver) = self.driver() {
                let _ = driver.poll();
            }
        }
        self.driver = None;
        self.lies.lock().unwrap().commands = 0;
        self.open(Kept::default()).expect("an honest device opens");
        let driver = self.driver.as_mut().expect("open");
        driver.poll().expect("an honest device answers");
        let mut listed = self.model.audit().accepted;
        listed.sort_by_key(|extent| extent.range);
        assert_eq!(driver.accepted(), listed);
    }
}

fn pick(extents: &[Extent], which: u8) -> Option<Extent> {
    let index = usize::from(which).checked_rem(extents.len())?;
    Some(extents[index])
}

/// A dynamic capacity record: what has happened, and where.
fn record(bytes: [u8; 32]) -> RawRecord {
    let mut record = RawRecord::new_zeroed();
    record.uuid = DYNAMIC_CAPACITY_RECORD;
    record.len = 128;
    record.kind = bytes[0];
    record.validity = bytes[1];
    record.region = bytes[2];
    record.flags = bytes[3];
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    record.start = number(8).into();
    record.extent_len = number(16).into();
    record.tag[..8].copy_from_slice(&bytes[24..]);
    record
}

fuzz_target!(|steps: Vec<Step>| {
    let model = SoftwareDevice::new(ModelConfig {
        event_log_depth: 8,
        mailbox_payload: 512,
        ..ModelConfig::one_region(64 * BLOCK)
    });
    let mut scene = Scene {
        model: model.expect("a memfd"),
        lies: Arc::default(),
        journal: Kept::default(),
        driver: None,
    };
    for step in steps.into_iter().take(32) {
        scene.take(step);
    }
    scene.find_again();
});
