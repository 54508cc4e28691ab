//! How sessions with real speakers come up, stay, and end: passwords, hops, ports, ranges, roles, orders.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first broken assumption")]

mod common;

use std::{fs, net::IpAddr, path::PathBuf, time::Duration};

use common::{
    bgp::{Edge, Lab, NODE, NODE6, config, peer, rule, says},
    speakers::{Bird, Frr, full, ibgp, missing},
};
use edge_ctl::{
    bgp::BgpEvent,
    config::valid::{Peer, PeerRange},
    model::{
        PathAttributes,
        bgp_session::{Order, PasswordSource, PeerOrder, Role},
        view::BgpPeerRow,
    },
};

fn established(row: &BgpPeerRow) -> bool {
    row.state == "Established"
}

/// What keeps a peer from coming up says `text`.
fn complains(text: &str) -> impl Fn(&BgpPeerRow) -> bool {
    move |row| row.last_reset.as_ref().is_some_and(|why| why.contains(text))
}

fn password_file(lab: &Lab, name: &str, password: &str) -> PathBuf {
    let path = lab.path(name);
    fs::write(&path, format!("{password}\n")).unwrap();
    path
}

fn with_password(address: &str, file: PathBuf) -> Peer {
    let mut signed = peer(address, 64512);
    signed.session.password = Some(PasswordSource::File(file));
    signed
}

fn order(peer: &str, what: Order) -> PeerOrder {
    PeerOrder { peer: Some(peer.parse().unwrap()), what }
}

#[test]
fn a_password_signs_sessions_of_both_families_whoever_dials() {
    if missing("a_password_signs_sessions_of_both_families_whoever_dials", &["bird", "birdc"]) {
        return;
    }
    for (node, edge) in [(NODE, "10.0.0.1"), (NODE6, "fd00::1")] {
        for node_dials in [true, false] {
            let mut lab = Lab::new();
            lab.bird(&ibgp(
                node,
                edge,
                &format!("password \"secret\"; passive {};", if node_dials { "off" } else { "on" }),
            ));
            lab.edge.block_on(|| async {
                let mut signed = with_password(node, password_file(&lab, "md5", "secret"));
                signed.passive = node_dials;
                let mut edge = Edge::start(config([signed])).await;
                edge.converged().await;
                edge.row_until(node, "a signed session", established).await;
            });
        }
    }
}

#[test]
fn a_password_that_differs_or_is_missing_on_one_side_is_named_as_such() {
    if missing("a_password_that_differs_or_is_missing_on_one_side_is_named_as_such", &["bird", "birdc"]) {
        return;
    }
    for (theirs, ours, complaint) in [
        ("password \"other\";", Some("secret"), "the TCP MD5 passwords differ"),
        ("", Some("secret"), "the peer does not sign"),
        ("password \"other\";", None, "the peer signs and we have no password for it"),
    ] {
        let mut lab = Lab::new();
        lab.bird(&ibgp(NODE, "10.0.0.1", &format!("{theirs} connect delay time 1; connect retry time 1;")));
        lab.edge.block_on(|| async {
            let mut one = peer(NODE, 64512);
            one.session.password = ours.map(|ours| PasswordSource::File(password_file(&lab, "md5", ours)));
            let mut edge = Edge::start(config([one])).await;
            let row = edge.row_until(NODE, complaint, complains(complaint)).await;
            assert_eq!(row.established_count, 0, "{row:#?}");
        });
    }
}

#[test]
fn a_password_that_cannot_be_read_keeps_the_peer_down_and_says_where_it_should_be() {
    let lab = Lab::new();
    lab.edge.block_on(|| async {
        let mut edge = Edge::start(config([with_password(NODE, "/nonexistent/md5".into())])).await;
        let row = edge.row_until(NODE, "the complaint", complains("/nonexistent/md5")).await;
        assert_eq!(row.established_count, 0, "{row:#?}");
    });
}

#[test]
fn a_rotated_password_leaves_the_session_up() {
    if missing("a_rotated_password_leaves_the_session_up", &["bgpd", "vtysh"]) {
        return;
    }
    let mut lab = Lab::new();
    let body = "router bgp 64512\n bgp router-id 10.0.0.2\n neighbor 10.0.0.1 remote-as 64512\n \
                neighbor 10.0.0.1 password secret\n neighbor 10.0.0.1 timers 1 9\n neighbor 10.0.0.1 timers connect 1\nexit";
    lab.bgpd(body);
    lab.edge.block_on(|| async {
        let file = password_file(&lab, "md5", "secret");
        let mut signed = with_password(NODE, file.clone());
        (signed.keepalive, signed.hold) = (Duration::from_secs(1), Duration::from_secs(9));
        let bgp = config([signed]);
        let mut edge = Edge::start(bgp.clone()).await;
        edge.row_until(NODE, "the session", established).await;
        let before = edge.row(NODE).await.messages["keepalive_received"];
        // FRR resets sessions when its password changes; the kernel of its side is told behind its back instead.
        fs::write(&file, "secret\n").unwrap();
        edge.handle.reload(bgp.clone()).await.unwrap();
        let more = |row: &BgpPeerRow| row.messages["keepalive_received"] > before + 2;
        let row = edge.row_until(NODE, "keepalives after the reload", more).await;
        assert_eq!(row.established_count, 1);
        // Another password on our side alone: nothing passes any more, and once it is back, everything does.
        fs::write(&file, "rotated\n").unwrap();
        edge.handle.reload(bgp.clone()).await.unwrap();
        let stalled = edge.row(NODE).await.messages["keepalive_received"];
        fs::write(&file, "secret\n").unwrap();
        edge.handle.reload(bgp).await.unwrap();
        let again = |row: &BgpPeerRow| row.messages["keepalive_received"] > stalled + 2;
        let row = edge.row_until(NODE, "keepalives with the right password again", again).await;
        assert_eq!(row.established_count, 1, "{row:#?}");
    });
}

#[test]
fn hosts_of_a_listen_range_become_peers_and_others_do_not() {
    if missing("hosts_of_a_listen_range_become_peers_and_others_do_not", &["bird", "birdc"]) {
        return;
    }
    let mut lab = Lab::new();
    lab.bird(&ibgp(NODE, "10.0.0.1", "password \"range\"; connect delay time 1; connect retry time 1;"));
    lab.edge.block_on(|| async {
        let mut template = with_password("10.0.0.0", password_file(&lab, "md5", "range"));
        (template.passive, template.group) = (true, Some("nodes".to_owned()));
        let mut bgp = config([]);
        bgp.ranges = vec![PeerRange { network: "10.0.0.2/31".parse().unwrap(), template }];
        let mut edge = Edge::start(bgp.clone()).await;
        edge.until("the route", |edge| edge.hops("10.1.2.0/26") == [NODE]).await;
        let row = edge.row(NODE).await;
        assert!(row.dynamic && row.group.as_deref() == Some("nodes"), "{row:#?}");
        edge.handle.reload(bgp.clone()).await.unwrap();
        assert_eq!(edge.row(NODE).await.established_count, 1, "the same configuration again");
        bgp.ranges[0].network = "10.0.0.4/31".parse().unwrap();
        edge.handle.reload(bgp).await.unwrap();
        edge.until("no route", |edge| edge.routes.is_empty()).await;
        assert!(edge.handle.summary().await.is_empty());
        says("BIRD", "Received: Peer de-configured", || lab.birdc("show protocols all edge")).await;
    });
}

#[test]
fn a_session_on_port_32179_between_given_addresses_comes_up_whoever_listens() {
    if missing("a_session_on_port_32179_between_given_addresses_comes_up_whoever_listens", &["bird", "birdc"]) {
        return;
    }
    for node_dials in [true, false] {
        let mut lab = Lab::new();
        lab.edge.ip("addr add 10.0.0.9/32 dev lo");
        lab.node.ip("route add 10.0.0.9/32 via 10.0.0.1");
        let passive = if node_dials { "off" } else { "on" };
        let options = format!("multihop; passive {passive}; connect delay time 1; connect retry time 1;");
        let bird = ibgp(NODE, "10.0.0.9", &options).replace("local 10.0.0.2 as", "local 10.0.0.2 port 32179 as");
        lab.bird(&bird.replace("neighbor 10.0.0.9 as", "neighbor 10.0.0.9 port 32179 as"));
        lab.edge.block_on(|| async {
            let mut one = peer(NODE, 64512);
            (one.port, one.passive) = (32179, node_dials);
            one.local_address = Some("10.0.0.9".parse().unwrap());
            let mut bgp = config([one]);
            bgp.listen_port = Some(32179);
            let mut edge = Edge::start(bgp).await;
            let row = edge.row_until(NODE, "the session", established).await;
            assert!(row.local.unwrap().starts_with("10.0.0.9:"));
        });
    }
}

#[test]
fn a_local_address_that_comes_later_is_waited_for_and_named() {
    if missing("a_local_address_that_comes_later_is_waited_for_and_named", &["bird", "birdc"]) {
        return;
    }
    let mut lab = Lab::new();
    lab.bird(&ibgp(NODE, "10.0.0.77", "passive on;"));
    lab.edge.block_on(|| async {
        let mut one = peer(NODE, 64512);
        one.local_address = Some("10.0.0.77".parse().unwrap());
        one.session.connect_retry = Duration::from_secs(1);
        let mut edge = Edge::start(config([one])).await;
        edge.row_until(NODE, "the complaint", complains("local address 10.0.0.77")).await;
        lab.edge.ip("addr add 10.0.0.77/24 dev eth0");
        edge.row_until(NODE, "the session", established).await;
    });
}

#[test]
fn ttl_security_lets_neighbours_in_and_keeps_far_ones_out() {
    if missing("ttl_security_lets_neighbours_in_and_keeps_far_ones_out", &["bird", "birdc"]) {
        return;
    }
    for (node, edge) in [(NODE, "10.0.0.1"), (NODE6, "fd00::1")] {
        let mut lab = Lab::new();
        let external = ibgp(node, edge, "ttl security on; connect delay time 1; connect retry time 1;")
            .replace(&format!("{node} as 64512"), &format!("{node} as 64513"));
        lab.bird(&external);
        let namespace = lab.edge.clone();
        namespace.block_on(|| async {
            let mut near = peer(node, 64513);
            near.session.ttl_security = Some(1);
            let mut edge = Edge::start(config([near.clone()])).await;
            edge.row_until(node, "the session", established).await;
            edge.handle.shutdown().await;
            // The same peer from further away, as its packets say: they begin at 254.
            lab.kill();
            lab.bird(&external.replace("ttl security on;", "multihop 254; passive on;"));
            let mut edge = Edge::start(config([near.clone()])).await;
            let netstat = || {
                let output = lab.edge.command("cat").arg("/proc/net/netstat").output().unwrap();
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:")).map(str::split_whitespace);
                let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
                let dropped = names.zip(values).find(|(name, _)| *name == "TCPMinTTLDrop").map(|(_, value)| value);
                if dropped.is_none_or(|value| value == "0") { "none".to_owned() } else { "dropped".to_owned() }
            };
            says("our kernel", "dropped", netstat).await;
            let row = edge.row(node).await;
            assert_eq!((row.established_count, row.messages.get("open_received")), (0, None), "{row:#?}");
            near.session.ttl_security = Some(2);
            edge.handle.reload(config([near])).await.unwrap();
            edge.row_until(node, "the session from further away", established).await;
            assert_eq!(edge.row(node).await.established_count, 1);
        });
    }
}

#[test]
fn a_role_that_does_not_pair_is_told_to_both_sides() {
    if missing("a_role_that_does_not_pair_is_told_to_both_sides", &["bgpd", "vtysh"]) {
        return;
    }
    let mut lab = Lab::new();
    lab.bgpd(
        "router bgp 64513\n bgp router-id 10.0.0.2\n no bgp ebgp-requires-policy\n neighbor 10.0.0.1 remote-as 64512\n \
         neighbor 10.0.0.1 timers connect 1\n neighbor 10.0.0.1 local-role provider\nexit",
    );
    if lab.vtysh("show running-config").contains("local-role") {
        lab.edge.block_on(|| async {
            let mut external = peer(NODE, 64513);
            external.session.role = Some(Role::Provider);
            let mut bgp = config([external]);
            let mut edge = Edge::start(bgp.clone()).await;
            let row = edge.row_until(NODE, "the mismatch", complains("Role Mismatch (2/11)")).await;
            assert_eq!(row.established_count, 0);
            bgp.peers.values_mut().for_each(|peer| peer.session.role = Some(Role::Customer));
            edge.handle.reload(bgp).await.unwrap();
            let row = edge.row_until(NODE, "the session", established).await;
            assert!(row.capabilities_received.contains(&"role provider".to_owned()), "{row:#?}");
        });
    } else {
        println!("SKIPPED a_role_that_does_not_pair_is_told_to_both_sides: this FRR knows no roles");
    }
}

#[test]
fn what_only_customers_may_have_is_marked_and_a_leak_is_refused_with_its_reason() {
    if missing("what_only_customers_may_have_is_marked_and_a_leak_is_refused_with_its_reason", &["bird", "birdc"]) {
        return;
    }
    let mut lab = Lab::new();
    // A customer by capability; one that tells no role and leaks what only customers of AS 65001 may have.
    let node = |name: &str, address: &str, asn: u32, role: &str, export: &str| {
        format!(
            "protocol bgp {name} {{ local {address} as {asn}; neighbor 10.0.0.1 as 64512; strict bind yes; {role} \
             connect delay time 1; connect retry time 1; error wait time 1, 1; \
             ipv4 {{ import all; export filter {{ {export} }}; }}; }}\n"
        )
    };
    let leak = "if source != RTS_STATIC then reject; if net = 10.1.3.0/26 then bgp_otc = 65001; accept;";
    // Two BIRDs: one has a single session at a time with one address.
    lab.bird(&node("below", NODE, 64513, "local role customer;", "reject;"));
    let pods = "router id 10.0.0.3;\nprotocol device {}\n\
                protocol static pods { ipv4; route 10.1.2.0/26 blackhole; route 10.1.3.0/26 blackhole; }\n";
    lab.bird_named("leaker", &(pods.to_owned() + &node("leaker", "10.0.0.3", 64514, "", leak)), &[]);
    lab.edge.block_on(|| async {
        let with_role = |address: &str, asn: u32| {
            let mut external = peer(address, asn);
            external.session.role = Some(Role::Provider);
            external.import = Some(vec![rule("10.1.0.0/16", 16, 32)]);
            external.export = Some(vec![rule("10.9.0.0/16", 16, 32)]);
            external
        };
        let mut edge = Edge::start(config([with_role(NODE, 64513), with_role("10.0.0.3", 64514)])).await;
        edge.until("the sound route", |edge| edge.hops("10.1.2.0/26") == ["10.0.0.3"]).await;
        let leaked = |row: &BgpPeerRow| row.pfx_received == 2;
        edge.row_until("10.0.0.3", "both routes", leaked).await;
        let received = edge.handle.received("10.0.0.3".parse().unwrap()).await;
        let refused = received.iter().find(|row| row.network == "10.1.3.0/26").unwrap();
        let reason = "a route leak: only customers of AS 65001 may have it (RFC 9234 5)";
        assert_eq!(refused.reason.as_deref(), Some(reason), "{received:#?}");
        edge.handle.announce("10.9.0.1/32".parse().unwrap(), PathAttributes::default()).await;
        says("the customer", "10.9.0.1/32", || lab.birdc("show route protocol below")).await;
        // A customer would add the mark itself; who has no role shows what we have sent.
        let without_role = || lab.birdc_named("leaker", "show route all 10.9.0.1/32");
        says("the one without a role", "BGP.otc: 64512", without_role).await;
    });
}

#[test]
fn a_shutdown_message_is_read_by_the_other_side_both_ways_and_lasts_until_enabled() {
    if missing("a_shutdown_message_is_read_by_the_other_side_both_ways_and_lasts_until_enabled", &["bird", "birdc"]) {
        return;
    }
    let mut lab = Lab::new();
    lab.bird(&ibgp(NODE, "10.0.0.1", "connect delay time 1; connect retry time 1; error wait time 1, 1;"));
    lab.edge.block_on(|| async {
        let mut edge = Edge::start(config([peer(NODE, 64512)])).await;
        edge.row_until(NODE, "the session", established).await;
        edge.handle.order(order(NODE, Order::Shutdown("new line card, back at 10:00".to_owned()))).await.unwrap();
        says("BIRD", "new line card, back at 10:00", || lab.birdc("show protocols all edge")).await;
        let row = edge.row(NODE).await;
        assert_eq!(row.shutdown.as_deref(), Some("new line card, back at 10:00"));
        assert!(row.error_sent.unwrap().text.contains("Administrative Shutdown (6/2): \"new line card"));
        // BIRD dials every second; it is told each time.
        says("BIRD", "Connection rejected", || lab.birdc("show protocols all edge")).await;
        assert_eq!(edge.row(NODE).await.established_count, 1);
        edge.handle.order(order(NODE, Order::Enable)).await.unwrap();
        edge.row_until(NODE, "the session again", established).await;

        lab.birdc("disable edge \"moving_racks\"");
        let row =
            edge.row_until(NODE, "their message", complains("Administrative Shutdown (6/2): \"moving_racks\"")).await;
        assert!(row.error_received.unwrap().text.contains("moving_racks"));
        assert!(row.flaps.iter().any(|flap| !flap.up && flap.reason.contains("moving_racks")), "{:?}", row.flaps);
    });
}

#[test]
fn clear_ends_the_session_and_soft_asks_and_tells_again() {
    if missing("clear_ends_the_session_and_soft_asks_and_tells_again", &["bird", "birdc"]) {
        return;
    }
    let mut lab = Lab::new();
    lab.bird(&ibgp(NODE, "10.0.0.1", "connect delay time 1; error wait time 1, 1;"));
    lab.edge.block_on(|| async {
        let mut bgp = config([peer(NODE, 64512)]);
        bgp.networks = vec!["10.9.0.0/24".parse().unwrap()];
        let mut edge = Edge::start(bgp).await;
        edge.converged().await;
        let before = edge.row(NODE).await;
        assert!(before.capabilities.contains(&"enhanced-route-refresh".to_owned()), "{before:#?}");
        edge.handle.order(order(NODE, Order::Refresh)).await.unwrap();
        // BIRD marks begin and end of what it tells anew; nothing flaps.
        let marked = |row: &BgpPeerRow| row.messages.get("route_refresh_received").is_some_and(|count| *count >= 4);
        let row = edge.row_until(NODE, "marks for both families", marked).await;
        assert_eq!((row.established_count, row.pfx_rcd, row.pfx_stale), (1, before.pfx_rcd, 0), "{row:#?}");
        assert!(row.messages["update_sent"] > before.messages["update_sent"]);
        says("BIRD", "10.9.0.0/24", || lab.birdc("show route protocol edge")).await;

        edge.handle.order(PeerOrder { peer: None, what: Order::Clear }).await.unwrap();
        let row = edge.row_until(NODE, "a second session", |row| row.established_count == 2).await;
        assert!(row.last_reset.unwrap().contains("Administrative Reset (6/4)"));
        let unknown = edge.handle.order(order("10.0.0.99", Order::Clear)).await.unwrap_err();
        assert!(unknown.to_string().contains("10.0.0.99"));
    });
}

#[test]
fn everything_about_a_session_can_be_seen() {
    if missing("everything_about_a_session_can_be_seen", &["bgpd", "vtysh"]) {
        return;
    }
    let mut lab = Lab::new();
    lab.bgpd(
        "router bgp 64512\n bgp router-id 10.0.0.2\n neighbor 10.0.0.1 remote-as 64512\n \
         neighbor 10.0.0.1 timers connect 1\n neighbor 10.0.0.1 capability dynamic\nexit",
    );
    lab.edge.block_on(|| async {
        let mut edge = Edge::start(config([peer(NODE, 64512)])).await;
        edge.until("up", |edge| edge.seen.iter().any(|event| matches!(event, BgpEvent::PeerUp { .. }))).await;
        let row = edge.row(NODE).await;
        assert_eq!(row.hostname.as_deref(), Some("frr-node"));
        for (list, name) in [
            (&row.capabilities_sent, "graceful-restart 120 s ipv4-unicast ipv6-unicast"),
            (&row.capabilities_sent, "4-octet-as 64512"),
            (&row.capabilities_received, "extended-message"),
            (&row.capabilities_received, "dynamic"),
            (&row.capabilities_received, "fqdn frr-node"),
            (&row.capabilities, "extended-message"),
            (&row.capabilities, "graceful-restart"),
        ] {
            assert!(list.iter().any(|shown| shown == name), "{name} in {list:?}");
        }
        assert!(row.hold_left.is_some_and(|left| left <= 90) && row.keepalive_left.is_some_and(|left| left <= 30));
        let messages = edge.handle.messages(NODE.parse::<IpAddr>().unwrap()).await;
        let kinds: Vec<(bool, &str)> = messages.iter().map(|message| (message.sent, message.kind.as_str())).collect();
        for expected in [(true, "OPEN"), (false, "OPEN"), (true, "KEEPALIVE"), (false, "KEEPALIVE")] {
            assert!(kinds.contains(&expected), "{expected:?} in {kinds:?}");
        }
        // FRR 8.4 shows our host name where it has taken the FQDN capability.
        says("FRR", "advHostName", || lab.vtysh("show bgp neighbors 10.0.0.1 json")).await;
    });
}

#[test]
fn ipv4_prefixes_travel_both_ways_on_an_ipv6_session_with_extended_next_hops() {
    if missing("ipv4_prefixes_travel_both_ways_on_an_ipv6_session_with_extended_next_hops", &["bird", "birdc"]) {
        return;
    }
    let mut lab = Lab::new();
    let protocol = ibgp(NODE6, "fd00::1", "connect delay time 1; connect retry time 1;");
    lab.bird(&protocol.replace("ipv4 { import all;", "ipv4 { extended next hop on; import all;"));
    lab.edge.block_on(|| async {
        let mut one = peer(NODE6, 64512);
        one.session.extended_next_hop = true;
        let mut bgp = config([one]);
        bgp.networks = vec!["10.9.0.0/24".parse().unwrap()];
        let mut edge = Edge::start(bgp).await;
        edge.until("the route", |edge| !edge.hops("10.1.2.0/26").is_empty()).await;
        assert_eq!(edge.hops("10.1.2.0/26"), [NODE6]);
        let row = edge.row(NODE6).await;
        assert!(row.capabilities.contains(&"extended-next-hop".to_owned()), "{row:#?}");
        says("BIRD", "BGP.next_hop: fd00::1", || lab.birdc("show route all 10.9.0.0/24")).await;
        lab.birdc("disable pods4");
        edge.until("the withdrawal", |edge| edge.hops("10.1.2.0/26").is_empty()).await;
    });
}

/// How often both sides open at once: 1,000 times with `cargo xtask test --full`.
fn openings() -> u64 {
    if full() { 1000 } else { 50 }
}

#[test]
fn two_sides_that_open_at_once_again_and_again_always_end_with_exactly_one_session() {
    let lab = Lab::new();
    let speaker = |address: &'static str, other: &'static str| {
        let mut bgp = config([peer(other, 64512)]);
        bgp.router_id = address.parse().unwrap();
        bgp
    };
    let (count, barrier) = (openings(), tokio::sync::Barrier::new(2));
    println!("{count} openings (1000 with --full)");
    let connections = |namespace: &common::Namespace| {
        let output = namespace.command("ss").args(["-Htn", "state", "established"]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).lines().filter(|line| line.contains(":179")).count()
    };
    let run = |namespace: &common::Namespace, own: &'static str, other: &'static str| {
        namespace.block_on(|| async {
            let mut edge = Edge::start(speaker(own, other)).await;
            for opening in 1..=count {
                edge.row_until(other, "a session", established).await;
                // Both are up: neither side opens again while the other still looks.
                barrier.wait().await;
                if opening % 10 == 0 {
                    says("connections", "1 of them", || format!("{} of them", connections(namespace))).await;
                }
                let row = edge.row(other).await;
                assert!(row.established_count >= opening && established(&row), "{row:#?}");
                barrier.wait().await;
                edge.handle.order(PeerOrder { peer: None, what: Order::Clear }).await.unwrap();
            }
        });
    };
    std::thread::scope(|scope| {
        scope.spawn(|| run(&lab.edge, "10.0.0.1", NODE));
        scope.spawn(|| run(&lab.node, NODE, "10.0.0.1"));
    });
}
