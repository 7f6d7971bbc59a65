//! The broker's log: one line an event on stderr, for people or for machines.
#![forbid(unsafe_code)]

use clap::{Args, ValueEnum};
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::LevelFilter;

/// How lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// `2026-01-31T12:00:00Z INFO client connected client=1 pid=42`
    Text,
    /// One object a line, its values beside `message` and `level`
    Json,
}

/// How much is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Level {
    /// Failures of the device, capacity taken by force
    Error,
    /// And connections and extents that were refused
    Warn,
    /// And clients, recalls and receipts, what the device says
    Info,
    /// And each lease
    Debug,
}

/// What of the log is wanted.
#[derive(Debug, Args)]
pub(crate) struct LogOptions {
    /// Write a log to stderr
    #[arg(long, value_name = "FORMAT")]
    log: Option<Format>,
    /// The least important events that are in the log
    #[arg(long, value_name = "LEVEL", default_value = "info", requires = "log")]
    log_level: Level,
}

/// Starts the log if there is to be one. A thread writes it, and when it can't
/// keep up, lines are dropped: a slow reader of stderr must not hold up the
/// broker. What has not been written is when the guard is dropped.
pub(crate) fn start(options: &LogOptions) -> Option<WorkerGuard> {
    let format = options.log?;
    let (writer, guard) = NonBlockingBuilder::default()
        .lossy(true)
        .finish(std::io::stderr());
    let level = match options.log_level {
        Level::Error => LevelFilter::ERROR,
        Level::Warn => LevelFilter::WARN,
        Level::Info => LevelFilter::INFO,
        Level::Debug => LevelFilter::DEBUG,
    };
    let lines = tracing_subscriber::fmt()
        .with_writer(writer)
        .with_max_level(level)
        .with_target(false);
    match format {
        Format::Text => lines.with_ansi(false).init(),
        Format::Json => lines.json().flatten_event(true).init(),
    }
    Some(guard)
}
