//! The built `edge-ctl` against an API served over a real unix socket, and without one.
#![allow(
    clippy::unwrap_used,
    reason = "a test may stop at the first broken assumption; clippy knows only #[test] as one"
)]

use std::{
    collections::BTreeMap,
    io::Read,
    path::PathBuf,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use edge_ctl::{
    api::{self, Answer, BoxFuture, Listen, Query, ViewError, Views},
    model::{
        query::{ConfigRow, MapEntryRow, ReloadRow},
        view::{BackendRow, BgpPeerRow, BgpRouteRow, FlowRow, MapRow, RouteRow, ServiceRow, StatusRow},
    },
};

/// An edge of two services; `state` and what `reload` says can be chosen, `active` moves when told.
struct Edge {
    state: &'static str,
    active: AtomicU64,
}

fn text(text: &str) -> String {
    text.to_owned()
}

impl Edge {
    fn services(&self) -> Vec<ServiceRow> {
        let row = |name: &str, port: u16, drops: &[(&str, u64)]| ServiceRow {
            name: text(name),
            vip: format!("172.16.1.88:{port}"),
            proto: text("tcp"),
            mode: text("full-nat"),
            balance: text("maglev"),
            backends: text("2/3"),
            conn_s: 12.34,
            active: self.active.load(Ordering::SeqCst),
            rx_s: 2048.0,
            tx_s: 512.0,
            announced: text("no"),
            age: 192,
            connections: 99,
            drops: drops.iter().map(|(reason, count)| (text(reason), *count)).collect(),
            ..ServiceRow::default()
        };
        vec![row("ingress-https", 8443, &[("no-backend", 2)]), row("ingress-http", 8080, &[])]
    }

    fn peers() -> Vec<BgpPeerRow> {
        let row = |address: &str, state: &str, up_down, desc: &str| BgpPeerRow {
            neighbor: text(address),
            v: 4,
            asn: 64512,
            msg_rcvd: 12,
            msg_sent: 10,
            tbl_ver: 3,
            up_down,
            state: text(state),
            pfx_rcd: 1,
            pfx_snt: 2,
            desc: text(desc),
            kind: text("ibgp"),
            ..BgpPeerRow::default()
        };
        vec![row("172.16.1.80", "Established", Some(62), "kcontrol"), row("172.16.1.81", "Active", None, "knode1")]
    }
}

impl Views for Edge {
    fn answer(&self, query: Query) -> BoxFuture<'_, Result<Answer, ViewError>> {
        Box::pin(async move {
            Ok(match query {
                Query::Status => Answer::Status(Box::new(StatusRow {
                    state: text(self.state),
                    problems: if self.state == "ok" { vec![] } else { vec![text("peer 172.16.1.81 is down")] },
                    version: text("9.9.9"),
                    ..StatusRow::default()
                })),
                Query::Services => Answer::Services(self.services()),
                Query::Backends => Answer::Backends(
                    ["10.1.0.10:443", "10.1.0.9:443"]
                        .map(|address| BackendRow {
                            service: text("ingress-https"),
                            backend: text(address),
                            node: text("kcontrol"),
                            state: text("up"),
                            w: 1,
                            source: text("dns"),
                            ..BackendRow::default()
                        })
                        .to_vec(),
                ),
                Query::Flows { limit, service } => {
                    Answer::Flows(vec![
                        FlowRow { service: service.unwrap_or_default(), ..FlowRow::default() };
                        limit.min(2)
                    ])
                }
                Query::BgpPeers => Answer::BgpPeers(Self::peers()),
                Query::BgpReceived(peer) => Answer::BgpRoutes(vec![BgpRouteRow {
                    status: text("r"),
                    network: text("192.168.0.0/16"),
                    peer: peer.to_string(),
                    reason: Some(text("not in `import`")),
                    ..BgpRouteRow::default()
                }]),
                Query::Routes => Answer::Routes(vec![RouteRow {
                    code: text("B"),
                    prefix: text("10.1.0.0/24"),
                    next_hops: vec![text("via 172.16.1.80 dev ens33")],
                    protocol: text("bgp"),
                    metric: 20,
                    installed: true,
                    age: Some(62),
                }]),
                Query::Maps => Answer::Maps(vec![MapRow {
                    name: text("ESTABLISHED"),
                    entries: Some(256),
                    max_entries: 1024,
                    memory: 1 << 20,
                    ..MapRow::default()
                }]),
                Query::Map { name, .. } if name != "CONTROL" => {
                    return Err(ViewError::NotFound(format!("there is no map `{name}`")));
                }
                Query::Map { .. } => Answer::MapEntries(vec![MapEntryRow { key: text("0"), value: text("seed=…") }]),
                Query::Config => Answer::Config(ConfigRow { text: text("[edge]\n"), ..ConfigRow::default() }),
                Query::Reload if self.state == "ok" => Answer::Reloaded(ReloadRow {
                    file: text("/etc/edge/edge.toml"),
                    changes: vec![text("service web added")],
                    needs_restart: vec![text("[edge] interfaces")],
                    ..ReloadRow::default()
                }),
                Query::Reload => {
                    return Err(ViewError::Invalid(vec![text("edge.toml:1: first"), text("edge.toml:2: second")]));
                }
                other => return Err(ViewError::Unavailable(format!("{other:?} is not part of this test"))),
            })
        })
    }
}

/// An API in a folder of its own, and the command line pointed at it.
struct Lab {
    folder: tempfile::TempDir,
    edge: Arc<Edge>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Lab {
    fn new(state: &'static str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let edge = Arc::new(Edge { state, active: AtomicU64::new(7) });
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listen = Listen { socket: folder.path().join("edge.sock"), http: None };
        let bound = runtime.block_on(api::bind(&listen)).unwrap();
        runtime.spawn(api::serve_bound(bound, edge.clone(), std::future::pending()));
        Self { folder, edge, runtime: Some(runtime) }
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_edge-ctl"));
        command.arg("--socket").arg(self.socket()).args(line.split_whitespace());
        command
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("edge.sock")
    }

    fn run(&self, line: &str) -> (i32, String, String) {
        outcome(&mut self.command(line))
    }

    /// Output of a command that must succeed.
    fn out(&self, line: &str) -> String {
        let (code, out, err) = self.run(line);
        assert_eq!((code, err.as_str()), (0, ""), "{line}: {out}");
        out
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn outcome(command: &mut Command) -> (i32, String, String) {
    let output = command.output().unwrap();
    let utf8 = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), utf8(output.stdout), utf8(output.stderr))
}

#[test]
fn services_are_a_table_with_the_documented_columns() {
    let lab = Lab::new("ok");
    let expected = "\
NAME            VIP                PROTO   MODE       BALANCE   BACKENDS   CONN/S   ACTIVE    RX/S   TX/S   ANNOUNCED   AGE
ingress-https   172.16.1.88:8443   tcp     full-nat   maglev    2/3          12.3        7   2.0Ki    512   no          3m12s
ingress-http    172.16.1.88:8080   tcp     full-nat   maglev    2/3          12.3        7   2.0Ki    512   no          3m12s
";
    assert_eq!(lab.out("service list"), expected);
    assert_eq!(lab.out("get svc"), expected);
    assert!(lab.out("service list -o wide").lines().next().unwrap().ends_with("DROPS"));
    assert!(lab.out("service list -o wide").contains("no-backend=2"));
    assert!(lab.out("service list --sort-by name --no-headers").starts_with("ingress-http "));
    assert_eq!(lab.out("service list ingress-http --no-headers").lines().count(), 1);
    assert_eq!(lab.out("service list -o name"), "service/ingress-https\nservice/ingress-http\n");
}

#[test]
fn json_and_yaml_are_arrays_of_the_same_rows() {
    let lab = Lab::new("ok");
    let json: Vec<ServiceRow> = serde_json::from_str(&lab.out("service list -o json")).unwrap();
    assert_eq!(json, lab.edge.services());
    let yaml: Vec<ServiceRow> = serde_norway::from_str(&lab.out("service list -o yaml")).unwrap();
    assert_eq!(yaml, json);
    let status: Vec<StatusRow> = serde_json::from_str(&lab.out("status -o json")).unwrap();
    assert_eq!(status[0].version, "9.9.9");
    let peer: Vec<BTreeMap<String, serde_json::Value>> = serde_json::from_str(&lab.out("bgp summary -o json")).unwrap();
    assert_eq!((&peer[0]["as"], &peer[1]["up_down"]), (&64512.into(), &serde_json::Value::Null));
}

#[test]
fn the_bgp_summary_has_the_columns_of_frr() {
    let lab = Lab::new("ok");
    let expected = "\
Neighbor      V      AS   MsgRcvd   MsgSent   TblVer   InQ   OutQ    Up/Down   State/PfxRcd   PfxSnt   Desc
172.16.1.80   4   64512        12        10        3     0      0   00:01:02              1        2   kcontrol
172.16.1.81   4   64512        12        10        3     0      0      never         Active        0   knode1
";
    assert_eq!(lab.out("bgp summary"), expected);
    assert_eq!(lab.out("show bgp summary"), expected);
    assert_eq!(lab.out("sh ip bgp sum"), expected);
    assert!(
        lab.out("bgp peer 172.16.1.80").starts_with("BGP neighbor is 172.16.1.80, remote AS 64512, internal link\n")
    );
    assert_eq!(lab.run("bgp peer 172.16.1.99").0, 1);
}

#[test]
fn received_routes_of_all_peers_say_why_they_were_rejected() {
    let lab = Lab::new("ok");
    let out = lab.out("bgp routes received");
    assert_eq!(out.lines().count(), 3, "{out}");
    assert!(out.contains("not in `import`"), "{out}");
    assert_eq!(lab.out("bgp routes received 172.16.1.80").lines().count(), 2);
}

#[test]
fn backends_routes_maps_and_flows_are_shown() {
    let lab = Lab::new("ok");
    let sorted = lab.out("backend list --sort-by backend --no-headers");
    assert!(sorted.starts_with("ingress-https   10.1.0.9:443    kcontrol   up"), "{sorted}");
    assert!(lab.out("show ip route").ends_with("B>* 10.1.0.0/24 [20] via 172.16.1.80, ens33, 00:01:02\n"));
    assert!(lab.out("map list").contains("25.0%       now    1.0Mi"), "{}", lab.out("map list"));
    assert_eq!(lab.out("map dump CONTROL --no-headers"), "0   seed=…\n");
    assert_eq!(lab.out("flow list web --limit 1 --no-headers").lines().count(), 1);
    assert_eq!(lab.out("show running-config"), "[edge]\n");
    let described = lab.out("describe service ingress-https");
    assert!(described.contains("no-backend") && described.contains("10.1.0.9:443"), "{described}");
}

#[test]
fn what_does_not_exist_is_an_error_that_names_it() {
    let lab = Lab::new("ok");
    for (line, word) in
        [("map dump NOTHING", "`NOTHING`"), ("service describe gone", "`gone`"), ("backend list gone", "`gone`")]
    {
        let (code, out, err) = lab.run(line);
        assert_eq!((code, out.as_str()), (1, ""), "{line}");
        assert!(err.contains(word), "{line}: {err}");
    }
    let (code, _, err) = lab.run("service list --sort-by colour");
    assert!(code == 2 && err.contains("CONN/S"), "{err}");
}

#[test]
fn a_degraded_edge_exits_with_three_and_says_why() {
    let lab = Lab::new("degraded");
    let (code, out, _) = lab.run("status");
    assert_eq!(code, 3);
    assert!(out.contains("peer 172.16.1.81 is down"), "{out}");
    assert_eq!(Lab::new("ok").run("status").0, 0);
}

#[test]
fn a_reload_prints_what_changed_or_every_fault() {
    let out = Lab::new("ok").out("reload");
    assert_eq!(out, "/etc/edge/edge.toml: applied\n  service web added\n  needs a restart: [edge] interfaces\n");
    let (code, _, err) = Lab::new("degraded").run("reload");
    assert_eq!(code, 2);
    assert!(err.contains("edge.toml:1: first\nedge.toml:2: second"), "{err}");
}

#[test]
fn the_version_names_both_programs() {
    assert_eq!(Lab::new("ok").out("version"), format!("edge-ctl {}\ndaemon   9.9.9\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn watching_shows_again_what_changed() {
    let lab = Lab::new("ok");
    let mut child = lab.command("service list ingress-http -w --no-headers").stdout(Stdio::piped()).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let (lines, seen) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = stdout.read(&mut buffer) {
            let _ = lines.send(String::from_utf8_lossy(&buffer[..length]).into_owned());
        }
    });
    let wait = Duration::from_secs(20);
    assert!(seen.recv_timeout(wait).unwrap().contains(" 7 "));
    lab.edge.active.store(4242, Ordering::SeqCst);
    let changed = seen.recv_timeout(wait);
    child.kill().unwrap();
    child.wait().unwrap();
    reader.join().unwrap();
    assert!(changed.unwrap().contains("4242"));
}

#[test]
fn without_a_daemon_the_error_says_how_to_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("edge.sock");
    let mut command = Command::new(env!("CARGO_BIN_EXE_edge-ctl"));
    let (code, out, err) = outcome(command.arg("--socket").arg(&socket).args(["service", "list"]));
    assert_eq!((code, out.as_str()), (1, ""));
    for words in [socket.to_str().unwrap(), "systemctl start edge", "--kernel"] {
        assert!(err.contains(words), "no `{words}` in {err}");
    }
}

#[test]
fn a_daemon_that_hangs_is_given_up_after_the_timeout() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("edge.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let start = Instant::now();
    let mut command = Command::new(env!("CARGO_BIN_EXE_edge-ctl"));
    let (code, _, err) = outcome(command.arg("--socket").arg(&socket).args(["status", "--timeout", "0.2"]));
    assert!(code == 1 && err.contains("did not answer within 0.2 s"), "{err}");
    assert!(start.elapsed() < Duration::from_secs(8));
}

#[test]
fn config_check_prints_ok_and_memory_or_every_fault_and_two() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("edge.toml");
    let check = || outcome(Command::new(env!("CARGO_BIN_EXE_edge-ctl")).args(["config", "check", "-c"]).arg(&file));
    std::fs::write(&file, include_str!("../../deploy/edge.toml")).unwrap();
    let (code, out, err) = check();
    // This host is connected to no network of the example's.
    let unknown =
        |line: &str| line.starts_with("warning: peer 172.16.1.8") && line.contains("in no network that this host");
    assert!(code == 0 && err.lines().count() == 3 && err.lines().all(unknown), "{err}");
    assert!(out.contains(": ok\n") && out.contains("memory of the maps: ") && out.contains("ESTABLISHED"), "{out}");
    std::fs::write(&file, "[edge]\ninterfaces = [\"ens33\"]\npod_network = []\n").unwrap();
    let (code, out, err) = check();
    assert_eq!((code, out.as_str()), (2, ""));
    assert!(err.contains("edge.toml:3: [edge]: unknown key `pod_network`; did you mean `pod_networks`?"), "{err}");
    let (code, _, err) = outcome(Command::new(env!("CARGO_BIN_EXE_edge-ctl")).args(["run", "-c"]).arg(&file));
    assert!(code == 2 && err.contains("edge.toml:3: "), "{err}");
}

#[test]
fn socket_and_pins_follow_the_configuration_given_with_c() {
    let lab = Lab::new("ok");
    let file = lab.folder.path().join("edge.toml");
    let socket = format!("[edge]\nsocket = \"{}\"", lab.socket().display());
    std::fs::write(&file, include_str!("../../deploy/edge.toml").replace("[edge]", &socket)).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_edge-ctl"));
    let (code, out, err) = outcome(command.args(["get", "services", "-o", "name", "-c"]).arg(&file));
    assert_eq!((code, out.lines().count()), (0, 2), "{err}");
}
