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
use crate::staging::{Closed, Decision, OfferedGroup, RejectReason, Verdict, judge};

/// Groups rejected unseen for one answer, after which the device is not believed any more.
const MAX_UNSEEN: u32 = 256;

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
                // Commands of an attempt that was cut off may be in the way.
                _ if self.is_long() && !restarted => restarted = true,
                _ if self.is_behind_another(code) => self.reject_oldest()?,
                code if self.may_be_answered() => {
                    self.leave_unanswered(code);
                    return self.conclude();
                }
                code => self.accept_none(code)?,
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
            let sent = self.send_one(now, !later.is_empty());
            // Whatever comes of this command, the device may have taken those before it.
            self.answer_sent |= !first;
            match sent? {
                ReturnCode::Success if later.is_empty() => return Ok(Sent::Taken),
                ReturnCode::Success => rest = later,
                // A device that knows no continued answers has closed the group by now.
                _ if !first && self.keep_listed()? => return Ok(Sent::Taken),
                code => {
                    self.answer_sent = false;
                    return Ok(Sent::Refused(code));
                }
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

    /// The device does not take the answer, so it gets a rejection. That may hit an older group
    /// that nobody knows of: then this one is in the way of the next.
    fn accept_none(&mut self, code: ReturnCode) -> Result<(), DeviceError> {
        let reason = RejectReason::DeviceRefused { code: code.into() };
        let mut answer = self.answering().clone();
        answer.drop_unless(|_| false, reason);
        self.unseen_groups = self.unseen_groups.saturating_add(1);
        self.write_down(answer)
    }

    /// Whether the device waits for answers to groups that were never seen. By the specification
    /// it says Invalid Input to an answer that is not for the oldest group. QEMU's does not, and
    /// there the records that were lost tell how many groups that may be.
    fn is_behind_another(&mut self, code: ReturnCode) -> bool {
        if code == ReturnCode::InvalidInput {
            self.tells_order = true;
            return self.answering().older_rejected < MAX_UNSEEN;
        }
        self.unseen_groups > 0 && !self.tells_order
    }

    /// Rejects the oldest group unseen. The group being answered is pending, so there is one: it
    /// is an unseen one, or this one whose answer the device does not take.
    fn reject_oldest(&mut self) -> Result<(), DeviceError> {
        self.unseen_groups = self.unseen_groups.saturating_sub(1);
        self.answering().older_rejected += 1;
        self.save()?;
        if self.send_one(&[], false)? != ReturnCode::Success {
            self.unseen_groups = 0;
        }
        self.answer_sent = false;
        Ok(())
    }

    /// Whether the refused group is perhaps not pending at all: it was hit by a rejection meant
    /// for an older one, or it is the late end of a group that was cut short by lost records.
    fn may_be_answered(&mut self) -> bool {
        self.after_truncated || self.answering().older_rejected > 0
    }

    /// Takes a group for answered. If it is not, it is in the way of the next group's answer.
    fn leave_unanswered(&mut self, code: ReturnCode) {
        let reason = RejectReason::DeviceRefused { code: code.into() };
        self.answering().drop_unless(|_| false, reason);
        self.unseen_groups = self.unseen_groups.saturating_add(1);
    }

    /// The device has confirmed: from here on nothing may fail.
    fn conclude(&mut self) -> Result<(), DeviceError> {
        let Answer {
            mut accepted,
            rejected,
            ..
        } = self.answer.take().unwrap_or_default();
        self.answer_sent = false;
        if let Some(Work::Answer(group)) = self.work.pop_front() {
            self.after_truncated = group.closed == Closed::Truncated;
        }
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
