//! Running other programs with a time limit, their output captured.

use std::io::{ErrorKind, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process_group, set_parent_process_death_signal};

/// What came of a run.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    /// Whether the limit ended it.
    pub(crate) timed_out: bool,
}

impl Finished {
    pub(crate) fn success(&self) -> bool {
        self.status.success() && !self.timed_out
    }

    /// How it ended, in words.
    pub(crate) fn ending(&self) -> String {
        match (self.timed_out, self.status.code(), self.status.signal()) {
            (true, ..) => "ran out of time".to_owned(),
            (_, Some(code), _) => format!("exit code {code}"),
            (_, _, Some(signal)) => format!("signal {signal}"),
            _ => self.status.to_string(),
        }
    }
}

/// A program that runs in the background, in a process group of its own, and outlives neither this value nor the
/// thread that started it.
#[derive(Debug)]
pub(crate) struct Background {
    child: Child,
    output: Option<(Reader, Reader)>,
}

/// Collects what comes out of a pipe.
#[derive(Debug)]
struct Reader {
    bytes: Arc<Mutex<Vec<u8>>>,
    thread: thread::JoinHandle<()>,
}

impl Background {
    /// Starts `command` with captured output and no input.
    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        end_with_us(command);
        let mut child = command
            .spawn()
            .with_context(|| format!("can't start {}", command.get_program().display()))?;
        let stdout = Reader::start(child.stdout.take().context("no stdout")?);
        let stderr = Reader::start(child.stderr.take().context("no stderr")?);
        Ok(Self {
            child,
            output: Some((stdout, stderr)),
        })
    }

    /// What it has written to stdout until now.
    pub(crate) fn stdout_so_far(&self) -> String {
        self.output
            .as_ref()
            .map_or_else(String::new, |(stdout, _)| stdout.so_far())
    }

    /// The same of stderr.
    pub(crate) fn stderr_so_far(&self) -> String {
        self.output
            .as_ref()
            .map_or_else(String::new, |(_, stderr)| stderr.so_far())
    }

    /// The last lines that it has written to stderr.
    pub(crate) fn stderr_tail(&self) -> String {
        let said = self.stderr_so_far();
        let lines: Vec<&str> = said.lines().collect();
        lines[lines.len().saturating_sub(6)..].join(" | ")
    }

    /// Waits until `text` is on its stdout, at most `limit`.
    pub(crate) fn wait_for(&mut self, text: &str, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        while !self.stdout_so_far().contains(text) {
            ensure!(
                !self.has_ended()?,
                "the program ended without saying {text:?}"
            );
            ensure!(
                Instant::now() < deadline,
                "{text:?} did not appear within {limit:?}"
            );
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Waits for its end, at most `limit`; then kills the whole group.
    pub(crate) fn finish(mut self, limit: Duration) -> Result<Finished> {
        let deadline = Instant::now() + limit;
        let mut timed_out = false;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if Instant::now() >= deadline {
                timed_out = true;
                self.kill_group();
                break self.child.wait()?;
            }
            thread::sleep(Duration::from_millis(5));
        };
        // What the program left running would keep the pipes open.
        self.kill_group();
        let (stdout, stderr) = self.output.take().context("output taken twice")?;
        Ok(Finished {
            status,
            stdout: stdout.finish(),
            stderr: stderr.finish(),
            timed_out,
        })
    }

    fn kill_group(&self) {
        if let Some(group) = Pid::from_raw(self.child.id().cast_signed()) {
            // Nothing left to kill is the usual case.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if self.output.is_some() {
            self.kill_group();
            let _ = self.child.wait();
        }
    }
}

/// Nobody drops anything when we are killed, and a guest or a broker would go on for ever: the kernel ends what
/// `command` starts (PR_SET_PDEATHSIG, prctl(2)).
#[expect(
    unsafe_code,
    reason = "std has no other way to do something in the child before exec"
)]
fn end_with_us(command: &mut Command) {
    // SAFETY: between fork and exec the closure makes one system call, and neither allocates nor locks.
    unsafe {
        command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
    }
}

/// Runs `command` to its end, at most `limit`.
pub(crate) fn run(command: &mut Command, limit: Duration) -> Result<Finished> {
    Background::start(command)?.finish(limit)
}

/// Runs `command` with its output on the terminal; whether it succeeded.
pub(crate) fn run_visibly(command: &mut Command) -> Result<bool> {
    let status = command
        .status()
        .with_context(|| format!("can't start {}", command.get_program().display()))?;
    Ok(status.success())
}

impl Reader {
    fn start(mut pipe: impl Read + Send + 'static) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let collected = Arc::clone(&bytes);
        let thread = thread::spawn(move || {
            let mut chunk = [0; 65536];
            loop {
                match pipe.read(&mut chunk) {
                    Ok(0) => break,
                    Ok(n) => lock(&collected).extend_from_slice(&chunk[..n]),
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(_) => break,
                }
            }
        });
        Self { bytes, thread }
    }

    fn so_far(&self) -> String {
        String::from_utf8_lossy(&lock(&self.bytes)).into_owned()
    }

    fn finish(self) -> String {
        let _ = self.thread.join();
        String::from_utf8_lossy(&lock(&self.bytes)).into_owned()
    }
}

fn lock(bytes: &Mutex<Vec<u8>>) -> MutexGuard<'_, Vec<u8>> {
    bytes.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hanging_program_is_ended_with_its_children() {
        let start = Instant::now();
        let mut command = Command::new("sh");
        command.args(["-c", "echo before; sleep 600 & sleep 600"]);
        let finished = run(&mut command, Duration::from_millis(200)).unwrap();
        assert!(finished.timed_out && !finished.success());
        assert_eq!(finished.stdout, "before\n");
        assert!(start.elapsed() < Duration::from_secs(30));
    }

    /// A task that was killed left QEMU and brokers running.
    #[test]
    fn a_program_ends_with_who_started_it() {
        let start = || Background::start(Command::new("sleep").arg("600"));
        let sleep = thread::spawn(start).join().unwrap().unwrap();
        let finished = sleep.finish(Duration::from_secs(60)).unwrap();
        assert!(!finished.timed_out);
        assert_eq!(finished.ending(), "signal 9");
    }

    #[test]
    fn the_ending_says_how() {
        let mut command = Command::new("sh");
        let finished = run(command.args(["-c", "kill -9 $$"]), Duration::from_secs(60)).unwrap();
        assert_eq!(finished.ending(), "signal 9");
        let mut command = Command::new("sh");
        let finished = run(command.args(["-c", "exit 3"]), Duration::from_secs(60)).unwrap();
        assert_eq!(finished.ending(), "exit code 3");
    }
}
