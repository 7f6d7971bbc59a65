//! `cargo xtask header`: `include/dcmalloc.h`, made from `ffi/c`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use cbindgen::{Config, EnumConfig, Language, Style};

use crate::workspace;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Write nothing, and fail if the header is not what it should be
    #[arg(long)]
    check: bool,
}

const TOP: &str = "/*
 * dcmalloc: memory that can be taken back while it is in use.
 *
 * Made from ffi/c by `cargo xtask header`.
 */";

/// Whether the header is as it should be.
pub(crate) fn run(options: &Options) -> Result<bool> {
    if options.check {
        let same = is_current()?;
        if !same {
            eprintln!("{}: make it anew with cargo xtask header", path().display());
        }
        return Ok(same);
    }
    fs::write(path(), generate()?).context("can't write the header")?;
    Ok(true)
}

/// Whether the checked-in header is what the source says.
pub(crate) fn is_current() -> Result<bool> {
    let there = fs::read_to_string(path()).unwrap_or_default();
    Ok(there == generate()?)
}

fn path() -> PathBuf {
    workspace::root().join("include/dcmalloc.h")
}

fn generate() -> Result<String> {
    let config = Config {
        language: Language::C,
        cpp_compat: true,
        header: Some(TOP.into()),
        include_guard: Some("DCMALLOC_H".into()),
        no_includes: true,
        sys_includes: ["stddef.h", "stdint.h"].map(String::from).into(),
        usize_is_size_t: true,
        style: Style::Both,
        documentation_style: cbindgen::DocumentationStyle::C,
        line_length: 100,
        enumeration: EnumConfig {
            prefix_with_name: false,
            ..EnumConfig::default()
        },
        ..Config::default()
    };
    let bindings = cbindgen::Builder::new()
        .with_config(config)
        .with_crate(workspace::root().join("ffi/c"))
        .generate()
        .context("cbindgen")?;
    let mut text = Vec::new();
    bindings.write(&mut text);
    // What a Rust reader expects under that heading.
    Ok(String::from_utf8(text)?.replace("# Safety", "Required:"))
}
