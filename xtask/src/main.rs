//! Set-up, build, run, test and bench commands of this repository: `cargo xtask --help`.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};

mod kernel_test;
mod layers;
mod setup;
mod sh;
mod suite;

use sh::{cargo, root, step};

/// Set-up, build, run, test and bench commands of this repository.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what building and testing need: packages, bpf-linker, rust-src, the bpffs mount.
    Setup,
    /// Run the main job: in a lab of network namespaces, or on this host with `-- -c FILE`.
    Run {
        /// Check the main job without a person, print one table, exit 0 or 1.
        #[arg(long, conflicts_with = "daemon")]
        smoke: bool,
        /// Arguments of `edge-ctl run`, to run the daemon on this host.
        #[arg(last = true)]
        daemon: Vec<String>,
    },
    /// Run all tests: unit, dataplane, scenarios.
    Test {
        /// Full counts of requests and connections in the scenarios.
        #[arg(long)]
        full: bool,
    },
    /// Build the eBPF object.
    BuildEbpf,
    /// The network of namespaces: up, down, scale N, stop NODE, start NODE, shell HOST, dns MODE, status.
    Lab {
        /// Arguments of `edge-lab`.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Benchmarks of the dataplane, or end to end.
    Bench {
        /// Write the figures to this file.
        #[arg(long)]
        json: Option<PathBuf>,
        /// End to end through the lab instead of the dataplane.
        #[arg(long)]
        e2e: bool,
        /// Health checks of 5,000 backends instead of the dataplane.
        #[arg(long, conflicts_with = "e2e")]
        health: bool,
        /// 1,000 services of 50 backends instead of the dataplane.
        #[arg(long, conflicts_with_all = ["e2e", "health"])]
        pools: bool,
        /// A full table by BGP, beside BIRD, instead of the dataplane.
        #[arg(long, conflicts_with_all = ["e2e", "health", "pools"])]
        bgp: bool,
        /// Prefixes of that table.
        #[arg(long, default_value_t = 1_000_000, requires = "bgp")]
        routes: u32,
        /// Of the dataplane's, those whose name contains one of these words.
        #[arg(long, default_value = "", conflicts_with_all = ["e2e", "health", "pools", "bgp"])]
        only: String,
    },
    /// Random packets through the loaded program, compared with the reference model.
    FuzzDatapath {
        /// Packets at each hook.
        #[arg(long, default_value_t = 10_000_000)]
        packets: u64,
        /// Repeat the run of this seed; a fresh one where none is given.
        #[arg(long)]
        seed: Option<String>,
        /// xdp or tc; both where not given.
        #[arg(long)]
        hook: Option<String>,
    },
    /// Load the eBPF object and run the dataplane tests on another kernel, in QEMU.
    KernelTest(kernel_test::Options),
    /// Check that imports go one way only.
    CheckLayers,
}

fn main() -> ExitCode {
    match execute(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(command: Command) -> Result<ExitCode> {
    match command {
        Command::Setup => setup::run()?,
        Command::Run { smoke, daemon } => {
            setup::run()?;
            build_release()?;
            if !daemon.is_empty() {
                step("run the daemon on this host");
                return sh::pass_through(sh::as_root(&release("edge-ctl")).arg("run").args(daemon));
            }
            step(if smoke { "run the smoke checks in the lab" } else { "run the lab" });
            return sh::pass_through(sh::as_root(&release("edge-lab")).arg(if smoke { "smoke" } else { "run" }));
        }
        Command::Test { full } => {
            setup::run()?;
            return suite::run(full);
        }
        Command::BuildEbpf => {
            setup::for_building()?;
            step("build the eBPF object");
            let mut command = cargo();
            command.args(["build", "--release", "--locked", "--bins", "--target-dir"]).arg(root().join("target/ebpf"));
            sh::run(command.current_dir(root().join("edge-ebpf")).env("RUSTC_BOOTSTRAP", "1"))?;
            println!("{}", root().join("target/ebpf/bpfel-unknown-none/release/edge-ebpf").display());
            step("what this kernel's verifier says of it");
            sh::run(cargo().args(["build", "--quiet", "--locked", "--package", "edge-tests", "--bin", "edge-lab"]))?;
            return sh::pass_through(sh::as_root(&root().join("target/debug/edge-lab")).arg("kernel-facts"));
        }
        Command::Lab { arguments } => {
            step("build edge-lab");
            sh::run(cargo().args([
                "build",
                "--quiet",
                "--locked",
                "--package",
                "edge-tests",
                "--package",
                "edge-ctl",
            ]))?;
            return sh::pass_through(sh::as_root(&root().join("target/debug/edge-lab")).args(arguments));
        }
        Command::Bench { json, e2e, health, pools, bgp, routes, only } => {
            setup::run()?;
            build_release()?;
            step("measure");
            let mut command = sh::as_root(&release("edge-lab"));
            command.arg("bench");
            if e2e {
                command.arg("--e2e");
            }
            if health {
                command.arg("--health");
            }
            if pools {
                command.arg("--pools");
            }
            if bgp {
                command.args(["--bgp", "--routes", &routes.to_string()]);
            }
            if !only.is_empty() {
                command.args(["--only", &only]);
            }
            if let Some(path) = json {
                command.arg("--json").arg(path);
            }
            return sh::pass_through(&mut command);
        }
        Command::FuzzDatapath { packets, seed, hook } => {
            setup::run()?;
            build_release()?;
            step("compare the program with the reference model");
            let mut command = sh::as_root(&release("edge-fuzz-datapath"));
            command.arg("--packets").arg(packets.to_string());
            for (option, value) in [("--seed", seed), ("--hook", hook)] {
                command.args(value.iter().flat_map(|value| [option, value.as_str()]));
            }
            return sh::pass_through(&mut command);
        }
        Command::KernelTest(options) => return kernel_test::run(&options),
        Command::CheckLayers => return layers::run(),
    }
    Ok(ExitCode::SUCCESS)
}

fn build_release() -> Result<()> {
    step("build edge-ctl and edge-lab (release)");
    sh::run(cargo().args(["build", "--release", "--locked", "--package", "edge-ctl", "--package", "edge-tests"]))
}

fn release(name: &str) -> PathBuf {
    root().join("target/release").join(name)
}
