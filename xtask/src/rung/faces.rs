//! The faces of the library: one suite of behaviours in C, C++ and Rust, against the installed library,
//! with both compilers, under the address sanitizer and under valgrind.

use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::Tally;
use crate::broker::Broker;
use crate::{header, install, packages, process, workspace};

const LIMIT: Duration = Duration::from_secs(150);
const PACKAGES: [&str; 7] = [
    "gcc",
    "g++",
    "clang",
    "libc6-dev",
    "libjemalloc2",
    "pkg-config",
    "valgrind",
];
const SANITIZE: &str = "-fsanitize=address,undefined";
/// What the suite's broker offers; its checks count on it.
const OFFER: &str = "256M";

/// One way to compile and run the programs.
struct Way {
    name: &'static str,
    /// For C, and for C++.
    compilers: [&'static str; 2],
    flags: &'static [&'static str],
    valgrind: bool,
}

/// How a program gets the library.
#[derive(Clone, Copy, Debug)]
enum Linked {
    Shared,
    Archive,
}

const WAYS: [Way; 4] = [
    Way {
        name: "gcc",
        compilers: ["gcc", "g++"],
        flags: &["-O2"],
        valgrind: false,
    },
    Way {
        name: "gcc with sanitizers",
        compilers: ["gcc", "g++"],
        flags: &["-O1", SANITIZE, "-fno-sanitize-recover=all"],
        valgrind: false,
    },
    Way {
        name: "clang",
        compilers: ["clang", "clang++"],
        flags: &["-O2"],
        valgrind: false,
    },
    Way {
        name: "clang under valgrind",
        compilers: ["clang", "clang++"],
        flags: &["-O1", "-gdwarf-4"],
        valgrind: true,
    },
];

pub(super) fn run() -> Result<Tally> {
    packages::ensure(&PACKAGES)?;
    let mut tally = Tally::default();
    tally.check("header", current_header());
    let prefix = workspace::target().join("faces");
    install::install(&prefix, &prefix)?;
    tally.check("what is installed with dcm", install::check(&prefix));
    let behaviours = behaviours()?;
    for way in &WAYS {
        for (source, compiler) in ["suite.c", "suite.cpp"].iter().zip(way.compilers) {
            let what = format!("{source} ({})", way.name);
            let judged = compile(&prefix, source, compiler, way, Linked::Shared)
                .and_then(|program| judge(runner(&program, way), way.valgrind))
                .and_then(|verdicts| same(verdicts, &behaviours));
            let judged = match way.valgrind {
                true => judged.map(|verdicts| without(verdicts, "SKIPPED: no broker")),
                false => judged,
            };
            book(&mut tally, &what, judged);
        }
    }
    let [plain, sanitized, ..] = &WAYS;
    let judged = compile(&prefix, "misuse.c", "gcc", sanitized, Linked::Shared)
        .and_then(|program| judge(runner(&program, sanitized), false))
        .map(|verdicts| without(verdicts, "SKIPPED: no second copy"));
    book(&mut tally, "misuse.c (shared)", judged);
    let judged = compile(&prefix, "misuse.c", "gcc", plain, Linked::Archive).and_then(|program| {
        let mut run = runner(&program, plain);
        with_second_copy(&mut run, &prefix);
        judge(run, false)
    });
    book(&mut tally, "misuse.c (archive)", judged);
    for (what, library) in [
        ("suite.c (preloaded)", workspace::preload()),
        (
            "suite.c (another allocator)",
            PathBuf::from("libjemalloc.so.2"),
        ),
    ] {
        let judged = compile(&prefix, "suite.c", "gcc", plain, Linked::Shared)
            .and_then(|program| {
                let mut run = runner(&program, plain);
                run.env("LD_PRELOAD", library);
                judge(run, false)
            })
            .and_then(|verdicts| same(verdicts, &behaviours));
        book(&mut tally, what, judged);
    }
    let judged = in_rust("suite")
        .and_then(|program| judge(Command::new(program), false))
        .and_then(|verdicts| same(verdicts, &behaviours));
    book(&mut tally, "suite.rs", judged);
    let judged = in_rust("misuse").and_then(|program| {
        let mut run = Command::new(program);
        with_second_copy(&mut run, &prefix);
        judge(run, false)
    });
    book(&mut tally, "misuse.rs", judged);
    Ok(tally)
}

/// Names the copy of the library that a program is to load on top of its own.
fn with_second_copy(run: &mut Command, prefix: &Path) {
    run.env("SECOND_COPY", prefix.join("lib/libdcmalloc.so"))
        // The library's thread-local storage is of the kind that is there from the start.
        .env("GLIBC_TUNABLES", "glibc.rtld.optional_static_tls=16384");
}

/// Builds a program of `ffi/examples`.
fn in_rust(name: &str) -> Result<PathBuf> {
    let mut build = workspace::cargo();
    build.args(["build", "--quiet", "--release", "--package", "dcmalloc-ffi"]);
    ensure!(
        process::run_visibly(build.args(["--example", name]))?,
        "{name}.rs does not build"
    );
    Ok(workspace::release("examples").join(name))
}

fn current_header() -> Result<()> {
    ensure!(
        header::is_current()?,
        "include/dcmalloc.h is not what ffi/c says: cargo xtask header"
    );
    Ok(())
}

/// The names that every suite reports, in this order.
fn behaviours() -> Result<Vec<String>> {
    let list = fs::read_to_string(sources().join("behaviours.txt"))?;
    let names = list.lines().filter(|line| !line.starts_with('#'));
    Ok(names.map(str::to_owned).collect())
}

fn sources() -> PathBuf {
    workspace::root().join("ffi/c/tests")
}

fn book(tally: &mut Tally, what: &str, judged: Result<Vec<(String, String)>>) {
    match judged {
        Err(error) => tally.fail(what, format!("{error:#}")),
        Ok(verdicts) => {
            for (name, verdict) in verdicts {
                match verdict.strip_prefix("SKIPPED") {
                    Some(reason) => tally.skip(
                        format!("{what}: {name}"),
                        reason.trim_start_matches([':', ' ']),
                    ),
                    None if verdict == "ok" => tally.pass(),
                    None => tally.fail(format!("{what}: {name}"), verdict),
                }
            }
        }
    }
}

/// Compiles a program against what is installed below `prefix`.
fn compile(
    prefix: &Path,
    source: &str,
    compiler: &str,
    way: &Way,
    linked: Linked,
) -> Result<PathBuf> {
    let mut pkg_config = Command::new("pkg-config");
    pkg_config
        .args(["--cflags", "--libs", "dcmalloc"])
        .env("PKG_CONFIG_PATH", prefix.join("lib/pkgconfig"));
    let flags = process::run(&mut pkg_config, LIMIT)?;
    ensure!(flags.success(), "pkg-config: {}", flags.stderr.trim());
    let standard = match source.ends_with(".cpp") {
        true => "-std=c++17",
        false => "-std=c11",
    };
    let name = format!("{source}-{}-{linked:?}", way.name.replace(' ', "-"));
    let program = prefix.join(name);
    let libraries: Vec<OsString> = match linked {
        Linked::Shared => {
            let rpath = format!("-Wl,-rpath,{}", prefix.join("lib").display());
            let said = flags.stdout.split_whitespace().map(OsString::from);
            said.chain([rpath.into()]).collect()
        }
        Linked::Archive => vec![
            "-I".into(),
            prefix.join("include").into(),
            prefix.join("lib/libdcmalloc.a").into(),
            "-lm".into(),
        ],
    };
    let mut compile = Command::new(compiler);
    compile
        .args([
            standard,
            "-D_GNU_SOURCE",
            "-g",
            "-pthread",
            "-Wall",
            "-Wextra",
            "-Werror",
        ])
        .args(way.flags)
        .current_dir(sources())
        .arg(source)
        .arg("-o")
        .arg(&program)
        .args(libraries)
        .arg("-ldl");
    let compiled = process::run(&mut compile, LIMIT)?;
    let said: Vec<&str> = compiled.stderr.lines().take(6).collect();
    ensure!(compiled.success(), "{compiler}: {}", said.join(" | "));
    Ok(program)
}

/// Runs a program over a broker of its own; its verdicts in order, with their names.
fn judge(mut run: Command, valgrind: bool) -> Result<Vec<(String, String)>> {
    // Valgrind runs one thread at a time: allocations do not wait long enough for extents.
    let broker = (!valgrind).then(broker_with_tags).transpose()?;
    let socket = broker.as_ref().map_or("none".into(), Broker::socket);
    run.env("DCM_SOCKET", socket);
    let finished = process::run(&mut run, LIMIT)?;
    let mut verdicts = Vec::new();
    for line in finished.stdout.lines() {
        let (verdict, rest) = line.split_once(' ').context("a line of one word")?;
        let (name, why) = rest.split_once(": ").unwrap_or((rest, ""));
        let verdict = match why {
            "" => verdict.to_owned(),
            why => format!("{verdict}: {why}"),
        };
        verdicts.push((name.to_owned(), verdict));
    }
    let failed = verdicts
        .iter()
        .any(|(_, verdict)| verdict.starts_with("FAILED"));
    if !finished.success() && !failed {
        let said: Vec<&str> = finished.stderr.lines().take(12).collect();
        let last = verdicts.last().map_or("", |(name, _)| name);
        bail!("{} after {last}: {}", finished.ending(), said.join(" | "));
    }
    Ok(verdicts)
}

/// What `ffi/c/tests/suite.h` says of the broker.
fn broker_with_tags() -> Result<Broker> {
    let offer = ["--emulate", "1G", "--offer", OFFER, "--sharable", "64M"];
    let broker = Broker::over(&offer, LIMIT)?;
    broker.order(&["add", "8M", "--tag", &tag(1)])?;
    let content: Vec<u8> = (1..=4).flat_map(|number| vec![number; 1 << 20]).collect();
    let mut file = tempfile::NamedTempFile::new()?;
    file.write_all(&content)?;
    let path = file.path().to_str().context("a path in UTF-8")?;
    let content = ["--shared", "--content", path];
    let order = ["add", "2M,2M", "--tag", &tag(2)];
    broker.order(&[&order[..], &content].concat())?;
    Ok(broker)
}

/// As in `suite.h`.
fn tag(number: u8) -> String {
    format!("7f3e2a90-0000-4000-8000-{number:012}")
}

/// Whether they are on the list of behaviours, all of it.
fn same(verdicts: Vec<(String, String)>, behaviours: &[String]) -> Result<Vec<(String, String)>> {
    let names: Vec<&String> = verdicts.iter().map(|(name, _)| name).collect();
    ensure!(
        names.iter().copied().eq(behaviours),
        "not the behaviours of behaviours.txt, but {names:?}"
    );
    Ok(verdicts)
}

fn without(mut verdicts: Vec<(String, String)>, which: &str) -> Vec<(String, String)> {
    verdicts.retain(|(_, verdict)| verdict != which);
    verdicts
}

fn runner(program: &Path, way: &Way) -> Command {
    if !way.valgrind {
        return Command::new(program);
    }
    let mut run = Command::new("valgrind");
    run.args(["--quiet", "--error-exitcode=9", "--leak-check=no"])
        .arg(program);
    run
}
