//! Policy, transit, limits and several paths, with real peers: BIRD and FRR.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first broken assumption")]

mod common;

use std::{fs, process::Command, time::Duration};

use common::{
    bgp::{Edge, Lab, NODE, PATIENCE, config, peer, rule, says},
    eventually, which,
};
use edge_ctl::{
    bgp::Leaving,
    config::valid::{self, AsPathPattern, Changes, MaxPrefixes, Term},
    model::{PathAttributes, view::BgpPeerRow},
};
use ipnet::IpNet;

fn skipped(name: &str, program: &str) -> bool {
    let missing = which(program).is_none();
    if missing {
        println!("SKIPPED {name}: {program} is not installed");
    }
    missing
}

fn prefix(text: &str) -> IpNet {
    text.parse().unwrap()
}

/// Starts a BIRD with `body` and the router id `address`.
fn bird(lab: &mut Lab, address: &str, body: &str) {
    let (file, socket) = (lab.path(&format!("{address}.conf")), lab.path(&format!("{address}.ctl")));
    let pid = lab.path(&format!("{address}.pid"));
    fs::write(&file, format!("router id {address};\nprotocol device {{}}\n{body}\n")).unwrap();
    let texts = [file, socket, pid].map(|path| path.display().to_string());
    lab.start("bird", &["-f", "-c", &texts[0], "-s", &texts[1], "-P", &texts[2]]);
    eventually("BIRD answers", PATIENCE, || {
        let answer = birdc(lab, address, "show status");
        if answer.contains("Daemon is up") { Ok(()) } else { Err(answer) }
    });
}

fn birdc(lab: &Lab, address: &str, command: &str) -> String {
    let mut birdc = Command::new("birdc");
    let output = birdc.arg("-s").arg(lab.path(&format!("{address}.ctl"))).args(command.split(' ')).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn session(address: &str, asn: u32, channel: &str) -> String {
    format!(
        "protocol bgp edge {{ local {address} as {asn}; neighbor 10.0.0.1 as 64512; strict bind yes; \
         connect delay time 1; error wait time 1, 1; ipv4 {{ {channel} }}; }}"
    )
}

/// One route with a community, one without, and one whose path goes through AS 65001.
const PODS: &str = "protocol static pods { ipv4; \
    route 10.1.2.0/26 blackhole { bgp_community.add((64513,7)); }; \
    route 10.1.3.0/26 blackhole; \
    route 10.1.4.0/26 blackhole { bgp_path.prepend(65001); }; }";

fn external() -> valid::Peer {
    peer(NODE, 64513)
}

#[test]
fn terms_match_communities_and_paths_and_a_changed_list_is_applied_without_a_new_session() {
    if skipped("terms_match_communities_and_paths_and_a_changed_list_is_applied_without_a_new_session", "bird") {
        return;
    }
    let mut lab = Lab::new();
    bird(&mut lab, NODE, &(PODS.to_owned() + &session(NODE, 64513, "import all; export where source = RTS_STATIC;")));
    lab.edge.block_on(|| async {
        let mut node = external();
        let set = Changes { local_pref: Some(200), ..Changes::default() };
        node.import = Some(vec![
            Term { communities: vec!["64513:7".parse().unwrap()], set, ..Term::default() },
            Term { as_path: Some(AsPathPattern::new("_65001_").unwrap()), deny: true, ..Term::default() },
            rule("10.1.0.0/16", 16, 26),
        ]);
        let mut bgp = config([node.clone()]);
        let mut edge = Edge::start(bgp.clone()).await;
        edge.converged().await;
        assert_eq!(edge.hops("10.1.2.0/26"), [NODE]);
        assert_eq!(edge.hops("10.1.3.0/26"), [NODE]);
        assert!(edge.hops("10.1.4.0/26").is_empty());
        let rows = edge.handle.routes().await;
        let preference = |network: &str| rows.iter().find(|row| row.network == network).and_then(|row| row.locprf);
        assert_eq!((preference("10.1.2.0/26"), preference("10.1.3.0/26")), (Some(200), None));
        let received = edge.handle.received(NODE.parse().unwrap()).await;
        let refused = received.iter().find(|row| row.network == "10.1.4.0/26").unwrap();
        assert_eq!(refused.reason.as_deref(), Some("refused by term 2 of the import list"));

        node.import = Some(vec![rule("10.1.4.0/26", 26, 26)]);
        bgp.peers.insert(node.address, node);
        edge.handle.reload(bgp).await.unwrap();
        edge.until("the list in force", |edge| {
            edge.hops("10.1.2.0/26").is_empty() && edge.hops("10.1.4.0/26") == [NODE]
        })
        .await;
        let row = edge.row(NODE).await;
        assert_eq!((row.established_count, row.messages.get("route_refresh_sent").copied()), (1, Some(1)), "{row:#?}");
    });
}

#[test]
fn what_export_terms_set_arrives_and_what_they_refuse_has_its_reason() {
    if skipped("what_export_terms_set_arrives_and_what_they_refuse_has_its_reason", "bird") {
        return;
    }
    let mut lab = Lab::new();
    bird(&mut lab, NODE, &session(NODE, 64513, "import all; export none;"));
    lab.edge.block_on(|| async {
        let mut node = external();
        let set = Changes {
            med: Some(77),
            add: ["64512:5", "64512:1:2", "rt:64512:9"].map(|text| text.parse().unwrap()).into(),
            prepend: 2,
            ..Changes::default()
        };
        node.export = Some(vec![Term { set, ..rule("10.9.0.0/16", 32, 32) }]);
        let edge = Edge::start(config([node])).await;
        edge.handle.announce(prefix("10.9.0.1/32"), PathAttributes { prepend: 1, ..Default::default() }).await;
        edge.handle.announce(prefix("10.8.0.1/32"), PathAttributes::default()).await;
        let show = || birdc(&lab, NODE, "show route all 10.9.0.1/32");
        says("BIRD", "BGP.med: 77", show).await;
        for text in ["64512 64512 64512 64512", "(64512,5)", "(64512, 1, 2)", "(rt, 64512, 9)"] {
            assert!(show().contains(text), "{text} in {}", show());
        }
        let rows = edge.handle.advertised(NODE.parse().unwrap()).await;
        let reasons: Vec<_> = rows.iter().map(|row| (row.network.as_str(), row.reason.as_deref())).collect();
        let withheld = Some("no term of the export list matches");
        assert_eq!(reasons, [("10.8.0.1/32", withheld), ("10.9.0.1/32", None)]);
    });
}

#[test]
fn transit_passes_routes_between_external_and_internal_peers_with_our_next_hop() {
    if skipped("transit_passes_routes_between_external_and_internal_peers_with_our_next_hop", "bird") {
        return;
    }
    let mut lab = Lab::new();
    let channel = "import all; export where source = RTS_STATIC;";
    bird(&mut lab, NODE, &(PODS.to_owned() + &session(NODE, 64513, channel)));
    let inside = "protocol static pods { ipv4; route 10.1.9.0/26 blackhole; }";
    bird(&mut lab, "10.0.0.3", &(inside.to_owned() + &session("10.0.0.3", 64512, channel)));
    lab.edge.block_on(|| async {
        let all = || Some(vec![rule("10.1.0.0/16", 16, 32)]);
        let outside = valid::Peer { import: all(), export: all(), ..external() };
        let inside = valid::Peer { import: all(), export: all(), ..peer("10.0.0.3", 64512) };
        let mut bgp = config([outside, inside]);
        let mut edge = Edge::start(bgp.clone()).await;
        edge.converged().await;
        assert_eq!((edge.row(NODE).await.pfx_snt, edge.row("10.0.0.3").await.pfx_snt), (0, 0), "off by default");

        bgp.transit = true;
        edge.handle.reload(bgp.clone()).await.unwrap();
        let at_inside = || birdc(&lab, "10.0.0.3", "show route all 10.1.2.0/26");
        says("the internal peer", "BGP.next_hop: 10.0.0.1", at_inside).await;
        for text in ["BGP.as_path: 64513", "(64513,7)", "BGP.local_pref: 100"] {
            assert!(at_inside().contains(text), "{text} in {}", at_inside());
        }
        let at_outside = || birdc(&lab, NODE, "show route all 10.1.9.0/26");
        says("the external peer", "BGP.as_path: 64512", at_outside).await;
        assert!(at_outside().contains("BGP.next_hop: 10.0.0.1"), "{}", at_outside());

        birdc(&lab, "10.0.0.3", "disable pods");
        says("the external peer", "Network not found", at_outside).await;
        bgp.transit = false;
        edge.handle.reload(bgp).await.unwrap();
        says("the internal peer", "Network not found", at_inside).await;
        assert_eq!(edge.row(NODE).await.established_count, 1);
    });
}

#[test]
fn a_peer_with_too_many_prefixes_loses_its_session_and_may_come_back_after_the_pause() {
    if skipped("a_peer_with_too_many_prefixes_loses_its_session_and_may_come_back_after_the_pause", "bird") {
        return;
    }
    let mut lab = Lab::new();
    bird(&mut lab, NODE, &(PODS.to_owned() + &session(NODE, 64513, "import all; export where source = RTS_STATIC;")));
    lab.edge.block_on(|| async {
        let mut node = external();
        node.import = Some(vec![]);
        let restart = Some(Duration::from_secs(1));
        node.intake.max_prefixes = Some(MaxPrefixes { limit: 2, warning: 1, restart });
        let mut bgp = config([node.clone()]);
        let mut edge = Edge::start(bgp.clone()).await;
        let limited = |row: &BgpPeerRow| row.state == "Idle (PfxCt)";
        let row = edge.row_until(NODE, "the limit", limited).await;
        let reset = row.last_reset.unwrap();
        assert!(reset.contains("Maximum Number of Prefixes Reached (6/1)"), "{reset}");
        edge.row_until(NODE, "the second attempt", |row| row.established_count >= 2).await;

        node.intake.max_prefixes = Some(MaxPrefixes { limit: 3, warning: 3, restart });
        bgp.peers.insert(node.address, node);
        edge.handle.reload(bgp).await.unwrap();
        let row = edge.row_until(NODE, "all of them", |row| row.pfx_received == 3).await;
        assert_eq!((row.state.as_str(), row.max_prefixes), ("Established", Some(3)));
    });
}

#[test]
fn several_paths_to_one_prefix_from_one_peer_share_the_load_with_add_path() {
    if skipped("several_paths_to_one_prefix_from_one_peer_share_the_load_with_add_path", "bird") {
        return;
    }
    let mut lab = Lab::new();
    let paths = "protocol static one { ipv4; route 10.1.2.0/26 via 10.0.0.2; }\n\
                 protocol static two { ipv4 { preference 150; }; route 10.1.2.0/26 via 10.0.0.3; }\n";
    let channel = "add paths tx; next hop keep; import all; export where source = RTS_STATIC;";
    bird(&mut lab, NODE, &(paths.to_owned() + &session(NODE, 64512, channel)));
    lab.edge.block_on(|| async {
        let mut node = peer(NODE, 64512);
        node.intake.add_path = true;
        let mut edge = Edge::start(config([node])).await;
        edge.until("both paths", |edge| edge.hops("10.1.2.0/26") == ["10.0.0.2", "10.0.0.3"]).await;
        let rows = edge.handle.routes().await;
        assert_eq!(rows.iter().filter(|row| row.path_id.is_some()).count(), 2, "{rows:#?}");
        birdc(&lab, NODE, "disable two");
        edge.until("the one that is left", |edge| edge.hops("10.1.2.0/26") == ["10.0.0.2"]).await;
    });
}

#[test]
fn a_next_hop_that_the_kernel_cannot_reach_takes_its_routes_out_and_its_return_brings_them_back() {
    if skipped("a_next_hop_that_the_kernel_cannot_reach_takes_its_routes_out_and_its_return_brings_them_back", "bird") {
        return;
    }
    let mut lab = Lab::new();
    let channel = "next hop address 10.7.7.7; import all; export where source = RTS_STATIC;";
    let pods = "protocol static pods { ipv4; route 10.1.2.0/26 blackhole; }";
    bird(&mut lab, NODE, &(pods.to_owned() + &session(NODE, 64512, channel)));
    lab.edge.block_on(|| async {
        let mut edge = Edge::start(config([peer(NODE, 64512)])).await;
        let wire = (prefix("10.0.0.0/24"), None);
        edge.handle.kernel(vec![wire]).await;
        edge.converged().await;
        edge.row_until(NODE, "the route", |row| row.pfx_received == 1).await;
        assert!(edge.hops("10.1.2.0/26").is_empty(), "{:?}", edge.routes);
        let received = edge.handle.received(NODE.parse().unwrap()).await;
        assert_eq!(received[0].reason.as_deref(), Some("next hop 10.7.7.7 cannot be reached"));
        edge.handle.kernel(vec![wire, (prefix("10.7.7.0/24"), Some("10.0.0.3".parse().unwrap()))]).await;
        edge.until("the route through the gateway", |edge| edge.hops("10.1.2.0/26") == ["10.0.0.3"]).await;
        edge.handle.kernel(vec![wire]).await;
        edge.until("its loss", |edge| edge.hops("10.1.2.0/26").is_empty()).await;
    });
}

#[test]
fn a_planned_end_asks_for_another_way_first_then_withdraws_and_then_says_goodbye() {
    if skipped("a_planned_end_asks_for_another_way_first_then_withdraws_and_then_says_goodbye", "bird") {
        return;
    }
    let mut lab = Lab::new();
    bird(&mut lab, NODE, &session(NODE, 64512, "import all; export none;"));
    lab.edge.block_on(|| async {
        let edge = Edge::start(config([peer(NODE, 64512)])).await;
        edge.handle.announce(prefix("10.9.0.1/32"), PathAttributes::default()).await;
        let show = || birdc(&lab, NODE, "show route all 10.9.0.1/32");
        says("BIRD", "BGP.local_pref: 100", show).await;
        edge.handle.leave(Leaving::Ask).await;
        says("BIRD", "(65535,0)", show).await;
        assert!(show().contains("BGP.local_pref: 0"), "{}", show());
        edge.handle.leave(Leaving::Withdraw).await;
        says("BIRD", "Network not found", show).await;
        assert!(birdc(&lab, NODE, "show protocols edge").contains("Established"));
        edge.handle.shutdown().await;
        says("BIRD", "edge is shutting down", || birdc(&lab, NODE, "show protocols all edge")).await;
    });
}

#[test]
fn client_networks_go_to_their_peer_alone_whatever_its_export_list_says_and_leave_with_us() {
    let name = "client_networks_go_to_their_peer_alone_whatever_its_export_list_says_and_leave_with_us";
    if skipped(name, "bird") {
        return;
    }
    const ROUTER: &str = "10.0.0.3";
    let mut lab = Lab::new();
    bird(&mut lab, NODE, &session(NODE, 64513, "import all; export none;"));
    // The router has a path to the same clients, which stays the one that we use.
    let clients = "protocol static clients { ipv4; route 192.0.2.0/24 blackhole; }";
    let body = clients.to_owned() + &session(ROUTER, 64514, "import all; export where source = RTS_STATIC;");
    bird(&mut lab, ROUTER, &body);
    lab.edge.block_on(|| async {
        let mut node = valid::Peer { export: Some(vec![]), ..external() };
        node.client_networks = vec![prefix("192.0.2.0/24"), prefix("0.0.0.0/0")];
        let mut router = peer(ROUTER, 64514);
        router.import = Some(vec![rule("192.0.2.0/24", 24, 24)]);
        router.export = Some(vec![rule("10.9.0.0/16", 16, 32)]);
        let mut bgp = config([node.clone(), router]);
        bgp.networks = vec![prefix("10.9.0.0/24")];
        bgp.transit = true;
        let mut edge = Edge::start(bgp.clone()).await;
        edge.until("the router's path", |edge| edge.hops("192.0.2.0/24") == [ROUTER]).await;
        for network in ["192.0.2.0/24", "0.0.0.0/0"] {
            let show = || birdc(&lab, NODE, &format!("show route all {network}"));
            says("the node's BIRD", "BGP.next_hop: 10.0.0.1", show).await;
            assert!(show().contains("BGP.as_path: 64512\n"), "as if it were ours: {}", show());
        }
        says("the router's BIRD", "BGP.next_hop: 10.0.0.1", || birdc(&lab, ROUTER, "show route all 10.9.0.0/24")).await;
        assert!(birdc(&lab, ROUTER, "show route 0.0.0.0/0").contains("Network not found"));
        assert!(birdc(&lab, NODE, "show route 10.9.0.0/24").contains("Network not found"), "its list names nothing");
        assert_eq!(edge.hops("192.0.2.0/24"), [ROUTER], "what we tell a node is no route of ours");
        let mut sent: Vec<(String, String)> = edge
            .handle
            .advertised(NODE.parse().unwrap())
            .await
            .into_iter()
            .map(|row| (row.status, row.network))
            .collect();
        sent.sort();
        let sent: Vec<(&str, &str)> =
            sent.iter().map(|(status, network)| (status.as_str(), network.as_str())).collect();
        assert_eq!(sent, [("*>", "0.0.0.0/0"), ("*>", "192.0.2.0/24"), ("r", "10.9.0.0/24")]);

        node.client_networks = vec![prefix("192.0.2.0/24")];
        bgp.peers.insert(node.address, node);
        edge.handle.reload(bgp).await.unwrap();
        says("the node's BIRD", "Network not found", || birdc(&lab, NODE, "show route 0.0.0.0/0")).await;
        assert_eq!(edge.row(NODE).await.established_count, 1, "no new session");
        let clients = || birdc(&lab, NODE, "show route all 192.0.2.0/24");
        edge.handle.leave(Leaving::Ask).await;
        says("the node's BIRD", "(65535,0)", clients).await;
        edge.handle.leave(Leaving::Withdraw).await;
        says("the node's BIRD", "Network not found", clients).await;
    });
}
