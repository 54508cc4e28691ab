//! Graceful restart on both sides: the daemon killed and started again under the eyes of its neighbours, and a node's
//! speaker killed under the eyes of the daemon.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        edge::{dedicated_service, tor_peer, vip},
        exec::wait_for,
        topology::{DEDICATED_VIP, EDGE, NODES, ingress},
    },
    needs_namespaces,
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(30);

/// Whether every neighbour has the route to the VIP.
fn known_everywhere(lab: &Lab) -> Result<bool> {
    let network = format!("{DEDICATED_VIP}/32");
    for node in NODES {
        let text = lab.birdc(node.name, &["show", "route", &network]).unwrap_or_default();
        ensure!(text.contains(&network), "{} has no route to the VIP: {text}", node.name);
    }
    let text = lab.vtysh("router", &[&format!("show bgp ipv4 unicast {network} json")])?;
    let route: Value = serde_json::from_str(&text).context("read FRR's route")?;
    ensure!(
        route["paths"].as_array().is_some_and(|paths| !paths.is_empty()),
        "the router has no route to the VIP: {text}"
    );
    Ok(true)
}

fn peers(lab: &Lab) -> Result<Vec<Value>> {
    Ok(lab.edge_ctl(&["bgp", "peers"])?.as_array().cloned().unwrap_or_default())
}

#[test]
fn a_killed_daemon_that_starts_again_loses_no_route_at_its_neighbours_and_no_packet() -> Result<()> {
    needs_namespaces!("a_killed_daemon_that_starts_again_loses_no_route_at_its_neighbours_and_no_packet");
    let lab = Lab::up(Speaker::Bird, 1)?;
    lab.start_tor()?;
    let service = dedicated_service("front", 80, 80, "full-nat");
    let mut daemon = lab.start_edge(&[lab.edge_configuration("1s"), tor_peer(), service].concat())?;
    daemon.wait_ready(&lab, NODES.len() as u64 + 1, SOON)?;
    wait_for("everyone to know the VIP", SOON, || known_everywhere(&lab))?;
    let unchanged = |when: &str| -> Result<()> {
        known_everywhere(&lab).with_context(|| when.to_owned())?;
        lab.http("client2", (DEDICATED_VIP, 80).into(), 20).with_context(|| format!("a request {when}")).map(drop)
    };

    daemon.kill()?;
    for _ in 0..5 {
        unchanged("while the daemon is dead")?;
    }
    daemon.start(&lab)?;
    // Until every neighbour has heard the End-of-RIB of the new life.
    wait_for("the end of the restart", SOON, || {
        unchanged("while the daemon restarts")?;
        let rows = peers(&lab)?;
        let told = |row: &Value| {
            let kept = row["capabilities_sent"].as_array().is_some_and(|list| {
                list.iter().any(|shown| {
                    shown.as_str().is_some_and(|text| text.contains("(restarting) ipv4-unicast preserved"))
                })
            });
            row["state"] == "Established" && kept
        };
        ensure!(rows.len() == NODES.len() + 1 && rows.iter().all(told), "{rows:#?}");
        Ok(daemon.log().contains("BGP has converged"))
    })?;
    let restarts = || lab.birdc("kcontrol", &["show", "protocols", "all"]);
    wait_for("BIRD to end its help", SOON, || {
        unchanged("until the end of the restart")?;
        Ok(!restarts()?.contains("graceful restart active"))
    })?;
    unchanged("after the restart")?;
    daemon.stop()
}

#[test]
fn the_backends_of_a_node_whose_speaker_was_killed_stay_in_use_while_it_restarts() -> Result<()> {
    needs_namespaces!("the_backends_of_a_node_whose_speaker_was_killed_stay_in_use_while_it_restarts");
    let lab = Lab::up(Speaker::Bird, 3)?;
    let mut daemon = lab.start_ready_edge("1s")?;
    let routes = lab.bgp_routes()?;
    lab.kill_bgp("knode1")?;
    wait_for("the session to be lost and its routes to be stale", SOON, || {
        let rows = peers(&lab)?;
        let row = rows.iter().find(|row| row["desc"] == "knode1").context("no peer knode1")?;
        Ok(row["state"] != "Established" && row["pfx_stale"].as_u64() > Some(0))
    })?;
    let spread = lab.http("client", (EDGE, vip::HTTP).into(), 100).context("while the speaker is away")?;
    ensure!(spread.len() == 3 && spread.contains_key("ingress-2"), "{spread:?}");
    ensure!(lab.bgp_routes()? == routes, "the kernel's routes changed");
    let backends = lab.edge_ctl(&["backend", "list", "ingress-http"])?;
    let address = format!("{}:80", ingress(2).address);
    let state = |rows: &Value| {
        let rows = rows.as_array().cloned().unwrap_or_default();
        rows.into_iter().find(|row| row["backend"] == address.as_str()).map(|row| row["state"].clone())
    };
    ensure!(state(&backends) == Some("up".into()), "{backends}");
    lab.start_bgp("knode1")?;
    wait_for("the session to be back and nothing stale", SOON, || {
        let rows = peers(&lab)?;
        Ok(rows.iter().all(|row| row["state"] == "Established" && row["pfx_stale"] == 0))
    })?;
    let backends = lab.edge_ctl(&["backend", "list", "ingress-http"])?;
    ensure!(state(&backends) == Some("up".into()), "{backends}");
    daemon.stop()
}
