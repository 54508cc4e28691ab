//! Every recorded answer of a real CoreDNS, replayed byte for byte: what the source makes of it is what another
//! implementation read out of it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may stop at the first broken assumption"
)]

#[path = "common/dns_server.rs"]
mod dns_server;

use std::{collections::BTreeSet, time::Duration};

use dns_server::Server;
use edge_ctl::{
    model::{BackendSource, PoolSnapshot, PoolState, RecordType, Resolver, ResolverPolicy, view::DnsRow},
    sources::dns::{DnsHandle, DnsOptions, spawn_dns_with},
};
use serde::Deserialize;
use tokio::sync::mpsc;

const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Deserialize)]
struct Recorded {
    file: String,
    state: String,
    transport: String,
    name: String,
    #[serde(rename = "type")]
    record: RecordType,
    kind: String,
    flags: String,
    answers: Option<BTreeSet<String>>,
    count: usize,
    response_hex: String,
}

impl Recorded {
    fn bytes(&self) -> Vec<u8> {
        let hex = &self.response_hex;
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
    }

    fn is_truncated(&self) -> bool {
        self.flags.split(' ').any(|flag| flag == "TC")
    }

    fn what(&self) -> String {
        format!("{} {:?} {} {} {}", self.file, self.state, self.transport, self.record, self.name)
    }
}

fn recordings() -> Vec<Recorded> {
    include_str!("fixtures/dns/recorded.jsonl").lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Header and question of an answer with TC, so that it is asked for again over TCP (RFC 1035 4.1.1: TC is the second bit of
/// the third byte; the counts of the other three sections are bytes 6 to 11).
fn truncated(mut bytes: Vec<u8>) -> Vec<u8> {
    let mut end = 12;
    while bytes[end] != 0 {
        end += usize::from(bytes[end]) + 1;
    }
    // The root label, type and class.
    bytes.truncate(end + 5);
    bytes[2] |= 0b10;
    bytes[6..12].fill(0);
    bytes
}

/// What the source makes of what the server says now: the first snapshot, if there is one, and the row.
async fn outcome(server: &Server, recorded: &Recorded) -> (Option<PoolSnapshot>, DnsRow) {
    let port = (recorded.record != RecordType::Srv).then_some(8080);
    let source =
        BackendSource::Dns { name: recorded.name.clone(), port, resolver: "kube-dns".into(), record: recorded.record };
    let resolver = Resolver {
        name: "kube-dns".into(),
        servers: vec![server.address],
        valid: Some(Duration::from_secs(3600)),
        policy: ResolverPolicy { hold: Duration::from_secs(3600), ..ResolverPolicy::default() },
    };
    let networks: Vec<ipnet::IpNet> = ["10.0.0.0/8", "fd00::/8"].map(|network| network.parse().unwrap()).into();
    let (out, mut snapshots) = mpsc::channel(16);
    let options = DnsOptions { server_timeout: Duration::from_secs(2), retry: Duration::from_secs(3600) };
    let handle = spawn_dns_with(options, vec![(source, resolver)], networks, out);
    let row = tokio::time::timeout(PATIENCE, answered(&handle)).await.unwrap_or_else(|_| panic!("{}", recorded.what()));
    (snapshots.try_recv().ok(), row)
}

/// The row, once the first query has ended: that is when the next one is known.
async fn answered(handle: &DnsHandle) -> DnsRow {
    loop {
        let row = handle.rows().remove(0);
        if row.next.is_some() {
            // The snapshot follows at once.
            tokio::task::yield_now().await;
            return row;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn check(recorded: &Recorded, snapshot: Option<PoolSnapshot>, row: &DnsRow) {
    let what = recorded.what();
    let (class, error) = match recorded.kind.as_str() {
        "ANSWER" => ("success", None),
        "NODATA" => ("success", Some("NODATA")),
        "NXDOMAIN" => ("host_not_found", Some("NXDOMAIN")),
        "SERVFAIL" => ("server_failure", Some("SERVFAIL")),
        "REFUSED" => ("refused", Some("REFUSED")),
        other => panic!("{what}: {other} is not expected"),
    };
    assert!(row.responses[class] > 0, "{what}: {:?}", row.responses);
    if let Some(text) = error {
        assert!(row.error.as_deref().is_some_and(|error| error.contains(text)), "{what}: {:?}", row.error);
        assert!(snapshot.is_none_or(|snapshot| snapshot.members.is_empty()), "{what}: members of an empty answer");
        return;
    }
    let snapshot = snapshot.unwrap_or_else(|| panic!("{what}: no pool, {:?}", row.error));
    assert_eq!(snapshot.state, PoolState::Fresh, "{what}");
    match &recorded.answers {
        Some(answers) => {
            let text = |address: std::net::SocketAddr| match recorded.record {
                RecordType::Srv => address.to_string(),
                _ => address.ip().to_string(),
            };
            let found: BTreeSet<String> = snapshot.members.iter().map(|member| text(member.address)).collect();
            assert_eq!(found, *answers, "{what}");
        }
        None => assert_eq!(snapshot.members.len(), recorded.count, "{what}"),
    }
}

/// Largest UDP answer that our queries ask for (EDNS, RFC 6891 6.2.5, as the DNS flag day of 2020 has it).
const UDP_BYTES: usize = 1232;

/// Names that are aliases of names outside of the cluster have no address in it, whatever the answer says; an answer that is
/// larger than we ask for would not have come.
fn is_judged(recorded: &Recorded) -> bool {
    let fits = recorded.transport == "tcp" || recorded.response_hex.len() / 2 <= UDP_BYTES;
    fits && (recorded.kind != "ANSWER" || recorded.answers.as_ref().is_none_or(|answers| !answers.is_empty()))
}

#[tokio::test]
async fn every_recorded_answer_becomes_the_pool_that_another_implementation_reads_out_of_it() {
    let server = Server::start().await;
    let all = recordings();
    let mut judged = 0;
    for recorded in all.iter().filter(|recorded| is_judged(recorded)) {
        // What is cut off is judged by what came over TCP for the same question.
        let whole = |one: &&Recorded| {
            (&one.file, &one.name, one.record) == (&recorded.file, &recorded.name, recorded.record)
                && one.transport == "tcp"
        };
        let judge = if recorded.is_truncated() {
            let Some(whole) = all.iter().find(whole) else { continue };
            server.speaks(Some(recorded.bytes()), Some(whole.bytes()));
            whole
        } else if recorded.transport == "tcp" {
            server.speaks(Some(truncated(recorded.bytes())), Some(recorded.bytes()));
            recorded
        } else {
            server.speaks(Some(recorded.bytes()), None);
            recorded
        };
        let (snapshot, row) = outcome(&server, recorded).await;
        check(judge, snapshot, &row);
        judged += 1;
    }
    println!("{judged} of {} recordings judged", all.len());
    assert!(judged > 290, "{judged} of {}", all.len());
}
