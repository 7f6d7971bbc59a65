//! Threads for what the broker's loop has no time for: orders in, results out.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, eventfd};

/// A thread and its two queues. Dropping it waits for the thread to end.
#[derive(Debug)]
pub(super) struct Helper<O, R> {
    /// `None`: the thread is to end.
    orders: Option<Sender<O>>,
    results: Receiver<R>,
    bell: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

/// The thread's end of the queue of results.
pub(super) struct Outbox<R> {
    results: Sender<R>,
    bell: Arc<OwnedFd>,
}

impl<R> Outbox<R> {
    /// Hands over a result. `false`: nobody is there any more.
    pub(super) fn send(&self, result: R) -> bool {
        let sent = self.results.send(result).is_ok();
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        sent
    }
}

impl<O: Send + 'static, R: Send + 'static> Helper<O, R> {
    /// Starts a thread called `name` that runs `body`, which is to return when
    /// its orders end.
    pub(super) fn start(
        name: &str,
        body: impl FnOnce(Receiver<O>, Outbox<R>) + Send + 'static,
    ) -> io::Result<Self> {
        let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (orders, incoming) = channel();
        let (outgoing, results) = channel();
        let outbox = Outbox {
            results: outgoing,
            bell: bell.clone(),
        };
        let thread = thread::Builder::new()
            .name(name.into())
            .spawn(move || body(incoming, outbox))?;
        Ok(Self {
            orders: Some(orders),
            results,
            bell,
            thread: Some(thread),
        })
    }

    /// Gives the thread something to do. `false`: it is gone.
    pub(super) fn order(&self, order: O) -> bool {
        let orders = self.orders.as_ref();
        orders.is_some_and(|orders| orders.send(order).is_ok())
    }

    /// What it has done since the last call.
    pub(super) fn results(&self) -> Vec<R> {
        let _ = rustix::io::read(&self.bell, &mut [0u8; 8]);
        self.results.try_iter().collect()
    }
}

impl<O, R> AsFd for Helper<O, R> {
    /// Readable when there are results.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

impl<O, R> Drop for Helper<O, R> {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
