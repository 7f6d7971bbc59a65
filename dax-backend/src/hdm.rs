//! Programming the device's HDM decoder, so that host addresses reach the DC regions.

#![forbid(unsafe_code)]

use std::time::Duration;

use crate::address::{Dpa, DpaRange, Hpa, HpaWindow};
use crate::error::DecoderError;
use crate::mailbox::wait;
use crate::mmio::{Mmio, RegisterBlock};
use crate::regs::capability::{COMPONENT_CACHE_MEM, ComponentArray, ComponentHeader, HDM_DECODER};
use crate::regs::hdm_decoder::{
    BASE_HIGH, BASE_LOW, CAPABILITY, CONTROL, DECODER_LEN, DECODERS, DecoderCapability,
    DecoderControl, GLOBAL_CONTROL, GRANULARITY, GlobalControl, SIZE_HIGH, SIZE_LOW, SKIP_HIGH,
    SKIP_LOW,
};

/// A commit takes 10 ms at most by the specification; Linux waits twice that.
const COMMIT_TIMEOUT: Duration = Duration::from_millis(20);

/// Host addresses that reach device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodedWindow {
    /// Where the host finds the first byte.
    pub base: Hpa,
    /// What is found there.
    pub dpa: DpaRange,
}

impl DecodedWindow {
    /// Where the host finds `dpa`; `None` if it is not decoded.
    pub fn hpa(&self, dpa: Dpa) -> Option<Hpa> {
        self.dpa
            .contains_address(dpa)
            .then(|| Hpa(self.base.0 + (dpa.0 - self.dpa.start.0)))
    }
}

/// The HDM decoders of an endpoint.
pub struct Decoders<'a, M> {
    mmio: &'a mut M,
    /// Offset of the capability in the component block.
    offset: u32,
    count: u8,
}

impl<'a, M: Mmio> Decoders<'a, M> {
    /// Finds the decoders in the component registers.
    ///
    /// # Errors
    /// [`DecoderError::NoCapability`]
    pub fn find(mmio: &'a mut M) -> Result<Self, DecoderError> {
        let block = RegisterBlock::Component;
        let len = mmio.block_len(block);
        let array = ComponentArray::from_bits(mmio.read32(block, COMPONENT_CACHE_MEM));
        if array.id() != 1 {
            return Err(DecoderError::NoCapability);
        }
        for index in 1..=u32::from(array.count()) {
            let raw = mmio.read32(block, COMPONENT_CACHE_MEM + 4 * index);
            let header = ComponentHeader::from_bits(raw);
            if header.id() != HDM_DECODER {
                continue;
            }
            let offset = COMPONENT_CACHE_MEM + header.pointer();
            if !offset.is_multiple_of(size_of::<u32>() as u32) {
                continue;
            }
            let capability = DecoderCapability::from_bits(mmio.read32(block, offset + CAPABILITY));
            let count = capability.decoders();
            let end = offset + DECODERS + u32::from(count) * DECODER_LEN;
            if count > 0 && end <= len {
                return Ok(Self {
                    mmio,
                    offset,
                    count,
                });
            }
        }
        Err(DecoderError::NoCapability)
    }

    /// Makes `window` reach `dpa`, by a decoder that does so already or by the first free one.
    ///
    /// Decoders are committed in order, each above the one before in HPA and DPA: a decoder's
    /// DPA starts where the one before ends, plus its skip (CXL r3.1 8.2.4.20.7).
    ///
    /// # Errors
    /// [`DecoderError`]; nothing is committed then.
    pub fn program(
        &mut self,
        dpa: DpaRange,
        window: HpaWindow,
    ) -> Result<DecodedWindow, DecoderError> {
        for (what, value) in [
            ("window base", window.base.0),
            ("DPA base", dpa.start.0),
            ("length", dpa.len),
        ] {
            if !value.is_multiple_of(GRANULARITY) {
                return Err(DecoderError::Unaligned { what, value });
            }
        }
        if let Some(decoded) = self.decoded(dpa) {
            self.enable();
            return Ok(decoded);
        }
        let (mut next_dpa, mut next_hpa) = (0, 0);
        for decoder in 0..self.count {
            let Some(earlier) = self.committed(decoder, next_dpa) else {
                let skip = self.room(decoder, dpa, window, next_dpa, next_hpa)?;
                let range = HpaWindow {
                    len: dpa.len,
                    ..window
                };
                self.commit(decoder, range, skip)?;
                let base = window.base;
                return Ok(DecodedWindow { base, dpa });
            };
            next_dpa = earlier.dpa.end().0;
            next_hpa = earlier.base.0.saturating_add(earlier.dpa.len);
        }
        Err(DecoderError::NoneFree { count: self.count })
    }

    /// What a committed decoder makes of `dpa`; `None` if none decodes all of it.
    pub fn decoded(&mut self, dpa: DpaRange) -> Option<DecodedWindow> {
        let mut next_dpa = 0;
        for decoder in 0..self.count {
            let earlier = self.committed(decoder, next_dpa)?;
            if earlier.dpa.contains(&dpa) {
                let base = Hpa(earlier.base.0 + (dpa.start.0 - earlier.dpa.start.0));
                return Some(DecodedWindow { base, dpa });
            }
            next_dpa = earlier.dpa.end().0;
        }
        None
    }

    /// For the decoders of a host bridge: sends `window` to the root port with this number, by a
    /// decoder that covers it already or by the first free one.
    ///
    /// # Errors
    /// [`DecoderError`]; nothing is committed then.
    pub fn route(&mut self, window: HpaWindow, port: u8) -> Result<(), DecoderError> {
        let mut next_hpa = 0;
        for decoder in 0..self.count {
            let control = DecoderControl::from_bits(self.read(decoder, CONTROL));
            if !control.committed() {
                if window.base.0 < next_hpa {
                    return Err(out_of_order(decoder, "HPA", next_hpa, window.base.0));
                }
                // A host bridge has its list of targets where an endpoint has its skip: one byte
                // for each way, and there is one way.
                return self.commit(decoder, window, port.into());
            }
            let range = HpaWindow {
                base: Hpa(self.read_pair(decoder, BASE_LOW, BASE_HIGH)),
                len: self.read_pair(decoder, SIZE_LOW, SIZE_HIGH),
            };
            if range.base <= window.base && window.end() <= range.end() {
                self.enable();
                return Ok(());
            }
            next_hpa = range.end().0;
        }
        Err(DecoderError::NoneFree { count: self.count })
    }

    /// What decoder `decoder` decodes, if it is committed.
    fn committed(&mut self, decoder: u8, next_dpa: u64) -> Option<DecodedWindow> {
        let control = DecoderControl::from_bits(self.read(decoder, CONTROL));
        if !control.committed() {
            return None;
        }
        let skip = self.read_pair(decoder, SKIP_LOW, SKIP_HIGH);
        let size = self.read_pair(decoder, SIZE_LOW, SIZE_HIGH);
        let ways = match control.ways() {
            ways @ 0..=4 => 1 << ways,
            ways @ 8..=10 => 3 << (ways - 8),
            _ => 1,
        };
        let base = Hpa(self.read_pair(decoder, BASE_LOW, BASE_HIGH));
        let start = Dpa(next_dpa.saturating_add(skip));
        let dpa = DpaRange {
            start,
            len: size / ways,
        };
        Some(DecodedWindow { base, dpa })
    }

    /// The skip with which `decoder` decodes `dpa` in `window`, behind what comes before it.
    fn room(
        &self,
        decoder: u8,
        dpa: DpaRange,
        window: HpaWindow,
        next_dpa: u64,
        next_hpa: u64,
    ) -> Result<u64, DecoderError> {
        if window.len < dpa.len {
            return Err(DecoderError::WindowTooSmall {
                window: window.len,
                needed: dpa.len,
            });
        }
        let Some(skip) = dpa.start.0.checked_sub(next_dpa) else {
            return Err(out_of_order(decoder, "DPA", next_dpa, dpa.start.0));
        };
        if window.base.0 < next_hpa {
            return Err(out_of_order(decoder, "HPA", next_hpa, window.base.0));
        }
        Ok(skip)
    }

    /// Commits `decoder` with `target`, which is the skip of an endpoint's.
    fn commit(&mut self, decoder: u8, range: HpaWindow, target: u64) -> Result<(), DecoderError> {
        self.write_pair(decoder, BASE_LOW, BASE_HIGH, range.base.0);
        self.write_pair(decoder, SIZE_LOW, SIZE_HIGH, range.len);
        self.write_pair(decoder, SKIP_LOW, SKIP_HIGH, target);
        let control = DecoderControl::new().with_commit(true).with_host_only(true);
        self.write(decoder, CONTROL, control.into_bits());
        let settled = wait(COMMIT_TIMEOUT, || {
            let control = DecoderControl::from_bits(self.read(decoder, CONTROL));
            (control.committed() || control.error()).then_some(control)
        });
        match settled {
            Some(control) if control.committed() && !control.error() => {
                self.enable();
                Ok(())
            }
            outcome => {
                let control = self.read(decoder, CONTROL);
                self.write(decoder, CONTROL, 0);
                Err(match outcome {
                    Some(_) => DecoderError::CommitFailed { decoder, control },
                    None => DecoderError::CommitTimeout {
                        decoder,
                        millis: COMMIT_TIMEOUT.as_millis() as u64,
                        control,
                    },
                })
            }
        }
    }

    /// QEMU decodes without it; hardware does not.
    fn enable(&mut self) {
        let register = self.offset + GLOBAL_CONTROL;
        let control =
            GlobalControl::from_bits(self.mmio.read32(RegisterBlock::Component, register));
        let enabled = control.with_enable(true).into_bits();
        self.mmio
            .write32(RegisterBlock::Component, register, enabled);
    }

    fn register(&self, decoder: u8, field: u32) -> u32 {
        self.offset + DECODERS + u32::from(decoder) * DECODER_LEN + field
    }

    fn read(&mut self, decoder: u8, field: u32) -> u32 {
        let register = self.register(decoder, field);
        self.mmio.read32(RegisterBlock::Component, register)
    }

    fn write(&mut self, decoder: u8, field: u32, value: u32) {
        let register = self.register(decoder, field);
        self.mmio.write32(RegisterBlock::Component, register, value);
    }

    fn read_pair(&mut self, decoder: u8, low: u32, high: u32) -> u64 {
        u64::from(self.read(decoder, low)) | u64::from(self.read(decoder, high)) << 32
    }

    fn write_pair(&mut self, decoder: u8, low: u32, high: u32, value: u64) {
        self.write(decoder, low, value as u32);
        self.write(decoder, high, (value >> 32) as u32);
    }
}

/// `decoder` would start below the end of the one before it.
fn out_of_order(decoder: u8, what: &'static str, end: u64, start: u64) -> DecoderError {
    DecoderError::OutOfOrder {
        decoder: decoder.saturating_sub(1),
        what,
        end,
        start,
    }
}
