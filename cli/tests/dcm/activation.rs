//! `dcm serve` as a systemd unit: the socket it is handed, what it tells, and the units themselves.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::call::{Dcm, stderr, within};

const LIMIT: Duration = Duration::from_secs(60);

fn socket_at(path: &Path, kind: SocketType) -> OwnedFd {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None);
    let socket = socket.unwrap();
    rustix::net::bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::listen(&socket, 16).unwrap();
    socket
}

/// `dcm serve` with `socket` as descriptor 3, as systemd starts it.
fn activated(dcm: &Dcm, socket: OwnedFd) -> Command {
    let serve = dcm.command(&[]);
    let mut shell = Command::new("sh");
    shell
        .args([
            "-c",
            "exec 3<&0 0</dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec \"$0\" serve --emulate 64M",
        ])
        .arg(serve.get_program())
        .envs(serve.get_envs().filter_map(|(k, v)| Some((k, v?))))
        .stdin(socket)
        .stdout(Stdio::null());
    shell
}

struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_socket_that_systemd_listens_at_is_served_and_left_there() {
    let dcm = Dcm::new();
    let socket = socket_at(&dcm.socket(), SocketType::SEQPACKET);
    let told = dcm.directory.path().join("notify.sock");
    let notify = UnixDatagram::bind(&told).unwrap();
    notify.set_read_timeout(Some(LIMIT)).unwrap();
    let mut command = activated(&dcm, socket.try_clone().unwrap());
    let mut served = Served(command.env("NOTIFY_SOCKET", &told).spawn().unwrap());
    let mut said = [0; 64];
    let len = notify.recv(&mut said).unwrap();
    assert_eq!(&said[..len], b"READY=1");
    assert!(dcm.ok(&["status"]).contains("64M"));
    dcm.ok(&["release", "2M"]);
    crate::call::signal(served.0.id(), libc::SIGTERM);
    assert_eq!(served.0.wait().unwrap().code(), Some(0));
    // Whoever connects now waits for the next that is started.
    assert!(dcm.socket().exists());
    let _again = Served(activated(&dcm, socket).spawn().unwrap());
    within(LIMIT, "another serves at the same socket", || {
        dcm.call(&["status"]).status.success()
    });
}

#[test]
fn a_socket_of_another_kind_is_refused() {
    let dcm = Dcm::new();
    let socket = socket_at(&dcm.socket(), SocketType::STREAM);
    let output = activated(&dcm, socket).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let stderr = stderr(&output);
    assert!(stderr.contains("ListenSequentialPacket"), "{stderr}");
}

/// The units are for systemd, so systemd judges them, where there is one.
#[test]
fn systemd_accepts_the_units() {
    let dcm = Dcm::new();
    let units = dcm.directory.path().join("units");
    std::fs::create_dir(&units).unwrap();
    let program = dcm.command(&[]).get_program().to_owned();
    for unit in ["dcmalloc.service", "dcmalloc.socket"] {
        let text = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("systemd")
            .join(unit);
        let text = std::fs::read_to_string(text).unwrap();
        // It looks for the program too.
        let text = text.replace("/usr/bin/dcm", program.to_str().unwrap());
        std::fs::write(units.join(unit), text).unwrap();
    }
    let verified = Command::new("systemd-analyze")
        .args(["verify", "--man=no", "--recursive-errors=no"])
        .args([
            units.join("dcmalloc.service"),
            units.join("dcmalloc.socket"),
        ])
        .output();
    let Ok(verified) = verified else {
        println!("SKIPPED: there is no systemd-analyze here");
        return;
    };
    let said = stderr(&verified);
    assert!(verified.status.success() && said.is_empty(), "{said}");
}
