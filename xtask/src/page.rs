//! Pages of `docs` that tasks write: a table whose rows are replaced one by one.
#![forbid(unsafe_code)]

use std::fs;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, ensure};

use crate::workspace;

/// A page with a table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Page {
    /// From the root of the repository.
    pub(crate) file: &'static str,
    /// The table's last line of heading; rows are below it, up to the next blank line.
    pub(crate) rule: &'static str,
}

impl Page {
    /// Puts a row of `cells` into the table, in place of the one with the same first cell.
    pub(crate) fn put(&self, cells: &[String]) -> Result<()> {
        let file = self.file;
        let path = workspace::root().join(file);
        let text = fs::read_to_string(&path).with_context(|| format!("no {file}"))?;
        let page = with_row(&text, self.rule, cells);
        fs::write(&path, page.with_context(|| format!("{file} has no table"))?)?;
        println!("{file} has it");
        Ok(())
    }
}

fn with_row(text: &str, rule: &str, cells: &[String]) -> Option<String> {
    let lines: Vec<&str> = text.lines().collect();
    let first = lines.iter().position(|line| *line == rule)? + 1;
    let rows = lines[first..]
        .iter()
        .take_while(|line| line.starts_with('|'));
    let end = first + rows.count();
    let cells: Vec<String> = cells
        .iter()
        .map(|cell| cell.replace('|', "/").replace('\n', " "))
        .collect();
    let row = format!("| {} |", cells.join(" | "));
    let start = format!("| {} |", cells.first()?);
    let place = (first..end).find(|row| lines[*row].starts_with(&start));
    let mut out = lines[..place.unwrap_or(end)].to_vec();
    out.push(&row);
    out.extend(&lines[place.map_or(end, |row| row + 1)..]);
    Some(out.join("\n") + "\n")
}

/// The beginning and the end of what is too long to be read in a table.
pub(crate) fn shortened(text: &str) -> String {
    const HEAD: usize = 60;
    const TAIL: usize = 200;
    let chars: Vec<char> = text.chars().filter(|c| *c != '\r').collect();
    if chars.len() <= HEAD + TAIL {
        return chars.into_iter().collect();
    }
    let part = |chars: &[char]| chars.iter().collect::<String>();
    let (head, tail) = (&chars[..HEAD], &chars[chars.len() - TAIL..]);
    format!("{} … {}", part(head), part(tail))
}

/// The commit that was judged, with `+` if anything but the docs was changed since.
pub(crate) fn revision() -> Result<String> {
    let git = |args: &[&str]| {
        let mut git = Command::new("git");
        git.current_dir(workspace::root()).args(args).output()
    };
    let output = git(&["describe", "--always", "--exclude=*"])?;
    ensure!(output.status.success(), "git knows no revision");
    let commit = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    // The rows before this one are no change.
    let same = git(&["diff", "--quiet", "HEAD", "--", ".", ":(exclude)docs"])?;
    let mark = if same.status.success() { "" } else { "+" };
    Ok(commit + mark)
}

/// The machine, and the share of its processors that others had meanwhile.
pub(crate) fn machine(others: f64) -> Result<String> {
    let count = thread::available_parallelism()?.get();
    let percent = others * 100.0;
    Ok(format!(
        "{count} processors, of which others had {percent:.0} %"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: &str = "|---|---|";

    #[test]
    fn long_failures_keep_their_beginning_and_their_end() {
        assert_eq!(shortened("short\r"), "short");
        let long = format!("first {} last", "x".repeat(1000));
        let short = shortened(&long);
        assert!(short.starts_with("first x") && short.ends_with("x last"));
        assert!(short.chars().count() < 300);
    }

    #[test]
    fn a_row_takes_the_place_of_its_forerunner() {
        let cells = |name: &str, value: &str| [name.to_owned(), value.to_owned()];
        let page = format!("# Title\n\n| a | b |\n{RULE}\n| one | 1 |\n| two | 2 |\n\nMore.\n");
        let page = with_row(&page, RULE, &cells("one", "7|\n8")).unwrap();
        let page = with_row(&page, RULE, &cells("three", "3")).unwrap();
        let rows = "| one | 7/ 8 |\n| two | 2 |\n| three | 3 |\n";
        assert_eq!(
            page,
            format!("# Title\n\n| a | b |\n{RULE}\n{rows}\nMore.\n")
        );
        assert!(with_row("no table", RULE, &cells("one", "1")).is_none());
    }
}
