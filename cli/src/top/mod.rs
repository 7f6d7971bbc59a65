//! `dcm top`: a broker, as it changes.
#![forbid(unsafe_code)]

mod flow;
mod map;
#[cfg(test)]
pub(crate) mod sample;
mod view;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use dax_backend::broker::admin::{AdminClient, AdminReply, AdminRequest};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};

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
    let mut broker = Some(AdminClient::connect(&socket)?);
    let mut flow = Flow::default();
    ratatui::run(|terminal| {
        loop {
            let looked = Instant::now();
            let asked = match &broker {
                Some(broker) => broker.ask(&AdminRequest::Status, PATIENCE),
                None => AdminClient::connect(&socket).and_then(|new| {
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
            terminal.draw(|frame| view::draw(frame, &flow))?;
            while let Some(left) = INTERVAL.checked_sub(looked.elapsed()) {
                if !event::poll(left)? {
                    break;
                }
                match event::read()? {
                    Event::Key(key) if key.kind == KeyEventKind::Press => {
                        let interrupt = key.modifiers.contains(KeyModifiers::CONTROL);
                        match key.code {
                            KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
                            KeyCode::Char('c') if interrupt => return Ok(()),
                            _ => {}
                        }
                    }
                    Event::Resize(..) => {
                        terminal.draw(|frame| view::draw(frame, &flow))?;
                    }
                    _ => {}
                }
            }
        }
    })
    .map_err(|error: std::io::Error| Failure::from(error))
}
