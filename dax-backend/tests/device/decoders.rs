//! Programming HDM decoders.

use dax_backend::address::{Dpa, Hpa, HpaWindow};
use dax_backend::capacity::CapacityDevice;
use dax_backend::error::DecoderError;
use dax_backend::model::{ModelConfig, ModelRegion};

use crate::bench::{MIB, config, only_on_the_model, opened, range, test_device};
use crate::wire::{Plug, tapped};

const GIB: u64 = 1 << 30;
const WINDOW: HpaWindow = HpaWindow {
    base: Hpa(0x4_9000_0000),
    len: 8 * GIB,
};

#[test]
fn first_decoder_skips_static_memory() {
    only_on_the_model!("a look into the device");
    let (device, mut driver) = opened();
    assert_eq!(device.model().decode(WINDOW.base), None);
    let decoded = driver.program_decoder(WINDOW).unwrap();
    assert_eq!(decoded.base, WINDOW.base);
    assert_eq!(decoded.dpa, range(512 * MIB, GIB));
    assert_eq!(
        decoded.hpa(Dpa(512 * MIB + 0x1234)),
        Some(Hpa(WINDOW.base.0 + 0x1234))
    );
    assert_eq!(decoded.hpa(Dpa(0)), None);
    assert_eq!(device.model().decode(WINDOW.base), Some(decoded.dpa.start));
}

#[test]
fn decoder_covers_whole_decode_lengths() {
    only_on_the_model!("a device made for the test");
    let device = test_device(ModelConfig {
        dc_regions: vec![ModelRegion::of(300 * MIB), ModelRegion::of(10 * MIB)],
        ..ModelConfig::default()
    });
    let mut driver = device.open();
    assert_eq!(driver.regions().len(), 2);
    assert_eq!(driver.dc_span(), range(512 * MIB, 512 * MIB + 10 * MIB));
    let decoded = driver.program_decoder(WINDOW).unwrap();
    assert_eq!(decoded.dpa, range(512 * MIB, 768 * MIB));
    assert_eq!(device.model().memory_span(), decoded.dpa);
}

#[test]
fn decoder_behind_firmware_s_skips_nothing() {
    only_on_the_model!("decoders that firmware has set");
    let (device, mut driver) = opened();
    device
        .fabric()
        .commit_decoder(0, WINDOW.base.0, 512 * MIB, 0);
    let window = HpaWindow {
        base: Hpa(WINDOW.base.0 + GIB),
        len: GIB,
    };
    let decoded = driver.program_decoder(window).unwrap();
    assert_eq!(
        (decoded.base, decoded.dpa),
        (window.base, range(512 * MIB, GIB))
    );
    assert_eq!(device.model().decode(window.base), Some(Dpa(512 * MIB)));
    // Again, as after a restart: what is committed is found and used.
    assert_eq!(driver.program_decoder(WINDOW).unwrap(), decoded);
}

#[test]
fn decoders_rise_in_hpa_and_dpa() {
    only_on_the_model!("decoders that firmware has set");
    let (device, mut driver) = opened();
    device
        .fabric()
        .commit_decoder(0, WINDOW.base.0, 512 * MIB, 0);
    let below = HpaWindow {
        base: Hpa(0),
        len: GIB,
    };
    let error = driver.program_decoder(below).unwrap_err();
    assert!(
        matches!(
            error,
            DecoderError::OutOfOrder {
                decoder: 0,
                what: "HPA",
                ..
            }
        ),
        "{error}"
    );
    let (device, mut driver) = opened();
    device.fabric().commit_decoder(0, WINDOW.base.0, GIB, 0);
    let window = HpaWindow {
        base: Hpa(WINDOW.base.0 + GIB),
        len: GIB,
    };
    let error = driver.program_decoder(window).unwrap_err();
    assert!(
        matches!(
            error,
            DecoderError::OutOfOrder {
                decoder: 0,
                what: "DPA",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn window_must_be_large_enough_and_aligned() {
    let (_device, mut driver) = opened();
    let small = HpaWindow {
        len: GIB - 256 * MIB,
        ..WINDOW
    };
    let error = driver.program_decoder(small).unwrap_err();
    assert!(
        matches!(error, DecoderError::WindowTooSmall { .. }),
        "{error}"
    );
    let crooked = HpaWindow {
        base: Hpa(WINDOW.base.0 + MIB),
        ..WINDOW
    };
    let error = driver.program_decoder(crooked).unwrap_err();
    assert!(
        matches!(
            error,
            DecoderError::Unaligned {
                what: "window base",
                ..
            }
        ),
        "{error}"
    );
    driver.program_decoder(WINDOW).unwrap();
}

#[test]
fn taken_decoders_and_missing_devices_are_told() {
    only_on_the_model!("decoders that firmware has set");
    let (device, mut driver) = opened();
    for index in 0..4 {
        let base = index as u64 * 256 * MIB;
        device.fabric().commit_decoder(
            index,
            base,
            256 * MIB,
            if index == 0 { 4 * GIB } else { 0 },
        );
    }
    let error = driver.program_decoder(WINDOW).unwrap_err();
    assert!(
        matches!(error, DecoderError::NoneFree { count: 4 }),
        "{error}"
    );

    let plug = Plug::default();
    let device = test_device(ModelConfig::default());
    let wire = tapped(device.mmio(), plug.clone());
    let mut driver = dax_backend::device::DcDevice::open(wire, config()).unwrap();
    plug.pull();
    let error = driver.program_decoder(WINDOW).unwrap_err();
    assert!(matches!(error, DecoderError::NoCapability), "{error}");
}
