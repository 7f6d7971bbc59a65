//! `dcm`: run programs on dynamic CXL capacity, serve a device, look at both.

mod attach;
mod capacity;
mod conf;
mod devices;
mod emulate;
mod failure;
mod keeper;
mod live;
mod log;
mod orders;
mod picture;
mod run;
mod serve;
mod signals;
mod size;
mod sockets;
mod top;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Run programs on dynamic CXL capacity.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 100)]
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
    /// Have capacity added to a broker's device
    Add(orders::AddOptions),
    /// Have capacity given back to the device; prints a receipt
    Release(orders::ReleaseOptions),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(options) => run::run(&options),
        Command::Serve(options) => serve::serve(&options).map(|()| 0),
        Command::Devices(options) => devices::devices(&options).map(|()| 0),
        Command::Status(options) => orders::status(&options).map(|()| 0),
        Command::Top(options) => top::top(&options).map(|()| 0),
        Command::Add(options) => orders::add(&options).map(|()| 0),
        Command::Release(options) => orders::release(&options).map(|()| 0),
    };
    match result {
        Ok(code) => code.into(),
        Err(failure) => {
            eprintln!("dcm: {failure}");
            failure.code().into()
        }
    }
}
