//! Everything at once: random offers, releases, losses, faults and crashes.

use std::time::Duration;

use dax_backend::model::FaultKind;
use proptest::prelude::*;

use crate::bench::on_qemu;
use crate::course::{Step, Storm};

fn step() -> impl Strategy<Value = Step> {
    let opcode = prop::sample::select(vec![0x0100, 0x0101, 0x4800, 0x4801, 0x4802, 0x4803]);
    let kind = prop_oneof![
        prop::sample::select(vec![0x04, 0x05, 0x06, 0x1d, 0x7777]).prop_map(FaultKind::ReturnCode),
        Just(FaultKind::Hang),
        Just(FaultKind::HangExecuted),
        (0..300u32).prop_map(FaultKind::OutputLength),
        Just(FaultKind::Delay(Duration::from_millis(3))),
        Just(FaultKind::GenerationChange),
    ];
    prop_oneof![
        4 => (1..12u64, 0..4u8).prop_map(|(count, tag)| Step::Offer { count, tag }),
        1 => (any::<u64>(), any::<u64>()).prop_map(|(start, len)| Step::OfferNonsense { start, len }),
        2 => (2..6u64).prop_map(|count| Step::OfferSlowly { count }),
        2 => (any::<usize>(), any::<bool>())
            .prop_map(|(which, forced)| Step::TakeBack { which, forced }),
        3 => any::<usize>().prop_map(|which| Step::GiveBack { which }),
        3 => (opcode, kind).prop_map(|(opcode, kind)| Step::Fault { opcode, kind }),
        1 => Just(Step::Restart),
        6 => Just(Step::Poll),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn device_and_driver_agree_after_any_storm(steps in prop::collection::vec(step(), 1..60)) {
        if on_qemu() {
            println!("SKIPPED: only the software device can do it: the device goes wrong on order");
            return Ok(());
        }
        let mut storm = Storm::new();
        for step in steps {
            storm.take(step);
        }
        storm.end();
    }
}
