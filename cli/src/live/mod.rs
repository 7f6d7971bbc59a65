//! The broker's page and its metrics, over HTTP on loopback.
//!
//! One thread looks at the broker as any operator does, over its socket, and
//! keeps what it saw; others answer requests from that. So no request, and
//! nobody who reads slowly, ever makes the broker wait.
#![forbid(unsafe_code)]

mod history;
mod metrics;

use std::io::Cursor;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow};
use dax_backend::broker::admin::{AdminClient, AdminReply, AdminRequest};
use dax_backend::broker::status::Status;
use tiny_http::{Header, Method, Request, Response, Server};

use history::History;

/// Between two looks at the broker.
const INTERVAL: Duration = Duration::from_millis(500);
/// How long the broker may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Threads that answer: a reader that stalls holds up one of them.
const THREADS: usize = 4;

const PAGE: &str = include_str!("page.html");

/// Where the page may be: the machine itself. Whoever wants it elsewhere has ssh -L.
pub(crate) fn parse_address(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr = text
        .parse()
        .map_err(|_| format!("`{text}` is no address and port, such as 127.0.0.1:9469"))?;
    if address.ip().is_loopback() {
        Ok(address)
    } else {
        Err(format!(
            "{} is not of this machine alone, and the page asks for no password: \
             listen on 127.0.0.1 and use ssh -L from elsewhere",
            address.ip()
        ))
    }
}

/// What was seen of the broker.
#[derive(Debug, Default)]
struct Seen {
    /// The last look, unless it failed.
    status: Option<Arc<Status>>,
    history: History,
}

type Shared = Arc<Mutex<Seen>>;

fn lock(seen: &Shared) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts answering at `address`, for the broker that will listen at `socket`.
/// Returns where, which is of interest for port 0.
pub(crate) fn start(address: SocketAddr, socket: &Path) -> anyhow::Result<SocketAddr> {
    let server =
        Server::http(address).map_err(|error| anyhow!("cannot listen at {address}: {error}"))?;
    let address = server.server_addr().to_ip().unwrap_or(address);
    let (server, seen) = (Arc::new(server), Shared::default());
    let looks = Arc::clone(&seen);
    let socket = PathBuf::from(socket);
    spawn("dcm-looks", move || look(&socket, &looks))?;
    for _ in 0..THREADS {
        let (server, seen) = (Arc::clone(&server), Arc::clone(&seen));
        spawn("dcm-page", move || {
            for request in server.incoming_requests() {
                // Who has hung up does not want the answer.
                let _ = answer(request, &seen);
            }
        })?;
    }
    Ok(address)
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    let thread = thread::Builder::new().name(name.into());
    thread.spawn(work).context("no thread left")?;
    Ok(())
}

/// Looks at the broker for ever.
fn look(socket: &Path, seen: &Shared) {
    let mut broker = None;
    loop {
        let status = look_once(socket, &mut broker);
        let mut seen = lock(seen);
        if let Some(status) = &status {
            seen.history.add(status);
        }
        seen.status = status.map(Arc::new);
        drop(seen);
        thread::sleep(INTERVAL);
    }
}

fn look_once(socket: &Path, broker: &mut Option<AdminClient>) -> Option<Status> {
    if broker.is_none() {
        *broker = AdminClient::connect(socket).ok();
    }
    match broker.as_ref()?.ask(&AdminRequest::Status, PATIENCE) {
        Ok(AdminReply::Status(status)) => Some(*status),
        _ => {
            *broker = None;
            None
        }
    }
}

fn answer(request: Request, seen: &Shared) -> std::io::Result<()> {
    let url = request.url().to_owned();
    let (path, query) = url.split_once('?').unwrap_or((&url, ""));
    let (code, kind, body) = if !is_local(&request) {
        (
            403,
            TEXT,
            "this page answers to localhost only\n".to_owned(),
        )
    } else if !matches!(request.method(), Method::Get | Method::Head) {
        (405, TEXT, "this page is for reading\n".to_owned())
    } else {
        match path {
            "/" => (200, "text/html; charset=utf-8", PAGE.to_owned()),
            "/metrics" => {
                let status = lock(seen).status.clone();
                (200, METRICS, metrics::render(status.as_deref()))
            }
            "/status.json" => {
                let status = lock(seen).status.clone();
                let code = if status.is_some() { 200 } else { 503 };
                (code, JSON, to_json(&status.as_deref()))
            }
            "/history.json" => {
                let since = query.strip_prefix("since=").and_then(|id| id.parse().ok());
                let samples = lock(seen).history.since(since.unwrap_or(0));
                (200, JSON, to_json(&samples))
            }
            _ => (
                404,
                TEXT,
                "there are /, /metrics, /status.json, /history.json\n".to_owned(),
            ),
        }
    };
    let mut response = Response::new(
        code.into(),
        Vec::new(),
        Cursor::new(body.clone().into_bytes()),
        Some(body.len()),
        None,
    );
    for (name, value) in [
        ("Content-Type", kind),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        // Nothing is fetched from anywhere else, whatever a process calls itself.
        (
            "Content-Security-Policy",
            "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; \
             connect-src 'self'; img-src data:; frame-ancestors 'none'",
        ),
    ] {
        if let Ok(header) = Header::from_bytes(name, value) {
            response.add_header(header);
        }
    }
    request.respond(response)
}

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";

fn to_json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_else(|_| "null".to_owned())
}

/// Whether the request names this machine: a page from elsewhere whose name
/// was made to point to loopback (DNS rebinding) names that.
fn is_local(request: &Request) -> bool {
    let host = request
        .headers()
        .iter()
        .find(|header| header.field.equiv("Host"));
    host.is_none_or(|host| {
        let host = host.value.as_str();
        let name = match host.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
            _ => host,
        };
        let address = name.trim_matches(['[', ']']).parse::<std::net::IpAddr>();
        name == "localhost" || address.is_ok_and(|address| address.is_loopback())
    })
}
