//! `dcm serve` and what it can be told.

use std::fs;

use serde_json::Value;

use crate::call::{Dcm, stderr};

const MIB: u64 = 1 << 20;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn capacity_is_added_released_and_shown() {
    let dcm = Dcm::new();
    let mut server = dcm.serve(&["--emulate", "256M", "--offer", "32M,16M,16M"]);
    let status = json(&dcm.ok(&["status", "--json"]));
    assert_eq!(status["pid"], u64::from(server.child.id()));
    assert_eq!(status["capacity"]["accepted"], 64 * MIB);
    assert_eq!(status["extents"].as_array().unwrap().len(), 3);
    assert_eq!(status["device"]["counters"]["groups_answered"], 1);

    let added = dcm.ok(&[
        "add",
        "8M,8M,2M",
        "--tag",
        "12345678-1234-1234-1234-123456789abc",
    ]);
    assert!(added.starts_with("accepted  18M of 18M"), "{added}");
    let status = json(&dcm.ok(&["status", "--json"]));
    assert_eq!(status["device"]["counters"]["groups_answered"], 2);
    assert_eq!(
        status["extents"][3]["tag"],
        "12345678-1234-1234-1234-123456789abc"
    );

    let receipt = json(&dcm.ok(&["release", "24M", "--json"]));
    assert_eq!(receipt["returned_free"], 24 * MIB);
    assert_eq!(receipt["refused"], json("[]"));
    let extent = json(&dcm.ok(&["status", "--json"]))["extents"][0]["dpa"].clone();
    let range = format!("{}+2M", extent.as_str().unwrap());
    let receipt = dcm.ok(&["release", &range]);
    assert!(receipt.contains("returned  2M (2M free)"), "{receipt}");
    let text = dcm.ok(&["status"]);
    assert!(text.contains("capacity  56M accepted"), "{text}");
    assert!(text.contains("recall    #2 by the operator"), "{text}");

    assert_eq!(server.terminate(), Some(0));
    assert!(!dcm.socket().exists());
}

#[test]
fn what_the_fabric_refuses_is_said() {
    let dcm = Dcm::new();
    let _server = dcm.serve(&["--emulate", "64M"]);
    let output = dcm.call(&["add", "2M"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("bytes are free"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn one_socket_one_broker() {
    let dcm = Dcm::new();
    let mut first = dcm.serve(&["--emulate", "64M"]);
    let socket = dcm.socket();
    let second = [
        "serve",
        "--emulate",
        "64M",
        "--socket",
        socket.to_str().unwrap(),
    ];
    let output = dcm.call(&second);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("already serving"),
        "{}",
        stderr(&output)
    );
    // One that was killed leaves its socket behind, and the next one takes over.
    first.child.kill().unwrap();
    first.child.wait().unwrap();
    assert!(socket.exists());
    let output = dcm.call(&["status"]);
    assert!(
        stderr(&output).contains("no broker at"),
        "{}",
        stderr(&output)
    );
    drop(dcm.serve(&["--emulate", "64M"]));
    fs::write(dcm.directory.path().join("file"), "mine").unwrap();
    let file = dcm.directory.path().join("file");
    let output = dcm.call(&[
        "serve",
        "--emulate",
        "64M",
        "--socket",
        file.to_str().unwrap(),
    ]);
    assert!(
        stderr(&output).contains("is no socket"),
        "{}",
        stderr(&output)
    );
}
