//! Sessions with a real BIRD 2 (Calico's speaker is one) in a namespace of its own.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first broken assumption")]

mod common;

use std::{fs, process::Command};

use common::{
    bgp::{Edge, Lab, NODE, NODE6, PATIENCE, config, peer, rule, says},
    eventually, which,
};
use edge_ctl::{
    bgp::BgpEvent,
    model::{PathAttributes, view::BgpPeerRow},
};

/// Internal, active, two families on one session.
const IBGP: &str = "protocol bgp edge { local 10.0.0.2 as 64512; neighbor 10.0.0.1 as 64512; \
    strict bind yes; connect delay time 1; error wait time 1, 1; \
    ipv4 { import all; export where source = RTS_STATIC; next hop self; }; \
    ipv6 { import all; export where source = RTS_STATIC; next hop self; }; }";

/// As [`IBGP`], waiting for us to dial.
fn ibgp_passive() -> String {
    IBGP.replace("local 10.0.0.2", "passive on; local 10.0.0.2")
}

trait Bird {
    fn bird(&mut self, protocols: &str);
    fn bird_at(&mut self, address: &str, protocols: &str);
    fn birdc(&self, command: &str) -> String;
    fn birdc_at(&self, address: &str, command: &str) -> String;
}

impl Bird for Lab {
    /// Starts BIRD with static pod routes and the given protocols.
    fn bird(&mut self, protocols: &str) {
        self.bird_at(NODE, protocols);
    }

    /// As above, with the router id of one of the node's addresses, so that several can run.
    fn bird_at(&mut self, address: &str, protocols: &str) {
        let config = format!(
            "router id {address};\nprotocol device {{}}\n\
             protocol static pods4 {{ ipv4; route 10.1.2.0/26 blackhole; route 10.1.3.0/26 blackhole; }}\n\
             protocol static pods6 {{ ipv6; route fd01:2::/64 blackhole; }}\n{protocols}\n"
        );
        let (file, socket, pid) = (self.path("bird.conf"), self.path(&format!("{address}.ctl")), self.path("bird.pid"));
        fs::write(&file, config).unwrap();
        let texts = [file, socket, pid].map(|path| path.display().to_string());
        self.start("bird", &["-f", "-c", &texts[0], "-s", &texts[1], "-P", &texts[2]]);
        eventually("BIRD answers", PATIENCE, || {
            let answer = self.birdc_at(address, "show status");
            if answer.contains("Daemon is up") { Ok(()) } else { Err(answer) }
        });
    }

    fn birdc(&self, command: &str) -> String {
        self.birdc_at(NODE, command)
    }

    fn birdc_at(&self, address: &str, command: &str) -> String {
        let mut birdc = Command::new("birdc");
        let output =
            birdc.arg("-s").arg(self.path(&format!("{address}.ctl"))).args(command.split(' ')).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    }
}

fn skipped(name: &str) -> bool {
    let missing = which("bird").is_none() || which("birdc").is_none();
    if missing {
        println!("SKIPPED {name}: bird is not installed");
    }
    missing
}

fn prefix(text: &str) -> ipnet::IpNet {
    text.parse().unwrap()
}

#[test]
fn an_active_internal_session_learns_announces_withdraws_and_says_goodbye() {
    if skipped("an_active_internal_session_learns_announces_withdraws_and_says_goodbye") {
        return;
    }
    let mut lab = Lab::new();
    lab.bird(&ibgp_passive());
    lab.edge.block_on(|| async {
        let mut edge = Edge::start(config([peer(NODE, 64512)])).await;
        edge.converged().await;
        assert_eq!(edge.hops("10.1.2.0/26"), [NODE]);
        assert_eq!(edge.hops("10.1.3.0/26"), [NODE]);

        let communities = vec!["64512:100".parse().unwrap()];
        let attributes = PathAttributes { communities, med: Some(10), local_pref: Some(200), prepend: 0 };
        edge.handle.announce(prefix("10.9.0.1/32"), attributes).await;
        let show = || lab.birdc("show route all 10.9.0.1/32");
        says("BIRD", "BGP.local_pref: 200", show).await;
        for text in ["BGP.next_hop: 10.0.0.1", "BGP.med: 10", "(64512,100)", "BGP.as_path: \n", "BGP.origin: IGP"] {
            assert!(show().contains(text), "{text} in {}", show());
        }
        let advertised = edge.handle.advertised(NODE.parse().unwrap()).await;
        assert_eq!((advertised.len(), advertised[0].network.as_str()), (1, "10.9.0.1/32"));

        edge.handle.withdraw(prefix("10.9.0.1/32")).await;
        says("BIRD", "Network not found", show).await;
        edge.handle.shutdown().await;
        says("BIRD", "Received: Administrative shutdown", || lab.birdc("show protocols all edge")).await;
        assert!(edge.handle.summary().await.is_empty());
    });
}

#[test]
fn a_passive_external_session_obeys_rfc_8212_and_the_lists() {
    if skipped("a_passive_external_session_obeys_rfc_8212_and_the_lists") {
        return;
    }
    let mut lab = Lab::new();
    // 4-byte AS numbers on the far side; the TTL of a direct external session is checked by BIRD (`ttl security`).
    lab.bird(&IBGP.replace("local 10.0.0.2 as 64512", "local 10.0.0.2 as 4200000002").replace("next hop self;", ""));
    lab.edge.block_on(|| async {
        let mut external = peer(NODE, 4_200_000_002);
        external.passive = true;
        let mut bgp = config([external.clone()]);
        bgp.networks = vec![prefix("10.9.0.0/24"), prefix("10.8.0.0/24")];
        let mut edge = Edge::start(bgp.clone()).await;
        edge.converged().await;
        assert!(edge.routes.is_empty(), "{:?}", edge.routes);
        let received = edge.handle.received(NODE.parse().unwrap()).await;
        assert_eq!(received.iter().filter(|row| row.network.starts_with("10.1.")).count(), 2);
        assert!(received.iter().all(|row| row.reason.is_some() && row.status.starts_with('r')), "{received:#?}");
        assert!(edge.handle.routes().await.iter().all(|row| row.peer == "local"));
        assert_eq!(edge.row(NODE).await.pfx_snt, 0);

        external.import = Some(vec![rule("10.1.2.0/24", 24, 32)]);
        external.export = Some(vec![rule("10.9.0.0/16", 16, 32)]);
        bgp.peers.insert(external.address, external);
        edge.handle.reload(bgp).await.unwrap();
        edge.until("the listed route", |edge| !edge.routes.is_empty()).await;
        assert_eq!(edge.hops("10.1.2.0/26"), [NODE]);
        assert_eq!(edge.routes.len(), 1);
        says("BIRD", "10.9.0.0/24", || lab.birdc("show route protocol edge")).await;
        let shown = lab.birdc("show route all protocol edge");
        assert!(shown.contains("BGP.as_path: 64512") && !shown.contains("10.8.0.0/24"), "{shown}");
        assert!(!shown.contains("local_pref: 200"), "{shown}");
        let row = edge.row(NODE).await;
        assert_eq!((row.established_count, row.kind.as_str()), (1, "ebgp"), "a policy change resets nothing");
        assert_eq!(
            row.messages["route_refresh_sent"],
            row.capabilities.iter().filter(|c| c.contains("unicast")).count() as u64
        );
    });
}

#[test]
fn an_ipv6_session_learns_and_announces_ipv6() {
    if skipped("an_ipv6_session_learns_and_announces_ipv6") {
        return;
    }
    let mut lab = Lab::new();
    lab.bird(&IBGP.replace("10.0.0.2 as", "fd00::2 as").replace("neighbor 10.0.0.1", "neighbor fd00::1"));
    lab.edge.block_on(|| async {
        let mut edge = Edge::start(config([peer(NODE6, 64512)])).await;
        edge.converged().await;
        assert_eq!(edge.hops("fd01:2::/64"), [NODE6]);
        edge.handle.announce(prefix("fd09::1/128"), PathAttributes::default()).await;
        edge.handle.announce(prefix("10.9.0.1/32"), PathAttributes::default()).await;
        let show = || lab.birdc("show route all protocol edge");
        says("BIRD", "fd09::1/128", show).await;
        assert!(show().contains("BGP.next_hop: fd00::1"), "{}", show());
        assert!(!show().contains("10.9.0.1"), "no IPv4 next hop on an IPv6 session: {}", show());
        edge.handle.withdraw(prefix("fd09::1/128")).await;
        says("BIRD", "Network not found", || lab.birdc("show route fd09::1/128")).await;
    });
}

#[test]
fn a_lost_session_withdraws_at_once_and_comes_back() {
    if skipped("a_lost_session_withdraws_at_once_and_comes_back") {
        return;
    }
    let mut lab = Lab::new();
    lab.bird(&ibgp_passive());
    let namespace = lab.edge.clone();
    namespace.block_on(|| async {
        let mut edge = Edge::start(config([peer(NODE, 64512)])).await;
        edge.converged().await;
        assert_eq!(edge.hops("10.1.2.0/26"), [NODE]);
        lab.kill();
        edge.until("no routes", |edge| edge.routes.is_empty()).await;
        let lost = edge.row(NODE).await.last_reset.unwrap();
        assert!(lost.starts_with("the peer closed") || lost.starts_with("connection lost"), "{lost}");
        lab.bird(&ibgp_passive());
        edge.until("its return", |edge| edge.hops("10.1.2.0/26") == [NODE]).await;
        assert_eq!(edge.row(NODE).await.established_count, 2);
    });
}

#[test]
fn equal_sessions_share_the_load_and_the_loss_of_one_leaves_the_other() {
    if skipped("equal_sessions_share_the_load_and_the_loss_of_one_leaves_the_other") {
        return;
    }
    let mut lab = Lab::new();
    lab.bird(&ibgp_passive());
    lab.bird_at("10.0.0.3", &ibgp_passive().replace("local 10.0.0.2", "local 10.0.0.3"));
    lab.edge.block_on(|| async {
        let mut edge = Edge::start(config([peer(NODE, 64512), peer("10.0.0.3", 64512)])).await;
        edge.converged().await;
        assert_eq!(edge.hops("10.1.2.0/26"), [NODE, "10.0.0.3"]);
        let rows = edge.handle.routes().await;
        let shown: Vec<_> = rows.iter().filter(|row| row.network == "10.1.2.0/26").map(|row| &row.status).collect();
        assert_eq!(shown, ["*>i", "*=i"]);

        lab.birdc_at("10.0.0.3", "disable edge");
        let down = |event: &BgpEvent| matches!(event, BgpEvent::PeerDown { reason, .. } if reason.contains("Administrative Shutdown (6/2)"));
        edge.until("the loss", |edge| edge.seen.iter().any(down)).await;
        assert_eq!(edge.hops("10.1.2.0/26"), [NODE]);
        lab.birdc_at("10.0.0.3", "enable edge");
        edge.until("the return", |edge| edge.hops("10.1.2.0/26").len() == 2).await;
    });
}

#[test]
fn two_sides_that_dial_at_once_end_with_one_session() {
    if skipped("two_sides_that_dial_at_once_end_with_one_session") {
        return;
    }
    let mut lab = Lab::new();
    lab.bird(&IBGP.replace("connect delay time 1;", "connect delay time 1; connect retry time 1;"));
    lab.edge.block_on(|| async {
        let mut edge = Edge::start(config([peer(NODE, 64512)])).await;
        edge.converged().await;
        let row = edge.row_until(NODE, "one session", |row| row.state == "Established").await;
        assert_eq!(row.established_count, 1);
        let output = lab.edge.command("ss").args(["-Htn", "state", "established"]).output().unwrap();
        let connections = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(connections.lines().filter(|line| line.contains(":179")).count(), 1, "{connections}");
        says("BIRD", "Established", || lab.birdc("show protocols edge")).await;
    });
}

#[test]
fn a_wrong_as_on_either_side_is_told_to_both() {
    if skipped("a_wrong_as_on_either_side_is_told_to_both") {
        return;
    }
    let mut lab = Lab::new();
    lab.bird(&ibgp_passive());
    lab.edge.block_on(|| async {
        let mut edge = Edge::start(config([peer(NODE, 65000)])).await;
        let told = |row: &BgpPeerRow| {
            row.last_reset.as_ref().is_some_and(|why| why.contains("sent OPEN Message Error: Bad Peer AS (2/2)"))
        };
        let row = edge.row_until(NODE, "our complaint", told).await;
        assert_eq!(row.established_count, 0);
        assert!(row.next_connect.is_some());
        says("BIRD", "Received: Bad peer AS", || lab.birdc("show protocols all edge")).await;

        let mut wrong = config([peer(NODE, 64512)]);
        wrong.asn = 65001;
        edge.handle.reload(wrong).await.unwrap();
        let told = |row: &BgpPeerRow| {
            row.last_reset.as_ref().is_some_and(|why| why.contains("received OPEN Message Error: Bad Peer AS (2/2)"))
        };
        edge.row_until(NODE, "their complaint", told).await;
    });
}

#[test]
fn a_refresh_is_answered_with_everything() {
    if skipped("a_refresh_is_answered_with_everything") {
        return;
    }
    let mut lab = Lab::new();
    lab.bird(&ibgp_passive());
    lab.edge.block_on(|| async {
        let mut bgp = config([peer(NODE, 64512)]);
        bgp.networks = vec![prefix("10.9.0.0/24")];
        let mut edge = Edge::start(bgp).await;
        edge.converged().await;
        let before = edge.row(NODE).await.messages["update_sent"];
        lab.birdc("reload in edge");
        let refreshed = |row: &BgpPeerRow| row.messages.contains_key("route_refresh_received");
        let row = edge.row_until(NODE, "the refresh", refreshed).await;
        assert!(row.messages["update_sent"] > before, "{row:#?}");
        says("BIRD", "10.9.0.0/24", || lab.birdc("show route protocol edge")).await;
    });
}

#[test]
fn a_peer_that_is_removed_is_told_and_its_routes_go() {
    if skipped("a_peer_that_is_removed_is_told_and_its_routes_go") {
        return;
    }
    let mut lab = Lab::new();
    lab.bird(&ibgp_passive());
    lab.edge.block_on(|| async {
        let mut edge = Edge::start(config([peer(NODE, 64512)])).await;
        edge.converged().await;
        edge.handle.reload(config([])).await.unwrap();
        edge.until("no routes", |edge| edge.routes.is_empty()).await;
        assert!(edge.handle.summary().await.is_empty());
        says("BIRD", "Received: Peer de-configured", || lab.birdc("show protocols all edge")).await;
        edge.handle.reload(config([peer(NODE, 64512)])).await.unwrap();
        edge.until("its return", |edge| edge.hops("10.1.2.0/26") == [NODE]).await;
    });
}

#[test]
fn a_port_in_use_is_an_error_that_names_it() {
    let lab = Lab::new();
    lab.edge.block_on(|| async {
        let _held = std::net::TcpListener::bind("0.0.0.0:179").unwrap();
        let (events, _receiver) = tokio::sync::mpsc::channel(1);
        let error = edge_ctl::bgp::spawn(config([peer(NODE, 64512)]), events).await.unwrap_err().to_string();
        assert!(error.contains("0.0.0.0:179") && error.contains("listen_port"), "{error}");
    });
}

#[test]
fn large_tables_arrive_whole_both_ways() {
    if skipped("large_tables_arrive_whole_both_ways") {
        return;
    }
    let pods: String = (0..20_000)
        .map(|n| format!("route 10.{}.{}.{}/26 blackhole;\n", 64 + n / 1024, n / 4 % 256, n % 4 * 64))
        .collect();
    let mut lab = Lab::new();
    lab.bird(&format!("protocol static many {{ ipv4; {pods} }}\n{}", ibgp_passive()));
    lab.edge.block_on(|| async {
        let mut bgp = config([peer(NODE, 64512)]);
        bgp.networks = (0..2000).map(|n| prefix(&format!("10.9.{}.{}/32", n / 256, n % 256))).collect();
        let mut edge = Edge::start(bgp).await;
        edge.converged().await;
        assert_eq!(edge.routes.len(), 20_003);
        assert_eq!(edge.row(NODE).await.pfx_rcd, 20_003);
        says("BIRD", "2000 of", || lab.birdc("show route protocol edge count")).await;
        lab.birdc("disable many");
        edge.until("the withdrawal", |edge| edge.routes.len() == 3).await;
    });
}
