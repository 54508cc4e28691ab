//! The validated configuration. Whoever holds a [`Config`] may rely on every cross-reference and range in it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use ipnet::IpNet;

pub use super::policy::{AsPathPattern, Changes, Guard, Intake, MaxPrefixes, NextHop, Term};
use crate::model::{NextHopStyle, Resolver, Service, access::AccessLog, bgp_session::SessionSettings};

/// The whole configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// `[edge]`.
    pub edge: Edge,
    /// `[api] http`; `None`: off.
    pub http: Option<SocketAddr>,
    /// `[log]`; `None`: finished connections are not logged.
    pub access_log: Option<AccessLog>,
    /// `[resolver.NAME]`.
    pub resolvers: BTreeMap<String, Resolver>,
    /// `[bgp]`; `None`: no BGP.
    pub bgp: Option<Bgp>,
    /// `[service.NAME]`.
    pub services: BTreeMap<String, Service>,
}

/// `[edge]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edge {
    /// Interfaces the program attaches to, at least one.
    pub interfaces: Vec<String>,
    /// Where in the stack it attaches.
    pub hook: Hook,
    /// The only networks a backend may lie in.
    pub pod_networks: Vec<IpNet>,
    /// Folder of the pins, on a bpffs.
    pub pin_path: PathBuf,
    /// Unix socket of the API.
    pub socket: PathBuf,
    /// Folder of state that outlives restarts.
    pub state_dir: PathBuf,
    /// File with the secret that all edges of one ECMP group share; `None`: one is made in `state_dir`.
    pub seed_file: Option<PathBuf>,
    /// Capacities of the flow tables.
    pub tables: Tables,
}

/// Where the program attaches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hook {
    /// Native XDP, else TC; veth gets TC.
    #[default]
    Auto,
    /// Native XDP or nothing.
    XdpNative,
    /// Generic XDP.
    XdpGeneric,
    /// TC ingress: tcx, clsact on older kernels.
    Tc,
}

/// `[edge.tables]`: entries; of flow tables two per flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tables {
    /// Established flows.
    pub established: u32,
    /// Half-open flows.
    pub half_open: u32,
    /// Closing flows and resting ports.
    pub closing: u32,
    /// As `established`, of IPv6 flows.
    pub established_v6: u32,
    /// As `half_open`, of IPv6 flows.
    pub half_open_v6: u32,
    /// As `closing`, of IPv6 flows.
    pub closing_v6: u32,
    /// Memory of the flow cache, bytes; 0: none.
    pub cache: u64,
    /// Backends of all services, counted for each listen address.
    pub backends: u32,
    /// Chunks of selection tables: 128 slots each, and one or two more for each pool.
    pub selection: u32,
}

impl Tables {
    /// Sets of the flow cache of each family, IPv4 first: its memory in proportion to what their established flows take.
    pub fn cache_sets(&self) -> [u32; 2] {
        use edge_common::{
            address::Wide,
            maps::{CACHE_BYTES_MIN, CacheSet},
        };
        if self.cache < CACHE_BYTES_MIN {
            return [0, 0];
        }
        let (v4, v6) = (size_of::<CacheSet<u32>>() as u64, size_of::<CacheSet<Wide>>() as u64);
        let (weight, other) = (u64::from(self.established) * v4, u64::from(self.established_v6) * v6);
        let share = u128::from(self.cache) * u128::from(weight) / u128::from((weight + other).max(1));
        let of_v4 = u64::try_from(share).unwrap_or(self.cache).min(self.cache);
        [of_v4 / v4, (self.cache - of_v4) / v6].map(|sets| u32::try_from(sets).unwrap_or(u32::MAX))
    }
}

impl Default for Tables {
    fn default() -> Self {
        use edge_common::maps;
        Self {
            established: maps::ESTABLISHED_ENTRIES,
            half_open: maps::HALF_OPEN_ENTRIES,
            closing: maps::CLOSING_ENTRIES,
            established_v6: maps::ESTABLISHED_V6_ENTRIES,
            half_open_v6: maps::HALF_OPEN_V6_ENTRIES,
            closing_v6: maps::CLOSING_V6_ENTRIES,
            cache: maps::CACHE_BYTES,
            backends: maps::BACKENDS,
            selection: maps::SELECTION_CHUNKS,
        }
    }
}

/// `[bgp]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bgp {
    /// Our AS number, 4 bytes (RFC 6793).
    pub asn: u32,
    /// BGP identifier.
    pub router_id: Ipv4Addr,
    /// Port we listen on; `None`: active sessions only (`listen_port = 0`).
    pub listen_port: Option<u16>,
    /// Prefixes announced unconditionally.
    pub networks: Vec<IpNet>,
    /// Peers, groups merged in, by address.
    pub peers: BTreeMap<IpAddr, Peer>,
    /// What is learnt may be announced again: between external and internal peers, never among internal ones.
    pub transit: bool,
    /// How the kernel's routes say where they lead.
    pub next_hops: NextHopStyle,
    /// How long a planned end waits for flows after peers were asked to look for another way; `None`: not at all.
    pub drain: Option<Duration>,
    /// What no import may bring in unasked.
    pub guard: Guard,
    /// Networks whose hosts may connect without being listed; the most specific one counts.
    pub ranges: Vec<PeerRange>,
    /// By interface: the peer that the neighbour on it becomes, once it is found by its router advertisements. Its address
    /// is `fe80::` on that interface.
    pub links: BTreeMap<String, Peer>,
}

/// `listen_range` of a group: who connects from there becomes a passive peer with the group's settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerRange {
    /// The network.
    pub network: IpNet,
    /// The peer that a host of the network becomes; its address is the network's.
    pub template: Peer,
}

/// A BGP neighbour, its group's settings merged in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its address.
    pub address: IpAddr,
    /// Its AS number.
    pub remote_asn: u32,
    /// Port to connect to.
    pub port: u16,
    /// Free text; shown as the node's name.
    pub description: String,
    /// Group it belongs to, for users.
    pub group: Option<String>,
    /// Wait for its connection, never connect.
    pub passive: bool,
    /// It is another edge of this group: when it is lost, its flows come here.
    pub peer_edge: bool,
    /// Local address of the session; `None`: the kernel's choice.
    pub local_address: Option<IpAddr>,
    /// Keepalive interval we propose.
    pub keepalive: Duration,
    /// Hold time we propose; zero: no keepalives (RFC 4271 4.2).
    pub hold: Duration,
    /// Hop limit of an eBGP session; 1: directly connected.
    pub ebgp_multihop: u8,
    /// Everything else about its session.
    pub session: SessionSettings,
    /// What is accepted from it; `None`: no list given, so nothing from eBGP (RFC 8212) and pod networks from iBGP.
    pub import: Option<Vec<Term>>,
    /// What is announced to it; `None`: nothing to eBGP, all that is ours to iBGP.
    pub export: Option<Vec<Term>>,
    /// Announced to it alone, whatever `export` says: networks of clients, whose replies it sends back this way.
    pub client_networks: Vec<IpNet>,
    /// How much of it, and which paths.
    pub intake: Intake,
}

/// One element of a prefix list: `10.1.0.0/16 ge 24 le 32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefixRule {
    /// The covering prefix.
    pub prefix: IpNet,
    /// Shortest length accepted.
    pub min_length: u8,
    /// Longest length accepted.
    pub max_length: u8,
}

impl PrefixRule {
    /// True where it names `candidate` and nothing else.
    pub fn is_exactly(&self, candidate: &IpNet) -> bool {
        self.prefix == *candidate
            && self.min_length == candidate.prefix_len()
            && self.max_length == candidate.prefix_len()
    }

    /// True where `candidate` lies inside the rule.
    pub fn matches(&self, candidate: &IpNet) -> bool {
        self.prefix.contains(&candidate.network())
            && candidate.prefix_len() >= self.prefix.prefix_len()
            && (self.min_length..=self.max_length).contains(&candidate.prefix_len())
    }
}
