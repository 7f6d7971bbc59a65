//! Man pages and completion scripts, made from the command line's definition.
#![forbid(unsafe_code)]

use std::fs;
use std::path::PathBuf;

use allocator::config::KEYS;
use anyhow::Context;
use clap::{Args, Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use crate::failure::Failure;
use crate::orders::print;
use crate::{Cli, conf, sockets};

/// Options of `dcm completions`.
#[derive(Debug, Args)]
pub(crate) struct CompletionOptions {
    /// For which shell
    shell: Shell,
}

/// Options of `dcm man`.
#[derive(Debug, Args)]
pub(crate) struct ManOptions {
    /// Where to: dcm.1 and a page for each subcommand
    #[arg(value_name = "DIRECTORY")]
    directory: PathBuf,
}

/// Prints a completion script.
pub(crate) fn completions(options: &CompletionOptions) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(options.shell, &mut Cli::command(), "dcm", &mut script);
    print(&String::from_utf8_lossy(&script))
}

/// Writes the man pages.
pub(crate) fn man(options: &ManOptions) -> Result<(), Failure> {
    fs::create_dir_all(&options.directory)
        .with_context(|| format!("cannot make {}", options.directory.display()))?;
    let mut cli = Cli::command().disable_help_subcommand(true);
    // Names the subcommands "dcm run" and so on.
    cli.build();
    let subcommands: Vec<Command> = cli
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
        .cloned()
        .collect();
    for command in subcommands.into_iter().chain([cli]) {
        let name = command.get_display_name().unwrap_or("dcm").to_owned();
        let path = options.directory.join(format!("{name}.1"));
        let page = page(command).with_context(|| format!("cannot make {name}.1"))?;
        fs::write(&path, page).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn page(command: Command) -> std::io::Result<Vec<u8>> {
    let name = command.get_display_name().unwrap_or("dcm").to_owned();
    let mut page = Vec::new();
    let man = Man::new(command).manual("dcmalloc");
    man.render(&mut page)?;
    let mut more = Roff::new();
    match &*name {
        "dcm" => {
            environment(&mut more);
            exit_status(
                &mut more,
                "2 when dcm was called wrongly, 1 when something went wrong, 0 else. dcm run passes on the exit code of the program, and has 128 and the signal's number for one that was ended by a signal, 127 for one that was not found, 126 for one that could not be started.",
            );
        }
        "dcm-run" => settings(&mut more),
        "dcm-doctor" => exit_status(
            &mut more,
            "1 when something is missing, 0 when all is there, also where it could be better.",
        ),
        _ => {}
    }
    page.extend(more.render().into_bytes());
    Ok(page)
}

fn environment(page: &mut Roff) {
    page.control("SH", ["ENVIRONMENT"]);
    for (name, says) in [
        (
            sockets::VARIABLE,
            "The broker's socket, unless --socket names one. Without either it is that of the machine's broker, or of the only one that is running.",
        ),
        (
            conf::VARIABLE,
            "Settings of the library, key:value,... as in dcm-run(1). They hold over those of the file.",
        ),
        (
            conf::FILE_VARIABLE,
            "The file of settings, instead of /etc/dcmalloc.conf: separated by commas or ends of lines, lines that begin with # being comments; less than 4 KiB.",
        ),
        (
            "DCM_PRELOAD",
            "The library that dcm run puts under programs, if it is neither beside dcm nor in ../lib.",
        ),
    ] {
        page.control("TP", []);
        page.text([bold(name)]);
        page.text([roman(says)]);
    }
}

fn exit_status(page: &mut Roff, says: &str) {
    page.control("SH", ["EXIT STATUS"]);
    page.text([roman(says)]);
}

/// The table of settings, from the allocator's own.
fn settings(page: &mut Roff) {
    page.control("SH", ["SETTINGS"]);
    page.text([roman("What --conf and the variable DCMALLOC_CONF take:")]);
    for key in KEYS {
        page.control("TP", []);
        page.text([bold(key.name), roman(format!(": {}", key.values))]);
        page.text([roman(format!(
            "{}; {} if nothing is said",
            key.help, key.default
        ))]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A key that somebody adds is in the page too, in the same words.
    #[test]
    fn the_tuning_page_has_the_table_of_settings() {
        let page = include_str!("../../docs/tuning.md");
        let rows = KEYS.iter().map(|key| {
            let values = key.values.replace('|', "\\|");
            format!(
                "| `{}` | `{values}` | `{}` | {} |\n",
                key.name, key.default, key.help
            )
        });
        let table: String = rows.collect();
        assert!(
            page.contains(&format!("|---|---|---|---|\n{table}\n")),
            "docs/tuning.md is to have this table:\n{table}"
        );
    }
}
