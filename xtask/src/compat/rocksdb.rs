//! RocksDB's db_bench with direct I/O, from buffers that it has on its heap.

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::{Program, Results, Scale, Session};
use crate::{packages, process};

const LIMIT: Duration = Duration::from_secs(600);

pub(super) const PROGRAM: Program = Program {
    name: "rocksdb",
    how: "db_bench with direct reads, flushes and compactions: fillrandom, overwrite, readrandom, \
          readwhilewriting, compact, verifychecksum; then every key and value, read by ldb without us",
    short: false,
    prepare: || packages::ensure(&["rocksdb-tools"]),
    version: || packages::version("rocksdb-tools"),
    run,
};

fn run(session: &Session) -> Result<Results> {
    let number = if session.scale == Scale::Short {
        50_000
    } else {
        400_000
    };
    let mut results = Results::default();
    let scratch = session.scratch()?;
    let db = scratch.path().join("db");
    let mut bench = |benchmarks: &str, threads: &str| -> Result<()> {
        let mut bench = session.command("db_bench");
        bench
            .arg(format!("--benchmarks={benchmarks}"))
            .arg(format!("--db={}", db.display()))
            .arg(format!("--num={number}"))
            .arg(format!("--threads={threads}"))
            .arg(format!(
                "--use_existing_db={}",
                !benchmarks.contains("fill")
            ))
            .args(["--seed=1", "--value_size=400", "--cache_size=67108864"])
            .args([
                "--use_direct_reads",
                "--use_direct_io_for_flush_and_compaction",
            ])
            .args(["--write_buffer_size=16777216", "--verify_checksum"]);
        let output = session.succeed(&mut bench, LIMIT)?;
        for benchmark in benchmarks.split(',') {
            let line = output.lines().find(|line| line.starts_with(benchmark));
            results.add(benchmark, if line.is_some() { "ok" } else { "missing" });
        }
        Ok(())
    };
    // One thread with one seed writes the same each time.
    bench("fillrandom,overwrite,compact", "1")?;
    bench("readrandom,readseq,verifychecksum", "4")?;
    let mut ldb = Command::new("sh");
    ldb.args(["-c", "ldb --db=\"$0\" scan --hex | sha256sum"])
        .arg(&db);
    let sum = process::run(&mut ldb, LIMIT)?;
    ensure!(sum.success(), "ldb: {}", sum.stderr.trim());
    results.add("all keys and values", sum.stdout.trim());
    Ok(results)
}
