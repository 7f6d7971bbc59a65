//! Requests of the operator: JSON in a memfd each way, so that neither end
//! needs a stream protocol beside the fixed-size messages.
#![forbid(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

use super::client::{BrokerClient, ClientError, ConnectError};
use super::protocol::{Kind, Message};
use super::receipt::{DpaSpan, Receipt};
use super::socket::Descriptors;
use super::status::{RunReport, Status};

/// Largest request or reply that is read, in bytes.
const MAX_JSON: u64 = 64 << 20;

/// What an operator may ask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum AdminRequest {
    /// Everything about the broker.
    Status,
    /// The processes of one `dcm run`.
    Run {
        /// Which.
        run: Uuid,
    },
    /// More capacity, through the orchestrator: one extent per size, one More group.
    Add {
        /// Bytes of each extent.
        sizes: Vec<u64>,
        /// Their tag.
        tag: Option<Uuid>,
        /// Shared with other hosts, not this one's alone.
        #[serde(default)]
        shared: Option<SharedOffer>,
    },
    /// Capacity back to the device.
    Release {
        /// What.
        target: ReleaseTarget,
        /// How long clients may take, in ms.
        deadline_ms: u64,
        /// Have the orchestrator take it at once, whoever uses it: only ranges.
        #[serde(default)]
        force: bool,
        /// At the deadline there is a receipt, and the work goes on.
        #[serde(default)]
        past_deadline: bool,
        /// Say meanwhile how far it is ([`AdminClient::ask_watching`]).
        #[serde(default)]
        progress: bool,
    },
}

/// Shared capacity, as it comes from another host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedOffer {
    /// The file that another host has written there, for the software device: an absolute path
    /// that the broker can read.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub content: Option<PathBuf>,
}

/// What to release.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReleaseTarget {
    /// So many bytes, wherever it is cheapest.
    Bytes(u64),
    /// Just this range.
    Range(DpaSpan),
}

/// The broker's answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum AdminReply {
    /// To [`AdminRequest::Status`].
    Status(Box<Status>),
    /// To [`AdminRequest::Run`].
    Run(Box<RunReport>),
    /// To [`AdminRequest::Add`].
    Added(Added),
    /// To [`AdminRequest::Release`].
    Receipt(Receipt),
    /// Not done.
    Error {
        /// What was refused, why, and what to do.
        message: String,
    },
}

/// What came of an offer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Added {
    /// Offered by the orchestrator.
    pub offered: Vec<DpaSpan>,
    /// Accepted by the driver.
    pub accepted: Vec<DpaSpan>,
    /// Rejected by the driver.
    pub rejected: Vec<RejectedExtent>,
    /// From the request to the memory being usable, in microseconds.
    pub duration_us: u64,
}

/// An extent that was offered and not taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RejectedExtent {
    /// Where it was.
    #[serde(flatten)]
    pub span: DpaSpan,
    /// Why.
    pub reason: String,
}

/// Why there is no answer.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AdminError {
    /// No connection.
    #[error("{path}: {source}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: ConnectError,
    },
    /// The connection broke.
    #[error("{0}")]
    Conversation(#[from] ClientError),
    /// The broker is there, but busy or stuck.
    #[error("the broker did not answer within {0:?}")]
    Silent(Duration),
    /// What came was no answer.
    #[error("the broker's answer can't be read: {0}")]
    Unreadable(String),
    /// The broker refuses.
    #[error("{0}")]
    Refused(String),
}

/// A connection in the admin role.
#[derive(Debug)]
pub struct AdminClient {
    client: BrokerClient,
}

impl AdminClient {
    /// Connects to the broker at `path`.
    pub fn connect(path: &Path) -> Result<Self, AdminError> {
        let error = |source| AdminError::Connect {
            path: path.into(),
            source,
        };
        let bytes =
            CString::new(path.as_os_str().as_bytes()).map_err(|_| error(ConnectError::Path))?;
        let client = BrokerClient::connect_admin(&bytes).map_err(error)?;
        Ok(Self { client })
    }

    /// Sends `request` and waits for the answer.
    pub fn ask(
        &self,
        request: &AdminRequest,
        patience: Duration,
    ) -> Result<AdminReply, AdminError> {
        self.ask_watching(request, patience, |_, _| ())
    }

    /// The same; `progress` hears meanwhile how many bytes were asked for and
    /// how many of them are back.
    pub fn ask_watching(
        &self,
        request: &AdminRequest,
        patience: Duration,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<AdminReply, AdminError> {
        let deadline = Instant::now().checked_add(patience);
        let unreadable = |error: io::Error| AdminError::Unreadable(error.to_string());
        let body = to_memfd(request).map_err(unreadable)?;
        self.client
            .send(&Message::new(Kind::AdminRequest), &[body.as_fd()])?;
        let mut fds = Descriptors::default();
        let message = loop {
            let left = deadline.map(|end| end.saturating_duration_since(Instant::now()));
            let Some(message) = self.client.receive(left, &mut fds)? else {
                return Err(AdminError::Silent(patience));
            };
            if message.kind() != Some(Kind::AdminProgress) {
                break message;
            }
            progress(message.arg(0), message.arg(1));
        };
        let [Some(body), ..] = fds.0 else {
            return Err(AdminError::Unreadable("it has no body".into()));
        };
        if message.kind() != Some(Kind::AdminReply) {
            return Err(ClientError::Unexpected.into());
        }
        match from_memfd(body).map_err(unreadable)? {
            AdminReply::Error { message } => Err(AdminError::Refused(message)),
            reply => Ok(reply),
        }
    }
}

/// `value` as JSON in a memfd of its own.
pub(super) fn to_memfd(value: &impl Serialize) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create("dcmalloc-admin", MemfdFlags::CLOEXEC)?);
    file.write_all(&serde_json::to_vec(value)?)?;
    Ok(file.into())
}

/// Reads what [`to_memfd`] wrote, whoever did.
pub(super) fn from_memfd<T: DeserializeOwned>(fd: OwnedFd) -> io::Result<T> {
    let mut file = File::from(fd);
    // A pipe or a terminal could make the broker wait for ever.
    if !file.metadata()?.is_file() || file.metadata()?.len() > MAX_JSON {
        return Err(io::ErrorKind::InvalidData.into());
    }
    file.seek(SeekFrom::Start(0))?;
    let mut text = Vec::new();
    file.take(MAX_JSON).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}
