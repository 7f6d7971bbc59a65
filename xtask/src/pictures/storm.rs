//! Programs on a broker whose capacity is taken and given back all the time.

use std::net::{SocketAddr, TcpListener};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::broker::Broker;
use crate::process::Background;
use crate::workspace;

const LIMIT: Duration = Duration::from_secs(60);
/// Longer than anything that looks at it.
const SECONDS: &str = "90";
/// What is offered at first: `OFFER` in bytes.
const WHOLE: u64 = 640 << 20;
const OFFER: &str = "320M,192M,128M";

/// A broker with a live page, a key-value store and a Python program on it, and somebody who releases.
pub(crate) struct Storm {
    broker: Arc<Broker>,
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    releases: thread::JoinHandle<Result<u32>>,
    _programs: [Background; 2],
}

impl Storm {
    pub(crate) fn start() -> Result<Self> {
        // A port that was free a moment ago.
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let broker = Broker::over(
            &[
                "--emulate",
                "1G",
                "--offer",
                OFFER,
                "--listen",
                &address.to_string(),
            ],
            LIMIT,
        )?;
        let broker = Arc::new(broker);
        let mut store = Command::new(workspace::release("kv_store"));
        store
            .args(["--records", "120000", "--seconds", SECONDS, "--socket"])
            .arg(broker.socket());
        let mut store = Background::start(&mut store)?;
        let mut python = broker.run("python3".as_ref());
        let script = format!(
            "import time; keep = [bytes(900) for _ in range(10**5)]; time.sleep({SECONDS})"
        );
        let python = Background::start(python.args(["-c", &script]))?;
        store.wait_for("thinned", LIMIT)?;
        let stop = Arc::new(AtomicBool::new(false));
        let releases = {
            let (broker, stop) = (Arc::clone(&broker), Arc::clone(&stop));
            thread::spawn(move || release_and_add(&broker, &stop))
        };
        Ok(Self {
            broker,
            address,
            stop,
            releases,
            _programs: [store, python],
        })
    }

    pub(crate) fn broker(&self) -> &Broker {
        &self.broker
    }

    /// Of the page.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends it; how often something was released.
    pub(crate) fn end(self) -> Result<u32> {
        self.stop.store(true, Ordering::Relaxed);
        let releases = self.releases.join();
        let releases = releases
            .ok()
            .context("the thread that releases panicked")??;
        ensure!(releases > 1, "hardly anything was released");
        Ok(releases)
    }
}

/// More each time than is free, so that what is in use has to move.
fn release_and_add(broker: &Broker, stop: &AtomicBool) -> Result<u32> {
    let mut releases = 0;
    for step in 0u32.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let size = ["384M", "480M", "256M"][step as usize % 3];
        broker.order(&["release", size, "--deadline", "5000"])?;
        releases += 1;
        thread::sleep(Duration::from_millis(700));
        // What has gone comes back in two extents.
        let gone = WHOLE.saturating_sub(broker.status_number("/capacity/accepted")?) >> 20;
        let first = gone / 4 * 2;
        for mebibytes in [first, gone - first].into_iter().filter(|size| *size > 0) {
            broker.order(&["add", &format!("{mebibytes}M")])?;
        }
        thread::sleep(Duration::from_millis(900));
    }
    Ok(releases)
}
