//! PostgreSQL from Debian, as its own user: pgbench, pg_amcheck, a killed backend, the regression tests.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{Program, Results, Scale, Session, session};
use crate::packages;
use crate::process::{self, Background};

const USER: &str = "postgres";
const BIN: &str = "/usr/lib/postgresql/15/bin";
const REGRESS: &str = "/usr/lib/postgresql/15/lib/pgxs/src/test/regress/pg_regress";
const LIMIT: Duration = Duration::from_secs(1500);

pub(super) const PROGRAM: Program = Program {
    name: "postgresql",
    how: "as its own user: initdb, pgbench with 16 clients for 60 s, pg_amcheck, kill -9 of a backend under load \
          and recovery, sums that pgbench's transactions keep; pg_regress of the source package against the \
          installed server",
    short: false,
    prepare,
    version: || packages::version("postgresql-15"),
    run,
};

fn prepare() -> Result<()> {
    packages::ensure(&[
        "gcc",
        "libc6-dev",
        "postgresql-15",
        "postgresql-client-15",
        "postgresql-server-dev-15",
    ])?;
    packages::source("postgresql-15").map(drop)
}

fn run(session: &Session) -> Result<Results> {
    let mut results = Results::default();
    let cluster = Cluster::start(session)?;
    let seconds = if session.scale == Scale::Short {
        "10"
    } else {
        "60"
    };
    cluster.call("createdb", &["bench"])?;
    cluster.call("pgbench", &["-q", "-i", "-s", "10", "bench"])?;
    let bench = ["-c", "16", "-j", "2", "-T", seconds, "bench"];
    cluster.call("pgbench", &bench)?;
    results.add("pgbench", "ok");
    results.add("sums after pgbench", cluster.sums()?);
    results.add("a killed backend", cluster.loses_a_backend()?);
    results.add("sums after recovery", cluster.sums()?);
    let check = ["--install-missing", "--heapallindexed", "-d", "bench"];
    cluster.call("pg_amcheck", &check)?;
    results.add("pg_amcheck", "ok");
    if session.scale == Scale::Whole {
        cluster.regress(&mut results)?;
    }
    cluster.stop()?;
    Ok(results)
}

struct Cluster<'a> {
    session: &'a Session,
    server: Background,
    /// Of the server's user.
    dir: PathBuf,
}

impl<'a> Cluster<'a> {
    fn start(session: &'a Session) -> Result<Self> {
        let dir = session.dir().join("postgres");
        fs::create_dir(&dir)?;
        let mut chown = Command::new("chown");
        ensure!(
            process::run_visibly(chown.arg(USER).arg(&dir))?,
            "no user {USER}"
        );
        let data = dir.join("data");
        let mut initdb = session.command_as(USER, Path::new(BIN).join("initdb"));
        initdb.current_dir(&dir).arg("-D").arg(&data);
        initdb.args(["--no-locale", "--encoding=UTF8", "--auth=trust"]);
        session.succeed(&mut initdb, LIMIT)?;
        let mut server = session.command_as(USER, Path::new(BIN).join("postgres"));
        server
            .current_dir(&dir)
            .arg("-D")
            .arg(&data)
            .arg("-k")
            .arg(&dir);
        for setting in ["listen_addresses=", "fsync=off", "restart_after_crash=on"] {
            server.args(["-c", setting]);
        }
        let cluster = Self {
            session,
            server: Background::start(&mut server)?,
            dir,
        };
        cluster.wait_until_ready()?;
        Ok(cluster)
    }

    /// One of PostgreSQL's programs, as a client without us.
    fn client(&self, program: impl AsRef<Path>) -> Command {
        let mut client = Command::new("setpriv");
        client
            .current_dir(&self.dir)
            .args([
                "--reuid=postgres",
                "--regid=postgres",
                "--init-groups",
                "--",
            ])
            .arg(Path::new(BIN).join(program))
            .env("PGHOST", &self.dir)
            .env("PGUSER", USER);
        client
    }

    fn call(&self, program: &str, args: &[&str]) -> Result<String> {
        self.session
            .succeed(self.client(program).args(args), LIMIT)
            .with_context(|| self.log())
    }

    fn query(&self, query: &str) -> Result<String> {
        let answer = self.call("psql", &["-X", "-A", "-t", "-d", "bench", "-c", query])?;
        Ok(answer.trim().to_owned())
    }

    fn wait_until_ready(&self) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(60);
        while !process::run(&mut self.client("pg_isready"), LIMIT)?.success() {
            ensure!(Instant::now() < end, "no server; {}", self.log());
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// What the server said last.
    fn log(&self) -> String {
        self.server.stderr_tail()
    }

    /// What each of pgbench's transactions adds to four sums.
    fn sums(&self) -> Result<String> {
        let sums = self.query(
            "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history), \
             (SELECT sum(tbalance) FROM pgbench_tellers) = (SELECT sum(delta) FROM pgbench_history), \
             (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT sum(delta) FROM pgbench_history)",
        )?;
        Ok(if sums == "t|t|t" {
            "ok".to_owned()
        } else {
            format!("equal: {sums}")
        })
    }

    /// kill -9 of a backend under load: the server ends the others, recovers, and serves again.
    fn loses_a_backend(&self) -> Result<String> {
        let mut load = self.client("pgbench");
        load.args(["-c", "8", "-T", "20", "bench"]);
        let load = Background::start(&mut load)?;
        // Once all of them are there: the first connection of pgbench is over before the load begins.
        let busy = "SELECT min(pid) FROM pg_stat_activity WHERE application_name = 'pgbench' HAVING count(*) = 8";
        let end = Instant::now() + Duration::from_secs(15);
        let backend = loop {
            let pid = self.query(busy)?;
            if !pid.is_empty() {
                break pid;
            }
            ensure!(Instant::now() < end, "pgbench has no backend");
        };
        let started = "SELECT extract(epoch FROM pg_postmaster_start_time())::bigint";
        let before = self.query(started)?;
        let mut kill = Command::new("kill");
        ensure!(
            process::run_visibly(kill.args(["-9", &backend]))?,
            "no {backend}"
        );
        // The clients are thrown out; that is what shows that the server has noticed.
        let lost = load.finish(Duration::from_secs(120))?;
        ensure!(!lost.success(), "no client has lost its connection");
        let end = Instant::now() + Duration::from_secs(60);
        while process::run(
            self.client("psql")
                .args(["-X", "-d", "bench", "-c", "SELECT 1"]),
            LIMIT,
        )
        .is_ok_and(|answer| !answer.success())
        {
            ensure!(Instant::now() < end, "no recovery; {}", self.log());
            thread::sleep(Duration::from_millis(100));
        }
        ensure!(self.query(started)? == before, "another server");
        Ok("ok".to_owned())
    }

    /// The regression tests of the source package against this server.
    fn regress(&self, results: &mut Results) -> Result<()> {
        let source = packages::source("postgresql-15")?.join("src/test/regress");
        let place = self.dir.join("regress");
        let mut copy = Command::new("cp");
        copy.arg("-r").arg(&source).arg(&place);
        ensure!(process::run_visibly(&mut copy)?, "cannot copy the tests");
        let mut compile = Command::new("cc");
        compile
            .current_dir(&place)
            .args([
                "-O2",
                "-shared",
                "-fPIC",
                "-I/usr/include/postgresql/15/server",
            ])
            .args(["-o", "regress.so", "regress.c"]);
        let finished = process::run(&mut compile, LIMIT)?;
        ensure!(
            finished.success(),
            "{}",
            session::explain(&compile, &finished)
        );
        let mut chown = Command::new("chown");
        chown.args(["-R", USER]).arg(&place);
        ensure!(process::run_visibly(&mut chown)?, "cannot chown");
        fs::set_permissions(&place, fs::Permissions::from_mode(0o755))?;
        let mut regress = self.client(REGRESS);
        regress.current_dir(&place).args([
            "--inputdir=.",
            "--dlpath=.",
            "--bindir=/usr/lib/postgresql/15/bin",
            "--schedule=parallel_schedule",
            "--max-concurrent-tests=20",
            "--user=postgres",
        ]);
        regress.arg(format!("--host={}", self.dir.display()));
        let finished = process::run(&mut regress, LIMIT)?;
        ensure!(
            !finished.timed_out,
            "{}",
            session::explain(&regress, &finished)
        );
        read(&finished.stdout, results);
        ensure!(
            results.len() > 150,
            "{}",
            session::explain(&regress, &finished)
        );
        Ok(())
    }

    fn stop(self) -> Result<()> {
        let data = self.dir.join("data");
        let data = data.to_string_lossy();
        self.call("pg_ctl", &["stop", "-m", "fast", "-D", &data])?;
        let finished = self.server.finish(Duration::from_secs(60))?;
        ensure!(
            finished.success(),
            "the server: {} {}",
            finished.ending(),
            finished.stderr
        );
        Ok(())
    }
}

/// Lines such as `test boolean ... ok 123 ms` and `     text ... FAILED 8 ms`.
fn read(log: &str, results: &mut Results) {
    for line in log.lines() {
        let line = line.trim_start();
        let line = line.strip_prefix("test ").unwrap_or(line);
        if let Some((name, rest)) = line.split_once(" ... ") {
            let outcome = rest.split_whitespace().next().unwrap_or("nothing");
            results.add(name.trim(), outcome);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_of_a_group_are_told_like_single_ones() {
        let log = "test tablespace                   ... ok          443 ms\nparallel group (2 tests):  a b\n\
                        boolean                      ... ok           94 ms\n     text ... FAILED 8 ms\n";
        let (mut results, mut expected) = (Results::default(), Results::default());
        read(log, &mut results);
        for (name, outcome) in [("tablespace", "ok"), ("boolean", "ok"), ("text", "FAILED")] {
            expected.add(name, outcome);
        }
        assert_eq!(results, expected);
    }
}
