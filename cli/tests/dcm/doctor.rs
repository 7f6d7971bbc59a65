//! `dcm doctor`: what it looks at, and how it ends.

use serde_json::Value;

use crate::call::Dcm;

fn findings(dcm: &Dcm, conf: &str, code: i32) -> Value {
    let output = dcm
        .command(&["doctor", "--json"])
        .env("DCMALLOC_CONF", conf)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn verdict<'a>(report: &'a Value, what: &str) -> &'a Value {
    let findings = report["findings"].as_array().unwrap();
    let finding = findings.iter().find(|finding| finding["what"] == what);
    finding.unwrap_or_else(|| panic!("nothing about {what} in {report:#}"))
}

/// Whether something is missing depends on the machine, except for what the test itself takes away.
#[test]
fn something_missing_is_exit_code_1_and_a_command_that_mends_it() {
    let dcm = Dcm::new();
    let spill = dcm.directory.path().join("spill");
    let conf = format!("spill_dir:{}", spill.display());
    let report = findings(&dcm, &conf, 1);
    assert!(report["missing"].as_u64().unwrap() >= 1);
    let finding = verdict(&report, "spill_dir");
    assert_eq!(finding["verdict"], "missing");
    let mend = finding["mend"].as_str().unwrap();
    let mended = std::process::Command::new("sh").args(["-c", mend]).status();
    assert!(mended.unwrap().success(), "{mend}");
    let again = dcm
        .command(&["doctor", "--json"])
        .env("DCMALLOC_CONF", &conf)
        .output()
        .unwrap();
    let again: Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_ne!(verdict(&again, "spill_dir")["verdict"], "missing");
    assert_eq!(
        again["missing"].as_u64().unwrap() + 1,
        report["missing"].as_u64().unwrap()
    );
}

#[test]
fn settings_are_those_of_the_file_and_of_the_environment() {
    let dcm = Dcm::new();
    let file = dcm.directory.path().join("dcmalloc.conf");
    let look = |text: &str| -> Value {
        std::fs::write(&file, text).unwrap();
        let output = dcm
            .command(&["doctor", "--json"])
            .env("DCMALLOC_CONF_FILE", &file)
            .env("DCMALLOC_CONF", "decay:9")
            .output()
            .unwrap();
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        verdict(&report, "settings").clone()
    };
    let found = look("# of this machine\nplacement:dc\ndecay:7\n");
    assert_eq!(found["found"], "placement:dc,decay:9");
    let found = look("placment:dc");
    assert_eq!(found["verdict"], "missing");
    let says = found["found"].as_str().unwrap();
    assert!(
        says.contains("dcmalloc.conf: ") && says.contains("`placement`"),
        "{says}"
    );
    assert!(found["mend"].is_null(), "{found}");
    let found = look(&format!("#{}", "x".repeat(4096)));
    assert_eq!(found["verdict"], "missing", "{found}");
}

#[test]
fn the_broker_and_the_machine_are_looked_at() {
    let dcm = Dcm::new();
    let look = || -> Value {
        let output = dcm.call(&["doctor", "--json"]);
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let without = look();
    assert_eq!(verdict(&without, "broker")["verdict"], "hint");
    let mend = verdict(&without, "broker")["mend"].as_str().unwrap();
    assert!(mend.starts_with("dcm serve"), "{mend}");
    let _server = dcm.serve(&["--emulate", "64M", "--offer", "32M"]);
    let with = look();
    assert_eq!(verdict(&with, "broker")["verdict"], "ok");
    assert_eq!(verdict(&with, "device")["found"], "32M accepted");
    for what in [
        "library",
        "settings",
        "userfaultfd",
        "io_uring",
        "locked memory",
        "max_map_count",
        "huge pages",
        "shared huge pages",
        "memory pressure",
    ] {
        verdict(&with, what);
    }
    let text = String::from_utf8(dcm.call(&["doctor"]).stdout).unwrap();
    let last = text.lines().last().unwrap();
    assert!(last.contains("missing"), "{text}");
}
