//! Peers without a configured address, found by router advertisements, against FRR's `neighbor eth0 interface`.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first broken assumption")]

mod common;

use std::path::Path;

use common::{
    bgp::{Edge, Lab, says},
    speakers::{Frr, missing},
};
use edge_ctl::{
    config,
    model::{PathAttributes, scope},
};

const VIP: &str = "10.9.0.1/32";

/// FRR's side, which knows the interface and nobody's address; `more`: further settings of the neighbour.
fn frr(more: &str) -> String {
    format!(
        "router bgp 64513\n bgp router-id 10.0.0.2\n no bgp ebgp-requires-policy\n no bgp network import-check\n \
         neighbor eth0 interface remote-as 64512\n neighbor eth0 timers connect 1\n {more}\n \
         address-family ipv4 unicast\n  network 10.1.2.0/26\n exit-address-family\n address-family ipv6 unicast\n  \
         neighbor eth0 activate\n  network fd01:2::/64\n exit-address-family\nexit"
    )
}

/// Our side, as in a file; `more`: further settings of the peer.
async fn edge(more: &str) -> Edge {
    let text = format!(
        "[edge]\ninterfaces = [\"eth0\"]\npod_networks = [\"10.1.0.0/16\", \"fd01::/16\"]\n\
         [bgp]\nasn = 64512\nrouter_id = \"10.0.0.1\"\n[[bgp.peer]]\ninterface = \"eth0\"\ndescription = \"tor\"\n\
         remote_asn = 64513\nimport = [\"10.1.0.0/16 le 32\", \"fd01::/16 le 64\"]\nexport = [\"10.9.0.0/16 le 32\"]\n{more}\n\
         [service.web]\nlisten = [\"10.9.0.1:80/tcp\"]\nbackends = {{ static = [\"10.1.2.4:80\"] }}\n"
    );
    let bgp = config::parse(&text, Path::new("edge.toml")).unwrap_or_else(|error| panic!("{error}")).bgp.unwrap();
    Edge::start(bgp).await
}

/// Both families both ways, by the neighbour's link-local address.
async fn exchanges(lab: &Lab, edge: &mut Edge, neighbour: &str) {
    let hop = scope::on(neighbour.parse().unwrap(), "eth0").to_string();
    for prefix in ["10.1.2.0/26", "fd01:2::/64"] {
        edge.until(prefix, |edge| edge.hops(prefix) == [hop.clone()]).await;
    }
    edge.handle.announce(VIP.parse().unwrap(), PathAttributes::default()).await;
    says("FRR", "fe80::1", || lab.vtysh(&format!("show bgp ipv4 unicast {VIP}"))).await;
    let rows = edge.handle.summary().await;
    let [row] = rows.as_slice() else { panic!("one link, one peer: {rows:#?}") };
    assert_eq!(row.neighbor, format!("{neighbour}%eth0"));
    assert_eq!((row.state.as_str(), row.desc.as_str(), row.dynamic, row.pfx_rcd), ("Established", "tor", true, 2));
}

#[test]
fn frr_finds_us_by_our_advertisements_and_dials() {
    if missing("frr_finds_us_by_our_advertisements_and_dials", &["vtysh"]) {
        return;
    }
    let mut lab = Lab::link_local();
    lab.edge.clone().block_on(|| async {
        // We wait: the session comes up only where FRR has learnt where we are.
        let mut edge = edge("passive = true").await;
        let rows = edge.handle.summary().await;
        let silent = rows[0].last_reset.clone().unwrap_or_default();
        assert_eq!((rows.len(), rows[0].neighbor.as_str(), rows[0].state.as_str()), (1, "eth0", "Idle"));
        assert_eq!(silent, "no router has advertised itself on eth0");
        lab.bgpd_with_zebra(&frr(""));
        exchanges(&lab, &mut edge, "fe80::2").await;
        let row = edge.row("fe80::2%eth0").await;
        let port = row.local.as_deref().and_then(|local| local.rsplit(':').next().map(str::to_owned));
        assert_eq!(port.as_deref(), Some("179"), "FRR has dialled: {row:#?}");
    });
}

#[test]
fn we_find_frr_by_its_advertisements_and_dial_and_who_comes_to_its_place_follows_it() {
    if missing("we_find_frr_by_its_advertisements_and_dial_and_who_comes_to_its_place_follows_it", &["vtysh"]) {
        return;
    }
    let mut lab = Lab::link_local();
    lab.edge.clone().block_on(|| async {
        lab.bgpd_with_zebra(&frr("neighbor eth0 passive"));
        let mut edge = edge("").await;
        exchanges(&lab, &mut edge, "fe80::2").await;
        let row = edge.row("fe80::2%eth0").await;
        assert!(row.remote.as_deref().is_some_and(|remote| remote.ends_with(":179")), "we have dialled: {row:#?}");
        // Another router at the same port of the switch.
        lab.daemons.clear();
        edge.until("the loss of its routes", |edge| edge.hops("10.1.2.0/26").is_empty()).await;
        lab.node.ip("addr del fe80::2/64 dev eth0");
        lab.node.ip("addr add fe80::3/64 dev eth0 nodad");
        lab.bgpd_with_zebra(&frr("neighbor eth0 passive"));
        exchanges(&lab, &mut edge, "fe80::3").await;
    });
}
