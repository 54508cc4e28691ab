//! The DNS source against a server on loopback that replays what CoreDNS 1.13 really answered.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may stop at the first broken assumption"
)]

#[path = "common/dns_server.rs"]
mod dns_server;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use dns_server::Server;

use edge_ctl::{
    model::{BackendSource, PoolSnapshot, PoolState, RecordType, Resolver, ResolverPolicy},
    sources::dns::{DnsHandle, DnsOptions, Guard, spawn_dns_with},
};
use tokio::sync::mpsc;

const SERVICE: &str = "nginx-ingress-svc.nginx-ingress.svc.cluster.local";
const BIG: &str = "big-svc.big.svc.cluster.local";
/// How long a test waits for something that should happen.
const PATIENCE: Duration = Duration::from_secs(10);

/// Recorded responses by case name.
fn recordings() -> BTreeMap<String, Vec<u8>> {
    include_str!("fixtures/dns/coredns.jsonl")
        .lines()
        .map(|line| {
            let entry: serde_json::Value = serde_json::from_str(line).unwrap();
            let hex = entry["response_hex"].as_str().unwrap();
            let bytes = (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect();
            (entry["case"].as_str().unwrap().to_owned(), bytes)
        })
        .collect()
}

/// A recorded response by its case.
fn recorded(case: &str) -> Option<Vec<u8>> {
    Some(recordings().remove(case).unwrap_or_else(|| panic!("no recording `{case}`")))
}

/// What the server of these tests says, by case.
trait Says {
    fn says(&self, case: &str);
    fn says_over_tcp(&self, case: &str);
    fn says_nothing(&self);
}

impl Says for Server {
    fn says(&self, case: &str) {
        self.speaks(recorded(case), None);
    }

    fn says_over_tcp(&self, case: &str) {
        self.speaks_over_tcp(recorded(case));
    }

    fn says_nothing(&self) {
        self.speaks(None, None);
    }
}

fn networks(text: &str) -> Guard {
    vec![text.parse().unwrap()].into()
}

fn source(name: &str, record: RecordType) -> BackendSource {
    let port = (record != RecordType::Srv).then_some(443);
    BackendSource::Dns { name: name.into(), port, resolver: "kube-dns".into(), record }
}

fn resolver(servers: &[&Server]) -> Resolver {
    Resolver {
        name: "kube-dns".into(),
        servers: servers.iter().map(|server| server.address).collect(),
        // Longer than any test: only refresh, retry and hold ask again.
        valid: Some(Duration::from_secs(3600)),
        policy: ResolverPolicy { shrink_hold: Duration::ZERO, ..ResolverPolicy::default() },
    }
}

fn options() -> DnsOptions {
    DnsOptions { server_timeout: Duration::from_millis(300), retry: Duration::from_millis(50) }
}

struct Pool {
    handle: DnsHandle,
    snapshots: mpsc::Receiver<PoolSnapshot>,
}

impl Pool {
    fn of(source: BackendSource, resolver: Resolver) -> Self {
        Self::within(source, resolver, "10.1.0.0/16")
    }

    fn within(source: BackendSource, resolver: Resolver, network: &str) -> Self {
        let (out, snapshots) = mpsc::channel(16);
        let networks: Vec<ipnet::IpNet> = vec![network.parse().unwrap()];
        let handle = spawn_dns_with(options(), vec![(source, resolver)], networks, out);
        Self { handle, snapshots }
    }

    async fn next(&mut self) -> PoolSnapshot {
        tokio::time::timeout(PATIENCE, self.snapshots.recv()).await.expect("a snapshot").unwrap()
    }

    async fn until_counted(&self, class: &str, at_least: u64) {
        let counted = async {
            while self.handle.rows()[0].responses[class] < at_least {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, counted).await.unwrap_or_else(|_| panic!("{class} never counted"));
    }
}

fn hosts(snapshot: &PoolSnapshot) -> BTreeSet<String> {
    snapshot.members.iter().map(|member| member.address.to_string()).collect()
}

fn is_last_good(snapshot: &PoolSnapshot, part: &str) -> bool {
    matches!(&snapshot.state, PoolState::LastGood { reason } if reason.contains(part))
}

#[tokio::test]
async fn the_pool_follows_scaling_up_and_down_on_refresh() {
    let server = Server::start().await;
    server.says("ready-1");
    let mut pool = Pool::of(source(SERVICE, RecordType::A), resolver(&[&server]));
    assert_eq!(pool.next().await.members.len(), 1);
    for (case, count) in [("ready-2", 2), ("ready-3", 3), ("ready-1", 1)] {
        server.says(case);
        pool.handle.refresh(None);
        let snapshot = pool.next().await;
        assert_eq!((snapshot.members.len(), snapshot.state), (count, PoolState::Fresh), "{case}");
    }
    let row = &pool.handle.rows()[0];
    assert_eq!((row.state.as_str(), row.responses["success"], row.requests), ("fresh", 4, 4));
}

#[tokio::test]
async fn srv_answers_bring_port_and_targets_from_the_additional_section() {
    let server = Server::start().await;
    for (case, count) in [("srv-ready-3", 3), ("srv-ready-2", 2)] {
        server.says(case);
        let mut pool = Pool::of(source(&format!("_https._tcp.{SERVICE}"), RecordType::Srv), resolver(&[&server]));
        let snapshot = pool.next().await;
        assert_eq!(snapshot.members.len(), count);
        assert!(snapshot.members.iter().all(|member| member.address.port() == 443 && member.weight > 0));
    }
    assert_eq!(server.asked(), 2);
}

#[tokio::test]
async fn a_truncated_answer_is_asked_again_over_tcp_and_never_used_itself() {
    let server = Server::start().await;
    server.says("big-truncated");
    server.says_over_tcp("big-tcp");
    let mut pool = Pool::within(source(BIG, RecordType::A), resolver(&[&server]), "10.0.0.0/8");
    let snapshot = pool.next().await;
    assert_eq!((snapshot.members.len(), snapshot.state), (150, PoolState::Fresh));
}

#[tokio::test]
async fn a_truncated_answer_without_tcp_keeps_the_last_good_pool() {
    let server = Server::start().await;
    server.says("big-truncated");
    server.says_over_tcp("big-tcp");
    let mut pool = Pool::within(source(BIG, RecordType::A), resolver(&[&server]), "10.0.0.0/8");
    assert_eq!(pool.next().await.members.len(), 150);
    server.says("big-truncated");
    pool.handle.refresh(None);
    let kept = pool.next().await;
    assert_eq!(kept.members.len(), 150);
    assert!(matches!(kept.state, PoolState::LastGood { .. }));
}

#[tokio::test]
async fn servfail_and_refused_are_failures_each_counted_in_its_class() {
    for (case, class, text) in
        [("servfail-outside", "server_failure", "SERVFAIL"), ("refused-outside", "refused", "REFUSED")]
    {
        let server = Server::start().await;
        server.says(case);
        let mut pool = Pool::of(source("nginx-ingress-svc.nginx-ingress.svc", RecordType::A), resolver(&[&server]));
        pool.until_counted(class, 2).await;
        let row = &pool.handle.rows()[0];
        assert_eq!(row.state, "unknown");
        assert!(row.error.as_deref().unwrap().contains(text), "{:?}", row.error);
        assert!(pool.snapshots.try_recv().is_err(), "nothing is known, so nothing is sent");
    }
}

#[tokio::test]
async fn servfail_of_an_unsynced_server_keeps_the_pool_until_it_answers_again() {
    let server = Server::start().await;
    server.says("ready-3");
    let mut pool = Pool::of(source(SERVICE, RecordType::A), resolver(&[&server]));
    let first = pool.next().await;
    server.says("servfail-unsynced");
    pool.handle.refresh(None);
    let kept = pool.next().await;
    assert_eq!(hosts(&kept), hosts(&first));
    assert!(is_last_good(&kept, "SERVFAIL"), "{:?}", kept.state);
    // Retried by itself, without waiting for `valid`.
    server.says("ready-2");
    let back = pool.next().await;
    assert_eq!((back.members.len(), back.state), (2, PoolState::Fresh));
}

#[tokio::test]
async fn nxdomain_is_held_and_nodata_counts_as_success() {
    let server = Server::start().await;
    server.says("ready-3");
    let mut pool = Pool::of(source(SERVICE, RecordType::A), resolver(&[&server]));
    let first = pool.next().await;
    server.says("no-pods");
    pool.handle.refresh(None);
    let held = pool.next().await;
    assert_eq!(hosts(&held), hosts(&first));
    assert!(is_last_good(&held, "NXDOMAIN"), "{:?}", held.state);
    assert_eq!(pool.handle.rows()[0].responses["host_not_found"], 1);

    server.says("nodata-aaaa");
    let empty = Pool::of(source(SERVICE, RecordType::Aaaa), resolver(&[&server]));
    empty.until_counted("success", 1).await;
    assert!(empty.handle.rows()[0].error.as_deref().unwrap().contains("NODATA"));
}

#[tokio::test]
async fn nxdomain_that_lasts_empties_the_pool() {
    let server = Server::start().await;
    server.says("ready-3");
    let (out, snapshots) = mpsc::channel(16);
    let policy = ResolverPolicy { hold: Duration::from_millis(200), ..ResolverPolicy::default() };
    let quick = Resolver { valid: None, policy, ..resolver(&[&server]) };
    let networks: Vec<ipnet::IpNet> = vec!["10.1.0.0/16".parse().unwrap()];
    let handle = spawn_dns_with(options(), vec![(source(SERVICE, RecordType::A), quick)], networks, out);
    let mut pool = Pool { handle, snapshots };
    pool.next().await;
    server.says("no-pods");
    pool.handle.refresh(None);
    assert!(is_last_good(&pool.next().await, "NXDOMAIN"));
    let emptied = pool.next().await;
    assert_eq!((emptied.members.len(), emptied.state), (0, PoolState::Fresh));
}

#[tokio::test]
async fn a_silent_server_is_passed_over_and_the_one_that_answered_is_asked_first_afterwards() {
    let (dead, alive) = (Server::start().await, Server::start().await);
    dead.says_nothing();
    alive.says("ready-2");
    let mut pool = Pool::of(source(SERVICE, RecordType::A), resolver(&[&dead, &alive]));
    assert_eq!(pool.next().await.members.len(), 2);
    assert_eq!(pool.handle.rows()[0].responses["timed_out"], 1);
    let asked = dead.asked();
    alive.says("ready-3");
    pool.handle.refresh(None);
    assert_eq!(pool.next().await.members.len(), 3);
    assert_eq!(dead.asked(), asked);
}

#[tokio::test]
async fn servers_that_all_fall_silent_keep_the_pool() {
    let server = Server::start().await;
    server.says("ready-2");
    let mut pool = Pool::of(source(SERVICE, RecordType::A), resolver(&[&server]));
    let first = pool.next().await;
    server.says_nothing();
    pool.handle.refresh(None);
    let kept = pool.next().await;
    assert_eq!(hosts(&kept), hosts(&first));
    assert!(is_last_good(&kept, "timed out"), "{:?}", kept.state);
}

#[tokio::test]
async fn an_answer_outside_the_pod_networks_never_enters_the_pool() {
    let server = Server::start().await;
    server.says("ready-3");
    let pool = Pool::within(source(SERVICE, RecordType::A), resolver(&[&server]), "10.9.0.0/16");
    pool.until_counted("success", 1).await;
    let row = &pool.handle.rows()[0];
    assert_eq!(row.addresses, Vec::<String>::new());
    assert!(row.refused_addresses >= 3);
}

#[tokio::test]
async fn other_settings_keep_what_was_learnt_and_other_sources_go() {
    let server = Server::start().await;
    server.says("ready-3");
    let kept = source(SERVICE, RecordType::A);
    let mut pool = Pool::of(kept.clone(), resolver(&[&server]));
    pool.next().await;
    server.says_nothing();
    let mut slower = resolver(&[&server]);
    slower.valid = Some(Duration::from_secs(60));
    pool.handle.reconfigure(vec![(kept, slower)], networks("10.1.0.0/16"));
    assert_eq!(pool.handle.rows()[0].addresses.len(), 3);
    pool.handle.reconfigure(Vec::new(), Guard::default());
    assert_eq!(pool.handle.rows(), Vec::new());
}

#[tokio::test]
async fn a_server_that_cannot_be_reached_counts_as_timed_out_and_is_passed_over() {
    let (gone, alive) = (Server::start().await, Server::start().await);
    let mut servers = resolver(&[&gone, &alive]);
    drop(gone);
    servers.servers.insert(1, "127.0.0.1:1".parse().unwrap());
    alive.says("ready-1");
    let mut pool = Pool::of(source(SERVICE, RecordType::A), servers);
    assert_eq!(pool.next().await.members.len(), 1);
    assert_eq!(pool.handle.rows()[0].responses["timed_out"], 2);
    assert_eq!(pool.handle.rows()[0].requests, 3);
}

#[tokio::test]
async fn a_thousand_services_on_one_name_ask_once_and_each_has_its_own_port() {
    let server = Server::start().await;
    server.says("ready-3");
    let (out, mut snapshots) = mpsc::channel(1024);
    let on_port = |port| BackendSource::Dns {
        name: SERVICE.into(),
        port: Some(port),
        resolver: "kube-dns".into(),
        record: RecordType::A,
    };
    let sources: Vec<_> = (1..=1000).map(|port| (on_port(port), resolver(&[&server]))).collect();
    let handle = spawn_dns_with(options(), sources, networks("10.1.0.0/16"), out);
    let mut told = BTreeSet::new();
    while told.len() < 1000 {
        let snapshot = tokio::time::timeout(PATIENCE, snapshots.recv()).await.expect("a snapshot").unwrap();
        let BackendSource::Dns { port: Some(port), .. } = snapshot.source else { panic!("{:?}", snapshot.source) };
        assert_eq!(snapshot.members.len(), 3);
        assert!(snapshot.members.iter().all(|member| member.address.port() == port));
        told.insert(port);
    }
    assert_eq!(server.asked(), 1);
    let rows = handle.rows();
    assert_eq!((rows.len(), rows[0].requests), (1, 1));
}
