//! The course of a storm, and its judge: whatever drives it, random numbers or a fuzzer, takes
//! steps, and then everything has to come to its end. On the software device.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dax_backend::address::{Dpa, DpaRange};
use dax_backend::capacity::CapacityDevice;
use dax_backend::device::{DcDevice, DeviceConfig};
use dax_backend::extent::{Extent, ExtentTag};
use dax_backend::journal::{Journal, JournalEntry};
use dax_backend::mailbox::MailboxConfig;
use dax_backend::model::{
    AddPolicy, AddRequest, AnswerAudit, Fault, FaultKind, ModelConfig, ModelMmio, ReleasePolicy,
    SlowOffer, SoftwareDevice,
};

const BLOCK: u64 = 2 << 20;
const BLOCKS: u64 = 64;

#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// The fabric offers single blocks, which may be too many for the log.
    Offer {
        count: u64,
        tag: u8,
    },
    /// The fabric offers something malformed beside something good.
    OfferNonsense {
        start: u64,
        len: u64,
    },
    /// The fabric begins to offer, and finishes at the next step of this kind.
    OfferSlowly {
        count: u64,
    },
    /// The fabric asks for part of what is held, or takes it.
    TakeBack {
        which: usize,
        forced: bool,
    },
    /// The host gives an extent back, with its tag group.
    GiveBack {
        which: usize,
    },
    /// The next command of a kind goes wrong.
    Fault {
        opcode: u16,
        kind: FaultKind,
    },
    /// The driver dies and another one takes over.
    Restart,
    Poll,
}

/// A journal that outlives the driver.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Option<JournalEntry>>>);

impl Journal for Kept {
    fn save(&mut self, entry: &JournalEntry) -> io::Result<()> {
        *self.0.lock().unwrap() = Some(entry.clone());
        Ok(())
    }

    fn load(&mut self) -> io::Result<Option<JournalEntry>> {
        Ok(self.0.lock().unwrap().clone())
    }
}

/// A device, its fabric manager, and the driver of the moment.
pub(crate) struct Storm {
    device: SoftwareDevice,
    journal: Kept,
    driver: Option<DcDevice<ModelMmio>>,
    slow: Option<SlowOffer>,
}

impl Storm {
    pub(crate) fn new() -> Self {
        let device = SoftwareDevice::new(ModelConfig {
            event_log_depth: 8,
            mailbox_payload: 512,
            ..ModelConfig::one_region(BLOCKS * BLOCK)
        });
        Self {
            device: device.expect("a memfd"),
            journal: Kept::default(),
            driver: None,
            slow: None,
        }
    }

    /// A driver, if the device lets one open it.
    fn driver(&mut self) -> Option<&mut DcDevice<ModelMmio>> {
        if self.driver.is_none() {
            let config = DeviceConfig {
                mailbox: MailboxConfig {
                    doorbell_timeout: Duration::from_millis(1),
                    first_backoff: Duration::from_micros(10),
                    ..MailboxConfig::default()
                },
                journal: Box::new(self.journal.clone()),
                ..DeviceConfig::default()
            };
            self.driver = DcDevice::open(self.device.mmio(), config).ok();
        }
        self.driver.as_mut()
    }

    fn request(count: u64, number: u8) -> AddRequest {
        AddRequest {
            policy: AddPolicy::Free(vec![BLOCK; count as usize]),
            region: 0,
            tag: ExtentTag([number; 16]),
        }
    }

    /// Takes a step. What hangs is ended by a reset, sooner or later.
    pub(crate) fn take(&mut self, step: Step) {
        let hung = self.device.is_hung();
        self.do_step(step);
        if hung {
            self.device.reset();
        }
    }

    fn do_step(&mut self, step: Step) {
        // Nothing comes between the records of a chain: an overflow by other records would leave
        // open whether the chain's end is lost.
        let chain_open = self.slow.is_some();
        match step {
            Step::Offer { count, tag } if !chain_open => {
                let _ = self.device.fabric().add(&Self::request(count, tag));
            }
            Step::OfferNonsense { start, len } if !chain_open => {
                let nonsense = DpaRange {
                    start: Dpa(start),
                    len,
                };
                self.device
                    .fabric()
                    .add_unchecked(&[Extent::untagged(nonsense)]);
            }
            Step::OfferSlowly { count } => match self.slow.take() {
                Some(mut offer) => offer.write(usize::MAX),
                None => {
                    let offer = self.device.fabric().add_slowly(&Self::request(count, 0));
                    self.slow = offer.ok();
                    if let Some(offer) = &mut self.slow {
                        offer.write(1);
                    }
                }
            },
            Step::TakeBack { which, forced } if !chain_open => {
                // An answer of unknown outcome is looked up first: taken, taken away and offered
                // anew, an extent looks as if it had never been taken.
                if self.driver().is_none_or(|driver| driver.poll().is_err()) {
                    return;
                }
                if let Some(extent) = pick(&self.device.audit().accepted, which) {
                    let policy = ReleasePolicy::Prescriptive(vec![extent.range]);
                    let _ = self.device.fabric().release(&policy, forced);
                }
            }
            Step::GiveBack { which } => {
                let Some(driver) = self.driver() else { return };
                // Without a look at the log, what is given back may be gone and offered anew.
                if driver.poll().is_err() {
                    return;
                }
                let Some(chosen) = pick(driver.accepted(), which) else {
                    return;
                };
                let goes = |extent: &&Extent| {
                    extent.range == chosen.range
                        || (!chosen.tag.is_null() && extent.tag == chosen.tag)
                };
                let ranges: Vec<DpaRange> = driver
                    .accepted()
                    .iter()
                    .filter(goes)
                    .map(|extent| extent.range)
                    .collect();
                let _ = driver.release(&ranges);
            }
            Step::Fault { opcode, kind } => {
                self.device.inject(Fault::on(opcode, kind));
            }
            Step::Restart => self.driver = None,
            Step::Poll => {
                if let Some(driver) = self.driver() {
                    let _ = driver.poll();
                }
            }
            Step::Offer { .. } | Step::OfferNonsense { .. } | Step::TakeBack { .. } => {}
        }
    }

    /// The weather clears: no more faults, and everything comes to its end.
    fn settle(&mut self) {
        self.device.clear_faults();
        self.device.reset();
        if let Some(mut offer) = self.slow.take() {
            offer.write(usize::MAX);
        }
        for _ in 0..4 {
            self.driver()
                .expect("a sound device opens")
                .poll()
                .expect("a sound device answers");
        }
        // The first attempt may be refused, and then the driver has looked up what it holds.
        while !self.driver().expect("open").accepted().is_empty() {
            let driver = self.driver().expect("open");
            let held: Vec<DpaRange> = driver
                .accepted()
                .iter()
                .map(|extent| extent.range)
                .collect();
            if driver.release(&held).is_err() {
                assert_eq!(driver.listed().expect("a list"), driver.accepted());
            }
        }
        // Groups that nobody was told of are found by the next ones. The first of those may pass
        // for the late end of a group cut short.
        for _ in 0..2 {
            self.device
                .fabric()
                .add(&Self::request(1, 0))
                .expect("there is room");
            self.driver()
                .expect("open")
                .poll()
                .expect("a sound device answers");
        }
    }

    /// No group is answered twice, none is left unanswered, and device and driver agree.
    pub(crate) fn end(mut self) {
        self.settle();
        let audit = self.device.audit();
        // An acceptance of what is not offered is refused; a rejection would kill some devices.
        let rejects_nothing = |answer: &AnswerAudit| answer.group.is_none() && answer.ranges == 0;
        assert!(
            !audit.answers.iter().any(rejects_nothing),
            "{:#?}",
            audit.answers
        );
        assert_eq!(audit.violations, Vec::<String>::new());
        assert_eq!(audit.groups_pending, 0, "{:#?}", audit.answers);
        assert_eq!(audit.records_in_log, 0);
        let mut listed = audit.accepted;
        listed.sort_by_key(|extent| extent.range);
        let driver = self.driver().expect("open");
        assert_eq!(listed, driver.accepted());
        assert!(!driver.accepted().is_empty(), "the last offer is taken");
        for group in 0..audit.groups_offered {
            let whole = |answer: &&AnswerAudit| {
                answer.group == Some(group) && answer.code == 0 && !answer.more
            };
            assert_eq!(audit.answers.iter().filter(whole).count(), 1);
        }
    }
}

/// Number `which`, counted round and round.
fn pick(extents: &[Extent], which: usize) -> Option<Extent> {
    let index = which.checked_rem(extents.len())?;
    Some(extents[index])
}
