//! memcached: its own tests, and values that must be what was put there, also with all memory locked (`-k`).

use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use super::{Program, Results, Scale, Session, session};
use crate::packages;
use crate::process::{self, Background};

const LIMIT: Duration = Duration::from_secs(900);
const CLIENTS: usize = 4;

pub(super) const PROGRAM: Program = Program {
    name: "memcached",
    how: "`prove` over the tests of Debian's source; the packaged server with 100 MiB under load of four clients, \
          every value checked, also with `-k`",
    short: false,
    prepare,
    version: || packages::version("memcached"),
    run,
};

fn prepare() -> Result<()> {
    packages::ensure(&[
        "gcc",
        "libc6-dev",
        "libevent-dev",
        "make",
        "memcached",
        "perl",
    ])?;
    let source = packages::source("memcached")?;
    if source.join("memcached-debug").exists() {
        return Ok(());
    }
    let mut build = Command::new("sh");
    build
        .current_dir(source)
        .args(["-c", "./configure && make -j2"]);
    let finished = process::run(&mut build, LIMIT)?;
    ensure!(
        finished.success(),
        "{}",
        session::explain(&build, &finished)
    );
    Ok(())
}

fn run(session: &Session) -> Result<Results> {
    let mut results = Results::default();
    for (name, option) in [("under load", "-v"), ("under load, locked", "-k")] {
        results.add(name, load(session, option)?);
    }
    if session.scale == Scale::Whole {
        prove(session, &mut results)?;
    }
    Ok(results)
}

/// Lines such as `t/flags.t ...... ok`.
fn prove(session: &Session, results: &mut Results) -> Result<()> {
    let mut prove = session.command("prove");
    prove
        .current_dir(packages::source("memcached")?)
        .args(["-j8", "t"]);
    let finished = process::run(&mut prove, LIMIT)?;
    ensure!(
        !finished.timed_out,
        "{}",
        session::explain(&prove, &finished)
    );
    for line in finished.stdout.lines() {
        if let Some((name, outcome)) = line.split_once(" .")
            && name.starts_with("t/")
        {
            results.add(name.trim(), outcome.trim_start_matches('.').trim());
        }
    }
    let (said, complained) = (finished.stdout.lines(), finished.stderr.lines());
    for line in said.chain(complained).filter(|line| is_complaint(line)) {
        // A value may be part of it.
        let line: String = line.trim().chars().take(160).collect();
        eprintln!("  {line}");
    }
    results.add("the ending", finished.ending());
    Ok(())
}

/// What `prove` and a test of its own say of what went wrong.
fn is_complaint(line: &str) -> bool {
    ["Failed", "Dubious", "got:", "expected:", "died"]
        .iter()
        .any(|word| line.contains(word))
}

fn load(session: &Session, option: &str) -> Result<String> {
    let socket = session.dir().join(format!("memcached{option}.sock"));
    let mut server = session.command("memcached");
    server
        .args(["-u", "root", "-m", "256", "-t", "2", option, "-s"])
        .arg(&socket);
    let mut server = Background::start(&mut server)?;
    let end = Instant::now() + Duration::from_secs(30);
    while UnixStream::connect(&socket).is_err() {
        ensure!(!server.has_ended()?, "memcached ended at its start");
        ensure!(Instant::now() < end, "memcached does not answer");
        thread::sleep(Duration::from_millis(20));
    }
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let socket = socket.clone();
            thread::spawn(move || talk(&socket, client))
        })
        .collect();
    let mut checked = 0;
    for client in clients {
        checked += client.join().map_err(|_| anyhow!("a client panicked"))??;
    }
    ensure!(!server.has_ended()?, "memcached has ended");
    Ok(format!("{checked} values checked"))
}

/// Sets and gets 6,000 values of up to 8 KiB, five times over.
fn talk(socket: &Path, client: usize) -> Result<usize> {
    const KEYS: usize = 6000;
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(LIMIT))?;
    let mut read = BufReader::new(stream.try_clone()?);
    let mut write = BufWriter::new(stream);
    let value =
        |key: usize, round: usize| format!("{client}-{key}-{round};").repeat(20 + key % 500);
    let mut line = String::new();
    let mut checked = 0;
    for round in 0..5 {
        for key in 0..KEYS {
            let value = value(key, round);
            write!(
                write,
                "set {client}:{key} 0 0 {}\r\n{value}\r\n",
                value.len()
            )?;
            write.flush()?;
            line.clear();
            read.read_line(&mut line)?;
            ensure!(line == "STORED\r\n", "set: {line:?}");
        }
        for key in 0..KEYS {
            write!(write, "get {client}:{key}\r\n")?;
            write.flush()?;
            line.clear();
            read.read_line(&mut line)?;
            let len = line.trim_end().rsplit(' ').next().unwrap_or_default();
            let len: usize = len.parse().with_context(|| format!("get: {line:?}"))?;
            let mut bytes = vec![0; len + 2 + "END\r\n".len()];
            read.read_exact(&mut bytes)?;
            ensure!(
                bytes[..len] == *value(key, round).as_bytes(),
                "{client}:{key} is not what was set"
            );
            checked += 1;
        }
    }
    Ok(checked)
}
