//! The live page in headless Chromium, in the middle of a storm of releases.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::Tally;
use crate::pictures::{Storm, page};
use crate::{packages, workspace};

/// Until all that is waited for has happened.
const LIMIT: Duration = Duration::from_secs(90);

pub(super) fn run() -> Result<Tally> {
    packages::ensure(&["chromium", "fonts-dejavu-core", "python3"])?;
    let mut tally = Tally::default();
    tally.check("the page shows a storm of releases", shows_a_storm());
    Ok(tally)
}

fn shows_a_storm() -> Result<()> {
    let storm = Storm::start()?;
    let started = Instant::now();
    loop {
        let elements = page::elements(storm.address())?;
        let missing = missing(&elements);
        if missing.is_empty() {
            break;
        }
        ensure!(
            started.elapsed() < LIMIT,
            "the page does not show {missing:?}:\n{elements}"
        );
        thread::sleep(Duration::from_secs(1));
    }
    let picture = workspace::target().join("page.png");
    page::picture(storm.address(), &picture)?;
    storm.end()?;
    Ok(())
}

/// What the elements of the page do not show of a storm.
fn missing(elements: &str) -> Vec<&'static str> {
    let after = |part: &str, end: &str| -> String {
        let rest = elements.split_once(part).map_or("", |(_, rest)| rest);
        rest.split_once(end)
            .map_or(rest, |(found, _)| found)
            .to_owned()
    };
    let leases = after("id=\"leases\"", "</table>");
    let receipts = after("id=\"receipts\"", "</table>");
    [
        ("a live page", elements.contains("data-state=\"live\"")),
        ("extents", elements.contains("class=\"extent\"")),
        ("the store's lease", leases.contains("kv_store")),
        ("the Python program's lease", leases.contains("python3")),
        (
            "receipts",
            receipts.contains("#2") && receipts.contains("operator"),
        ),
        (
            "what was moved",
            !after("id=\"numbers\"", "</section>").contains("<b>0 B</b>moved"),
        ),
        (
            "stalls",
            after("id=\"stall-words\"", "</div>").contains("waits, half below"),
        ),
    ]
    .into_iter()
    .filter_map(|(what, there)| (!there).then_some(what))
    .collect()
}
