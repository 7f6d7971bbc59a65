//! What the device has seen its host do.

#![forbid(unsafe_code)]

use crate::extent::Extent;

/// One Add Dynamic Capacity Response that the device has seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnswerAudit {
    /// Number of the group that was the oldest unanswered one, counted from 0; `None` if there
    /// was none, which makes the answer spurious.
    pub group: Option<u64>,
    /// Ranges listed.
    pub ranges: usize,
    /// Whether the answer was to continue in the next command.
    pub more: bool,
    /// The return code it got.
    pub code: u16,
}

/// What the device has seen its host do. Everything a correct host never does is here as a
/// count or a text, so that a test can demand that there is none.
#[derive(Clone, Debug, Default)]
pub struct Audit {
    /// Groups offered since the start.
    pub groups_offered: u64,
    /// Groups offered and not answered yet.
    pub groups_pending: usize,
    /// Every 4802h, in order.
    pub answers: Vec<AnswerAudit>,
    /// Answers with no group to answer.
    pub spurious_answers: u64,
    /// Answers that named extents of a group that was not the oldest, or in another order.
    pub answers_out_of_order: u64,
    /// Ranges listed by each 4803h, in order.
    pub releases: Vec<usize>,
    /// Releases that named offered capacity that was not accepted.
    pub releases_of_pending: u64,
    /// Broken register protocol, in words.
    pub violations: Vec<String>,
    /// Opcodes executed, in order.
    pub opcodes: Vec<u16>,
    /// Records in the dynamic capacity event log.
    pub records_in_log: usize,
    /// Accepted extents, in the order in which 4801h lists them.
    pub accepted: Vec<Extent>,
    /// Generation number of that list.
    pub generation: u32,
}

impl Audit {
    /// How often a command was executed.
    pub fn count(&self, opcode: u16) -> usize {
        self.opcodes
            .iter()
            .filter(|executed| **executed == opcode)
            .count()
    }

    /// How many commands the answer to group `number` took that the device accepted.
    pub fn answers_to(&self, number: u64) -> usize {
        let answers = self.answers.iter();
        answers
            .filter(|answer| answer.group == Some(number) && answer.code == 0)
            .count()
    }

    /// Whether the host has kept to the protocol.
    pub fn is_clean(&self) -> bool {
        self.spurious_answers == 0
            && self.answers_out_of_order == 0
            && self.releases_of_pending == 0
            && self.violations.is_empty()
    }
}
