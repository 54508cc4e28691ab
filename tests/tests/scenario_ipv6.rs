//! The main job in IPv6: AAAA records, routes from BGP sessions over IPv6, pods behind VIPs of both families at once.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        client::exchange_all,
        edge::{one, vip},
        exec::wait_for,
        ipv6::{ipv6, vip6},
        topology::{CLIENT2, EDGE, NODES},
    },
    needs_namespaces,
    skip::count,
};

#[test]
fn a_dual_stack_cluster_is_served_on_vips_of_both_families() -> Result<()> {
    needs_namespaces!("a_dual_stack_cluster_is_served_on_vips_of_both_families");
    let mut lab = Lab::up(Speaker::Bird, 3)?;
    lab.add_ipv6()?;
    let mut daemon = lab.start_edge(&lab.edge_configuration_ipv6("1s"))?;
    daemon.wait_ready(&lab, 2 * NODES.len() as u64, Duration::from_secs(30))?;
    let status = one(lab.edge_ctl(&["status"])?)?;
    ensure!(status["state"] == "ok", "{status}");
    routes_are_in_the_kernel(&lab)?;

    let requests = count("requests over IPv6", 300, 3000);
    for (port, host) in [(vip::HTTP, "client"), (vip::HTTP, "client2"), (vip::HTTP_DNAT, "client2")] {
        let spread = lab.http(host, vip6(port), requests).with_context(|| format!("{host} to port {port}"))?;
        ensure!(spread.len() == 3, "{host} to port {port}: {spread:?}");
    }
    let udp = lab.udp("client2", vip6(vip::UDP), requests)?;
    ensure!(udp.len() == 3, "UDP: {udp:?}");
    let seen = lab.seen_address("client2", vip6(vip::HTTP))?;
    ensure!(seen == ipv6(EDGE).to_string(), "full-nat: the pod saw {seen}");
    let seen = lab.seen_address("client2", vip6(vip::HTTP_DNAT))?;
    ensure!(seen == ipv6(CLIENT2).to_string(), "dnat: the pod saw {seen}");
    // The other family goes on beside it.
    ensure!(lab.http("client", (EDGE, vip::HTTP).into(), 60)?.len() == 3, "IPv4");

    // Two pods leave the service one after the other: what they have goes on, what is new goes to those that stay.
    let mut established = lab.open_many("client", vip6(vip::ECHO), 30)?;
    for replicas in [2, 1] {
        lab.scale(replicas)?;
        wait_for("new IPv6 connections to follow DNS", Duration::from_secs(5), || {
            Ok(lab.http("client", vip6(vip::HTTP), 30)?.len() == replicas)
        })?;
    }
    exchange_all(&mut established).context("connections from before")?;
    let flows = lab.edge_ctl(&["flow", "list"])?;
    let client = flows
        .as_array()
        .context("flow list is no array")?
        .iter()
        .filter(|row| row["client"].as_str().is_some_and(|client| client.starts_with('[')));
    ensure!(client.count() >= 30, "{flows}");
    daemon.stop()
}

fn routes_are_in_the_kernel(lab: &Lab) -> Result<()> {
    let wanted = NODES.map(|node| format!("fd00::a:1:{}:0/112 via {}", node.index, ipv6(node.address())));
    let found = lab.bgp_routes_v6()?;
    ensure!(found == wanted, "the kernel has {found:?}, expected {wanted:?}");
    Ok(())
}
