//! This test binary as a program that takes leases, without any library.

use std::env;
use std::ffi::CString;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::Duration;

use dax_backend::broker::{BrokerClient, FromBroker};

use crate::call::Dcm;

const VARIABLE: &str = "TEST_LEASES_BYTES";

/// Leases what the variable says, counts it as live, prints `leased` and waits
/// for the end of stdin, when a test starts this binary for it.
#[test]
fn helper_leases() {
    let Ok(bytes) = env::var(VARIABLE) else {
        return;
    };
    let bytes: u64 = bytes.parse().unwrap();
    let path = CString::new(env::var("DCM_SOCKET").unwrap()).unwrap();
    let run: uuid::Uuid = env::var("DCM_RUN").unwrap().parse().unwrap();
    let (broker, welcome) = BrokerClient::connect(&path, run.as_u128()).unwrap();
    broker.request_lease(bytes).unwrap();
    loop {
        let message = broker.recv(Some(Duration::from_secs(5))).unwrap();
        if let Some(FromBroker::Grant { last: true, .. }) = message {
            break;
        }
    }
    let page = &welcome.page;
    for counter in [
        &page.extent_live_bytes,
        &page.extent_live_peak,
        &page.heap_live_peak_total,
    ] {
        counter.store(bytes, Ordering::Relaxed);
    }
    page.extent_share_at_peak.store(10_000, Ordering::Relaxed);
    println!("leased");
    let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
}

/// `dcm run` with [`helper_leases`] as the program.
pub(crate) fn run_leasing(dcm: &Dcm, options: &[&str], bytes: u64) -> Command {
    let mut command = dcm.command(&["run"]);
    command
        .args(options)
        .arg("--")
        .arg(env::current_exe().unwrap())
        .args(["--exact", "client::helper_leases", "--nocapture"])
        .env(VARIABLE, bytes.to_string());
    command
}
