//! A program's line of the table.

use anyhow::{Context, Result, ensure};

use super::session::{Account, Way};
use super::{Program, Results, Scale, Session};
use crate::others::{self, Others};

/// Least share of the heap, over time, that must lie on extents.
const LEAST_SHARE: f64 = 0.90;
/// The same of a short run: what programs allocate before they have extents weighs more.
const LEAST_SHARE_SHORT: f64 = 0.70;
/// The same where others use the processors as well: the pool of a program that grows at full speed runs dry where
/// the broker waits for one.
const LEAST_SHARE_SHARED: f64 = 0.50;
/// Least share of what is held that a recall must take.
const LEAST_TAKEN: f64 = 0.25;
/// How many differences are told one by one.
const TOLD: usize = 5;

/// What is known of one program.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) program: &'static Program,
    pub(crate) version: String,
    /// What came of it without us, with us, and under recalls.
    pub(crate) cells: Vec<String>,
    pub(crate) failures: Vec<String>,
}

impl Row {
    pub(super) fn new(program: &'static Program, version: String) -> Self {
        Self {
            program,
            version,
            cells: Vec::new(),
            failures: Vec::new(),
        }
    }

    /// Runs the program in all three ways. Without us it must work; everything else is a finding.
    pub(super) fn judge(&mut self, scale: Scale) -> Result<()> {
        let (without, _) = once(self.program, Way::Without, scale)
            .with_context(|| format!("{} fails without us", self.program.name))?;
        ensure!(
            without.len() > 0,
            "{} says nothing of its outcome",
            self.program.name
        );
        self.cell(without.summary());
        for way in [Way::With, Way::Recalled] {
            let watched = Others::watch()?;
            match once(self.program, way, scale) {
                Ok((results, account)) => {
                    let others = watched.share()?;
                    let least = match scale {
                        Scale::Short if others::is_quiet(others) => LEAST_SHARE_SHORT,
                        Scale::Short => LEAST_SHARE_SHARED,
                        Scale::Whole => LEAST_SHARE,
                    };
                    eprintln!("  others had {:.0} % of the processors", others * 100.0);
                    self.compare(way, least, &results, &without, account);
                }
                Err(error) => {
                    self.cell("failed".to_owned());
                    self.failures.push(format!("{}: {error:#}", name(way)));
                }
            }
        }
        Ok(())
    }

    fn compare(
        &mut self,
        way: Way,
        least: f64,
        results: &Results,
        without: &Results,
        account: Option<Account>,
    ) {
        let mut failures = Vec::new();
        let differences = results.differences(without);
        let same = without.len().saturating_sub(differences.len());
        let mut cell = format!("{same} of {} the same", without.len());
        failures.extend(differences.iter().take(TOLD).cloned());
        if differences.len() > TOLD {
            failures.push(format!("and {} more", differences.len() - TOLD));
        }
        if let Some(account) = account {
            let share = account.share;
            let at_peaks = account.live_peak_on_extents as f64 / account.live_peak.max(1) as f64;
            match account.recalls {
                None => {
                    cell += &format!(
                        "; {:.1} % on extents over time, {:.1} % of {} MiB at the peaks",
                        share * 100.0,
                        at_peaks * 100.0,
                        account.live_peak >> 20
                    );
                    if share < least {
                        failures.push(format!(
                            "only {:.1} % of the heap on extents over time",
                            share * 100.0
                        ));
                    }
                }
                Some(recalls) => {
                    cell += &format!(
                        "; {} recalls took {:.0} % of what was held each, {} granules evacuated",
                        recalls.count,
                        recalls.share() * 100.0,
                        recalls.moved >> 21,
                    );
                    eprintln!(
                        "  recalls: {} MiB taken, {} MiB refused, slowest {} ms",
                        recalls.taken >> 20,
                        recalls.refused >> 20,
                        recalls.slowest_ms
                    );
                    if recalls.share() < LEAST_TAKEN || recalls.moved == 0 {
                        failures.push(format!(
                            "recalls took only {:.0} % of what was held, and moved {} bytes",
                            recalls.share() * 100.0,
                            recalls.moved
                        ));
                    }
                }
            }
            eprintln!(
                "  {} processes, {} granules moved in all, degraded {:#x}",
                account.processes, account.evacuated, account.degraded
            );
        }
        self.cell(cell);
        let tell = |failure| format!("{}: {failure}", name(way));
        self.failures.extend(failures.into_iter().map(tell));
    }

    fn cell(&mut self, text: String) {
        eprintln!("  {text}");
        self.cells.push(text);
    }
}

fn name(way: Way) -> &'static str {
    match way {
        Way::Without => "without us",
        Way::With => "with us",
        Way::Recalled => "under recalls",
    }
}

fn once(program: &Program, way: Way, scale: Scale) -> Result<(Results, Option<Account>)> {
    let session = Session::start(way, scale)?;
    let results = (program.run)(&session)?;
    Ok((results, session.end()?))
}
