//! The kernel's side: routes that BGP decided, VIPs on `lo`, neighbours of next hops, and what the kernel reports.
//!
//! [`spawn`] starts one actor that owns every change; [`FibHandle`] talks to it. What to change is decided by
//! [`plan`], which is pure; [`Kernel`] is the port to the system, real in `netlink`, stateful fake in [`fake`].

mod actor;
mod batch;
pub mod fake;
mod kernel;
mod monitor;
mod netlink;
mod nexthop;
pub mod plan;
pub mod sysctl;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use ipnet::IpNet;
use tokio::sync::{mpsc, oneshot};

pub use self::kernel::{Kernel, Link, LocalAddress, Neighbour, Notice, RouteTo, Snapshot};
pub use self::nexthop::ObjectCounts;
pub use crate::model::NextHopStyle;
use crate::model::{RouteSet, RouteUpdate, view::RouteRow};

/// How the actor works.
#[derive(Clone, Debug)]
pub struct FibOptions {
    /// How routes say where they lead.
    pub next_hops: NextHopStyle,
    /// How long notifications of the kernel are gathered before its table is read again.
    pub coalesce: Duration,
    /// How often the table is compared even without a notification.
    pub repair_interval: Duration,
    /// How often watched neighbours are looked after.
    pub neighbour_interval: Duration,
}

impl Default for FibOptions {
    fn default() -> Self {
        Self {
            next_hops: NextHopStyle::default(),
            coalesce: Duration::from_millis(20),
            repair_interval: Duration::from_secs(30),
            neighbour_interval: Duration::from_secs(10),
        }
    }
}

/// What the kernel reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FibEvent {
    /// A link appeared, went, or changed its name, state, MTU or link-layer address.
    LinkChanged {
        /// Kernel index.
        ifindex: u32,
        /// Name.
        name: String,
        /// Administratively up and with carrier; false where the link is gone.
        up: bool,
    },
    /// The link-layer address of a neighbour changed; state flips such as REACHABLE to STALE are not reported.
    NeighbourChanged {
        /// Kernel index of the interface.
        ifindex: u32,
        /// Network-layer address.
        address: IpAddr,
        /// Link-layer address; `None`: unresolved, failed or deleted.
        mac: Option<[u8; 6]>,
    },
    /// Routes other than BGP's changed.
    RoutesChanged,
    /// A route of ours was changed or deleted by somebody else, and is repaired.
    ForeignChange {
        /// Its prefix.
        prefix: IpNet,
    },
    /// Addresses of this host changed.
    AddressChanged,
}

/// Why the kernel could not be asked or did not do it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FibError {
    /// No netlink socket.
    #[error("cannot open a netlink socket: {0}")]
    Socket(String),
    /// The kernel refused a request.
    #[error("{what}: {reason}{}", hint(*.errno))]
    Refused {
        /// What was asked.
        what: String,
        /// The kernel's answer.
        reason: String,
        /// `errno`, positive; 0 where the failure is not the kernel's.
        errno: i32,
    },
    /// The actor has ended.
    #[error("the task that talks to the kernel has ended; see the log")]
    Closed,
}

fn hint(errno: i32) -> &'static str {
    match errno {
        libc::EPERM | libc::EACCES => " (CAP_NET_ADMIN is needed)",
        _ => "",
    }
}

/// What could not be done, and how much was.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FibStatus {
    /// Prefixes that are not in the kernel as BGP wants them, and why.
    pub errors: BTreeMap<IpNet, String>,
    /// The last failure to read the kernel's tables.
    pub dump_error: Option<String>,
    /// Route changes that the kernel accepted since start.
    pub route_writes: u64,
    /// Routes repaired after somebody else touched them.
    pub repairs: u64,
    /// BGP routes found at start and not yet confirmed.
    pub stale: usize,
    /// Next-hop objects of ours in the kernel.
    pub objects: ObjectCounts,
    /// Addresses held on `lo`.
    pub held: BTreeSet<IpAddr>,
}

/// Connects to the kernel of the calling thread's network namespace and starts the actor on a thread of its own: a buffer of
/// route changes keeps the caller for as long as the kernel works on it.
///
/// # Errors
/// Where no netlink socket can be had or the first reading of the tables fails.
pub async fn spawn(options: FibOptions, events: mpsc::Sender<FibEvent>) -> Result<FibHandle, FibError> {
    let failed = |error: std::io::Error| FibError::Socket(error.to_string());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let (commands, receiver) = mpsc::channel(64);
    let (tell, told) = oneshot::channel();
    let run = async move {
        let begun = async {
            let (kernel, notices) = netlink::Netlink::connect(options.next_hops)?;
            Ok((actor::Actor::new(kernel, options).await?, notices))
        };
        match begun.await {
            Ok((actor, notices)) => {
                // Whoever asked may have gone, and with them the last handle.
                let _ = tell.send(Ok(()));
                actor.run(receiver, notices, events).await;
            }
            Err(error) => drop(tell.send(Err(error))),
        }
    };
    let thread = std::thread::Builder::new().name("fib".to_owned());
    thread.spawn(move || runtime.block_on(run)).map_err(failed)?;
    told.await.unwrap_or(Err(FibError::Closed))?;
    Ok(FibHandle { commands })
}

/// As [`spawn`], over any [`Kernel`].
///
/// # Errors
/// Where the first reading of the tables fails.
pub async fn spawn_on<K: Kernel>(
    kernel: K,
    notices: mpsc::UnboundedReceiver<Notice>,
    options: FibOptions,
    events: mpsc::Sender<FibEvent>,
) -> Result<FibHandle, FibError> {
    let (commands, receiver) = mpsc::channel(64);
    let actor = actor::Actor::new(kernel, options).await?;
    tokio::spawn(actor.run(receiver, notices, events));
    Ok(FibHandle { commands })
}

type Reply<T> = oneshot::Sender<T>;

enum Command {
    Apply(Vec<RouteUpdate>, Reply<()>),
    FinishRestart(RouteSet, Reply<()>),
    Routes(Reply<Vec<RouteRow>>),
    KernelPrefixes(Reply<Vec<(IpNet, Option<IpAddr>)>>),
    OwnAddresses(Reply<std::collections::BTreeSet<IpAddr>>),
    InterfaceAddresses(Reply<std::collections::BTreeSet<IpAddr>>),
    Stale(Reply<RouteSet>),
    RouteTo(IpAddr, Reply<Option<RouteTo>>),
    Sources(Vec<Vec<IpAddr>>, Reply<Vec<(IpAddr, IpAddr)>>),
    HoldVip(IpAddr, Reply<Result<(), FibError>>),
    ReleaseVip(IpAddr, Reply<Result<(), FibError>>),
    LocalAddresses(Reply<BTreeSet<IpAddr>>),
    Links(Reply<BTreeMap<u32, Link>>),
    Watch(BTreeSet<(u32, IpAddr)>, Reply<()>),
    Resolve(Vec<IpAddr>),
    Status(Reply<FibStatus>),
}

/// The way to the actor. Cheap to clone; the actor ends with the last handle.
#[derive(Clone, Debug)]
pub struct FibHandle {
    commands: mpsc::Sender<Command>,
}

impl FibHandle {
    /// Takes over changes of BGP's best routes and brings the kernel in line. Failures are in [`FibHandle::status`] and
    /// are tried again at every comparison.
    pub async fn apply(&self, updates: Vec<RouteUpdate>) {
        self.ask(|reply| Command::Apply(updates, reply)).await.unwrap_or_default()
    }

    /// As [`FibHandle::apply`], without waiting: what is returned is done when the kernel has the changes, or was asked in vain.
    pub async fn begin_apply(&self, updates: Vec<RouteUpdate>) -> oneshot::Receiver<()> {
        let (reply, done) = oneshot::channel();
        // Where the actor has ended the reply is gone too, which says so.
        let _ = self.commands.send(Command::Apply(updates, reply)).await;
        done
    }

    /// BGP has converged on `routes`: BGP routes that stood in the kernel at start and are not among them go.
    pub async fn finish_restart(&self, routes: &RouteSet) {
        self.ask(|reply| Command::FinishRestart(routes.clone(), reply)).await.unwrap_or_default()
    }

    /// The kernel's main table and the routes that should be in it, by prefix.
    pub async fn routes(&self) -> Vec<RouteRow> {
        self.ask(Command::Routes).await.unwrap_or_default()
    }

    /// Connected and static prefixes with their gateway: neither default routes, nor BGP's, nor those of `lo`.
    pub async fn kernel_prefixes(&self) -> Vec<(IpNet, Option<IpAddr>)> {
        self.ask(Command::KernelPrefixes).await.unwrap_or_default()
    }

    /// Every address of this host.
    pub async fn own_addresses(&self) -> std::collections::BTreeSet<IpAddr> {
        self.ask(Command::OwnAddresses).await.unwrap_or_default()
    }

    /// Those on other interfaces than `lo`.
    pub async fn interface_addresses(&self) -> std::collections::BTreeSet<IpAddr> {
        self.ask(Command::InterfaceAddresses).await.unwrap_or_default()
    }

    /// BGP routes that stood in the kernel at start and wait for [`FibHandle::finish_restart`].
    pub async fn stale(&self) -> RouteSet {
        self.ask(Command::Stale).await.unwrap_or_default()
    }

    /// The address of this host that the kernel would use towards `destination`; `None`: no route.
    pub async fn source_for(&self, destination: IpAddr) -> Option<IpAddr> {
        self.route_to(destination).await?.source
    }

    /// As [`FibHandle::source_for`] for many: each group is what one route covers, sorted. Destinations without a route are
    /// left out.
    pub async fn sources_for(&self, groups: Vec<Vec<IpAddr>>) -> Vec<(IpAddr, IpAddr)> {
        self.ask(|reply| Command::Sources(groups, reply)).await.unwrap_or_default()
    }

    /// How the kernel would send to `destination`; `None`: no route.
    pub async fn route_to(&self, destination: IpAddr) -> Option<RouteTo> {
        self.ask(|reply| Command::RouteTo(destination, reply)).await.flatten()
    }

    /// Puts `vip` on `lo` as /32 or /128 unless an interface of this host has it already, and keeps it there.
    ///
    /// # Errors
    /// Where the kernel refuses the address.
    pub async fn hold_vip(&self, vip: IpAddr) -> Result<(), FibError> {
        self.ask(|reply| Command::HoldVip(vip, reply)).await.unwrap_or(Err(FibError::Closed))
    }

    /// Takes `vip` off `lo` if we put it there, in this life or (by its mark) an earlier one.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub async fn release_vip(&self, vip: IpAddr) -> Result<(), FibError> {
        self.ask(|reply| Command::ReleaseVip(vip, reply)).await.unwrap_or(Err(FibError::Closed))
    }

    /// Every address of this host.
    pub async fn local_addresses(&self) -> BTreeSet<IpAddr> {
        self.ask(Command::LocalAddresses).await.unwrap_or_default()
    }

    /// Every interface of this host, by kernel index.
    pub async fn links(&self) -> BTreeMap<u32, Link> {
        self.ask(Command::Links).await.unwrap_or_default()
    }

    /// Keeps exactly these neighbours (interface index, address) resolved: by the kernel itself from 5.16 on
    /// (`NTF_EXT_MANAGED`), else by asking for them again and again (`NTF_USE`). Static entries are left alone.
    pub async fn watch_neighbours(&self, neighbours: BTreeSet<(u32, IpAddr)>) {
        self.ask(|reply| Command::Watch(neighbours, reply)).await.unwrap_or_default()
    }

    /// Has the neighbours resolved through which `destinations` are reached; does not wait for it.
    pub async fn resolve(&self, destinations: Vec<IpAddr>) {
        // Where the actor has ended, its other callers say so.
        let _ = self.commands.send(Command::Resolve(destinations)).await;
    }

    /// What could not be done, and counters.
    pub async fn status(&self) -> FibStatus {
        self.ask(Command::Status).await.unwrap_or_default()
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.ok()?;
        answer.await.ok()
    }
}

/// Name of a kernel routing protocol, as in iproute2's `rt_protos`.
pub fn protocol_name(protocol: u8) -> String {
    match protocol {
        1 => "redirect",
        2 => "kernel",
        3 => "boot",
        4 => "static",
        9 => "ra",
        11 => "zebra",
        12 => "bird",
        16 => "dhcp",
        18 => "keepalived",
        42 => "babel",
        plan::PROTOCOL_BGP => "bgp",
        187 => "isis",
        188 => "ospf",
        189 => "rip",
        192 => "eigrp",
        other => return other.to_string(),
    }
    .to_owned()
}
