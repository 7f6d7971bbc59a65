//! `dcm run`: a program with its heap on dynamic capacity.
#![forbid(unsafe_code)]

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use allocator::Placement;
use anyhow::{Context, anyhow};
use clap::{Args, ValueEnum};
use dax_backend::broker::admin::{AdminClient, AdminReply, AdminRequest};
use dax_backend::broker::client_page::{
    DEGRADED_DISCONNECTED, DEGRADED_FOREIGN, DEGRADED_NO_REBIND, DEGRADED_NO_RING,
    DEGRADED_NO_SPILL, DEGRADED_USER_MOVES,
};
use dax_backend::broker::status::RunReport;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use uuid::Uuid;

use crate::failure::Failure;
use crate::serve::READY;
use crate::signals::Signals;
use crate::{capacity, conf, picture, sockets};

/// Names the run for the program's processes.
const RUN_VARIABLE: &str = "DCM_RUN";
/// The library's file, and the variable that says where it is.
const LIBRARY: &str = "libdcmalloc_preload.so";
const LIBRARY_VARIABLE: &str = "DCM_PRELOAD";

/// How long the broker of a run may take to end when nobody needs it any more.
const PARTING: Duration = Duration::from_secs(2);

/// How statistics are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum StatsFormat {
    /// For people.
    Text,
    /// One line of JSON.
    Json,
}

/// Options of `dcm run`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    capacity: capacity::Source,
    /// Which allocations go to dynamic capacity: dram, dc, size, size:BYTES, interleave:N
    #[arg(long, value_name = "P")]
    placement: Option<String>,
    /// Further settings, key:value,…
    #[arg(long, value_name = "KEY:VALUE,…")]
    conf: Option<String>,
    /// Say at exit what the program's memory used
    #[arg(long, value_name = "FORMAT")]
    stats: Option<StatsFormat>,
    /// Write the statistics there instead of to stderr
    #[arg(long, value_name = "PATH", requires = "stats")]
    stats_file: Option<PathBuf>,
    /// The broker's socket (with a capacity of its own: where to make it)
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The program and its arguments
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "PROGRAM"
    )]
    command: Vec<OsString>,
}

/// Runs the program; its exit code is the answer.
pub(crate) fn run(options: &Options) -> Result<u8, Failure> {
    let settings = conf::join(
        conf::of_file()?,
        env::var(conf::VARIABLE).ok().as_deref(),
        options.conf.as_deref(),
        options.placement.as_deref(),
    )?;
    if options.capacity.is_given() {
        options.capacity.check()?;
    }
    let library = find_library()?;
    let run = Uuid::new_v4();
    let mut own_broker = None;
    let socket = if options.capacity.is_given() {
        let broker = OwnBroker::start(options, run)?;
        let socket = broker.socket.clone();
        own_broker = Some(broker);
        Some(socket)
    } else {
        match sockets::find(options.socket.as_deref()) {
            Ok(socket) => Some(socket),
            Err(reason) => {
                complain(&format!("{reason}; running on DRAM"));
                None
            }
        }
    };

    // From here on the signals are the program's.
    let signals = Signals::block()?;
    let mut command = Command::new(&options.command[0]);
    command
        .args(&options.command[1..])
        .env("LD_PRELOAD", preloads(&library)?)
        .env(RUN_VARIABLE, run.to_string());
    if !settings.text.is_empty() {
        command.env(conf::VARIABLE, &settings.text);
    }
    signals.restore_in(&mut command);
    match &socket {
        Some(socket) => command.env(sockets::VARIABLE, socket),
        None => command.env_remove(sockets::VARIABLE),
    };
    let mut program = match command.spawn() {
        Ok(program) => program,
        Err(error) => {
            complain(&format!(
                "{}: {error}",
                options.command[0].to_string_lossy()
            ));
            // As env(1) and every shell have it.
            let missing = error.kind() == std::io::ErrorKind::NotFound;
            return Ok(if missing { 127 } else { 126 });
        }
    };
    let status = wait(&mut program, &signals)?;
    let report = match socket {
        Some(socket) => report(options, &socket, run, settings.config.placement),
        None => {
            if options.stats.is_some() {
                complain("no statistics: the broker keeps them");
            }
            None
        }
    };
    if let Some(broker) = own_broker {
        broker.finish(report.is_some_and(|report| report.processes_live > 0));
    }
    Ok(exit_code(status))
}

/// Waits for the program's end and hands it the signals meant for it.
fn wait(program: &mut Child, signals: &Signals) -> anyhow::Result<ExitStatus> {
    let pid = Pid::from_child(program);
    let ended = pidfd_open(pid, PidfdFlags::empty()).context("cannot watch the program")?;
    loop {
        let mut fds = [
            PollFd::new(&ended, PollFlags::IN),
            PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(anyhow!(errno).context("cannot wait for the program")),
        }
        if !fds[0].revents().is_empty() {
            return program.wait().context("cannot wait for the program");
        }
        if fds[1].revents().contains(PollFlags::IN)
            && let Some(received) = signals.wait()
            && received.by_process
            && let Some(signal) = Signal::from_named_raw(received.signal)
        {
            // It may have ended in this instant.
            let _ = kill_process(pid, signal);
        }
    }
}

fn exit_code(status: ExitStatus) -> u8 {
    match (status.code(), status.signal()) {
        (Some(code), _) => code as u8,
        (None, Some(signal)) => 128u8.wrapping_add(signal as u8),
        (None, None) => 1,
    }
}

/// The broker that lives for this run, a process of its own: a daemon that the
/// program leaves behind keeps it, and its death takes nothing along.
struct OwnBroker {
    process: Child,
    socket: PathBuf,
}

impl OwnBroker {
    fn start(options: &Options, run: Uuid) -> Result<Self, Failure> {
        let socket = match &options.socket {
            Some(socket) => socket.clone(),
            None => sockets::directory()?.join(format!("run-{}.sock", std::process::id())),
        };
        let socket = std::path::absolute(&socket).context("no current directory")?;
        let mut command = Command::new("/proc/self/exe");
        command.arg("serve").arg("--run").arg(run.to_string());
        command.arg("--socket").arg(&socket);
        command.args(options.capacity.arguments());
        let mut process = command
            .arg0("dcm")
            // The terminal's signals are not for it.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the broker")?;
        let mut line = String::new();
        if let Some(stdout) = process.stdout.take() {
            BufReader::new(stdout)
                .read_line(&mut line)
                .context("cannot hear the broker")?;
        }
        if line != READY {
            // It has said why on stderr.
            let _ = process.wait();
            return Err(anyhow!("the broker did not start").into());
        }
        Ok(Self { process, socket })
    }

    /// Lets the broker end, and waits for it, so that nothing is left when
    /// `dcm` ends; unless processes that the program left behind need it.
    fn finish(mut self, needed: bool) {
        drop(self.process.stdin.take());
        let started = Instant::now();
        while !needed && started.elapsed() < PARTING {
            match self.process.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(2)),
                _ => return,
            }
        }
    }
}

pub(crate) fn find_library() -> Result<PathBuf, Failure> {
    if let Some(path) = env::var_os(LIBRARY_VARIABLE).filter(|path| !path.is_empty()) {
        let path = PathBuf::from(path);
        return if path.is_file() {
            Ok(std::path::absolute(&path).context("no current directory")?)
        } else {
            let path = path.display();
            Err(Failure::Usage(format!(
                "{LIBRARY_VARIABLE}: there is no file {path}"
            )))
        };
    }
    let program = env::current_exe().context("cannot tell where dcm is")?;
    let beside = program.parent().unwrap_or(Path::new("/"));
    let places = [beside.join(LIBRARY), beside.join("../lib").join(LIBRARY)];
    places
        .iter()
        .find_map(|place| fs::canonicalize(place).ok())
        .ok_or_else(|| {
            let [first, second] = places.map(|place| place.display().to_string());
            anyhow!("{LIBRARY} is neither {first} nor {second}: build or install it, or set {LIBRARY_VARIABLE}")
                .into()
        })
}

/// Our library before whatever was to be preloaded anyway.
fn preloads(library: &Path) -> Result<OsString, Failure> {
    // ld.so(8) knows no way to quote them.
    if library
        .as_os_str()
        .as_bytes()
        .iter()
        .any(|byte| b" :".contains(byte))
    {
        let path = library.display();
        return Err(Failure::Usage(format!(
            "LD_PRELOAD can't name {path}, because of the space or colon in it: \
             set {LIBRARY_VARIABLE} to a copy elsewhere"
        )));
    }
    let mut preloads = OsString::from(library);
    if let Some(others) = env::var_os("LD_PRELOAD").filter(|others| !others.is_empty()) {
        preloads.push(":");
        preloads.push(others);
    }
    Ok(preloads)
}

/// Says what has to be said at the end: statistics if asked, and once if the
/// program did not run as it should have.
fn report(options: &Options, socket: &Path, run: Uuid, placement: Placement) -> Option<RunReport> {
    let report = match ask_for_report(socket, run) {
        Ok(report) => report,
        Err(error) => {
            // The orders of a system's broker are not for everybody.
            if options.stats.is_some() {
                complain(&format!("no statistics: {error:#}"));
            }
            return None;
        }
    };
    let degraded = report.total.degraded_flags;
    if report.processes_total == 0 && placement != Placement::Dram {
        complain(
            "the program never connected to the broker and ran on its own memory: \
             is it linked statically, or set-user-ID?",
        );
    }
    for (flag, says) in [
        (
            DEGRADED_DISCONNECTED,
            "the program lost the broker: part of it ran on DRAM",
        ),
        (
            DEGRADED_NO_REBIND,
            "the program's live memory could not be moved: a recall gets what is free alone \
             (dcm doctor says what is missing)",
        ),
        (
            DEGRADED_USER_MOVES,
            "system calls of the program that met memory on the move failed with EFAULT, \
             as moves:user wants it (dcm doctor says what is missing)",
        ),
        (
            DEGRADED_FOREIGN,
            "the program freed memory that another allocator gave it: it was left alone, and leaks",
        ),
        (
            DEGRADED_NO_SPILL,
            "the program could make no file in spill_dir, and so spilled nothing",
        ),
        (
            DEGRADED_NO_RING,
            "io_uring is denied: the program spilled with one write at a time",
        ),
    ] {
        if degraded & flag != 0 {
            complain(says);
        }
    }
    if let Some(format) = options.stats
        && let Err(error) = write_statistics(&report, format, options.stats_file.as_deref())
    {
        complain(&format!("no statistics: {error:#}"));
    }
    Some(report)
}

fn write_statistics(
    report: &RunReport,
    format: StatsFormat,
    file: Option<&Path>,
) -> anyhow::Result<()> {
    let text = match format {
        StatsFormat::Json => serde_json::to_string(report)? + "\n",
        StatsFormat::Text => picture::run(report),
    };
    match file {
        None => std::io::stderr().lock().write_all(text.as_bytes())?,
        Some(path) => {
            fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?
        }
    }
    Ok(())
}

/// The broker's account of the run, once it has seen the program's end.
fn ask_for_report(socket: &Path, run: Uuid) -> anyhow::Result<RunReport> {
    let broker = AdminClient::connect(socket)?;
    let started = Instant::now();
    loop {
        let reply = broker.ask(&AdminRequest::Run { run }, Duration::from_secs(5))?;
        let AdminReply::Run(report) = reply else {
            return Err(anyhow!("the broker answered something else"));
        };
        if report.processes_live == 0 || started.elapsed() > Duration::from_millis(200) {
            return Ok(*report);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn complain(message: &str) {
    let _ = writeln!(std::io::stderr().lock(), "dcm: {message}");
}
