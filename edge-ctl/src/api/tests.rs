use std::{
    io::{Read, Write},
    net::TcpStream,
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener as StdListener, UnixStream},
    },
    sync::Mutex,
};

use serde_json::{Value, json};

use super::*;
use crate::model::bgp_session::{Order, PeerOrder};
use crate::model::capture::{CaptureOrder, CaptureRow};
use crate::model::{
    RecordType, SnatLevel, SnatRow,
    query::{ConfigRow, MapEntryRow, ReasonRow},
    view::*,
};

/// Answers every question with rows of its kind, and remembers the questions.
#[derive(Default)]
struct Fake {
    asked: Mutex<Vec<Query>>,
}

impl Views for Fake {
    fn answer(&self, query: Query) -> BoxFuture<'_, Result<Answer, ViewError>> {
        self.asked.lock().unwrap().push(query.clone());
        Box::pin(async move { rows(query) })
    }
}

fn map(pairs: &[(&str, u64)]) -> std::collections::BTreeMap<String, u64> {
    pairs.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
}

fn rows(query: Query) -> Result<Answer, ViewError> {
    let text = str::to_owned;
    Ok(match query {
        Query::Status => Answer::Status(Box::new(StatusRow {
            state: text("ok"),
            version: text("0.1.0"),
            uptime: 60,
            map_writes: 7,
            actions: map(&[("add-backend", 3)]),
            ..StatusRow::default()
        })),
        Query::Services => Answer::Services(vec![ServiceRow {
            name: text("web"),
            vip: text("172.16.1.88:80"),
            proto: text("tcp"),
            connections: 5,
            bytes_in: 1000,
            drops: map(&[("no-backend", 2)]),
            announced: text("yes"),
            ..ServiceRow::default()
        }]),
        Query::Backends => Answer::Backends(vec![BackendRow {
            service: text("web"),
            backend: text("10.1.0.4:80"),
            state: text("up"),
            connect: Some(0.3),
            first_byte: Some(0.9),
            snat: vec![SnatRow { address: text("10.1.0.1"), used: 900, allowed: 1000, level: SnatLevel::Critical }],
            ..BackendRow::default()
        }]),
        Query::Flows { limit, .. } => {
            Answer::Flows((0..limit.min(3)).map(|_| FlowRow { service: text("web"), ..FlowRow::default() }).collect())
        }
        Query::Dns => Answer::Dns(vec![DnsRow {
            name: text("web.\"prod\".local"),
            kind: text("A"),
            state: text("fresh"),
            age: Some(4),
            held: Some(text("NXDOMAIN")),
            held_age: Some(2),
            responses: map(&[("success", 9)]),
            ..DnsRow::default()
        }]),
        Query::DnsRefresh { name } => Answer::Dns(vec![DnsRow { name: name.unwrap_or_default(), ..DnsRow::default() }]),
        Query::DnsQuery { name, record, resolver } => Answer::DnsRecords(vec![DnsRecordRow {
            name,
            kind: record.unwrap_or_default().to_string(),
            resolver: resolver.unwrap_or_default(),
            ..DnsRecordRow::default()
        }]),
        Query::DnsZones => Answer::DnsZones(vec![DnsZoneRow {
            resolver: text("kube-dns"),
            requests: map(&[("name", 7)]),
            responses: map(&[("refused", 2)]),
            servers: vec![DnsServerRow { server: text("10.1.0.41:53"), state: text("up"), ..DnsServerRow::default() }],
        }]),
        Query::Acl | Query::AclAdd { .. } | Query::AclRemove { .. } => Answer::Acl(Vec::new()),
        Query::BgpPeers => Answer::BgpPeers(vec![BgpPeerRow {
            neighbor: text("172.16.1.80"),
            asn: 64512,
            state: text("Established"),
            max_prefixes: Some(100),
            bfd: Some(BfdRow { state: text("Up"), downs: 1, ..BfdRow::default() }),
            messages: map(&[("open_sent", 1)]),
            ..BgpPeerRow::default()
        }]),
        Query::BgpMessages(peer) => Answer::BgpMessages(vec![BgpMessageRow {
            time: 1,
            sent: true,
            local: std::net::SocketAddr::new(peer, 179),
            remote: std::net::SocketAddr::new(peer, 1),
            kind: text("OPEN"),
            length: 1,
            bytes: text("ff"),
        }]),
        Query::BgpOrder(order) => {
            Answer::BgpPeers(vec![BgpPeerRow { desc: format!("{order:?}"), ..BgpPeerRow::default() }])
        }
        Query::BgpReceived(peer) if peer.to_string() != "172.16.1.80" => {
            return Err(ViewError::NotFound(format!("there is no peer {peer}")));
        }
        Query::BgpRoutes | Query::BgpReceived(_) | Query::BgpAdvertised(_) => {
            Answer::BgpRoutes(vec![BgpRouteRow { network: text("10.1.0.0/24"), ..BgpRouteRow::default() }])
        }
        Query::BgpPolicy(question) => Answer::BgpPolicy(vec![crate::model::view::PolicyRow {
            network: question.prefix.to_string(),
            ..Default::default()
        }]),
        Query::Routes => Answer::Routes(vec![
            RouteRow { protocol: text("bgp"), installed: true, ..RouteRow::default() },
            RouteRow { protocol: text("bgp"), installed: false, ..RouteRow::default() },
        ]),
        Query::Maps => {
            let windows = MapRow { hits: Some(1), misses: Some(1), displaced: Some(1), ..MapRow::default() };
            let control = MapRow { name: text("CONTROL"), entries: Some(1), max_entries: 1, ..MapRow::default() };
            Answer::Maps(vec![control, windows])
        }
        Query::Map { name, .. } => Answer::MapEntries(vec![MapEntryRow { key: name, value: text("seed=*") }]),
        Query::Xdp => {
            Answer::Xdp(vec![XdpRow { interface: text("ens33"), state: text("attached"), ..XdpRow::default() }])
        }
        Query::Reasons => Answer::Reasons(vec![ReasonRow {
            service: text("-"),
            reason: text("no-flow"),
            action: text("pass"),
            packets: 4,
        }]),
        Query::Events => Answer::Events(vec![EventRow { kind: text("drop"), ..EventRow::default() }]),
        Query::Config => Answer::Config(ConfigRow { file: text("edge.toml"), ..ConfigRow::default() }),
        Query::Audit => Answer::Audit(Vec::new()),
        Query::FlowKill(meant) => Answer::Killed(crate::model::query::KilledRow { service: meant.service, flows: 1 }),
        Query::Change(_) => Answer::Reloaded(crate::model::query::ReloadRow::default()),
        Query::Capture(order) => Answer::Capturing(CaptureRow { vip: order.vip, ..CaptureRow::default() }),
        Query::Health => Answer::Health(vec![crate::model::view::HealthRow {
            service: text("web"),
            backend: text("10.1.0.4:80"),
            state: text("up"),
            checks: 3,
            ..Default::default()
        }]),
        Query::HealthHistory => Answer::HealthHistory(vec![Default::default()]),
        Query::Order { service, backend, .. } => {
            Answer::Backends(vec![BackendRow { service, backend: backend.to_string(), ..BackendRow::default() }])
        }
        Query::Reload => return Err(ViewError::Invalid(vec![text("edge.toml:1: a"), text("edge.toml:2: b")])),
    })
}

/// A served API in a folder of its own.
struct Served {
    folder: tempfile::TempDir,
    fake: Arc<Fake>,
    http: Option<SocketAddr>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<io::Result<()>>>,
}

impl Served {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listen = Listen { socket: folder.path().join("edge.sock"), http: Some("127.0.0.1:0".parse().unwrap()) };
        let fake = Arc::new(Fake::default());
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let (bound_at, bound) = std::sync::mpsc::channel();
        let views: Arc<dyn Views> = fake.clone();
        let thread = std::thread::spawn(move || {
            runtime().block_on(async {
                let bound = bind(&listen).await.unwrap();
                bound_at.send(bound.http_address()).unwrap();
                serve_bound(bound, views, async {
                    let _ = stopped.await;
                })
                .await
            })
        });
        let http = bound.recv().unwrap();
        Self { folder, fake, http, stop: Some(stop), thread: Some(thread) }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("edge.sock")
    }

    fn request(&self, method: &str, path: &str) -> (u16, Value) {
        let (status, body) = exchange(UnixStream::connect(self.socket()).unwrap(), method, path);
        (status, serde_json::from_str(&body).unwrap_or_else(|_| panic!("not JSON: {body}")))
    }

    fn stop(&mut self) -> io::Result<()> {
        drop(self.stop.take());
        self.thread.take().unwrap().join().unwrap()
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn exchange(mut stream: impl Read + Write, method: &str, path: &str) -> (u16, String) {
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: edge\r\nConnection: close\r\nContent-Length: 0\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

#[test]
fn every_question_has_a_path_that_leads_to_it() {
    let served = Served::start();
    let peer = "172.16.1.80".parse().unwrap();
    let order = |verb| Query::Order { service: "we b/&".into(), backend: "10.1.0.4:80".parse().unwrap(), verb };
    let queries = [
        Query::Status,
        Query::Services,
        Query::Backends,
        Query::Flows { service: Some("we b/&".into()), limit: 7 },
        Query::Flows { service: None, limit: 2 },
        Query::Dns,
        Query::DnsZones,
        Query::DnsQuery { name: "we b&x=1".into(), record: Some(RecordType::Srv), resolver: Some("a&b".into()) },
        Query::DnsRefresh { name: Some("we b".into()) },
        Query::DnsRefresh { name: None },
        Query::BgpPeers,
        Query::BgpRoutes,
        Query::BgpReceived(peer),
        Query::BgpAdvertised(peer),
        Query::BgpMessages(peer),
        Query::BgpOrder(PeerOrder { peer: Some(peer), what: Order::Shutdown("we b&x=1".into()) }),
        Query::BgpOrder(PeerOrder { peer: None, what: Order::Refresh }),
        Query::BgpOrder(PeerOrder { peer: None, what: Order::Enable }),
        Query::BgpOrder(PeerOrder { peer: Some(peer), what: Order::Clear }),
        Query::BgpPolicy(crate::model::query::PolicyQuestion {
            peer,
            export: true,
            prefix: "10.1.0.0/24".parse().unwrap(),
            as_path: Some(vec![65001, 65002]),
            communities: vec!["64512:1".parse().unwrap(), "64512:1:2".parse().unwrap()],
            next_hop: Some(peer),
        }),
        Query::Routes,
        Query::Maps,
        Query::Map { name: "../CONTROL".into(), limit: 3 },
        Query::Xdp,
        Query::Reasons,
        Query::Events,
        Query::Capture(CaptureOrder {
            vip: "we b&x=1".into(),
            backend: Some("10.1.0.4:80".into()),
            length: 96,
            seconds: 4,
        }),
        Query::Config,
        Query::Health,
        Query::HealthHistory,
        order(crate::model::BackendVerb::Drain),
        order(crate::model::BackendVerb::Weight(Some(3))),
        order(crate::model::BackendVerb::Weight(None)),
    ];
    for query in queries {
        let (method, path) = query.request();
        let (status, body) = served.request(method, &path);
        assert_eq!(status, 200, "{path}: {body}");
        assert_eq!(served.fake.asked.lock().unwrap().pop(), Some(query.clone()), "{path}");
        assert_eq!(body, serde_json::to_value(rows(query).unwrap()).unwrap(), "{path}");
    }
}

#[test]
fn a_service_is_described_with_its_backends() {
    let served = Served::start();
    let (status, body) = served.request("GET", "/v1/services/web");
    assert_eq!((status, &body["backends"][0]["backend"]), (200, &json!("10.1.0.4:80")));
    assert_eq!(served.request("GET", "/v1/services/gone").0, 404);
}

#[test]
fn refusals_have_a_status_and_their_reasons() {
    let served = Served::start();
    let (status, body) = served.request("POST", "/v1/reload");
    assert_eq!((status, body["problems"].as_array().unwrap().len()), (422, 2));
    assert_eq!(served.request("GET", "/v1/reload").0, 405);
    assert_eq!(served.request("DELETE", "/v1/services").0, 405);
    assert_eq!(served.request("GET", "/v1/bgp/peers/172.16.1.99/received").0, 404);
    assert_eq!(served.request("GET", "/v1/bgp/peers/kcontrol/received").0, 400);
    assert_eq!(served.request("GET", "/v1/flows?limit=many").0, 400);
    assert_eq!(served.request("GET", "/v1/flows?colour=red").0, 400);
    let (status, body) = served.request("GET", "/nothing");
    assert_eq!((status, &body["error"]), (404, &json!("there is nothing at /nothing")));
}

#[test]
fn the_socket_is_for_owner_and_group_and_goes_with_the_daemon() {
    let mut served = Served::start();
    let socket = served.socket();
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o660);
    served.stop().unwrap();
    assert!(!socket.exists());
}

#[test]
fn a_stale_socket_is_replaced_and_a_living_one_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let listen = Listen { socket: folder.path().join("edge.sock"), http: None };
    drop(StdListener::bind(&listen.socket).unwrap());
    assert!(listen.socket.exists(), "a closed listener leaves its file");
    runtime().block_on(async {
        let first = bind(&listen).await.unwrap();
        assert!(matches!(bind(&listen).await, Err(BindError::Taken(_))));
        drop(first);
        assert!(!listen.socket.exists(), "sockets that were never served are given back");
        bind(&listen).await.unwrap();
    });
    std::fs::write(&listen.socket, "precious").unwrap();
    let error = runtime().block_on(bind(&listen)).unwrap_err().to_string();
    assert!(error.contains("no socket"), "{error}");
    assert_eq!(std::fs::read_to_string(&listen.socket).unwrap(), "precious");
}

#[test]
fn a_daemon_that_ends_leaves_the_socket_of_its_successor_alone() {
    let mut served = Served::start();
    let socket = served.socket();
    std::fs::remove_file(&socket).unwrap();
    let _successor = StdListener::bind(&socket).unwrap();
    served.stop().unwrap();
    assert!(socket.exists());
}

#[test]
fn a_taken_http_address_is_named_and_no_socket_is_left_behind() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let listen = Listen { socket: folder.path().join("edge.sock"), http: Some(address) };
    let error = runtime().block_on(bind(&listen)).unwrap_err().to_string();
    assert!(error.contains(&address.to_string()), "{error}");
    assert!(!listen.socket.exists());
}

#[test]
fn metrics_over_http_are_openmetrics_and_nothing_there_changes_anything() {
    let served = Served::start();
    let connect = || TcpStream::connect(served.http.unwrap()).unwrap();
    let (status, text) = exchange(connect(), "GET", "/metrics");
    assert_eq!(status, 200);
    check_openmetrics(&text);
    for line in [
        "edge_service_connections_total{service=\"web\",vip=\"172.16.1.88:80\",proto=\"tcp\"} 5",
        "edge_service_drops_total{service=\"web\",vip=\"172.16.1.88:80\",proto=\"tcp\",reason=\"no-backend\"} 2",
        "edge_service_bytes_total{service=\"web\",vip=\"172.16.1.88:80\",proto=\"tcp\",direction=\"in\"} 1000",
        "edge_bgp_peer_up{peer=\"172.16.1.80\",asn=\"64512\",description=\"\"} 1",
        "edge_reasons_total{service=\"-\",reason=\"no-flow\",action=\"pass\"} 4",
        "edge_dns_addresses{name=\"web.\\\"prod\\\".local\",type=\"A\",resolver=\"\"} 0",
        "edge_route_missing 1",
        "edge_build_info{version=\"0.1.0\"} 1",
        "edge_reconcile_writes_total 7",
        "# UNIT edge_uptime_seconds seconds",
    ] {
        assert!(text.lines().any(|found| found == line), "no line `{line}` in\n{text}");
    }
    for (method, path) in [("POST", "/v1/reload"), ("GET", "/v1/status")] {
        assert_eq!(exchange(connect(), method, path).0, 404, "{path}");
    }
}

/// The rules of the OpenMetrics text format that a scraper rejects a whole scrape for.
fn check_openmetrics(text: &str) {
    assert!(text.ends_with("# EOF\n"), "{text}");
    let mut families = std::collections::BTreeSet::new();
    let mut series = std::collections::BTreeSet::new();
    let (mut family, mut kind) = (String::new(), String::new());
    for line in text.lines().filter(|line| *line != "# EOF") {
        if let Some(comment) = line.strip_prefix("# ") {
            let words: Vec<&str> = comment.splitn(3, ' ').collect();
            match words[0] {
                "HELP" => {
                    family = words[1].to_owned();
                    assert!(families.insert(family.clone()), "{family} stands there twice");
                }
                "TYPE" => {
                    assert_eq!(words[1], family);
                    kind = words[2].to_owned();
                }
                "UNIT" => assert!(words[1] == family && family.ends_with(words[2]), "{line}"),
                other => panic!("unexpected {other}"),
            }
            continue;
        }
        let (name, value) = line.rsplit_once(' ').unwrap();
        assert!(value.parse::<f64>().is_ok(), "{line}");
        assert!(series.insert(name.to_owned()), "{name} stands there twice");
        let suffix = match kind.as_str() {
            "counter" => "_total",
            "info" => "_info",
            _ => "",
        };
        assert_eq!(name.split('{').next().unwrap(), format!("{family}{suffix}"), "{line}");
    }
}

/// Fails at every question.
struct Broken;

impl Views for Broken {
    fn answer(&self, _: Query) -> BoxFuture<'_, Result<Answer, ViewError>> {
        Box::pin(async { Err(ViewError::Unavailable("starting".into())) })
    }
}

#[test]
fn a_view_that_fails_is_counted_and_the_scrape_succeeds() {
    let text = runtime().block_on(metrics::render(&Broken)).unwrap();
    check_openmetrics(&text);
    assert!(text.contains("edge_scrape_errors{view=\"services\"} 1"), "{text}");
    assert!(!text.contains("edge_service_connections"), "{text}");
}

#[test]
fn the_documentation_lists_exactly_the_metrics_that_are_exported() {
    let document = include_str!("../../../docs/metrics.md");
    let documented: Vec<&str> = document
        .lines()
        .filter_map(|line| line.strip_prefix("| `edge_"))
        .map(|line| line.split('`').next().unwrap())
        .collect();
    let exported: Vec<String> = metrics::catalogue()
        .into_iter()
        .map(|(name, kind, _)| {
            let suffix = match kind {
                "counter" => "_total",
                "info" => "_info",
                _ => "",
            };
            format!("{}{suffix}", name.trim_start_matches("edge_"))
        })
        .collect();
    assert_eq!(documented, exported);
    let text = runtime().block_on(metrics::render(&Fake::default())).unwrap();
    for (name, _, _) in metrics::catalogue() {
        assert!(text.contains(&format!("# HELP {name} ")), "{name} is never exported");
    }
}
