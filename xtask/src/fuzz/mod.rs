//! `cargo xtask fuzz`: libFuzzer, guided by coverage, against what comes from outside: a device's registers and
//! responses, a fabric manager's doings, clients' messages, firmware's tables, settings. The targets are in `fuzz`, a
//! workspace of its own; the result is the table of `docs/fuzz.md`.

mod session;
mod tool;

use std::time::Duration;

use anyhow::{Result, bail};

use crate::page::{self, Page};
use session::Session;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Targets to fuzz; all when none is named
    targets: Vec<String>,
    /// How long each is fuzzed
    #[arg(long, default_value_t = 120, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// List the targets and what each gets
    #[arg(long)]
    list: bool,
}

/// One target: `fuzz/targets/NAME.rs`.
#[derive(Debug)]
struct Target {
    name: &'static str,
    /// What it gets, and what must hold.
    what: &'static str,
}

const ALL: &[Target] = &[
    Target {
        name: "config",
        what: "text of settings: what was read reads back the same, what was not is told with its place",
    },
    Target {
        name: "cedt",
        what: "bytes of the firmware's CEDT: a table or an error with its place",
    },
    Target {
        name: "pci_config",
        what: "configuration space: no read or write outside of it, blocks where DVSECs are, no status bit cleared",
    },
    Target {
        name: "responses",
        what: "a response to each mailbox command: an answer within what was asked, or an error",
    },
    Target {
        name: "registers",
        what: "all registers of a device: it opens or is refused, and decoders are programmed or not",
    },
    Target {
        name: "device",
        what: "a device whose mailbox lies, once or for ever, while it is opened, polled and given back to: the \
               driver ends with an error or goes on, and is whole again when the device is",
    },
    Target {
        name: "fabric",
        what: "a fabric manager's and a host's doings in any order, with faults and restarts: the device judges \
               that each group was answered once, and both lists agree",
    },
    Target {
        name: "broker",
        what: "messages of two clients and an operator, well formed or not: no granule is held twice, the books add \
               up, the broker lives",
    },
];

const PAGE: Page = Page {
    file: "docs/fuzz.md",
    rule: "|---|---|---|---|---|---|---|---|",
};

/// Whether nothing was found.
pub(crate) fn run(options: &Options) -> Result<bool> {
    if options.list {
        for target in ALL {
            println!("{:<12} {}", target.name, target.what);
        }
        return Ok(true);
    }
    let targets = chosen(&options.targets)?;
    let revision = page::revision()?;
    let tool = tool::find_or_install()?;
    let mut well = true;
    for target in targets {
        eprintln!("{}: {}", target.name, target.what);
        let length = Duration::from_secs(options.seconds.into());
        let session = Session::run(&tool, target.name, length)?;
        let result = match &session.finding {
            None => "nothing found".to_owned(),
            Some(finding) => format!("**found**: {}", page::shortened(finding)),
        };
        eprintln!("  {result}; {} runs", session.runs);
        well &= session.finding.is_none();
        PAGE.put(&[
            format!("`{}`", target.name),
            target.what.to_owned(),
            result,
            session.runs.to_string(),
            session.seconds.to_string(),
            session.coverage,
            session.corpus,
            revision.clone(),
        ])?;
    }
    Ok(well)
}

fn chosen(names: &[String]) -> Result<Vec<&'static Target>> {
    if let Some(name) = names
        .iter()
        .find(|name| !ALL.iter().any(|target| target.name == **name))
    {
        let known: Vec<_> = ALL.iter().map(|target| target.name).collect();
        bail!("no target {name}; there are {}", known.join(", "));
    }
    Ok(ALL
        .iter()
        .filter(|target| names.is_empty() || names.iter().any(|name| name == target.name))
        .collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;

    use super::*;
    use crate::workspace;

    #[test]
    fn every_target_is_listed_and_has_seeds() {
        let names = |dir: &str| -> BTreeSet<String> {
            let entries = fs::read_dir(workspace::root().join("fuzz").join(dir)).unwrap();
            let names = entries.map(|entry| entry.unwrap().path());
            names
                .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
                .collect()
        };
        let listed: BTreeSet<String> = ALL.iter().map(|target| target.name.to_owned()).collect();
        assert_eq!(names("targets"), listed);
        assert_eq!(names("seeds"), listed);
    }
}
