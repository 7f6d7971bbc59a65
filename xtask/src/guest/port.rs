//! What the runner in the guest and the host say to each other: lines of JSON over a virtio port.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::bench::Row;
use super::machine;

/// A piece of a DC region, in bytes from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Piece {
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// From the guest.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Line {
    /// The runner runs.
    Booted,
    /// Offer these as one More group. The host answers.
    Add { region: u8, pieces: Vec<Piece> },
    /// Ask for these back. The host answers.
    Release { region: u8, pieces: Vec<Piece> },
    /// A check has ended.
    Ended(Verdict),
    /// All have.
    Done,
}

/// The host's answer to an order: why it was refused, if it was.
pub(super) type Answer = Result<(), String>;

/// What came of one check.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Verdict {
    pub(super) check: String,
    pub(super) outcome: Outcome,
    pub(super) seconds: f64,
    /// Numbers worth keeping, in words.
    pub(super) notes: Vec<String>,
    /// Numbers for machines.
    pub(super) rows: Vec<Row>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Outcome {
    Passed,
    Failed(String),
}

/// The guest's end.
#[derive(Debug)]
pub(super) struct Port {
    stream: Mutex<BufReader<File>>,
}

impl Port {
    /// The line to the host.
    pub(super) fn open() -> Result<Self> {
        let path = find(machine::PORT)?;
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Self {
            stream: Mutex::new(BufReader::new(file)),
        })
    }

    /// Says `line` to the host.
    pub(super) fn say(&self, line: &Line) -> Result<()> {
        let mut stream = self.stream.lock().unwrap_or_else(|e| e.into_inner());
        say(stream.get_mut(), line)
    }

    /// Gives the host an order and waits for its answer.
    pub(super) fn order(&self, line: &Line) -> Result<()> {
        let mut stream = self.stream.lock().unwrap_or_else(|e| e.into_inner());
        say(stream.get_mut(), line)?;
        let mut text = String::new();
        stream.read_line(&mut text)?;
        let answer: Answer =
            serde_json::from_str(&text).with_context(|| format!("the host answers {text:?}"))?;
        answer.map_err(anyhow::Error::msg)
    }
}

/// The virtio port of that name.
pub(super) fn find(name: &str) -> Result<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports").context("no virtio ports")? {
        let entry = entry?;
        let found = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if found.trim() == name {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    bail!("no virtio port is called {name}")
}

/// Writes `line` as one.
pub(super) fn say(to: &mut impl Write, line: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string(line)?;
    text.push('\n');
    to.write_all(text.as_bytes())?;
    Ok(())
}
