//! The device's memory: a memfd.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use rustix::io::pwrite;

use crate::address::DpaRange;

pub(super) struct Memory {
    file: OwnedFd,
    /// What the file covers.
    pub(super) span: DpaRange,
}

impl Memory {
    pub(super) fn new(span: DpaRange) -> io::Result<Self> {
        let file = memfd_create("dcmalloc-device", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, span.len)?;
        Ok(Self { file, span })
    }

    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Writes `bytes` at the start of `range`, as another host does.
    pub(super) fn write(&self, range: &DpaRange, bytes: &[u8]) -> io::Result<()> {
        let mut offset = range.start.0 - self.span.start.0;
        let mut left = bytes;
        while !left.is_empty() {
            let written = pwrite(&self.file, left, offset)?;
            offset += written as u64;
            left = &left[written..];
        }
        Ok(())
    }

    /// Makes `range` read as zeroes, by a hole.
    pub(super) fn zero(&self, range: &DpaRange) {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let offset = range.start.0 - self.span.start.0;
        fallocate(&self.file, hole, offset, range.len)
            .expect("a memfd can have holes punched anywhere within its length");
    }
}
