//! `cargo xtask api`: what each library crate offers to Rust, one line per item, in its `api.txt`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use public_api::Builder;

use crate::{process, workspace};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Write nothing, and fail if a list is not what it should be
    #[arg(long)]
    check: bool,
}

/// A library crate.
#[derive(Debug)]
pub(crate) struct Library {
    package: &'static str,
    /// Its name in programs.
    name: &'static str,
    /// Its list, from the root.
    pub(crate) list: &'static str,
}

/// Those with a face of their own for programs in Rust.
pub(crate) const LIBRARIES: [Library; 3] = [
    Library {
        package: "dcmalloc-allocator",
        name: "allocator",
        list: "allocator/api.txt",
    },
    Library {
        package: "dcmalloc-dax-backend",
        name: "dax_backend",
        list: "dax-backend/api.txt",
    },
    Library {
        package: "dcmalloc-ffi",
        name: "dcmalloc",
        list: "ffi/api.txt",
    },
];

/// Whether the lists are as they should be.
pub(crate) fn run(options: &Options) -> Result<bool> {
    document()?;
    let mut same = true;
    for library in &LIBRARIES {
        if !options.check {
            fs::write(workspace::root().join(library.list), library.items()?)
                .with_context(|| library.list)?;
        } else if let Err(error) = library.check() {
            eprintln!("{error:#}");
            same = false;
        }
    }
    Ok(same)
}

/// Has rustdoc describe the libraries for programs. That is for nightly toolchains, and the `public-api` of
/// `Cargo.toml` is the one that reads what our toolchain writes. Build scripts look at RUSTC_BOOTSTRAP: in a
/// directory of its own, this makes nobody else build anew.
pub(crate) fn document() -> Result<()> {
    let mut doc = workspace::cargo();
    doc.args(["doc", "--quiet", "--no-deps", "--lib"]);
    for library in &LIBRARIES {
        doc.args(["--package", library.package]);
    }
    doc.env("CARGO_TARGET_DIR", directory())
        .env("RUSTC_BOOTSTRAP", "1")
        .env(
            "RUSTDOCFLAGS",
            "-Z unstable-options --output-format json --allow rustdoc::private_intra_doc_links",
        );
    ensure!(
        process::run_visibly(&mut doc)?,
        "rustdoc does not describe the libraries"
    );
    Ok(())
}

fn directory() -> PathBuf {
    workspace::target().join("api")
}

impl Library {
    /// Whether the checked-in list is what rustdoc said last.
    pub(crate) fn check(&self) -> Result<()> {
        let there = fs::read_to_string(workspace::root().join(self.list)).unwrap_or_default();
        let items = self.items()?;
        let more = |these: &str, those: &str| -> String {
            let those: Vec<&str> = those.lines().collect();
            let lines = these.lines().filter(|line| !those.contains(line));
            lines.map(|line| format!("\n  {line}")).collect()
        };
        ensure!(
            there == items,
            "{}: make it anew with cargo xtask api, and think of who uses what changed\n\
             in the list only:{}\nin the source only:{}",
            self.list,
            more(&there, &items),
            more(&items, &there)
        );
        Ok(())
    }

    /// Its public items, without what every type has.
    fn items(&self) -> Result<String> {
        let json = directory().join(format!("doc/{}.json", self.name));
        let api = Builder::from_rustdoc_json(json)
            .omit_blanket_impls(true)
            .omit_auto_trait_impls(true)
            .omit_auto_derived_impls(true)
            .build()
            .context("the description by rustdoc is not of the version that public-api reads")?;
        Ok(api.items().map(|item| format!("{item}\n")).collect())
    }
}
