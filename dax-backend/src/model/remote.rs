//! A software device in another process: its registers and its fabric manager's
//! side over a socket each, so that it outlives its driver as hardware does.
//!
//! The sockets are `SOCK_SEQPACKET`: one request, one reply, never two at once.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use serde::{Deserialize, Serialize};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Fabric, SoftwareDevice};
use crate::address::DpaRange;
use crate::extent::{Extent, ExtentTag};
use crate::mmio::{Mmio, RegisterBlock};
use crate::orchestrator::{Orchestrator, OrchestratorError};

/// Longest message in bytes: a mailbox payload as models have it, or a list of extents.
const MESSAGE: usize = 64 << 10;

const BLOCK_LEN: u8 = 0;
const READ32: u8 = 1;
const READ64: u8 = 2;
const WRITE32: u8 = 3;
const WRITE64: u8 = 4;
const READ_PAYLOAD: u8 = 5;
const WRITE_PAYLOAD: u8 = 6;

/// One access. `value` is what is written, or how many bytes are read; a payload that is
/// written follows.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Access {
    op: u8,
    component: u8,
    reserved: [u8; 2],
    offset: U32,
    value: U64,
}

#[derive(Serialize, Deserialize)]
enum Ask {
    Add {
        sizes: Vec<u64>,
        tag: ExtentTag,
    },
    Share {
        sizes: Vec<u64>,
        tag: ExtentTag,
        content: Option<PathBuf>,
    },
    Release {
        ranges: Vec<DpaRange>,
        forced: bool,
    },
}

#[derive(Serialize, Deserialize)]
enum Reply {
    Done(Vec<Extent>),
    Refused(String),
    NoCapacity { wanted: u64, available: u64 },
}

/// The next message; `None`: the other end is gone.
fn receive<'a>(socket: &OwnedFd, buffer: &'a mut [u8]) -> Option<&'a [u8]> {
    loop {
        match recv(socket, &mut *buffer, RecvFlags::empty()) {
            Ok((0, _)) => return None,
            Ok((len, _)) => return buffer.get(..len),
            Err(Errno::INTR) => {}
            Err(_) => return None,
        }
    }
}

fn say(socket: &OwnedFd, bytes: &[u8]) -> Result<(), Errno> {
    loop {
        match send(socket, bytes, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            other => return other.map(|_| ()),
        }
    }
}

impl SoftwareDevice {
    /// Serves the registers to a [`RemoteMmio`] until that is dropped.
    pub fn serve_registers(&self, socket: &OwnedFd) {
        let mut mmio = self.mmio();
        let mut buffer = vec![0; MESSAGE];
        while let Some(message) = receive(socket, &mut buffer) {
            let Ok((access, payload)) = Access::ref_from_prefix(message) else {
                return;
            };
            let block = match access.component {
                0 => RegisterBlock::Device,
                _ => RegisterBlock::Component,
            };
            let (offset, value) = (access.offset.get(), access.value.get());
            let mut read = Vec::new();
            let answer = match access.op {
                BLOCK_LEN => mmio.block_len(block).into(),
                READ32 => mmio.read32(block, offset).into(),
                READ64 => mmio.read64(block, offset),
                WRITE32 => {
                    mmio.write32(block, offset, value as u32);
                    0
                }
                WRITE64 => {
                    mmio.write64(block, offset, value);
                    0
                }
                READ_PAYLOAD => {
                    read.resize((value as usize).min(MESSAGE - 8), 0);
                    mmio.read_payload(offset, &mut read);
                    0
                }
                WRITE_PAYLOAD => {
                    mmio.write_payload(offset, payload);
                    0
                }
                _ => return,
            };
            let mut reply = answer.to_le_bytes().to_vec();
            reply.extend(read);
            if say(socket, &reply).is_err() {
                return;
            }
        }
    }

    /// Serves the fabric manager's side to a [`RemoteFabric`] until that is dropped.
    pub fn serve_fabric(&self, socket: &OwnedFd) {
        let mut fabric: Fabric = self.fabric();
        let mut buffer = vec![0; MESSAGE];
        while let Some(message) = receive(socket, &mut buffer) {
            let done = match serde_json::from_slice(message) {
                Ok(Ask::Add { sizes, tag }) => Orchestrator::add(&mut fabric, &sizes, tag),
                Ok(Ask::Share {
                    sizes,
                    tag,
                    content,
                }) => Orchestrator::add_shared(&mut fabric, &sizes, tag, content.as_deref()),
                Ok(Ask::Release { ranges, forced }) => {
                    Orchestrator::release(&mut fabric, &ranges, forced).map(|()| Vec::new())
                }
                Err(_) => return,
            };
            let reply = match done {
                Ok(extents) => Reply::Done(extents),
                Err(OrchestratorError::NoCapacity { wanted, available }) => {
                    Reply::NoCapacity { wanted, available }
                }
                Err(OrchestratorError::Refused { reason }) => Reply::Refused(reason),
                Err(other) => Reply::Refused(other.to_string()),
            };
            let Ok(bytes) = serde_json::to_vec(&reply) else {
                return;
            };
            if say(socket, &bytes).is_err() {
                return;
            }
        }
    }
}

/// The registers of a [`SoftwareDevice`] in another process. Once that is gone they read as
/// all ones.
pub struct RemoteMmio {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl RemoteMmio {
    /// Over a socket whose other end [`SoftwareDevice::serve_registers`] has.
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            buffer: vec![0; MESSAGE],
        }
    }

    fn access(&mut self, access: Access, payload: &[u8]) -> Option<(u64, &[u8])> {
        let mut message = access.as_bytes().to_vec();
        message.extend(payload);
        say(&self.socket, &message).ok()?;
        let reply = receive(&self.socket, &mut self.buffer)?;
        let (value, read) = reply.split_first_chunk::<8>()?;
        Some((u64::from_le_bytes(*value), read))
    }

    fn register(&mut self, op: u8, block: RegisterBlock, offset: u32, value: u64) -> u64 {
        let answer = self.access(access(op, block, offset, value), &[]);
        answer.map_or(u64::MAX, |(value, _)| value)
    }
}

fn access(op: u8, block: RegisterBlock, offset: u32, value: u64) -> Access {
    Access {
        op,
        component: u8::from(block == RegisterBlock::Component),
        reserved: [0; 2],
        offset: offset.into(),
        value: value.into(),
    }
}

impl Mmio for RemoteMmio {
    fn block_len(&self, block: RegisterBlock) -> u32 {
        let ask = access(BLOCK_LEN, block, 0, 0);
        let mut answer = [0; 8];
        let said = say(&self.socket, ask.as_bytes()).is_ok()
            && receive(&self.socket, &mut answer).is_some();
        if said {
            u64::from_le_bytes(answer) as u32
        } else {
            0
        }
    }

    fn read32(&mut self, block: RegisterBlock, offset: u32) -> u32 {
        self.register(READ32, block, offset, 0) as u32
    }

    fn read64(&mut self, block: RegisterBlock, offset: u32) -> u64 {
        self.register(READ64, block, offset, 0)
    }

    fn write32(&mut self, block: RegisterBlock, offset: u32, value: u32) {
        self.register(WRITE32, block, offset, value.into());
    }

    fn write64(&mut self, block: RegisterBlock, offset: u32, value: u64) {
        self.register(WRITE64, block, offset, value);
    }

    fn read_payload(&mut self, offset: u32, payload: &mut [u8]) {
        let ask = access(
            READ_PAYLOAD,
            RegisterBlock::Device,
            offset,
            payload.len() as u64,
        );
        payload.fill(0xff);
        if let Some((_, read)) = self.access(ask, &[]) {
            let len = read.len().min(payload.len());
            payload[..len].copy_from_slice(&read[..len]);
        }
    }

    fn write_payload(&mut self, offset: u32, payload: &[u8]) {
        let ask = access(WRITE_PAYLOAD, RegisterBlock::Device, offset, 0);
        self.access(ask, payload);
    }
}

/// The fabric manager's side of a [`SoftwareDevice`] in another process.
pub struct RemoteFabric(OwnedFd);

impl RemoteFabric {
    /// Over a socket whose other end [`SoftwareDevice::serve_fabric`] has.
    pub fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    fn ask(&mut self, ask: &Ask) -> Result<Vec<Extent>, OrchestratorError> {
        let gone = |error: io::Error| OrchestratorError::Unreachable(error);
        let bytes = serde_json::to_vec(ask).map_err(|error| gone(error.into()))?;
        say(&self.0, &bytes).map_err(|errno| gone(errno.into()))?;
        let mut buffer = vec![0; MESSAGE];
        let reply = receive(&self.0, &mut buffer).ok_or_else(|| gone(Errno::PIPE.into()))?;
        match serde_json::from_slice(reply).map_err(|error| gone(error.into()))? {
            Reply::Done(extents) => Ok(extents),
            Reply::Refused(reason) => Err(OrchestratorError::Refused { reason }),
            Reply::NoCapacity { wanted, available } => {
                Err(OrchestratorError::NoCapacity { wanted, available })
            }
        }
    }
}

impl Orchestrator for RemoteFabric {
    fn add(&mut self, sizes: &[u64], tag: ExtentTag) -> Result<Vec<Extent>, OrchestratorError> {
        let sizes = sizes.to_vec();
        self.ask(&Ask::Add { sizes, tag })
    }

    fn add_shared(
        &mut self,
        sizes: &[u64],
        tag: ExtentTag,
        content: Option<&Path>,
    ) -> Result<Vec<Extent>, OrchestratorError> {
        self.ask(&Ask::Share {
            sizes: sizes.to_vec(),
            tag,
            content: content.map(Path::to_owned),
        })
    }

    fn release(&mut self, ranges: &[DpaRange], forced: bool) -> Result<(), OrchestratorError> {
        let ranges = ranges.to_vec();
        self.ask(&Ask::Release { ranges, forced }).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capacity::CapacityDevice;
    use crate::device::{DcDevice, DeviceConfig};
    use crate::model::ModelConfig;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use std::thread;

    fn pair() -> (OwnedFd, OwnedFd) {
        let flags = SocketFlags::CLOEXEC;
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
    }

    #[test]
    fn a_driver_in_another_process_finds_the_device_as_the_last_one_left_it() {
        let model = SoftwareDevice::new(ModelConfig::one_region(64 << 20)).unwrap();
        for round in 1..3 {
            let (registers, theirs) = pair();
            let (fabric, fabrics) = pair();
            let device = model.clone();
            let serving = thread::spawn(move || device.serve_registers(&theirs));
            let device = model.clone();
            let managing = thread::spawn(move || device.serve_fabric(&fabrics));
            let mut fabric = RemoteFabric::new(fabric);
            fabric.add(&[8 << 20, 4 << 20], ExtentTag::NULL).unwrap();
            let error = fabric.add(&[1 << 30], ExtentTag::NULL).unwrap_err();
            assert!(error.to_string().contains("bytes are free"), "{error}");
            let registers = RemoteMmio::new(registers);
            let mut driver = DcDevice::open(registers, DeviceConfig::default()).unwrap();
            while driver.accepted().len() < 2 * round {
                driver.poll().unwrap();
            }
            drop((driver, fabric));
            serving.join().unwrap();
            managing.join().unwrap();
        }
        assert_eq!(model.audit().violations, Vec::<String>::new());
        let mut gone = RemoteMmio::new(pair().0);
        assert_eq!(gone.read32(RegisterBlock::Device, 0), u32::MAX);
    }
}
