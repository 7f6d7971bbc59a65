//! One address space of a family.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::family::push_run;
use super::outbox::Outbox;
use super::server::send;
use super::uffd::Uffd;
use crate::broker::protocol::{Kind, MAX_RUNS, Message, SharedRun};

/// To the first look whether a member lives.
const SOON: Duration = Duration::from_millis(1);
/// The longest between two looks.
const SELDOM: Duration = Duration::from_millis(250);

/// A member, as its fork server sees it.
pub(super) struct Member {
    pub(super) uffd: Uffd,
    /// What the member shows that wants to hear of its copies.
    pub(super) key: u64,
    /// What a descendant hears on; the root has a line of another kind.
    line: Option<Outbox>,
    /// What it has copies of, and every ancestor after the root.
    filled: Vec<SharedRun>,
    /// How much of that it was told.
    told: usize,
    /// How much of it is ordinary memory, and none of the family's business:
    /// what lies there now may be another family's.
    ordinary: usize,
    born: Instant,
    pub(super) probe: Instant,
}

impl Member {
    /// A member that inherits nothing.
    pub(super) fn new(uffd: Uffd, key: u64) -> Self {
        let born = Instant::now();
        Self {
            uffd,
            key,
            line: None,
            filled: Vec::new(),
            told: 0,
            ordinary: 0,
            born,
            probe: born + SOON,
        }
    }

    /// A child of this one, which has copies of the same. It is told of them
    /// all: its parent may not have read yet what was ordinary by then.
    pub(super) fn child(&self, uffd: Uffd, key: u64) -> Self {
        Self {
            filled: self.filled.clone(),
            ordinary: self.ordinary,
            ..Self::new(uffd, key)
        }
    }

    /// It has one more.
    pub(super) fn has(&mut self, place: u64, original: u64) {
        // What it was told of, or is ordinary, does not grow.
        if self.told.max(self.ordinary) == self.filled.len() {
            let one = &mut Vec::new();
            push_run(one, place, original);
            self.filled.append(one);
        } else {
            push_run(&mut self.filled, place, original);
        }
    }

    /// It wants to hear of them.
    pub(super) fn hears(&mut self, line: OwnedFd) {
        self.line = Some(Outbox::new(line));
        self.told = 0;
    }

    /// Has nobody wait in `runs` any more, of which it has copies. `false`: it
    /// has too many mappings for that; some will have become one.
    pub(super) fn makes_ordinary(&self, runs: &[SharedRun]) -> bool {
        let ordinary = |run: &SharedRun| self.uffd.release(run.addr, run.len) != Err(Errno::NOMEM);
        runs.iter().all(ordinary)
    }

    /// Makes ordinary memory of what it has copies of, and tells it.
    pub(super) fn tell(&mut self) {
        if self.line.is_none() {
            return;
        }
        while self.told < self.filled.len() {
            let end = self.filled.len().min(self.told + MAX_RUNS);
            let served = self.told.max(self.ordinary).min(end);
            // A child being made meanwhile would be served where this one is
            // not any more.
            if !self.makes_ordinary(&self.filled[served..end]) || self.uffd.is_changing() {
                return;
            }
            self.ordinary = self.ordinary.max(end);
            let runs = &self.filled[self.told..end];
            send(
                &mut self.line,
                Message::new(Kind::ForkFilled).with_runs(runs),
            );
            self.told = end;
        }
        if self.line.as_mut().is_some_and(|line| line.flush().is_err()) {
            self.line = None;
        }
    }

    /// It needs nothing any more, and nobody serves it from here on.
    pub(super) fn dismiss(self) {
        // First, so that what it drops reads as zeroes when it hears of it.
        drop(self.uffd);
        if let Some(line) = self.line {
            farewell(line);
        }
    }

    /// When to look next whether it lives.
    pub(super) fn lives(&mut self, now: Instant) {
        let age = now.saturating_duration_since(self.born);
        self.probe = now + (age / 8).clamp(SOON, SELDOM);
    }
}

/// Tells whoever hears on `line` that it has everything.
pub(super) fn farewell(mut line: Outbox) {
    let _ = line.send(Message::new(Kind::ForkEnded));
}
