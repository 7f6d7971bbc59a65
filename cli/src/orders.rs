//! `dcm status`, `dcm add`, `dcm release`: orders to a running broker.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::{Args, ValueEnum};
use dax_backend::broker::admin::{
    AdminClient, AdminReply, AdminRequest, ReleaseTarget, SharedOffer,
};
use indicatif::{ProgressBar, ProgressStyle};
use uuid::Uuid;

use crate::failure::Failure;
use crate::{picture, size, sockets};

/// How long a broker may take to answer, beyond what the order itself takes.
const PATIENCE: Duration = Duration::from_secs(10);

/// Options of `dcm status`.
#[derive(Debug, Args)]
pub(crate) struct StatusOptions {
    /// Everything, as JSON
    #[arg(long)]
    json: bool,
    /// The broker's socket
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

/// Options of `dcm add`.
#[derive(Debug, Args)]
pub(crate) struct AddOptions {
    /// One extent of each size, all in one group
    #[arg(required = true, value_name = "SIZE", value_parser = size::parse, value_delimiter = ',')]
    sizes: Vec<u64>,
    /// Their tag: programs get them only by asking for it
    #[arg(long, value_name = "UUID")]
    tag: Option<Uuid>,
    /// Shared with other hosts: programs map them read-only
    #[arg(long, requires = "tag")]
    shared: bool,
    /// What another host has written there (software device only)
    #[arg(long, value_name = "FILE", requires = "shared")]
    content: Option<PathBuf>,
    /// What came of it, as JSON
    #[arg(long)]
    json: bool,
    /// The broker's socket
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

/// Options of `dcm release`.
#[derive(Debug, Args)]
pub(crate) struct ReleaseOptions {
    /// So many bytes (256M), or just this range (0x20000000+256M)
    #[arg(value_name = "SIZE|DPA+LENGTH", value_parser = size::parse_target)]
    target: ReleaseTarget,
    /// How long programs may take to make room, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 2000)]
    deadline: u64,
    /// Have the fabric manager take the range at once: programs lose what is in it
    #[arg(long)]
    force: bool,
    /// What programs do that are not ready by then; there is a receipt in any case
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = OnDeadline::Stop)]
    on_deadline: OnDeadline,
    /// The receipt, as JSON
    #[arg(long)]
    json: bool,
    /// The broker's socket
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

/// What becomes of a release at its deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OnDeadline {
    /// It ends.
    Stop,
    /// It goes on; `dcm status` shows what came of it.
    Continue,
}

/// Prints what the broker knows.
pub(crate) fn status(options: &StatusOptions) -> Result<(), Failure> {
    match ask(options.socket.as_deref(), &AdminRequest::Status, PATIENCE)? {
        AdminReply::Status(status) if options.json => print_json(&status),
        AdminReply::Status(status) => print(&picture::status(&status)),
        _ => Err(strange()),
    }
}

/// Has capacity added, and prints what was accepted.
pub(crate) fn add(options: &AddOptions) -> Result<(), Failure> {
    let absolute = |path: &PathBuf| {
        let found = path.canonicalize();
        found.with_context(|| format!("cannot read {}", path.display()))
    };
    let content = options.content.as_ref().map(absolute).transpose()?;
    let request = AdminRequest::Add {
        sizes: options.sizes.clone(),
        tag: options.tag,
        shared: options.shared.then_some(SharedOffer { content }),
    };
    let AdminReply::Added(added) = ask(options.socket.as_deref(), &request, PATIENCE)? else {
        return Err(strange());
    };
    if options.json {
        print_json(&added)?;
    } else {
        print(&picture::added(&added))?;
    }
    let bytes = |spans: &[dax_backend::broker::receipt::DpaSpan]| {
        spans.iter().map(|span| span.len).sum::<u64>()
    };
    if bytes(&added.accepted) < bytes(&added.offered) {
        return Err(anyhow!("not all of what was offered was accepted").into());
    }
    Ok(())
}

/// Has capacity released, and prints the receipt. What programs keep is no failure.
pub(crate) fn release(options: &ReleaseOptions) -> Result<(), Failure> {
    let request = AdminRequest::Release {
        target: options.target,
        deadline_ms: options.deadline,
        force: options.force,
        past_deadline: options.on_deadline == OnDeadline::Continue,
        progress: true,
    };
    let patience = PATIENCE.saturating_add(Duration::from_millis(options.deadline));
    let broker = AdminClient::connect(&sockets::find(options.socket.as_deref())?)?;
    // On stderr, and only if that is a terminal.
    let bar = ProgressBar::new(0).with_style(
        ProgressStyle::with_template("{wide_bar} {bytes} of {total_bytes} {elapsed}")
            .context("the progress bar's template")?,
    );
    let reply = broker.ask_watching(&request, patience, |asked, back| {
        bar.set_length(asked);
        bar.set_position(back);
    });
    bar.finish_and_clear();
    match reply? {
        AdminReply::Receipt(receipt) if options.json => {
            let mut json = serde_json::to_value(&receipt)?;
            if let Some(rate) = receipt.bandwidth() {
                json["bandwidth"] = rate.into();
            }
            print_json(&json)
        }
        AdminReply::Receipt(receipt) => print(&picture::receipt(&receipt)),
        _ => Err(strange()),
    }
}

fn ask(
    socket: Option<&std::path::Path>,
    request: &AdminRequest,
    patience: Duration,
) -> Result<AdminReply, Failure> {
    let path = sockets::find(socket)?;
    let broker = AdminClient::connect(&path)?;
    Ok(broker.ask(request, patience)?)
}

fn strange() -> Failure {
    anyhow!("the broker answered something else").into()
}

pub(crate) fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    print(&(serde_json::to_string_pretty(value)? + "\n"))
}

pub(crate) fn print(text: &str) -> Result<(), Failure> {
    use std::io::Write;
    let written = std::io::stdout().lock().write_all(text.as_bytes());
    match written {
        // `dcm status | head` has seen enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other.context("cannot write to stdout")?),
    }
}
