//! Answering a group: decide, write down, send, and if need be find out what came of it.

#![forbid(unsafe_code)]

use super::DcDevice;
use crate::address::DpaRange;
use crate::capacity::DeviceEvent;
use crate::cmd::ReturnCode;
use crate::cmd::dynamic_capacity::{AddResponse, GetConfiguration, ranges_per_command};
use crate::error::DeviceError;
use crate::extent::Extent;
use crate::journal::{Answer, Work};
use crate::mailbox::MailboxError;
use crate::mmio::Mmio;
use crate::staging::{Decision, OfferedGroup, RejectReason, Verdict, judge};

/// What came of sending an answer.
enum Sent {
    /// The device has taken it, or as much of it as is left in the answer.
    Taken,
    /// The device has taken nothing and waits for an answer still.
    Refused(ReturnCode),
}

impl<M: Mmio> DcDevice<M> {
    /// Answers the group at the front of the work, exactly once. On an error the group stays
    /// there, and the next call carries on.
    pub(super) fn answer_front(&mut self) -> Result<(), DeviceError> {
        let Some(Work::Answer(group)) = self.work.front() else {
            return Ok(());
        };
        if self.answer.is_none() {
            let group = group.clone();
            let answer = self.decide(&group);
            self.write_down(answer)?;
        } else if self.answer_sent && self.took_effect()? {
            return self.conclude();
        }
        let mut restarted = false;
        loop {
            let code = match self.send()? {
                Sent::Taken => {
                    if !self.answering().accepted.is_empty() {
                        // Its group was the oldest one, so there is none before it.
                        self.unseen_groups = 0;
                    }
                    return self.conclude();
                }
                Sent::Refused(code) => code,
            };
            match code {
                ReturnCode::ResourcesExhausted => self.accept_fewer()?,
                _ if self.answering().accepted.is_empty() => {
                    // Nothing is pending that could be rejected.
                    self.unseen_groups = 0;
                    return self.conclude();
                }
                _ if self.unseen_groups > 0 => self.reject_unseen_group()?,
                _ if self.is_long() && !restarted => restarted = true,
                code => self.accept_none(RejectReason::DeviceRefused { code: code.into() })?,
            }
        }
    }

    /// What to say to a group: everything that can fail is done before it is said.
    fn decide(&mut self, group: &OfferedGroup) -> Answer {
        let extents = &group.extents;
        let mut refusal = group.rejected_whole();
        if self.accepted.try_reserve(extents.len()).is_err() {
            refusal = refusal.or(Some(RejectReason::OutOfMemory));
        }
        let verdict = match refusal {
            Some(reason) => Verdict::reject_all(extents.len(), reason),
            None => {
                let prepare = &mut *self.config.prepare;
                judge(extents, &self.regions, &self.accepted, prepare)
            }
        };
        let mut answer = Answer::default();
        for (extent, decision) in extents.iter().zip(verdict.decisions) {
            match decision {
                Decision::Accept(range) => answer.accepted.push(Extent { range, ..*extent }),
                Decision::Reject(reason) => answer.rejected.push((*extent, reason)),
            }
        }
        answer
    }

    fn answering(&mut self) -> &mut Answer {
        self.answer.get_or_insert_default()
    }

    /// Notes an answer that is going to be sent.
    fn write_down(&mut self, answer: Answer) -> Result<(), DeviceError> {
        self.answer = Some(answer);
        self.answer_sent = false;
        self.save()
    }

    /// Whether the answer needs more than one command.
    fn is_long(&mut self) -> bool {
        let per_command = ranges_per_command(self.mailbox.payload_len());
        self.answering().accepted.len() > per_command
    }

    /// Sends the answer: one range per extent, in the order of the events, More on all commands
    /// but the last.
    fn send(&mut self) -> Result<Sent, DeviceError> {
        let ranges: Vec<DpaRange> = self
            .answering()
            .accepted
            .iter()
            .map(|extent| extent.range)
            .collect();
        let per_command = ranges_per_command(self.mailbox.payload_len());
        let mut rest = &ranges[..];
        loop {
            let (now, later) = rest.split_at(rest.len().min(per_command));
            let first = rest.len() == ranges.len();
            match self.send_one(now, !later.is_empty())? {
                ReturnCode::Success if later.is_empty() => return Ok(Sent::Taken),
                ReturnCode::Success => rest = later,
                // A device that knows no continued answers has closed the group by now.
                _ if !first && self.keep_listed()? => return Ok(Sent::Taken),
                code => return Ok(Sent::Refused(code)),
            }
        }
    }

    /// One command; its return code, if it has one that decides about the answer.
    fn send_one(&mut self, ranges: &[DpaRange], more: bool) -> Result<ReturnCode, DeviceError> {
        self.counters.answer_commands += 1;
        self.answer_sent = true;
        let error = match self.mailbox.execute(&AddResponse { ranges, more }) {
            Ok(()) => return Ok(ReturnCode::Success),
            Err(error) => error,
        };
        if !matches!(
            error,
            MailboxError::Timeout { .. } | MailboxError::DeviceGone { .. }
        ) {
            // On an error nothing is consumed: the group is pending still.
            self.answer_sent = false;
        }
        match error.return_code() {
            // A rejection needs no room: a device that says so will say it for ever.
            Some(ReturnCode::ResourcesExhausted) if ranges.is_empty() => Err(error.into()),
            Some(
                code @ (ReturnCode::ResourcesExhausted
                | ReturnCode::InvalidInput
                | ReturnCode::InvalidPhysicalAddress
                | ReturnCode::InvalidExtentList),
            ) => Ok(code),
            _ => Err(error.into()),
        }
    }

    /// Whether an answer that may have reached the device did so.
    ///
    /// For an answer that accepts something the extent list tells. One that accepts nothing leaves
    /// no trace: it counts as given, because answering twice is worse than not at all, and the
    /// group as one that may still be pending, which the next answer finds out.
    fn took_effect(&mut self) -> Result<bool, DeviceError> {
        if self.answering().accepted.is_empty() {
            self.unseen_groups = self.unseen_groups.saturating_add(1);
            return Ok(true);
        }
        self.keep_listed()
    }

    /// If the device lists any of what is being accepted, cuts the answer down to that.
    fn keep_listed(&mut self) -> Result<bool, DeviceError> {
        let listed = self.listed()?;
        let is_listed = |extent: &Extent| {
            listed
                .iter()
                .any(|other| other.range.contains(&extent.range))
        };
        let answer = self.answering();
        if !answer.accepted.iter().any(is_listed) {
            return Ok(false);
        }
        answer.drop_unless(is_listed, RejectReason::NotListed);
        Ok(true)
    }

    /// The device can keep so many extents and no more: fewer then, and at last none.
    fn accept_fewer(&mut self) -> Result<(), DeviceError> {
        let configuration = self
            .mailbox
            .execute(&GetConfiguration { count: 1, first: 0 })?;
        let available = configuration.tail.extents_available.get() as usize;
        let mut answer = self.answering().clone();
        let count = answer.accepted.len();
        // Some devices count pending extents as kept, and then what they say is too much.
        let fewer = if available < count {
            available
        } else {
            count / 2
        };
        let dropped: Vec<Extent> = answer.accepted[fewer..].to_vec();
        let stays = |extent: &Extent| {
            let tag_goes = |other: &Extent| !extent.tag.is_null() && other.tag == extent.tag;
            !dropped
                .iter()
                .any(|other| other == extent || tag_goes(other))
        };
        answer.drop_unless(stays, RejectReason::DeviceExhausted);
        self.write_down(answer)
    }

    fn accept_none(&mut self, reason: RejectReason) -> Result<(), DeviceError> {
        let mut answer = self.answering().clone();
        answer.drop_unless(|_| false, reason);
        self.write_down(answer)
    }

    /// After lost records the device may wait for answers to groups that were never seen. The
    /// group being answered is pending for certain, so the oldest one can be rejected safely:
    /// it is either one of those, or the one whose answer the device does not take.
    fn reject_unseen_group(&mut self) -> Result<(), DeviceError> {
        let code = self.send_one(&[], false)?;
        self.answer_sent = false;
        self.unseen_groups = match code {
            ReturnCode::Success => self.unseen_groups - 1,
            _ => 0,
        };
        self.save()
    }

    /// The device has confirmed: from here on nothing may fail.
    fn conclude(&mut self) -> Result<(), DeviceError> {
        let Answer {
            mut accepted,
            rejected,
        } = self.answer.take().unwrap_or_default();
        self.answer_sent = false;
        self.work.pop_front();
        self.unsaved = true;
        self.counters.groups_answered += 1;
        self.counters.extents_rejected += rejected.len() as u64;
        // An answer of an earlier driver has been adopted with the list.
        accepted.retain(|extent| !self.accepted.contains(extent));
        for extent in &accepted {
            let above = self
                .accepted
                .partition_point(|held| held.range < extent.range);
            self.accepted.insert(above, *extent);
            self.counters.extents_accepted += 1;
            self.counters.bytes_accepted += extent.range.len;
        }
        order_shared(&mut accepted);
        if !accepted.is_empty() {
            self.events
                .push(DeviceEvent::Accepted { extents: accepted });
        }
        if !rejected.is_empty() {
            self.events
                .push(DeviceEvent::Rejected { extents: rejected });
        }
        self.save()
    }
}

impl Answer {
    /// Moves what does not stay from the accepted to the rejected.
    fn drop_unless(&mut self, stays: impl Fn(&Extent) -> bool, reason: RejectReason) {
        let (kept, dropped) = self.accepted.iter().partition(|extent| stays(extent));
        self.accepted = kept;
        let dropped: Vec<Extent> = dropped;
        self.rejected
            .extend(dropped.into_iter().map(|extent| (extent, reason)));
    }
}

/// Puts the extents of each tag in the order of their sequence numbers, at the places that the
/// tag's extents have; everything else stays where it is.
fn order_shared(extents: &mut [Extent]) {
    for index in 0..extents.len() {
        let tag = extents[index].tag;
        if tag.is_null() || extents[..index].iter().any(|earlier| earlier.tag == tag) {
            continue;
        }
        let places: Vec<usize> = (index..extents.len())
            .filter(|place| extents[*place].tag == tag)
            .collect();
        let mut members: Vec<Extent> = places.iter().map(|place| extents[*place]).collect();
        members.sort_by_key(|extent| extent.shared_seq);
        for (place, member) in places.into_iter().zip(members) {
            extents[place] = member;
        }
    }
}
