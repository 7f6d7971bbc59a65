//! Answers to the operator.
#![forbid(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::admin::{AdminReply, AdminRequest, ReleaseTarget, from_memfd, to_memfd};
use super::connection::ConnectionId;
use super::lease::ClientId;
use super::map;
use super::protocol::{GRANULE, Kind, Message};
use super::recall::{RecallRequest, Target};
use super::receipt::{DpaSpan, Origin};
use super::server::Broker;
use super::socket::Descriptors;
use super::status::{
    Capacity, DeviceStatus, ExtentStatus, ProcessReport, RunReport, RunTotal, Status,
};
use crate::address::{Dpa, DpaRange};

/// Runs whose ended processes are remembered.
const RUNS_KEPT: usize = 64;

/// What ended processes leave behind, by run.
#[derive(Debug, Default)]
pub(super) struct Runs {
    /// Of all that ended, in a run or not.
    total: RunTotal,
    ended: HashMap<Uuid, EndedProcesses>,
    order: VecDeque<Uuid>,
}

#[derive(Debug, Default)]
struct EndedProcesses {
    count: u64,
    total: RunTotal,
    last: VecDeque<ProcessReport>,
}

impl Runs {
    pub(super) fn ended(&mut self, process: ProcessReport) {
        self.total.add(&process);
        let Some(run) = process.run else {
            return;
        };
        if !self.ended.contains_key(&run) {
            if self.order.len() == RUNS_KEPT
                && let Some(oldest) = self.order.pop_front()
            {
                self.ended.remove(&oldest);
            }
            self.order.push_back(run);
        }
        let ended = self.ended.entry(run).or_default();
        ended.count += 1;
        ended.total.add(&process);
        if ended.last.len() == RunReport::KEPT {
            ended.last.pop_front();
        }
        ended.last.push_back(process);
    }
}

impl Broker {
    /// Does what an operator asks, or says why not.
    pub(super) fn admin(&mut self, id: ConnectionId, fds: Descriptors, now: Instant) {
        let [Some(body), ..] = fds.0 else {
            return self.decline(id, "the request has no body".into(), now);
        };
        let request = match from_memfd(body) {
            Ok(request) => request,
            Err(error) => {
                return self.decline(id, format!("the request can't be read: {error}"), now);
            }
        };
        match request {
            AdminRequest::Status => {
                let status = Box::new(self.status());
                self.reply(id, &AdminReply::Status(status), now);
            }
            AdminRequest::Run { run } => {
                let report = Box::new(self.run_report(run));
                self.reply(id, &AdminReply::Run(report), now);
            }
            AdminRequest::Add { sizes, tag, shared } => self.add(id, sizes, tag, shared, now),
            AdminRequest::Release {
                target,
                deadline_ms,
                force,
                past_deadline,
                progress,
            } => match self.check_target(target) {
                Ok(target) if force => self.force(id, &target, now),
                Ok(target) => self.recall(
                    RecallRequest {
                        origin: Origin::Operator,
                        target,
                        patience: Duration::from_millis(deadline_ms.min(86_400_000)),
                        past_deadline,
                        requester: Some(id),
                        progress,
                        requested: now,
                    },
                    now,
                ),
                Err(message) => self.decline(id, message, now),
            },
        }
    }

    fn check_target(&self, target: ReleaseTarget) -> Result<Target, String> {
        let unit = self.device.snapshot.block_size.max(GRANULE);
        match target {
            ReleaseTarget::Bytes(0) => Err("nothing to release: the size is 0".into()),
            ReleaseTarget::Bytes(bytes) => Ok(Target::Bytes(
                bytes
                    .checked_next_multiple_of(unit)
                    .ok_or_else(|| format!("{bytes} bytes are more than any device has"))?,
            )),
            ReleaseTarget::Range(DpaSpan { dpa, len }) => {
                let Some(range) = DpaRange::new(Dpa(dpa.0), len).filter(|r| !r.is_empty()) else {
                    return Err(format!("{dpa}+{len:#x} is empty or wraps around"));
                };
                if !range.is_aligned(self.device.span().start, unit) {
                    return Err(format!("{range} is not whole blocks of {unit:#x} bytes"));
                }
                if !self.device.span().contains(&range) {
                    let span = self.device.span();
                    return Err(format!("{range} is not inside the device's {span}"));
                }
                Ok(Target::Ranges(vec![range]))
            }
        }
    }

    fn decline(&mut self, id: ConnectionId, message: String, now: Instant) {
        self.reply(id, &AdminReply::Error { message }, now);
    }

    /// Answers an operator, if it is still there.
    pub(super) fn reply(&mut self, id: ConnectionId, reply: &AdminReply, now: Instant) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let failed = u64::from(matches!(reply, AdminReply::Error { .. }));
        let message = Message::new(Kind::AdminReply).with_arg(0, failed);
        let sent = match to_memfd(reply) {
            Ok(body) => connection.send_fds(&message, &[body.as_fd()]).is_ok(),
            Err(_) => false,
        };
        if !sent {
            self.close(id, now);
        }
    }

    /// Everything about this broker.
    pub fn status(&self) -> Status {
        let pid_of = |client: ClientId| self.clients.get(&client).map(|c| c.peer.pid);
        let mut maps = map::maps(&self.table, pid_of).into_iter();
        let clients: Vec<ProcessReport> = self.clients.values().map(|c| c.report(false)).collect();
        let mut total = self.runs.total;
        clients.iter().for_each(|process| total.add(process));
        Status {
            pid: std::process::id(),
            keeper: self
                .store
                .keeper()
                .and(rustix::process::getppid())
                .map(|pid| pid.as_raw_nonzero().get().cast_unsigned()),
            restarts: self.config.restarts,
            uid: rustix::process::geteuid().as_raw(),
            version: env!("CARGO_PKG_VERSION").into(),
            uptime_ms: self.started.elapsed().as_millis() as u64,
            orchestrator: self.fabric.is_some(),
            device: DeviceStatus {
                span: self.device.span().into(),
                block_size: self.device.snapshot.block_size,
                counters: self.device.snapshot.counters,
                last_error: self.device_error.clone(),
            },
            capacity: self.capacity(),
            extents: self
                .table
                .extents
                .iter()
                .map(|slots| ExtentStatus {
                    span: slots.extent.range.into(),
                    tag: (!slots.extent.tag.is_null())
                        .then(|| Uuid::from_bytes(slots.extent.tag.0)),
                    leased: slots.leased as u64 * GRANULE,
                    map: maps.next().unwrap_or_default(),
                })
                .collect(),
            shared: self.shared_tags(),
            clients,
            total,
            recall: self.recalls.status(pid_of, Instant::now()),
            pressure: self.pressure.status.clone(),
            policy: self.policy.status.clone(),
            counters: self.counters,
            receipts: self.recalls.receipts.iter().cloned().collect(),
        }
    }

    fn capacity(&self) -> Capacity {
        let counts = self.table.counts();
        let bytes = |granules: usize| granules as u64 * GRANULE;
        let accepted = self
            .device
            .snapshot
            .accepted
            .iter()
            .map(|e| e.range.len)
            .sum();
        let free = bytes(counts.dirty + counts.clean + counts.warm);
        let leased = bytes(counts.leased);
        let whole: usize = self.table.extents.iter().map(|extent| extent.count).sum();
        Capacity {
            forked: self.table.forked(),
            accepted,
            leased,
            free,
            dirty: bytes(counts.dirty),
            clean: bytes(counts.clean + counts.warm),
            warm: bytes(counts.warm),
            stranded: accepted.saturating_sub(bytes(whole)),
            lost: bytes(counts.lost + counts.shared_lost),
            broken: bytes(counts.broken),
            shared: bytes(counts.shared),
            outgoing: self.table.marked_bytes(),
        }
    }

    fn run_report(&self, run: Uuid) -> RunReport {
        let mut report = RunReport {
            groups_answered: self.device.snapshot.counters.groups_answered,
            ..RunReport::default()
        };
        if let Some(ended) = self.runs.ended.get(&run) {
            report.processes_total = ended.count;
            report.total = ended.total;
            report.processes = ended.last.iter().cloned().collect();
        }
        for client in self.clients.values().filter(|c| c.run() == Some(run)) {
            let process = client.report(false);
            report.processes_total += 1;
            report.processes_live += 1;
            report.total.add(&process);
            report.processes.push(process);
        }
        report
    }
}
