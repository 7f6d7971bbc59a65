//! Settings of the environment and of a file, what is said of them at the start, and the
//! statistics at the end; each in a process of its own.

use std::fs;
use std::path::Path;
use std::process::Command;

use dcmalloc::process;
use serde_json::Value;

const TEST: &str = "settings_come_from_the_file_and_the_environment";
const CHILD: &str = "SETTINGS_TEST_CHILD";

/// What a heap with these settings writes to stderr; its last line as JSON, if it is some.
fn started(file: Option<&Path>, environment: &str) -> (String, Option<Value>) {
    let mut run = Command::new(std::env::current_exe().unwrap());
    run.args([TEST, "--exact", "--nocapture"])
        .env(CHILD, "1")
        .env_remove("DCMALLOC_CONF_FILE")
        .env("DCMALLOC_CONF", environment);
    if let Some(file) = file {
        run.env("DCMALLOC_CONF_FILE", file);
    }
    let output = run.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let stderr = String::from_utf8(output.stderr).unwrap();
    let last = stderr.lines().last().unwrap_or_default();
    let statistics = serde_json::from_str(last).ok();
    (stderr, statistics)
}

#[test]
fn settings_come_from_the_file_and_the_environment() {
    if std::env::var_os(CHILD).is_some() {
        process::start().unwrap();
        return process::end();
    }
    assert_eq!(started(None, "placement:dram").0, "");

    let file = tempfile::NamedTempFile::new().unwrap();
    let text = "# of this machine\nplacement:dram\ndecay:7,confirm_conf:true\n\nplacment:dc\n";
    fs::write(file.path(), text).unwrap();
    let (said, statistics) = started(Some(file.path()), "decay:5,stats_print:true");
    let has = |line: &str| said.lines().any(|said| said == format!("dcmalloc: {line}"));
    assert!(has("DCMALLOC_CONF_FILE: placement:dram"), "{said}");
    assert!(has("DCMALLOC_CONF_FILE: decay:7"), "{said}");
    assert!(has("DCMALLOC_CONF: decay:5"), "{said}");
    assert!(
        said.contains("ignored: ") && said.contains("`placement`?"),
        "{said}"
    );
    let effect = said
        .lines()
        .find(|line| line.contains("settings in effect"));
    let effect = effect.unwrap();
    for setting in [
        "placement:dram",
        "decay:5",
        "confirm_conf:true",
        "stats_print:true",
    ] {
        assert!(effect.contains(setting), "{effect}");
    }
    let statistics = statistics.expect("statistics at the end");
    assert_eq!(statistics["unknown_settings"], 1, "{statistics}");
    assert!(statistics["usage"]["dram_held"].is_u64(), "{statistics}");

    // A file that is named must be there.
    let gone = Path::new("/nowhere/dcmalloc.conf");
    let (said, statistics) = started(
        Some(gone),
        "placement:dram,confirm_conf:true,stats_print:true",
    );
    assert!(
        said.contains("DCMALLOC_CONF_FILE: cannot be read"),
        "{said}"
    );
    assert_eq!(statistics.unwrap()["unknown_settings"], 1);
}
