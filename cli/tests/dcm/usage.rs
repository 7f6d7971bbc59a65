//! Wrong calls: exit code 2, and an error that says what to do.

use crate::call::{Dcm, stderr};

#[test]
fn wrong_calls_exit_with_2_and_say_why() {
    let dcm = Dcm::new();
    for (args, says) in [
        (&["run", "--emulate", "1X", "--", "true"][..], "no unit"),
        (&["run", "--emulate", "", "--", "true"], "digits"),
        (&["run", "--emulate", "1.5G", "--", "true"], "smaller unit"),
        (&["run", "--emulate", "3M", "--", "true"], "2M blocks"),
        (
            &[
                "run",
                "--emulate",
                "64M",
                "--offer",
                "32M,64M",
                "--",
                "true",
            ],
            "more than the 64M",
        ),
        (&["run", "--offer", "32M", "--", "true"], "--emulate"),
        (&["serve", "--emulate", "64M", "--high", "8M"], "--low"),
        (
            &["serve", "--emulate", "64M", "--low", "8M", "--high", "9M"],
            "would go back at once",
        ),
        (
            &["serve", "--device", "0000:0d:00.0", "--orchestrator", "me"],
            "no orchestrator",
        ),
        (&["run", "--emulate", "64M"], "PROGRAM"),
        (
            &["run", "--emulate", "64M", "--stats", "xml", "--", "true"],
            "xml",
        ),
        (&["run", "--stats-file", "x", "--", "true"], "--stats"),
        (
            &[
                "run",
                "--emulate",
                "64M",
                "--placement",
                "moon",
                "--",
                "true",
            ],
            "moon",
        ),
        (
            &[
                "run",
                "--emulate",
                "64M",
                "--conf",
                "placment:dc",
                "--",
                "true",
            ],
            "`placement`",
        ),
        (
            &[
                "run",
                "--emulate",
                "64M",
                "--conf",
                "placement",
                "--",
                "true",
            ],
            "no value",
        ),
        (&["serve"], "--emulate 1G"),
        (&["serve", "--device", "nowhere"], "0000:0d:00.0"),
        (
            &["serve", "--device", "0d:00.0", "--emulate", "1G"],
            "cannot be used with",
        ),
        (
            &["serve", "--emulate", "1G", "--dev-mem"],
            "cannot be used with",
        ),
        (&["devices", "--bind", "x"], "lspci -D"),
        (&["release"], "SIZE|DPA+LENGTH"),
        (&["release", "0x1z+2M"], "hexadecimal"),
        (&["release", "lots"], "digits"),
        (&["add"], "SIZE"),
        (&["add", "2M,,4M"], "digits"),
        (&["add", "2M", "--tag", "seven"], "seven"),
        (&["frobnicate"], "frobnicate"),
    ] {
        let output = dcm.call(args);
        let stderr = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
        assert!(stderr.contains(says), "{args:?} lacks `{says}`: {stderr}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn settings_of_the_environment_are_checked_too() {
    let dcm = Dcm::new();
    let output = dcm
        .command(&["run", "--emulate", "64M", "--", "true"])
        .env("DCMALLOC_CONF", "verbos:true")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let stderr = stderr(&output);
    assert!(
        stderr.contains("DCMALLOC_CONF") && stderr.contains("`verbose`"),
        "{stderr}"
    );
}

#[test]
fn a_missing_library_is_named() {
    let dcm = Dcm::new();
    let output = dcm
        .command(&["run", "--emulate", "64M", "--", "true"])
        .env("DCM_PRELOAD", "/nonexistent/lib.so")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("/nonexistent/lib.so"));
}

#[test]
fn without_a_broker_orders_fail_with_1_and_say_how_to_start_one() {
    let dcm = Dcm::new();
    for args in [&["status"][..], &["add", "2M"], &["release", "2M"]] {
        let output = dcm.call(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let stderr = stderr(&output);
        assert!(
            stderr.contains("no broker at") && stderr.contains("dcm serve"),
            "{stderr}"
        );
    }
}

#[test]
fn a_library_that_ld_preload_can_not_name_is_refused() {
    let dcm = Dcm::new();
    let library = dcm.directory.path().join("lib one.so");
    std::fs::write(&library, "").unwrap();
    let output = dcm
        .command(&["run", "--emulate", "64M", "--", "true"])
        .env("DCM_PRELOAD", &library)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("space"), "{}", stderr(&output));
}

#[test]
fn a_device_that_cannot_be_served_says_why() {
    let dcm = Dcm::new();
    let sysfs = tempfile::tempdir().unwrap();
    let sysfs = sysfs.path().to_str().unwrap();
    for args in [
        &["serve", "--device", "0d:00.0", "--sysfs", sysfs][..],
        &["devices", "--bind", "0d:00.0", "--sysfs", sysfs],
    ] {
        let output = dcm.call(args);
        assert_eq!(output.status.code(), Some(1));
        let told = stderr(&output);
        assert!(
            told.contains("there is no PCI device 0000:0d:00.0"),
            "{told}"
        );
    }
    let output = dcm.call(&["devices", "--sysfs", sysfs]);
    assert!(output.status.success());
    assert_eq!(
        output.stdout,
        b"no CXL memory device (class 0502, interface 10)\n"
    );
}
