//! One question to the configured servers: which answers, and in which class of NGINX Plus's statistics each falls.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
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
use crate::model::{PoolMember, RecordType};

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

/// The servers of one resolver. Each is its own pool of one, so that failing over, and counting, is ours.
pub(super) struct Servers {
    pools: Vec<(SocketAddr, NameServerPool<TokioRuntimeProvider>)>,
    timeout: Duration,
    /// The server that answered last is asked first: a dead one costs its timeout once, not with every query.
    first: AtomicUsize,
}

/// What one server said.
enum Said {
    Records(Box<DnsResponse>),
    Nothing { reason: String, ttl: Option<Duration> },
}

impl Servers {
    /// `timeout`: how long one server may take, retransmissions and the change to TCP included.
    pub(super) fn new(addresses: &[SocketAddr], timeout: Duration) -> Self {
        let mut options = ResolverOpts::default();
        options.timeout = timeout;
        options.attempts = 1;
        options.num_concurrent_reqs = 1;
        // Without it the port is any from 1024 on, which may be one that SNAT gives to a flow towards the same server.
        options.os_port_selection = true;
        let pools = addresses
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
                Some((*address, pool))
            })
            .collect();
        Self { pools, timeout, first: AtomicUsize::new(0) }
    }

    /// Asks for the members of a pool. `port`: of every backend; SRV answers bring their own.
    pub(super) async fn members(
        &self,
        name: &Name,
        record: RecordType,
        port: Option<u16>,
        counts: &mut Counts,
    ) -> Outcome {
        let wire = match record {
            RecordType::A => WireType::A,
            RecordType::Aaaa => WireType::AAAA,
            RecordType::Srv => WireType::SRV,
        };
        let response = match self.ask(name, wire, counts).await {
            Ok(Said::Records(response)) => response,
            Ok(Said::Nothing { reason, ttl }) => return Outcome::Negative { reason, ttl },
            Err(reason) => return Outcome::Failure { reason },
        };
        if record == RecordType::Srv {
            return self.srv_members(&response, counts).await;
        }
        let Some(port) = port else {
            return Outcome::Failure { reason: format!("{record} records name no port, and none is configured") };
        };
        let mut members = BTreeSet::new();
        let mut ttl = u32::MAX;
        for (address, record) in addresses(&response.answers, None) {
            members.insert(PoolMember::new(SocketAddr::new(address, port), 1));
            ttl = ttl.min(record.ttl);
        }
        answer(members, ttl)
    }

    /// Only the lowest priority counts (RFC 2782); weight 0 becomes 1, which is as small a share as there is.
    async fn srv_members(&self, response: &DnsResponse, counts: &mut Counts) -> Outcome {
        let services: Vec<(&SRV, u32)> = response
            .answers
            .iter()
            .filter_map(|record| match &record.data {
                RData::SRV(srv) => Some((srv, record.ttl)),
                _ => None,
            })
            .collect();
        let Some(lowest) = services.iter().map(|(srv, _)| srv.priority).min() else {
            return answer(BTreeSet::new(), 0);
        };
        let mut members = BTreeSet::new();
        let mut shortest = u32::MAX;
        for (srv, ttl) in services.into_iter().filter(|(srv, _)| srv.priority == lowest) {
            // Target "." says that the service is decidedly not available here (RFC 2782).
            if srv.target.is_root() {
                continue;
            }
            let (targets, target_ttl) = match self.target(response, &srv.target, counts).await {
                Ok(found) => found,
                // Half a pool is worse than the last good one.
                Err(reason) => return Outcome::Failure { reason: format!("SRV target {}: {reason}", srv.target) },
            };
            shortest = shortest.min(ttl).min(target_ttl);
            for address in targets {
                let address = SocketAddr::new(address, srv.port);
                members.insert(PoolMember::new(address, srv.weight.max(1)));
            }
        }
        answer(members, shortest)
    }

    /// Addresses of an SRV target: from the additional section, else by asking.
    async fn target(
        &self,
        response: &DnsResponse,
        target: &Name,
        counts: &mut Counts,
    ) -> Result<(BTreeSet<IpAddr>, u32), String> {
        let gather = |records: &[Record], owner: Option<&Name>| {
            let mut ttl = u32::MAX;
            let mut found = BTreeSet::new();
            for (address, record) in addresses(records, owner) {
                found.insert(address);
                ttl = ttl.min(record.ttl);
            }
            (found, ttl)
        };
        let (found, ttl) = gather(&response.additionals, Some(target));
        if !found.is_empty() {
            return Ok((found, ttl));
        }
        for wire in [WireType::A, WireType::AAAA] {
            if let Said::Records(response) = Box::pin(self.ask(target, wire, counts)).await? {
                let (found, ttl) = gather(&response.answers, None);
                if !found.is_empty() {
                    return Ok((found, ttl));
                }
            }
        }
        Ok((BTreeSet::new(), u32::MAX))
    }

    /// Asks one server after the other until one knows. NXDOMAIN is knowledge; SERVFAIL and the like are not.
    async fn ask(&self, name: &Name, wire: WireType, counts: &mut Counts) -> Result<Said, String> {
        let mut failures = Vec::new();
        let first = self.first.load(Ordering::Relaxed);
        for turn in 0..self.pools.len() {
            let index = (first + turn) % self.pools.len();
            let Some((server, pool)) = self.pools.get(index) else { continue };
            *counts.requests.entry(type_name(wire)).or_default() += 1;
            let (class, said) = ask_one(pool, self.timeout, name, wire).await;
            *counts.responses.entry(class).or_default() += 1;
            match said {
                Ok(said) => {
                    self.first.store(index, Ordering::Relaxed);
                    return Ok(said);
                }
                Err(reason) => failures.push(format!("{server}: {reason}")),
            }
        }
        if failures.is_empty() {
            failures.push("no server is configured".into());
        }
        Err(failures.join("; "))
    }
}

async fn ask_one(
    pool: &NameServerPool<TokioRuntimeProvider>,
    timeout: Duration,
    name: &Name,
    wire: WireType,
) -> (Class, Result<Said, String>) {
    let mut answers = pool.lookup(Query::query(name.clone(), wire), DnsRequestOptions::default());
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
    response.answers.iter().any(|record| record.record_type() == wire)
}

fn addresses<'a>(records: &'a [Record], owner: Option<&Name>) -> impl Iterator<Item = (IpAddr, &'a Record)> {
    records.iter().filter(move |record| owner.is_none_or(|owner| record.name == *owner)).filter_map(|record| {
        match &record.data {
            RData::A(address) => Some((IpAddr::V4(address.0), record)),
            RData::AAAA(address) => Some((IpAddr::V6(address.0), record)),
            _ => None,
        }
    })
}

fn answer(members: BTreeSet<PoolMember>, ttl: u32) -> Outcome {
    if members.is_empty() {
        return Outcome::Negative { reason: "the answer holds no address".into(), ttl: None };
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
        let servers = Servers::new(&[], Duration::from_millis(1));
        servers.srv_members(&response, &mut Counts::default()).await
    }

    #[tokio::test]
    async fn only_the_lowest_priority_counts_and_weight_zero_becomes_one() {
        let answers = vec![srv(10, 0, "a."), srv(10, 50, "b."), srv(20, 100, "c.")];
        let additionals = vec![glue("A.", [10, 1, 0, 4]), glue("b.", [10, 1, 1, 4]), glue("c.", [10, 1, 2, 4])];
        let expected = [("10.1.0.4:8443", 1), ("10.1.1.4:8443", 50)]
            .map(|(address, weight)| PoolMember::new(address.parse().unwrap(), weight));
        let ttl = Duration::from_secs(5);
        assert_eq!(members(answers, additionals).await, Outcome::Answer { members: expected.into(), ttl });
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
}
