//! The rungs of the test ladder, cheapest first. `docs/testing.md` has a paragraph on each.

pub(crate) mod build;
mod capacity;
mod clippy;
mod compat;
mod conformance;
mod crash;
mod crash_evacuation;
mod docs;
mod faces;
mod forced;
pub(crate) mod fork;
mod format;
mod guest;
mod hazards;
mod page;
mod programs;
mod qtest;
pub(crate) mod recall;
mod recall_redis;
mod rustdoc;
mod speed;
mod symbols;
pub(crate) mod unit;

use anyhow::Result;

/// One rung.
#[derive(Debug)]
pub(crate) struct Rung {
    pub(crate) name: &'static str,
    /// What it shows, in a few words.
    pub(crate) shows: &'static str,
    pub(crate) run: fn() -> Result<Tally>,
}

/// All of them, in order: each may use what the ones before it built.
pub(crate) const ALL: &[Rung] = &[
    Rung {
        name: "format",
        shows: "rustfmt has nothing to change",
        run: format::run,
    },
    Rung {
        name: "clippy",
        shows: "no lint fires, in any target",
        run: clippy::run,
    },
    Rung {
        name: "unit",
        shows: "unit, property and model tests of every crate",
        run: unit::run,
    },
    Rung {
        name: "qtest",
        shows: "the driver's device tests on QEMU's device, without a guest",
        run: qtest::run,
    },
    Rung {
        name: "rustdoc",
        shows: "the documentation builds without a warning; each library offers its list of items",
        run: rustdoc::run,
    },
    Rung {
        name: "build",
        shows: "dcm and the libraries build for release",
        run: build::run,
    },
    Rung {
        name: "docs",
        shows: "every command and code block of the pages works as written; man pages render",
        run: docs::run,
    },
    Rung {
        name: "symbols",
        shows: "each library exports its list of names, no more and no less",
        run: symbols::run,
    },
    Rung {
        name: "faces",
        shows: "C, C++ and Rust behave alike, with two compilers, sanitizers and valgrind",
        run: faces::run,
    },
    Rung {
        name: "conformance",
        shows: "what a malloc must do, by C programs in three placements",
        run: conformance::run,
    },
    Rung {
        name: "programs",
        shows: "python, sqlite, redis and gcc on extents, same output as without us",
        run: programs::run,
    },
    Rung {
        name: "capacity",
        shows: "offers become memory at once, freed memory becomes capacity by itself",
        run: capacity::run,
    },
    Rung {
        name: "recall",
        shows: "capacity is taken back while programs use it, and they notice nothing",
        run: recall::run,
    },
    Rung {
        name: "hazards",
        shows: "recalls while programs lock, protect, close, limit and forbid what moves need",
        run: hazards::run,
    },
    Rung {
        name: "forced",
        shows: "capacity taken by force reads as zeroes or raises SIGBUS, as the program has said",
        run: forced::run,
    },
    Rung {
        name: "page",
        shows: "the live page in headless Chromium, in the middle of a storm of releases",
        run: page::run,
    },
    Rung {
        name: "fork",
        shows: "children share their parent's extents, through recalls and deaths of either",
        run: fork::run,
    },
    Rung {
        name: "crash",
        shows: "kill -9 leaves no lease, no byte, no process and no socket",
        run: crash::run,
    },
    Rung {
        name: "guest",
        shows: "a CXL device of QEMU's under a stock kernel, with a broker and programs on it",
        run: guest::run,
    },
    Rung {
        name: "compat",
        shows: "programs by their own suites, forks and recalls (the whole: cargo xtask compat)",
        run: compat::run,
    },
    Rung {
        name: "speed",
        shows: "a short comparison with jemalloc (the real one: cargo xtask bench)",
        run: speed::run,
    },
];

/// What a rung found.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tally {
    pub(crate) passed: usize,
    /// What failed, and why.
    pub(crate) failed: Vec<(String, String)>,
    /// What could not be judged, and why.
    pub(crate) skipped: Vec<(String, String)>,
}

impl Tally {
    pub(crate) fn pass(&mut self) {
        self.passed += 1;
    }

    pub(crate) fn fail(&mut self, what: impl Into<String>, reason: impl Into<String>) {
        self.failed.push((what.into(), reason.into()));
    }

    pub(crate) fn skip(&mut self, what: impl Into<String>, reason: impl Into<String>) {
        self.skipped.push((what.into(), reason.into()));
    }

    /// Books `result` as one check called `what`.
    pub(crate) fn check(&mut self, what: &str, result: Result<()>) {
        match result {
            Ok(()) => self.pass(),
            Err(error) => self.fail(what, format!("{error:#}")),
        }
    }

    pub(crate) fn add(&mut self, other: &Tally) {
        self.passed += other.passed;
        self.failed.extend(other.failed.iter().cloned());
        self.skipped.extend(other.skipped.iter().cloned());
    }

    pub(crate) fn verdict(&self) -> &'static str {
        if !self.failed.is_empty() {
            "FAILED"
        } else if self.passed > 0 {
            "ok"
        } else {
            "SKIPPED"
        }
    }
}
