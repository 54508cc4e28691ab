//! The lab's DNS server against recorded answers of CoreDNS (`fixtures/dns`).
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test may stop at the first broken assumption, its helpers too"
)]

use std::collections::{BTreeMap, BTreeSet};

use edge_tests::lab::dns::{DnsMode, HeadlessService, Transport, Zone, answer};
use hickory_proto::{
    op::Message,
    rr::{RData, Record},
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Recorded {
    case: String,
    mode: DnsMode,
    services: BTreeMap<String, Vec<std::net::Ipv4Addr>>,
    transport: String,
    query: String,
    response: Option<String>,
}

fn recorded() -> Vec<Recorded> {
    let text = include_str!("../fixtures/dns/coredns.jsonl");
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

impl Recorded {
    fn ours(&self) -> Option<Vec<u8>> {
        let ports: BTreeMap<String, u16> = [("_http._tcp".to_owned(), 80), ("_https._tcp".to_owned(), 443)].into();
        let service = |addresses: &Vec<_>| HeadlessService { ports: ports.clone(), addresses: addresses.clone() };
        let services = self.services.iter().map(|(name, addresses)| (name.clone(), service(addresses))).collect();
        let transport = if self.transport == "udp" { Transport::Udp } else { Transport::Tcp };
        answer(&Zone { mode: self.mode, services, ..Zone::default() }, &bytes(&self.query), transport, &mut |_| {})
    }
}

/// A record as text, without the serial of an SOA, which counts CoreDNS's changes.
fn text(record: &Record) -> String {
    match &record.data {
        RData::SOA(soa) => {
            let rest = (soa.refresh, soa.retry, soa.expire, soa.minimum);
            format!("{} {} SOA {} {} {rest:?}", record.name, record.ttl, soa.mname, soa.rname)
        }
        data => format!("{} {} {:?}", record.name, record.ttl, data),
    }
}

fn set(records: &[Record]) -> BTreeSet<String> {
    records.iter().map(text).collect()
}

#[test]
fn the_stand_in_answers_every_recorded_query_as_coredns_did() {
    for case in recorded() {
        let name = format!("{} over {}", case.case, case.transport);
        let Some(theirs) = case.response.as_deref().map(bytes) else {
            assert_eq!(case.ours(), None, "{name}: CoreDNS did not answer");
            continue;
        };
        let ours = case.ours().unwrap_or_else(|| panic!("{name}: no answer"));
        // Bytes 2 and 3 are the flags and the low half of the code.
        assert_eq!(format!("{:02x?}", &ours[2..4]), format!("{:02x?}", &theirs[2..4]), "{name}: flags and code");
        assert_eq!(ours[4..12], theirs[4..12], "{name}: section counts");
        let (ours, theirs) = (Message::from_vec(&ours).unwrap(), Message::from_vec(&theirs).unwrap());
        assert_eq!(ours.metadata.response_code, theirs.metadata.response_code, "{name}");
        assert_eq!(ours.queries, theirs.queries, "{name}: question");
        assert_eq!(ours.edns.is_some(), theirs.edns.is_some(), "{name}: EDNS");
        if !ours.metadata.truncation {
            assert_eq!(set(&ours.answers), set(&theirs.answers), "{name}: answers");
            assert_eq!(set(&ours.additionals), set(&theirs.additionals), "{name}: additional section");
        }
        assert_eq!(set(&ours.authorities), set(&theirs.authorities), "{name}: authority section");
    }
}

#[test]
fn the_recordings_hold_every_state_the_lab_relies_on() {
    let cases = recorded();
    let has = |what: &str| cases.iter().any(|case| case.case.starts_with(what));
    for state in
        ["service-missing", "service-no-pods", "ready-3", "terminating-serving", "150 endpoints", "before sync"]
    {
        assert!(has(state), "{state}");
    }
}

#[test]
fn a_refusing_server_refuses_and_a_silent_one_says_nothing() {
    let mut case = recorded().into_iter().find(|case| case.case.starts_with("ready-3")).unwrap();
    case.mode = DnsMode::Refused;
    assert_eq!(case.ours().unwrap()[3] & 0x0f, 5);
    case.mode = DnsMode::Silent;
    assert_eq!(case.ours(), None);
}
