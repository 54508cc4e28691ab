//! A VIP of its own is announced while it can be served: seen by the nodes' BIRD and by an FRR top-of-rack router.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        edge::{EdgeDaemon, dedicated_service, tor_peer},
        exec::{run, wait_for},
        topology::{DEDICATED_VIP, EDGE, NODES},
    },
    needs_namespaces,
};

/// Within what the neighbours must know that the last backend has gone.
const NOTICED: Duration = Duration::from_secs(1);
/// FRR may sit on an eBGP advertisement or its own retry, DNS on its hold time of 10 s.
const EVENTUALLY: Duration = Duration::from_secs(20);

/// Nodes and the router, all told of the VIP.
const PEERS: u64 = NODES.len() as u64 + 1;

fn configuration(lab: &Lab) -> String {
    [
        lab.edge_configuration("1s"),
        tor_peer(),
        dedicated_service("front", 80, 80, "full-nat"),
        dedicated_service("front-dnat", 81, 80, "dnat"),
    ]
    .concat()
}

/// What a node's BIRD knows of the VIP; empty where nothing.
fn in_bird(lab: &Lab, node: &str) -> Result<String> {
    let text = lab.birdc(node, &["show", "route", &format!("{DEDICATED_VIP}/32"), "all"]);
    // birdc exits with 1 where there is no such network.
    Ok(text.ok().filter(|text| text.contains(&format!("{DEDICATED_VIP}/32"))).unwrap_or_default())
}

/// The paths that the router has to the VIP.
fn in_frr(lab: &Lab) -> Result<Vec<serde_json::Value>> {
    let text = lab.vtysh("router", &[&format!("show bgp ipv4 unicast {DEDICATED_VIP}/32 json")])?;
    let route: serde_json::Value = serde_json::from_str(&text).context("read FRR's route")?;
    Ok(route["paths"].as_array().cloned().unwrap_or_default())
}

fn known_everywhere(lab: &Lab) -> Result<bool> {
    for node in NODES {
        ensure!(!in_bird(lab, node.name)?.is_empty(), "{} has no route to the VIP", node.name);
    }
    ensure!(!in_frr(lab)?.is_empty(), "the router has no route to the VIP");
    Ok(true)
}

fn known_nowhere(lab: &Lab) -> Result<bool> {
    for node in NODES {
        ensure!(in_bird(lab, node.name)?.is_empty(), "{} still has a route to the VIP", node.name);
    }
    ensure!(in_frr(lab)?.is_empty(), "the router still has a route to the VIP");
    Ok(true)
}

fn attributes_are_as_configured(lab: &Lab) -> Result<()> {
    let edge = EDGE.to_string();
    for node in NODES {
        let text = in_bird(lab, node.name)?;
        let attribute = |name: &str| {
            text.lines().find_map(|line| line.trim().strip_prefix(&format!("BGP.{name}: "))).unwrap_or("-").trim()
        };
        let seen = ["origin", "as_path", "next_hop", "med", "local_pref", "community"].map(attribute);
        ensure!(seen == ["IGP", "-", &edge, "10", "200", "(64512,100) (64512,200)"], "{}: {text}", node.name);
    }
    let paths = in_frr(lab)?;
    let [path] = &paths[..] else { anyhow::bail!("the router has {paths:?}") };
    ensure!(path["aspath"]["string"] == "64512" && path["origin"] == "IGP", "{path}");
    ensure!(path["metric"] == 10 && path["community"]["string"] == "64512:100 64512:200", "{path}");
    // LOCAL_PREF does not leave an AS (RFC 4271 5.1.5).
    ensure!(path.get("locPrf").is_none_or(|value| value != 200), "{path}");
    ensure!(path["nexthops"][0]["ip"] == edge, "{path}");
    Ok(())
}

fn announced(lab: &Lab) -> Result<String> {
    let rows = lab.edge_ctl(&["service", "list"])?;
    let row = rows.as_array().and_then(|rows| rows.iter().find(|row| row["name"] == "front")).context("no front")?;
    Ok(row["announced"].as_str().unwrap_or_default().to_owned())
}

fn held_on_lo(lab: &Lab) -> Result<bool> {
    let mut command = lab.command("edge", "ip")?;
    Ok(run(command.args(["-4", "addr", "show", "dev", "lo"]))?.contains(&format!("{DEDICATED_VIP}/32")))
}

fn traffic_follows_the_route(lab: &Lab) -> Result<()> {
    let reached = lab.http("client2", (DEDICATED_VIP, 80).into(), 30).context("full-nat")?;
    ensure!(reached.len() == 1, "{reached:?}");
    lab.http("client2", (DEDICATED_VIP, 81).into(), 30).context("dnat")?;
    lab.ping("client2", DEDICATED_VIP).context("the kernel answers ping")?;
    let closed = lab.http("client2", (DEDICATED_VIP, 9999).into(), 1);
    let refused = closed.as_ref().is_err_and(|error| format!("{error:#}").contains("refused"));
    ensure!(refused, "a closed port of the VIP: {closed:?}");
    Ok(())
}

fn ready(lab: &Lab, daemon: &mut EdgeDaemon) -> Result<()> {
    daemon.wait_ready(lab, PEERS, Duration::from_secs(30))?;
    wait_for("everyone to know the VIP", EVENTUALLY, || known_everywhere(lab))?;
    Ok(())
}

#[test]
fn a_dedicated_vip_is_announced_with_its_attributes_while_it_has_an_eligible_backend() -> Result<()> {
    needs_namespaces!("a_dedicated_vip_is_announced_with_its_attributes_while_it_has_an_eligible_backend");
    let mut lab = Lab::up(Speaker::Bird, 1)?;
    lab.start_tor()?;
    let mut daemon = lab.start_edge(&configuration(&lab))?;
    ready(&lab, &mut daemon)?;
    attributes_are_as_configured(&lab)?;
    ensure!(announced(&lab)? == "yes", "service list: announced {}", announced(&lab)?);
    ensure!(held_on_lo(&lab)?, "the VIP is not on lo");
    in_kernel(&lab)?;
    traffic_follows_the_route(&lab)?;

    // The only pod runs on kcontrol.
    let start = Instant::now();
    lab.withdraw("kcontrol")?;
    wait_for("the VIP to be withdrawn with the last backend's route", NOTICED, || known_nowhere(&lab))?;
    println!("withdrawn {:?} after the last backend's route", start.elapsed());
    ensure!(announced(&lab)?.starts_with("no: 0 of 1"), "service list: announced {}", announced(&lab)?);
    ensure!(held_on_lo(&lab)?, "a VIP that is not announced is still ours");
    lab.announce("kcontrol")?;
    wait_for("the VIP to be announced again", EVENTUALLY, || known_everywhere(&lab))?;
    attributes_are_as_configured(&lab)?;
    in_kernel(&lab)?;
    traffic_follows_the_route(&lab).context("after the route came back")?;

    lab.scale(0)?;
    wait_for("the VIP to be withdrawn when no pod is left", EVENTUALLY, || known_nowhere(&lab))?;
    lab.scale(1)?;
    wait_for("the VIP to be announced for the new pod", EVENTUALLY, || known_everywhere(&lab))?;
    in_kernel(&lab)?;
    traffic_follows_the_route(&lab).context("after scaling to 0 and back")?;

    let start = Instant::now();
    daemon.stop()?;
    wait_for("the VIP to go with a daemon that stops", NOTICED, || known_nowhere(&lab))?;
    println!("withdrawn {:?} after SIGTERM", start.elapsed());
    daemon.start(&lab)?;
    ready(&lab, &mut daemon)?;
    in_kernel(&lab)?;
    traffic_follows_the_route(&lab)?;
    daemon.stop()
}

fn router_has_route(lab: &Lab) -> Result<bool> {
    let mut command = lab.command("router", "ip")?;
    let text = run(command.args(["route", "show", &format!("{DEDICATED_VIP}/32")]))?;
    ensure!(text.contains(&format!("via {EDGE}")), "{text}");
    Ok(true)
}

fn in_kernel(lab: &Lab) -> Result<()> {
    wait_for("the router's kernel route", EVENTUALLY, || router_has_route(lab)).map(|_| ())
}
