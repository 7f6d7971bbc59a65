//! `dcm`: run programs on dynamic CXL capacity, serve a device, look at both.

mod activation;
mod attach;
mod capacity;
mod conf;
mod dax;
mod devices;
mod doctor;
mod emulate;
mod failure;
mod forks;
mod generate;
mod keeper;
mod live;
mod log;
mod manager;
mod marks;
mod node;
mod orders;
mod picture;
mod run;
mod serve;
mod signals;
mod size;
mod sockets;
mod top;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Run programs on dynamic CXL capacity.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a program with its heap on dynamic capacity; its exit code is passed on
    Run(run::Options),
    /// Own a device and lend its capacity to programs
    Serve(serve::Options),
    /// List the CXL memory devices of this machine, and make them ready
    Devices(devices::Options),
    /// Show a broker: its device, its extents, who holds what
    Status(orders::StatusOptions),
    /// Watch a broker: extents as a map, processes, recalls, receipts, stalls; q ends it
    Top(top::Options),
    /// Tell what this machine has and lacks for running, why it matters and what mends it; exits
    /// with 1 if something is missing
    Doctor(doctor::Options),
    /// Have capacity added to a broker's device
    Add(orders::AddOptions),
    /// Have capacity given back to the device; prints a receipt
    Release(orders::ReleaseOptions),
    /// Print a completion script: `eval "$(dcm completions bash)"`
    Completions(generate::CompletionOptions),
    /// Write the man pages into a directory
    #[command(hide = true)]
    Man(generate::ManOptions),
    /// Serve the forks of one process
    #[command(hide = true)]
    ServeForks(forks::Options),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(options) => run::run(&options),
        Command::Serve(options) => serve::serve(&options).map(|()| 0),
        Command::Devices(options) => devices::devices(&options).map(|()| 0),
        Command::Status(options) => orders::status(&options).map(|()| 0),
        Command::Top(options) => top::top(&options).map(|()| 0),
        Command::Doctor(options) => doctor::doctor(&options),
        Command::Completions(options) => generate::completions(&options).map(|()| 0),
        Command::ServeForks(options) => forks::serve(&options).map(|()| 0),
        Command::Man(options) => generate::man(&options).map(|()| 0),
        Command::Add(options) => orders::add(&options).map(|()| 0),
        Command::Release(options) => orders::release(&options).map(|()| 0),
    };
    match result {
        Ok(code) => code.into(),
        Err(failure) => {
            // Nobody may be left to tell.
            let _ = writeln!(io::stderr(), "dcm: {failure}");
            failure.code().into()
        }
    }
}
