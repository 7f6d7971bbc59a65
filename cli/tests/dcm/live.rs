//! The page, the metrics and the log of `dcm serve`, and `dcm top` on a terminal.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use crate::call::{Dcm, stderr, within};
use crate::client::run_leasing;

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(60);

/// Sends `request` and returns all that comes.
fn http(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn get(address: SocketAddr, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    http(address, &request)
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").unwrap().1
}

/// A port that was free a moment ago.
fn address() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

#[test]
fn page_and_metrics_show_the_broker() {
    let dcm = Dcm::new();
    let address = address();
    let listen = address.to_string();
    let _server = dcm.serve(&[
        "--emulate",
        "64M",
        "--offer",
        "32M,16M",
        "--listen",
        &listen,
    ]);
    let socket = dcm.socket();
    let mut holder = run_leasing(&dcm, &["--socket", socket.to_str().unwrap()], 8 * MIB)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let leased = format!("dcmalloc_capacity_bytes{{state=\"leased\"}} {}\n", 8 * MIB);
    within(LIMIT, "the metrics show the lease", || {
        get(address, "/metrics").contains(&leased)
    });
    let metrics = get(address, "/metrics");
    assert!(metrics.starts_with("HTTP/1.1 200"), "{metrics}");
    assert!(metrics.contains("dcmalloc_up 1\n"));
    assert!(metrics.contains("dcmalloc_capacity_accepted_bytes 50331648\n"));

    let status: Value = serde_json::from_str(body(&get(address, "/status.json"))).unwrap();
    let held = &status["extents"][0]["map"][0];
    assert_eq!(
        (&held["state"], &held["len"]),
        (&Value::from("leased"), &Value::from(8 * MIB))
    );
    assert_eq!(held["pid"], status["clients"][0]["pid"]);

    within(LIMIT, "a history of several looks", || {
        let samples: Value = serde_json::from_str(body(&get(address, "/history.json"))).unwrap();
        samples.as_array().unwrap().len() >= 2
    });
    let samples: Value =
        serde_json::from_str(body(&get(address, "/history.json?since=1"))).unwrap();
    let last = samples.as_array().unwrap().last().unwrap();
    let rows: u64 = last["map"]
        .as_array()
        .unwrap()
        .iter()
        .map(|run| run[0].as_u64().unwrap())
        .sum();
    assert_eq!(rows, 128);
    assert!(last["id"].as_u64().unwrap() > 1);

    let page = get(address, "/");
    assert!(page.contains("text/html") && body(&page).starts_with("<!doctype html>"));
    drop(holder.stdin.take());
    assert!(holder.wait().unwrap().success());
}

#[test]
fn the_page_is_for_reading_on_this_machine() {
    let dcm = Dcm::new();
    let address = address();
    let listen = address.to_string();
    let _server = dcm.serve(&["--emulate", "64M", "--listen", &listen]);
    assert!(get(address, "/nothing").starts_with("HTTP/1.1 404"));
    let post = format!(
        "POST / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    );
    assert!(http(address, &post).starts_with("HTTP/1.1 405"));
    // A name that somebody has pointed to loopback.
    let rebound = "GET /status.json HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n";
    assert!(http(address, rebound).starts_with("HTTP/1.1 403"));
    for elsewhere in ["0.0.0.0:9469", "192.0.2.1:9469", "nowhere"] {
        let output = dcm.call(&["serve", "--emulate", "64M", "--listen", elsewhere]);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
    }
    let other = dcm.directory.path().join("other.sock");
    let taken = ["serve", "--emulate", "64M", "--listen", &listen, "--socket"];
    let output = dcm.call(&[&taken[..], &[other.to_str().unwrap()]].concat());
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("cannot listen at"),
        "{}",
        stderr(&output)
    );
}

/// A reader that asks and then reads nothing holds up neither the others nor the broker.
#[test]
fn slow_readers_hold_up_nobody() {
    let dcm = Dcm::new();
    let address = address();
    let listen = address.to_string();
    let _server = dcm.serve(&["--emulate", "64M", "--listen", &listen]);
    let mut slow = Vec::new();
    for _ in 0..3 {
        let mut stream = TcpStream::connect(address).unwrap();
        let request = format!("GET / HTTP/1.1\r\nHost: {address}\r\n\r\n").repeat(200);
        stream.write_all(request.as_bytes()).unwrap();
        slow.push(stream);
    }
    dcm.ok(&["release", "2M"]);
    assert!(get(address, "/metrics").contains("dcmalloc_up"));
}

#[test]
fn the_log_has_a_line_for_each_event() {
    let dcm = Dcm::new();
    let socket = dcm.socket();
    let mut server = dcm
        .command(&[
            "serve",
            "--emulate",
            "64M",
            "--offer",
            "32M",
            "--log",
            "json",
            "--socket",
        ])
        .arg(&socket)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    within(LIMIT, "the broker answers", || {
        dcm.call(&["status"]).status.success()
    });
    let mut holder = run_leasing(&dcm, &["--socket", socket.to_str().unwrap()], 8 * MIB)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    within(LIMIT, "the lease", || {
        dcm.ok(&["status"]).contains("8M leased")
    });
    dcm.ok(&["add", "16M"]);
    dcm.ok(&["release", "2M"]);
    drop(holder.stdin.take());
    holder.wait().unwrap();
    within(LIMIT, "the end of the lease", || {
        dcm.ok(&["status"]).contains(" 0B leased")
    });
    crate::call::signal(server.id(), libc::SIGTERM);
    let mut log = String::new();
    server
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut log)
        .unwrap();
    assert!(server.wait().unwrap().success());
    let lines: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    for message in [
        "client connected",
        "client ended",
        "extent accepted",
        "recall starts",
        "recall ends",
    ] {
        assert!(
            lines.iter().any(|line| line["message"] == message),
            "{message} in {log}"
        );
    }
    let receipt = lines
        .iter()
        .find(|line| line["message"] == "recall ends")
        .unwrap();
    assert_eq!(
        (&receipt["level"], &receipt["returned"]),
        (&Value::from("INFO"), &Value::from(2 * MIB))
    );
    assert!(!lines.iter().any(|line| line["level"] == "DEBUG"));
}

/// util-linux's script(1) is the terminal.
#[test]
fn top_shows_a_broker_on_a_terminal_until_q() {
    let dcm = Dcm::new();
    let _server = dcm.serve(&["--emulate", "64M", "--offer", "32M,16M"]);
    let mut script = dcm.command(&["top"]);
    let line = format!(
        "stty rows 30 cols 100; exec {} top",
        script.get_program().display()
    );
    let mut terminal = std::process::Command::new("script")
        .args(["--quiet", "--return", "--command", &line, "/dev/null"])
        .envs(
            script
                .env("TERM", "xterm-256color")
                .get_envs()
                .filter_map(|(k, v)| Some((k, v?))),
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let shown = Arc::new(Mutex::new(String::new()));
    let mut stdout = terminal.stdout.take().unwrap();
    let collected = Arc::clone(&shown);
    let reader = thread::spawn(move || {
        let mut chunk = [0; 4096];
        while let Ok(n @ 1..) = stdout.read(&mut chunk) {
            collected
                .lock()
                .unwrap()
                .push_str(&String::from_utf8_lossy(&chunk[..n]));
        }
    });
    let says = |text: &str| shown.lock().unwrap().contains(text);
    within(LIMIT, "the map", || says("a cell is") && says("receipts"));
    dcm.ok(&["release", "2M"]);
    within(LIMIT, "the receipt", || says("#1"));
    terminal.stdin.as_mut().unwrap().write_all(b"q").unwrap();
    assert_eq!(terminal.wait().unwrap().code(), Some(0));
    reader.join().unwrap();
    // The screen from before is back, and the cursor.
    assert!(says("\u{1b}[?1049l") && says("\u{1b}[?25h"));
    let output = dcm.call(&["top"]);
    assert_eq!(output.status.code(), Some(2), "without a terminal");
    assert!(
        stderr(&output).contains("dcm status"),
        "{}",
        stderr(&output)
    );
}
