//! What each command does: bytes in, bytes or a return code out.

#![forbid(unsafe_code)]

use std::time::Instant;

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::State;
use crate::address::{Dpa, DpaRange};
use crate::cmd::ReturnCode;
use crate::cmd::dynamic_capacity::{
    ConfigurationHeader, ConfigurationTail, ExtentListHeader, GetConfiguration, GetExtentList,
    ListedExtent, RegionConfiguration, UpdatedExtent, UpdatedListHeader,
};
use crate::cmd::events::{ClearEventRecordsHeader, EventInterruptPolicy};
use crate::cmd::identify::Identity;
use crate::cmd::logs::{
    COMMAND_EFFECTS_LOG, CommandEffect, GetLog, SupportedLog, SupportedLogsHeader,
};
use crate::region::SANITIZE_ON_RELEASE;
use crate::regs::hdm_decoder::GRANULARITY;

type Output = Result<Vec<u8>, ReturnCode>;

/// The commands that the device has, with their effects. Bit 2 of an effect: changes data at once.
const COMMANDS: [(u16, u16); 12] = [
    (0x0100, 0),
    (0x0101, 0),
    (0x0102, 0),
    (0x0103, 0),
    (0x0301, 0),
    (0x0400, 0),
    (0x0401, 0),
    (0x4000, 0),
    (0x4800, 0),
    (0x4801, 0),
    (0x4802, 1 << 2),
    (0x4803, 1 << 2),
];

/// Executes one command.
pub(super) fn execute(state: &mut State, opcode: u16, input: &[u8]) -> Output {
    if !has(state, opcode) {
        return Err(ReturnCode::Unsupported);
    }
    match opcode {
        0x0100 => get_event_records(state, input),
        0x0101 => clear_event_records(state, input),
        0x0102 => Ok(state.interrupts.as_bytes().to_vec()),
        0x0103 => set_event_interrupts(state, input),
        0x0301 => set_timestamp(state, input),
        0x0400 => Ok(supported_logs(state)),
        0x0401 => get_log(state, input),
        0x4000 => Ok(identify(state)),
        0x4800 => get_configuration(state, input),
        0x4801 => get_extent_list(state, input),
        0x4802 => add_response(state, input),
        0x4803 => release(state, input),
        _ => Err(ReturnCode::Unsupported),
    }
}

fn has(state: &State, opcode: u16) -> bool {
    COMMANDS.iter().any(|(known, _)| *known == opcode)
        && !state.config.without_commands.contains(&opcode)
}

/// The whole input as one `T`.
fn exactly<T: FromBytes>(input: &[u8]) -> Result<T, ReturnCode> {
    T::read_from_bytes(input).map_err(|_| ReturnCode::InvalidPayloadLength)
}

fn get_event_records(state: &State, input: &[u8]) -> Output {
    let [log] = exactly::<[u8; 1]>(input)?;
    let log = state
        .logs
        .get(usize::from(log))
        .ok_or(ReturnCode::InvalidInput)?;
    Ok(log.read(state.mailbox.payload.len()))
}

fn clear_event_records(state: &mut State, input: &[u8]) -> Output {
    let (header, handles) = ClearEventRecordsHeader::read_from_prefix(input)
        .map_err(|_| ReturnCode::InvalidPayloadLength)?;
    let (handles, _) = <[U16]>::ref_from_prefix_with_elems(handles, header.count.into())
        .map_err(|_| ReturnCode::InvalidPayloadLength)?;
    let handles: Vec<u16> = handles.iter().map(|handle| handle.get()).collect();
    let log = state
        .logs
        .get_mut(usize::from(header.log))
        .ok_or(ReturnCode::InvalidInput)?;
    log.clear(&handles)?;
    Ok(Vec::new())
}

/// As on QEMU, four bytes leave the dynamic capacity log as it is, and each enabled log shows
/// its vector.
fn set_event_interrupts(state: &mut State, input: &[u8]) -> Output {
    if input.len() != 4 && input.len() != 5 {
        return Err(ReturnCode::InvalidPayloadLength);
    }
    let mut policy = [0; 5];
    policy.copy_from_slice(state.interrupts.as_bytes());
    for (log, wanted) in input.iter().enumerate() {
        let mode = wanted & 0b11;
        let vector = if mode == 1 { (log as u8 + 2) << 4 } else { 0 };
        policy[log] = mode | vector;
    }
    state.interrupts = exactly::<EventInterruptPolicy>(&policy)?;
    Ok(Vec::new())
}

fn set_timestamp(state: &mut State, input: &[u8]) -> Output {
    let nanos = exactly::<U64>(input)?.get();
    state.clock = Some((nanos, Instant::now()));
    Ok(Vec::new())
}

fn command_effects(state: &State) -> Vec<u8> {
    let mut log = Vec::new();
    for (opcode, effect) in COMMANDS {
        if has(state, opcode) {
            let entry = CommandEffect {
                opcode: opcode.into(),
                effect: effect.into(),
            };
            log.extend_from_slice(entry.as_bytes());
        }
    }
    log
}

fn supported_logs(state: &State) -> Vec<u8> {
    let header = SupportedLogsHeader {
        count: 1.into(),
        reserved: [0; 6],
    };
    let log = SupportedLog {
        id: COMMAND_EFFECTS_LOG,
        len: (command_effects(state).len() as u32).into(),
    };
    [header.as_bytes(), log.as_bytes()].concat()
}

/// Exactly as many bytes as were asked for, with zeroes past the end.
fn get_log(state: &State, input: &[u8]) -> Output {
    let request = exactly::<GetLog>(input)?;
    if request.id != COMMAND_EFFECTS_LOG {
        return Err(ReturnCode::InvalidLog);
    }
    let (offset, len) = (request.offset.get() as usize, request.len.get() as usize);
    if len > state.mailbox.payload.len() {
        return Err(ReturnCode::InvalidInput);
    }
    let mut output: Vec<u8> = command_effects(state)
        .into_iter()
        .skip(offset)
        .take(len)
        .collect();
    output.resize(len, 0);
    Ok(output)
}

fn identify(state: &State) -> Vec<u8> {
    let depth = state.config.event_log_depth;
    let capacity = state.config.static_len / GRANULARITY;
    let identity = Identity {
        firmware_revision: *b"dcmalloc model\0\0",
        total_capacity: capacity.into(),
        volatile_capacity: capacity.into(),
        persistent_capacity: 0.into(),
        partition_alignment: 0.into(),
        informational_log_size: depth.into(),
        warning_log_size: depth.into(),
        failure_log_size: depth.into(),
        fatal_log_size: depth.into(),
        lsa_size: 0.into(),
        poison_list_max: [0; 3],
        poison_inject_limit: 0.into(),
        poison_capabilities: 0,
        qos_capabilities: 0,
        dynamic_capacity_log_size: depth.into(),
    };
    identity.as_bytes().to_vec()
}

fn get_configuration(state: &State, input: &[u8]) -> Output {
    let request = exactly::<GetConfiguration>(input)?;
    let regions = state.capacity.regions();
    let first = usize::from(request.first);
    if first >= regions.len() {
        return Err(ReturnCode::InvalidInput);
    }
    let count = usize::from(request.count).min(regions.len() - first);
    let header = ConfigurationHeader {
        available: regions.len() as u8,
        returned: count as u8,
        reserved: [0; 6],
    };
    let mut output = header.as_bytes().to_vec();
    for region in &regions[first..first + count] {
        let raw = RegionConfiguration {
            base: region.base.0.into(),
            decode_len: (region.decode_len / GRANULARITY).into(),
            len: region.len.into(),
            block_size: region.block_size.into(),
            dsmad_handle: region.dsmad_handle.into(),
            flags: if region.sanitizes {
                SANITIZE_ON_RELEASE
            } else {
                0
            },
            reserved: [0; 3],
        };
        output.extend_from_slice(raw.as_bytes());
    }
    let max_extents = state.capacity.max_extents();
    let tail = ConfigurationTail {
        extents_supported: (max_extents as u32).into(),
        extents_available: ((max_extents - state.capacity.accepted().len()) as u32).into(),
        tags_supported: (max_extents as u32).into(),
        tags_available: (max_extents as u32).into(),
    };
    output.extend_from_slice(tail.as_bytes());
    Ok(output)
}

fn get_extent_list(state: &State, input: &[u8]) -> Output {
    let request = exactly::<GetExtentList>(input)?;
    let accepted = state.capacity.accepted();
    let start = request.start.get() as usize;
    let rest = accepted.get(start..).ok_or(ReturnCode::InvalidInput)?;
    let fits =
        (state.mailbox.payload.len() - size_of::<ExtentListHeader>()) / size_of::<ListedExtent>();
    let count = rest.len().min(request.count.get() as usize).min(fits);
    let header = ExtentListHeader {
        returned: (count as u32).into(),
        total: (accepted.len() as u32).into(),
        generation: state.capacity.generation().into(),
        reserved: [0; 4],
    };
    let mut output = header.as_bytes().to_vec();
    for extent in &rest[..count] {
        output.extend_from_slice(ListedExtent::from(extent).as_bytes());
    }
    Ok(output)
}

/// The ranges of 4802h or 4803h, and whether the list goes on.
fn updated_list(input: &[u8]) -> Result<(Vec<DpaRange>, bool), ReturnCode> {
    let (header, rest) =
        UpdatedListHeader::read_from_prefix(input).map_err(|_| ReturnCode::InvalidPayloadLength)?;
    let count = header.count.get() as usize;
    let (extents, _) = <[UpdatedExtent]>::ref_from_prefix_with_elems(rest, count)
        .map_err(|_| ReturnCode::InvalidPayloadLength)?;
    let ranges = extents.iter().map(|extent| DpaRange {
        start: Dpa(extent.start.get()),
        len: extent.len.get(),
    });
    Ok((ranges.collect(), header.flags & 1 != 0))
}

fn add_response(state: &mut State, input: &[u8]) -> Output {
    let (ranges, more) = updated_list(input)?;
    state.capacity.answer(&ranges, more, &mut state.audit)?;
    Ok(Vec::new())
}

fn release(state: &mut State, input: &[u8]) -> Output {
    let (ranges, _) = updated_list(input)?;
    state.capacity.release(&ranges, &mut state.audit)?;
    Ok(Vec::new())
}
