//! `edge-ctl`: wires the library's layers together and leaves.

use std::{
    collections::BTreeSet,
    io::IsTerminal as _,
    net::{IpAddr, Ipv4Addr},
    path::Path,
    process::ExitCode,
    thread::available_parallelism,
};

use edge_ctl::{
    cli::{self, CheckedConfig, Exit, KernelViews, Wiring},
    config::{self, lint, memory},
    daemon,
    datapath::{
        answer::answer_from_pins, capture::PerfTap, kernel_view::KernelView, object::EBPF_OBJECT, own_addresses, pins,
    },
    model::{
        capture::Tap,
        query::{Answer, Query, ViewError},
    },
    reconcile::ports::PortError,
};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let wiring = Wiring { run: &run, check: &check, kernel: &Pins, tap: &tap };
    cli::main(std::env::args_os(), &wiring).into()
}

fn run(file: &Path) -> Exit {
    logging();
    match daemon::run(file) {
        Ok(()) => Exit::Ok,
        Err(error) => {
            eprintln!("edge-ctl: {error}");
            if matches!(error, daemon::StartError::Config(_)) { Exit::Usage } else { Exit::Error }
        }
    }
}

/// Log lines on standard error, `RUST_LOG` as filter; without colours where it is not a terminal (journald, files).
fn logging() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let ansi = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi).init();
}

fn check(file: &Path) -> Result<CheckedConfig, Vec<String>> {
    let config = config::load(file).map_err(|error| error.lines())?;
    let cpus = possible_cpus();
    let frontends: usize = config.services.values().map(|service| service.listen.len()).sum();
    let peers = config.bgp.as_ref().map_or(0, |bgp| bgp.peers.len());
    Ok(CheckedConfig {
        socket: config.edge.socket.clone(),
        pin_path: config.edge.pin_path.clone(),
        summary: [
            counted(config.services.len(), "service"),
            counted(frontends, "listen address"),
            counted(config.resolvers.len(), "resolver"),
            counted(peers, "BGP peer"),
            format!("on {}", config.edge.interfaces.join(", ")),
        ]
        .join(", "),
        memory: memory::estimate(&config.edge.tables, cpus)
            .into_iter()
            .map(|map| (map.name.to_owned(), u64::from(map.entries), map.bytes))
            .collect(),
        warnings: {
            let mut warnings = lint::warnings(&config);
            warnings.extend(lint::unconnected(&config, &connected_networks()));
            warnings.extend(lint::not_dedicated(&config, &interface_addresses()));
            warnings
        },
    })
}

/// Addresses on this host's interfaces other than `lo`, whose number is 1 everywhere; empty where they cannot be read.
fn interface_addresses() -> BTreeSet<IpAddr> {
    let addresses = own_addresses::list().unwrap_or_default();
    addresses.into_iter().filter(|(ifindex, _)| *ifindex != 1).map(|(_, address)| address).collect()
}

/// IPv4 networks on this host's interfaces, from the kernel's table; empty where it cannot be read.
fn connected_networks() -> Vec<ipnet::IpNet> {
    let text = std::fs::read_to_string("/proc/net/route").unwrap_or_default();
    let network = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, destination, gateway, _, _, _, _, mask, ..] = fields.as_slice() else { return None };
        // Hexadecimal words as they stand in memory: network order, read as the host's.
        let word = |text: &str| u32::from_str_radix(text, 16).ok().map(|word| Ipv4Addr::from(word.to_ne_bytes()));
        let (address, mask) = (word(destination)?, word(mask)?);
        let connected = *gateway == "00000000" && !mask.is_unspecified();
        ipnet::Ipv4Net::with_netmask(address, mask).ok().filter(|_| connected).map(ipnet::IpNet::V4)
    };
    text.lines().skip(1).filter_map(network).collect()
}

fn counted(count: usize, noun: &str) -> String {
    match (count, noun.ends_with('s')) {
        (1, _) => format!("1 {noun}"),
        (_, true) => format!("{count} {noun}es"),
        (_, false) => format!("{count} {noun}s"),
    }
}

/// CPUs that the kernel could bring up: what per-CPU maps are sized by. The file holds ranges such as `0-3` or `0,2-5`.
fn possible_cpus() -> u32 {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible").unwrap_or_default();
    let last = text.trim().rsplit([',', '-']).next().and_then(|last| last.parse::<u32>().ok());
    let online = || available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(1));
    last.map_or_else(online, |last| last.saturating_add(1))
}

/// The capture of the datapath pinned under `root`.
fn tap(root: &Path) -> Result<Box<dyn Tap>, String> {
    let pins = pins::Pins::new(root, EBPF_OBJECT).map_err(|error| error.to_string())?;
    Ok(Box::new(PerfTap::open(&pins).map_err(|error| error.to_string())?))
}

/// Answers from the pinned maps.
struct Pins;

impl KernelViews for Pins {
    fn answer(&self, pins: &Path, query: &Query) -> Result<Answer, ViewError> {
        let unreadable = |error: PortError| ViewError::Unavailable(error.to_string());
        answer_from_pins(&KernelView::open(pins, EBPF_OBJECT).map_err(unreadable)?, query)
    }
}
