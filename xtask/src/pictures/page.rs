//! The live page in a browser without a screen.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::process::{self, Finished};

const LIMIT: Duration = Duration::from_secs(60);
/// Milliseconds of the page's own clock, which runs ahead while it waits for nothing: some looks at the broker.
const LOOKS: &str = "--virtual-time-budget=4000";

fn browser(address: SocketAddr, options: &[&str]) -> Result<Finished> {
    let profile = tempfile::tempdir()?;
    let mut chromium = Command::new("chromium");
    chromium
        // In a container, and as root, it can't have its own sandbox; it is shown nothing but our page.
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
        ])
        .args([
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--enable-logging=stderr",
            LOOKS,
        ])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .args(options)
        .arg(format!("http://{address}/"));
    let finished = process::run(&mut chromium, LIMIT)?;
    ensure!(
        finished.success(),
        "chromium: {}: {}",
        finished.ending(),
        finished.stderr
    );
    let complaint = finished
        .stderr
        .lines()
        .find(|line| line.contains("CONSOLE"));
    ensure!(complaint.is_none(), "the page complains: {complaint:?}");
    Ok(finished)
}

/// The page's elements, once its script has looked at the broker some times.
pub(crate) fn elements(address: SocketAddr) -> Result<String> {
    Ok(browser(address, &["--dump-dom"])?.stdout)
}

/// Takes a picture of the page.
pub(crate) fn picture(address: SocketAddr, path: &Path) -> Result<()> {
    let screenshot = format!("--screenshot={}", path.display());
    browser(address, &["--window-size=1280,1330", &screenshot])?;
    ensure!(path.exists(), "chromium has left no picture");
    Ok(())
}
