//! QEMU's monitor: the fabric manager of the guest's device.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::machine;
use super::port::Piece;

/// QEMU answers at once, but may be waiting for a processor.
const PATIENCE: Duration = Duration::from_secs(60);

/// One connection.
#[derive(Debug)]
pub(super) struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects to the socket that QEMU makes at its start.
    pub(super) fn connect(path: &Path) -> Result<Self> {
        let stream = connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut qmp = Self {
            stream: BufReader::new(stream),
        };
        qmp.line().context("QEMU does not greet")?;
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Offers `pieces` of a DC region as one More group.
    pub(super) fn add(&mut self, region: u8, pieces: &[Piece]) -> Result<()> {
        let mut arguments = capacity(region, pieces);
        arguments["selection-policy"] = "prescriptive".into();
        self.execute("cxl-add-dynamic-capacity", &arguments)
    }

    /// Asks for `pieces` of a DC region back.
    pub(super) fn release(&mut self, region: u8, pieces: &[Piece]) -> Result<()> {
        let mut arguments = capacity(region, pieces);
        arguments["removal-policy"] = "prescriptive".into();
        self.execute("cxl-release-dynamic-capacity", &arguments)
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> Result<()> {
        let order = json!({ "execute": command, "arguments": arguments });
        writeln!(self.stream.get_mut(), "{order}")?;
        loop {
            let answer = self.line()?;
            if answer.get("return").is_some() {
                return Ok(());
            }
            if let Some(error) = answer.get("error") {
                bail!("{command}: {}", error["desc"].as_str().unwrap_or("refused"));
            }
            // Anything else is an event.
        }
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("QMP: no JSON: {line:?}"))
    }
}

fn capacity(region: u8, pieces: &[Piece]) -> Value {
    let extents: Vec<Value> = pieces
        .iter()
        .map(|piece| json!({ "offset": piece.offset, "len": piece.len }))
        .collect();
    json!({ "path": machine::DEVICE, "host-id": 0, "region": region, "extents": extents })
}

/// Connects to a socket that appears when QEMU starts.
pub(super) fn connect(path: &Path) -> Result<UnixStream> {
    let start = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(error) if start.elapsed() > PATIENCE => {
                return Err(error).with_context(|| format!("{} has no listener", path.display()));
            }
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}
