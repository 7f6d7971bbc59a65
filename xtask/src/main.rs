//! `cargo xtask`: every task of this repository, one file per task.

#![deny(unsafe_code)]

mod api;
mod bench;
mod broker;
mod compat;
mod demo;
mod docs;
mod fuzz;
mod guest;
mod header;
mod install;
mod man;
mod others;
mod packages;
mod page;
mod pictures;
mod process;
mod program;
mod rung;
mod soak;
mod stats;
mod test;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "The tasks of this repository")]
struct Options {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Run the rungs of the test ladder, all or those named
    Test(test::Options),
    /// Run every command and code block of the pages as written
    Docs(docs::Options),
    /// Make the man pages and shell completions
    Man,
    /// Take the pictures of the docs: the live page and dcm top during a storm of releases
    Pictures,
    /// Show the whole: a software device, a workload on it, capacity taken back
    Demo,
    /// Compare with jemalloc on our workload programs; options as of `compare --help`
    Bench(bench::Options),
    /// Judge programs by their own test suites, and write docs/compatibility.md
    Compat(compat::Options),
    /// Run the storms at their full length, and write docs/soak.md
    Soak(soak::Options),
    /// Feed parsers, driver and broker what a fuzzer thinks of, and write docs/fuzz.md
    Fuzz(fuzz::Options),
    /// Make include/dcmalloc.h from its source
    Header(header::Options),
    /// Make the lists of what the library crates offer, api.txt, from their source
    Api(api::Options),
    /// Install dcm with its man pages, completions and systemd units, the libraries and the headers
    Install(install::Options),
    /// A machine with a CXL device, emulated by QEMU
    #[command(subcommand)]
    Guest(guest::Task),
}

fn main() -> ExitCode {
    let result = match Options::parse().task {
        Task::Test(options) => test::run(&options),
        Task::Docs(options) => docs::run(&options),
        Task::Man => man::run(),
        Task::Pictures => pictures::run(),
        Task::Demo => demo::run().map(|()| true),
        Task::Bench(options) => bench::run(&options),
        Task::Compat(options) => compat::run(&options),
        Task::Soak(options) => soak::run(&options),
        Task::Fuzz(options) => fuzz::run(&options),
        Task::Header(options) => header::run(&options),
        Task::Api(options) => api::run(&options),
        Task::Install(options) => install::run(&options),
        Task::Guest(task) => guest::run(&task),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
