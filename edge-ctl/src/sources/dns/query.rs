//! One question to the configured servers: which answers, and in which class of NGINX Plus's statistics each falls.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures::StreamExt;
use hickory_resolver::{
    NameServerPool, PoolContext, TlsConfig,
    config::{ConnectionConfig, NameServerConfig, ResolverOpts},
    net::{DnsError, NetError, NoRecords, runtime::TokioRuntimeProvider, xfer::DnsHandle},
    proto::{
        op::{DnsRequestOptions, DnsResponse, Query, ResponseCode},
        rr::{Name, RData, Record, RecordType as WireType, rdata::SRV},
    },
};

use super::tracker::Outcome;
use crate::model::{PoolMember, RecordType, Tier};

/// Most members that a pool takes from an answer. A DNS message holds some 4,000 addresses, and the edge's table 8,191
/// backends of all services.
const MOST_MEMBERS: usize = 2048;
/// Longest chain of aliases that is followed; BIND follows 16, CoreDNS 10.
const MOST_ALIASES: usize = 8;
/// Most SRV targets whose addresses are asked for one by one.
const MOST_TARGETS: usize = 256;

/// One record, as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Owner.
    pub name: String,
    /// Record type.
    pub kind: String,
    /// Seconds that it may be kept.
    pub ttl: u32,
    /// What it says.
    pub data: String,
}

/// Class of a response, as NGINX Plus counts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// NOERROR, with or without records.
    Success,
    /// FORMERR.
    FormatError,
    /// SERVFAIL.
    ServerFailure,
    /// NXDOMAIN.
    HostNotFound,
    /// NOTIMP.
    Unimplemented,
    /// REFUSED.
    Refused,
    /// Any other response code, or a response that cannot be used.
    Unknown,
    /// No response: timed out, or the server cannot be reached.
    TimedOut,
}

impl Class {
    /// Every class, in the order in which they are shown.
    pub const ALL: [Self; 8] = [
        Self::Success,
        Self::FormatError,
        Self::ServerFailure,
        Self::HostNotFound,
        Self::Unimplemented,
        Self::Refused,
        Self::Unknown,
        Self::TimedOut,
    ];

    /// The name in views and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::FormatError => "format_error",
            Self::ServerFailure => "server_failure",
            Self::HostNotFound => "host_not_found",
            Self::Unimplemented => "unimplemented",
            Self::Refused => "refused",
            Self::Unknown => "unknown",
            Self::TimedOut => "timed_out",
        }
    }

    const fn of(code: ResponseCode) -> Self {
        match code {
            ResponseCode::NoError => Self::Success,
            ResponseCode::FormErr => Self::FormatError,
            ResponseCode::ServFail => Self::ServerFailure,
            ResponseCode::NXDomain => Self::HostNotFound,
            ResponseCode::NotImp => Self::Unimplemented,
            ResponseCode::Refused => Self::Refused,
            _ => Self::Unknown,
        }
    }
}

/// Queries sent and responses by class.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Queries by record type.
    pub requests: BTreeMap<&'static str, u64>,
    /// Responses by class.
    pub responses: BTreeMap<Class, u64>,
}

impl Counts {
    /// Adds what another counted.
    pub fn add(&mut self, other: &Self) {
        for (kind, count) in &other.requests {
            *self.requests.entry(kind).or_default() += count;
        }
        for (class, count) in &other.responses {
            *self.responses.entry(*class).or_default() += count;
        }
    }

    fn asked(&mut self, wire: WireType) {
        *self.requests.entry(type_name(wire)).or_default() += 1;
    }

    fn answered(&mut self, class: Class) {
        *self.responses.entry(class).or_default() += 1;
    }

    /// Responses by class name, those that never came included.
    pub fn by_class(&self) -> BTreeMap<String, u64> {
        let count = |class| self.responses.get(&class).copied().unwrap_or_default();
        Class::ALL.map(|class| (class.name().to_owned(), count(class))).into()
    }
}

/// What one server has done so far.
#[derive(Clone, Debug, Default)]
pub(super) struct ServerState {
    pub counts: Counts,
    /// Queries in a row without an answer that can be used.
    pub failures: u32,
    /// When the last answer that can be used came.
    pub answered: Option<Instant>,
    /// How long that took.
    pub took: Option<Duration>,
    /// Why the last query failed, if it did.
    pub error: Option<String>,
}

/// One server. It is its own pool of one, so that failing over, and counting, is ours.
pub(super) struct Server {
    pub address: SocketAddr,
    pool: NameServerPool<TokioRuntimeProvider>,
    state: Arc<Mutex<ServerState>>,
}

impl Server {
    pub fn state(&self) -> MutexGuard<'_, ServerState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The servers of one resolver.
pub(super) struct Servers {
    pub list: Vec<Server>,
    timeout: Duration,
    /// The server that answered last is asked first: a dead one costs its timeout once, not with every query.
    first: AtomicUsize,
}

/// What one server said.
enum Said {
    Records(Box<DnsResponse>),
    Nothing { reason: String, ttl: Option<Duration> },
}

/// A name's records, aliases followed.
enum Resolved {
    Found {
        response: Box<DnsResponse>,
        /// Who owns the records: the name, or what it is an alias of.
        owner: Name,
        /// Shortest TTL of the aliases on the way.
        ttl: u32,
    },
    Nothing {
        reason: String,
        ttl: Option<Duration>,
    },
}

impl Servers {
    /// `timeout`: how long one server may take, retransmissions and the change to TCP included. What `former` knows of a
    /// server stays; its connections do not.
    pub(super) fn new(addresses: &[SocketAddr], timeout: Duration, former: Option<&Self>) -> Self {
        let mut options = ResolverOpts::default();
        options.timeout = timeout;
        options.attempts = 1;
        options.num_concurrent_reqs = 1;
        // Without it the port is any from 1024 on, which may be one that SNAT gives to a flow towards the same server.
        options.os_port_selection = true;
        let list = addresses
            .iter()
            .filter_map(|address| {
                // Fails only where TLS is compiled in and finds no certificates; it is not.
                let tls = TlsConfig::new().ok()?;
                let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
                    connection.port = address.port();
                    connection
                });
                let config = NameServerConfig::new(address.ip(), true, connections.into());
                let context = Arc::new(PoolContext::new(options.clone(), tls));
                let pool = NameServerPool::from_config([config], context, TokioRuntimeProvider::default());
                let known = former.and_then(|former| former.list.iter().find(|server| server.address == *address));
                let state = known.map_or_else(Arc::default, |server| Arc::clone(&server.state));
                Some(Server { address: *address, pool, state })
            })
            .collect();
        Self { list, timeout, first: AtomicUsize::new(0) }
    }

    /// Asks for the members of a pool. Ports are those of SRV answers, and 0 otherwise.
    pub(super) async fn members(&self, name: &Name, record: RecordType, counts: &mut Counts) -> Outcome {
        let wire = match record {
            RecordType::A => WireType::A,
            RecordType::Aaaa => WireType::AAAA,
            RecordType::Srv => WireType::SRV,
        };
        let (response, owner, ttl) = match self.resolve(name, wire, counts).await {
            Ok(Resolved::Found { response, owner, ttl }) => (response, owner, ttl),
            Ok(Resolved::Nothing { reason, ttl }) => return Outcome::Negative { reason, ttl },
            Err(reason) => return Outcome::Failure { reason },
        };
        if record == RecordType::Srv {
            return self.srv_members(&response, &owner, ttl, counts).await;
        }
        let mut members = BTreeSet::new();
        let mut shortest = ttl;
        for (address, record) in addresses(&response.answers, &owner) {
            members.insert(PoolMember::new(SocketAddr::new(address, 0), 1));
            shortest = shortest.min(record.ttl);
        }
        answer(members, shortest)
    }

    /// The records of a name as text, for people: PTR where it is an address.
    pub(super) async fn look_up(&self, name: &Name, wire: WireType, counts: &mut Counts) -> Result<Vec<Found>, String> {
        match self.resolve(name, wire, counts).await? {
            Resolved::Nothing { reason, .. } => Err(reason),
            Resolved::Found { response, .. } => {
                let found = |record: &Record| Found {
                    name: record.name.to_ascii(),
                    kind: record.record_type().to_string(),
                    ttl: record.ttl,
                    data: record.data.to_string(),
                };
                Ok(response.answers.iter().chain(&response.additionals).map(found).collect())
            }
        }
    }

    /// The lowest priority is the primary tier, all others the backup tier (RFC 2782: a client must attempt the lowest
    /// that it can reach); weight 0 becomes 1, which is as small a share as there is.
    async fn srv_members(&self, response: &DnsResponse, owner: &Name, ttl: u32, counts: &mut Counts) -> Outcome {
        let records = response.answers.iter().filter(|record| record.name == *owner);
        let services: Vec<(&SRV, u32)> = records
            .filter_map(|record| match &record.data {
                RData::SRV(srv) => Some((srv, record.ttl)),
                _ => None,
            })
            .collect();
        let lowest = services.iter().map(|(srv, _)| srv.priority).min().unwrap_or_default();
        let mut members = BTreeSet::new();
        let mut shortest = ttl;
        let mut asked: BTreeMap<&Name, (BTreeSet<IpAddr>, u32)> = BTreeMap::new();
        for (srv, ttl) in services {
            // Target "." says that the service is decidedly not available here (RFC 2782).
            if srv.target.is_root() {
                continue;
            }
            if !asked.contains_key(&srv.target) {
                let found = match gather(&response.additionals, &srv.target) {
                    Some(found) => found,
                    None if asked.len() >= MOST_TARGETS => {
                        return Outcome::Failure { reason: format!("more than {MOST_TARGETS} SRV targets to ask for") };
                    }
                    None => match self.target(&srv.target, counts).await {
                        Ok(found) => found,
                        // Half a pool is worse than the last good one.
                        Err(reason) => {
                            return Outcome::Failure { reason: format!("SRV target {}: {reason}", srv.target) };
                        }
                    },
                };
                asked.insert(&srv.target, found);
            }
            let Some((targets, target_ttl)) = asked.get(&srv.target) else { continue };
            shortest = shortest.min(ttl).min(*target_ttl);
            let tier = if srv.priority == lowest { Tier::Primary } else { Tier::Backup };
            let member = |address: &IpAddr| PoolMember {
                address: SocketAddr::new(*address, srv.port),
                weight: srv.weight.max(1),
                tier,
            };
            members.extend(targets.iter().map(member));
        }
        answer(members, shortest)
    }

    /// Addresses of an SRV target that came without them: the IPv4 ones, else the IPv6 ones.
    async fn target(&self, target: &Name, counts: &mut Counts) -> Result<(BTreeSet<IpAddr>, u32), String> {
        for wire in [WireType::A, WireType::AAAA] {
            if let Resolved::Found { response, owner, ttl } = Box::pin(self.resolve(target, wire, counts)).await?
                && let Some((found, shortest)) = gather(&response.answers, &owner)
            {
                return Ok((found, shortest.min(ttl)));
            }
        }
        Ok((BTreeSet::new(), u32::MAX))
    }

    /// Asks for a name and follows its aliases, within the answer and by asking again where it ends in one.
    async fn resolve(&self, name: &Name, wire: WireType, counts: &mut Counts) -> Result<Resolved, String> {
        let (mut owner, mut ttl, mut hops) = (name.clone(), u32::MAX, 0);
        loop {
            let response = match self.ask(&owner, wire, counts).await? {
                Said::Records(response) => response,
                Said::Nothing { reason, ttl } => return Ok(Resolved::Nothing { reason, ttl }),
            };
            let before = hops;
            while let Some((target, alias_ttl)) = alias(&response.answers, &owner) {
                hops += 1;
                if hops > MOST_ALIASES {
                    return Err(format!("more than {MOST_ALIASES} aliases (CNAME) after {name}"));
                }
                (owner, ttl) = (target, ttl.min(alias_ttl));
            }
            if response.answers.iter().any(|record| record.record_type() == wire && record.name == owner) {
                return Ok(Resolved::Found { response, owner, ttl });
            }
            if hops == before {
                // Records of other names only: an answer to something that was not asked.
                return Err(format!("the answer has no record of {owner}"));
            }
        }
    }

    /// Asks one server after the other until one knows. NXDOMAIN is knowledge; SERVFAIL and the like are not.
    async fn ask(&self, name: &Name, wire: WireType, counts: &mut Counts) -> Result<Said, String> {
        let mut failures = Vec::new();
        let first = self.first.load(Ordering::Relaxed);
        for turn in 0..self.list.len() {
            let index = (first + turn) % self.list.len();
            let Some(server) = self.list.get(index) else { continue };
            match self.ask_server(server, name, wire, counts).await {
                Ok(said) => {
                    self.first.store(index, Ordering::Relaxed);
                    return Ok(said);
                }
                Err(reason) => failures.push(format!("{}: {reason}", server.address)),
            }
        }
        if failures.is_empty() {
            failures.push("no server is configured".into());
        }
        Err(failures.join("; "))
    }

    async fn ask_server(
        &self,
        server: &Server,
        name: &Name,
        wire: WireType,
        counts: &mut Counts,
    ) -> Result<Said, String> {
        // A server that knows no EDNS says FORMERR, NOTIMP or BADVERS and is asked again without (RFC 6891 section 7).
        for edns in [true, false] {
            counts.asked(wire);
            server.state().counts.asked(wire);
            let began = Instant::now();
            let (class, said) = ask_one(&server.pool, self.timeout, name, wire, edns).await;
            counts.answered(class);
            let mut state = server.state();
            state.counts.answered(class);
            match said {
                Ok(said) => {
                    state.failures = 0;
                    state.error = None;
                    state.answered = Some(Instant::now());
                    state.took = Some(began.elapsed());
                    return Ok(said);
                }
                Err(_) if edns && matches!(class, Class::FormatError | Class::Unimplemented) => {}
                Err(reason) => {
                    state.failures = state.failures.saturating_add(1);
                    state.error = Some(reason.clone());
                    return Err(reason);
                }
            }
        }
        // Not reached: the second turn returns.
        Err("not asked".into())
    }
}

async fn ask_one(
    pool: &NameServerPool<TokioRuntimeProvider>,
    timeout: Duration,
    name: &Name,
    wire: WireType,
    edns: bool,
) -> (Class, Result<Said, String>) {
    let mut options = DnsRequestOptions::default();
    options.use_edns = edns;
    let mut answers = pool.lookup(Query::query(name.clone(), wire), options);
    let timed_out = || format!("timed out after {timeout:?}");
    let answer = match tokio::time::timeout(timeout, answers.next()).await {
        Ok(Some(answer)) => answer,
        Ok(None) | Err(_) => return (Class::TimedOut, Err(timed_out())),
    };
    match answer {
        Ok(response) => {
            let class = Class::of(response.response_code);
            match class {
                Class::Success if has_records(&response, wire) => (class, Ok(Said::Records(Box::new(response)))),
                Class::Success | Class::HostNotFound => {
                    let ttl = response.negative_ttl().map(|ttl| Duration::from_secs(ttl.into()));
                    (class, Ok(Said::Nothing { reason: negative_text(response.response_code, wire), ttl }))
                }
                _ => (class, Err(response.response_code.to_string())),
            }
        }
        // Neither records nor an SOA, but other servers to ask: it does not serve the zone (RFC 2308 section 2.2).
        Err(NetError::Dns(DnsError::NoRecordsFound(NoRecords {
            response_code: code @ ResponseCode::NoError,
            soa: None,
            ns: Some(_),
            ..
        }))) => (Class::of(code), Err("lame: it refers to other servers instead of answering".into())),
        Err(NetError::Dns(DnsError::NoRecordsFound(NoRecords { response_code, negative_ttl, .. }))) => {
            let ttl = negative_ttl.map(|ttl| Duration::from_secs(ttl.into()));
            (Class::of(response_code), Ok(Said::Nothing { reason: negative_text(response_code, wire), ttl }))
        }
        Err(NetError::Dns(DnsError::ResponseCode(code))) => (Class::of(code), Err(code_text(code))),
        Err(NetError::Timeout) => (Class::TimedOut, Err(timed_out())),
        Err(NetError::Truncated) => (Class::Unknown, Err("truncated over TCP as well".into())),
        Err(error @ (NetError::Io(_) | NetError::NoConnections | NetError::Busy)) => {
            (Class::TimedOut, Err(format!("cannot be reached: {error}")))
        }
        Err(error) => (Class::Unknown, Err(error.to_string())),
    }
}

fn has_records(response: &DnsResponse, wire: WireType) -> bool {
    response.answers.iter().any(|record| [wire, WireType::CNAME].contains(&record.record_type()))
}

/// What `owner` is an alias of, if it is one, with the TTL of that.
fn alias(records: &[Record], owner: &Name) -> Option<(Name, u32)> {
    records.iter().filter(|record| record.name == *owner).find_map(|record| match &record.data {
        RData::CNAME(target) => Some((target.0.clone(), record.ttl)),
        _ => None,
    })
}

/// The addresses of `owner` and their shortest TTL; `None`: there are none.
fn gather(records: &[Record], owner: &Name) -> Option<(BTreeSet<IpAddr>, u32)> {
    let mut ttl = u32::MAX;
    let mut found = BTreeSet::new();
    for (address, record) in addresses(records, owner) {
        found.insert(address);
        ttl = ttl.min(record.ttl);
    }
    (!found.is_empty()).then_some((found, ttl))
}

fn addresses<'a>(records: &'a [Record], owner: &Name) -> impl Iterator<Item = (IpAddr, &'a Record)> {
    // Names are equal whatever their case (RFC 4343).
    records.iter().filter(move |record| record.name == *owner).filter_map(|record| match &record.data {
        RData::A(address) => Some((IpAddr::V4(address.0), record)),
        RData::AAAA(address) => Some((IpAddr::V6(address.0), record)),
        _ => None,
    })
}

fn answer(members: BTreeSet<PoolMember>, ttl: u32) -> Outcome {
    if members.is_empty() {
        return Outcome::Negative { reason: "the answer holds no address".into(), ttl: None };
    }
    // A part of it would be arbitrary, and another with the next answer.
    if members.len() > MOST_MEMBERS {
        let reason = format!("the answer has {} members; a pool has at most {MOST_MEMBERS}", members.len());
        return Outcome::Failure { reason };
    }
    Outcome::Answer { members, ttl: Duration::from_secs(ttl.into()) }
}

fn negative_text(code: ResponseCode, wire: WireType) -> String {
    match code {
        ResponseCode::NXDomain => "NXDOMAIN: no such name, or no ready pod behind it".into(),
        _ => format!("NODATA: the name has no {wire} record"),
    }
}

fn code_text(code: ResponseCode) -> String {
    match code {
        ResponseCode::ServFail => "SERVFAIL".into(),
        ResponseCode::Refused => "REFUSED".into(),
        ResponseCode::FormErr => "FORMERR".into(),
        ResponseCode::NotImp => "NOTIMP".into(),
        other => other.to_string(),
    }
}

fn type_name(wire: WireType) -> &'static str {
    match wire {
        WireType::A => "A",
        WireType::AAAA => "AAAA",
        WireType::PTR => "PTR",
        _ => "SRV",
    }
}

#[cfg(test)]
mod tests {
    use hickory_resolver::proto::{
        op::{Message, OpCode},
        rr::rdata::A,
    };

    use super::*;

    fn name(text: &str) -> Name {
        Name::from_ascii(text).unwrap()
    }

    fn srv(priority: u16, weight: u16, target: &str) -> Record {
        Record::from_rdata(name("_https._tcp.web."), 30, RData::SRV(SRV::new(priority, weight, 8443, name(target))))
    }

    fn glue(target: &str, address: [u8; 4]) -> Record {
        Record::from_rdata(name(target), 5, RData::A(A(address.into())))
    }

    async fn members(answers: Vec<Record>, additionals: Vec<Record>) -> Outcome {
        let mut message = Message::response(1, OpCode::Query);
        message.add_answers(answers);
        message.add_additionals(additionals);
        let response = DnsResponse::from_message(message).unwrap();
        // Without servers every question fails.
        let servers = Servers::new(&[], Duration::from_millis(1), None);
        let owner = name("_https._tcp.web.");
        servers.srv_members(&response, &owner, u32::MAX, &mut Counts::default()).await
    }

    #[tokio::test]
    async fn the_lowest_priority_is_primary_others_are_backup_and_weight_zero_becomes_one() {
        let answers = vec![srv(10, 0, "a."), srv(10, 50, "b."), srv(20, 100, "c."), srv(30, 7, "d.")];
        let additionals = ["A.", "b.", "c.", "d."].iter().zip(0..).map(|(name, net)| glue(name, [10, 1, net, 4]));
        let member = |address: &str, weight, tier| PoolMember { address: address.parse().unwrap(), weight, tier };
        let expected = [
            member("10.1.0.4:8443", 1, Tier::Primary),
            member("10.1.1.4:8443", 50, Tier::Primary),
            member("10.1.2.4:8443", 100, Tier::Backup),
            member("10.1.3.4:8443", 7, Tier::Backup),
        ];
        let ttl = Duration::from_secs(5);
        let outcome = members(answers, additionals.collect()).await;
        assert_eq!(outcome, Outcome::Answer { members: expected.into(), ttl });
    }

    #[tokio::test]
    async fn a_target_that_cannot_be_resolved_fails_the_answer_instead_of_halving_the_pool() {
        let outcome = members(vec![srv(0, 1, "a."), srv(0, 1, "b.")], vec![glue("a.", [10, 1, 0, 4])]).await;
        assert!(matches!(&outcome, Outcome::Failure { reason } if reason.contains("target b.")), "{outcome:?}");
    }

    #[tokio::test]
    async fn a_root_target_says_that_there_is_no_service() {
        assert!(matches!(members(vec![srv(0, 0, ".")], Vec::new()).await, Outcome::Negative { .. }));
    }

    #[test]
    fn more_members_than_a_pool_takes_are_a_failure_and_not_a_part_of_them() {
        let many = |count: usize| {
            let address = |number: usize| SocketAddr::from(([10, 1, (number >> 8) as u8, number as u8], 0));
            answer((0..count).map(|number| PoolMember::new(address(number), 1)).collect(), 5)
        };
        assert!(matches!(many(MOST_MEMBERS), Outcome::Answer { .. }));
        assert!(matches!(many(MOST_MEMBERS + 1), Outcome::Failure { reason } if reason.contains("2049")));
    }
}
