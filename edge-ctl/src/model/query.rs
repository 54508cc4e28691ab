//! What can be asked of a running edge, and the answers: one vocabulary for the API, the command line, and the reader
//! of pinned maps that serves while the daemon is dead.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::bgp_session::{Order, PeerOrder};
use super::capture::{CaptureOrder, CaptureRow};
use super::{
    BackendVerb, Community, Endpoint, FlowSelector, RecordType,
    view::{
        BackendRow, BgpMessageRow, BgpPeerRow, BgpRouteRow, DnsRecordRow, DnsRow, DnsZoneRow, EventRow, FlowRow,
        HealthEventRow, HealthRow, MapRow, PolicyRow, RouteRow, ServiceRow, StatusRow, XdpRow,
    },
};

/// Rows that a list of flows or map entries has unless told otherwise.
pub const DEFAULT_LIMIT: usize = 1000;

/// A path that a peer's policy is asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyQuestion {
    /// The peer.
    pub peer: IpAddr,
    /// About what is announced to it rather than what it sends.
    pub export: bool,
    /// The prefix.
    pub prefix: IpNet,
    /// AS numbers of the path; `None`, with no community and next hop: the path that there is.
    pub as_path: Option<Vec<u32>>,
    /// Communities of the path.
    pub communities: Vec<Community>,
    /// Next hop of the path.
    pub next_hop: Option<IpAddr>,
}

impl PolicyQuestion {
    fn path(&self) -> String {
        let direction = if self.export { "out" } else { "in" };
        let prefix = percent_encode(&self.prefix.to_string());
        let mut path = format!("/v1/bgp/policy?peer={}&direction={direction}&prefix={prefix}", self.peer);
        if let Some(numbers) = &self.as_path {
            let numbers: Vec<String> = numbers.iter().map(u32::to_string).collect();
            path.push_str(&format!("&as_path={}", percent_encode(&numbers.join(" "))));
        }
        if !self.communities.is_empty() {
            let communities: Vec<String> = self.communities.iter().map(ToString::to_string).collect();
            path.push_str(&format!("&communities={}", percent_encode(&communities.join(" "))));
        }
        path.extend(self.next_hop.map(|next_hop| format!("&next_hop={next_hop}")));
        path
    }
}

/// A question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Query {
    /// The daemon in one screen: [`Answer::Status`].
    Status,
    /// Every frontend: [`Answer::Services`].
    Services,
    /// Every backend: [`Answer::Backends`].
    Backends,
    /// Flows, the client's direction and the reply's in one row: [`Answer::Flows`].
    Flows {
        /// Only this service's.
        service: Option<String>,
        /// At most so many rows.
        limit: usize,
    },
    /// End flows: [`Answer::Killed`].
    FlowKill(FlowSelector),
    /// Names asked of the resolvers: [`Answer::Dns`].
    Dns,
    /// Resolvers and their servers: [`Answer::DnsZones`].
    DnsZones,
    /// Ask a resolver: [`Answer::DnsRecords`].
    DnsQuery {
        /// A name, or an address whose name is asked for.
        name: String,
        /// `a`, `aaaa` or `srv`; `None`: A.
        record: Option<RecordType>,
        /// The resolver's name; `None`: the one that a service asks for this name, else the first.
        resolver: Option<String>,
    },
    /// Ask again now: [`Answer::Dns`].
    DnsRefresh {
        /// Only this name.
        name: Option<String>,
    },
    /// BGP peers: [`Answer::BgpPeers`].
    BgpPeers,
    /// The Loc-RIB, paths that lost included: [`Answer::BgpRoutes`].
    BgpRoutes,
    /// What a peer sent, before policy: [`Answer::BgpRoutes`].
    BgpReceived(IpAddr),
    /// What is announced to a peer: [`Answer::BgpRoutes`].
    BgpAdvertised(IpAddr),
    /// The last messages of a peer: [`Answer::BgpMessages`].
    BgpMessages(IpAddr),
    /// Clear, refresh, shut down or enable a peer, or all: [`Answer::BgpPeers`].
    BgpOrder(PeerOrder),
    /// What a peer's policy says of a path: [`Answer::BgpPolicy`].
    BgpPolicy(PolicyQuestion),
    /// Routes of the kernel that concern us: [`Answer::Routes`].
    Routes,
    /// Maps: [`Answer::Maps`].
    Maps,
    /// Entries of one map: [`Answer::MapEntries`].
    Map {
        /// The map's name.
        name: String,
        /// At most so many entries.
        limit: usize,
    },
    /// Where the program is attached: [`Answer::Xdp`].
    Xdp,
    /// Packets dropped or passed, by service and reason: [`Answer::Reasons`].
    Reasons,
    /// Source ranges: [`Answer::Acl`].
    Acl,
    /// Give a source range at run time: [`Answer::Acl`] of that service.
    AclAdd {
        /// The service's name.
        service: String,
        /// A prefix or an address.
        prefix: String,
        /// Keep it out rather than let it in.
        deny: bool,
        /// A duration; `None`: until it is taken back.
        lifetime: Option<String>,
    },
    /// Take back what [`Query::AclAdd`] gave: [`Answer::Acl`] of that service.
    AclRemove {
        /// The service's name.
        service: String,
        /// The prefix or address.
        prefix: String,
    },
    /// The newest ends of flows and dropped packets: [`Answer::Events`].
    Events,
    /// The configuration in force: [`Answer::Config`].
    Config,
    /// Have forwarded packets copied for a while: [`Answer::Capturing`].
    Capture(CaptureOrder),
    /// Read the configuration again and apply it: [`Answer::Reloaded`].
    Reload,
    /// Writes that would bring the maps to what should be in them: [`Answer::Audit`].
    Audit,
    /// Compare a configuration with the one in force, or put one in force: [`Answer::Reloaded`].
    Change(ConfigChange),
    /// Checked backends: [`Answer::Health`].
    Health,
    /// What checks changed, newest first: [`Answer::HealthHistory`].
    HealthHistory,
    /// An order for one backend of one service: [`Answer::Backends`] with its rows.
    Order {
        /// Service name.
        service: String,
        /// Its backend.
        backend: SocketAddr,
        /// What to change.
        verb: BackendVerb,
    },
}

impl Query {
    /// Method and path with query string, below the API's root.
    pub fn request(&self) -> (&'static str, String) {
        let path = match self {
            Self::Status => "/v1/status".to_owned(),
            Self::Services => "/v1/services".to_owned(),
            Self::Backends => "/v1/backends".to_owned(),
            Self::Flows { service: Some(service), limit } => {
                format!("/v1/flows?limit={limit}&service={}", percent_encode(service))
            }
            Self::Flows { service: None, limit } => format!("/v1/flows?limit={limit}"),
            Self::FlowKill(FlowSelector { service, backend, client, protocol }) => {
                let mut path = format!("/v1/flows/kill?service={}", percent_encode(service));
                if let Some(backend) = backend {
                    path.push_str(&format!("&backend={}", percent_encode(&Endpoint(*backend).to_string())));
                }
                if let Some((address, port)) = client {
                    path.push_str(&format!("&client={}", percent_encode(&address.to_string())));
                    path.extend(port.map(|port| format!("&port={port}")));
                }
                path.extend(protocol.map(|protocol| format!("&protocol={protocol}")));
                return ("POST", path);
            }
            Self::Dns => "/v1/dns".to_owned(),
            Self::DnsZones => "/v1/dns/stats".to_owned(),
            Self::DnsQuery { name, record, resolver } => {
                let record = record.map(|record| format!("&record={}", record.to_string().to_ascii_lowercase()));
                let resolver = resolver.as_ref().map(|text| format!("&resolver={}", percent_encode(text)));
                let (record, resolver) = (record.unwrap_or_default(), resolver.unwrap_or_default());
                return ("POST", format!("/v1/dns/query?name={}{record}{resolver}", percent_encode(name)));
            }
            Self::DnsRefresh { name } => {
                let name = name.as_ref().map(|name| format!("?name={}", percent_encode(name)));
                return ("POST", format!("/v1/dns/refresh{}", name.unwrap_or_default()));
            }
            Self::BgpPeers => "/v1/bgp/peers".to_owned(),
            Self::BgpRoutes => "/v1/bgp/routes".to_owned(),
            Self::BgpReceived(peer) => format!("/v1/bgp/peers/{peer}/received"),
            Self::BgpAdvertised(peer) => format!("/v1/bgp/peers/{peer}/advertised"),
            Self::BgpMessages(peer) => format!("/v1/bgp/peers/{peer}/messages"),
            Self::BgpOrder(PeerOrder { peer, what }) => {
                let peer = peer.map_or_else(|| "all".to_owned(), |peer| peer.to_string());
                let message = match what {
                    Order::Shutdown(message) => format!("?message={}", percent_encode(message)),
                    _ => String::new(),
                };
                return ("POST", format!("/v1/bgp/peers/{peer}/{}{message}", what.as_str()));
            }
            Self::BgpPolicy(question) => question.path(),
            Self::Routes => "/v1/routes".to_owned(),
            Self::Maps => "/v1/maps".to_owned(),
            Self::Map { name, limit } => format!("/v1/maps/{}?limit={limit}", percent_encode(name)),
            Self::Audit => "/v1/audit".to_owned(),
            Self::Xdp => "/v1/xdp".to_owned(),
            Self::Reasons => "/v1/reasons".to_owned(),
            Self::Acl => "/v1/acl".to_owned(),
            Self::AclAdd { service, prefix, deny, lifetime } => {
                let lifetime = lifetime.as_ref().map(|text| format!("&for={}", percent_encode(text)));
                let (service, prefix) = (percent_encode(service), percent_encode(prefix));
                let query = format!("service={service}&prefix={prefix}&deny={deny}{}", lifetime.unwrap_or_default());
                return ("POST", format!("/v1/acl/add?{query}"));
            }
            Self::AclRemove { service, prefix } => {
                let (service, prefix) = (percent_encode(service), percent_encode(prefix));
                return ("POST", format!("/v1/acl/remove?service={service}&prefix={prefix}"));
            }
            Self::Events => "/v1/events".to_owned(),
            Self::Config => "/v1/config".to_owned(),
            Self::Capture(order) => {
                let backend =
                    order.backend.as_deref().map_or_else(String::new, |b| format!("&backend={}", percent_encode(b)));
                let (vip, length, seconds) = (percent_encode(&order.vip), order.length, order.seconds);
                let path = format!("/v1/capture?vip={vip}&length={length}&seconds={seconds}{backend}");
                return ("POST", path);
            }
            Self::Reload => return ("POST", "/v1/reload".to_owned()),
            Self::Change(change) => return ("POST", change.path()),
            Self::Health => "/v1/health".to_owned(),
            Self::HealthHistory => "/v1/health/history".to_owned(),
            Self::Order { service, backend, verb } => {
                let path = format!("/v1/backends/{}/{}", percent_encode(service), Endpoint(*backend));
                let path = match verb {
                    BackendVerb::Down => format!("{path}/down"),
                    BackendVerb::Up => format!("{path}/up"),
                    BackendVerb::Drain => format!("{path}/drain"),
                    BackendVerb::Undrain => format!("{path}/undrain"),
                    BackendVerb::Weight(Some(weight)) => format!("{path}/weight?weight={weight}"),
                    BackendVerb::Weight(None) => format!("{path}/weight"),
                    BackendVerb::Limit(Some(limit)) => format!("{path}/limit?limit={limit}"),
                    BackendVerb::Limit(None) => format!("{path}/limit"),
                };
                return ("POST", path);
            }
        };
        ("GET", path)
    }

    /// The request's body, JSON; empty where there is none.
    pub fn body(&self) -> String {
        match self {
            Self::Change(ConfigChange { files: Some(files), .. }) => serde_json::to_string(files).unwrap_or_default(),
            _ => String::new(),
        }
    }
}

/// An answer. Serialized it is the rows alone, an array wherever there may be several.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Answer {
    /// To [`Query::Status`].
    Status(Box<StatusRow>),
    /// To [`Query::Services`].
    Services(Vec<ServiceRow>),
    /// To [`Query::Backends`].
    Backends(Vec<BackendRow>),
    /// To [`Query::Flows`].
    Flows(Vec<FlowRow>),
    /// To [`Query::Audit`].
    Audit(Vec<AuditRow>),
    /// To [`Query::FlowKill`].
    Killed(KilledRow),
    /// To [`Query::Dns`] and [`Query::DnsRefresh`].
    Dns(Vec<DnsRow>),
    /// To [`Query::DnsZones`].
    DnsZones(Vec<DnsZoneRow>),
    /// To [`Query::DnsQuery`].
    DnsRecords(Vec<DnsRecordRow>),
    /// To [`Query::BgpMessages`].
    BgpMessages(Vec<BgpMessageRow>),
    /// To [`Query::BgpPeers`] and [`Query::BgpOrder`].
    BgpPeers(Vec<BgpPeerRow>),
    /// To [`Query::BgpRoutes`], [`Query::BgpReceived`] and [`Query::BgpAdvertised`].
    BgpRoutes(Vec<BgpRouteRow>),
    /// To [`Query::BgpPolicy`].
    BgpPolicy(Vec<PolicyRow>),
    /// To [`Query::Routes`].
    Routes(Vec<RouteRow>),
    /// To [`Query::Maps`].
    Maps(Vec<MapRow>),
    /// To [`Query::Map`].
    MapEntries(Vec<MapEntryRow>),
    /// To [`Query::Xdp`].
    Xdp(Vec<XdpRow>),
    /// To [`Query::Reasons`].
    Reasons(Vec<ReasonRow>),
    /// To [`Query::Acl`], [`Query::AclAdd`] and [`Query::AclRemove`].
    Acl(Vec<AclRow>),
    /// To [`Query::Events`].
    Events(Vec<EventRow>),
    /// To [`Query::Config`].
    Config(ConfigRow),
    /// To [`Query::Capture`].
    Capturing(CaptureRow),
    /// To [`Query::Reload`].
    Reloaded(ReloadRow),
    /// To [`Query::Health`].
    Health(Vec<HealthRow>),
    /// To [`Query::HealthHistory`].
    HealthHistory(Vec<HealthEventRow>),
}

/// One entry in `map dump`: key and value as the daemon understands them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapEntryRow {
    /// The key: an index, or fields as `name=value` separated by spaces.
    pub key: String,
    /// The value in the same form.
    pub value: String,
}

/// One counter of the program: packets by service and reason.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReasonRow {
    /// Service name; `-` for packets that belong to none.
    pub service: String,
    /// Reason name.
    pub reason: String,
    /// `drop` or `pass`.
    pub action: String,
    /// Packets since the maps exist.
    pub packets: u64,
}

/// A source range of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AclRow {
    /// Service name.
    pub service: String,
    /// Source range.
    pub prefix: String,
    /// `allow` or `deny`.
    pub action: String,
    /// `config`, `runtime` (`acl add`), or `-`: the maps do not know.
    pub source: String,
    /// Seconds that it has left; `None`: it does not expire.
    pub expires: Option<u64>,
    /// New flows that it decided about.
    pub hits: u64,
}

/// One difference in `map audit`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditRow {
    /// Kind of write that is missing; `problem`: something that no write can bring about.
    pub write: String,
    /// What would be written.
    pub detail: String,
}

/// What `flow kill` did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KilledRow {
    /// Service name.
    pub service: String,
    /// Flows that were ended, half-open ones included.
    pub flows: u64,
}

/// The configuration in force.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigRow {
    /// The file it was read from.
    pub file: String,
    /// Seconds since it was applied.
    pub age: u64,
    /// The text of the file and of those in `conf.d`.
    pub text: String,
}

/// What is to become of the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigChange {
    /// What to do.
    pub verb: ConfigVerb,
    /// Files with their texts, the main one first; `None`: those that the daemon was started with.
    pub files: Option<Vec<(PathBuf, String)>>,
}

/// What to do with a configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigVerb {
    /// Say what it would change.
    Diff,
    /// Put it in force; where seconds are given, for so long unless confirmed.
    Commit(Option<u64>),
    /// Keep what is in force.
    Confirm,
    /// Go back to the one before at once.
    Rollback,
}

impl ConfigChange {
    fn path(&self) -> String {
        match self.verb {
            ConfigVerb::Diff => "/v1/config/diff".to_owned(),
            ConfigVerb::Commit(None) => "/v1/config/commit".to_owned(),
            ConfigVerb::Commit(Some(seconds)) => format!("/v1/config/commit?confirm={seconds}"),
            ConfigVerb::Confirm => "/v1/config/confirm".to_owned(),
            ConfigVerb::Rollback => "/v1/config/rollback".to_owned(),
        }
    }
}

/// What a reload did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReloadRow {
    /// The file it was read from.
    pub file: String,
    /// One line for each thing that changed; empty: nothing did.
    pub changes: Vec<String>,
    /// Changes in the file that need a restart to take effect.
    pub needs_restart: Vec<String>,
    /// What the changes mean for flows and sessions that there are now.
    #[serde(default)]
    pub touches: Vec<String>,
    /// Seconds until it rolls back unless confirmed.
    #[serde(default)]
    pub confirm_within: Option<u64>,
    /// What is left to do.
    #[serde(default)]
    pub note: Option<String>,
}

/// `service describe`: the frontends of one service and the backends behind them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ServiceDetail {
    /// Service name.
    pub name: String,
    /// Its frontends.
    pub frontends: Vec<ServiceRow>,
    /// Its backends.
    pub backends: Vec<BackendRow>,
}

impl ServiceDetail {
    /// The detail of service `name` out of all rows; `None`: there is no such service.
    pub fn pick(name: &str, services: Vec<ServiceRow>, backends: Vec<BackendRow>) -> Option<Self> {
        let frontends: Vec<_> = services.into_iter().filter(|row| row.name == name).collect();
        if frontends.is_empty() {
            return None;
        }
        let backends = backends.into_iter().filter(|row| row.service == name).collect();
        Some(Self { name: name.to_owned(), frontends, backends })
    }
}

/// Why there is no answer. On the wire: an HTTP status and [`Refusal`] as the body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ViewError {
    /// No such service, peer or map; the text names it. 404.
    NotFound(String),
    /// The request or the configuration is wrong; one line for each fault. 422.
    Invalid(Vec<String>),
    /// It cannot be told now (the text says why and what to do). 503.
    Unavailable(String),
    /// Something failed that should not; the text says what. 500.
    Internal(String),
}

impl fmt::Display for ViewError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound(text) | Self::Unavailable(text) | Self::Internal(text) => f.write_str(text),
            Self::Invalid(lines) => f.write_str(&lines.join("\n")),
        }
    }
}

impl std::error::Error for ViewError {}

/// The body of a refused request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// What was wrong.
    pub error: String,
    /// One line for each fault, where there may be several.
    #[serde(default)]
    pub problems: Vec<String>,
}

/// Percent-encodes everything but RFC 3986's unreserved characters.
fn percent_encode(text: &str) -> String {
    text.bytes().fold(String::with_capacity(text.len()), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_break_out_of_their_part_of_the_path() {
        let query = Query::Map { name: "../v1/reload?x=1".into(), limit: 5 };
        assert_eq!(query.request(), ("GET", "/v1/maps/..%2Fv1%2Freload%3Fx%3D1?limit=5".into()));
    }

    #[test]
    fn a_detail_holds_only_rows_of_its_service() {
        let service = |name: &str| ServiceRow { name: name.into(), ..ServiceRow::default() };
        let backend = |service: &str| BackendRow { service: service.into(), ..BackendRow::default() };
        let detail =
            ServiceDetail::pick("web", vec![service("web"), service("dns")], vec![backend("dns"), backend("web")])
                .unwrap();
        assert_eq!((detail.frontends.len(), detail.backends.len()), (1, 1));
        assert!(ServiceDetail::pick("gone", vec![service("web")], vec![]).is_none());
    }
}
