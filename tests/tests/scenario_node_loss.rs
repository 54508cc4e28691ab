//! A node's route is withdrawn, then its session is lost for good: its pods get no new connections, before DNS tells.
//! Without graceful restart, that is; `scenario_graceful` has the sessions with it.

use std::{
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        edge::{vip, without_graceful_restart},
        exec::{run, wait_for},
        topology::{DNS_PODS, EDGE, NODES, ingress, node},
    },
    needs_namespaces,
};
use serde_json::Value;

/// Within what a backend without a route must be out of use.
const NOTICED: Duration = Duration::from_secs(1);
/// Within what it must be back: BIRD's retry and error delays are part of it.
const BACK: Duration = Duration::from_secs(30);

#[test]
fn pods_of_a_lost_node_get_no_new_connections_within_a_second() -> Result<()> {
    needs_namespaces!("pods_of_a_lost_node_get_no_new_connections_within_a_second");
    let mut lab = Lab::up(Speaker::Bird, 3)?;
    let watched = "[bgp.group.calico]\nbfd = { interval = \"50ms\", multiplier = 3, multihop = true }\n";
    let configuration = without_graceful_restart(&lab.edge_configuration("1s"));
    let mut daemon = lab.start_edge(&configuration.replace("[bgp.group.calico]\n", watched))?;
    daemon.wait_ready(&lab, NODES.len() as u64, Duration::from_secs(30))?;

    lab.watch_by_bfd("knode1")?;
    let bfd = |lab: &Lab| -> Result<Value> {
        let peers = lab.edge_ctl(&["bgp", "peers"])?;
        let rows = peers.as_array().context("bgp peers is no array")?;
        rows.iter().find(|row| row["desc"] == "knode1").cloned().with_context(|| format!("no knode1 in {peers}"))
    };
    wait_for("BFD with knode1", BACK, || Ok(bfd(&lab)?["bfd"]["state"] == "Up"))?;
    back_in_use(&lab, "BFD is up")?;
    lab.hang("knode1", true)?;
    goes_with_its_route(&lab)?;
    let row = bfd(&lab)?;
    ensure!(row["last_reset"].as_str().is_some_and(|why| why.contains("BFD session down")), "{row}");
    lab.hang("knode1", false)?;
    back_in_use(&lab, "BFD is up again")?;

    lab.withdraw("knode1")?;
    out_of_use(&lab, "the route was withdrawn")?;
    lab.announce("knode1")?;
    back_in_use(&lab, "the route was announced again")?;

    lab.stop_node("knode1")?;
    out_of_use(&lab, "the session was lost")?;
    // No DNS change helped: the pod still is in the answer.
    let answer = lab.resolve_from("kcontrol", (DNS_PODS[0], 53).into())?;
    ensure!(answer.contains(&ingress(2).address.into()), "DNS answers {answer:?}");
    lab.start_node("knode1")?;
    back_in_use(&lab, "the node came back")?;
    daemon.stop()
}

/// Whoever finds knode1's route gone from the kernel finds exactly the backends behind it out of use.
fn goes_with_its_route(lab: &Lab) -> Result<()> {
    let block = node("knode1").context("knode1 is a node")?.block();
    let start = Instant::now();
    loop {
        let mut show = Command::new("ip");
        let gone = lab.within("edge", || run(show.args(["route", "show", &block, "proto", "bgp"])))?.is_empty();
        let (own, others) = states_of_both(lab)?;
        ensure!(!others.is_empty() && others.iter().all(|state| state == "up"), "others are {others:?}");
        if gone {
            // Not a moment later: the route goes after them.
            ensure!(
                !own.is_empty() && own.iter().all(|state| state == "no-route"),
                "the route is gone, they are {own:?}"
            );
            break;
        }
        ensure!(start.elapsed() < BACK, "the route is still there, and the backends are {own:?}");
        thread::sleep(Duration::from_millis(5));
    }
    println!("a silent node: its route and its backends gone together after {:?}", start.elapsed());
    Ok(())
}

/// The states of the backends at ingress-2, on knode1.
fn states(lab: &Lab) -> Result<Vec<String>> {
    Ok(states_of_both(lab)?.0)
}

/// As [`states`], and those of all other backends.
fn states_of_both(lab: &Lab) -> Result<(Vec<String>, Vec<String>)> {
    let rows = lab.edge_ctl(&["backend", "list"])?;
    let address = format!("{}:", ingress(2).address);
    let rows = rows.as_array().context("backend list is no array")?;
    let state = |row: &Value| row["state"].as_str().unwrap_or_default().to_owned();
    let (own, others): (Vec<&Value>, Vec<&Value>) =
        rows.iter().partition(|row| row["backend"].as_str().is_some_and(|backend| backend.starts_with(&address)));
    Ok((own.into_iter().map(state).collect(), others.into_iter().map(state).collect()))
}

fn out_of_use(lab: &Lab, why: &str) -> Result<()> {
    let start = Instant::now();
    wait_for("the node's backends to leave use", NOTICED, || {
        let states = states(lab)?;
        ensure!(!states.is_empty() && states.iter().all(|state| state == "no-route"), "states are {states:?}");
        Ok(true)
    })
    .with_context(|| why.to_owned())?;
    println!("{why}: noticed after {:?}", start.elapsed());
    // A request to a pod without a route fails, so these show that none is sent there.
    let spread = lab.http("client", (EDGE, vip::HTTP).into(), 200).with_context(|| why.to_owned())?;
    ensure!(!spread.contains_key("ingress-2") && spread.len() == 2, "{why}: {spread:?}");
    Ok(())
}

fn back_in_use(lab: &Lab, why: &str) -> Result<()> {
    wait_for("the node's backends to come back", BACK, || {
        let states = states(lab)?;
        ensure!(states.iter().all(|state| state == "up"), "states are {states:?}");
        let spread = lab.http("client", (EDGE, vip::HTTP).into(), 60)?;
        Ok(spread.len() == 3)
    })
    .with_context(|| why.to_owned())?;
    Ok(())
}
