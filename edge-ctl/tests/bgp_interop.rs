//! Meshes, restarts, flaps, reflectors: what happens around real BIRDs; and sessions with OpenBGPD and ExaBGP.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first broken assumption")]

mod common;

use std::time::{Duration, Instant};

use common::{
    bgp::{Edge, Lab, NODE, PATIENCE, config, peer, rule, says},
    eventually,
    speakers::{Bird, ExaBgp, OpenBgpd, full, ibgp, missing},
};
use edge_ctl::{
    bgp::{self, BgpEvent},
    config::valid,
    model::{
        PathAttributes,
        bgp_session::{GracefulRestart, Order, PeerOrder, Role},
        view::BgpPeerRow,
    },
};
use tokio::sync::mpsc;

fn established(row: &BgpPeerRow) -> bool {
    row.state == "Established"
}

/// Addresses of one family in the lab, and what a node and the edge announce.
#[derive(Clone, Copy)]
struct Family {
    name: &'static str,
    network: &'static str,
    vip: &'static str,
}

const IPV4: Family = Family { name: "ipv4", network: "10.0.0.", vip: "10.9.0.1/32" };
const IPV6: Family = Family { name: "ipv6", network: "fd00::", vip: "fd09::1/128" };

impl Family {
    fn host(self, number: usize) -> String {
        format!("{}{number}", self.network)
    }

    /// What Calico gives a node: a /26, or a /122.
    fn block(self, number: usize) -> String {
        if self.name == "ipv4" { format!("10.1.{number}.0/26") } else { format!("fd01::{number}:0/122") }
    }

    fn all(self) -> &'static str {
        if self.name == "ipv4" { "10.1.0.0/16" } else { "fd01::/16" }
    }
}

/// A lab whose node has the addresses of `hosts`.
fn lab(hosts: &[usize]) -> Lab {
    let lab = Lab::new();
    for host in hosts.iter().filter(|host| **host > 3) {
        lab.node.ip(&format!("addr add 10.0.0.{host}/24 dev eth0"));
        lab.node.ip(&format!("addr add fd00::{host}/64 dev eth0 nodad"));
    }
    lab
}

/// The BIRD of host `own` in a full mesh with the other hosts and the edge, as Calico configures it.
fn mesh_member(family: Family, own: usize, hosts: &[usize]) -> String {
    let (name, address, block) = (family.name, family.host(own), family.block(own));
    let mut text = format!(
        "router id 10.0.0.{own};\nprotocol device {{}}\nprotocol static pods {{ {name}; route {block} blackhole; }}\n\
         template bgp node {{ local {address} as 64512; strict bind yes; graceful restart on; \
         connect delay time 1; connect retry time 1; error wait time 1, 2; \
         {name} {{ import all; export where source = RTS_STATIC; next hop self; add paths on; }}; }}\n"
    );
    for other in hosts.iter().filter(|other| **other != own) {
        // Calico lets the lower address connect.
        let passive = if *other < own { "passive on;" } else { "" };
        text += &format!(
            "protocol bgp mesh_{other} from node {{ neighbor {} as 64512; {passive} }}\n",
            family.host(*other)
        );
    }
    text + &format!("protocol bgp edge from node {{ neighbor {} as 64512; }}\n", family.host(1))
}

fn start_mesh(lab: &mut Lab, family: Family, hosts: &[usize], arguments: &[&str]) {
    for host in hosts {
        lab.bird_named(&format!("node{host}"), &mesh_member(family, *host, hosts), arguments);
    }
}

/// The edge's side of a mesh, which lets everything in and out that it may.
fn mesh_config(family: Family, hosts: &[usize]) -> valid::Bgp {
    let list = || {
        let length = if family.name == "ipv4" { 32 } else { 128 };
        let vips = family.vip.parse::<ipnet::IpNet>().unwrap();
        Some(vec![
            rule(family.all(), 16, length),
            valid::PrefixRule { prefix: vips, min_length: length, max_length: length }.into(),
        ])
    };
    let member = |host: &usize| valid::Peer { import: list(), export: list(), ..peer(&family.host(*host), 64512) };
    config(hosts.iter().map(member))
}

/// Prefixes that a BIRD has from the edge.
fn from_edge(lab: &Lab, host: usize) -> Vec<String> {
    let shown = lab.birdc_named(&format!("node{host}"), "show route protocol edge");
    shown
        .lines()
        .filter(|line| line.contains("[edge "))
        .filter_map(|line| line.split(' ').next())
        .map(str::to_owned)
        .collect()
}

fn a_mesh_of_three_birds(family: Family) {
    let hosts = [2, 3, 4];
    let mut lab = lab(&hosts);
    start_mesh(&mut lab, family, &hosts, &[]);
    lab.edge.block_on(|| async {
        // Transit on: not even then does anything go from one internal peer to another.
        let bgp = valid::Bgp { transit: true, ..mesh_config(family, &hosts) };
        let mut edge = Edge::start(bgp).await;
        edge.handle.announce(family.vip.parse().unwrap(), PathAttributes::default()).await;
        for host in hosts {
            edge.until("every block", |edge| edge.hops(&family.block(host)) == [family.host(host)]).await;
        }
        for host in hosts {
            says("BIRD", family.vip, || from_edge(&lab, host).join(" ")).await;
            let row = edge.row(&family.host(host)).await;
            assert_eq!((row.pfx_rcd, row.pfx_snt, row.established_count), (1, 1, 1), "{row:#?}");
            let advertised = edge.handle.advertised(family.host(host).parse().unwrap()).await;
            let told = advertised.iter().filter(|row| row.reason.is_none()).map(|row| row.network.as_str());
            assert_eq!(told.collect::<Vec<_>>(), [family.vip]);
            let withheld = |why: &str| {
                let told = |reason: &Option<String>| reason.as_ref().is_some_and(|reason| reason.contains(why));
                advertised.iter().filter(|row| told(&row.reason)).count()
            };
            assert_eq!(
                (withheld("never announced by iBGP"), withheld("learnt from this peer")),
                (2, 1),
                "{advertised:#?}"
            );
        }
        // All three agree, once more, after everything that was said has been read.
        edge.handle.withdraw(family.vip.parse().unwrap()).await;
        for host in hosts {
            says("BIRD", "nothing", || format!("nothing{}", from_edge(&lab, host).join(" "))).await;
            eventually("nothing is left", PATIENCE, || match from_edge(&lab, host) {
                left if left.is_empty() => Ok(()),
                left => Err(format!("{left:?}")),
            });
        }
    });
}

#[test]
fn three_birds_in_a_mesh_are_learnt_and_nothing_passes_from_one_to_another_over_ipv4() {
    if !missing("three_birds_in_a_mesh_are_learnt_and_nothing_passes_from_one_to_another_over_ipv4", &["bird", "birdc"])
    {
        a_mesh_of_three_birds(IPV4);
    }
}

#[test]
fn three_birds_in_a_mesh_are_learnt_and_nothing_passes_from_one_to_another_over_ipv6() {
    if !missing("three_birds_in_a_mesh_are_learnt_and_nothing_passes_from_one_to_another_over_ipv6", &["bird", "birdc"])
    {
        a_mesh_of_three_birds(IPV6);
    }
}

#[test]
fn doubled_peerings_from_one_address_end_with_one_session_that_the_other_never_disturbs() {
    if missing(
        "doubled_peerings_from_one_address_end_with_one_session_that_the_other_never_disturbs",
        &["bird", "birdc"],
    ) {
        return;
    }
    let mut lab = Lab::new();
    // A global BGPPeer on top of the node mesh: the same addresses twice, in both families. BIRD itself lets the second
    // wait until the first is down; ExaBGP, from the same address, does not, as another program on the node would not.
    let mut protocols = String::new();
    for (node, edge, family) in [(NODE, "10.0.0.1", "four"), ("fd00::2", "fd00::1", "six")] {
        let options = "graceful restart on; connect delay time 1; connect retry time 1; error wait time 1, 1;";
        for name in ["mesh", "global"] {
            protocols += &ibgp(node, edge, options).replace("bgp edge", &format!("bgp {name}_{family}"));
            protocols.push('\n');
        }
    }
    lab.bird(&protocols);
    let namespace = lab.edge.clone();
    namespace.block_on(|| async {
        let mut edge = Edge::start(config([peer(NODE, 64512), peer("fd00::2", 64512)])).await;
        let all = |edge: &Edge| !edge.hops("10.1.2.0/26").is_empty() && !edge.hops("fd01:2::/64").is_empty();
        edge.until("the routes", all).await;
        lab.exabgp(
            &exabgp("route 10.1.77.0/26 next-hop 10.0.0.2;")
                .replace("64513", "64512")
                .replace("graceful-restart 30;", ""),
        );
        let refused = |row: &BgpPeerRow| row.messages.get("notification_sent").is_some_and(|count| *count >= 3);
        let row = edge.row_until(NODE, "three refusals", refused).await;
        assert_eq!((row.state.as_str(), row.established_count), ("Established", 1), "{row:#?}");
        assert!(all(&edge) && edge.hops("10.1.77.0/26").is_empty());
        assert!(!edge.seen.iter().any(|event| matches!(event, BgpEvent::PeerDown { .. })), "{:?}", edge.seen);
        for (address, family) in [(NODE, "four"), ("fd00::2", "six")] {
            let up = |name: &str| lab.birdc(&format!("show protocols {name}_{family}")).contains("Established");
            assert!(up("mesh") != up("global"), "exactly one of the two is up");
            assert_eq!(edge.row(address).await.established_count, 1);
        }
    });
}

#[test]
fn five_birds_that_restart_while_we_are_away_wait_for_no_end_of_rib_of_ours() {
    if missing("five_birds_that_restart_while_we_are_away_wait_for_no_end_of_rib_of_ours", &["bird", "birdc"]) {
        return;
    }
    let hosts = [2, 3, 4, 5, 6];
    let mut lab = lab(&hosts);
    start_mesh(&mut lab, IPV4, &hosts, &[]);
    let bgp = || {
        let mut bgp = mesh_config(IPV4, &hosts);
        let settings = GracefulRestart { time: Duration::from_secs(120), ..GracefulRestart::default() };
        bgp.peers.values_mut().for_each(|peer| peer.session.graceful_restart = Some(settings));
        bgp
    };
    let namespace = lab.edge.clone();
    namespace.block_on(|| async {
        let mut edge = Edge::start(bgp()).await;
        for host in hosts {
            edge.until("every block", |edge| edge.hops(&IPV4.block(host)) == [IPV4.host(host)]).await;
        }
    });
    // The runtime of the first life is gone, and its connections with it: no goodbye was said.
    lab.kill();
    start_mesh(&mut lab, IPV4, &hosts, &["-R"]);
    let recovering = |host: usize| {
        lab.birdc_named(&format!("node{host}"), "show status").contains("Graceful restart recovery in progress")
    };
    assert!(hosts.iter().all(|host| recovering(*host)), "BIRD waits for its neighbours, and we are away");
    namespace.block_on(|| async {
        let (events, mut inbox) = mpsc::channel(64);
        let handle = bgp::Speaker::bind(bgp(), events).unwrap().restarting().start();
        let drain = tokio::spawn(async move { while inbox.recv().await.is_some() {} });
        // Until `restarted` is told, our End-of-RIB is held back from every one of them.
        let all_done = || if hosts.iter().any(|host| recovering(*host)) { "some wait" } else { "all done" }.to_owned();
        says("the five", "all done", all_done).await;
        let rows = handle.summary().await;
        assert!(rows.iter().all(established), "{rows:#?}");
        let sent: u64 = rows.iter().filter_map(|row| row.messages.get("update_sent")).sum();
        assert_eq!(sent, 0, "no End-of-RIB yet: {rows:#?}");
        handle.restarted().await;
        let rows = handle.summary().await;
        assert!(rows.iter().all(|row| row.messages["update_sent"] >= 1), "{rows:#?}");
        drain.abort();
    });
}

#[test]
fn after_a_hundred_flaps_of_the_link_there_is_one_session_with_all_routes() {
    if missing("after_a_hundred_flaps_of_the_link_there_is_one_session_with_all_routes", &["bird", "birdc"]) {
        return;
    }
    let mut lab = Lab::new();
    lab.bird(&ibgp(NODE, "10.0.0.1", "hold time 3; connect delay time 1; connect retry time 1; error wait time 1, 1;"));
    let flaps = if full() { 100 } else { 20 };
    println!("{flaps} flaps (100 with --full)");
    lab.edge.block_on(|| async {
        let mut edge = Edge::start(config([peer(NODE, 64512)])).await;
        edge.until("the routes", |edge| edge.hops("10.1.2.0/26") == [NODE]).await;
        let stop = Instant::now();
        for flap in 0..flaps {
            // Some shorter than any timer, some as long as the hold time allows to go unnoticed, one longer.
            let down = [20, 60, 150, 400][flap % 4] + if flap == flaps / 2 { 4000 } else { 0 };
            lab.node.ip("link set eth0 down");
            tokio::time::sleep(Duration::from_millis(down)).await;
            lab.node.ip("link set eth0 up");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        println!("the flaps took {:?}", stop.elapsed());
        let row = edge.row_until(NODE, "the session", |row| established(row) && row.pfx_rcd == 2).await;
        assert!(row.established_count >= 2, "the long one ended the first session: {row:#?}");
        edge.until("the routes", |edge| edge.hops("10.1.2.0/26") == [NODE] && edge.hops("10.1.3.0/26") == [NODE]).await;
        let connections = || {
            let output = lab.edge.command("ss").args(["-Htn", "state", "established"]).output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            format!("{} of them", text.lines().filter(|line| line.contains(":179")).count())
        };
        says("connections", "1 of them", connections).await;
    });
}

#[test]
fn two_paths_come_through_a_route_reflector_and_share_the_load() {
    if missing("two_paths_come_through_a_route_reflector_and_share_the_load", &["bird", "birdc"]) {
        return;
    }
    let mut lab = lab(&[2, 3, 4]);
    let common = "strict bind yes; connect delay time 1; connect retry time 1; error wait time 1, 1;";
    for host in [3, 4] {
        let body = format!(
            "router id 10.0.0.{host};\nprotocol device {{}}\nprotocol static pods {{ ipv4; route 10.1.7.0/26 blackhole; }}\n\
             protocol bgp reflector {{ local 10.0.0.{host} as 64512; neighbor {NODE} as 64512; {common} \
             ipv4 {{ import all; export where source = RTS_STATIC; next hop self; }}; }}\n"
        );
        lab.bird_named(&format!("client{host}"), &body, &[]);
    }
    let client = |name: &str, address: &str| {
        format!(
            "protocol bgp {name} {{ local {NODE} as 64512; neighbor {address} as 64512; {common} rr client; \
             ipv4 {{ import all; export all; add paths tx; }}; }}\n"
        )
    };
    let reflector = format!(
        "router id {NODE};\nprotocol device {{}}\nprotocol direct {{ ipv4; }}\n{}{}{}",
        client("three", "10.0.0.3"),
        client("four", "10.0.0.4"),
        client("edge", "10.0.0.1"),
    );
    lab.bird_named("reflector", &reflector, &[]);
    lab.edge.block_on(|| async {
        let mut node = peer(NODE, 64512);
        node.import = Some(vec![rule("10.1.0.0/16", 16, 32)]);
        node.intake.add_path = true;
        let mut edge = Edge::start(config([node])).await;
        edge.until("both paths", |edge| edge.hops("10.1.7.0/26") == ["10.0.0.3", "10.0.0.4"]).await;
        lab.birdc_named("client3", "disable pods");
        edge.until("the one that is left", |edge| edge.hops("10.1.7.0/26") == ["10.0.0.4"]).await;
        assert_eq!(edge.row(NODE).await.established_count, 1);
    });
}

#[test]
fn openbgpd_exchanges_both_families_refreshes_and_reads_why_we_leave() {
    if missing("openbgpd_exchanges_both_families_refreshes_and_reads_why_we_leave", &["bgpctl"]) {
        return;
    }
    let mut lab = Lab::new();
    lab.openbgpd(
        "AS 64513\nlisten on 10.0.0.2\nlisten on fd00::2\nnetwork 10.1.2.0/26 set { large-community 64513:1:2 metric 7 }\n\
         network fd01:2::/64\nneighbor 10.0.0.1 {\n remote-as 64512\n announce policy customer\n}\n\
         neighbor fd00::1 {\n remote-as 64512\n announce policy customer\n}\n\
         allow from any\nallow to any",
    );
    lab.edge.block_on(|| async {
        let external = |address: &str| {
            let mut external = peer(address, 64513);
            external.session.role = Some(Role::Provider);
            external.session.role_strict = true;
            external.import = Some(vec![rule("10.1.0.0/16", 16, 32), rule("fd01::/16", 16, 64)]);
            external.export = Some(vec![rule("10.9.0.0/16", 16, 32)]);
            external
        };
        let mut edge = Edge::start(config([external(NODE), external("fd00::2")])).await;
        edge.until("both", |edge| edge.hops("10.1.2.0/26") == [NODE] && edge.hops("fd01:2::/64") == ["fd00::2"]).await;
        let received = edge.handle.received(NODE.parse().unwrap()).await;
        let route = received.iter().find(|row| row.network == "10.1.2.0/26").unwrap();
        assert_eq!((route.path.as_str(), route.metric), ("64513 i", Some(7)));
        assert!(route.communities.contains(&"64513:1:2".to_owned()), "{route:#?}");

        let attributes =
            PathAttributes { communities: vec!["64512:100".parse().unwrap()], ..PathAttributes::default() };
        edge.handle.announce("10.9.0.1/32".parse().unwrap(), attributes).await;
        let show = || lab.bgpctl("show rib detail 10.9.0.1/32");
        says("OpenBGPD", "64512:100", show).await;
        assert!(show().contains("Nexthop 10.0.0.1"), "{}", show());
        lab.bgpctl("neighbor 10.0.0.1 refresh");
        edge.row_until(NODE, "the refresh", |row| row.messages.contains_key("route_refresh_received")).await;
        edge.handle.withdraw("10.9.0.1/32".parse().unwrap()).await;
        eventually("the withdrawal", PATIENCE, || if show().contains("Nexthop") { Err(show()) } else { Ok(()) });

        let leave = PeerOrder { peer: None, what: Order::Shutdown("moving_to_rack_7".to_owned()) };
        edge.handle.order(leave).await.unwrap();
        says("OpenBGPD", "moving_to_rack_7", || lab.bgpctl("show neighbor 10.0.0.1")).await;
        edge.handle.order(PeerOrder { peer: None, what: Order::Enable }).await.unwrap();
        edge.row_until(NODE, "the session again", established).await;
        lab.bgpctl("neighbor 10.0.0.1 down new_line_card");
        let told = |row: &BgpPeerRow| row.last_reset.as_ref().is_some_and(|why| why.contains("new_line_card"));
        edge.row_until(NODE, "their message", told).await;
    });
}

/// ExaBGP's side of an external session; `routes` stand in `static`.
fn exabgp(routes: &str) -> String {
    format!(
        "router-id {NODE};\nlocal-address {NODE};\nlocal-as 64513;\npeer-as 64512;\nhold-time 30;\n\
         family {{ ipv4 unicast; ipv6 unicast; }}\ncapability {{ asn4; route-refresh; graceful-restart 30; }}\n\
         static {{ {routes} }}"
    )
}

#[test]
fn exabgp_exchanges_routes_and_what_it_damages_is_withdrawn_without_a_reset() {
    if missing("exabgp_exchanges_routes_and_what_it_damages_is_withdrawn_without_a_reset", &["exabgp"]) {
        return;
    }
    let mut lab = Lab::new();
    // COMMUNITIES of three octets (RFC 7606 7.8), an AGGREGATOR of three (7.7), one nobody knows, and a sound route.
    lab.exabgp(&exabgp(
        "route 10.1.2.0/26 next-hop 10.0.0.2 community [ 64513:7 ] large-community [ 64513:1:2 ] med 5;\n\
         route 10.1.3.0/26 next-hop 10.0.0.2 attribute [ 0x08 0xc0 0x000001 ];\n\
         route 10.1.4.0/26 next-hop 10.0.0.2 attribute [ 0x07 0xc0 0x000001 ];\n\
         route 10.1.5.0/26 next-hop 10.0.0.2 attribute [ 0x99 0xc0 0x0102 ];\n\
         route fd01:2::/64 next-hop fd00::2;",
    ));
    lab.edge.block_on(|| async {
        let mut external = peer(NODE, 64513);
        external.import = Some(vec![rule("10.1.0.0/16", 16, 32), rule("fd01::/16", 16, 64)]);
        external.export = Some(vec![rule("10.9.0.0/16", 16, 32)]);
        let mut edge = Edge::start(config([external])).await;
        for (prefix, hop) in
            [("10.1.2.0/26", NODE), ("10.1.4.0/26", NODE), ("10.1.5.0/26", NODE), ("fd01:2::/64", "fd00::2")]
        {
            edge.until(prefix, |edge| edge.hops(prefix) == [hop]).await;
        }
        edge.converged().await;
        assert!(edge.hops("10.1.3.0/26").is_empty(), "its COMMUNITIES are malformed");
        let received = edge.handle.received(NODE.parse().unwrap()).await;
        let route = received.iter().find(|row| row.network == "10.1.2.0/26").unwrap();
        assert_eq!(route.metric, Some(5));
        for community in ["64513:7", "64513:1:2"] {
            assert!(route.communities.contains(&community.to_owned()), "{route:#?}");
        }
        let row = edge.row(NODE).await;
        assert_eq!((row.state.as_str(), row.established_count), ("Established", 1), "{row:#?}");
        let counted = |name: &str| row.messages.get(name).copied().unwrap_or_default();
        assert_eq!((counted("update_treat_as_withdraw"), counted("update_attribute_discard")), (1, 1), "{row:#?}");

        edge.handle.announce("10.9.0.1/32".parse().unwrap(), PathAttributes::default()).await;
        says("ExaBGP", "10.9.0.1/32", || lab.exabgp_log()).await;
        edge.handle.shutdown().await;
        // This ExaBGP stumbles over its own code where a shutdown has a text.
        says("ExaBGP", "message of type NOTIFICATION", || lab.exabgp_log()).await;
    });
}
