//! Orchestrators as the broker uses them, before a device: the software device's own, QEMU's monitor.

use std::time::{Duration, Instant};

use dax_backend::address::DpaRange;
use dax_backend::capacity::{CapacityDevice, DeviceEvent};
use dax_backend::extent::ExtentTag;
use dax_backend::orchestrator::OrchestratorError;

use crate::bench::{BLOCK, Driver, opened};

/// Polls until events and driver are as wanted.
fn until(driver: &mut Driver, wanted: impl Fn(&Driver, &[DeviceEvent]) -> bool) {
    let start = Instant::now();
    loop {
        let events = driver.poll().expect("the device works");
        if wanted(driver, &events) {
            return;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "it never comes");
    }
}

#[test]
fn what_an_orchestrator_adds_is_accepted_and_what_it_wants_back_is_heard() {
    let (device, mut driver) = opened();
    let Some(mut orchestrator) = device.orchestrator(driver.regions()) else {
        println!("SKIPPED: QEMU's monitor has no socket inside its guest");
        return;
    };
    let mut offered: Vec<DpaRange> = Vec::new();
    // The second offer is made while the host has not answered the first, by one who does not know that.
    for sizes in [&[4 * BLOCK, BLOCK][..], &[2 * BLOCK]] {
        orchestrator.held(driver.accepted());
        let extents = orchestrator.add(sizes, ExtentTag::NULL).expect("capacity");
        let lengths: Vec<u64> = extents.iter().map(|extent| extent.range.len).collect();
        assert_eq!(lengths, sizes);
        offered.extend(extents.iter().map(|extent| extent.range));
    }
    until(&mut driver, |driver, _| driver.accepted().len() == 3);
    let mut accepted: Vec<DpaRange> = driver.accepted().iter().map(|e| e.range).collect();
    offered.sort_by_key(|range| range.start);
    accepted.sort_by_key(|range| range.start);
    assert_eq!(accepted, offered);

    let first = accepted[0];
    orchestrator.release(&[first], false).expect("a request");
    let asked = |event: &DeviceEvent| matches!(event, DeviceEvent::ReleaseRequested { range, .. } if *range == first);
    until(&mut driver, |_, events| events.iter().any(asked));

    orchestrator.held(driver.accepted());
    let error = orchestrator.add(&[4 << 30], ExtentTag::NULL).unwrap_err();
    assert!(
        matches!(error, OrchestratorError::NoCapacity { .. }),
        "{error}"
    );
}
