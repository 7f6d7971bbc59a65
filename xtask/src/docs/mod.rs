//! `cargo xtask docs`: what the pages say is run as it is written.
//!
//! A page's blocks run in order, in the root of the repository:
//!
//! | block | what is done |
//! |---|---|
//! | `console` | each line after `$ ` is run by one bash; what is shown below it must appear |
//! | `file="NAME"` | written as NAME, for the commands below it, and removed after the page |
//! | `skip="REASON"` | not run; the reason is printed |
//! | `rust` | compiled and run by rustdoc, with the examples |
//! | `text` | nothing: it is a picture |

mod block;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::rung::Tally;
use crate::{process, workspace};
use block::{Block, Step};

/// How long the commands of a block may take.
const LIMIT: Duration = Duration::from_secs(900);
/// What a reader takes at least to type the next command.
const BETWEEN: &str = "sleep 1";

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Pages to try; README.md, CONTRIBUTING.md and all of docs when none is named
    pages: Vec<PathBuf>,
}

/// Tries the pages; whether all held.
pub(crate) fn run(options: &Options) -> Result<bool> {
    let tally = try_pages(&options.pages)?;
    for (what, reason) in &tally.skipped {
        println!("SKIPPED {what}: {reason}");
    }
    for (what, reason) in &tally.failed {
        println!("FAILED {what}: {reason}");
    }
    println!(
        "{} passed, {} failed, {} skipped",
        tally.passed,
        tally.failed.len(),
        tally.skipped.len()
    );
    Ok(tally.failed.is_empty())
}

/// Tries `pages`, or all; ends at the first block that does not hold.
pub(crate) fn try_pages(pages: &[PathBuf]) -> Result<Tally> {
    let mut tally = Tally::default();
    let pages = if pages.is_empty() {
        all_pages()?
    } else {
        pages.to_vec()
    };
    for page in pages {
        try_page(&page, &mut tally)?;
        if !tally.failed.is_empty() {
            break;
        }
    }
    Ok(tally)
}

fn all_pages() -> Result<Vec<PathBuf>> {
    let mut pages: Vec<PathBuf> = ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md"]
        .into_iter()
        .map(PathBuf::from)
        .collect();
    let mut docs = Vec::new();
    for entry in fs::read_dir(workspace::root().join("docs"))? {
        let name = PathBuf::from("docs").join(entry?.file_name());
        if name.extension().is_some_and(|ext| ext == "md") {
            docs.push(name);
        }
    }
    docs.sort();
    pages.extend(docs);
    Ok(pages)
}

fn try_page(page: &Path, tally: &mut Tally) -> Result<()> {
    let text = fs::read_to_string(workspace::root().join(page))
        .with_context(|| page.display().to_string())?;
    let blocks = block::blocks(&text).with_context(|| page.display().to_string())?;
    let mut files = Files::default();
    for block in &blocks {
        let name = format!("{}:{}", page.display(), block.line);
        if let Some(reason) = &block.skip {
            tally.skip(name, reason);
            continue;
        }
        let result = match (&block.file, &*block.language) {
            (Some(file), _) => files.write(file, &block.text),
            (None, "console") => {
                eprintln!("  {name}");
                run_block(block)
            }
            (None, "text") => continue,
            (None, "rust") => {
                is_doctest(page).with_context(|| name.clone())?;
                continue;
            }
            (None, other) => bail!(
                "{name}: nobody tries blocks of `{other}`: a picture is `text`; name a \
                 file=\"…\" for other things, or say why not with skip=\"…\""
            ),
        };
        tally.check(&name, result);
        if !tally.failed.is_empty() {
            break;
        }
    }
    Ok(())
}

/// Whether rustdoc tries the Rust of `page`.
fn is_doctest(page: &Path) -> Result<()> {
    let examples = "examples/src/lib.rs";
    let text = fs::read_to_string(workspace::root().join(examples))?;
    let include = format!("include_str!(\"../../{}\")", page.display());
    ensure!(
        text.contains(&include),
        "{examples} has no {include}, so nobody tries this Rust"
    );
    Ok(())
}

/// What a page has written, gone with the value.
#[derive(Default)]
struct Files(Vec<PathBuf>);

impl Files {
    fn write(&mut self, name: &str, text: &str) -> Result<()> {
        let path = workspace::root().join(name);
        ensure!(!path.exists(), "{name} is there already");
        fs::write(&path, text)?;
        self.0.push(path);
        Ok(())
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        for path in &self.0 {
            // Gone already is as good.
            let _ = fs::remove_file(path);
        }
    }
}

/// Marks where the output of a command begins.
const MARK: &str = "\u{1e}";

fn run_block(block: &Block) -> Result<()> {
    let steps = block::steps(&block.text)?;
    let script: String = steps.iter().map(script_of).collect();
    let mut shell = Command::new("bash");
    shell
        .args(["-c", &format!("exec 2>&1\n{script}")])
        .current_dir(workspace::root());
    for variable in [
        "CARGO_TARGET_DIR",
        "DCM_SOCKET",
        "DCM_RUN",
        "DCMALLOC_CONF",
        "LD_PRELOAD",
    ] {
        shell.env_remove(variable);
    }
    // What it leaves in the background is ended with it.
    let finished = process::run(&mut shell, LIMIT)?;
    let mut outputs = finished.stdout.split(MARK).skip(1);
    for step in &steps {
        let Some(printed) = outputs.next() else {
            break;
        };
        if let Err(line) = step.shows(printed) {
            bail!("`{}` does not print `{line}` but\n{printed}", step.command);
        }
    }
    let last = finished.stdout.rsplit(MARK).next().unwrap_or_default();
    ensure!(
        finished.success(),
        "{}; the last command printed\n{last}",
        finished.ending()
    );
    Ok(())
}

fn script_of(step: &Step) -> String {
    let pause = if step.runs_in_background() {
        BETWEEN
    } else {
        "true"
    };
    format!(
        "printf '{MARK}'\n{}\ncode=$?; [ $code -eq 0 ] || exit $code\n{pause}\n",
        step.command
    )
}
