//! The rows users see. Field names are the JSON keys (the column names in snake_case); counters and seconds are numbers.

use serde::{Deserialize, Serialize};

use super::SnatRow;

/// One frontend in `service list`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ServiceRow {
    /// Service name.
    pub name: String,
    /// Listen address and port.
    pub vip: String,
    /// `tcp` or `udp`.
    pub proto: String,
    /// `full-nat` or `dnat`.
    pub mode: String,
    /// Balancing method.
    pub balance: String,
    /// Eligible of all, `2/3`.
    pub backends: String,
    /// New flows per second, over the last sample.
    #[serde(rename = "conn/s")]
    pub conn_s: f64,
    /// Established flows.
    pub active: u64,
    /// Bytes per second from clients, over the last sample.
    #[serde(rename = "rx/s")]
    pub rx_s: f64,
    /// Bytes per second to clients, over the last sample.
    #[serde(rename = "tx/s")]
    pub tx_s: f64,
    /// `yes`, `no`, or why not.
    pub announced: String,
    /// Seconds since the daemon (or the map entry's adopter) first saw it.
    pub age: u64,
    /// Flows opened since the maps exist.
    pub connections: u64,
    /// Packets and bytes since the maps exist.
    pub packets_in: u64,
    /// Bytes from clients.
    pub bytes_in: u64,
    /// Packets to clients.
    pub packets_out: u64,
    /// Bytes to clients.
    pub bytes_out: u64,
    /// Dropped packets by reason, non-zero ones.
    pub drops: std::collections::BTreeMap<String, u64>,
    /// Flows begun (first packets that were given a backend) since the maps exist, whatever became of them.
    #[serde(default)]
    pub attempts: u64,
    /// Packets dropped, for whichever reason.
    #[serde(default)]
    pub discarded: u64,
    /// How long a client stays with its backend, seconds; 0: no affinity.
    #[serde(default)]
    pub affinity: u64,
    /// Slots of the selection table in force, of the backup tier's in `backup_slots`; 0: no pool yet, or no such tier.
    #[serde(default)]
    pub slots: u64,
    /// As `slots`, of the table that serves while no primary backend can.
    #[serde(default)]
    pub backup_slots: u64,
    /// True while too few backends are healthy and health is ignored.
    #[serde(default)]
    pub panic: bool,
}

/// One backend in `backend list`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BackendRow {
    /// Service name.
    pub service: String,
    /// Address and port.
    pub backend: String,
    /// Node it runs on, by the BGP next hop; `-` where unknown.
    pub node: String,
    /// `up`, `full` (at its limit), or why it gets no new flows: `no-route`, `no-source-address`, `unhealthy`, `checking`, `ejected`, `down`,
    /// `draining` (flows remain), `drained` (none does).
    pub state: String,
    /// Weight.
    pub w: u32,
    /// Established flows.
    pub active: u64,
    /// Connection limit; 0: none.
    pub limit: u64,
    /// New flows per second, over the last sample.
    #[serde(rename = "conn/s")]
    pub conn_s: f64,
    /// Connections that failed: refused, unanswered, or reset before the first byte.
    pub fails: u64,
    /// Times it became unavailable.
    pub unavail: u64,
    /// Seconds, since the daemon started, in which it could not be used for another reason than an order.
    #[serde(default)]
    pub downtime: u64,
    /// Times that what clients saw took it out of use.
    #[serde(default)]
    pub ejections: u64,
    /// Seconds since the last check; absent while there are no checks.
    #[serde(rename = "last-check")]
    pub last_check: Option<u64>,
    /// Average time to the SYN-ACK or first datagram, ms, since the maps exist.
    pub connect: Option<f64>,
    /// Average time to the first byte of payload, ms.
    #[serde(default)]
    pub first_byte: Option<f64>,
    /// Connections whose SYN was repeated because nothing came back.
    #[serde(default)]
    pub unanswered: u64,
    /// Connections refused by RST.
    #[serde(default)]
    pub refused: u64,
    /// Connections reset by the backend before its first byte.
    #[serde(default)]
    pub reset_early: u64,
    /// Seconds since the last of these failures.
    #[serde(default)]
    pub last_failure: Option<u64>,
    /// Bytes per second from clients, over the last sample.
    #[serde(rename = "rx/s", default)]
    pub rx_s: f64,
    /// Bytes per second to clients, over the last sample.
    #[serde(rename = "tx/s", default)]
    pub tx_s: f64,
    /// `dns`, `static`.
    pub source: String,
    /// Flows opened since the maps exist.
    pub connections: u64,
    /// Packets from clients.
    pub packets_in: u64,
    /// Bytes from clients.
    pub bytes_in: u64,
    /// Packets to clients.
    pub packets_out: u64,
    /// Bytes to clients.
    pub bytes_out: u64,
    /// Listen address it serves.
    pub vip: String,
    /// `tcp` or `udp`.
    #[serde(default)]
    pub proto: String,
    /// `primary` or `backup`.
    #[serde(default)]
    pub tier: String,
    /// Share of its weight that it has while it starts slowly, percent; 100: all of it.
    #[serde(default)]
    pub share: u32,
    /// SNAT ports towards it, by source address, as of the sweep's last walk; empty where only the maps are read.
    #[serde(default)]
    pub snat: Vec<SnatRow>,
    /// What it must fulfil to be given new flows, in the order of the chain; empty where only the maps are read.
    #[serde(default)]
    pub conditions: Vec<ConditionRow>,
}

/// One checked backend in `health list`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HealthRow {
    /// Service name.
    pub service: String,
    /// Address and port that traffic uses.
    pub backend: String,
    /// Kind of check, with its path or its own port.
    pub check: String,
    /// `up`, `unhealthy`, `checking`, `ejected`.
    pub state: String,
    /// Seconds since the checks' state last changed.
    pub since: u64,
    /// Checks made.
    pub checks: u64,
    /// Of these, failed ones.
    pub fails: u64,
    /// Times it became unavailable.
    pub unavail: u64,
    /// Times that what clients saw took it out of use.
    #[serde(default)]
    pub ejections: u64,
    /// Checks that this host could not make: they say nothing about the backend.
    pub inconclusive: u64,
    /// Seconds since the last check.
    #[serde(rename = "last-check")]
    pub last_check: Option<u64>,
    /// Seconds until the next; absent while no route leads there.
    pub next: Option<u64>,
    /// Connect time of the last check that passed, ms.
    pub connect: Option<f64>,
    /// Address that checks leave from; `-`: the kernel's choice.
    pub source: String,
    /// What was wrong with the last check, if anything was.
    pub error: Option<String>,
}

/// One change of state in `health history`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HealthEventRow {
    /// Seconds since it happened.
    pub age: u64,
    /// Service name.
    pub service: String,
    /// Address and port.
    pub backend: String,
    /// State before.
    pub from: String,
    /// State from then on.
    pub to: String,
    /// The result that decided.
    pub reason: String,
}

/// One condition in `backend describe`: what a backend must fulfil to be given new flows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConditionRow {
    /// `discovery`, `route`, `source-address`, `health`, `administrative`, `limit`.
    pub condition: String,
    /// Whether it holds.
    pub holds: bool,
    /// Why, in words.
    pub reason: String,
}

/// One direction of a flow in `flow list`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FlowRow {
    /// Service name.
    pub service: String,
    /// `tcp` or `udp`.
    pub proto: String,
    /// Client address and port.
    pub client: String,
    /// Listen address and port.
    pub vip: String,
    /// SNAT source towards the backend; the client itself in dnat mode.
    pub snat: String,
    /// Backend address and port.
    pub backend: String,
    /// `half-open`, `established`, `closing`.
    pub state: String,
    /// Packets from the client.
    pub packets_in: u64,
    /// Bytes from the client.
    pub bytes_in: u64,
    /// Packets to the client.
    pub packets_out: u64,
    /// Bytes to the client.
    pub bytes_out: u64,
    /// Seconds since it was created.
    pub age: u64,
    /// Seconds since its last packet.
    pub idle: u64,
}

/// One name in `dns list`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DnsRow {
    /// Name asked for.
    pub name: String,
    /// Record type.
    #[serde(rename = "type")]
    pub kind: String,
    /// Resolver name.
    pub resolver: String,
    /// Addresses in use.
    pub addresses: Vec<String>,
    /// `fresh`, `held`, `last-good`, `unknown`.
    pub state: String,
    /// Seconds since the last good answer.
    pub age: Option<u64>,
    /// Seconds until the next query.
    pub next: Option<u64>,
    /// Last error, if the last query failed.
    pub error: Option<String>,
    /// Queries asked.
    pub requests: u64,
    /// Answers by class: success, format_error, server_failure, host_not_found, unimplemented, refused, unknown, timed_out.
    pub responses: std::collections::BTreeMap<String, u64>,
    /// Addresses refused so far, in every answer.
    pub refused_addresses: u64,
    /// The change that is held, and what it waits for.
    #[serde(default)]
    pub held: Option<String>,
    /// Seconds since it is held.
    #[serde(default)]
    pub held_age: Option<u64>,
    /// Addresses in use that the answer left out.
    #[serde(default)]
    pub held_addresses: Vec<String>,
    /// Addresses of the last answer that are refused: why, and for how long.
    #[serde(default)]
    pub refused: Vec<String>,
    /// Times that the addresses in use changed.
    #[serde(default)]
    pub changes: u64,
    /// Times that a change was held.
    #[serde(default)]
    pub holds: u64,
}

/// One resolver in `dns stats`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DnsZoneRow {
    /// Resolver name.
    pub resolver: String,
    /// Requests by type: name (A, AAAA), srv, addr (PTR).
    pub requests: std::collections::BTreeMap<String, u64>,
    /// Answers by class, as in [`DnsRow::responses`].
    pub responses: std::collections::BTreeMap<String, u64>,
    /// Its servers, in the order of the configuration.
    pub servers: Vec<DnsServerRow>,
}

/// One server in `dns servers`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DnsServerRow {
    /// Address and port.
    pub server: String,
    /// `up`, `failing`, `not asked`.
    pub state: String,
    /// Queries in a row without an answer that can be used.
    pub failures: u32,
    /// Seconds since the last answer that could be used.
    pub age: Option<u64>,
    /// How long that took, milliseconds.
    pub took_ms: Option<f64>,
    /// Why the last query failed, if it did.
    pub error: Option<String>,
    /// Queries asked.
    pub requests: u64,
    /// Answers by class.
    pub responses: std::collections::BTreeMap<String, u64>,
    /// `configured`, or `followed`: an endpoint of the resolver's own service.
    #[serde(default)]
    pub source: String,
}

/// One record in `dns query`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DnsRecordRow {
    /// Owner.
    pub name: String,
    /// Record type.
    #[serde(rename = "type")]
    pub kind: String,
    /// Seconds that it may be kept.
    pub ttl: u32,
    /// What it says.
    pub data: String,
    /// Resolver that was asked.
    pub resolver: String,
}

/// One peer in `bgp summary` and `bgp peers`. The first fields are FRR's columns.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BgpPeerRow {
    /// Peer address.
    pub neighbor: String,
    /// BGP version.
    pub v: u8,
    /// Its AS number.
    #[serde(rename = "as")]
    pub asn: u32,
    /// Messages received.
    pub msg_rcvd: u64,
    /// Messages sent.
    pub msg_sent: u64,
    /// Table version last sent.
    pub tbl_ver: u64,
    /// Bytes waiting to be read.
    pub in_q: u64,
    /// Messages waiting to be sent.
    pub out_q: u64,
    /// Seconds in the present state; absent: never.
    pub up_down: Option<u64>,
    /// State name (RFC 4271 8.2.2).
    pub state: String,
    /// Prefixes accepted from it.
    pub pfx_rcd: u64,
    /// Prefixes announced to it.
    pub pfx_snt: u64,
    /// Description.
    pub desc: String,
    /// Group.
    pub group: Option<String>,
    /// Its router id, once known.
    pub router_id: Option<String>,
    /// `ibgp` or `ebgp`.
    pub kind: String,
    /// Negotiated hold time, seconds.
    pub hold: u64,
    /// Negotiated keepalive interval, seconds.
    pub keepalive: u64,
    /// Capabilities in force.
    pub capabilities: Vec<String>,
    /// Prefixes received before policy.
    pub pfx_received: u64,
    /// How many it may send; absent: no limit.
    pub max_prefixes: Option<u64>,
    /// Messages by type, `open_sent`, `open_received`, `update_sent`, and so on.
    pub messages: std::collections::BTreeMap<String, u64>,
    /// Why the last session ended.
    pub last_reset: Option<String>,
    /// Seconds until the next connect attempt.
    pub next_connect: Option<u64>,
    /// Times a session was established.
    pub established_count: u64,
    /// Capabilities that we offered on the session.
    pub capabilities_sent: Vec<String>,
    /// Capabilities that the peer offered.
    pub capabilities_received: Vec<String>,
    /// The peer's host name, where it tells one.
    pub hostname: Option<String>,
    /// Our address and port on the session.
    pub local: Option<String>,
    /// The peer's address and port on the session.
    pub remote: Option<String>,
    /// Seconds until the hold timer runs out.
    pub hold_left: Option<u64>,
    /// Seconds until the next KEEPALIVE.
    pub keepalive_left: Option<u64>,
    /// Attempts in a row that brought no lasting session.
    pub failures: u64,
    /// Administratively shut down, with this message.
    pub shutdown: Option<String>,
    /// Configured by a `listen_range`.
    pub dynamic: bool,
    /// The last NOTIFICATION sent.
    pub error_sent: Option<BgpErrorRow>,
    /// The last NOTIFICATION received.
    pub error_received: Option<BgpErrorRow>,
    /// Comings and goings, newest first.
    pub flaps: Vec<BgpFlapRow>,
    /// Routes kept while the peer is away or tells its table anew.
    pub stale: Vec<BgpStaleRow>,
    /// Prefixes of it that are stale.
    pub pfx_stale: u64,
    /// The BFD session that watches it; absent: none is configured, or there was no BGP session yet.
    pub bfd: Option<BfdRow>,
}

/// A BFD session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BfdRow {
    /// State (RFC 5880 4.1); `Failed`: the session cannot be had, see `error`.
    pub state: String,
    /// Seconds in it.
    pub age: u64,
    /// Why it last left Up.
    pub diagnostic: String,
    /// The peer's state, as it last told.
    pub remote_state: String,
    /// Why the peer says that it last left Up.
    pub remote_diagnostic: String,
    /// The peer's BFD does not share fate with its BGP (its C-bit).
    pub independent: bool,
    /// Routers lie between (RFC 5883).
    pub multihop: bool,
    /// Interval of our packets, milliseconds; absent: the peer wants none.
    pub transmit_ms: Option<u64>,
    /// Silence that is taken for an end, milliseconds.
    pub detection_ms: u64,
    /// Packets sent.
    pub sent: u64,
    /// Packets received.
    pub received: u64,
    /// Times it left Up.
    pub downs: u64,
    /// Why there is no session.
    pub error: Option<String>,
}

/// An error that a NOTIFICATION told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BgpErrorRow {
    /// Seconds ago.
    pub ago: u64,
    /// In words.
    pub text: String,
}

/// A session that came or went.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BgpFlapRow {
    /// Seconds ago.
    pub ago: u64,
    /// It came up.
    pub up: bool,
    /// Why it went down.
    pub reason: String,
}

/// Routes of one family that outlive their session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BgpStaleRow {
    /// Family.
    pub family: String,
    /// `restarting`, `long-lived` or `refreshing`.
    pub stage: String,
    /// Seconds until they go.
    pub left: u64,
}

/// One message in `bgp messages`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BgpMessageRow {
    /// Microseconds since 1970.
    pub time: u64,
    /// We sent it.
    pub sent: bool,
    /// Our address and port.
    pub local: std::net::SocketAddr,
    /// The peer's.
    pub remote: std::net::SocketAddr,
    /// OPEN, UPDATE, NOTIFICATION, KEEPALIVE or ROUTE-REFRESH.
    pub kind: String,
    /// Octets.
    pub length: usize,
    /// The message, hexadecimal.
    pub bytes: String,
}

/// One path in `bgp routes`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BgpRouteRow {
    /// `*` valid, `>` best, `=` multipath, `i` internal, `S` stale; `r` rejected by policy, `u` next hop unreachable.
    pub status: String,
    /// Prefix.
    pub network: String,
    /// Next hop.
    pub next_hop: String,
    /// MED.
    pub metric: Option<u32>,
    /// LOCAL_PREF.
    pub locprf: Option<u32>,
    /// AS path and origin code.
    pub path: String,
    /// Peer it came from; `local` for our own.
    pub peer: String,
    /// Seconds since it was learnt.
    pub age: u64,
    /// Why it is not best, or not accepted.
    pub reason: Option<String>,
    /// Communities of all kinds.
    pub communities: Vec<String>,
    /// Path identifier (RFC 7911), where the peer sends several paths.
    pub path_id: Option<u32>,
    /// Gateways, where the next hop is not a neighbour itself.
    pub via: Vec<String>,
    /// What the path had to show in each step of selection, in order; only of `bgp routes`.
    pub steps: Vec<String>,
}

/// What policy says of a path, in `bgp policy test`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PolicyRow {
    /// The peer.
    pub peer: String,
    /// `in` or `out`.
    pub direction: String,
    /// Prefix.
    pub network: String,
    /// Whose path it is: `received`, `ours`, `best path`, or `given` with the question.
    pub path_from: String,
    /// `accepted` or `refused`, `announced` or `withheld`.
    pub verdict: String,
    /// The term that permits it, counted from 1; absent: there is no list, or it is not known.
    pub term: Option<u64>,
    /// Why it is refused or withheld.
    pub reason: Option<String>,
    /// Next hop after policy.
    pub next_hop: Option<String>,
    /// MED after policy.
    pub metric: Option<u32>,
    /// LOCAL_PREF after policy.
    pub locprf: Option<u32>,
    /// AS path after policy.
    pub path: String,
    /// Communities after policy.
    pub communities: Vec<String>,
}

/// One route in `route list`: what the kernel has.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RouteRow {
    /// Code as vtysh shows it: `B`, `C`, `S`, `K`.
    pub code: String,
    /// Prefix.
    pub prefix: String,
    /// Next hops `via GATEWAY dev NAME`, or `dev NAME`.
    pub next_hops: Vec<String>,
    /// Kernel protocol name.
    pub protocol: String,
    /// Kernel metric.
    pub metric: u32,
    /// True where BGP's RIB and the kernel agree.
    pub installed: bool,
    /// Seconds since we installed it.
    pub age: Option<u64>,
}

/// One map in `map list`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MapRow {
    /// Map name.
    pub name: String,
    /// Kernel type name.
    #[serde(rename = "type")]
    pub kind: String,
    /// Kernel id.
    pub id: u32,
    /// Key bytes.
    pub key: u32,
    /// Value bytes.
    pub value: u32,
    /// Capacity.
    pub max_entries: u32,
    /// Entries in use, where they can be counted.
    pub entries: Option<u64>,
    /// Seconds since `entries` were counted by the sweep; absent: they were counted for this answer.
    #[serde(default)]
    pub counted: Option<u64>,
    /// Bytes of kernel memory.
    pub memory: u64,
    /// Pin path.
    pub pin: String,
    /// Of `CACHE_WINDOWS`: packets that the flow cache served.
    #[serde(default)]
    pub hits: Option<u64>,
    /// As `hits`: packets of established flows that asked the tables.
    #[serde(default)]
    pub misses: Option<u64>,
    /// As `hits`: slots given to another flow.
    #[serde(default)]
    pub displaced: Option<u64>,
}

/// One event in `events`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventRow {
    /// When, RFC 3339, UTC.
    pub time: String,
    /// `drop` or `end`.
    pub kind: String,
    /// Service name; `-`: none.
    pub service: String,
    /// Of a dropped packet its source, of a flow the client.
    pub source: String,
    /// Of a dropped packet its destination, of a flow the backend.
    pub destination: String,
    /// Why it was dropped, or how it ended.
    pub reason: String,
    /// Bytes of the packet, or of the flow in both directions.
    pub bytes: u64,
}

/// One interface in `xdp status`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct XdpRow {
    /// Interface name.
    pub interface: String,
    /// Kernel index.
    pub ifindex: u32,
    /// `xdp-native`, `xdp-generic`, `tcx`, `clsact`, or `-`.
    pub hook: String,
    /// `attached`, `adopted`, `missing`, or an error.
    pub state: String,
    /// Kernel program id.
    pub program: Option<u32>,
    /// Program tag.
    pub tag: Option<String>,
    /// Kernel link id.
    pub link: Option<u32>,
    /// Why this hook and not a better one.
    pub reason: Option<String>,
}

/// `status`: the daemon in one screen.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StatusRow {
    /// `ok` or `degraded`.
    pub state: String,
    /// Why degraded.
    pub problems: Vec<String>,
    /// Version.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// Seconds since start.
    pub uptime: u64,
    /// Configuration file.
    pub config: String,
    /// Frontends.
    pub services: u64,
    /// Eligible backends.
    pub backends_eligible: u64,
    /// Backends.
    pub backends: u64,
    /// Established peers.
    pub peers_established: u64,
    /// Configured peers.
    pub peers: u64,
    /// Prefixes in the Loc-RIB.
    pub prefixes: u64,
    /// Next-hop objects of ours in the kernel: gateways.
    #[serde(default)]
    pub next_hops: u64,
    /// Next-hop objects of ours in the kernel: groups of gateways.
    #[serde(default)]
    pub next_hop_groups: u64,
    /// Established flows.
    pub flows: u64,
    /// Interfaces where the program is attached.
    pub attached: u64,
    /// Map writes since start.
    pub map_writes: u64,
    /// Access log lines written since start.
    #[serde(default)]
    pub access_written: u64,
    /// Access log lines lost since start, because they could not be written.
    #[serde(default)]
    pub access_lost: u64,
    /// Records that the events ring buffer had no room for, since the maps exist.
    #[serde(default)]
    pub events_lost: u64,
    /// Seconds for which clients of unknown connections are still told nothing; 0: they are told by a RST.
    #[serde(default)]
    pub quiet: u64,
    /// Losses of other edges of this group since start.
    #[serde(default)]
    pub edges_lost: u64,
    /// Actions of the reconciler since start, by kind.
    pub actions: std::collections::BTreeMap<String, u64>,
}
