//! The C and C++ programs of `ffi/preload/tests/c`, each run under the library with everything in DRAM,
//! with large memory on extents, and with everything on extents.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tempfile::NamedTempFile;

use super::Tally;
use crate::packages;
use crate::process;
use crate::stats::RunStats;
use crate::workspace;

const LIMIT: Duration = Duration::from_secs(150);
/// Frees what is not its own, of which `dcm run` says a line.
const FOREIGN: &str = "foreign_free";
const PLACEMENTS: [&str; 3] = ["dram", "size:64K", "dc"];

pub(super) fn run() -> Result<Tally> {
    packages::ensure(&["gcc", "g++", "libc6-dev"])?;
    let out = workspace::target().join("conformance");
    let programs = build(&out)?;
    let mut tally = Tally::default();
    for placement in PLACEMENTS {
        for program in &programs {
            let name = program.file_name().unwrap_or_default().to_string_lossy();
            let what = format!("{name} ({placement})");
            match judge(program, placement) {
                Ok(None) => tally.pass(),
                Ok(Some(reason)) => tally.skip(what, reason),
                Err(error) => tally.fail(what, format!("{error:#}")),
            }
        }
    }
    Ok(tally)
}

/// Compiles every program; sources named `plugin_*` become libraries that a program loads.
fn build(out: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(out)?;
    let sources = workspace::root().join("ffi/preload/tests/c");
    let mut programs = Vec::new();
    for entry in fs::read_dir(&sources).with_context(|| format!("no {}", sources.display()))? {
        let source = entry?.path();
        let name = source
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let (compiler, standard) = match source.extension().and_then(|ext| ext.to_str()) {
            Some("c") => ("cc", "-std=gnu17"),
            Some("cpp") => ("c++", "-std=c++17"),
            _ => continue,
        };
        let plugin = name.starts_with("plugin_");
        let product = out.join(if plugin { format!("{name}.so") } else { name });
        let mut compile = Command::new(compiler);
        compile
            .args([
                standard,
                "-O2",
                "-g",
                "-fno-builtin",
                "-pthread",
                "-Wall",
                "-Wextra",
                "-Werror",
            ])
            .args(if plugin {
                &["-shared", "-fPIC"][..]
            } else {
                &[]
            })
            // By its bare name, which is what a failed check reports.
            .current_dir(&sources)
            .arg(source.file_name().unwrap_or_default())
            .arg("-o")
            .arg(&product)
            .arg("-ldl");
        ensure!(
            process::run_visibly(&mut compile)?,
            "{compiler} failed on {}",
            source.display()
        );
        if !plugin {
            programs.push(product);
        }
    }
    programs.sort();
    Ok(programs)
}

/// Runs `program` under the library; `None` when everything held, or why the program could not judge.
fn judge(program: &Path, placement: &str) -> Result<Option<String>> {
    let stats = NamedTempFile::new()?;
    let mut command = Command::new(workspace::dcm());
    command
        .args(["run", "--emulate", "1G", "--placement", placement])
        .args(["--stats", "json", "--stats-file"])
        .arg(stats.path())
        .arg("--")
        .arg(program);
    let finished = process::run(&mut command, LIMIT)?;
    let foreign = program.file_name().is_some_and(|name| name == FOREIGN);
    let mut said: Vec<&str> = finished.stderr.lines().take(6).collect();
    if finished.status.code() == Some(77) {
        return Ok(Some(
            said.join(" | ").trim_start_matches("SKIPPED: ").to_owned(),
        ));
    }
    // `dcm run` hears it of programs that have a broker.
    let told = foreign && placement != "dram";
    ensure!(
        !told
            || said
                .pop()
                .is_some_and(|line| line.contains("another allocator")),
        "dcm run does not say that foreign memory was freed"
    );
    ensure!(
        finished.success() && said.is_empty(),
        "{}: {}",
        finished.ending(),
        said.join(" | ")
    );
    // A pass would mean nothing if the memory was not where the placement says.
    let held = RunStats::read(stats.path())?.extent_held_peak;
    match placement {
        "dc" => ensure!(held > 0, "nothing was ever on extents"),
        "dram" => ensure!(held == 0, "{held} bytes were on extents"),
        _ => {}
    }
    Ok(None)
}
