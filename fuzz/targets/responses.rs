//! A response of any bytes to each mailbox command.
#![no_main]

use arbitrary::Arbitrary;
use dax_backend::cmd::Command;
use dax_backend::cmd::dynamic_capacity::{AddResponse, GetConfiguration, GetExtentList, Release};
use dax_backend::cmd::events::{
    ClearEventRecords, EventLogKind, GetEventInterruptPolicy, GetEventRecords,
};
use dax_backend::cmd::identify::Identify;
use dax_backend::cmd::logs::{GetLog, GetSupportedLogs, command_effects};
use dax_backend::region::DcRegion;
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum Asked {
    Identify,
    SupportedLogs,
    Log { offset: u32, len: u32 },
    Records,
    InterruptPolicy,
    Configuration { count: u8, first: u8 },
    ExtentList { count: u32, start: u32 },
    Nothing,
}

fuzz_target!(|input: (Asked, &[u8])| {
    let (asked, payload) = input;
    match asked {
        Asked::Identify => drop(Identify.decode(payload)),
        Asked::SupportedLogs => {
            if let Ok(logs) = GetSupportedLogs.decode(payload) {
                assert!(logs.len() * 20 <= payload.len());
            }
        }
        Asked::Log { offset, len } => {
            let id = dax_backend::cmd::logs::COMMAND_EFFECTS_LOG;
            let (offset, len) = (offset.into(), len.into());
            if let Ok(log) = (GetLog { id, offset, len }).decode(payload) {
                assert_eq!(log.len(), len.get() as usize);
                assert!(command_effects(&log).all(|opcode| opcode != 0));
            }
        }
        Asked::Records => {
            let log = EventLogKind::DynamicCapacity;
            if let Ok(read) = (GetEventRecords { log }).decode(payload) {
                assert!(read.records.len() * 128 <= payload.len());
                for record in &read.records {
                    let _ = record.decode();
                }
            }
        }
        Asked::InterruptPolicy => drop(GetEventInterruptPolicy.decode(payload)),
        Asked::Configuration { count, first } => {
            if let Ok(configuration) = (GetConfiguration { count, first }).decode(payload) {
                for (index, raw) in configuration.regions.iter().enumerate() {
                    if let Ok(region) = DcRegion::check(index as u8, raw) {
                        assert!(region.decode_range().contains(&region.range()));
                        assert!(region.range().is_aligned(region.base, region.block_size));
                    }
                }
            }
        }
        Asked::ExtentList { count, start } => {
            let request = GetExtentList {
                count: count.into(),
                start: start.into(),
            };
            if let Ok(page) = request.decode(payload) {
                assert!(page.extents.len() <= count as usize);
                assert!(page.extents.len() as u32 <= page.total.saturating_sub(start));
            }
        }
        Asked::Nothing => {
            let log = EventLogKind::DynamicCapacity;
            assert!(
                (ClearEventRecords { log, handles: &[] })
                    .decode(payload)
                    .is_ok()
            );
            let (ranges, more) = (&[][..], false);
            assert!((AddResponse { ranges, more }).decode(payload).is_ok());
            assert!((Release { ranges, more }).decode(payload).is_ok());
        }
    }
});
