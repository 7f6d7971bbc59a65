//! The orchestrator, on a thread of its own: it may be at the other end of a network.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use super::admin::SharedOffer;
use super::handover::describe;
use super::helper::Helper;
use crate::address::DpaRange;
use crate::extent::{Extent, ExtentTag};
use crate::orchestrator::Orchestrator;

/// What the orchestrator is asked; `ticket` comes back with the answer.
#[derive(Debug)]
enum Order {
    Add {
        ticket: u64,
        sizes: Vec<u64>,
        tag: ExtentTag,
        shared: Option<SharedOffer>,
        held: Vec<Extent>,
    },
    Force {
        ticket: u64,
        ranges: Vec<DpaRange>,
    },
}

/// What the orchestrator said: what it offers (nothing, for what was taken by
/// force), or why not.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) ticket: u64,
    pub(super) offered: Result<Vec<Extent>, String>,
}

/// The broker's end of the orchestrator.
#[derive(Debug)]
pub(super) struct FabricThread {
    thread: Helper<Order, Answer>,
    tickets: u64,
}

impl FabricThread {
    /// Puts `orchestrator` on a thread, which ends when this is dropped.
    pub(super) fn start(mut orchestrator: Box<dyn Orchestrator>) -> io::Result<Self> {
        let thread = Helper::start("dcm-fabric", move |orders, answers| {
            for order in orders {
                let (ticket, offered) = match order {
                    Order::Add {
                        ticket,
                        sizes,
                        tag,
                        shared,
                        held,
                    } => {
                        orchestrator.held(&held);
                        let offered = match shared {
                            None => orchestrator.add(&sizes, tag),
                            Some(SharedOffer { content }) => {
                                orchestrator.add_shared(&sizes, tag, content.as_deref())
                            }
                        };
                        (ticket, offered)
                    }
                    Order::Force { ticket, ranges } => {
                        let taken = orchestrator.release(&ranges, true);
                        (ticket, taken.map(|()| Vec::new()))
                    }
                };
                let offered = offered.map_err(|error| describe(&error));
                if !answers.send(Answer { ticket, offered }) {
                    return;
                }
            }
        })?;
        Ok(Self { thread, tickets: 0 })
    }

    /// Asks for an offer of one extent for each of `sizes`, of a host that has `held`; the
    /// ticket.
    pub(super) fn add(
        &mut self,
        sizes: Vec<u64>,
        tag: ExtentTag,
        shared: Option<SharedOffer>,
        held: &[Extent],
    ) -> u64 {
        self.tickets += 1;
        let ticket = self.tickets;
        self.thread.order(Order::Add {
            ticket,
            sizes,
            tag,
            shared,
            held: held.to_vec(),
        });
        ticket
    }

    /// Asks for `ranges` to be taken by force; the ticket.
    pub(super) fn force(&mut self, ranges: Vec<DpaRange>) -> u64 {
        self.tickets += 1;
        let ticket = self.tickets;
        self.thread.order(Order::Force { ticket, ranges });
        ticket
    }

    /// What it has answered since the last call.
    pub(super) fn answers(&self) -> Vec<Answer> {
        self.thread.results()
    }
}

impl AsFd for FabricThread {
    /// Readable when there are answers.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.thread.as_fd()
    }
}
