//! `cargo xtask guest test`: boots a guest, serves its orders to the fabric manager, and collects verdicts.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::plan::{self, Plan};
use super::port::{self, Answer, Line, Outcome, Verdict};
use super::qmp::{self, Qmp};
use super::{check, image, machine, page};
use crate::packages;
use crate::process::Background;
use crate::rung::{Tally, build};

/// From QEMU's start to the runner's first word; 10 s on an idle machine.
const BOOT: Duration = Duration::from_secs(300);
/// For one check.
const CHECK: Duration = Duration::from_secs(600);

#[derive(Debug, Default, clap::Args)]
pub(crate) struct Options {
    /// Checks to run; all when none is named
    checks: Vec<String>,
    /// Also those that take long
    #[arg(long)]
    full: bool,
    /// List the checks and what they show
    #[arg(long)]
    list: bool,
}

/// What a guest said.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub(super) verdicts: Vec<Verdict>,
    /// How long the boot took.
    pub(super) boot: Duration,
}

/// Whether nothing failed.
pub(crate) fn run(options: &Options) -> Result<bool> {
    if options.list {
        for check in check::ALL {
            let full = if check.full { " (--full)" } else { "" };
            println!("{:<18} {}{full}", check.name, check.shows);
        }
        return Ok(true);
    }
    let start = Instant::now();
    let report = in_guest(known(&options.checks)?, options.full)?;
    let tally = tell(&report);
    if options.full && options.checks.is_empty() {
        page::write(&report, start.elapsed())?;
    }
    println!(
        "\n{} passed, {} failed, {:.0} s",
        tally.passed,
        tally.failed.len(),
        start.elapsed().as_secs_f64()
    );
    Ok(tally.failed.is_empty())
}

/// Runs all checks but the long ones in one guest, with a table of them.
pub(crate) fn checks() -> Result<Tally> {
    Ok(tell(&in_guest(&[], false)?))
}

/// `names`, if there are such checks.
fn known(names: &[String]) -> Result<&[String]> {
    for name in names {
        if !check::ALL.iter().any(|check| check.name == name) {
            bail!("no check {name}; cargo xtask guest test --list");
        }
    }
    Ok(names)
}

/// Builds what the guest runs, and boots one that runs the checks.
pub(super) fn in_guest(names: &[String], full: bool) -> Result<Report> {
    packages::ensure_qemu()?;
    packages::ensure(check::PACKAGES)?;
    ensure!(build::release()?, "the release build failed");
    let plan = Plan {
        checks: names.to_vec(),
        full,
        tests: plan::build_tests(check::TESTS)?,
    };
    boot(&plan)
}

/// Prints the table of what a guest said.
pub(super) fn tell(report: &Report) -> Tally {
    let mut tally = Tally::default();
    println!("\nboot {:.1} s", report.boot.as_secs_f64());
    for verdict in &report.verdicts {
        let (word, reason) = match &verdict.outcome {
            Outcome::Passed => {
                tally.pass();
                ("ok", "")
            }
            Outcome::Failed(reason) => {
                tally.fail(&verdict.check, reason);
                ("FAILED", reason.as_str())
            }
        };
        println!(
            "{:<18} {word:<7} {:>7.1} s  {reason}",
            verdict.check, verdict.seconds
        );
        for note in &verdict.notes {
            println!("{:<38}{note}", "");
        }
    }
    tally
}

/// Boots a guest, lets it run `plan`, and ends it.
fn boot(plan: &Plan) -> Result<Report> {
    let image = image::make()?;
    plan.write(&super::plan_file())?;
    let dir = tempfile::tempdir()?;
    let (qmp_socket, port_socket) = (dir.path().join("qmp.sock"), dir.path().join("port.sock"));
    let console = image::directory().join("console.log");
    let runner = std::env::current_exe()?;
    let runner = runner.to_str().context("a path that is no text")?;
    let mut qemu = machine::qemu(&image, &qmp_socket, &[runner, "guest", "inside"]);
    let monitor = dir.path().join("monitor.sock");
    machine::equip(&mut qemu, &port_socket, &monitor, &console);
    eprintln!("booting; the guest's console goes to {}", console.display());
    let start = Instant::now();
    let mut qemu = Background::start(&mut qemu)?;
    let mut report = Report::default();
    let result = (|| {
        let mut qmp = Qmp::connect(&qmp_socket)?;
        let port = qmp::connect(&port_socket)?;
        converse(&mut qemu, &mut qmp, port, start, &mut report)
    })();
    if let Err(error) = result {
        let finished = qemu.finish(Duration::ZERO)?;
        let said = fs::read_to_string(&console).unwrap_or_default();
        let last: Vec<&str> = said.lines().rev().take(5).collect();
        let last: Vec<&str> = last.into_iter().rev().collect();
        return Err(error.context(format!(
            "the guest, after {} checks; QEMU: {}; console: {}",
            report.verdicts.len(),
            finished.stderr.trim(),
            last.join(" | ")
        )));
    }
    // It switches itself off.
    qemu.finish(Duration::from_secs(60))?;
    Ok(report)
}

/// Hears the guest out.
fn converse(
    qemu: &mut Background,
    qmp: &mut Qmp,
    port: UnixStream,
    start: Instant,
    report: &mut Report,
) -> Result<()> {
    let mut answers = port.try_clone()?;
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(port).lines() {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    let mut deadline = start + BOOT;
    loop {
        let line = match lines.recv_timeout(Duration::from_millis(200)) {
            Ok(line) => line?,
            Err(RecvTimeoutError::Timeout) => {
                ensure!(!qemu.has_ended()?, "QEMU has ended");
                ensure!(
                    Instant::now() < deadline,
                    "nothing heard of it for too long"
                );
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => bail!("QEMU has closed the port"),
        };
        let line = serde_json::from_str(&line).with_context(|| format!("it says {line:?}"))?;
        match line {
            Line::Booted => report.boot = start.elapsed(),
            Line::Add { region, pieces } => answer(&mut answers, qmp.add(region, &pieces))?,
            Line::Release { region, pieces } => answer(&mut answers, qmp.release(region, &pieces))?,
            Line::Ended(verdict) => {
                eprintln!(
                    "  {} {:?} {:.1} s",
                    verdict.check, verdict.outcome, verdict.seconds
                );
                report.verdicts.push(verdict);
            }
            Line::Done => return Ok(()),
        }
        deadline = Instant::now() + CHECK;
    }
}

fn answer(port: &mut UnixStream, result: Result<()>) -> Result<()> {
    let answer: Answer = result.map_err(|error| format!("{error:#}"));
    port::say(port, &answer)
}
