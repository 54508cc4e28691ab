//! Sessions between link-local addresses, IPv4 over IPv6 next hops (RFC 8950), and the kernel's routes that follow.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first broken assumption")]

mod common;

use std::{fs, path::Path, time::Duration};

use common::{
    Daemon, Namespace,
    bgp::{Edge, Lab, PATIENCE, config, peer, rule, says},
    eventually,
    speakers::{Bird, Frr, missing},
    veth,
};
use edge_ctl::{
    bgp::BgpEvent,
    config::{self, valid},
    fib::{self, FibHandle, FibOptions},
    model::{PathAttributes, RouteUpdate, scope, view::BgpPeerRow},
};
use tokio::sync::mpsc;

/// Both neighbours have this address, each on its own link.
const NEIGHBOUR: &str = "fe80::2";
const VIP: &str = "10.9.0.1/32";

fn established(row: &BgpPeerRow) -> bool {
    row.state == "Established"
}

/// A second node at the edge's eth1.
fn second(lab: &Lab) -> Namespace {
    let node = Namespace::new("second");
    veth(&lab.edge, &node, "eth1");
    for (namespace, host) in [(&lab.edge, 1), (&node, 2)] {
        namespace.ip("addr flush dev eth1");
        namespace.ip(&format!("addr add fe80::{host}/64 dev eth1 nodad"));
    }
    node
}

/// BIRD's side: both families, IPv4 by IPv6 next hops; everything on `interface`, with blocks of its own.
fn bird(number: usize, interface: &str) -> String {
    format!(
        "router id 10.0.0.{number};\nprotocol device {{}}\n\
         protocol static pods4 {{ ipv4; route 10.1.{number}.0/26 blackhole; }}\n\
         protocol static pods6 {{ ipv6; route fd01:{number}::/64 blackhole; }}\n\
         protocol bgp edge {{ local fe80::2 as 64513; neighbor fe80::1%{interface} as 64512; \
         connect delay time 1; connect retry time 1; error wait time 1, 1; \
         ipv4 {{ extended next hop on; import all; export where source = RTS_STATIC; next hop self; }}; \
         ipv6 {{ import all; export where source = RTS_STATIC; next hop self; }}; }}\n"
    )
}

fn settings(interface: &str) -> valid::Peer {
    let mut external = peer(NEIGHBOUR, 64513);
    external.address = scope::on(external.address, interface);
    external.session.extended_next_hop = true;
    external.session.connect_retry = Duration::from_secs(1);
    external.import = Some(vec![rule("10.1.0.0/16", 16, 32), rule("fd01::/16", 16, 64)]);
    external.export = Some(vec![rule("10.9.0.0/16", 16, 32)]);
    external
}

/// The kernel's side in the edge's namespace, kept in step with what the speaker decides.
async fn kernel() -> FibHandle {
    let (events, mut inbox) = mpsc::channel(64);
    tokio::spawn(async move { while inbox.recv().await.is_some() {} });
    fib::spawn(FibOptions::default(), events).await.unwrap()
}

async fn install(edge: &Edge, fib: &FibHandle) {
    let updates = edge.routes.iter().map(|(prefix, hops)| RouteUpdate {
        prefix: *prefix,
        next_hops: hops.to_vec(),
        internal: false,
    });
    fib.apply(updates.collect()).await;
}

fn route(namespace: &Namespace, family: &str, prefix: &str) -> String {
    let output = namespace.command("ip").args([family, "route", "show", prefix]).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn the_same_link_local_address_on_two_links_is_two_birds_whose_routes_go_by_their_own_link() {
    let name = "the_same_link_local_address_on_two_links_is_two_birds_whose_routes_go_by_their_own_link";
    if missing(name, &["bird", "birdc"]) {
        return;
    }
    let mut lab = Lab::link_local();
    let second = second(&lab);
    lab.bird_named("one", &bird(2, "eth0"), &[]);
    let file = lab.path("two.conf");
    fs::write(&file, bird(3, "eth1")).unwrap();
    let mut command = second.command("bird");
    command.arg("-f").arg("-c").arg(&file).arg("-s").arg(lab.path("two.ctl")).arg("-P").arg(lab.path("two.pid"));
    let two = Daemon::start(&mut command, &lab.path("two.log"));
    lab.daemons.push(two);
    let namespace = lab.edge.clone();
    namespace.block_on(|| async {
        let fib = kernel().await;
        // One side dials on one link, the other side on the other.
        let waiting = valid::Peer { passive: true, ..settings("eth1") };
        let mut edge = Edge::start(config([settings("eth0"), waiting])).await;
        edge.handle.kernel(fib.kernel_prefixes().await).await;
        edge.handle.announce(VIP.parse().unwrap(), PathAttributes::default()).await;
        for (number, interface) in [(2, "eth0"), (3, "eth1")] {
            let hop = scope::on(NEIGHBOUR.parse().unwrap(), interface).to_string();
            for prefix in [format!("10.1.{number}.0/26"), format!("fd01:{number}::/64")] {
                edge.until("its routes", |edge| edge.hops(&prefix) == [hop.clone()]).await;
            }
            let row = edge.row(&format!("{NEIGHBOUR}%{interface}")).await;
            assert_eq!((row.state.as_str(), row.established_count, row.pfx_rcd), ("Established", 1, 2), "{row:#?}");
        }
        install(&edge, &fib).await;
        for (number, interface) in [(2, "eth0"), (3, "eth1")] {
            let prefix = format!("10.1.{number}.0/26");
            let expected = format!("via inet6 {NEIGHBOUR} dev {interface} proto bgp metric 20");
            says("the kernel", &expected, || route(&namespace, "-4", &prefix)).await;
            let prefix = format!("fd01:{number}::/64");
            let expected = format!("via {NEIGHBOUR} dev {interface} proto bgp metric 20");
            says("the kernel", &expected, || route(&namespace, "-6", &prefix)).await;
        }
        for name in ["one", "two"] {
            let show = || lab.birdc_named(name, "show route all 10.9.0.1/32");
            says("BIRD", "BGP.next_hop: :: fe80::1", show).await;
        }
        // One link is lost: the routes by it can be reached no longer, those by the other stay.
        second.ip("link set eth1 down");
        eventually("the loss of eth1", PATIENCE, || {
            let output = namespace.command("ip").args(["link", "show", "eth1"]).output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            if text.contains("NO-CARRIER") { Ok(()) } else { Err(text) }
        });
        let end = tokio::time::Instant::now() + PATIENCE;
        while fib.kernel_prefixes().await.contains(&(scope::network_on("fe80::/64".parse().unwrap(), "eth1"), None)) {
            assert!(tokio::time::Instant::now() < end, "eth1's network is still there");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        edge.handle.kernel(fib.kernel_prefixes().await).await;
        edge.until("only the other's", |edge| edge.hops("10.1.3.0/26").is_empty()).await;
        assert!(!edge.hops("10.1.2.0/26").is_empty());
        assert!(!edge.seen.iter().any(|event| matches!(event, BgpEvent::PeerDown { .. })), "{:?}", edge.seen);
    });
}

#[test]
fn frr_at_a_link_local_address_of_an_interface_exchanges_both_families() {
    if missing("frr_at_a_link_local_address_of_an_interface_exchanges_both_families", &["vtysh"]) {
        return;
    }
    let mut lab = Lab::link_local();
    lab.bgpd_with_zebra(
        "router bgp 64513\n bgp router-id 10.0.0.2\n no bgp ebgp-requires-policy\n no bgp network import-check\n \
         neighbor fe80::1 remote-as 64512\n neighbor fe80::1 interface eth0\n neighbor fe80::1 timers connect 1\n \
         neighbor fe80::1 capability extended-nexthop\n address-family ipv4 unicast\n  network 10.1.2.0/26\n \
         exit-address-family\n address-family ipv6 unicast\n  neighbor fe80::1 activate\n  network fd01:2::/64\n \
         exit-address-family\nexit",
    );
    lab.edge.block_on(|| async {
        let text = "[edge]\ninterfaces = [\"eth0\"]\npod_networks = [\"10.1.0.0/16\", \"fd01::/16\"]\n\
                    [bgp]\nasn = 64512\nrouter_id = \"10.0.0.1\"\n[[bgp.peer]]\naddress = \"fe80::2\"\ninterface = \"eth0\"\n\
                    remote_asn = 64513\nimport = [\"10.1.0.0/16 le 32\", \"fd01::/16 le 64\"]\n\
                    export = [\"10.9.0.0/16 le 32\"]\n[service.web]\nlisten = [\"10.9.0.1:80/tcp\"]\n\
                    backends = { static = [\"10.1.2.4:80\"] }\n";
        let bgp = config::parse(text, Path::new("edge.toml")).unwrap_or_else(|error| panic!("{error}")).bgp.unwrap();
        let mut edge = Edge::start(bgp).await;
        let row = edge.row_until("fe80::2%eth0", "the session", established).await;
        assert!(row.capabilities.contains(&"extended-next-hop".to_owned()), "on by itself: {row:#?}");
        let hop = scope::on(NEIGHBOUR.parse().unwrap(), "eth0").to_string();
        for prefix in ["10.1.2.0/26", "fd01:2::/64"] {
            edge.until(prefix, |edge| edge.hops(prefix) == [hop.clone()]).await;
        }
        edge.handle.announce(VIP.parse().unwrap(), PathAttributes::default()).await;
        says("FRR", "fe80::1", || lab.vtysh("show bgp ipv4 unicast 10.9.0.1/32")).await;
        let received = edge.handle.received(scope::on(NEIGHBOUR.parse().unwrap(), "eth0")).await;
        assert!(received.iter().all(|row| row.next_hop == "fe80::2%eth0"), "{received:#?}");
    });
}
