//! The fabric manager's side of the model: what it offers, and what it refuses.

use dax_backend::capacity::CapacityDevice;
use dax_backend::extent::ExtentTag;
use dax_backend::model::{AddPolicy, AddRequest, FabricError, ModelConfig, ReleasePolicy};
use dax_backend::orchestrator::{Orchestrator, OrchestratorError};

use crate::bench::{BLOCK, MIB, TestDevice, only_on_the_model, opened, ranges, tag, test_device};

fn add(device: &TestDevice, policy: AddPolicy) -> Result<usize, FabricError> {
    let request = AddRequest {
        policy,
        region: 0,
        tag: ExtentTag::NULL,
    };
    device.fabric().add(&request).map(|extents| extents.len())
}

/// Blocks 2, 3 and 6 onwards of eight are free.
fn fragmented() -> TestDevice {
    let device = test_device(ModelConfig::one_region(8 * BLOCK));
    device.offer(&[device.blocks(0, 2), device.blocks(4, 2)]);
    device
}

#[test]
fn free_capacity_may_come_in_pieces() {
    only_on_the_model!("a look into the device");
    let device = fragmented();
    assert_eq!(
        add(&device, AddPolicy::Free(vec![2 * BLOCK, 2 * BLOCK])),
        Ok(2)
    );
    let device = fragmented();
    assert_eq!(add(&device, AddPolicy::Free(vec![3 * BLOCK])), Ok(2));
    assert_eq!(
        add(&device, AddPolicy::Free(vec![2 * BLOCK])),
        Err(FabricError::NoCapacity {
            wanted: 2 * BLOCK,
            available: BLOCK
        })
    );
}

#[test]
fn contiguous_capacity_comes_in_one_piece_or_not_at_all() {
    only_on_the_model!("a look into the device");
    let device = fragmented();
    assert_eq!(
        add(&device, AddPolicy::Contiguous(vec![3 * BLOCK])),
        Err(FabricError::NoCapacity {
            wanted: 3 * BLOCK,
            available: 2 * BLOCK
        })
    );
    assert_eq!(add(&device, AddPolicy::Contiguous(vec![2 * BLOCK])), Ok(1));
}

#[test]
fn what_makes_no_sense_is_refused() {
    only_on_the_model!("a region is changed");
    let device = fragmented();
    let refused = |policy| add(&device, policy).unwrap_err();
    assert_eq!(refused(AddPolicy::Free(vec![])), FabricError::Empty);
    assert_eq!(refused(AddPolicy::Free(vec![0])), FabricError::Empty);
    let misaligned = FabricError::Misaligned {
        len: MIB,
        block_size: BLOCK,
    };
    assert_eq!(refused(AddPolicy::Free(vec![MIB])), misaligned);
    let range = device.blocks(1, 2);
    assert_eq!(
        refused(AddPolicy::Prescriptive(vec![range])),
        FabricError::NotFree { range }
    );
    let range = device.blocks(6, 4);
    let outside = refused(AddPolicy::Prescriptive(vec![range]));
    assert_eq!(
        outside,
        FabricError::NotInRegion {
            range,
            region: 0,
            block_size: BLOCK
        }
    );
    let request = AddRequest {
        policy: AddPolicy::Free(vec![BLOCK]),
        region: 3,
        tag: ExtentTag::NULL,
    };
    let missing = FabricError::NoSuchRegion {
        region: 3,
        regions: 1,
    };
    assert_eq!(device.fabric().add(&request), Err(missing));
    let pending = ReleasePolicy::Prescriptive(vec![device.blocks(0, 2)]);
    assert_eq!(
        device.fabric().release(&pending, false),
        Err(FabricError::NotAccepted {
            range: device.blocks(0, 2)
        })
    );
    assert_eq!(
        device.fabric().release(&ReleasePolicy::Tag(tag(1)), false),
        Err(FabricError::NoSuchTag { tag: tag(1) })
    );
    assert_eq!(
        device.fabric().update_region(0, BLOCK),
        Err(FabricError::RegionInUse { region: 0 })
    );
    assert_eq!(device.model().audit().groups_offered, 1);
}

#[test]
fn orchestrator_offers_sizes_as_one_group() {
    only_on_the_model!("a look into the device");
    let (device, mut driver) = opened();
    let mut orchestrator = device.fabric().clone();
    let offered = orchestrator.add_sizes(&[256 * MIB, 128 * MIB, 2 * MIB]);
    driver.poll().unwrap();
    assert_eq!(ranges(driver.accepted()), offered);
    assert_eq!(device.model().audit().groups_offered, 1);
    let error = Orchestrator::add(&mut orchestrator, &[1 << 30], tag(1)).unwrap_err();
    assert!(
        matches!(error, OrchestratorError::NoCapacity { .. }),
        "{error}"
    );
    Orchestrator::release(&mut orchestrator, &offered[..1], true).unwrap();
    driver.poll().unwrap();
    assert_eq!(ranges(driver.accepted()), offered[1..]);
    device.assert_settled(&driver);
}

trait AddSizes {
    fn add_sizes(&mut self, sizes: &[u64]) -> Vec<dax_backend::address::DpaRange>;
}

impl<T: Orchestrator> AddSizes for T {
    fn add_sizes(&mut self, sizes: &[u64]) -> Vec<dax_backend::address::DpaRange> {
        ranges(&self.add(sizes, ExtentTag::NULL).unwrap())
    }
}

#[test]
fn region_of_any_whole_blocks_works() {
    only_on_the_model!("a device made for the test");
    for len in [2 * MIB, 254 * MIB, 256 * MIB, 258 * MIB, 512 * MIB, 1 << 30] {
        let device = test_device(ModelConfig::one_region(len));
        let mut driver = device.open();
        assert_eq!(driver.dc_span().len, len);
        let mut orchestrator = device.fabric().clone();
        orchestrator.add_sizes(&[len]);
        driver.poll().unwrap();
        assert_eq!(driver.accepted()[0].range.len, len);
        device.assert_settled(&driver);
    }
}
