//! Mailbox commands: opcode, request and response of each, as they go over the wire.
//!
//! Wire structures are little-endian and unaligned, so that they can be laid over a payload
//! as it comes. Their sizes are asserted beside them.

#![forbid(unsafe_code)]

pub mod dynamic_capacity;
pub mod events;
pub mod fm_api;
pub mod identify;
pub mod logs;
mod return_code;
pub mod timestamp;

use thiserror::Error;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

pub use return_code::ReturnCode;

/// A mailbox command.
pub trait Command {
    /// Command set in the high byte, command in the low one.
    const OPCODE: u16;
    /// The specification's name, for messages.
    const NAME: &'static str;
    /// What the device answers.
    type Response;

    /// Appends the input payload.
    fn encode(&self, payload: &mut Vec<u8>);

    /// Reads the output payload, which may be longer than the response.
    ///
    /// # Errors
    /// [`MalformedResponse`]
    fn decode(&self, payload: &[u8]) -> Result<Self::Response, MalformedResponse>;
}

/// An output payload that does not hold what it claims to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{what} needs {needed} bytes and the payload has {len}")]
pub struct MalformedResponse {
    /// The part that does not fit.
    pub what: &'static str,
    /// Bytes it needs, counted from the start of the payload.
    pub needed: usize,
    /// Bytes there are.
    pub len: usize,
}

/// The fixed part of type `T` at the start of `payload`, and what follows it.
fn split<'a, T: FromBytes + KnownLayout + Immutable + Unaligned>(
    payload: &'a [u8],
    what: &'static str,
) -> Result<(&'a T, &'a [u8]), MalformedResponse> {
    T::ref_from_prefix(payload).map_err(|_| MalformedResponse {
        what,
        needed: size_of::<T>(),
        len: payload.len(),
    })
}

/// `count` elements of type `T` at the start of `payload`, which itself starts `before` bytes
/// into the response.
fn elements<'a, T: FromBytes + KnownLayout + Immutable + Unaligned>(
    payload: &'a [u8],
    count: usize,
    before: usize,
    what: &'static str,
) -> Result<(&'a [T], &'a [u8]), MalformedResponse> {
    <[T]>::ref_from_prefix_with_elems(payload, count).map_err(|_| MalformedResponse {
        what,
        needed: before.saturating_add(count.saturating_mul(size_of::<T>())),
        len: before + payload.len(),
    })
}
