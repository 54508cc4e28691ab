//! Sessions with a real FRR bgpd in a namespace of its own.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first broken assumption")]

mod common;

use common::{
    bgp::{Edge, Lab, NODE, config, peer, rule, says},
    run,
    speakers::{Frr, missing},
};
use edge_ctl::model::{PathAttributes, view::BgpPeerRow};

const EXTERNAL: &str = "router bgp 64513
 bgp router-id 10.0.0.2
 no bgp ebgp-requires-policy
 no bgp network import-check
 neighbor 10.0.0.1 remote-as 64512
 neighbor 10.0.0.1 timers 3 9
 neighbor 10.0.0.1 timers connect 1
 address-family ipv4 unicast
  network 10.1.2.0/26
  network 10.1.3.0/26
 exit-address-family
 address-family ipv6 unicast
  neighbor 10.0.0.1 activate
 exit-address-family
exit";

#[test]
fn frr_with_its_capabilities_establishes_exchanges_and_refreshes() {
    if missing("frr_with_its_capabilities_establishes_exchanges_and_refreshes", &["vtysh"]) {
        return;
    }
    let mut lab = Lab::new();
    lab.bgpd(EXTERNAL);
    lab.edge.block_on(|| async {
        let mut external = peer(NODE, 64513);
        external.import = Some(vec![rule("10.1.0.0/16", 16, 32)]);
        external.export = Some(vec![rule("10.9.0.0/16", 16, 32)]);
        let mut edge = Edge::start(config([external])).await;
        edge.converged().await;
        assert_eq!(edge.hops("10.1.2.0/26"), [NODE]);
        let row = edge.row(NODE).await;
        assert_eq!((row.hold, row.keepalive), (9, 3), "the lesser of both hold times");
        assert!(row.capabilities.contains(&"4-octet-as".to_owned()), "{row:#?}");

        let communities = vec!["64512:100".parse().unwrap()];
        let attributes = PathAttributes { communities, med: Some(10), local_pref: Some(200), prepend: 0 };
        edge.handle.announce("10.9.0.1/32".parse().unwrap(), attributes).await;
        let show = || lab.vtysh("show bgp ipv4 unicast 10.9.0.1/32");
        says("FRR", "Community: 64512:100", show).await;
        assert!(show().contains("metric 10") && show().contains("10.0.0.1 from 10.0.0.1"), "{}", show());

        lab.vtysh("clear bgp ipv4 unicast 10.0.0.1 soft in");
        edge.row_until(NODE, "the refresh", |row| row.messages.contains_key("route_refresh_received")).await;
        edge.handle.withdraw("10.9.0.1/32".parse().unwrap()).await;
        says("FRR", "Network not in table", show).await;

        lab.vtysh("clear bgp 10.0.0.1");
        let reset = |row: &BgpPeerRow| row.established_count == 2;
        let row = edge.row_until(NODE, "a second session after the peer's reset", reset).await;
        assert!(row.last_reset.as_ref().is_some_and(|why| why.contains("received Cease")), "{row:#?}");
    });
}

#[test]
fn keepalives_hold_a_session_and_a_peer_that_hangs_loses_it_after_the_hold_time() {
    if missing("keepalives_hold_a_session_and_a_peer_that_hangs_loses_it_after_the_hold_time", &["vtysh"]) {
        return;
    }
    let mut lab = Lab::new();
    lab.bgpd(&EXTERNAL.replace("timers 3 9", "timers 1 3"));
    lab.edge.block_on(|| async {
        let mut edge = Edge::start(config([peer(NODE, 64513)])).await;
        let many = |row: &BgpPeerRow| row.messages.get("keepalive_sent").is_some_and(|sent| *sent >= 6);
        let row = edge.row_until(NODE, "six keepalives, two hold times", many).await;
        assert_eq!((row.state.as_str(), row.hold, row.established_count), ("Established", 3, 1), "{row:#?}");

        let bgpd = lab.daemons[0].0.id().to_string();
        run("kill", &["-STOP", &bgpd]);
        let lost = |row: &BgpPeerRow| row.last_reset.as_ref().is_some_and(|why| why.starts_with("hold timer expired"));
        edge.row_until(NODE, "the loss", lost).await;
        run("kill", &["-CONT", &bgpd]);
        edge.row_until(NODE, "the return", |row| row.established_count == 2).await;
    });
}
