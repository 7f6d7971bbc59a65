//! The broker: whether it answers, and what went less well with it.
#![forbid(unsafe_code)]

use std::path::Path;
use std::time::Duration;

use dax_backend::broker::admin::{AdminClient, AdminReply, AdminRequest};
use dax_backend::broker::client_page::{DEGRADED_EXHAUSTED, DEGRADED_NO_REBIND};
use dax_backend::broker::status::Status;

use super::finding::Finding;
use crate::picture::degraded;
use crate::size::Bytes;
use crate::sockets;

const PATIENCE: Duration = Duration::from_secs(10);

pub(super) fn look(socket: Option<&Path>) -> Vec<Finding> {
    let path = match sockets::find(socket) {
        Ok(path) => path,
        Err(error) => {
            return vec![
                Finding::hint(
                    "broker",
                    error.to_string(),
                    "programs under dcm run stay in DRAM, unless it is with --emulate",
                )
                .mend("dcm serve --emulate 1G"),
            ];
        }
    };
    let asked =
        AdminClient::connect(&path).and_then(|broker| broker.ask(&AdminRequest::Status, PATIENCE));
    match asked {
        Ok(AdminReply::Status(status)) => of_status(&path, &status),
        Ok(_) => vec![Finding::missing(
            "broker",
            "it answered something else",
            "it is of another release",
        )],
        Err(error) => vec![
            Finding::hint(
                "broker",
                format!("{}: {error}", path.display()),
                "what it counted can't be seen by this user",
            )
            .mend("sudo dcm doctor"),
        ],
    }
}

fn of_status(path: &Path, status: &Status) -> Vec<Finding> {
    let ours = env!("CARGO_PKG_VERSION");
    let found = format!(
        "release {}, pid {} at {}",
        status.version,
        status.pid,
        path.display()
    );
    let mut findings = vec![if status.version == ours {
        Finding::ok("broker", found)
    } else {
        Finding::hint(
            "broker",
            found,
            &format!("dcm is release {ours}: restart the broker when its programs allow it"),
        )
    }];
    findings.push(match &status.device.last_error {
        Some(error) => Finding::hint("device", error, "capacity may not come or go"),
        None => Finding::ok(
            "device",
            format!("{} accepted", Bytes(status.capacity.accepted)),
        ),
    });
    if status.capacity.stranded > 0 {
        findings.push(Finding::hint(
            "extents",
            format!(
                "{} in no whole granule of 2M",
                Bytes(status.capacity.stranded)
            ),
            "that much can't be used: have extents added that are multiples of 2M",
        ));
    }
    let flags = status.total.degraded_flags;
    for says in degraded(flags & !DEGRADED_EXHAUSTED) {
        let follows = if flags & DEGRADED_NO_REBIND != 0 {
            "dcm status names the program; see userfaultfd above"
        } else {
            "dcm status names the program, if it still runs"
        };
        findings.push(Finding::hint("programs", format!("one {says}"), follows));
    }
    if status.counters.exhausted > 0 {
        let finding = Finding::hint(
            "capacity",
            format!("extents ran out {} times", status.counters.exhausted),
            "programs went on in DRAM, waited or failed, as their on_exhausted says",
        );
        findings.push(if status.orchestrator {
            finding.mend("dcm add 1G")
        } else {
            finding
        });
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;
    use crate::top::sample::status;
    use dax_backend::broker::client_page::DEGRADED_CONFIG;

    #[test]
    fn what_the_broker_counted_is_found() {
        let mut status = status();
        assert!(
            of_status(Path::new("/s"), &status)
                .iter()
                .all(|finding| finding.verdict == Verdict::Ok)
        );
        status.version = "9.9.9".into();
        status.device.last_error = Some("it hangs".into());
        status.capacity.stranded = 65536;
        status.total.degraded_flags = DEGRADED_CONFIG | DEGRADED_EXHAUSTED;
        status.counters.exhausted = 3;
        let findings = of_status(Path::new("/s"), &status);
        let found: Vec<&str> = findings.iter().map(|f| f.found.as_str()).collect();
        assert!(
            findings.iter().all(|f| f.verdict == Verdict::Hint),
            "{findings:#?}"
        );
        for says in [
            "9.9.9",
            "it hangs",
            "64K",
            "settings were ignored",
            "ran out 3 times",
        ] {
            assert!(found.iter().any(|found| found.contains(says)), "{says}");
        }
    }
}
