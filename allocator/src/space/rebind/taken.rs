//! Granules whose content is elsewhere.
#![forbid(unsafe_code)]

use super::staging::Staging;
use super::{GRANULE, Memory};
use core::ops::Range;

/// A run of neighbouring granules behind placeholders. Threads that touch one
/// wait until it is given a backing.
///
/// Dropping it gives nothing back: the granules stay behind their
/// placeholders, and content that was in DRAM is freed. That is what a spill
/// wants once the content is in its file, and nobody else.
#[derive(Debug)]
#[must_use = "threads that touch the granules wait until they are given or put back"]
pub struct Taken {
    va: usize,
    len: u32,
    /// A bit per granule that is behind its placeholder.
    waiting: u32,
    /// Where the content is: pages that were in DRAM are mapped there, others
    /// are in their extent.
    pub(super) content: Staging,
}

impl Taken {
    /// A run of which nothing is taken yet.
    pub(super) fn none_of(va: usize, from: &[Memory]) -> Self {
        let mut content = Staging::EMPTY;
        for (i, from) in from.iter().enumerate() {
            if let Memory::Extent(alias) = *from {
                content.refer(i, alias);
            }
        }
        Self {
            va,
            len: from.len() as u32,
            waiting: 0,
            content,
        }
    }

    /// The addresses of the run.
    pub fn range(&self) -> Range<usize> {
        self.va..self.granule(self.len as usize)
    }

    /// The address of granule `i` of the run.
    pub fn granule(&self, i: usize) -> usize {
        self.va + i * GRANULE
    }

    /// What was behind granule `i`, which still waits.
    pub fn from(&self, i: usize) -> Memory {
        match self.content.is_ours(i) {
            true => Memory::Dram,
            false => Memory::Extent(self.content.granule(i)),
        }
    }

    /// Where the content of granule `i`, which still waits, is to be read.
    pub fn content(&self, i: usize) -> *const u8 {
        self.content.granule(i) as *const u8
    }

    /// The granules that are still behind their placeholders, as bits.
    pub fn waiting(&self) -> u32 {
        self.waiting
    }

    pub(super) fn waits(&self, i: usize) -> bool {
        self.waiting & (1 << i) != 0
    }

    pub(super) fn first_waiting(&self) -> Option<usize> {
        (self.waiting != 0).then(|| self.waiting.trailing_zeros() as usize)
    }

    pub(super) fn now_taken(&mut self, granules: Range<usize>) {
        granules.for_each(|i| self.waiting |= 1 << i);
    }

    pub(super) fn now_given(&mut self, i: usize) {
        self.waiting &= !(1 << i);
    }
}
