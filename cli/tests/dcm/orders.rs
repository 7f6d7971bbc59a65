//! `dcm serve` and what it can be told.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;

use crate::call::{Dcm, signal, stderr, within};
use crate::client::run_leasing;

const MIB: u64 = 1 << 20;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn capacity_is_added_released_and_shown() {
    let dcm = Dcm::new();
    let mut server = dcm.serve(&["--emulate", "256M", "--offer", "32M,16M,16M"]);
    let status = json(&dcm.ok(&["status", "--json"]));
    assert_eq!(status["keeper"], u64::from(server.child.id()));
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
fn memory_that_is_there_already_is_lent_taken_out_of_use_and_put_back() {
    let dcm = Dcm::new();
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    file.as_file().set_len(64 * MIB).unwrap();
    let path = file.path().to_str().unwrap();
    let mut server = dcm.serve(&["--dax", path]);
    let mut program = run_leasing(&dcm, &[], 16 * MIB)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let status = || json(&dcm.ok(&["status", "--json"]));
    within(Duration::from_secs(10), "a lease", || {
        status()["capacity"]["leased"] == 16 * MIB
    });
    let receipt = json(&dcm.ok(&["release", "40M", "--json"]));
    assert_eq!(receipt["returned_free"], 40 * MIB);
    assert_eq!(status()["capacity"]["accepted"], 24 * MIB);
    let range = format!("{}+2M", status()["extents"][0]["dpa"].as_str().unwrap());
    let forced = stderr(&dcm.call(&["release", &range, "--force"]));
    assert!(forced.contains("release it without force"), "{forced}");
    let added = dcm.ok(&["add", "32M"]);
    assert!(added.starts_with("accepted  32M of 32M"), "{added}");
    assert_eq!(status()["capacity"]["accepted"], 56 * MIB);
    let second = dcm.call(&["serve", "--dax", path, "--socket", "/nowhere/sock"]);
    let second = stderr(&second);
    assert!(second.contains("is in use: end the broker"), "{second}");
    program.kill().unwrap();
    program.wait().unwrap();
    assert_eq!(server.terminate(), Some(0));
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
    within(Duration::from_secs(10), "its broker ends with it", || {
        stderr(&dcm.call(&["status"])).contains("no broker at")
    });
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

/// A broker that is killed comes back by itself, over the same device, and
/// nobody's lease has ended.
#[test]
fn a_killed_broker_is_started_anew_and_knows_everything() {
    let dcm = Dcm::new();
    let mut server = dcm.serve(&["--emulate", "64M", "--offer", "32M,16M"]);
    let mut program = run_leasing(&dcm, &[], 8 * MIB)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(program.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("leased")));
    let before = json(&dcm.ok(&["status", "--json"]));
    for restarts in 1..=3 {
        let broker = json(&dcm.ok(&["status", "--json"]))["pid"]
            .as_u64()
            .unwrap();
        signal(broker as u32, libc::SIGKILL);
        // The socket is still there: who connects waits for the next one.
        let status = json(&dcm.ok(&["status", "--json"]));
        assert_eq!(status["restarts"], restarts);
        assert_eq!(status["capacity"]["leased"], 8 * MIB);
        assert_eq!(status["keeper"], before["keeper"]);
        for same in ["dpa", "len", "leased"] {
            for extent in 0..2 {
                let of = |status: &Value| status["extents"][extent][same].clone();
                assert_eq!(of(&status), of(&before));
            }
        }
    }
    let receipt = json(&dcm.ok(&["release", "16M", "--json"]));
    assert_eq!(receipt["returned_free"], 16 * MIB);
    drop(program.stdin.take());
    program.wait().unwrap();
    within(Duration::from_secs(10), "the program's leases end", || {
        json(&dcm.ok(&["status", "--json"]))["capacity"]["leased"] == 0
    });
    assert_eq!(server.terminate(), Some(0));
    assert!(!dcm.socket().exists());
}

#[test]
fn memory_of_a_node_is_lent_and_goes_back_to_it() {
    if !std::path::Path::new("/sys/devices/system/node/node0/meminfo").exists() {
        println!("SKIPPED: a kernel without NUMA");
        return;
    }
    let dcm = Dcm::new();
    let mut server = dcm.serve(&["--node", "0,32M"]);
    let mut program = run_leasing(&dcm, &[], 16 * MIB)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let status = || json(&dcm.ok(&["status", "--json"]));
    within(Duration::from_secs(10), "a lease", || {
        status()["capacity"]["leased"] == 16 * MIB
    });
    let receipt = json(&dcm.ok(&["release", "8M", "--json"]));
    assert_eq!(receipt["returned_free"], 8 * MIB);
    let added = dcm.ok(&["add", "8M"]);
    assert!(added.starts_with("accepted  8M of 8M"), "{added}");
    assert_eq!(status()["capacity"]["accepted"], 32 * MIB);
    program.kill().unwrap();
    program.wait().unwrap();
    assert_eq!(server.terminate(), Some(0));
    for (node, told) in [
        ("9999,2M", "this machine has"),
        ("0,1000000G", "bytes free"),
    ] {
        let refused = dcm.call(&["serve", "--node", node, "--socket", "/nowhere/sock"]);
        assert!(stderr(&refused).contains(told), "{}", stderr(&refused));
    }
    let refused = dcm.call(&["serve", "--node", "0"]);
    assert_eq!(refused.status.code(), Some(2));
}
