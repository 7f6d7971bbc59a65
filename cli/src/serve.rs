//! `dcm serve`: a broker in the foreground, or behind one `dcm run`.

use std::ffi::CString;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, anyhow};
use clap::Args;
use dax_backend::blocks::NodeSurface;
use dax_backend::broker::{Admit, BrokerClient, BrokerConfig, Listener, Stop, Store, StoreSocket};
use rustix::process::{Resource, getrlimit, setrlimit};
use uuid::Uuid;

use crate::attach::Surface;
use crate::failure::Failure;
use crate::forks;
use crate::marks::Marks;
use crate::signals::Signals;
use crate::size::Bytes;
use crate::{activation, capacity, emulate, keeper, live, log, sockets};

/// What the broker behind a `dcm run` says when programs can connect.
pub(crate) const READY: &str = "ready\n";

/// Options of `dcm serve`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    capacity: capacity::Source,
    /// What becomes of the device's capacity
    #[arg(
        long,
        value_name = "SURFACE",
        requires = "device",
        conflicts_with = "run",
        value_enum
    )]
    surface: Option<Surface>,
    /// Where to listen
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Serve a read-only page about the broker at http://ADDRESS/, and /metrics for Prometheus;
    /// a loopback address only
    #[arg(long, value_name = "ADDRESS", value_parser = live::parse_address)]
    listen: Option<SocketAddr>,
    #[command(flatten)]
    marks: Marks,
    #[command(flatten)]
    log: log::LogOptions,
    /// Serve the programs of this run, until stdin ends and none is left
    #[arg(long, hide = true, value_name = "UUID", requires = "socket")]
    run: Option<Uuid>,
    /// Serve what the keeper on stdin has; so many have died before
    #[arg(long, hide = true, value_name = "COUNT", conflicts_with = "run")]
    worker: Option<u64>,
}

/// Serves until told to stop.
pub(crate) fn serve(options: &Options) -> Result<(), Failure> {
    options.capacity.check()?;
    let policy = options.marks.policy()?;
    if options.run.is_some() {
        close_inherited();
    }
    // Before any thread starts, so that none of them takes a signal.
    let signals = Signals::block()?;
    let path = match &options.socket {
        Some(path) => path.clone(),
        None => sockets::directory()?.join("broker.sock"),
    };
    let admit = match options.run {
        Some(run) => Admit::Run(run),
        None if sockets::is_system() => Admit::Anyone,
        None => Admit::Owner,
    };
    let config = BrokerConfig {
        admit,
        policy,
        restarts: options.worker.unwrap_or(0),
        serve_family: forks::start,
        ..BrokerConfig::default()
    };
    raise_descriptor_limit();
    // A software device is held by a keeper, so that it outlives a broker that dies.
    let emulated = options.capacity.emulated();
    let kept = emulated.filter(|_| options.run.is_none());
    if let (Some((size, offer)), None) = (&kept, options.worker) {
        let listener = listen(&path)?;
        let model = emulate::device(*size, offer, options.capacity.sharable())?;
        return keeper::keep(&model, &listener, &signals, || {
            Ok(serving(&format!(
                "{} of a software device of {} at {}\n",
                Bytes(offer.iter().sum()),
                Bytes(*size),
                listener.path().display()
            ))?)
        });
    }
    let _log = log::start(&options.log);
    let stop = Stop::new().context("no descriptor left")?;
    let (mut broker, listener, served, surface) = if let Some((_, offer)) = kept {
        let mut store = from_keeper(&stop)?;
        let listener = store.take(keeper::LISTENER);
        let listener = listener.context("the keeper has handed over no listener")?;
        let path = activation::path_of(&listener).unwrap_or(path);
        let listener = Listener::inherited(listener, &path);
        let broker = emulate::worker(store, offer.iter().sum(), config)?;
        (broker, listener, None, None)
    } else {
        let surface = options.surface.unwrap_or_default();
        let served = options.capacity.broker(surface, config)?;
        let listener = listen(&path)?;
        (served.broker, listener, Some(served.told), served.surface)
    };
    if let Some(address) = options.listen {
        live::start(address, listener.path())?;
    }
    if options.run.is_some() {
        announce(READY)?;
        silence()?;
        let stop = stop.clone();
        thread::spawn(move || {
            // Ends when `dcm run` does, however it does.
            let _ = io::stdin().read_to_end(&mut Vec::new());
            stop.when_idle();
        });
    } else {
        let stop = stop.clone();
        thread::spawn(move || {
            signals.wait();
            stop.now();
        });
        match served {
            Some(served) => serving(&format!("{served} at {}\n", listener.path().display()))?,
            None => broker.ready(),
        }
    }
    let surface = surface.map(|surface| put_online(surface, listener.path(), &stop));
    broker.serve(&listener, &stop).context("polling failed")?;
    match surface {
        Some(surface) if surface.is_finished() => Err(surface
            .join()
            .unwrap_or_else(|_| anyhow!("the thread that puts memory online has failed"))
            .into()),
        _ => Ok(()),
    }
}

/// Has a thread lease all capacity of the broker at `path`, which serves soon, as memory of a node.
/// It ends by an error, and the broker with it.
fn put_online(
    mut surface: NodeSurface,
    path: &Path,
    stop: &Stop,
) -> thread::JoinHandle<anyhow::Error> {
    let (path, stop) = (path.to_owned(), stop.clone());
    thread::spawn(move || {
        let path = CString::new(path.into_os_string().into_vec()).unwrap_or_default();
        let error = match BrokerClient::connect(&path, 0) {
            Ok((client, welcome)) => anyhow::Error::from(surface.serve(&client, &welcome)),
            Err(error) => error.into(),
        };
        stop.now();
        error.context("memory is not put online any more")
    })
}

/// The socket that systemd has for us, or one at `path`.
fn listen(path: &Path) -> anyhow::Result<Listener> {
    match activation::listener()? {
        Some(listener) => Ok(listener),
        None => Ok(Listener::bind(path, sockets::is_system())?),
    }
}

/// What the keeper has, from the socket that stdin is. Without a keeper the
/// broker ends once its last client has.
fn from_keeper(stop: &Stop) -> anyhow::Result<Store> {
    let socket = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?;
    rustix::stdio::dup2_stdin(std::fs::File::open("/dev/null")?)?;
    let news = StoreSocket::from_fd(socket.try_clone()?);
    let store = Store::receive(StoreSocket::from_fd(socket)).context("the keeper is gone")?;
    let stop = stop.clone();
    thread::spawn(move || {
        while let Ok(Some(_)) = news.receive() {}
        stop.when_idle();
    });
    Ok(store)
}

fn announce(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Tells whoever started this that programs can connect.
fn serving(what: &str) -> io::Result<()> {
    announce(&format!("serving {what}"))?;
    activation::notify_ready();
    Ok(())
}

/// A client takes three descriptors; the usual soft limit is for programs that
/// use select(2).
pub(crate) fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Where it stays as it is, fewer clients fit.
    let _ = setrlimit(Resource::Nofile, limit);
}

/// Lets go of what `dcm run` was started with: whoever waits for the end of a
/// pipe waits for the program, not for its broker.
fn close_inherited() {
    // SAFETY: nothing of ours is open above stderr yet; the standard library
    // opens nothing before main.
    unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0) };
}

/// From now on there is nobody to tell.
fn silence() -> io::Result<()> {
    let null = std::fs::OpenOptions::new().write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    Ok(())
}
