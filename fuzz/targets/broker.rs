//! What clients and an operator may send to a broker, well formed or not: no granule is held twice, the books add up,
//! and the broker lives.
#![no_main]

use std::thread;
use std::time::Duration;

use arbitrary::Arbitrary;
use dax_backend::broker::admin::{AdminClient, AdminReply, AdminRequest};
use dax_backend::broker::protocol::{Kind, Message, Role};
use dax_backend::broker::{Broker, BrokerConfig, GRANULE, Listener, Stop, Window, WindowRange};
use dax_backend::capacity::CapacityDevice;
use dax_backend::device::DcDevice;
use dax_backend::extent::ExtentTag;
use dax_backend::model::{ModelConfig, SoftwareDevice};
use dax_backend::orchestrator::Orchestrator;
use fuzz::judge::Judge;
use fuzz::peer::{Attached, Peer};
use libfuzzer_sys::fuzz_target;

/// Of the device, and in the extents that are offered at the start; the last one has a tag.
const GRANULES: u64 = 16;
const OFFERED: [u64; 3] = [4, 6, 2];
/// What a step can do beyond this many says nothing new.
const MOST_STEPS: usize = 32;
/// An answer takes milliseconds; a broker that is silent so long hangs.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Arbitrary, Debug)]
enum Step {
    /// A message whose parts make sense, each for itself.
    Say {
        who: u8,
        kind: u8,
        id: u8,
        arg: [u8; 4],
        flags: u8,
        ranges: Vec<(u8, u8)>,
        attached: Attached,
    },
    /// A message of any numbers.
    Babble {
        who: u8,
        kind: u8,
        id: u64,
        arg: [u64; 4],
        flags: u32,
        ranges: Vec<(u64, u64)>,
    },
    /// No message.
    Bytes {
        who: u8,
        bytes: Vec<u8>,
    },
    Lease {
        who: u8,
        granules: u8,
        tagged: bool,
    },
    /// What it holds, from the first on.
    GiveBack {
        who: u8,
        granules: u8,
    },
    /// To the operator's requests.
    Release {
        granules: u8,
        deadline_ms: u8,
    },
    Add {
        granules: u8,
    },
    Request {
        json: Vec<u8>,
    },
    Leave {
        who: u8,
    },
    Pause,
}

const KINDS: [Kind; 21] = [
    Kind::Hello,
    Kind::Lease,
    Kind::Return,
    Kind::RecallAnswer,
    Kind::AdminRequest,
    Kind::RecallRefused,
    Kind::Held,
    Kind::ForkSetUp,
    Kind::ForkBegin,
    Kind::ForkShare,
    Kind::ForkEnd,
    Kind::ForkFree,
    Kind::ForkEvicted,
    Kind::ForkEnded,
    Kind::ForkTake,
    Kind::ForkTaken,
    Kind::ForkJoin,
    Kind::OpenShared,
    Kind::Grant,
    Kind::Recall,
    Kind::Welcome,
];

/// Sixteen times the same byte, so that small numbers make it.
const TAG: ExtentTag = ExtentTag([1; 16]);

fn message(kind: u8) -> Message {
    Message::new(KINDS[usize::from(kind) % KINDS.len()])
}

fn take(judge: &mut Judge<impl Fn() -> Peer>, step: Step) {
    match step {
        Step::Say {
            who,
            kind,
            id,
            arg,
            flags,
            ranges,
            attached,
        } => {
            // Of each argument's byte: a number, or as many granules.
            let number = |byte: u8| match byte {
                0..128 => u64::from(byte),
                _ => u64::from(byte - 128) * GRANULE,
            };
            let mut said = message(kind)
                .with_id(id.into())
                .with_flags(u32::from(flags));
            for (index, byte) in arg.into_iter().enumerate() {
                said = said.with_arg(index, number(byte));
            }
            let ranges: Vec<WindowRange> = ranges
                .into_iter()
                .take(4)
                .map(|(at, len)| WindowRange {
                    offset: u64::from(at % 20) * GRANULE,
                    len: u64::from(len % 20) * GRANULE,
                })
                .collect();
            judge.say(who, &said.with_ranges(&ranges), &attached);
        }
        Step::Babble {
            who,
            kind,
            id,
            arg,
            flags,
            ranges,
        } => {
            let mut said = message(kind).with_id(id).with_flags(flags);
            for (index, number) in arg.into_iter().enumerate() {
                said = said.with_arg(index, number);
            }
            let ranges: Vec<WindowRange> = ranges
                .into_iter()
                .take(4)
                .map(|(offset, len)| WindowRange { offset, len })
                .collect();
            judge.say(who, &said.with_ranges(&ranges), &Attached::Nothing);
        }
        Step::Bytes { who, bytes } => judge.peer(who).send(&bytes, &Attached::Nothing),
        Step::Lease {
            who,
            granules,
            tagged,
        } => {
            let tag = if tagged { TAG } else { ExtentTag::NULL };
            let said = Message::new(Kind::Lease).with_arg(0, u64::from(granules % 20) * GRANULE);
            judge.say(who, &said.with_tag(tag), &Attached::Nothing);
        }
        Step::GiveBack { who, granules } => {
            let held = judge.held(who).take(usize::from(granules % 28));
            let ranges: Vec<WindowRange> = held
                .map(|granule| WindowRange {
                    offset: granule * GRANULE,
                    len: GRANULE,
                })
                .collect();
            let said = Message::new(Kind::Return).with_ranges(&ranges);
            judge.say(who, &said, &Attached::Nothing);
        }
        Step::Release {
            granules,
            deadline_ms,
        } => judge.order(
            format!(
                r#"{{"op":"release","target":{{"bytes":{}}},"deadline_ms":{deadline_ms}}}"#,
                u64::from(granules % 20) * GRANULE
            )
            .into_bytes(),
        ),
        Step::Add { granules } => judge.order(
            format!(
                r#"{{"op":"add","sizes":[{}],"tag":null}}"#,
                u64::from(granules % 8) * GRANULE
            )
            .into_bytes(),
        ),
        Step::Request { json } => judge.order(json),
        Step::Leave { who } => judge.leave(who),
        Step::Pause => thread::sleep(Duration::from_millis(1)),
    }
    judge.hear();
}

fn broker(model: &SoftwareDevice) -> Broker {
    let mut device = DcDevice::open(model.mmio(), fuzz::impatient()).expect("it opens");
    let mut fabric = model.fabric();
    let [first, second, tagged] = OFFERED.map(|granules| granules * GRANULE);
    for (sizes, tag) in [(&[first, second][..], ExtentTag::NULL), (&[tagged], TAG)] {
        Orchestrator::add(&mut fabric, sizes, tag).expect("there is room");
        device.poll().expect("it answers");
    }
    assert_eq!(device.accepted().len(), OFFERED.len());
    // Nobody looks at the memory.
    let window = Window::hollow(device.dc_span().len).expect("a memfd");
    let config = BrokerConfig {
        recall_deadline: Duration::from_millis(20),
        warm_reserve: 0,
        ..BrokerConfig::default()
    };
    Broker::new(Box::new(device), Some(Box::new(fabric)), window, config).expect("it starts")
}

fuzz_target!(|steps: Vec<Step>| {
    let model = SoftwareDevice::new(ModelConfig::one_region(GRANULES * GRANULE)).expect("a memfd");
    let mut broker = broker(&model);
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("broker");
    let listener = Listener::bind(&path, false).expect("a socket");
    let stop = Stop::new().expect("a descriptor");
    let ending = stop.clone();
    let serving = thread::spawn(move || broker.serve(&listener, &ending).expect("poll works"));

    let hello = |role: Role| Message::new(Kind::Hello).with_arg(0, role as u64);
    let mut judge = Judge::new(
        || Peer::connect(&path),
        [
            hello(Role::Client),
            hello(Role::Client),
            hello(Role::Reader),
        ],
        hello(Role::Admin),
    );
    for step in steps.into_iter().take(MOST_STEPS) {
        take(&mut judge, step);
    }

    // An operator who behaves is answered, whatever the others have said.
    let admin = AdminClient::connect(&path).expect("the broker takes operators");
    let before = judge.held_by_all();
    let AdminReply::Status(status) = admin
        .ask(&AdminRequest::Status, PATIENCE)
        .expect("an answer")
    else {
        panic!("no status");
    };
    judge.hear();
    judge.check(&status, &before);
    stop.now();
    serving.join().expect("the broker lives");
});
