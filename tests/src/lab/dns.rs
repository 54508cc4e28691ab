//! What the lab's stand-in for CoreDNS answers: the `kubernetes` plugin with its default TTL of 5 s and `loadbalance`.
//! The rules are those seen in recorded answers of CoreDNS 1.13 (`tests/fixtures/dns`, against which this is tested).
//! Pure: the zone, the query and the shuffling come in as arguments.

use std::{collections::BTreeMap, net::Ipv4Addr};

use hickory_proto::{
    op::{Edns, Message, MessageType, Metadata, OpCode, Query, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{A, AAAA, SOA, SRV},
    },
};
use serde::{Deserialize, Serialize};

use super::{dns_faults::Fault, ipv6::ipv6};

/// Seconds a record may be cached, CoreDNS's default for the `kubernetes` plugin.
const TTL: u32 = 5;
/// Largest UDP answer to a query without EDNS (RFC 1035 4.2.1).
const PLAIN_UDP_BYTES: usize = 512;

/// How the server behaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DnsMode {
    /// As CoreDNS with a synced view of the cluster.
    #[default]
    Normal,
    /// As CoreDNS that has not synced: SERVFAIL with AA and the SOA.
    Servfail,
    /// REFUSED to everything.
    Refused,
    /// No answer at all.
    Silent,
}

/// What the server knows; a JSON file in the run folder.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Zone {
    /// Behaviour.
    pub mode: DnsMode,
    /// Headless services by `SERVICE.NAMESPACE`.
    pub services: BTreeMap<String, HeadlessService>,
    /// Every pod has an IPv6 address besides: [`super::ipv6::ipv6`].
    #[serde(default)]
    pub dual_stack: bool,
    /// What the server does wrong, by the address it listens on; `*`: whichever.
    #[serde(default)]
    pub faults: BTreeMap<String, Fault>,
}

/// One headless service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadlessService {
    /// Ports by the two labels SRV queries use, `_http._tcp`.
    pub ports: BTreeMap<String, u16>,
    /// Addresses of the ready pods.
    pub addresses: Vec<Ipv4Addr>,
}

/// What a query arrived by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A datagram: the answer is truncated to what the client takes.
    Udp,
    /// A stream: up to 65,535 bytes.
    Tcp,
}

/// The answer to a message, or `None` where CoreDNS gives none (a response, a header cut short) and in silent mode.
/// `shuffle` puts the addresses of an answer in the order they are sent in.
pub fn answer(
    zone: &Zone,
    query: &[u8],
    transport: Transport,
    shuffle: &mut dyn FnMut(&mut [Record]),
) -> Option<Vec<u8>> {
    if query.len() < 12 || query[2] & 0x80 != 0 || zone.mode == DnsMode::Silent {
        return None;
    }
    let Ok(request) = Message::from_vec(query) else { return failure(query, ResponseCode::FormErr) };
    if request.metadata.op_code != OpCode::Query {
        return failure(query, ResponseCode::NotImp);
    }
    if request.queries.len() != 1 {
        return failure(query, ResponseCode::FormErr);
    }
    let mut response = Message::new(request.metadata.id, MessageType::Response, request.metadata.op_code);
    response.metadata = Metadata::response_from_request(&request.metadata);
    response.add_queries(request.queries.iter().cloned());
    let size = limit(&request, transport, &mut response);
    match &request.queries[..] {
        _ if zone.mode == DnsMode::Refused => response.metadata.response_code = ResponseCode::Refused,
        [query] if request.version() == 0 => fill(zone, query, &mut response)?,
        _ => response.metadata.response_code = ResponseCode::BADVERS,
    }
    if response.queries.first().is_some_and(|query| query.query_type() != RecordType::SRV) {
        shuffle(&mut response.answers);
    }
    fit(response, size)
}

/// A bare header with the query's id, opcode and RD, for messages that are not taken further.
fn failure(query: &[u8], code: ResponseCode) -> Option<Vec<u8>> {
    Some([&query[..2], &[0x80 | query[2] & 0x79, code.low()], &[0; 8]].concat())
}

fn limit(request: &Message, transport: Transport, response: &mut Message) -> usize {
    let offered = request.edns.as_ref().map(Edns::max_payload);
    if let Some(payload) = offered {
        let mut edns = Edns::new();
        edns.set_max_payload(payload.max(512));
        response.set_edns(edns);
    }
    match transport {
        Transport::Tcp => usize::from(u16::MAX),
        Transport::Udp => offered.map_or(PLAIN_UDP_BYTES, |payload| usize::from(payload).max(PLAIN_UDP_BYTES)),
    }
}

/// What a name stands for.
enum Found<'a> {
    /// Outside cluster.local.
    Foreign,
    Nothing,
    /// A name that exists without records, such as a namespace.
    Bare,
    Service(&'a HeadlessService),
    /// A pod of a service, by its dashed address.
    Endpoint(Ipv4Addr),
    /// A port of a service, by the SRV labels.
    Port(&'a HeadlessService, u16),
}

fn find<'a>(zone: &'a Zone, name: &Name) -> Found<'a> {
    let text = name.to_lowercase().to_ascii();
    let labels: Vec<&str> = text.trim_end_matches('.').split('.').collect();
    let [path @ .., "cluster", "local"] = &labels[..] else { return Found::Foreign };
    let ready = |service: &str, namespace: &str| {
        zone.services.get(&format!("{service}.{namespace}")).filter(|service| !service.addresses.is_empty())
    };
    match path {
        [] | ["svc"] => Found::Bare,
        [namespace, "svc"] => {
            let known =
                zone.services.keys().any(|key| key.split_once('.').is_some_and(|(_, found)| found == *namespace));
            if known { Found::Bare } else { Found::Nothing }
        }
        [service, namespace, "svc"] => ready(service, namespace).map_or(Found::Nothing, Found::Service),
        [endpoint, service, namespace, "svc"] => ready(service, namespace)
            .and_then(|service| service.addresses.iter().find(|address| dashed(**address) == **endpoint))
            .map_or(Found::Nothing, |address| Found::Endpoint(*address)),
        [port, protocol, service, namespace, "svc"] => ready(service, namespace)
            .and_then(|service| Some(Found::Port(service, *service.ports.get(&format!("{port}.{protocol}"))?)))
            .unwrap_or(Found::Nothing),
        _ => Found::Nothing,
    }
}

fn dashed(address: Ipv4Addr) -> String {
    address.to_string().replace('.', "-")
}

/// Fills in code, flags and records. `None` only where a constant name cannot be built, which cannot happen.
fn fill(zone: &Zone, query: &Query, response: &mut Message) -> Option<()> {
    let soa = soa()?;
    if query.query_class() != DNSClass::IN {
        response.metadata.response_code = ResponseCode::Refused;
        return Some(());
    }
    let found = find(zone, query.name());
    if matches!(found, Found::Foreign) {
        response.metadata.response_code = ResponseCode::ServFail;
        return Some(());
    }
    response.metadata.authoritative = true;
    if zone.mode == DnsMode::Servfail {
        response.metadata.response_code = ResponseCode::ServFail;
        response.add_authority(soa);
        return Some(());
    }
    if matches!(found, Found::Nothing) {
        response.metadata.response_code = ResponseCode::NXDomain;
    }
    match (query.query_type(), found) {
        (RecordType::A, Found::Service(service)) => {
            response.add_answers(service.addresses.iter().map(|address| a(query.name().clone(), *address)));
        }
        (RecordType::AAAA, Found::Service(service)) if zone.dual_stack => {
            response.add_answers(service.addresses.iter().map(|address| aaaa(query.name().clone(), *address)));
        }
        (RecordType::A, Found::Endpoint(address)) => {
            response.add_answer(a(query.name().clone(), address));
        }
        (RecordType::SRV, Found::Port(service, port)) => {
            let weight = u16::try_from(100 / service.addresses.len().max(1)).unwrap_or(0).max(1);
            let base = Name::from_labels(query.name().iter().skip(2)).ok()?;
            for address in &service.addresses {
                let target = base.prepend_label(dashed(*address).as_str()).ok()?;
                let data = RData::SRV(SRV::new(0, weight, port, target.clone()));
                response.add_answer(Record::from_rdata(query.name().clone(), TTL, data));
                response.add_additional(a(target, *address));
            }
        }
        (RecordType::SOA, Found::Bare) if query.name().num_labels() == 2 => {
            response.add_answer(soa.clone());
        }
        _ => {}
    }
    if response.answers.is_empty() {
        response.add_authority(soa);
    }
    Some(())
}

fn a(name: Name, address: Ipv4Addr) -> Record {
    Record::from_rdata(name, TTL, RData::A(A(address)))
}

fn aaaa(name: Name, address: Ipv4Addr) -> Record {
    Record::from_rdata(name, TTL, RData::AAAA(AAAA(ipv6(address))))
}

fn soa() -> Option<Record> {
    let zone = Name::from_ascii("cluster.local.").ok()?;
    let primary = Name::from_ascii("ns.dns.cluster.local.").ok()?;
    let mailbox = Name::from_ascii("hostmaster.cluster.local.").ok()?;
    Some(Record::from_rdata(zone, TTL, RData::SOA(SOA::new(primary, mailbox, 1, 7200, 1800, 86400, TTL))))
}

/// The message in at most `size` bytes. As CoreDNS does, the additional section goes first, then answers, with TC set;
/// what remains is a subset.
fn fit(mut response: Message, size: usize) -> Option<Vec<u8>> {
    let whole = response.to_vec().ok()?;
    if whole.len() <= size {
        return Some(whole);
    }
    response.metadata.truncation = true;
    response.additionals.clear();
    let mut bytes = response.to_vec().ok()?;
    while bytes.len() > size && !response.answers.is_empty() {
        // Every record takes at least 16 bytes, so this many have to go.
        let surplus = (bytes.len() - size).div_ceil(128).max(1);
        response.answers.truncate(response.answers.len().saturating_sub(surplus));
        bytes = response.to_vec().ok()?;
    }
    Some(bytes)
}
