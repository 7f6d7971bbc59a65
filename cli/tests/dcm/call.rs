//! Calling `dcm`, with nothing of the caller's environment in the way.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// `dcm` with a directory of its own for sockets.
pub(crate) struct Dcm {
    pub(crate) directory: tempfile::TempDir,
}

impl Dcm {
    pub(crate) fn new() -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
        }
    }

    /// Where this instance's broker listens.
    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("broker.sock")
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dcm"));
        for variable in ["DCMALLOC_CONF", "DCM_RUN", "LD_PRELOAD"] {
            command.env_remove(variable);
        }
        command
            .args(args)
            .env("DCM_SOCKET", self.socket())
            .env("DCM_PRELOAD", stand_in());
        command
    }

    pub(crate) fn call(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Calls `dcm`, which must succeed; its stdout.
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        let output = self.call(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Calls `dcm run` with options before and a shell script after the `--`.
    pub(crate) fn shell(&self, options: &[&str], script: &str) -> Output {
        let mut args = vec!["run", "--socket"];
        let socket = self.directory.path().join("run.sock");
        args.push(socket.to_str().unwrap());
        args.extend(options);
        args.extend(["--", "sh", "-c", script]);
        self.call(&args)
    }

    /// A broker in the background, ready.
    pub(crate) fn serve(&self, options: &[&str]) -> Server {
        let socket = self.socket();
        let mut args = vec!["serve", "--socket", socket.to_str().unwrap()];
        args.extend(options);
        let mut child = self.command(&args).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        assert!(line.starts_with("serving "), "{line}");
        Server { child }
    }
}

/// `dcm serve`, told to stop when dropped.
pub(crate) struct Server {
    pub(crate) child: Child,
}

impl Server {
    pub(crate) fn terminate(&mut self) -> Option<i32> {
        signal(self.child.id(), libc::SIGTERM);
        self.child.wait().unwrap().code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn signal(pid: u32, signal: i32) {
    // SAFETY: a process of this test, not reaped yet.
    assert_eq!(unsafe { libc::kill(pid as i32, signal) }, 0);
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A library that loads into everything and does nothing to it.
fn stand_in() -> PathBuf {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let libc = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5))
        .find(|path| path.contains("/libc.so.6") || path.contains("/libc-"))
        .expect("a C library that is linked dynamically");
    Path::new(libc).with_file_name("libm.so.6")
}

/// Waits for `wanted`, at most `limit`.
pub(crate) fn within(limit: Duration, what: &str, wanted: impl Fn() -> bool) {
    let started = Instant::now();
    while !wanted() {
        assert!(started.elapsed() < limit, "not within {limit:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Processes whose command line contains `text`.
pub(crate) fn processes_with(text: &str) -> Vec<u32> {
    let own = std::process::id();
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != own)
        .filter(|pid| {
            fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).contains(text))
        })
        .collect()
}
