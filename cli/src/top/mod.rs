//! `dcm top`: a broker, as it changes.
#![forbid(unsafe_code)]

mod flow;
mod keys;
mod map;
#[cfg(test)]
pub(crate) mod sample;
mod view;

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use dax_backend::broker::admin::{AdminClient, AdminReply, AdminRequest};
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{Event, KeyCode, KeyEventKind, KeyModifiers};

use crate::failure::Failure;
use crate::sockets;
use flow::Flow;

/// Between two looks at the broker.
const INTERVAL: Duration = Duration::from_millis(250);
/// How long the broker may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Options of `dcm top`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The broker's socket
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

/// Shows the broker until a key ends it.
pub(crate) fn top(options: &Options) -> Result<(), Failure> {
    if !std::io::stdout().is_terminal() {
        return Err(Failure::Usage(
            "dcm top needs a terminal: dcm status prints the same once".into(),
        ));
    }
    let socket = sockets::find(options.socket.as_deref())?;
    let broker = AdminClient::connect(&socket)?;
    let keys = keys::listen()?;
    let mut terminal = ratatui::try_init()?;
    let shown = show(&mut terminal, &keys, &socket, broker);
    let restored = ratatui::try_restore();
    if let Err(error) = shown {
        // What is gone can't be restored, and dropping it says so on stderr.
        std::mem::forget(terminal);
        return Err(error.into());
    }
    Ok(restored?)
}

fn show(
    terminal: &mut DefaultTerminal,
    keys: &Receiver<io::Result<Event>>,
    socket: &Path,
    broker: AdminClient,
) -> Result<(), anyhow::Error> {
    let mut broker = Some(broker);
    let mut flow = Flow::default();
    loop {
        let looked = Instant::now();
        let asked = match &broker {
            Some(broker) => broker.ask(&AdminRequest::Status, PATIENCE),
            None => AdminClient::connect(socket).and_then(|new| {
                let reply = new.ask(&AdminRequest::Status, PATIENCE);
                broker = Some(new);
                reply
            }),
        };
        match asked {
            Ok(AdminReply::Status(status)) => flow.saw(*status, looked),
            Ok(_) => flow.lost("the broker answered something else".into()),
            Err(error) => {
                broker = None;
                flow.lost(error.to_string());
            }
        }
        draw(terminal, &flow)?;
        while let Some(left) = INTERVAL.checked_sub(looked.elapsed()) {
            let event = match keys.recv_timeout(left) {
                Ok(event) => event?,
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => bail!(keys::GONE),
            };
            match event {
                Event::Key(key) if key.kind == KeyEventKind::Press => {
                    let interrupt = key.modifiers.contains(KeyModifiers::CONTROL);
                    match key.code {
                        KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
                        KeyCode::Char('c') if interrupt => return Ok(()),
                        _ => {}
                    }
                }
                Event::Resize(..) => draw(terminal, &flow)?,
                _ => {}
            }
        }
    }
}

fn draw(terminal: &mut DefaultTerminal, flow: &Flow) -> Result<(), anyhow::Error> {
    terminal
        .draw(|frame| view::draw(frame, flow))
        .context(keys::GONE)?;
    Ok(())
}
