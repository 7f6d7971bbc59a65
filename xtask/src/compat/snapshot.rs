//! A server of redis's kind saves its data set in the background while it is written to: the file is the data set
//! as it was at the fork.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{Results, Session};
use crate::process::Background;

const LIMIT: Duration = Duration::from_secs(240);
const VALUE: usize = 2048;

/// Fills `server` with `mib` MiB under a policy of `fork`, saves, and books whether the file is what it should be.
pub(super) fn judge(
    session: &Session,
    server: &Path,
    fork: &str,
    mib: usize,
    results: &mut Results,
) -> Result<()> {
    let keys = (mib << 20) / VALUE;
    let mut command = session.command(server);
    command.env("DCMALLOC_CONF", format!("fork:{fork}"));
    let mut running = Server::start(command, session.dir())?;
    let (digest, size) = save_while_writing(&running.socket, keys)?;
    running.shut_down()?;
    // Whoever loads it has nothing to do with us.
    let mut fresh = Server::start(Command::new(server), session.dir())?;
    let mut talk = Talk::to(&fresh.socket)?;
    let loaded = talk.ask("DEBUG DIGEST")?;
    let count = talk.ask("DBSIZE")?;
    fresh.shut_down()?;
    ensure!(
        digest.len() == 41 && !digest.starts_with("+00000000"),
        "no digest but {digest:?}"
    );
    let verdict = if loaded == digest {
        "ok".to_owned()
    } else {
        format!("file has digest {loaded}, at the fork it was {digest}")
    };
    results.add(format!("BGSAVE of {mib} MiB under write load"), verdict);
    results.add("keys saved", format!("{count} of {size}"));
    Ok(())
}

/// All on one connection, which the server works off in order: so the digest is that of the data set at the fork,
/// although writes come right before and go on right after.
fn save_while_writing(socket: &Path, keys: usize) -> Result<(String, String)> {
    let mut talk = Talk::to(socket)?;
    let set = |key: usize, round: usize| {
        let mut command = format!("SET live:{key:09} ");
        for _ in 0..VALUE / 16 {
            // Writing into a String can't fail.
            let _ = write!(command, "{key:09}-{round:06}");
        }
        command
    };
    for key in 0..keys {
        talk.say(&set(key, 0))?;
    }
    for key in (0..keys).step_by(3) {
        talk.say(&set(key, 1))?;
    }
    for command in ["DEBUG DIGEST", "DBSIZE", "BGSAVE"] {
        talk.say(command)?;
    }
    for key in (0..keys).step_by(2) {
        talk.say(&set(key, 2))?;
    }
    let mut answers = talk.answers()?;
    ensure!(
        answers.len() == 3 && answers[2].contains("Background saving started"),
        "answers: {answers:?}"
    );
    answers.truncate(2);
    // More of the same until it is saved.
    let end = Instant::now() + LIMIT;
    let mut key = 1;
    loop {
        let info = talk.ask("INFO persistence")?;
        if info.contains("rdb_bgsave_in_progress:0") {
            ensure!(
                info.contains("rdb_last_bgsave_status:ok"),
                "not saved: {info}"
            );
            break;
        }
        ensure!(Instant::now() < end, "the save does not end");
        for _ in 0..1000 {
            talk.say(&set(key % keys, 3))?;
            key += 7;
        }
        talk.answers()?;
    }
    let size = answers.pop().unwrap_or_default();
    Ok((answers.pop().unwrap_or_default(), size))
}

/// A connection.
struct Talk {
    write: BufWriter<UnixStream>,
    read: BufReader<UnixStream>,
    /// Commands that were not answered yet.
    open: usize,
}

impl Talk {
    fn to(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        Ok(Self {
            read: BufReader::new(stream.try_clone()?),
            write: BufWriter::with_capacity(1 << 20, stream),
            open: 0,
        })
    }

    fn say(&mut self, command: &str) -> Result<()> {
        write!(self.write, "{command}\r\n")?;
        self.open += 1;
        Ok(())
    }

    /// What was answered to all commands but those that were answered by `OK`.
    fn answers(&mut self) -> Result<Vec<String>> {
        self.write.flush()?;
        let mut answers = Vec::new();
        for _ in 0..std::mem::take(&mut self.open) {
            let answer = self.answer()?;
            ensure!(!answer.starts_with('-'), "the server said {answer}");
            if answer != "+OK" {
                answers.push(answer);
            }
        }
        Ok(answers)
    }

    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        self.read.read_line(&mut line)?;
        let line = line.trim_end();
        let Some(len) = line.strip_prefix('$') else {
            ensure!(!line.is_empty(), "the server has closed the connection");
            return Ok(line.to_owned());
        };
        let len: usize = len.parse().context("a length that is no number")?;
        let mut text = vec![0; len + 2];
        std::io::Read::read_exact(&mut self.read, &mut text)?;
        Ok(String::from_utf8_lossy(&text).trim_end().to_owned())
    }

    fn ask(&mut self, command: &str) -> Result<String> {
        self.say(command)?;
        self.answers()?.pop().context("no answer")
    }
}

struct Server {
    process: Option<Background>,
    socket: PathBuf,
}

impl Server {
    /// Starts a server, which loads `dump.rdb` of `dir` if there is one.
    fn start(mut server: Command, dir: &Path) -> Result<Self> {
        let socket = dir.join("server.sock");
        server.current_dir(dir).args([
            "--port",
            "0",
            "--unixsocket",
            "server.sock",
            "--save",
            "",
            "--appendonly",
            "no",
            "--enable-debug-command",
            "yes",
        ]);
        let mut process = Background::start(&mut server)?;
        let end = Instant::now() + LIMIT;
        while !Talk::to(&socket)
            .and_then(|mut talk| talk.ask("PING"))
            .is_ok_and(|pong| pong == "+PONG")
        {
            ensure!(!process.has_ended()?, "the server ended at its start");
            ensure!(Instant::now() < end, "the server does not answer");
            thread::sleep(Duration::from_millis(50));
        }
        Ok(Self {
            process: Some(process),
            socket,
        })
    }

    fn shut_down(&mut self) -> Result<()> {
        let mut talk = Talk::to(&self.socket)?;
        talk.say("SHUTDOWN NOSAVE")?;
        talk.write.flush()?;
        let process = self.process.take().context("shut down twice")?;
        let finished = process.finish(LIMIT)?;
        ensure!(
            finished.success() && finished.stderr.is_empty(),
            "the server: {} {}",
            finished.ending(),
            finished.stderr.trim()
        );
        Ok(())
    }
}
