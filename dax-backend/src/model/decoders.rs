//! The device's HDM decoders, and the component registers they are found by.

#![forbid(unsafe_code)]

use crate::address::{Dpa, Hpa};
use crate::regs::capability::{COMPONENT_CACHE_MEM, ComponentArray, ComponentHeader, HDM_DECODER};
use crate::regs::hdm_decoder::{
    BASE_HIGH, BASE_LOW, CONTROL, DECODER_LEN, DECODERS, DecoderCapability, DecoderControl,
    GLOBAL_CONTROL, GRANULARITY, GlobalControl, SIZE_HIGH, SIZE_LOW, SKIP_HIGH, SKIP_LOW,
};

/// Length of the component block in bytes.
pub(super) const BLOCK_LEN: u32 = 0x1_0000;
/// Where the HDM decoder capability lies in the CXL.cache/mem registers.
const POINTER: u32 = 0x118;
/// Capability ids in the array: RAS, link, a null entry, HDM decoders.
const CAPABILITIES: [(u16, u32); 4] = [(2, 0x80), (4, 0xd8), (0, 0), (HDM_DECODER, POINTER)];
/// Code 2 is four decoders.
const COUNT_CODE: u8 = 2;
const COUNT: usize = 4;

/// Bits that base, size and skip do not have.
const LOW_MASK: u32 = !(GRANULARITY as u32 - 1);

#[derive(Clone, Copy, Default)]
struct Decoder {
    base: [u32; 2],
    size: [u32; 2],
    skip: [u32; 2],
    control: DecoderControl,
}

fn joined(halves: [u32; 2]) -> u64 {
    u64::from(halves[0]) | u64::from(halves[1]) << 32
}

pub(super) struct Decoders {
    global_control: u32,
    decoders: [Decoder; COUNT],
}

impl Decoders {
    pub(super) fn new() -> Self {
        Self {
            global_control: 0,
            decoders: [Decoder::default(); COUNT],
        }
    }

    pub(super) fn read(&self, offset: u32) -> u32 {
        let Some(offset) = offset.checked_sub(COMPONENT_CACHE_MEM) else {
            return 0;
        };
        if offset == 0 {
            let array = ComponentArray::new()
                .with_id(1)
                .with_version(1)
                .with_cache_mem_version(1);
            return array.with_count(CAPABILITIES.len() as u8).into_bits();
        }
        if let Some((id, pointer)) = CAPABILITIES.get(offset as usize / 4 - 1) {
            return ComponentHeader::new()
                .with_id(*id)
                .with_pointer(*pointer)
                .into_bits();
        }
        match offset.checked_sub(POINTER) {
            Some(0) => DecoderCapability::new()
                .with_count_code(COUNT_CODE)
                .into_bits(),
            Some(GLOBAL_CONTROL) => self.global_control,
            Some(register @ DECODERS..) => self.read_decoder(register - DECODERS),
            _ => 0,
        }
    }

    fn read_decoder(&self, register: u32) -> u32 {
        let Some(decoder) = self.decoders.get((register / DECODER_LEN) as usize) else {
            return 0;
        };
        match register % DECODER_LEN {
            BASE_LOW => decoder.base[0],
            BASE_HIGH => decoder.base[1],
            SIZE_LOW => decoder.size[0],
            SIZE_HIGH => decoder.size[1],
            SKIP_LOW => decoder.skip[0],
            SKIP_HIGH => decoder.skip[1],
            CONTROL => decoder.control.into_bits(),
            _ => 0,
        }
    }

    pub(super) fn write(&mut self, offset: u32, value: u32) {
        match offset.checked_sub(COMPONENT_CACHE_MEM + POINTER) {
            Some(GLOBAL_CONTROL) => self.global_control = value & 0b11,
            Some(register @ DECODERS..) => self.write_decoder(register - DECODERS, value),
            _ => {}
        }
    }

    fn write_decoder(&mut self, register: u32, value: u32) {
        let index = (register / DECODER_LEN) as usize;
        if index >= COUNT {
            return;
        }
        let field = register % DECODER_LEN;
        if field == CONTROL {
            self.write_control(index, DecoderControl::from_bits(value));
            return;
        }
        let decoder = &mut self.decoders[index];
        // A committed decoder keeps its address fields.
        if decoder.control.committed() {
            return;
        }
        match field {
            BASE_LOW => decoder.base[0] = value & LOW_MASK,
            BASE_HIGH => decoder.base[1] = value,
            SIZE_LOW => decoder.size[0] = value & LOW_MASK,
            SIZE_HIGH => decoder.size[1] = value,
            SKIP_LOW => decoder.skip[0] = value & LOW_MASK,
            SKIP_HIGH => decoder.skip[1] = value,
            _ => {}
        }
    }

    /// Decoders are committed from 0 up, each above the one before.
    fn write_control(&mut self, index: usize, value: DecoderControl) {
        let legal = match index.checked_sub(1).map(|below| self.decoders[below]) {
            None => true,
            Some(below) => {
                let end = joined(below.base).checked_add(joined(below.size));
                below.control.committed()
                    && end.is_some_and(|end| end <= joined(self.decoders[index].base))
            }
        };
        let decoder = &mut self.decoders[index];
        let committed = value.commit() && legal && joined(decoder.size) != 0;
        decoder.control = value
            .with_committed(committed)
            .with_error(value.commit() && !committed);
    }

    /// The DPA that a host address is decoded to: a decoder's memory starts where the one before
    /// ends, plus its skip. Nothing is decoded before decoding is enabled.
    pub(super) fn decode(&self, hpa: Hpa) -> Option<Dpa> {
        if !GlobalControl::from_bits(self.global_control).enable() {
            return None;
        }
        let mut dpa = 0;
        for decoder in self
            .decoders
            .iter()
            .take_while(|decoder| decoder.control.committed())
        {
            dpa += joined(decoder.skip);
            let size = joined(decoder.size);
            if let Some(offset) = hpa.0.checked_sub(joined(decoder.base))
                && offset < size
            {
                return Some(Dpa(dpa + offset));
            }
            dpa += size;
        }
        None
    }

    /// For tests that need static memory decoded below the DC regions, as firmware does it.
    pub(super) fn commit(&mut self, index: usize, base: u64, size: u64, skip: u64) {
        let halves = |value: u64| [value as u32 & LOW_MASK, (value >> 32) as u32];
        let decoder = &mut self.decoders[index];
        (decoder.base, decoder.size, decoder.skip) = (halves(base), halves(size), halves(skip));
        self.write_control(
            index,
            DecoderControl::new().with_commit(true).with_host_only(true),
        );
    }
}
