//! Configurations that people have published, as they stand: with the program they were written for, and taken over by
//! `config import frr`, the daemon playing either side.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first broken assumption")]

mod common;

use std::{fs, path::Path};

use common::{
    Namespace,
    bgp::{Edge, Lab, config, peer, says},
    speakers::{Bird, Frr, Gobgp, missing},
};
use edge_ctl::{
    config::{self, import_frr, valid},
    model::{PathAttributes, bgp_session::PasswordSource, view::BgpPeerRow},
};
use ipnet::IpNet;

/// Two FRR routers before a Cilium cluster.
const FEDORA1: &str = include_str!("../../tests/fixtures/frr/fedora1.conf");
const FEDORA2: &str = include_str!("../../tests/fixtures/frr/fedora2.conf");
/// A Quagga beside an NGINX edge and a Calico cluster.
const NGINX_EDGE: &str = include_str!("../../tests/fixtures/frr/nginx-edge.conf");

const VIP: &str = "192.168.77.20/32";
const KUBE1: &str = "192.168.99.12";

/// FRR 10.5, where the configuration comes from, takes a port for a peer group; Debian's 8.4 for a neighbour only.
const GROUP_PORT: &str = "neighbor 192.168.99.12 peer-group KUBE_AS\n";
const PEER_PORT: &str = "neighbor 192.168.99.12 peer-group KUBE_AS\nneighbor 192.168.99.12 port 32179\n";

fn established(row: &BgpPeerRow) -> bool {
    row.state == "Established"
}

fn prefix(text: &str) -> IpNet {
    text.parse().unwrap()
}

/// A lab whose two sides have these addresses.
fn lab(edge: &[&str], node: &[&str]) -> Lab {
    let lab = Lab::new();
    let give = |namespace: &Namespace, addresses: &[&str]| {
        addresses.iter().for_each(|address| namespace.ip(&format!("addr add {address}/24 dev eth0")));
    };
    give(&lab.edge, edge);
    give(&lab.node, node);
    lab
}

/// The speaker that the Cilium nodes are in AS 65432: it listens where the router dials, with the password both have.
fn kube1(lab: &Lab, routers: &[&str], port: u16) -> valid::Bgp {
    let file = lab.path("password");
    fs::write(&file, "weakpassword\n").unwrap();
    let router = |address: &&str| {
        let mut router = peer(address, 62112);
        router.session.password = Some(PasswordSource::File(file.clone()));
        router.local_address = Some(KUBE1.parse().unwrap());
        // Where the router dials a port of its own, it is to be the one that dials.
        router.passive = port != 179;
        router.import = Some(vec![]);
        router.export =
            Some(vec![valid::PrefixRule { prefix: prefix("192.168.77.0/24"), min_length: 32, max_length: 32 }.into()]);
        router
    };
    valid::Bgp {
        asn: 65432,
        router_id: KUBE1.parse().unwrap(),
        listen_port: Some(port),
        ..config(routers.iter().map(router))
    }
}

/// What FRR makes of the VIP: in `received-routes` before its filter, in the table after it.
fn shown(lab: &Lab, neighbor: &str) -> (bool, bool) {
    let received = lab.vtysh(&format!("show bgp ipv4 unicast neighbors {neighbor} received-routes"));
    let accepted = lab.vtysh(&format!("show bgp ipv4 unicast {VIP}"));
    (received.contains("192.168.77.20/32"), accepted.contains("from 192.168.99.12"))
}

/// The daemon as kube1 behind a router with this configuration; whether the VIP is in the router's table in the end.
fn behind(router: &str, text: &str, port: u16, accepted: bool) {
    let mut lab = lab(&[KUBE1], &[router]);
    let namespace = lab.edge.clone();
    namespace.block_on(|| async {
        let mut edge = Edge::start(kube1(&lab, &[router], port)).await;
        // After us: as printed, it would wait two minutes before it dials again.
        let text = if port == 179 { text.to_owned() } else { text.replace(GROUP_PORT, PEER_PORT) };
        lab.bgpd(&text);
        let row = edge.row_until(router, "the session", established).await;
        if port == 32179 {
            assert!(row.local.as_deref().is_some_and(|local| local.ends_with(":32179")), "FRR dialled: {row:#?}");
        }
        edge.handle.announce(prefix(VIP), PathAttributes::default()).await;
        says("FRR", "(true,", || format!("{:?}", shown(&lab, KUBE1))).await;
        if accepted {
            says("FRR", "(true, true)", || format!("{:?}", shown(&lab, KUBE1))).await;
        } else {
            assert_eq!(shown(&lab, KUBE1), (true, false), "received and refused by KUBEFILTER");
        }
        assert_eq!(edge.row(router).await.established_count, 1);
    });
}

#[test]
fn behind_the_published_frr_routers_the_vip_is_received_and_refused_and_with_le_32_accepted() {
    if missing("behind_the_published_frr_routers_the_vip_is_received_and_refused_and_with_le_32_accepted", &["vtysh"]) {
        return;
    }
    for (router, text, port) in [("192.168.99.10", FEDORA1, 32179), ("192.168.99.11", FEDORA2, 179)] {
        behind(router, text, port, false);
        let imported = import_frr::import(text).unwrap();
        let finding = imported.findings.iter().find(|finding| finding.contains("192.168.77.0/24 le 32"));
        assert!(finding.is_some(), "`config import` says why: {:#?}", imported.findings);
        let meant = text.replace("permit 192.168.77.0/24", "permit 192.168.77.0/24 le 32");
        behind(router, &meant, port, true);
    }
}

/// The daemon's configuration out of an FRR one, with the passwords that are never copied; and what was said about it.
fn taken_over(lab: &Lab, text: &str) -> valid::Bgp {
    let imported = import_frr::import(text).unwrap();
    let password = lab.path("password");
    fs::write(&password, "weakpassword\n").unwrap();
    let named = |line: &str| match line.starts_with("password_file") {
        true => format!("password_file = \"{}\"", password.display()),
        false => line.to_owned(),
    };
    let bgp: Vec<String> = imported.toml.lines().map(named).collect();
    let rest = "[edge]\ninterfaces = [\"eth0\"]\npod_networks = [\"10.1.0.0/16\"]\n\
                [service.web]\nlisten = [\"172.16.1.88:80/tcp\"]\nbackends = { static = [\"10.1.0.4:80\"] }\n";
    let text = bgp.join("\n") + "\n" + rest;
    config::parse(&text, Path::new("edge.toml")).unwrap_or_else(|error| panic!("{error}\n{text}")).bgp.unwrap()
}

/// Cilium's speaker is a GoBGP: node kube1, listening on `port`.
const CILIUM: &str = r#"
[global.config]
as = 65432
router-id = "192.168.99.12"
port = 32179
[[neighbors]]
[neighbors.config]
neighbor-address = "192.168.99.10"
peer-as = 62112
auth-password = "weakpassword"
[neighbors.transport.config]
passive-mode = true
local-address = "192.168.99.12"
[neighbors.graceful-restart.config]
enabled = true
restart-time = 120
[[neighbors.afi-safis]]
[neighbors.afi-safis.config]
afi-safi-name = "ipv4-unicast"
"#;

#[test]
fn as_the_published_frr_router_the_daemon_refuses_the_vip_with_the_list_as_reason_and_with_le_32_takes_it() {
    let name = "as_the_published_frr_router_the_daemon_refuses_the_vip_with_the_list_as_reason_and_with_le_32_takes_it";
    if missing(name, &["gobgpd", "gobgp"]) {
        return;
    }
    let mut lab = lab(&["192.168.99.10"], &[KUBE1]);
    lab.gobgpd(CILIUM);
    lab.gobgp(&format!("global rib add {VIP}"));
    lab.edge.block_on(|| async {
        let printed = taken_over(&lab, FEDORA1);
        let mut edge = Edge::start(printed).await;
        let row = edge.row_until(KUBE1, "the route", |row| row.pfx_received == 1).await;
        assert!(row.remote.as_deref().is_some_and(|remote| remote.ends_with(":32179")), "{row:#?}");
        let received = edge.handle.received(KUBE1.parse().unwrap()).await;
        assert_eq!(received[0].network, VIP);
        let reason = received[0].reason.as_deref().unwrap_or_default();
        assert!(reason.contains("import list"), "{received:#?}");
        says("GoBGP", "172.16.99.0/24", || lab.gobgp("global rib")).await;

        let meant = FEDORA1.replace("permit 192.168.77.0/24", "permit 192.168.77.0/24 le 32");
        edge.handle.reload(taken_over(&lab, &meant)).await.unwrap();
        edge.until("the VIP", |edge| edge.hops(VIP) == [KUBE1]).await;
        assert_eq!(edge.row(KUBE1).await.established_count, 1, "the list changed, the session did not");
    });
}

/// The Calico node of this address: its block, and an internal session with 172.16.1.88.
fn calico(lab: &mut Lab, host: usize) {
    let text = format!(
        "router id 172.16.1.{host};\nprotocol device {{}}\nprotocol static pods {{ ipv4; route 10.1.{host}.0/26 blackhole; }}\n\
         protocol bgp edge {{ local 172.16.1.{host} as 64512; neighbor 172.16.1.88 as 64512; strict bind yes; \
         graceful restart on; connect delay time 1; connect retry time 1; error wait time 1, 1; \
         ipv4 {{ import all; export where source = RTS_STATIC; next hop self; }}; }}\n"
    );
    lab.bird_named(&format!("node{host}"), &text, &[]);
}

#[test]
fn the_published_quagga_configuration_beside_nginx_learns_every_node_and_announces_its_network() {
    let name = "the_published_quagga_configuration_beside_nginx_learns_every_node_and_announces_its_network";
    if missing(name, &["bird", "birdc"]) {
        return;
    }
    let hosts = [80, 81, 82];
    let mut lab = lab(&["172.16.1.88"], &["172.16.1.80", "172.16.1.81", "172.16.1.82"]);
    hosts.iter().for_each(|host| calico(&mut lab, *host));
    lab.edge.block_on(|| async {
        let mut edge = Edge::start(taken_over(&lab, NGINX_EDGE)).await;
        for host in hosts {
            let (block, node) = (format!("10.1.{host}.0/26"), format!("172.16.1.{host}"));
            edge.until("the node's block", |edge| edge.hops(&block) == [node.clone()]).await;
            let show = || lab.birdc_named(&format!("node{host}"), "show route all 172.16.1.0/24 protocol edge");
            says("BIRD", "BGP.next_hop: 172.16.1.88", show).await;
            let row = edge.row(&node).await;
            assert_eq!((row.group.as_deref(), row.pfx_rcd, row.pfx_snt), (Some("calico"), 1, 1), "{row:#?}");
        }
    });
}

#[test]
fn as_a_calico_node_the_daemon_peers_with_the_published_quagga_configuration_in_frr() {
    let name = "as_a_calico_node_the_daemon_peers_with_the_published_quagga_configuration_in_frr";
    if missing(name, &["vtysh"]) {
        return;
    }
    let mut lab = lab(&["172.16.1.80"], &["172.16.1.88"]);
    lab.bgpd(NGINX_EDGE);
    lab.edge.block_on(|| async {
        let mut router = peer("172.16.1.88", 64512);
        router.import =
            Some(vec![valid::PrefixRule { prefix: prefix("172.16.1.0/24"), min_length: 24, max_length: 24 }.into()]);
        let mut bgp = config([router]);
        bgp.router_id = "172.16.1.80".parse().unwrap();
        let mut edge = Edge::start(bgp).await;
        let row = edge.row_until("172.16.1.88", "the session", established).await;
        assert!(row.capabilities_received.contains(&"dynamic".to_owned()), "tolerated: {row:#?}");
        edge.handle.announce(prefix("10.1.0.0/26"), PathAttributes::default()).await;
        says("FRR", "172.16.1.80", || lab.vtysh("show bgp ipv4 unicast 10.1.0.0/26")).await;
    });
}
