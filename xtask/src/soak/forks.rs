//! The rung `fork` at full length.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::rung::{build, fork, recall};

/// For 1,000 forks, each with a child, a grandchild and recalls.
const AT_MOST: Duration = Duration::from_secs(3600);

pub(super) fn lazy(notes: &mut Vec<String>) -> Result<()> {
    storm("lazy", notes)
}

pub(super) fn eager(notes: &mut Vec<String>) -> Result<()> {
    storm("eager", notes)
}

fn storm(policy: &str, notes: &mut Vec<String>) -> Result<()> {
    with_program(|program| {
        let done = fork::storm(program, policy, fork::FORKS, AT_MOST)?;
        // It ends at the time too.
        let whole = format!("{} forks", fork::FORKS);
        ensure!(
            done.contains(&whole),
            "not {whole} within {AT_MOST:?}: {done}"
        );
        notes.push(done);
        Ok(())
    })
}

pub(super) fn cost(notes: &mut Vec<String>) -> Result<()> {
    with_program(|program| {
        notes.extend(fork::cost(program)?);
        Ok(())
    })
}

fn with_program(work: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    ensure!(build::release()?, "the release build failed");
    ensure!(
        recall::live_memory_moves()?,
        "no userfaultfd here, so that no heap can be shared"
    );
    let dir = tempfile::tempdir()?;
    work(&fork::compile(dir.path())?)
}
