//! Registers of a sound device, some of which say something else.
#![no_main]

use std::collections::BTreeMap;
use std::time::Duration;

use arbitrary::Arbitrary;
use dax_backend::address::{Hpa, HpaWindow};
use dax_backend::capacity::CapacityDevice;
use dax_backend::device::DcDevice;
use dax_backend::mmio::{Mmio, RegisterBlock};
use dax_backend::model::{ModelConfig, ModelMmio, SoftwareDevice};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input {
    /// By dword of the component and of the device block.
    component: Vec<(u16, u32)>,
    device: Vec<(u16, u32)>,
    /// Of host addresses, in 256 MiB.
    window: (u8, u8),
}

struct Patched {
    real: ModelMmio,
    component: BTreeMap<u32, u32>,
    device: BTreeMap<u32, u32>,
}

impl Patched {
    fn patch(&self, block: RegisterBlock, offset: u32) -> Option<u32> {
        let patches = match block {
            RegisterBlock::Component => &self.component,
            RegisterBlock::Device => &self.device,
        };
        patches.get(&offset).copied()
    }
}

impl Mmio for Patched {
    fn block_len(&self, block: RegisterBlock) -> u32 {
        self.real.block_len(block)
    }

    fn read32(&mut self, block: RegisterBlock, offset: u32) -> u32 {
        assert!(
            offset.is_multiple_of(4),
            "{block:?}: a read of 4 bytes at {offset:#x}"
        );
        self.patch(block, offset)
            .unwrap_or_else(|| self.real.read32(block, offset))
    }

    fn read64(&mut self, block: RegisterBlock, offset: u32) -> u64 {
        assert!(
            offset.is_multiple_of(8),
            "{block:?}: a read of 8 bytes at {offset:#x}"
        );
        let real = self.real.read64(block, offset);
        let low = self.patch(block, offset).unwrap_or(real as u32);
        let high = self.patch(block, offset + 4).unwrap_or((real >> 32) as u32);
        u64::from(high) << 32 | u64::from(low)
    }

    fn write32(&mut self, block: RegisterBlock, offset: u32, value: u32) {
        assert!(
            offset.is_multiple_of(4),
            "{block:?}: a write of 4 bytes at {offset:#x}"
        );
        self.real.write32(block, offset, value);
    }

    fn write64(&mut self, block: RegisterBlock, offset: u32, value: u64) {
        assert!(
            offset.is_multiple_of(8),
            "{block:?}: a write of 8 bytes at {offset:#x}"
        );
        self.real.write64(block, offset, value);
    }

    fn read_payload(&mut self, offset: u32, payload: &mut [u8]) {
        self.real.read_payload(offset, payload);
    }

    fn write_payload(&mut self, offset: u32, payload: &[u8]) {
        self.real.write_payload(offset, payload);
    }
}

fuzz_target!(|input: Input| {
    let model = SoftwareDevice::new(ModelConfig::one_region(256 << 20)).unwrap();
    let by_offset = |patches: &[(u16, u32)]| {
        let patches = patches.iter();
        patches
            .map(|(dword, value)| (u32::from(*dword) * 4, *value))
            .collect()
    };
    let mmio = Patched {
        real: model.mmio(),
        component: by_offset(&input.component),
        device: by_offset(&input.device),
    };
    let mut config = fuzz::impatient();
    config.ready_timeout = Duration::ZERO;
    let mut driver = match DcDevice::open(mmio, config) {
        Ok(driver) => driver,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let _ = driver.poll();
    let _ = driver.decoded();
    let unit = 256 << 20;
    let window = HpaWindow {
        base: Hpa(u64::from(input.window.0) * unit),
        len: u64::from(input.window.1) * unit,
    };
    if let Ok(decoded) = driver.program_decoder(window) {
        let span = driver.decode_span();
        assert!(decoded.hpa(span.start).is_some());
    }
    let _ = driver.enable_interrupts(true);
});
