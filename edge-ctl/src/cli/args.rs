//! Arguments. Noun first (`service list`); `get`, `describe` and `show` lead to the same commands for hands that learnt
//! kubectl or vtysh, and any unambiguous prefix will do.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::acl::AclVerb;
use super::dns::DnsVerb;
use super::flows::{Client, KillArgs};
use super::orders::{One, Order};
use super::sessions::{MessagesArgs, Target, message};
use crate::model::query::DEFAULT_LIMIT;

/// Layer-4 load balancer for the edge of on-premises Kubernetes: the daemon, and the views into it.
#[derive(Debug, Parser)]
#[command(
    name = "edge-ctl",
    version,
    infer_subcommands = true,
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = "Exit codes: 0 ok, 1 error, 2 wrong arguments or configuration, 3 degraded (status)."
)]
pub(super) struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Flags that every command takes.
#[derive(Clone, Debug, Args)]
pub(super) struct Global {
    /// Configuration file; also tells where socket and pins are [default: /etc/edge/edge.toml]
    #[arg(short, long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Format of the output
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Table)]
    pub output: Output,
    /// Show again whenever it changes, until interrupted
    #[arg(short, long, global = true)]
    pub watch: bool,
    /// Leave the line of column names out
    #[arg(long, global = true)]
    pub no_headers: bool,
    /// Sort rows by this column
    #[arg(long, global = true, value_name = "COLUMN")]
    pub sort_by: Option<String>,
    /// The daemon's socket [default: /run/edge/edge.sock, or the one of -c FILE]
    #[arg(long, global = true, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Read the pinned maps instead of asking the daemon: works with the daemon dead
    #[arg(long, global = true)]
    pub kernel: bool,
    /// Folder of the pins, for --kernel [default: /sys/fs/bpf/edge, or the one of -c FILE]
    #[arg(long, global = true, value_name = "FOLDER")]
    pub pin_path: Option<PathBuf>,
    /// Colour what is not as it should be
    #[arg(long, global = true, value_enum, default_value_t = Colour::Auto)]
    pub color: Colour,
    /// How long the daemon may take to answer
    #[arg(long, global = true, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub timeout: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Output {
    /// Columns
    Table,
    /// More columns
    Wide,
    /// An array of objects
    Json,
    /// The same in YAML
    Yaml,
    /// KIND/NAME, one for each line
    Name,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Colour {
    Auto,
    Always,
    Never,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text.trim_end_matches('s').parse().map_err(|_| "expected seconds, such as 10 or 0.5")?;
    match Duration::try_from_secs_f64(number) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => Err("expected more than zero seconds".into()),
    }
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run the daemon in the foreground
    Run,
    /// The daemon in one screen; exit code 3 where it is degraded
    Status,
    /// Services: what clients connect to
    #[command(visible_alias = "svc", alias = "services", infer_subcommands = true)]
    Service {
        #[command(subcommand)]
        verb: Option<ServiceVerb>,
    },
    /// Backends: the pods behind services
    #[command(alias = "backends", infer_subcommands = true)]
    Backend {
        #[command(subcommand)]
        verb: Option<BackendVerb>,
    },
    /// Health checks
    #[command(infer_subcommands = true)]
    Health {
        #[command(subcommand)]
        verb: Option<HealthVerb>,
    },
    /// Flows in the tables of the program
    #[command(alias = "flows", infer_subcommands = true)]
    Flow {
        #[command(subcommand)]
        verb: Option<FlowVerb>,
    },
    /// Source ranges: who may use which service
    #[command(infer_subcommands = true)]
    Acl {
        #[command(subcommand)]
        verb: Option<AclVerb>,
    },
    /// Names asked of the resolvers
    #[command(infer_subcommands = true)]
    Dns {
        #[command(subcommand)]
        verb: Option<DnsVerb>,
    },
    /// BGP sessions and routes
    #[command(infer_subcommands = true)]
    Bgp {
        #[command(subcommand)]
        verb: Option<BgpVerb>,
    },
    /// Routes in the kernel
    #[command(alias = "routes", infer_subcommands = true)]
    Route {
        #[command(subcommand)]
        verb: Option<ListVerb>,
    },
    /// BPF maps
    #[command(alias = "maps", infer_subcommands = true)]
    Map {
        #[command(subcommand)]
        verb: Option<MapVerb>,
    },
    /// The program and where it is attached
    #[command(infer_subcommands = true)]
    Xdp {
        #[command(subcommand)]
        verb: Option<XdpVerb>,
    },
    /// The newest ends of flows and dropped packets (a sample of those); -w follows
    Events,
    /// Copy a service's packets, before and after rewriting, into a pcapng file: XDP traffic that tcpdump does not see
    Capture(super::capture::CaptureArgs),
    /// The configuration
    #[command(infer_subcommands = true)]
    Config {
        #[command(subcommand)]
        verb: ConfigVerb,
    },
    /// Read the configuration again and apply it; on any error the running one stays
    Reload,
    /// Versions of this program and of the daemon
    Version,
    /// As kubectl: get services, get backends, get flows
    #[command(infer_subcommands = true)]
    Get {
        #[command(subcommand)]
        noun: GetNoun,
    },
    /// As kubectl: describe service NAME
    #[command(infer_subcommands = true)]
    Describe {
        #[command(subcommand)]
        noun: DescribeNoun,
    },
    /// As vtysh: show bgp summary, show ip route, show running-config
    #[command(infer_subcommands = true)]
    Show {
        #[command(subcommand)]
        noun: ShowNoun,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum ListVerb {
    /// List them
    #[command(alias = "ls")]
    List,
}

#[derive(Debug, Subcommand)]
pub(super) enum ServiceVerb {
    /// List them
    #[command(alias = "ls")]
    List {
        /// Only this service
        service: Option<String>,
    },
    /// Everything about one service
    Describe {
        /// Its name
        service: String,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum BackendVerb {
    /// List them
    #[command(alias = "ls")]
    List {
        /// Only those of this service
        service: Option<String>,
    },
    /// One backend: counters, checks, and each condition for being given flows
    Describe(One),
    #[command(flatten)]
    Order(Order),
}

#[derive(Debug, Subcommand)]
pub(super) enum HealthVerb {
    /// What checks say of each backend
    #[command(alias = "ls")]
    List {
        /// Only those of this service
        service: Option<String>,
    },
    /// What checks changed, newest first
    History {
        /// Only those of this service
        service: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum FlowVerb {
    /// List them
    #[command(alias = "ls")]
    List(FlowArgs),
    /// Those of one client
    Get {
        /// ADDRESS or ADDRESS:PORT
        client: Client,
    },
    /// How many are established
    Count {
        /// Only those of this service
        service: Option<String>,
    },
    /// End them: a connection's next packet is answered with RST, a datagram starts a new flow
    Kill(KillArgs),
}

#[derive(Debug, Args)]
pub(super) struct FlowArgs {
    /// Only those of this service
    pub service: Option<String>,
    /// At most so many
    #[arg(long, default_value_t = DEFAULT_LIMIT)]
    pub limit: usize,
}

#[derive(Debug, Subcommand)]
pub(super) enum BgpVerb {
    /// One line for each peer, as FRR shows it
    Summary,
    /// Peers with timers, policy counts and why the last session ended
    #[command(alias = "neighbors")]
    Peers,
    /// Everything about one peer
    #[command(alias = "neighbor")]
    Peer {
        /// Its address; a link-local one with its interface, `fe80::2%ens33`
        #[arg(value_parser = crate::model::scope::parse)]
        address: IpAddr,
    },
    /// End a session, which comes back at once; with --soft, tell and ask for all routes again instead
    Clear {
        #[command(flatten)]
        target: Target,
        /// The session stays
        #[arg(long)]
        soft: bool,
    },
    /// End a session until it is enabled again. Kept across restarts
    Shutdown {
        #[command(flatten)]
        target: Target,
        /// What the peer's operators read (RFC 9003)
        #[arg(long, value_parser = message)]
        message: Option<String>,
    },
    /// Let a session that was shut down come up again
    Enable {
        #[command(flatten)]
        target: Target,
    },
    /// The last messages of a peer, both ways
    Messages(MessagesArgs),
    /// Routes, with the reason why one is not best or not accepted
    #[command(infer_subcommands = true)]
    #[command(args_conflicts_with_subcommands = true)]
    Routes {
        /// Only paths to this prefix, or to the longest one with this address in it
        prefix: Option<String>,
        #[command(subcommand)]
        which: Option<Which>,
    },
    /// What policy says
    #[command(infer_subcommands = true)]
    Policy {
        #[command(subcommand)]
        verb: PolicyVerb,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum PolicyVerb {
    /// Ask a peer's policy about a path: the one that there is, or one with these attributes
    Test(PolicyArgs),
}

#[derive(Debug, Args)]
pub(super) struct PolicyArgs {
    /// Its address
    #[arg(value_parser = crate::model::scope::parse)]
    pub peer: IpAddr,
    /// What it sends, or what is announced to it
    #[arg(value_enum)]
    pub direction: Direction,
    /// The prefix
    pub prefix: ipnet::IpNet,
    /// AS numbers with spaces between
    #[arg(long, value_name = "NUMBERS")]
    pub as_path: Option<String>,
    /// A community; may be given more than once
    #[arg(long = "community", value_name = "COMMUNITY")]
    pub communities: Vec<crate::model::Community>,
    /// Next hop
    #[arg(long, value_name = "ADDRESS")]
    pub next_hop: Option<IpAddr>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Direction {
    /// What the peer sends
    In,
    /// What is announced to it
    Out,
}

#[derive(Debug, Subcommand)]
pub(super) enum Which {
    /// All paths that policy let in
    Available,
    /// What a peer sent, before policy
    Received {
        /// Only from this peer
        #[arg(value_parser = crate::model::scope::parse)]
        peer: Option<IpAddr>,
    },
    /// What is announced to a peer
    Advertised {
        /// Only to this peer
        #[arg(value_parser = crate::model::scope::parse)]
        peer: Option<IpAddr>,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum MapVerb {
    /// List them
    #[command(alias = "ls")]
    List,
    /// Entries of one map
    Dump(DumpArgs),
    /// Compare the maps with what should be in them; exit code 3 where they differ
    Audit,
}

#[derive(Debug, Args)]
pub(super) struct DumpArgs {
    /// Its name, as in `map list`
    pub name: String,
    /// At most so many
    #[arg(long, default_value_t = DEFAULT_LIMIT)]
    pub limit: usize,
}

#[derive(Debug, Subcommand)]
pub(super) enum XdpVerb {
    /// Interfaces, hooks, programs
    Status,
    /// Packets dropped or given to the stack, by reason
    Stats,
}

#[derive(Debug, Subcommand)]
pub(super) enum ConfigVerb {
    /// Check the file, print every fault with its line, and what the maps will cost
    Check,
    /// The configuration in force
    Show,
    /// What a file would change, and which flows and sessions that touches; nothing is changed
    Diff {
        /// The file, with conf.d beside it [default: the one that the daemon was started with]
        file: Option<PathBuf>,
    },
    /// Put a file in force; without FILE and --confirm, keep what waits to be confirmed
    Commit {
        /// Roll back after this time unless confirmed, such as 5m
        #[arg(long, value_name = "TIME", value_parser = confirm)]
        confirm: Option<Duration>,
        /// The file, with conf.d beside it [default with --confirm: the one that the daemon was started with]
        file: Option<PathBuf>,
    },
    /// Take back what waits to be confirmed
    Rollback,
    /// The JSON schema of the configuration
    Schema,
    /// Another program's configuration as ours, and what is wrong with it
    Import {
        /// Whose it is
        #[arg(value_enum)]
        from: ImportFrom,
        /// The file
        file: PathBuf,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum ImportFrom {
    /// FRR's or Quagga's bgpd
    Frr,
}

fn confirm(text: &str) -> Result<Duration, String> {
    match crate::config::duration(text) {
        Ok(time) if (1..=86_400).contains(&time.as_secs()) => Ok(time),
        _ => Err("expected 1s to 1d, such as 5m".to_owned()),
    }
}

#[derive(Debug, Subcommand)]
pub(super) enum GetNoun {
    /// Services
    #[command(alias = "service", alias = "svc")]
    Services {
        /// Only this service
        service: Option<String>,
    },
    /// Backends
    #[command(alias = "backend", alias = "endpoints")]
    Backends {
        /// Only those of this service
        service: Option<String>,
    },
    /// Flows
    #[command(alias = "flow")]
    Flows(FlowArgs),
    /// DNS names
    Dns,
    /// BGP peers
    #[command(alias = "peer")]
    Peers,
    /// Kernel routes
    #[command(alias = "route")]
    Routes,
    /// BPF maps
    #[command(alias = "map")]
    Maps,
    /// Interfaces
    #[command(alias = "xdp")]
    Interfaces,
}

#[derive(Debug, Subcommand)]
pub(super) enum DescribeNoun {
    /// A service
    #[command(alias = "services", alias = "svc")]
    Service {
        /// Its name
        service: String,
    },
    /// A backend
    #[command(alias = "backends")]
    Backend(One),
    /// A BGP peer
    #[command(alias = "neighbor")]
    Peer {
        /// Its address; a link-local one with its interface, `fe80::2%ens33`
        #[arg(value_parser = crate::model::scope::parse)]
        address: IpAddr,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum ShowNoun {
    /// show bgp summary, show bgp neighbors, show bgp routes
    #[command(infer_subcommands = true)]
    Bgp {
        #[command(subcommand)]
        verb: Option<BgpVerb>,
    },
    /// show ip route, show ip bgp summary
    #[command(infer_subcommands = true)]
    Ip {
        #[command(subcommand)]
        noun: ShowIp,
    },
    /// The configuration in force
    RunningConfig,
    /// The daemon in one screen
    Status,
    /// Services
    Services,
    /// Backends
    Backends,
    /// Flows
    Flows(FlowArgs),
    /// Interfaces and programs
    #[command(alias = "xdp")]
    Interfaces,
    /// Versions
    Version,
}

#[derive(Debug, Subcommand)]
pub(super) enum ShowIp {
    /// Routes in the kernel
    Route,
    /// BGP
    #[command(infer_subcommands = true)]
    Bgp {
        #[command(subcommand)]
        verb: Option<BgpVerb>,
    },
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("edge-ctl").chain(line.split_whitespace()))
    }

    #[test]
    fn the_arguments_fit_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_documentation_has_every_command_and_global_flag() {
        let document = include_str!("../../../docs/cli.md");
        let command = Cli::command();
        for name in command.get_subcommands().map(clap::Command::get_name) {
            assert!(document.contains(&format!("`{name}")), "docs/cli.md lacks `{name}`");
        }
        for flag in command.get_arguments().filter_map(clap::Arg::get_long) {
            assert!(document.contains(&format!("`--{flag}")), "docs/cli.md lacks --{flag}");
        }
    }

    #[test]
    fn every_command_of_this_version_is_understood() {
        for line in [
            "run -c /etc/edge/edge.toml",
            "status",
            "service list",
            "service describe web",
            "backend list",
            "backend describe web 10.1.0.4:443",
            "backend down web 10.1.0.4:443",
            "backend up web 10.1.0.4:443",
            "backend drain web 10.1.0.4:443 --wait",
            "backend undrain web 10.1.0.4:443",
            "backend weight web 10.1.0.4:443 default",
            "backend limit web 10.1.0.4:443 100",
            "health list web",
            "health history",
            "flow list",
            "flow get 203.0.113.7:1234",
            "flow count web",
            "flow kill web --backend 10.1.0.4:443 --client 203.0.113.7 --protocol tcp",
            "dns list",
            "dns stats",
            "dns servers",
            "dns query web.example.com --type srv --resolver kube-dns",
            "dns refresh",
            "dns refresh web.example.com",
            "events",
            "events -w",
            "capture 172.16.1.88:80 -w /tmp/web.pcapng --count 5",
            "bgp summary",
            "bgp peers",
            "bgp peer 172.16.1.80",
            "bgp routes",
            "bgp routes available",
            "bgp routes received",
            "bgp routes advertised 172.16.1.80",
            "bgp clear 172.16.1.80",
            "bgp clear all --soft",
            "bgp shutdown 172.16.1.80 --message later",
            "bgp enable all",
            "bgp messages 172.16.1.80",
            "bgp messages 172.16.1.80 /tmp/peer.pcap",
            "route list",
            "map list",
            "map dump SERVICES",
            "xdp status",
            "config check",
            "config check -c x.toml",
            "config diff /tmp/new.toml",
            "config commit --confirm 5m /tmp/new.toml",
            "config commit",
            "config rollback",
            "config schema",
            "reload",
            "version",
        ] {
            assert!(parse(line).is_ok(), "{line}");
        }
    }

    #[test]
    fn kubectl_and_vtysh_habits_and_prefixes_work() {
        for line in [
            "get backends",
            "get svc",
            "get services web",
            "describe service web",
            "show bgp summary",
            "show ip route",
            "show ip bgp summary",
            "show running-config",
            "sh bgp sum",
            "sh ip ro",
            "svc ls",
            "serv li",
            "b l",
            "fl l",
            "bgp sum",
        ] {
            if line == "b l" {
                assert!(parse(line).is_err(), "`b` may be backend or bgp");
            } else {
                assert!(parse(line).is_ok(), "{line}: {:?}", parse(line).err());
            }
        }
    }

    #[test]
    fn global_flags_may_stand_before_and_after_the_command() {
        let cli = parse("-o json service list --watch --sort-by age --socket /tmp/s --timeout 0.5").unwrap();
        assert_eq!(cli.global.output, Output::Json);
        assert!(cli.global.watch);
        assert_eq!(cli.global.timeout, Duration::from_millis(500));
    }

    #[test]
    fn wrong_arguments_are_usage_errors() {
        for line in ["", "serve", "bgp peer kcontrol", "service list -o xml", "map dump", "status --timeout 0"] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }
}
