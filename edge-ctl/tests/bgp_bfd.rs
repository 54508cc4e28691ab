//! BFD with real counterparts: BIRD's, and bfdd of FRR.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first broken assumption")]

mod common;

use std::{
    fs,
    net::UdpSocket,
    path::Path,
    time::{Duration, Instant},
};

use common::{
    bgp::{Edge, Lab, NODE, NODE6, PATIENCE, config, peer},
    eventually, run,
    speakers::{Bird, ibgp, missing},
};
use edge_ctl::{
    bgp::bfd::packet::{Name, Packet},
    config::valid,
    model::{
        bgp_session::Bfd,
        view::{BfdRow, BgpPeerRow},
    },
};

const INTERVAL: Duration = Duration::from_millis(50);
/// Of the sessions: what tells of silence without BFD.
const HOLD: Duration = Duration::from_secs(90);
/// 3 x 50 ms, as both sides are configured.
const DETECTION: Duration = Duration::from_millis(150);

fn watched(remote_asn: u32, multihop: bool) -> valid::Peer {
    watched_at(NODE, remote_asn, multihop)
}

fn watched_at(address: &str, remote_asn: u32, multihop: bool) -> valid::Peer {
    let mut watched = peer(address, remote_asn);
    watched.session.bfd = Some(Bfd { interval: INTERVAL, multiplier: 3, multihop });
    watched.hold = HOLD;
    watched.session.connect_retry = Duration::from_secs(1);
    watched.import = Some(vec![common::bgp::rule("10.1.0.0/16", 16, 32), common::bgp::rule("fd01::/16", 16, 128)]);
    watched
}

fn bfd(row: &BgpPeerRow) -> BfdRow {
    row.bfd.clone().unwrap_or_default()
}

/// Up, and at the configured pace: the poll that tells it has been answered.
fn is_up(row: &BgpPeerRow) -> bool {
    bfd(row).state == "Up"
}

fn bird(local: &str, edge: &str, options: &str) -> String {
    let options = format!("graceful restart on; connect delay time 1; error wait time 1, 1; {options}");
    let watch = "protocol bfd { interface \"*\" { interval 50 ms; multiplier 3; }; multihop { interval 50 ms; multiplier 3; }; }";
    format!("{watch}\n{}", ibgp(local, edge, &options))
}

/// The speaker with one watched peer, whose route is there.
async fn started(watched: valid::Peer) -> Edge {
    let (node, prefix) = (watched.address.to_string(), prefix(&watched));
    let mut edge = Edge::start(config([watched])).await;
    edge.until("the route", |edge| edge.hops(prefix) == [node.clone()]).await;
    edge
}

/// What the node announces by its session.
fn prefix(watched: &valid::Peer) -> &'static str {
    if watched.address.is_ipv4() { "10.1.2.0/26" } else { "fd01:2::/64" }
}

/// A stopped process neither speaks nor closes its connections: what a node does that has lost its power.
async fn falls_silent(lab: &mut Lab, edge: &mut Edge, watched: &valid::Peer) {
    let node = &watched.address.to_string();
    let id = lab.daemons.last().unwrap().0.id().to_string();
    let start = Instant::now();
    run("kill", &["-STOP", &id]);
    edge.until("no routes", |edge| edge.routes.is_empty()).await;
    let drained = start.elapsed();
    println!("drained {drained:?} after the peer fell silent, detection time {DETECTION:?}");
    // The peer's last packet may be an interval old; what is above the detection time is this machine's doing.
    assert!(drained > DETECTION - 2 * INTERVAL, "{drained:?} is sooner than silence can be told");
    assert!(drained < HOLD / 4, "{drained:?}: the hold time alone would have told as well");
    let row = edge.row(node).await;
    let reset = row.last_reset.clone().unwrap_or_default();
    assert!(reset.contains("BFD session down: control detection time expired"), "{row:#?}");
    assert_eq!((row.pfx_stale, bfd(&row).state.as_str(), bfd(&row).downs), (0, "Down", 1), "{row:#?}");
    assert!(row.error_sent.as_ref().is_some_and(|error| error.text.contains("BFD")), "{row:#?}");
    run("kill", &["-CONT", &id]);
    edge.until("routes again", |edge| edge.hops(prefix(watched)) == [node.clone()]).await;
    edge.row_until(node, "BFD again", is_up).await;
}

#[test]
fn a_silent_bird_is_drained_after_the_detection_time_although_graceful_restart_is_negotiated() {
    let name = "a_silent_bird_is_drained_after_the_detection_time_although_graceful_restart_is_negotiated";
    if missing(name, &["bird", "birdc"]) {
        return;
    }
    let (direct, routed) = ("direct; bfd yes;", "multihop; bfd yes;");
    for (node, us, multihop, options) in [
        (NODE, "10.0.0.1", false, direct),
        (NODE, "10.0.0.1", true, routed),
        (NODE6, "fd00::1", false, direct),
        (NODE6, "fd00::1", true, routed),
    ] {
        let mut lab = Lab::new();
        lab.bird(&bird(node, us, options));
        let namespace = lab.edge.clone();
        namespace.block_on(|| async {
            let mut edge = started(watched_at(node, 64512, multihop)).await;
            let row = edge.row_until(node, "BFD", is_up).await;
            assert!(row.capabilities.contains(&"graceful-restart".to_owned()), "{row:#?}");
            assert_eq!((bfd(&row).multihop, bfd(&row).independent), (multihop, false), "{row:#?}");
            let sessions = || lab.birdc("show bfd sessions");
            eventually("BIRD sees us Up at 50 ms", PATIENCE, || {
                let answer = sessions();
                let row = answer.lines().find(|line| line.starts_with(us)).unwrap_or_default();
                if row.contains("Up") && row.contains("0.050") { Ok(()) } else { Err(answer) }
            });
            falls_silent(&mut lab, &mut edge, &watched_at(node, 64512, multihop)).await;
        });
    }
}

#[test]
fn a_killed_bird_is_helped_over_its_restart_although_its_bfd_is_gone_with_it() {
    let name = "a_killed_bird_is_helped_over_its_restart_although_its_bfd_is_gone_with_it";
    if missing(name, &["bird", "birdc"]) {
        return;
    }
    let mut lab = Lab::new();
    lab.bird(&bird(NODE, "10.0.0.1", "direct; bfd yes;"));
    let namespace = lab.edge.clone();
    namespace.block_on(|| async {
        let mut edge = started(watched(64512, false)).await;
        edge.row_until(NODE, "BFD", is_up).await;
        lab.kill();
        let row = edge.row_until(NODE, "BFD down", |row| bfd(row).state == "Down").await;
        assert!(!bfd(&row).independent && row.pfx_stale > 0 && row.state != "Established", "{row:#?}");
        assert!(row.flaps.iter().any(|flap| flap.reason.contains("BFD down while it restarts: kept")), "{row:#?}");
        assert_eq!(edge.hops("10.1.2.0/26"), [NODE], "stale but valid");
    });
}

/// zebra, bfdd and bgpd in the node: bgpd asks bfdd by way of zebra.
fn frr(lab: &mut Lab, bgpd: &str) {
    let folder = lab.folder.path().display().to_string();
    let zapi = format!("{folder}/zserv.api");
    // They give up being root before they write there.
    run("chown", &["frr:frr", &folder]);
    let programs = [
        ("zebra", "", vec![]),
        ("bfdd", "bfd\n profile fast\n  transmit-interval 50\n  receive-interval 50\n exit\nexit", vec![]),
        ("bgpd", bgpd, vec!["-P", "0"]),
    ];
    for (program, body, more) in programs {
        let (file, pid) = (lab.path(&format!("{program}.conf")), lab.path(&format!("{program}.pid")));
        fs::write(&file, format!("hostname frr-node\n{body}\n")).unwrap();
        let (file, pid) = (file.display().to_string(), pid.display().to_string());
        let control = format!("{folder}/bfdd.sock");
        let mut arguments = vec!["-f", &file, "-i", &pid, "--vty_socket", &folder, "-z", &zapi, "-A", "127.0.0.1"];
        arguments.extend(more);
        if program == "bfdd" {
            arguments.extend(["--bfdctl", &control]);
        }
        lab.start(&format!("/usr/lib/frr/{program}"), &arguments);
        let socket = lab.path(&format!("{program}.vty"));
        eventually("the vty", PATIENCE, || if socket.exists() { Ok(()) } else { Err(format!("{program} is not up")) });
    }
}

/// bgpd's side towards `neighbor`: an external session watched by bfdd, with these other lines about it.
fn bgpd(neighbor: &str, family: &str, network: &str, more: &str) -> String {
    format!(
        "router bgp 64513\n bgp router-id 10.0.0.2\n no bgp ebgp-requires-policy\n no bgp network import-check\n \
         bgp graceful-restart\n neighbor {neighbor} remote-as 64512\n neighbor {neighbor} timers connect 1\n \
         neighbor {neighbor} bfd profile fast\n {more}\n address-family {family} unicast\n  \
         neighbor {neighbor} activate\n  network {network}\n exit-address-family\nexit"
    )
}

/// bfdd finds us, falls silent while bgpd goes on, and comes back.
fn bfdd_falls_silent(mut watched: valid::Peer, bgpd: &str, prefix: &str) {
    let mut lab = Lab::new();
    frr(&mut lab, bgpd);
    let (node, multihop) = (watched.address.to_string(), watched.session.bfd.is_some_and(|bfd| bfd.multihop));
    watched.ebgp_multihop = if multihop { 2 } else { 1 };
    let namespace = lab.edge.clone();
    namespace.block_on(|| async {
        let mut edge = Edge::start(config([watched])).await;
        edge.until("the route", |edge| edge.hops(prefix) == [node.clone()]).await;
        let row = edge.row_until(&node, "BFD at 50 ms", |row| is_up(row) && bfd(row).transmit_ms == Some(50)).await;
        assert_eq!((bfd(&row).detection_ms, bfd(&row).multihop), (150, multihop), "{row:#?}");
        // BGP goes on speaking: nothing but BFD can tell.
        let id = lab.daemons[1].0.id().to_string();
        let start = Instant::now();
        run("kill", &["-STOP", &id]);
        edge.until("no routes", |edge| edge.routes.is_empty()).await;
        println!("{node}, multihop {multihop}: drained {:?} after bfdd fell silent", start.elapsed());
        let row = edge.row(&node).await;
        assert!(row.last_reset.as_ref().is_some_and(|why| why.contains("BFD session down")), "{row:#?}");
        run("kill", &["-CONT", &id]);
        edge.until("the route again", |edge| edge.hops(prefix) == [node.clone()]).await;
        edge.row_until(&node, "BFD again", is_up).await;
    });
}

/// True where FRR's programs are not there.
fn no_frr(test: &str) -> bool {
    missing(test, &["vtysh"])
        || ["zebra", "bfdd", "bgpd"].iter().any(|program| {
            let there = Path::new("/usr/lib/frr").join(program).exists();
            if !there {
                println!("SKIPPED {test}: /usr/lib/frr/{program} is not installed");
            }
            !there
        })
}

#[test]
fn frrs_bfdd_finds_us_and_its_silence_drains_its_routes() {
    if no_frr("frrs_bfdd_finds_us_and_its_silence_drains_its_routes") {
        return;
    }
    bfdd_falls_silent(watched(64513, false), &bgpd("10.0.0.1", "ipv4", "10.1.2.0/26", ""), "10.1.2.0/26");
}

#[test]
fn frrs_bfdd_finds_us_over_ipv6_and_its_silence_drains_its_routes() {
    if no_frr("frrs_bfdd_finds_us_over_ipv6_and_its_silence_drains_its_routes") {
        return;
    }
    bfdd_falls_silent(watched_at(NODE6, 64513, false), &bgpd("fd00::1", "ipv6", "fd01:2::/64", ""), "fd01:2::/64");
}

#[test]
fn frrs_bfdd_finds_us_over_several_hops_and_its_silence_drains_its_routes() {
    if no_frr("frrs_bfdd_finds_us_over_several_hops_and_its_silence_drains_its_routes") {
        return;
    }
    let hops = "neighbor 10.0.0.1 ebgp-multihop 2";
    bfdd_falls_silent(watched(64513, true), &bgpd("10.0.0.1", "ipv4", "10.1.2.0/26", hops), "10.1.2.0/26");
}

/// A BFD session played by the test from the node's address: `says` makes packets out of the last one heard.
struct Played {
    socket: UdpSocket,
    heard: Option<Packet>,
}

impl Played {
    fn new(lab: &Lab) -> Self {
        let open = || {
            lab.node.enter();
            UdpSocket::bind((NODE, 3784)).unwrap()
        };
        let socket = std::thread::scope(|scope| scope.spawn(open).join().unwrap());
        socket.set_ttl(255).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self { socket, heard: None }
    }

    /// One packet in this state with C, and what has come meanwhile.
    fn speak(&mut self, independent: bool) {
        let mut buffer = [0; 64];
        while let Ok(length) = self.socket.recv(&mut buffer) {
            self.heard = Packet::parse(&buffer[..length]).ok();
        }
        let (state, yours) = match self.heard {
            None => (Name::Down, 0),
            Some(heard) if heard.state == Name::Down => (Name::Init, heard.mine),
            Some(heard) => (Name::Up, heard.mine),
        };
        let packet = Packet {
            diagnostic: Default::default(),
            state,
            poll: false,
            answer: self.heard.is_some_and(|heard| heard.poll),
            independent,
            demand: false,
            multiplier: 3,
            mine: 99,
            yours,
            desired_min_tx: 50_000,
            required_min_rx: 50_000,
        };
        self.socket.send_to(&packet.encode(), ("10.0.0.1", 3784)).unwrap();
    }
}

#[test]
fn a_peer_whose_bfd_outlives_its_bgp_loses_its_stale_routes_when_bfd_loses_it() {
    let name = "a_peer_whose_bfd_outlives_its_bgp_loses_its_stale_routes_when_bfd_loses_it";
    if missing(name, &["bird", "birdc"]) {
        return;
    }
    let mut lab = Lab::new();
    // BIRD's BGP, and a BFD with the C-bit, which no speaker of Debian's sets by itself.
    lab.bird(&ibgp(NODE, "10.0.0.1", "graceful restart on; connect delay time 1;"));
    let namespace = lab.edge.clone();
    let mut played = Played::new(&lab);
    namespace.block_on(|| async {
        let mut edge = started(watched(64512, false)).await;
        let speaking = |played: &mut Played| {
            played.speak(true);
            tokio::time::sleep(Duration::from_millis(20))
        };
        let end = Instant::now() + PATIENCE;
        loop {
            speaking(&mut played).await;
            let row = edge.row(NODE).await;
            if is_up(&row) {
                assert!(bfd(&row).independent, "{row:#?}");
                break;
            }
            assert!(Instant::now() < end, "{row:#?}");
        }
        lab.kill();
        loop {
            speaking(&mut played).await;
            let row = edge.row(NODE).await;
            if row.pfx_stale > 0 {
                assert!(is_up(&row), "the forwarding plane lives: {row:#?}");
                break;
            }
            assert!(Instant::now() < end + PATIENCE, "{row:#?}");
        }
        for _ in 0..20 {
            speaking(&mut played).await;
        }
        assert_eq!(edge.hops("10.1.2.0/26"), [NODE], "stale but valid while BFD is up");
        drop(played);
        edge.until("no routes", |edge| edge.routes.is_empty()).await;
        let row = edge.row(NODE).await;
        assert_eq!((row.pfx_stale, bfd(&row).state.as_str()), (0, "Down"), "{row:#?}");
    });
}
