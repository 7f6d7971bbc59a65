//! gcc compiles a generated file: a driver that starts other programs, each with a heap of its own.

use std::fmt::Write;
use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::{OnExtents, verbatim};
use crate::process;

const LIMIT: Duration = Duration::from_secs(180);

pub(super) fn judge() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let source = generated();
    ensure!(
        source.lines().count() >= 5000,
        "the source has only {} lines",
        source.lines().count()
    );
    fs::write(dir.path().join("generated.c"), source)?;
    let gcc = |object: &str| {
        let mut gcc = Command::new("gcc");
        gcc.current_dir(dir.path())
            .args(["-O2", "-Wall", "-c", "generated.c", "-o", object]);
        gcc
    };
    let mut ours = OnExtents::new(&gcc("with.o"))?;
    let with = process::run(&mut ours.command, LIMIT)?;
    let without = process::run(&mut gcc("without.o"), LIMIT)?;
    ensure!(
        without.success() && !without.stderr.is_empty(),
        "gcc without us gave no warning to compare"
    );
    ours.judge(&with, &without, verbatim)?;
    ensure!(
        fs::read(dir.path().join("with.o"))? == fs::read(dir.path().join("without.o"))?,
        "the object files differ"
    );
    Ok(())
}

/// Functions that call each other, loop and branch, some with a variable that -Wall complains of.
fn generated() -> String {
    let mut source = String::from(
        "#include <string.h>\nstruct node { int key; double weight; struct node *next; };\n",
    );
    for i in 0..420 {
        let previous = if i == 0 {
            "(int)weight".to_owned()
        } else {
            format!("walk_{}(list, limit - 1)", i - 1)
        };
        let unused = if i % 60 == 0 {
            "    int forgotten;\n"
        } else {
            ""
        };
        // Writing into a String can't fail.
        let _ = write!(
            source,
            "int walk_{i}(struct node *list, int limit) {{
{unused}    double weight = {i}.5;
    int table[16] = {{{i}}};
    for (struct node *at = list; at && limit > 0; at = at->next, limit--) {{
        switch (at->key % 5) {{
        case 0: weight += at->weight * table[limit & 15]; break;
        case 1: weight -= {i} / (at->weight + 1); break;
        case 2: table[at->key & 15] += {previous}; break;
        default: memset(table, at->key, sizeof table); break;
        }}
    }}
    return (int)weight + table[3];
}}
"
        );
    }
    source
}
