//! `cargo xtask pictures`: the live page and `dcm top` in the middle of a storm of releases, as they are shown
//! in the docs.

pub(crate) mod page;
mod storm;
mod terminal;

use std::fs;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};

pub(crate) use storm::Storm;

use crate::process::Background;
use crate::{packages, rung::build, workspace};

/// What history the page is to have to show.
const BEFORE: Duration = Duration::from_secs(12);
const ROWS: u16 = 34;
const COLUMNS: u16 = 132;

/// Takes the pictures anew.
pub(crate) fn run() -> Result<bool> {
    packages::ensure(&["chromium", "fonts-dejavu-core", "bsdutils", "python3"])?;
    ensure!(build::release()?, "the release build failed");
    let pictures = workspace::root().join("docs/pictures");
    fs::create_dir_all(&pictures)?;
    let storm = Storm::start()?;
    thread::sleep(BEFORE);
    page::picture(storm.address(), &pictures.join("page.png"))?;
    let screen = top(&storm)?;
    fs::write(pictures.join("top.svg"), screen)?;
    storm.end()?;
    println!("{}", pictures.display());
    Ok(true)
}

/// `dcm top` after some seconds, as a picture. script(1) is its terminal.
fn top(storm: &Storm) -> Result<String> {
    let dcm = workspace::dcm();
    let line = format!(
        // Its terminal is a session of its own, which nobody ends with it.
        "stty rows {ROWS} cols {COLUMNS}; exec timeout --foreground 8 {} top --socket {}",
        dcm.display(),
        storm.broker().socket().display()
    );
    let mut script = Command::new("script");
    script
        .args(["--quiet", "--return", "--command", &line, "/dev/null"])
        .env("TERM", "xterm-256color");
    let top = Background::start(&mut script)?;
    thread::sleep(Duration::from_secs(4));
    let screen = terminal::svg(&top.stdout_so_far(), ROWS, COLUMNS);
    top.finish(Duration::from_secs(30))?;
    Ok(screen)
}
