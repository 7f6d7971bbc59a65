//! Section "answering": what goes into an Add Dynamic Capacity Response.

use dax_backend::capacity::CapacityDevice;

use crate::bench::{opened, outcome};

/// Must-show 3: a group of three is answered by one command, and its extents can be used.
#[test]
fn answering_a_group_of_three_takes_one_command() {
    let (device, mut driver) = opened();
    let offered = device.offer(&[
        device.blocks(0, 4),
        device.blocks(8, 2),
        device.blocks(16, 1),
    ]);
    let (accepted, rejected) = outcome(&driver.poll().unwrap());
    assert_eq!(accepted, offered);
    assert!(rejected.is_empty());
    assert_eq!(driver.accepted(), offered);
    assert_eq!(device.model.audit().answers_to(0), 1);
    device.assert_settled(&driver);
}
