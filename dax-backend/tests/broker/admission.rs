//! Who is let in, on both sides, and what is said to everybody else.

use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::Duration;

use dax_backend::broker::admin::{AdminClient, AdminRequest};
use dax_backend::broker::protocol::{Kind, Message, RefusedCode, VERSION};
use dax_backend::broker::{Admit, BrokerClient, ConnectError, GRANULE, WindowRange};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType, bind, connect, listen, recv,
    send, socket,
};

use crate::process::Forked;
use crate::rig::{Rig, Setup};

const NOBODY: u32 = 65_534;

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("SKIPPED: only root can become somebody else");
    }
    root
}

fn become_nobody() {
    // SAFETY: system calls by number: the C library would change the ids of
    // every thread, here only the caller (the only thread after fork) counts.
    unsafe {
        libc::syscall(libc::SYS_setresgid, NOBODY, NOBODY, NOBODY);
        libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY);
    }
}

/// How a connection by another user ends, as a byte that survives a pipe.
fn as_nobody(rig: &Rig, run: u128) -> u8 {
    let socket = rig.socket();
    Forked::run(|| {
        become_nobody();
        match BrokerClient::connect(&socket, run) {
            Ok(_) => b'+',
            Err(ConnectError::Refused {
                code: RefusedCode::User,
                broker_version: VERSION,
            }) => b'u',
            Err(_) => b'?',
        }
    })
    .answer()
}

#[test]
fn other_users_are_refused_unless_admitted() {
    if !is_root() {
        return;
    }
    let run = uuid::Uuid::from_u128(77);
    for (admit, run_id, outcome) in [
        (Admit::Owner, 0, b'u'),
        (Admit::Run(run), 0, b'u'),
        (Admit::Run(run), 78, b'u'),
        (Admit::Run(run), 77, b'+'),
        (Admit::Anyone, 0, b'+'),
    ] {
        let rig = Rig::with(Setup {
            admit,
            ..Setup::default()
        });
        assert_eq!(as_nobody(&rig, run_id), outcome, "{admit:?} {run_id}");
        let refused = u64::from(outcome == b'u');
        assert_eq!(rig.status().counters.refused, refused);
    }
}

/// Listens as nobody, in a process of its own, when [`a_broker_of_another_user_is_not_trusted`] says so.
#[test]
fn helper_serves_as_nobody() {
    let Ok(path) = std::env::var("TEST_SERVE_AS_NOBODY") else {
        return;
    };
    become_nobody();
    let server = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    bind(&server, &SocketAddrUnix::new(path.as_str()).unwrap()).unwrap();
    listen(&server, 8).unwrap();
    println!("listening");
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}

#[test]
fn a_broker_of_another_user_is_not_trusted() {
    use std::io::{BufRead, BufReader};
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::PermissionsExt;
    if !is_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let path = directory.path().join("evil.sock");
    let mut server = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "admission::helper_serves_as_nobody",
            "--nocapture",
        ])
        .env("TEST_SERVE_AS_NOBODY", &path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(server.stdout.take().unwrap()).lines();
    assert!(
        lines
            .by_ref()
            .map_while(Result::ok)
            .any(|line| line.contains("listening"))
    );
    // Root, who could reach anything, hands it nothing.
    let name = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
    let error = BrokerClient::connect(&name, 0).map(|_| ()).unwrap_err();
    assert_eq!(error, ConnectError::Untrusted { uid: NOBODY });
    let error = AdminClient::connect(&path).unwrap_err().to_string();
    assert!(
        error.contains("user 65534") && error.contains("not trusted"),
        "{error}"
    );
    drop(server.stdin.take());
    server.wait().unwrap();
}

fn raw(rig: &Rig) -> OwnedFd {
    let socket = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    connect(&socket, &SocketAddrUnix::new(&rig.path).unwrap()).unwrap();
    socket
}

fn say(socket: &OwnedFd, bytes: &[u8]) -> Option<Message> {
    send(socket, bytes, SendFlags::NOSIGNAL).unwrap();
    hear(socket)
}

fn hear(socket: &OwnedFd) -> Option<Message> {
    let mut answer = [0u8; 512];
    let (length, _) = recv(socket.as_fd(), &mut answer, RecvFlags::empty()).unwrap();
    (length > 0).then(|| Message::parse(&answer[..length]).unwrap())
}

#[test]
fn a_client_of_another_version_is_told_which_one_this_is() {
    let rig = Rig::new(&[1]);
    let socket = raw(&rig);
    let mut hello = Message::new(Kind::Hello).bytes().to_vec();
    hello[4] = 9;
    let answer = say(&socket, &hello).unwrap();
    assert_eq!(answer.kind(), Some(Kind::Refused));
    assert_eq!(RefusedCode::from_wire(answer.arg(0)), RefusedCode::Version);
    assert_eq!(answer.arg(1), u64::from(VERSION));
    assert!(
        hear(&socket).is_none(),
        "the broker keeps the connection open"
    );
    assert_eq!(rig.status().counters.refused, 1);
}

#[test]
fn a_broker_of_another_version_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("old.sock");
    let server = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    bind(&server, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    listen(&server, 8).unwrap();
    let old_broker = std::thread::spawn(move || {
        let peer = rustix::net::accept(&server).unwrap();
        let mut answer = Message::new(Kind::Refused)
            .with_arg(0, RefusedCode::Version as u64)
            .with_arg(1, 7)
            .bytes()
            .to_vec();
        answer[4] = 7;
        say(&peer, &answer);
    });
    let error = AdminClient::connect(&path).unwrap_err().to_string();
    assert!(
        error.contains("another protocol version") && error.contains('7'),
        "{error}"
    );
    old_broker.join().unwrap();
}

#[test]
fn rubbish_is_refused_and_counted() {
    let rig = Rig::new(&[1]);
    for rubbish in [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0; 512],
        vec![0xff; 513],
        Message::new(Kind::Lease).bytes().to_vec(),
    ] {
        let socket = raw(&rig);
        let answer = say(&socket, &rubbish).unwrap();
        assert_eq!(answer.kind(), Some(Kind::Refused));
        assert_eq!(
            RefusedCode::from_wire(answer.arg(0)),
            RefusedCode::Malformed
        );
        assert!(hear(&socket).is_none());
    }
    let hello = Message::new(Kind::Hello).with_arg(0, 55);
    let answer = say(&raw(&rig), hello.bytes()).unwrap();
    assert_eq!(
        RefusedCode::from_wire(answer.arg(0)),
        RefusedCode::Malformed
    );
    let counters = rig.status().counters;
    assert_eq!((counters.malformed, counters.refused), (4, 1));
}

#[test]
fn a_client_may_not_give_orders() {
    let rig = Rig::new(&[1]);
    let client = rig.client();
    let fd = client.broker.fd();
    send(
        fd,
        Message::new(Kind::AdminRequest).bytes(),
        SendFlags::NOSIGNAL,
    )
    .unwrap();
    assert!(client.broker.recv(Some(Duration::from_secs(5))).is_err());
}

#[test]
fn an_order_that_makes_no_sense_is_answered() {
    let rig = Rig::new(&[1]);
    let error = rig.ask(&AdminRequest::Add {
        sizes: Vec::new(),
        tag: None,
        shared: None,
    });
    assert!(error.unwrap_err().to_string().contains("no size"));
    let socket = raw(&rig);
    let welcome = say(&socket, Message::new(Kind::Hello).with_arg(0, 1).bytes()).unwrap();
    assert_eq!(welcome.kind(), Some(Kind::Welcome));
    let answer = say(&socket, Message::new(Kind::AdminRequest).bytes()).unwrap();
    assert_eq!((answer.kind(), answer.arg(0)), (Some(Kind::AdminReply), 1));
}

#[test]
fn nobody_there_is_its_own_error() {
    let missing = c"/nonexistent/broker.sock";
    let error = BrokerClient::connect(missing, 0).map(|_| ()).unwrap_err();
    assert!(matches!(
        error,
        ConnectError::Unreachable(rustix::io::Errno::NOENT)
    ));
    let long = std::ffi::CString::new(vec![b'x'; 200]).unwrap();
    let error = BrokerClient::connect(&long, 0).map(|_| ()).unwrap_err();
    assert_eq!(error, ConnectError::Path);
}

/// Messages that are well-formed and make no sense, from a client that was let in.
#[test]
fn a_mad_client_harms_nobody() {
    let rig = Rig::new(&[16]);
    let sane = rig.client();
    let (ranges, _) = sane.lease(4);
    // xorshift64: the same messages every time.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut mad = rig.client();
    for _ in 0..3_000 {
        let kind = [
            Kind::Lease,
            Kind::Return,
            Kind::Return,
            Kind::RecallAnswer,
            Kind::RecallAnswer,
            Kind::AdminRequest,
            Kind::Grant,
        ][(random() % 7) as usize];
        let mut message = Message::new(kind).with_id(random() % 8);
        for arg in 0..4 {
            let any = [0, 1, GRANULE, u64::MAX, random()];
            message = message.with_arg(arg, any[(random() % 5) as usize]);
        }
        let mut range = || {
            let any = [0, random() % 20 * GRANULE, u64::MAX, random()];
            let offset = any[(random() % 4) as usize];
            let len = any[(random() % 4) as usize];
            WindowRange { offset, len }
        };
        let message = message.with_ranges(&[range(), range(), range()]);
        let sent = send(mad.broker.fd(), message.bytes(), SendFlags::NOSIGNAL);
        // Thrown out, it comes back. What it is told it does not read.
        while let Ok(Some(_)) = mad.broker.recv(Some(Duration::ZERO)) {}
        if sent.is_err() || mad.broker.recv(Some(Duration::ZERO)).is_err() {
            mad = rig.client();
        }
    }
    drop(mad);
    let status = rig.until(Duration::from_secs(5), |status| status.clients.len() == 1);
    assert_eq!(status.capacity.leased, 4 * GRANULE);
    assert_eq!(status.capacity.accepted, 16 * GRANULE);
    assert_eq!(status.capacity.free, 12 * GRANULE);
    sane.give_back(&ranges);
    rig.until(Duration::from_secs(2), |status| {
        status.capacity.clean == 16 * GRANULE
    });
}
