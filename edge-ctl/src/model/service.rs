//! Services as the operator means them, and pools as the sources report them.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
    time::Duration,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{ANY_PORT, Endpoint, Selection, StaticBackend, Tier};

/// Transport protocol of a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// The IP protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => edge_common::flow::TCP,
            Self::Udp => edge_common::flow::UDP,
        }
    }

    /// The protocol with this IP protocol number, if it is one of ours.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            edge_common::flow::TCP => Some(Self::Tcp),
            edge_common::flow::UDP => Some(Self::Udp),
            _ => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A listen address: what clients connect to. Written `172.16.1.88:8443/tcp`, or `203.0.113.10:*/tcp` for every port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frontend {
    /// VIP and port; [`ANY_PORT`]: every port that no other frontend of the VIP has.
    pub address: SocketAddr,
    /// Transport protocol.
    pub protocol: Protocol,
}

impl Frontend {
    /// True where it takes every port of its VIP.
    pub const fn takes_every_port(&self) -> bool {
        self.address.port() == ANY_PORT
    }

    /// True where it takes every port of one of these addresses, which the host has on interfaces other than `lo`. It is not
    /// served then, since that would end ssh and BGP with this host.
    pub fn takes_what_is_the_hosts(&self, own: &BTreeSet<IpAddr>) -> bool {
        self.takes_every_port() && own.contains(&self.address.ip())
    }
}

impl fmt::Display for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", Endpoint(self.address), self.protocol)
    }
}

/// Why a text is not a listen address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a listen address: expected ADDRESS:PORT/tcp or ADDRESS:PORT/udp, or `*` as the port")]
pub struct ParseFrontendError {
    /// What was given.
    pub text: String,
}

impl FromStr for Frontend {
    type Err = ParseFrontendError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseFrontendError { text: text.to_owned() };
        let (address, protocol) = text.rsplit_once('/').unwrap_or((text, "tcp"));
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return Err(error()),
        };
        let Endpoint(address) = address.parse().map_err(|_| error())?;
        Ok(Self { address, protocol })
    }
}

/// How long flows live, as far as the service says so: seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lifetimes {
    /// An established TCP connection without a packet.
    pub established: Option<u32>,
    /// A TCP handshake.
    pub half_open: Option<u32>,
    /// A closed flow, and its SNAT port after it.
    pub closing: Option<u32>,
    /// A UDP flow that was answered.
    pub udp: Option<u32>,
    /// A UDP flow that was not answered yet.
    pub udp_unanswered: Option<u32>,
    /// UDP: a flow ends with the backend's first answer.
    pub one_reply: bool,
}

/// How addresses are rewritten.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Source and destination; the backend sees the edge.
    #[default]
    FullNat,
    /// Destination only; the backend sees the client and must route replies back through the edge.
    Dnat,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FullNat => "full-nat",
            Self::Dnat => "dnat",
        })
    }
}

/// How a backend is chosen for a new flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, PartialOrd, Ord)]
#[serde(rename_all = "kebab-case")]
pub enum Balance {
    /// Weighted Maglev over the keyed hash of the tuple.
    #[default]
    Maglev,
    /// One after the other, as often as its weight says.
    RoundRobin,
    /// The less loaded of two that the tuple's hash draws, relative to weight.
    #[serde(rename = "least-conn")]
    LeastConnections,
}

impl fmt::Display for Balance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Maglev => "maglev",
            Self::RoundRobin => "round-robin",
            Self::LeastConnections => "least-conn",
        })
    }
}

/// DNS record type a pool is read from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RecordType {
    /// IPv4 addresses.
    #[default]
    A,
    /// IPv6 addresses.
    Aaaa,
    /// Targets with port, weight and priority.
    Srv,
}

impl fmt::Display for RecordType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::A => "A",
            Self::Aaaa => "AAAA",
            Self::Srv => "SRV",
        })
    }
}

/// Where a service's backends come from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BackendSource {
    /// A DNS name asked of a configured resolver.
    Dns {
        /// The name, fully qualified without a final dot; where the resolver has search domains, relative to them unless
        /// there is a final dot.
        name: String,
        /// Port of every backend, [`ANY_PORT`]: the one that the client asked for; SRV answers bring their own.
        port: Option<u16>,
        /// Name of the `[resolver.NAME]` table.
        resolver: String,
        /// What to ask for.
        record: RecordType,
    },
    /// Fixed addresses.
    Static(Vec<StaticBackend>),
}

impl BackendSource {
    /// True where some backend gets packets at the port that the client asked for.
    pub fn keeps_ports(&self) -> bool {
        match self {
            Self::Dns { port, record, .. } => *port == Some(ANY_PORT) && *record != RecordType::Srv,
            Self::Static(backends) => backends.iter().any(|backend| backend.address.port() == ANY_PORT),
        }
    }

    /// True where every backend does.
    pub fn keeps_all_ports(&self) -> bool {
        match self {
            Self::Dns { .. } => self.keeps_ports(),
            Self::Static(backends) => backends.iter().all(|backend| backend.address.port() == ANY_PORT),
        }
    }
}

/// SNAT settings of a full-nat service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snat {
    /// Source addresses; empty: the address the kernel would use towards each backend.
    pub addresses: Vec<IpAddr>,
    /// Lowest and highest port, inclusive; `None`: the complement of the host's ephemeral range.
    pub ports: Option<(u16, u16)>,
}

/// Whether and how a service's VIPs are announced by BGP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announce {
    /// Announce while at least this many backends are eligible.
    pub min_backends: usize,
    /// Once announced, it stays so while at least this many are eligible; not more than `min_backends`.
    pub keep_backends: usize,
    /// How long they must have been eligible before it is announced.
    pub after: std::time::Duration,
    /// Length of the prefix that is announced instead of the /32 or /128, IPv4 and IPv6.
    pub aggregate: (Option<u8>, Option<u8>),
    /// What tells routers how much of the pool is healthy.
    pub capacity: Option<Capacity>,
    /// Path attributes of the announcement.
    pub attributes: super::PathAttributes,
}

impl Default for Announce {
    fn default() -> Self {
        Self {
            min_backends: 1,
            keep_backends: 1,
            after: std::time::Duration::ZERO,
            aggregate: (None, None),
            capacity: None,
            attributes: super::PathAttributes::default(),
        }
    }
}

impl Announce {
    /// The prefix that is announced for a VIP.
    pub fn prefix(&self, vip: std::net::IpAddr) -> ipnet::IpNet {
        let length = if vip.is_ipv4() { self.aggregate.0 } else { self.aggregate.1 };
        length.and_then(|length| ipnet::IpNet::new(vip, length).ok()).map_or_else(|| vip.into(), |net| net.trunc())
    }

    /// The attributes while `eligible` of `total` backends are.
    pub fn attributes(&self, eligible: usize, total: usize) -> super::PathAttributes {
        let mut attributes = self.attributes.clone();
        // Tenths lost: small changes of a large pool are no news to routers.
        let lost = ((total - eligible.min(total)) * 10).checked_div(total).unwrap_or(0);
        match self.capacity {
            Some(Capacity::Med) => {
                let step = u32::try_from(lost).unwrap_or(10) * MED_STEP;
                attributes.med = Some(attributes.med.unwrap_or(0).saturating_add(step));
            }
            // A quarter of the pool lost is one more AS number.
            Some(Capacity::Prepend) => {
                let more = u8::try_from(lost * 2 / 5).unwrap_or(4);
                attributes.prepend = attributes.prepend.saturating_add(more);
            }
            None => {}
        }
        attributes
    }
}

/// MED added for each tenth of a pool that is not eligible.
const MED_STEP: u32 = 10;

/// How the healthy part of a pool is told to routers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capacity {
    /// MED grows by 10 with each tenth that is lost.
    Med,
    /// Our AS number is prepended once more with each quarter that is lost.
    Prepend,
}

/// What becomes of a backend's flows when checks fail, its route is lost, or an administrator takes it down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnDown {
    /// They go on.
    #[default]
    Keep,
    /// They are forgotten: a TCP connection's next packet finds no flow, a datagram selects anew.
    Reset,
    /// UDP flows are forgotten, so that the next datagram selects anew; a TCP connection goes on, since no other backend
    /// knows it.
    Reselect,
}

/// Flows that an order is about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowSelector {
    /// Of this service.
    pub service: String,
    /// With this backend only.
    pub backend: Option<SocketAddr>,
    /// Of this client only, with this port where one is given.
    pub client: Option<(IpAddr, Option<u16>)>,
    /// Of this protocol only.
    pub protocol: Option<Protocol>,
}

/// A service, validated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// The name in `[service.NAME]`.
    pub name: String,
    /// Listen addresses, at least one.
    pub listen: Vec<Frontend>,
    /// Where its backends come from.
    pub backends: BackendSource,
    /// How addresses are rewritten.
    pub mode: Mode,
    /// How backends are chosen.
    pub balance: Balance,
    /// What else decides about it.
    pub selection: Selection,
    /// SNAT settings; unused in dnat mode.
    pub snat: Snat,
    /// `None`: not announced.
    pub announce: Option<Announce>,
    /// `None`: backends are not checked.
    pub health: Option<super::Health>,
    /// What becomes of the flows of a backend that goes down.
    pub on_down: OnDown,
    /// How long its flows live.
    pub lifetimes: Lifetimes,
    /// What its sources may do.
    pub protection: super::Protection,
}

/// One member of a pool, as a source reported it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PoolMember {
    /// Backend address and port; [`ANY_PORT`]: the one that the client asked for.
    pub address: SocketAddr,
    /// Relative weight, 1 where the source knows none.
    pub weight: u16,
    /// When it is used.
    pub tier: Tier,
}

impl PoolMember {
    /// A primary member.
    pub const fn new(address: SocketAddr, weight: u16) -> Self {
        Self { address, weight, tier: Tier::Primary }
    }
}

/// How far a pool can be trusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PoolState {
    /// Nothing was ever learnt; an adopted pool in the maps stays as it is.
    Unknown,
    /// The newest answer.
    Fresh,
    /// The newest answer failed; these are the members of the last good one.
    LastGood {
        /// What went wrong, for users.
        reason: String,
    },
}

/// What a source says about one `BackendSource`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolSnapshot {
    /// Which source this is about.
    pub source: BackendSource,
    /// Members inside `pod_networks` only, sorted, without duplicates.
    pub members: BTreeSet<PoolMember>,
    /// How far it can be trusted.
    pub state: PoolState,
}

/// A set of networks that backends must lie in.
pub fn within(networks: &[IpNet], address: IpAddr) -> bool {
    networks.iter().any(|network| network.contains(&address))
}

/// A resolver, validated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolver {
    /// The name in `[resolver.NAME]`.
    pub name: String,
    /// Servers, asked in turn.
    pub servers: Vec<SocketAddr>,
    /// Overrides the TTL of answers; `None`: the answer's own.
    pub valid: Option<Duration>,
    /// How far its answers are believed.
    pub policy: super::ResolverPolicy,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listen_address_reads_back_as_it_was_written() {
        for text in ["172.16.1.88:8443/tcp", "[2001:db8::1]:53/udp", "203.0.113.10:*/tcp", "[2001:db8::1]:*/udp"] {
            let frontend = text.parse::<Frontend>().unwrap();
            assert_eq!((frontend.to_string().as_str(), frontend.takes_every_port()), (text, text.contains('*')));
        }
    }

    #[test]
    fn a_listen_address_without_protocol_is_tcp() {
        assert_eq!("10.0.0.1:80".parse::<Frontend>().unwrap().protocol, Protocol::Tcp);
    }

    #[test]
    fn port_zero_unknown_protocols_and_names_are_refused() {
        for text in
            ["10.0.0.1:0/tcp", "10.0.0.1:*/sctp", "*:*/tcp", "10.0.0.1:80/sctp", "edge:80/tcp", "10.0.0.1/tcp", ""]
        {
            assert!(text.parse::<Frontend>().is_err(), "{text}");
        }
    }
}
