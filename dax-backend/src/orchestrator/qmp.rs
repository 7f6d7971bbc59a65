//! QEMU's monitor as the fabric manager of its CXL device (QMP, `cxl-add-dynamic-capacity` and
//! `cxl-release-dynamic-capacity`, both unstable; QEMU 9.1 and later).
//!
//! QEMU knows the policy "prescriptive" only, so that the ranges are chosen here. It answers
//! before the host has: what became of an offer shows in the device's events alone.

#![forbid(unsafe_code)]

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::choice::Choice;
use super::{Orchestrator, OrchestratorError};
use crate::address::DpaRange;
use crate::extent::{Extent, ExtentTag};
use crate::region::DcRegion;

/// How long the monitor may take to answer. It serves one client at a time.
const PATIENCE: Duration = Duration::from_secs(5);
/// Offers that are tried after one that QEMU says is somebody's already.
const ATTEMPTS: usize = 16;

/// Which device of which QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QmpTarget {
    /// The monitor's socket (`-qmp unix:PATH,server=on,wait=off`).
    pub socket: PathBuf,
    /// The device's path in QEMU's tree of objects, such as `/machine/peripheral/dcd0`.
    pub device: String,
}

/// Asks QEMU's monitor for capacity. It is connected to for each request and left free for
/// others in between.
#[derive(Debug)]
pub struct QmpOrchestrator {
    target: QmpTarget,
    choice: Choice,
}

impl QmpOrchestrator {
    /// An orchestrator for a device that has `regions`. Connects to nothing yet.
    pub fn new(target: QmpTarget, regions: &[DcRegion]) -> Self {
        Self {
            target,
            choice: Choice::new(regions),
        }
    }

    fn execute(&self, command: &str, arguments: Value) -> Result<(), OrchestratorError> {
        let said = self
            .converse(command, arguments)
            .map_err(OrchestratorError::Unreachable)?;
        said.map_err(|reason| OrchestratorError::Refused { reason })
    }

    /// One command; the error that QEMU answers, if it does.
    fn converse(&self, command: &str, arguments: Value) -> io::Result<Result<(), String>> {
        let stream = UnixStream::connect(&self.target.socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut monitor = Monitor(BufReader::new(stream));
        if monitor.line()?.get("QMP").is_none() {
            return Err(io::Error::other("no QMP monitor answers there"));
        }
        let ready = json!({"execute": "qmp_capabilities"});
        if let Err(reason) = monitor.ask(&ready)? {
            return Ok(Err(reason));
        }
        monitor.ask(&json!({"execute": command, "arguments": arguments}))
    }

    fn arguments(
        &self,
        region: &DcRegion,
        policy: &str,
        tag: ExtentTag,
        ranges: &[DpaRange],
    ) -> Map<String, Value> {
        let extents: Vec<Value> = ranges
            .iter()
            .map(|range| json!({"offset": range.start.0 - region.base.0, "len": range.len}))
            .collect();
        let mut arguments = Map::from_iter([
            ("path".to_owned(), json!(self.target.device)),
            ("host-id".to_owned(), json!(0)),
            (policy.to_owned(), json!("prescriptive")),
            ("region".to_owned(), json!(region.index)),
            ("extents".to_owned(), json!(extents)),
        ]);
        if !tag.is_null() {
            arguments.insert("tag".to_owned(), json!(tag.to_string()));
        }
        arguments
    }
}

impl Orchestrator for QmpOrchestrator {
    fn add(&mut self, sizes: &[u64], tag: ExtentTag) -> Result<Vec<Extent>, OrchestratorError> {
        let mut refused = None;
        for _ in 0..ATTEMPTS {
            let chosen = match self.choice.choose(sizes) {
                Ok(chosen) => chosen,
                // What QEMU said of the last ones tells more.
                Err(error) => return Err(refused.unwrap_or(error)),
            };
            let arguments = self.arguments(&chosen.region, "selection-policy", tag, &chosen.ranges);
            let offered = self.execute("cxl-add-dynamic-capacity", arguments.into());
            self.choice.take(&chosen.ranges);
            match offered {
                Ok(()) => {
                    let extents = chosen.ranges.into_iter().map(|range| Extent {
                        range,
                        tag,
                        shared_seq: 0,
                    });
                    return Ok(extents.collect());
                }
                Err(OrchestratorError::Refused { reason }) if is_taken(&reason) => {
                    refused = Some(OrchestratorError::Refused { reason });
                }
                Err(error) => return Err(error),
            }
        }
        Err(refused.unwrap_or_else(|| OrchestratorError::Refused {
            reason: "it was not asked".into(),
        }))
    }

    fn held(&mut self, extents: &[Extent]) {
        self.choice.held(extents);
    }

    fn release(&mut self, ranges: &[DpaRange], forced: bool) -> Result<(), OrchestratorError> {
        for range in ranges {
            let region = self.choice.region_of(range)?;
            let mut arguments =
                self.arguments(&region, "removal-policy", ExtentTag::NULL, &[*range]);
            if forced {
                arguments.insert("forced-removal".to_owned(), json!(true));
            }
            self.execute("cxl-release-dynamic-capacity", arguments.into())?;
        }
        Ok(())
    }
}

/// Whether QEMU refuses an offer because its range is not free.
fn is_taken(reason: &str) -> bool {
    ["already accessible", "still pending"]
        .iter()
        .any(|part| reason.contains(part))
}

/// Lines of JSON, one a message.
struct Monitor(BufReader<UnixStream>);

impl Monitor {
    fn line(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        if self.0.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_str(&line)?)
    }

    fn ask(&mut self, request: &Value) -> io::Result<Result<(), String>> {
        self.0
            .get_mut()
            .write_all(format!("{request}\n").as_bytes())?;
        loop {
            let line = self.line()?;
            if line.get("return").is_some() {
                return Ok(Ok(()));
            }
            // Anything else is an event.
            if let Some(error) = line.get("error") {
                let text = error.get("desc").and_then(Value::as_str);
                return Ok(Err(text.unwrap_or("QEMU gives no reason").to_owned()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Dpa;
    use std::os::unix::net::UnixListener;
    use std::thread::{self, JoinHandle};

    const MIB: u64 = 1 << 20;
    const REGION: DcRegion = DcRegion {
        index: 1,
        base: Dpa(256 * MIB),
        decode_len: 256 * MIB,
        len: 256 * MIB,
        block_size: 2 * MIB,
        sanitizes: false,
        dsmad_handle: 0,
    };

    fn range(start: u64, len: u64) -> DpaRange {
        DpaRange::new(Dpa(start * MIB), len * MIB).unwrap()
    }

    /// A monitor that answers commands in turn, with events in between; what it was told.
    fn monitor(
        answers: &'static [&'static str],
    ) -> (tempfile::TempDir, QmpTarget, JoinHandle<Vec<Value>>) {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("qmp");
        let listener = UnixListener::bind(&socket).unwrap();
        let thread = thread::spawn(move || {
            let mut told = Vec::new();
            for answer in answers {
                let (stream, _) = listener.accept().unwrap();
                let mut monitor = Monitor(BufReader::new(stream));
                let say = |monitor: &mut Monitor, line: &str| {
                    let line = format!("{line}\r\n");
                    monitor.0.get_mut().write_all(line.as_bytes()).unwrap();
                };
                say(
                    &mut monitor,
                    r#"{"QMP": {"version": {}, "capabilities": []}}"#,
                );
                let ready = monitor.line().unwrap();
                assert_eq!(ready, json!({"execute": "qmp_capabilities"}));
                say(&mut monitor, r#"{"return": {}}"#);
                told.push(monitor.line().unwrap());
                say(&mut monitor, r#"{"event": "RTC_CHANGE", "data": {}}"#);
                say(&mut monitor, answer);
            }
            told
        });
        let device = "/machine/peripheral/dcd0".to_owned();
        (directory, QmpTarget { socket, device }, thread)
    }

    #[test]
    fn a_group_is_one_command_of_ranges_counted_from_the_regions_base() {
        let (_directory, target, monitor) = monitor(&[r#"{"return": {}}"#]);
        let mut qemu = QmpOrchestrator::new(target, &[REGION]);
        let offered = qemu.add(&[4 * MIB, 2 * MIB], ExtentTag::NULL).unwrap();
        let ranges: Vec<DpaRange> = offered.iter().map(|extent| extent.range).collect();
        assert_eq!(ranges, [range(256, 4), range(260, 2)]);
        assert_eq!(
            monitor.join().unwrap(),
            [json!({
                "execute": "cxl-add-dynamic-capacity",
                "arguments": {
                    "path": "/machine/peripheral/dcd0",
                    "host-id": 0,
                    "selection-policy": "prescriptive",
                    "region": 1,
                    "extents": [
                        {"offset": 0, "len": 4 * MIB},
                        {"offset": 4 * MIB, "len": 2 * MIB},
                    ],
                },
            })]
        );
    }

    #[test]
    fn a_range_that_is_somebodys_is_passed_over() {
        let (_directory, target, monitor) = monitor(&[
            r#"{"error": {"class": "GenericError", "desc": "cannot add DPA again while still pending"}}"#,
            r#"{"return": {}}"#,
        ]);
        let mut qemu = QmpOrchestrator::new(target, &[REGION]);
        let tag = ExtentTag([7; 16]);
        let offered = qemu.add(&[4 * MIB], tag).unwrap();
        assert_eq!(offered[0].range, range(260, 4));
        let told = monitor.join().unwrap();
        let tags: Vec<&Value> = told.iter().map(|line| &line["arguments"]["tag"]).collect();
        assert_eq!(tags, [&json!("07070707-0707-0707-0707-070707070707"); 2]);
    }

    #[test]
    fn what_qemu_refuses_is_said_in_its_words() {
        let (_directory, target, monitor) = monitor(&[
            r#"{"error": {"class": "GenericError", "desc": "Forced removal not supported yet"}}"#,
        ]);
        let mut qemu = QmpOrchestrator::new(target, &[REGION]);
        let error = qemu.release(&[range(258, 2)], true).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("Forced removal not supported yet"), "{text}");
        let told = monitor.join().unwrap();
        assert_eq!(
            told[0],
            json!({
                "execute": "cxl-release-dynamic-capacity",
                "arguments": {
                    "path": "/machine/peripheral/dcd0",
                    "host-id": 0,
                    "removal-policy": "prescriptive",
                    "forced-removal": true,
                    "region": 1,
                    "extents": [{"offset": 2 * MIB, "len": 2 * MIB}],
                },
            })
        );
    }

    #[test]
    fn nobody_at_the_socket_and_a_range_of_no_region_are_errors() {
        let directory = tempfile::tempdir().unwrap();
        let target = QmpTarget {
            socket: directory.path().join("none"),
            device: String::new(),
        };
        let mut qemu = QmpOrchestrator::new(target, &[REGION]);
        let error = qemu.add(&[MIB], ExtentTag::NULL).unwrap_err();
        assert!(
            matches!(error, OrchestratorError::Unreachable(_)),
            "{error}"
        );
        let error = qemu.release(&[range(0, 2)], false).unwrap_err();
        assert!(
            matches!(error, OrchestratorError::Refused { .. }),
            "{error}"
        );
    }
}
