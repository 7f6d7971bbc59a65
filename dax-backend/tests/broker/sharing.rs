//! Tags: capacity for who asks for it by name, and capacity that other hosts share.

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use dax_backend::broker::admin::{AdminReply, AdminRequest, ReleaseTarget, SharedOffer};
use dax_backend::broker::receipt::{DpaSpan, HexDpa};
use dax_backend::broker::{
    FromBroker, GRANULE, Receipt, RefusalReason, SharedCode, SharedMapping, SharedOpenError,
};
use dax_backend::extent::ExtentTag;
use dax_backend::model::{AddPolicy, AddRequest};
use dax_backend::orchestrator::Orchestrator;
use uuid::Uuid;

use crate::process::Forked;
use crate::rig::{Rig, total};

const SOON: Duration = Duration::from_secs(5);
const TAG: u128 = 0x5a5a_0001;

fn tag(number: u128) -> ExtentTag {
    Uuid::from_u128(number).into()
}

/// Has extents of these granules offered under `TAG`, filled by "another host":
/// each byte says which granule of the tag it is in.
fn share(rig: &Rig, granules: &[u64]) -> Vec<u8> {
    let all: u64 = granules.iter().sum();
    let content: Vec<u8> = (0..all * GRANULE)
        .map(|at| 1 + (at / GRANULE) as u8)
        .collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), &content).unwrap();
    let request = AdminRequest::Add {
        sizes: granules.iter().map(|count| count * GRANULE).collect(),
        tag: Some(Uuid::from_u128(TAG)),
        shared: Some(SharedOffer {
            content: Some(file.path().to_owned()),
        }),
    };
    match rig.ask(&request).unwrap() {
        AdminReply::Added(added) => assert_eq!(added.accepted.len(), granules.len()),
        other => panic!("{other:?}"),
    }
    content
}

fn open(rig: &Rig) -> Result<SharedMapping, SharedOpenError> {
    SharedMapping::open(&rig.socket(), 0, tag(TAG))
}

fn read(mapping: &SharedMapping) -> Vec<u8> {
    // SAFETY: mapped until it is dropped, and nobody writes there.
    unsafe { mapping.bytes().as_ref() }.to_vec()
}

/// What the device has there, as every host sees it.
fn content_of(rig: &Rig, granules: usize) -> Vec<u8> {
    let file = fs::File::from(rig.model.memory().try_clone_to_owned().unwrap());
    let mut bytes = vec![0; granules * GRANULE as usize];
    file.read_exact_at(&mut bytes, 256 << 20).unwrap();
    bytes
}

fn shared_range(rig: &Rig, granules: u64) -> DpaSpan {
    DpaSpan {
        dpa: HexDpa(rig.model.memory_span().start.0 + (256 << 20)),
        len: granules * GRANULE,
    }
}

fn release(rig: &Rig, granules: u64) -> Receipt {
    rig.release(ReleaseTarget::Range(shared_range(rig, granules)), 300)
}

#[test]
fn tagged_capacity_is_for_who_asks_for_its_tag() {
    let rig = Rig::new(&[2]);
    let mut fabric = rig.model.fabric();
    Orchestrator::add(&mut fabric, &[3 * GRANULE], tag(9)).unwrap();
    rig.until(SOON, |status| status.capacity.accepted == 5 * GRANULE);
    let client = rig.client();
    let (untagged, exhausted) = client.lease(5);
    assert_eq!((total(&untagged), exhausted), (2 * GRANULE, true));
    let (tagged, exhausted) = client.lease_of(tag(9), 2);
    assert_eq!((total(&tagged), exhausted), (2 * GRANULE, false));
    let (rest, exhausted) = client.lease_of(tag(9), 2);
    assert_eq!((total(&rest), exhausted), (GRANULE, true));
    assert_eq!(client.lease_of(tag(8), 1), (vec![], true));
    // It is told when some of a tag that it lacks is there, and by nothing else.
    client.give_back(&tagged[..1]);
    assert_eq!(client.next(), FromBroker::CapacityAvailable);
    assert_eq!(total(&client.lease_of(tag(9), 1).0), GRANULE);
}

#[test]
fn shared_capacity_is_mapped_as_other_hosts_wrote_it() {
    let rig = Rig::with_shared(&[4]);
    let content = share(&rig, &[2, 1, 3]);
    let mapping = open(&rig).unwrap();
    let second = open(&rig).unwrap();
    assert!(read(&mapping) == content && read(&second) == content);
    let address = mapping.bytes().cast::<u8>().as_ptr().addr();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps
        .lines()
        .find(|line| line.starts_with(&format!("{address:x}-")));
    assert!(line.unwrap().contains(" r--s "), "{line:?}");
    let status = rig.status();
    assert_eq!(status.capacity.shared, 6 * GRANULE);
    assert_eq!(
        (status.shared[0].bytes, status.shared[0].extents),
        (6 * GRANULE, 3)
    );
    assert_eq!(status.shared[0].pids, [std::process::id(); 2]);
    // Nobody gets any of it to write on, whatever is asked for.
    let client = rig.client();
    assert_eq!(total(&client.lease(64).0), 4 * GRANULE);
    assert_eq!(client.lease_of(tag(TAG), 1), (vec![], true));
    assert!(read(&mapping) == content);
}

#[test]
fn shared_extents_are_mapped_in_sequence_not_in_order_of_address() {
    let rig = Rig::with_shared(&[]);
    let at = |granule: u64| dax_backend::address::DpaRange {
        start: dax_backend::address::Dpa(shared_range(&rig, 1).dpa.0 + granule * GRANULE),
        len: GRANULE,
    };
    let file = fs::File::from(rig.model.memory().try_clone_to_owned().unwrap());
    for (granule, byte) in [(5u64, 1u8), (0, 2), (9, 3)] {
        let offset = (256 << 20) + granule * GRANULE;
        file.write_all_at(&vec![byte; GRANULE as usize], offset)
            .unwrap();
    }
    let request = AddRequest {
        policy: AddPolicy::Prescriptive(vec![at(5), at(0), at(9)]),
        region: 1,
        tag: tag(TAG),
    };
    rig.model.fabric().add(&request).unwrap();
    rig.until(SOON, |status| status.shared.len() == 1);
    let bytes = read(&open(&rig).unwrap());
    let firsts: Vec<u8> = bytes
        .chunks(GRANULE as usize)
        .map(|granule| granule[0])
        .collect();
    assert_eq!(firsts, [1, 2, 3]);
}

#[test]
fn what_cannot_be_shared_is_refused_by_name() {
    let rig = Rig::with_shared(&[]);
    let refused = |number| match SharedMapping::open(&rig.socket(), 0, tag(number)) {
        Err(SharedOpenError::Refused(code)) => code,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(TAG), SharedCode::NoTag);
    assert_eq!(refused(0), SharedCode::NoTag);
    Orchestrator::add(&mut rig.model.fabric(), &[GRANULE], tag(7)).unwrap();
    rig.until(SOON, |status| status.capacity.accepted == GRANULE);
    assert_eq!(refused(7), SharedCode::NotShared);
    let untagged = AdminRequest::Add {
        sizes: vec![GRANULE],
        tag: None,
        shared: Some(SharedOffer::default()),
    };
    let error = rig.ask(&untagged).unwrap_err().to_string();
    assert!(error.contains("--tag"), "{error}");
}

#[test]
fn a_tag_of_one_extent_is_shared_if_its_region_is() {
    let rig = Rig::with_shared(&[]);
    let content = share(&rig, &[1]);
    assert_eq!(rig.client().lease_of(tag(TAG), 1), (vec![], true));
    assert!(read(&open(&rig).unwrap()) == content);
}

#[test]
fn a_mapped_tag_is_released_by_nobody_until_it_is_let_go() {
    let rig = Rig::with_shared(&[4]);
    let content = share(&rig, &[2, 2]);
    let mapping = open(&rig).unwrap();
    let receipt = release(&rig, 4);
    assert_eq!(receipt.returned, 0);
    let kept = &receipt.refused[0];
    assert_eq!(
        (kept.reason, kept.pid),
        (RefusalReason::SharedMapped, Some(std::process::id()))
    );
    assert_eq!(receipt.refused_bytes(), 4 * GRANULE);
    // Nor is it taken for a number of bytes, mapped or not.
    let all = rig.release(ReleaseTarget::Bytes(8 * GRANULE), 300);
    assert_eq!(all.returned, 4 * GRANULE);
    assert_eq!(all.refused[0].reason, RefusalReason::Shared);
    assert!(read(&mapping) == content);
    drop(mapping);
    let receipt = release(&rig, 4);
    assert_eq!(receipt.returned, 4 * GRANULE, "{receipt:?}");
    assert_eq!(rig.status().shared, []);
    // The other hosts have it still.
    assert!(content_of(&rig, 4) == content);
}

#[test]
fn what_the_device_asks_back_goes_when_the_last_reader_does() {
    let rig = Rig::with_shared(&[]);
    share(&rig, &[2]);
    // First, so that it does not inherit the other mapping, which would be as good.
    let socket = rig.socket();
    let mut reading = Forked::run(|| {
        let opened = SharedMapping::open(&socket, 0, tag(TAG));
        u8::from(opened.map(std::mem::forget).is_ok())
    });
    assert_eq!(reading.answer(), 1);
    let mapping = open(&rig).unwrap();
    let range = shared_range(&rig, 2);
    let range = dax_backend::address::DpaRange {
        start: dax_backend::address::Dpa(range.dpa.0),
        len: range.len,
    };
    Orchestrator::release(&mut rig.model.fabric(), &[range], false).unwrap();
    let status = rig.until(SOON, |status| !status.receipts.is_empty());
    assert_eq!(
        status.receipts[0].refused[0].reason,
        RefusalReason::SharedMapped
    );
    // From now on nobody new may map it.
    let refused = open(&rig).unwrap_err();
    assert_eq!(refused, SharedOpenError::Refused(SharedCode::AskedBack));
    drop(mapping);
    rig.until(SOON, |status| {
        status.shared[0].pids == [reading.pid.cast_unsigned()]
    });
    reading.kill();
    rig.until(SOON, |status| status.capacity.accepted == 0);
}

#[test]
fn a_forced_release_loses_it_and_says_so() {
    let rig = Rig::with_shared(&[]);
    let content = share(&rig, &[2]);
    let mapping = open(&rig).unwrap();
    assert!(!mapping.is_lost());
    let force = AdminRequest::Release {
        target: ReleaseTarget::Range(shared_range(&rig, 2)),
        deadline_ms: 100,
        force: true,
        past_deadline: false,
        progress: false,
    };
    let AdminReply::Receipt(receipt) = rig.ask(&force).unwrap() else {
        panic!("no receipt");
    };
    let lost = &receipt.refused[0];
    assert_eq!(
        (lost.reason, lost.pid),
        (RefusalReason::Lost, Some(std::process::id()))
    );
    assert!(mapping.is_lost());
    // Lent anew, it is nobody's as long as it is mapped, and nobody writes there.
    let range = dax_backend::address::DpaRange {
        start: dax_backend::address::Dpa(shared_range(&rig, 2).dpa.0),
        len: 2 * GRANULE,
    };
    let request = AddRequest {
        policy: AddPolicy::Prescriptive(vec![range]),
        region: 1,
        tag: tag(3),
    };
    rig.model.fabric().add(&request).unwrap();
    rig.until(SOON, |status| status.capacity.accepted == 2 * GRANULE);
    assert!(read(&mapping) == content);
    let status = rig.status();
    assert_eq!(
        (status.capacity.lost, status.capacity.shared),
        (2 * GRANULE, 0)
    );
    drop(mapping);
    let status = rig.until(SOON, |status| status.capacity.lost == 0);
    assert_eq!(status.capacity.shared, 2 * GRANULE);
}

#[test]
fn readers_outlive_a_broker() {
    let mut rig = Rig::with_shared(&[]);
    let content = share(&rig, &[1, 1]);
    let mapping = open(&rig).unwrap();
    rig.restart(|_| ());
    assert_eq!(rig.status().shared[0].pids, [std::process::id()]);
    assert_eq!(
        release(&rig, 2).refused[0].reason,
        RefusalReason::SharedMapped
    );
    // Taken while there is no broker: the next one finds out.
    let range = shared_range(&rig, 2);
    rig.restart(|model| {
        let range = dax_backend::address::DpaRange {
            start: dax_backend::address::Dpa(range.dpa.0),
            len: range.len,
        };
        Orchestrator::release(&mut model.fabric(), &[range], true).unwrap();
    });
    rig.until(SOON, |status| status.capacity.lost == 2 * GRANULE);
    assert!(mapping.is_lost());
    assert!(read(&mapping) == content);
    drop(mapping);
    rig.until(SOON, |status| status.capacity.lost == 0);
}
