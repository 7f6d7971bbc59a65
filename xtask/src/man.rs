//! `cargo xtask man`: man pages and shell completions, in `target/share` as
//! they lie below a prefix.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::{packages, process, workspace};

const LIMIT: Duration = Duration::from_secs(60);

/// Each shell, and where its completions of `dcm` belong.
const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "bash-completion/completions/dcm"),
    ("zsh", "zsh/site-functions/_dcm"),
    ("fish", "fish/vendor_completions.d/dcm.fish"),
];

/// Builds `dcm`, writes everything and says where.
pub(crate) fn run() -> Result<bool> {
    let mut build = workspace::cargo();
    build.args(["build", "--quiet", "--release", "--package", "dcm"]);
    if !process::run_visibly(&mut build)? {
        return Ok(false);
    }
    let share = share();
    write(&share)?;
    println!("{}", share.display());
    Ok(true)
}

/// Where the pages and completions are written.
pub(crate) fn share() -> PathBuf {
    workspace::target().join("share")
}

/// Writes man pages and completions below `share`, with the `dcm` that was built last.
pub(crate) fn write(share: &Path) -> Result<()> {
    let pages = share.join("man/man1");
    remove_ours(&pages)?;
    dcm(&["man".as_ref(), pages.as_os_str()])?;
    for (shell, path) in COMPLETIONS {
        let path = share.join(path);
        let script = dcm(&["completions".as_ref(), shell.as_ref()])?;
        fs::create_dir_all(path.parent().unwrap_or(share))?;
        fs::write(&path, script).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// Removes our pages from where others have theirs too: a subcommand may be no more.
fn remove_ours(pages: &Path) -> Result<()> {
    if !pages.exists() {
        return Ok(());
    }
    for page in fs::read_dir(pages)? {
        let page = page?;
        let name = page.file_name();
        if name == "dcm.1" || name.to_string_lossy().starts_with("dcm-") {
            fs::remove_file(page.path())?;
        }
    }
    Ok(())
}

/// Whether each page renders without a warning and the scripts parse; returns how many there are.
pub(crate) fn check(share: &Path) -> Result<usize> {
    packages::ensure(&["groff-base", "man-db"])?;
    let mut checked = 0;
    for entry in fs::read_dir(share.join("man/man1"))? {
        let page = entry?.path();
        let mut groff = Command::new("groff");
        groff
            .args(["-man", "-Tutf8", "-K", "utf8", "-ww", "-z"])
            .arg(&page);
        let warnings = process::run(&mut groff, LIMIT)?;
        ensure!(
            warnings.success() && warnings.stderr.is_empty(),
            "{}: {}",
            page.display(),
            warnings.stderr
        );
        let mut man = Command::new("man");
        man.args(["--pager", "cat", "--local-file"]).arg(&page);
        let shown = process::run(&mut man, LIMIT)?;
        ensure!(
            shown.success() && shown.stdout.contains("SYNOPSIS"),
            "man shows nothing of {}",
            page.display()
        );
        checked += 1;
    }
    let (_, bash) = COMPLETIONS[0];
    let mut parse = Command::new("bash");
    parse.arg("-n").arg(share.join(bash));
    let parsed = process::run(&mut parse, LIMIT)?;
    ensure!(parsed.success(), "completions of bash: {}", parsed.stderr);
    Ok(checked + 1)
}

fn dcm(args: &[&std::ffi::OsStr]) -> Result<String> {
    let finished = process::run(Command::new(workspace::dcm()).args(args), LIMIT)?;
    ensure!(
        finished.success(),
        "dcm {args:?}: {}",
        finished.stderr.trim()
    );
    Ok(finished.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["dcm.1", "dcm-gone.1", "ls.1", "dcmtk.1"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        remove_ours(dir.path()).unwrap();
        let mut left: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|page| page.unwrap().file_name())
            .collect();
        left.sort();
        assert_eq!(left, ["dcmtk.1", "ls.1"]);
    }
}
