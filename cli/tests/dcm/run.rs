//! `dcm run`: the program is all there is to see.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::call::{Dcm, processes_with, signal, stderr, within};
use crate::client::run_leasing;

const MIB: u64 = 1 << 20;

/// The line that a program brings about which never connects.
const NEVER: &str = "dcm: the program never connected";

#[test]
fn output_and_exit_codes_are_the_programs() {
    let dcm = Dcm::new();
    for (script, code) in [
        ("exit 0", 0),
        ("exit 7", 7),
        ("kill -TERM $$", 143),
        ("kill -KILL $$", 137),
    ] {
        let output = dcm.shell(&["--emulate", "64M", "--placement", "dram"], script);
        assert_eq!(output.status.code(), Some(code), "{script}");
        assert!(
            output.stdout.is_empty() && output.stderr.is_empty(),
            "{output:?}"
        );
    }
    let output = dcm.shell(
        &["--emulate", "64M", "--placement", "dram"],
        "cat; echo err >&2",
    );
    assert_eq!(stderr(&output), "err\n");
}

#[test]
fn a_program_that_is_not_there_is_no_success() {
    let dcm = Dcm::new();
    let output = dcm.call(&["run", "--emulate", "64M", "--", "/nonexistent/program"]);
    assert_eq!(output.status.code(), Some(127));
    assert!(stderr(&output).contains("/nonexistent/program"));
    let output = dcm.call(&["run", "--emulate", "64M", "--", "/"]);
    assert_eq!(output.status.code(), Some(126));
}

#[test]
fn the_program_gets_library_socket_run_and_settings() {
    let dcm = Dcm::new();
    let script = "echo $LD_PRELOAD; echo $DCM_SOCKET; echo $DCM_RUN; echo $DCMALLOC_CONF";
    let options = [
        "--emulate",
        "64M",
        "--conf",
        "verbose:true",
        "--placement",
        "dc",
    ];
    let output = dcm.shell(&options, script);
    let stdout = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = stdout.lines().collect();
    assert!(lines[0].ends_with("libm.so.6"), "{stdout}");
    assert!(lines[1].ends_with("/run.sock"), "{stdout}");
    assert!(lines[2].parse::<uuid::Uuid>().is_ok(), "{stdout}");
    assert_eq!(lines[3], "verbose:true,placement:dc");
}

#[test]
fn degradation_is_said_once() {
    let dcm = Dcm::new();
    let output = dcm.shell(&["--emulate", "64M"], "true");
    let said = stderr(&output);
    assert!(
        said.starts_with(NEVER) && said.lines().count() == 1,
        "{said}"
    );

    let output = dcm.shell(&[], "echo fine");
    let said = stderr(&output);
    assert_eq!(
        (output.status.code(), &output.stdout[..]),
        (Some(0), &b"fine\n"[..])
    );
    assert!(
        said.contains("dcm serve") && said.contains("on DRAM"),
        "{said}"
    );
    assert_eq!(said.lines().count(), 1, "{said}");
}

fn leasing(dcm: &Dcm, options: &[&str], bytes: u64) -> Child {
    let mut command = run_leasing(dcm, options, bytes);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    // The rest of the output is the test harness's and stays unread in the pipe.
    let mut lines = stdout.lines().map_while(Result::ok);
    assert!(lines.by_ref().any(|line| line.contains("leased")));
    std::mem::forget(lines);
    child
}

#[test]
fn statistics_are_those_of_the_programs_processes() {
    let dcm = Dcm::new();
    let file = dcm.directory.path().join("stats.json");
    let options = [
        "--emulate",
        "64M",
        "--stats",
        "json",
        "--stats-file",
        file.to_str().unwrap(),
    ];
    let mut child = leasing(&dcm, &options, 6 * MIB);
    drop(child.stdin.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), stderr(&output)),
        (Some(0), String::new())
    );
    let stats: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!(stats["processes_total"], 1);
    assert_eq!(stats["processes_live"], 0);
    assert_eq!(stats["groups_answered"], 1);
    let total = &stats["total"];
    assert_eq!(total["extent_live_peak"], 6 * MIB);
    assert_eq!(total["heap_live_peak_on_extents"], 6 * MIB);
    assert_eq!(
        (&total["leases"], &total["extent_live_bytes"]),
        (&1.into(), &0.into())
    );
    assert_eq!(stats["processes"][0]["leased_peak"], 6 * MIB);
}

#[test]
fn kill_9_of_the_program_leaves_nothing_behind() {
    let dcm = Dcm::new();
    let socket = dcm.directory.path().join("run.sock");
    let socket = socket.to_str().unwrap();
    let mut child = leasing(&dcm, &["--emulate", "64M", "--socket", socket], 32 * MIB);
    let family = processes_with(socket);
    assert_eq!(family.len(), 2, "dcm and its broker: {family:?}");
    let program = fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap();
    let program = program
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .find(|pid| !family.contains(pid))
        .expect("the program is a child of dcm");
    let memfds = memfds_of(&family);
    assert!(memfds >= 2, "window and client page: {memfds}");
    signal(program, libc::SIGKILL);
    assert_eq!(child.wait().unwrap().code(), Some(137));
    // Nothing has to be waited for: dcm ends last.
    assert_eq!(processes_with(socket), Vec::<u32>::new());
    assert!(!fs::exists(socket).unwrap());
    assert_eq!(memfds_of(&family), 0);
}

/// Memfds of ours that these processes hold open.
fn memfds_of(pids: &[u32]) -> usize {
    pids.iter()
        .filter_map(|pid| fs::read_dir(format!("/proc/{pid}/fd")).ok())
        .flatten()
        .filter_map(|fd| fs::read_link(fd.ok()?.path()).ok())
        .filter(|file| file.to_string_lossy().contains("memfd:"))
        .count()
}

#[test]
fn kill_9_of_dcm_takes_the_broker_along_when_the_program_ends() {
    let dcm = Dcm::new();
    let socket = dcm.directory.path().join("run.sock");
    let socket = socket.to_str().unwrap();
    let mut child = leasing(&dcm, &["--emulate", "64M", "--socket", socket], 8 * MIB);
    // The program lives on its memory until its stdin ends.
    let stdin = child.stdin.take();
    child.kill().unwrap();
    child.wait().unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(processes_with(socket).len(), 1);
    drop(stdin);
    within(Duration::from_secs(3), "the broker ends", || {
        processes_with(socket).is_empty()
    });
    assert!(!fs::exists(socket).unwrap());
}

#[test]
fn signals_reach_the_program() {
    let dcm = Dcm::new();
    for (number, name) in [
        (libc::SIGTERM, "TERM"),
        (libc::SIGINT, "INT"),
        (libc::SIGUSR1, "USR1"),
    ] {
        let script = format!(
            "trap 'echo got {name}; exit 5' {name}; echo ready; \
             for i in $(seq 1000); do sleep 0.02; done"
        );
        let socket = dcm.directory.path().join(name);
        let mut command =
            dcm.command(&["run", "--emulate", "64M", "--placement", "dram", "--socket"]);
        command
            .arg(&socket)
            .args(["--", "sh", "-c", &script])
            .stdout(Stdio::piped());
        // A shell can't trap what it was started with ignored, as everything
        // under nohup(1) or in the background of a script is.
        // SAFETY: signal(2) may be called between fork and exec.
        unsafe {
            command.pre_exec(move || {
                libc::signal(number, libc::SIG_DFL);
                Ok(())
            });
        }
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "ready");
        signal(child.id(), number);
        assert_eq!(lines.next().unwrap().unwrap(), format!("got {name}"));
        assert_eq!(child.wait().unwrap().code(), Some(5));
    }
}

#[test]
fn a_running_broker_serves_programs_and_shows_them() {
    let dcm = Dcm::new();
    let _server = dcm.serve(&["--emulate", "64M"]);
    let mut child = leasing(&dcm, &[], 16 * MIB);
    let status: Value = serde_json::from_str(&dcm.ok(&["status", "--json"])).unwrap();
    assert_eq!(status["clients"][0]["leased"], 16 * MIB);
    // Nothing of it is free to give, and this program never answers.
    let receipt = dcm.ok(&["release", "64M", "--deadline", "100"]);
    assert!(receipt.contains("returned  48M"), "{receipt}");
    assert!(
        receipt.contains("did not answer by the deadline (pid "),
        "{receipt}"
    );
    drop(child.stdin.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    within(Duration::from_secs(1), "the lease ends", || {
        let status: Value = serde_json::from_str(&dcm.ok(&["status", "--json"])).unwrap();
        status["capacity"]["leased"] == 0
    });
}
