//! The table of `docs/compatibility.md`.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::row::Row;
use crate::workspace;

const FILE: &str = "docs/compatibility.md";
/// The table's last line of heading; rows are below it, up to the next blank line.
const RULE: &str = "|---|---|---|---|---|---|---|---|";

/// Puts `row` into the table, in place of the program's old one.
pub(super) fn write(row: &Row) -> Result<()> {
    let path = workspace::root().join(FILE);
    let text = fs::read_to_string(&path).with_context(|| format!("no {FILE}"))?;
    fs::write(&path, with_line(&text, row.program.name, &line(row)?)?)?;
    Ok(())
}

fn line(row: &Row) -> Result<String> {
    let verdict = if row.failures.is_empty() {
        "same".to_owned()
    } else {
        format!("**differs**: {}", shortened(&row.failures.join("; ")))
    };
    let mut cells = vec![
        row.program.name.to_owned(),
        row.version.clone(),
        row.program.how.to_owned(),
    ];
    cells.extend(row.cells.iter().cloned());
    cells.push(verdict);
    cells.push(revision()?);
    let cells: Vec<String> = cells
        .iter()
        .map(|cell| cell.replace('|', "/").replace('\n', " "))
        .collect();
    Ok(format!("| {} |", cells.join(" | ")))
}

/// The beginning and the end of what is too long to be read in a table.
fn shortened(text: &str) -> String {
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

fn with_line(text: &str, name: &str, line: &str) -> Result<String> {
    let lines: Vec<&str> = text.lines().collect();
    let rule = lines.iter().position(|line| *line == RULE);
    let first = rule.with_context(|| format!("{FILE} has no table"))? + 1;
    let rows = lines[first..]
        .iter()
        .take_while(|line| line.starts_with('|'));
    let end = first + rows.count();
    let start = format!("| {name} |");
    let place = (first..end).find(|row| lines[*row].starts_with(&start));
    let mut out = lines[..place.unwrap_or(end)].to_vec();
    out.push(line);
    out.extend(&lines[place.map_or(end, |row| row + 1)..]);
    Ok(out.join("\n") + "\n")
}

/// The commit that was judged, and whether anything was changed since.
fn revision() -> Result<String> {
    let output = Command::new("git")
        .current_dir(workspace::root())
        .args(["describe", "--always", "--dirty=+", "--exclude=*"])
        .output()?;
    ensure!(output.status.success(), "git knows no revision");
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let page = format!("# Title\n\n| a |\n{RULE}\n| one | 1 |\n| two | 2 |\n\nMore.\n");
        let page = with_line(&page, "one", "| one | 7 |").unwrap();
        let page = with_line(&page, "three", "| three | 3 |").unwrap();
        let rows = "| one | 7 |\n| two | 2 |\n| three | 3 |\n";
        assert_eq!(page, format!("# Title\n\n| a |\n{RULE}\n{rows}\nMore.\n"));
        assert!(with_line("no table", "one", "| one |").is_err());
    }
}
