//! A client's end of its forks: what it shares around them, and what its descendants hear. Like
//! [`client`](super::client), it never allocates.
#![forbid(unsafe_code)]

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::client::{BrokerClient, ClientError};
use super::protocol::{FORK_LAST, GRANULE, Kind, MAX_RUNS, Message, SharedRun};
use super::socket::Descriptors;

/// So long may whoever serves forks be busy with copies.
const LINE_PATIENCE: Duration = Duration::from_secs(30);

/// What can't be taken back whole is looked at in pieces of so many bytes.
const PIECE: u64 = 16 * GRANULE;

/// Runs of one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedRuns {
    runs: [SharedRun; MAX_RUNS],
    len: usize,
}

impl SharedRuns {
    fn of(message: &Message) -> Self {
        let mut runs = [SharedRun::default(); MAX_RUNS];
        let shared = message.shared_runs();
        let len = shared.len();
        runs.iter_mut().zip(shared).for_each(|(to, run)| *to = run);
        Self { runs, len }
    }

    /// The runs.
    pub fn as_slice(&self) -> &[SharedRun] {
        &self.runs[..self.len]
    }

    /// The parts for which `may` holds, as far as they fit, and the address
    /// after the last that was looked at (`None`: there was none). A run that
    /// may not be taken whole is looked at in pieces.
    pub fn choose(&self, may: &dyn Fn(&SharedRun) -> bool) -> (Self, Option<u64>) {
        let mut chosen = Self {
            runs: [SharedRun::default(); MAX_RUNS],
            len: 0,
        };
        let mut next = None;
        for run in self.as_slice() {
            let whole = may(run);
            let most = if whole { run.len } else { PIECE };
            let mut done = 0;
            while done < run.len {
                let part = SharedRun {
                    addr: run.addr + done,
                    offset: run.offset + done,
                    len: most.min(run.len - done),
                };
                if (whole || may(&part)) && !chosen.push(part) {
                    return (chosen, next);
                }
                done += part.len;
                next = Some(run.addr + done);
            }
        }
        (chosen, next)
    }

    /// `false`: there is no room for one more.
    fn push(&mut self, run: SharedRun) -> bool {
        if let Some(last) = self.runs[..self.len].last_mut()
            && last.addr + last.len == run.addr
            && last.end() == run.offset
        {
            last.len += run.len;
        } else if self.len < MAX_RUNS {
            self.runs[self.len] = run;
            self.len += 1;
        } else {
            return false;
        }
        true
    }
}

/// Where a client speaks around its forks; see [`Kind::ForkSetUp`].
#[derive(Debug)]
pub struct ForkLine {
    client: BrokerClient,
    /// The number of the last question. An answer has that of its own, so that
    /// one that comes too late is taken for no other's.
    asked: AtomicU64,
}

impl ForkLine {
    /// A line to whoever serves the forks, once that has said so.
    pub(super) fn open(client: BrokerClient) -> Result<Self, ClientError> {
        let line = Self {
            client,
            asked: AtomicU64::new(0),
        };
        line.answer(0, Some(LINE_PATIENCE), &mut |_| ())?;
        Ok(line)
    }

    /// The socket.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.client.fd()
    }

    /// A fork is near. Until its end nothing is filled as far as this process
    /// is told; `filled` hears of what was before.
    ///
    /// # Errors
    /// Nobody serves forks any more, or not in time: then the fork is over as
    /// far as they are concerned.
    pub fn begin(&self, filled: &mut dyn FnMut(&SharedRuns)) -> Result<(), ClientError> {
        let id = self.ask(Message::new(Kind::ForkBegin))?;
        let begun = self.answer(id, Some(LINE_PATIENCE), filled);
        if begun.is_err() {
            let _ = self.end();
        }
        begun
    }

    /// Shares all runs, which are covered by placeholders: `next` gives the
    /// first at an address or after it. Waits as long as there is somebody to
    /// answer, because until then nobody can say whose they are.
    ///
    /// # Errors
    /// They are not shared.
    pub fn share(&self, next: &dyn Fn(u64) -> Option<SharedRun>) -> Result<(), ClientError> {
        let mut runs = [SharedRun::default(); MAX_RUNS];
        let mut from = 0;
        loop {
            let mut count = 0;
            while count < MAX_RUNS
                && let Some(run) = next(from)
            {
                from = run.addr + run.len;
                runs[count] = run;
                count += 1;
            }
            let last = count < MAX_RUNS;
            let message = Message::new(Kind::ForkShare)
                .with_flags(if last { FORK_LAST } else { 0 })
                .with_runs(&runs[..count]);
            let id = self.ask(message)?;
            if last {
                return self.answer(id, None, &mut |_| ());
            }
        }
    }

    /// The fork is over.
    ///
    /// # Errors
    /// Nobody serves forks any more.
    pub fn end(&self) -> Result<(), ClientError> {
        self.client.send(&Message::new(Kind::ForkEnd), &[])
    }

    /// Some of what was shared at address `from` or after it that nobody else
    /// needs, in order; may be none.
    ///
    /// # Errors
    /// Nobody serves forks any more.
    pub fn offered(
        &self,
        from: u64,
        filled: &mut dyn FnMut(&SharedRuns),
    ) -> Result<SharedRuns, ClientError> {
        let id = self.ask(Message::new(Kind::ForkTake).with_arg(0, from))?;
        self.answered(id, Some(LINE_PATIENCE), filled)
    }

    /// Takes what was [`offered`](Self::offered) back as leases. Who touches it
    /// waits until [`Self::taken`].
    ///
    /// # Errors
    /// Not now: somebody needs it, or it is being asked back.
    pub fn take(
        &self,
        runs: &SharedRuns,
        filled: &mut dyn FnMut(&SharedRuns),
    ) -> Result<(), ClientError> {
        if runs.len == 0 {
            return Ok(());
        }
        let message = Message::new(Kind::ForkTake).with_runs(runs.as_slice());
        let id = self.ask(message)?;
        // Without limit: until it is answered nobody can say whose it is.
        self.answer(id, None, filled)
    }

    /// What was taken is in place.
    ///
    /// # Errors
    /// Nobody serves forks any more.
    pub fn taken(&self) -> Result<(), ClientError> {
        self.client.send(&Message::new(Kind::ForkTaken), &[])
    }

    /// What has been filled, one message of it; does not wait.
    pub fn filled(&self) -> Option<SharedRuns> {
        loop {
            let none = &mut Descriptors::default();
            let message = self.client.receive(Some(Duration::ZERO), none).ok()??;
            match message.kind() {
                Some(Kind::ForkFilled) => return Some(SharedRuns::of(&message)),
                // Nobody waits for it any more.
                Some(Kind::ForkAnswer) => {}
                _ => return None,
            }
        }
    }

    /// Asks; the number that the answer will have.
    fn ask(&self, question: Message) -> Result<u64, ClientError> {
        let id = self.asked.fetch_add(1, Ordering::Relaxed) + 1;
        self.client.send(&question.with_id(id), &[])?;
        Ok(id)
    }

    fn answer(
        &self,
        id: u64,
        patience: Option<Duration>,
        filled: &mut dyn FnMut(&SharedRuns),
    ) -> Result<(), ClientError> {
        self.answered(id, patience, filled).map(drop)
    }

    fn answered(
        &self,
        id: u64,
        patience: Option<Duration>,
        filled: &mut dyn FnMut(&SharedRuns),
    ) -> Result<SharedRuns, ClientError> {
        loop {
            let none = &mut Descriptors::default();
            let message = self.client.receive(patience, none)?;
            let message = message.ok_or(ClientError::Unexpected)?;
            match message.kind() {
                Some(Kind::ForkFilled) => filled(&SharedRuns::of(&message)),
                Some(Kind::ForkAnswer) if message.id() != id => {}
                Some(Kind::ForkAnswer) if message.arg(0) == 0 => {
                    return Ok(SharedRuns::of(&message));
                }
                _ => return Err(ClientError::Unexpected),
            }
        }
    }
}

/// What a descendant hears of what it inherited.
#[allow(
    clippy::large_enum_variant,
    reason = "whoever hears it may not allocate, and looks at it at once"
)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    /// Nothing new.
    Nothing,
    /// It has copies of these in DRAM, and nobody waits on them any more.
    Filled(SharedRuns),
    /// Of everything.
    All,
}

/// Where a descendant hears of what it inherited; see [`Kind::ForkJoin`].
#[derive(Debug)]
pub struct FamilyLine {
    client: BrokerClient,
}

impl FamilyLine {
    pub(super) fn new(client: BrokerClient) -> Self {
        Self { client }
    }

    /// What there is to hear; does not wait.
    pub fn heard(&self) -> Heard {
        let none = &mut Descriptors::default();
        let message = self.client.receive(Some(Duration::ZERO), none);
        match message.ok().flatten() {
            Some(message) => match message.kind() {
                Some(Kind::ForkFilled) => Heard::Filled(SharedRuns::of(&message)),
                Some(Kind::ForkEnded) => Heard::All,
                _ => Heard::Nothing,
            },
            None => Heard::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, socketpair};

    use super::*;
    use crate::broker::socket::send_message;

    #[test]
    fn what_may_not_be_taken_is_passed_over() {
        let run = |addr, granules| SharedRun {
            addr: addr * GRANULE,
            offset: addr * GRANULE,
            len: granules * GRANULE,
        };
        let message = Message::new(Kind::ForkTake).with_runs(&[run(0, 2), run(100, 40)]);
        let offered = SharedRuns::of(&message);
        let changed = 120 * GRANULE;
        let may = |part: &SharedRun| !(part.addr..part.addr + part.len).contains(&changed);
        let (chosen, next) = offered.choose(&may);
        assert_eq!(chosen.as_slice(), [run(0, 2), run(100, 16), run(132, 8)]);
        assert_eq!(next, Some(140 * GRANULE));
        assert_eq!(offered.choose(&|_| true), (offered, next));
        let (none, next) = offered.choose(&|_| false);
        assert_eq!((none.as_slice(), next), (&[][..], Some(140 * GRANULE)));
        assert_eq!(none.choose(&|_| true), (none, None));
        // What does not fit is offered again.
        let many: Vec<SharedRun> = (0..MAX_RUNS as u64).map(|i| run(100 * i, 40)).collect();
        let offered = SharedRuns::of(&Message::new(Kind::ForkTake).with_runs(&many));
        let may = |part: &SharedRun| part.addr / GRANULE % 100 != 16 && part.len < 40 * GRANULE;
        let (chosen, next) = offered.choose(&may);
        assert_eq!(chosen.as_slice().len(), MAX_RUNS);
        assert_eq!(chosen.as_slice()[MAX_RUNS - 1], run(632, 8));
        assert_eq!(next, Some(640 * GRANULE));
    }

    #[test]
    fn an_answer_that_comes_too_late_is_no_others() {
        let flags = SocketFlags::CLOEXEC;
        let (ours, server) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let line = ForkLine {
            client: BrokerClient::over(ours),
            asked: AtomicU64::new(6),
        };
        let say = |id, refused| {
            let answer = Message::new(Kind::ForkAnswer)
                .with_id(id)
                .with_arg(0, refused);
            send_message(server.as_fd(), &answer, &[], SendFlags::empty()).unwrap();
        };
        say(6, 1);
        say(7, 0);
        assert_eq!(line.begin(&mut |_| ()), Ok(()));
        say(7, 0);
        say(8, 1);
        assert!(line.begin(&mut |_| ()).is_err());
        say(8, 0);
        assert!(line.filled().is_none(), "nothing was filled");
        drop(server);
        assert!(line.begin(&mut |_| ()).is_err());
    }
}
