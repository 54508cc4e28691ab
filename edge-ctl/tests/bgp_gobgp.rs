//! Sessions with a real GoBGP in a namespace of its own.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first broken assumption")]

mod common;

use common::{
    bgp::{Edge, Lab, NODE, config, peer, rule, says},
    speakers::{Gobgp, missing},
};
use edge_ctl::model::PathAttributes;

const CONFIG: &str = r#"
[global.config]
as = 4200000002
router-id = "10.0.0.2"
[[neighbors]]
[neighbors.config]
neighbor-address = "10.0.0.1"
peer-as = 64512
[neighbors.transport.config]
passive-mode = true
[neighbors.graceful-restart.config]
enabled = true
restart-time = 20
[[neighbors.afi-safis]]
[neighbors.afi-safis.config]
afi-safi-name = "ipv4-unicast"
[neighbors.afi-safis.mp-graceful-restart.config]
enabled = true
[[neighbors.afi-safis]]
[neighbors.afi-safis.config]
afi-safi-name = "ipv6-unicast"
"#;

#[test]
fn gobgp_with_graceful_restart_and_a_four_octet_as_exchanges_routes() {
    if missing("gobgp_with_graceful_restart_and_a_four_octet_as_exchanges_routes", &["gobgpd", "gobgp"]) {
        return;
    }
    let mut lab = Lab::new();
    lab.gobgpd(CONFIG);
    lab.gobgp("global rib add 10.1.2.0/26 community 64513:7 med 5");
    lab.gobgp("global rib add -a ipv6 fd01:2::/64 nexthop fd00::2");
    lab.edge.block_on(|| async {
        let mut external = peer(NODE, 4_200_000_002);
        external.import = Some(vec![rule("10.1.0.0/16", 16, 32), rule("fd01::/16", 16, 64)]);
        external.export = Some(vec![rule("10.9.0.0/16", 16, 32)]);
        let mut edge = Edge::start(config([external])).await;
        edge.converged().await;
        assert_eq!(edge.hops("10.1.2.0/26"), [NODE]);
        assert_eq!(edge.hops("fd01:2::/64"), ["fd00::2"]);
        let rows = edge.handle.received(NODE.parse().unwrap()).await;
        let row = rows.iter().find(|row| row.network == "10.1.2.0/26").unwrap();
        assert_eq!((row.path.as_str(), row.metric), ("4200000002 ?", Some(5)));
        assert_eq!(row.communities, ["64513:7"]);

        edge.handle.announce("10.9.0.1/32".parse().unwrap(), PathAttributes::default()).await;
        says("GoBGP", "10.9.0.1/32", || lab.gobgp("global rib")).await;
        edge.handle.withdraw("10.9.0.1/32".parse().unwrap()).await;
        let gone = || if lab.gobgp("global rib").contains("10.9.0.1/32") { "there" } else { "gone" }.to_owned();
        says("GoBGP", "gone", gone).await;
        lab.gobgp("global rib del 10.1.2.0/26");
        edge.until("the withdrawal", |edge| edge.hops("10.1.2.0/26").is_empty()).await;
    });
}
