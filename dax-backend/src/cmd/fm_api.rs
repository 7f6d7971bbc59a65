//! What a fabric manager says to a device: FM-API Initiate Dynamic Capacity Add and Release, 5604h
//! and 5605h, and the tunnel to it through the mailbox of a switch, 5300h.
//!
//! They go to the device's "FM-owned LD", which is not the mailbox that a host drives;
//! [`crate::orchestrator::fm`] sends them. Extents are named by absolute DPA here. QEMU 10.0 has the tunnel and answers 5604h with "unsupported";
//! newer versions have both.

#![forbid(unsafe_code)]

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::dynamic_capacity::ListedExtent;
use super::{Command, MalformedResponse, ReturnCode, elements, split};
use crate::address::{Dpa, DpaRange};
use crate::extent::{Extent, ExtentTag};

/// Head of 5604h and 5605h; extents follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Head {
    host: U16,
    /// 5604h: the policy. 5605h: bits 3:0 the policy, 4 forced, 5 sanitize.
    flags: u8,
    region: u8,
    length: U64,
    tag: [u8; 16],
    extents: U32,
}

const _: () = assert!(size_of::<Head>() == 32);

impl Head {
    fn encode(&self, extents: &[Extent], payload: &mut Vec<u8>) {
        payload.extend(self.as_bytes());
        for extent in extents {
            payload.extend(ListedExtent::from(extent).as_bytes());
        }
    }
}

/// A request as the device reads it.
pub(crate) struct Initiated {
    /// Bits 3:0 the policy; of a release also 4 forced, 5 sanitize.
    pub(crate) flags: u8,
    pub(crate) region: u8,
    pub(crate) length: u64,
    pub(crate) tag: ExtentTag,
    pub(crate) ranges: Vec<DpaRange>,
}

/// Policy of 5604h and 5605h: exactly the extents that are named.
pub(crate) const ADD_PRESCRIPTIVE: u8 = 2;
/// The same of 5605h.
pub(crate) const RELEASE_PRESCRIPTIVE: u8 = 1;

impl Initiated {
    /// Reads the input payload of 5604h or 5605h.
    pub(crate) fn read(payload: &[u8]) -> Result<Self, MalformedResponse> {
        let (head, rest) = split::<Head>(payload, "request for capacity")?;
        let (count, before) = (head.extents.get() as usize, size_of::<Head>());
        let (extents, _) = elements::<ListedExtent>(rest, count, before, "its extents")?;
        let range = |extent: &ListedExtent| DpaRange {
            start: Dpa(extent.start.get()),
            len: extent.len.get(),
        };
        Ok(Self {
            flags: head.flags,
            region: head.region,
            length: head.length.get(),
            tag: ExtentTag(head.tag),
            ranges: extents.iter().map(range).collect(),
        })
    }
}

/// Which capacity is added (CXL r3.1 7.6.7.6.5, "Selection Policy").
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// So many bytes, wherever they are free.
    Free(u64),
    /// So many bytes in one piece.
    Contiguous(u64),
    /// Exactly these extents.
    Prescriptive(Vec<Extent>),
    /// What another host has under the tag.
    SharedAccess,
}

/// Initiate Dynamic Capacity Add, 5604h (CXL r3.1 7.6.7.6.5).
#[derive(Clone, Debug)]
pub struct InitiateAdd {
    /// The host that is offered the capacity; 0 on a device of one host.
    pub host: u16,
    /// Index of the DC region.
    pub region: u8,
    /// The tag that the extents get.
    pub tag: ExtentTag,
    /// Which capacity.
    pub selection: Selection,
}

impl Command for InitiateAdd {
    const OPCODE: u16 = 0x5604;
    const NAME: &'static str = "Initiate Dynamic Capacity Add";
    type Response = ();

    fn encode(&self, payload: &mut Vec<u8>) {
        let (policy, length, extents): (u8, u64, &[Extent]) = match &self.selection {
            Selection::Free(bytes) => (0, *bytes, &[]),
            Selection::Contiguous(bytes) => (1, *bytes, &[]),
            Selection::Prescriptive(extents) => (2, sum(extents), extents),
            Selection::SharedAccess => (3, 0, &[]),
        };
        let head = Head {
            host: self.host.into(),
            flags: policy,
            region: self.region,
            length: length.into(),
            tag: self.tag.0,
            extents: (extents.len() as u32).into(),
        };
        head.encode(extents, payload);
    }

    fn decode(&self, _: &[u8]) -> Result<(), MalformedResponse> {
        Ok(())
    }
}

/// Initiate Dynamic Capacity Release, 5605h (CXL r3.1 7.6.7.6.6): of the extents, or of everything
/// under the tag if there are none.
#[derive(Clone, Debug)]
pub struct InitiateRelease {
    /// The host that has it.
    pub host: u16,
    /// Index of the DC region.
    pub region: u8,
    /// What is released whole, if no extents are named.
    pub tag: ExtentTag,
    /// Exactly these.
    pub extents: Vec<Extent>,
    /// The host is not asked.
    pub forced: bool,
    /// The memory is sanitized when it is back.
    pub sanitize: bool,
}

impl Command for InitiateRelease {
    const OPCODE: u16 = 0x5605;
    const NAME: &'static str = "Initiate Dynamic Capacity Release";
    type Response = ();

    fn encode(&self, payload: &mut Vec<u8>) {
        let prescriptive = u8::from(!self.extents.is_empty());
        let head = Head {
            host: self.host.into(),
            flags: prescriptive | u8::from(self.forced) << 4 | u8::from(self.sanitize) << 5,
            region: self.region,
            length: sum(&self.extents).into(),
            tag: self.tag.0,
            extents: (self.extents.len() as u32).into(),
        };
        head.encode(&self.extents, payload);
    }

    fn decode(&self, _: &[u8]) -> Result<(), MalformedResponse> {
        Ok(())
    }
}

fn sum(extents: &[Extent]) -> u64 {
    extents.iter().map(|extent| extent.range.len).sum()
}

/// Tunnel Management Command, 5300h (CXL r3.1 7.6.7.3.1): hands `command` on to the device behind
/// `port` of a switch.
#[derive(Clone, Debug)]
pub struct Tunnel<C> {
    /// The downstream port.
    pub port: u8,
    /// Comes back with the answer.
    pub tag: u8,
    /// What the device is told.
    pub command: C,
}

/// Head of the input payload of [`Tunnel`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct TunnelHead {
    port: u8,
    /// 0: a port of the switch.
    target: u8,
    len: U16,
}

/// Head of a message between CCIs (CXL r3.1 7.6.3).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct MessageHead {
    /// 0: a request, 1: a response.
    category: u8,
    tag: u8,
    reserved: u8,
    opcode: U16,
    len: [u8; 3],
    return_code: U16,
    vendor: U16,
}

/// Head of the output payload of [`Tunnel`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct TunnelAnswer {
    len: U16,
    reserved: [u8; 2],
    message: MessageHead,
}

const _: () = assert!(size_of::<TunnelHead>() == 4);
const _: () = assert!(size_of::<MessageHead>() == 12);
const _: () = assert!(size_of::<TunnelAnswer>() == 16);

/// What a switch finds in the input payload of 5300h: the port, and the message for it.
pub(crate) struct Tunnelling<'a> {
    pub(crate) port: u8,
    pub(crate) opcode: u16,
    tag: u8,
    pub(crate) payload: &'a [u8],
}

impl<'a> Tunnelling<'a> {
    /// Reads the input payload.
    pub(crate) fn read(payload: &'a [u8]) -> Result<Self, MalformedResponse> {
        let (head, rest) = split::<TunnelHead>(payload, "tunnel")?;
        let before = size_of::<TunnelHead>();
        let (message, _) =
            elements::<u8>(rest, head.len.get().into(), before, "tunnelled message")?;
        let (inner, rest) = split::<MessageHead>(message, "tunnelled message")?;
        let [a, b, c] = inner.len;
        let len = u32::from_le_bytes([a, b, c, 0]) as usize;
        let before = before + size_of::<MessageHead>();
        let (payload, _) = elements::<u8>(rest, len, before, "tunnelled request")?;
        Ok(Self {
            port: head.port,
            opcode: inner.opcode.get(),
            tag: inner.tag,
            payload,
        })
    }

    /// The output payload for what the device answers.
    pub(crate) fn answer(&self, code: ReturnCode, output: &[u8]) -> Vec<u8> {
        let [a, b, c, ..] = (output.len() as u32).to_le_bytes();
        let answer = TunnelAnswer {
            len: ((size_of::<MessageHead>() + output.len()) as u16).into(),
            reserved: [0; 2],
            message: MessageHead {
                category: 1,
                tag: self.tag,
                reserved: 0,
                opcode: self.opcode.into(),
                len: [a, b, c],
                return_code: u16::from(code).into(),
                vendor: 0.into(),
            },
        };
        [answer.as_bytes(), output].concat()
    }
}

/// What came back through a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tunnelled<R> {
    /// The device did it.
    Done(R),
    /// The device did not.
    Failed(ReturnCode),
    /// An answer to something else.
    Astray,
}

impl<C: Command> Command for Tunnel<C> {
    const OPCODE: u16 = 0x5300;
    const NAME: &'static str = "Tunnel Management Command";
    type Response = Tunnelled<C::Response>;

    fn encode(&self, payload: &mut Vec<u8>) {
        let mut inner = Vec::new();
        self.command.encode(&mut inner);
        let [a, b, c, ..] = (inner.len() as u32).to_le_bytes();
        let head = TunnelHead {
            port: self.port,
            target: 0,
            len: ((size_of::<MessageHead>() + inner.len()) as u16).into(),
        };
        let message = MessageHead {
            category: 0,
            tag: self.tag,
            reserved: 0,
            opcode: C::OPCODE.into(),
            len: [a, b, c],
            return_code: 0.into(),
            vendor: 0.into(),
        };
        payload.extend(head.as_bytes());
        payload.extend(message.as_bytes());
        payload.extend(inner);
    }

    fn decode(&self, payload: &[u8]) -> Result<Self::Response, MalformedResponse> {
        let (head, rest) = split::<TunnelAnswer>(payload, "tunnelled message")?;
        let message = &head.message;
        if message.category != 1 || message.tag != self.tag || message.opcode.get() != C::OPCODE {
            return Ok(Tunnelled::Astray);
        }
        match ReturnCode::from(message.return_code.get()) {
            ReturnCode::Success => {}
            code => return Ok(Tunnelled::Failed(code)),
        }
        let [a, b, c] = message.len;
        let len = u32::from_le_bytes([a, b, c, 0]) as usize;
        let head = size_of::<TunnelAnswer>();
        let (inner, _) = elements::<u8>(rest, len, head, "tunnelled response")?;
        self.command.decode(inner).map(Tunnelled::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(start: u64, len: u64) -> Extent {
        Extent {
            range: DpaRange::new(Dpa(start), len).unwrap(),
            tag: ExtentTag([0xaa; 16]),
            shared_seq: 3,
        }
    }

    fn bytes(command: &impl Command) -> Vec<u8> {
        let mut payload = Vec::new();
        command.encode(&mut payload);
        payload
    }

    /// Start, length, tag, sequence number, reserved.
    fn listed(start: u64, len: u64) -> Vec<u8> {
        let mut bytes = [start.to_le_bytes(), len.to_le_bytes()].concat();
        bytes.extend([0xaa; 16]);
        bytes.extend([3, 0, 0, 0, 0, 0, 0, 0]);
        bytes
    }

    fn add(selection: Selection) -> InitiateAdd {
        InitiateAdd {
            host: 0x0102,
            region: 5,
            tag: ExtentTag([0xaa; 16]),
            selection,
        }
    }

    #[test]
    fn an_add_is_laid_out_as_the_specification_has_it() {
        let extents = vec![
            extent(0x1000_0000, 0x40_0000),
            extent(0x2000_0000, 0x20_0000),
        ];
        let payload = bytes(&add(Selection::Prescriptive(extents)));
        let mut expected = vec![0x02, 0x01, 2, 5];
        expected.extend(0x60_0000u64.to_le_bytes());
        expected.extend([0xaa; 16]);
        expected.extend([2, 0, 0, 0]);
        expected.extend(listed(0x1000_0000, 0x40_0000));
        expected.extend(listed(0x2000_0000, 0x20_0000));
        assert_eq!(payload, expected);
        for (selection, policy, length) in [
            (Selection::Free(0x20_0000), 0, 0x20_0000u64),
            (Selection::Contiguous(0x40_0000), 1, 0x40_0000),
            (Selection::SharedAccess, 3, 0),
        ] {
            let payload = bytes(&add(selection));
            assert_eq!((payload.len(), payload[2]), (32, policy));
            assert_eq!(payload[4..12], length.to_le_bytes());
            assert_eq!(payload[28..32], [0; 4]);
        }
    }

    #[test]
    fn a_release_has_its_policy_and_its_force_in_one_byte() {
        let mut release = InitiateRelease {
            host: 0,
            region: 1,
            tag: ExtentTag([0xaa; 16]),
            extents: vec![extent(0x20_0000, 0x20_0000)],
            forced: false,
            sanitize: false,
        };
        let mut expected = vec![0, 0, 1, 1];
        expected.extend(0x20_0000u64.to_le_bytes());
        expected.extend([0xaa; 16]);
        expected.extend([1, 0, 0, 0]);
        expected.extend(listed(0x20_0000, 0x20_0000));
        assert_eq!(bytes(&release), expected);
        (release.forced, release.sanitize) = (true, true);
        assert_eq!(bytes(&release)[2], 0x31);
        release.extents.clear();
        assert_eq!(bytes(&release)[2], 0x30, "by tag");
    }

    #[test]
    fn a_tunnel_wraps_a_message_and_unwraps_its_answer() {
        let tunnel = Tunnel {
            port: 2,
            tag: 9,
            command: add(Selection::Free(0x20_0000)),
        };
        let payload = bytes(&tunnel);
        let head = [2, 0, 44, 0, 0, 9, 0, 0x04, 0x56, 32, 0, 0, 0, 0, 0, 0];
        assert_eq!(payload[..16], head);
        assert_eq!(payload[16..], bytes(&tunnel.command));

        let mut answer = vec![12, 0, 0, 0, 1, 9, 0, 0x04, 0x56, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(tunnel.decode(&answer), Ok(Tunnelled::Done(())));
        answer[12] = 0x03;
        // What QEMU 10.0 says to a command set that it does not have.
        let failed = Tunnelled::Failed(ReturnCode::from(0x03));
        assert_eq!(tunnel.decode(&answer), Ok(failed));
        for (at, other) in [(4, 0), (5, 8), (7, 5)] {
            let mut answer = answer.clone();
            answer[at] = other;
            assert_eq!(tunnel.decode(&answer), Ok(Tunnelled::Astray));
        }
        (answer[9], answer[12]) = (1, 0);
        assert_eq!(tunnel.decode(&answer).unwrap_err().needed, 17);
        assert_eq!(tunnel.decode(&answer[..15]).unwrap_err().needed, 16);
    }
}
