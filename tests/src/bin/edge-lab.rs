//! `edge-lab`: the network of the first seed as a command. `cargo xtask lab|run|bench` call it.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, time::Instant};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use edge_tests::{
    bench::{self, What},
    kernel_facts,
    lab::{Lab, Speaker, dns::DnsMode, dns_server, echo, exec, smoke, topology},
};

#[path = "edge-lab/run.rs"]
mod run;

/// The network of the first seed, out of network namespaces.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build the network and leave it running.
    Up {
        /// Ingress pods in the service.
        #[arg(long, default_value_t = 1)]
        replicas: usize,
        /// BGP speaker of the nodes.
        #[arg(long, value_enum, default_value_t = SpeakerArgument::Bird)]
        speaker: SpeakerArgument,
    },
    /// Take the network down.
    Down,
    /// Set the number of ingress pods, as Kubernetes would.
    Scale {
        /// Ingress pods in the service.
        replicas: usize,
    },
    /// Stop a node: BGP speaker, then link.
    Stop {
        /// kcontrol, knode1 or knode2.
        node: String,
    },
    /// Start a stopped node.
    Start {
        /// kcontrol, knode1 or knode2.
        node: String,
    },
    /// Run a command, or a shell, in a host.
    Shell {
        /// client, client2, router, edge, kcontrol, knode1, knode2, fabric, ingress-N, kube-dns-N.
        host: String,
        /// The command; a shell without one.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// How kube-dns behaves: `normal`, `servfail`, `refused`, `silent`.
    Dns {
        /// Behaviour.
        mode: DnsArgument,
    },
    /// What is up.
    Status,
    /// Build a network, run the daemon in it, check the main job, take everything down.
    Smoke,
    /// Build a network, run the daemon in it until Ctrl-C, take everything down.
    Run,
    /// Benchmarks of the dataplane, or end to end through the network.
    Bench {
        /// End to end instead of the dataplane.
        #[arg(long)]
        e2e: bool,
        /// Health checks of 5,000 backends instead of the dataplane.
        #[arg(long, conflicts_with = "e2e")]
        health: bool,
        /// 1,000 services of 50 backends instead of the dataplane.
        #[arg(long, conflicts_with_all = ["e2e", "health"])]
        pools: bool,
        /// A full table by BGP instead of the dataplane.
        #[arg(long, conflicts_with_all = ["e2e", "health", "pools"])]
        bgp: bool,
        /// Prefixes of that table.
        #[arg(long, default_value_t = 1_000_000, requires = "bgp")]
        routes: u32,
        /// Of the dataplane's, those whose name contains one of these words.
        #[arg(long, default_value = "", conflicts_with = "e2e")]
        only: String,
        /// Write the figures to this file too.
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// What this kernel's verifier says of the programs.
    KernelFacts,
    /// The DNS server of a kube-dns pod.
    #[command(hide = true)]
    DnsServer {
        #[arg(long)]
        listen: SocketAddr,
        #[arg(long)]
        zone: PathBuf,
    },
    /// The UDP echo of an ingress pod.
    #[command(hide = true)]
    UdpEcho {
        #[arg(long)]
        listen: SocketAddr,
        #[arg(long)]
        name: String,
    },
    /// The TCP line echo of an ingress pod.
    #[command(hide = true)]
    TcpEcho {
        #[arg(long)]
        listen: SocketAddr,
        #[arg(long)]
        name: String,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum SpeakerArgument {
    Bird,
    Frr,
}

#[derive(Clone, Copy, ValueEnum)]
enum DnsArgument {
    Normal,
    Servfail,
    Refused,
    Silent,
}

fn main() -> ExitCode {
    match execute(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("edge-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(command: Command) -> Result<ExitCode> {
    match command {
        Command::Up { replicas, speaker } => up(replicas, speaker)?,
        Command::Down => Lab::current()?.down()?,
        Command::Scale { replicas } => {
            let mut lab = Lab::current()?;
            lab.scale(replicas)?;
            println!("{replicas} ingress pods in the service");
        }
        Command::Stop { node } => Lab::current()?.stop_node(&node)?,
        Command::Start { node } => Lab::current()?.start_node(&node)?,
        Command::Shell { host, command } => return shell(&host, &command),
        Command::Dns { mode } => Lab::current()?.dns_mode(match mode {
            DnsArgument::Normal => DnsMode::Normal,
            DnsArgument::Servfail => DnsMode::Servfail,
            DnsArgument::Refused => DnsMode::Refused,
            DnsArgument::Silent => DnsMode::Silent,
        })?,
        Command::Status => status(&Lab::current()?)?,
        Command::Smoke => {
            let passed = smoke::run()?;
            return Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Command::Run => run::run()?,
        Command::Bench { e2e, health, pools, bgp, routes, only, json } => {
            let what = match (e2e, health, pools) {
                (true, ..) => What::EndToEnd,
                (_, true, _) => What::Health,
                (_, _, true) => What::Pools,
                _ if bgp => What::Bgp(routes),
                _ => What::Dataplane,
            };
            bench::run_and_print(what, &only, json.as_deref())?;
        }
        Command::KernelFacts => kernel_facts::print()?,
        Command::DnsServer { listen, zone } => dns_server::serve(listen, &zone)?,
        Command::UdpEcho { listen, name } => echo::udp(listen, &name)?,
        Command::TcpEcho { listen, name } => echo::tcp(listen, &name)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn up(replicas: usize, speaker: SpeakerArgument) -> Result<()> {
    Lab::none_is_up()?;
    let started = Instant::now();
    let speaker = match speaker {
        SpeakerArgument::Bird => Speaker::Bird,
        SpeakerArgument::Frr => Speaker::Frr,
    };
    let lab = Lab::up(speaker, replicas)?;
    status(&lab)?;
    lab.keep()?;
    println!("up in {:.1} s; `cargo xtask lab down` takes it down", started.elapsed().as_secs_f64());
    Ok(())
}

fn shell(host: &str, command: &[String]) -> Result<ExitCode> {
    let lab = Lab::current()?;
    let (program, arguments) = match command {
        [] => ("/bin/bash", &[][..]),
        [program, arguments @ ..] => (program.as_str(), arguments),
    };
    let mut command = lab.command(host, program)?;
    let status = command.args(arguments).status().with_context(|| format!("run {}", exec::show(&command)))?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

fn status(lab: &Lab) -> Result<()> {
    let state = &lab.state;
    println!("lab {}: folder {}, namespaces {}-HOST", state.prefix, lab.folder().display(), state.prefix);
    println!("{:<10} {:<14} {:<8} {:<14} BGP", "NODE", "ADDRESS", "STATE", "POD NETWORK");
    for node in topology::NODES {
        let stopped = state.stopped.contains(node.name);
        let peers = if stopped { "-".to_owned() } else { lab.established_peers(node.name)?.join(" ") };
        let address = node.address().to_string();
        let word = if stopped { "stopped" } else { "up" };
        println!("{:<10} {address:<14} {word:<8} {:<14} {peers}", node.name, node.block());
    }
    println!("{:<12} {:<12} {:<10} STATE", "POD", "ADDRESS", "NODE");
    let pods = (0..2).map(|index| (topology::kube_dns(index), "serving"));
    let ingress = state.pods.iter().map(|number| {
        (topology::ingress(*number), if *number <= state.replicas { "in DNS" } else { "terminating, not in DNS" })
    });
    for (pod, word) in pods.chain(ingress) {
        println!("{:<12} {:<12} {:<10} {word}", pod.name, pod.address.to_string(), pod.node.name);
    }
    ensure!(!lab.namespaces().is_empty(), "its namespaces are gone: `cargo xtask lab down` clears the rest");
    Ok(())
}
