//! valkey as Debian's backports package it, linked against jemalloc: a BGSAVE under load.

use anyhow::Result;

use super::{Program, Results, Scale, Session, snapshot};
use crate::packages;

pub(super) const PROGRAM: Program = Program {
    name: "valkey",
    how: "as packaged in backports, linked against jemalloc; BGSAVE of 500 MiB under write load equals the data \
          set at the fork; with `fork:lazy`, which is for servers that save so",
    short: false,
    prepare: || packages::ensure_backport("valkey-server"),
    version: || packages::version("valkey-server"),
    run,
};

fn run(session: &Session) -> Result<Results> {
    let mib = if session.scale == Scale::Short {
        100
    } else {
        500
    };
    let mut results = Results::default();
    snapshot::judge(session, "valkey-server".as_ref(), "lazy", mib, &mut results)?;
    Ok(results)
}
