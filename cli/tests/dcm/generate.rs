//! Man pages and completion scripts, made from the command line's definition.

use std::fs;
use std::process::Command;

use allocator::config::KEYS;

use crate::call::Dcm;

#[test]
fn every_subcommand_has_a_man_page_and_every_setting_is_in_one() {
    let dcm = Dcm::new();
    let pages = dcm.directory.path().join("man1");
    dcm.ok(&["man", pages.to_str().unwrap()]);
    let help = dcm.ok(&["--help"]);
    let commands = help.split_once("Commands:").unwrap().1;
    let commands = commands.split_once("Options:").unwrap().0;
    let commands: Vec<&str> = commands
        .lines()
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .collect();
    assert!(commands.contains(&"doctor"), "{help}");
    for name in &commands {
        let page = fs::read_to_string(pages.join(format!("dcm-{name}.1"))).unwrap();
        assert!(page.contains(".SH SYNOPSIS"), "{name}: {page}");
    }
    assert_eq!(fs::read_dir(&pages).unwrap().count(), commands.len() + 1);
    let run = fs::read_to_string(pages.join("dcm-run.1")).unwrap();
    for key in KEYS {
        // Roff escapes no underscore, and hyphens are in no key.
        assert!(run.contains(&format!("\\fB{}\\fR", key.name)), "{run}");
    }
}

/// The page is for man(1), so man(1) judges it, where there is one.
#[test]
fn man_shows_the_pages() {
    let dcm = Dcm::new();
    let pages = dcm.directory.path().join("man1");
    dcm.ok(&["man", pages.to_str().unwrap()]);
    let shown = Command::new("man")
        .args(["--pager", "cat", "--warnings", "--local-file"])
        .arg(pages.join("dcm-run.1"))
        .env("MANWIDTH", "80")
        .output();
    let Ok(shown) = shown else {
        println!("SKIPPED: there is no man here");
        return;
    };
    let text = String::from_utf8_lossy(&shown.stdout);
    assert!(
        shown.status.success() && shown.stderr.is_empty(),
        "{shown:?}"
    );
    for part in ["SYNOPSIS", "--placement", "SETTINGS", "on_exhausted"] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
}

#[test]
fn completion_scripts_know_the_subcommands() {
    let dcm = Dcm::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = dcm.ok(&["completions", shell]);
        for name in ["run", "serve", "doctor", "release"] {
            assert!(script.contains(name), "{shell} lacks {name}");
        }
    }
    assert_eq!(dcm.call(&["completions", "csh"]).status.code(), Some(2));
}
