//! A node's route is withdrawn, then its session is lost for good: its pods get no new connections, before DNS tells.
//! Without graceful restart, that is; `scenario_graceful` has the sessions with it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        edge::{vip, without_graceful_restart},
        exec::wait_for,
        topology::{DNS_PODS, EDGE, NODES, ingress},
    },
    needs_namespaces,
};

/// Within what a backend without a route must be out of use.
const NOTICED: Duration = Duration::from_secs(1);
/// Within what it must be back: BIRD's retry and error delays are part of it.
const BACK: Duration = Duration::from_secs(30);

#[test]
fn pods_of_a_lost_node_get_no_new_connections_within_a_second() -> Result<()> {
    needs_namespaces!("pods_of_a_lost_node_get_no_new_connections_within_a_second");
    let mut lab = Lab::up(Speaker::Bird, 3)?;
    let mut daemon = lab.start_edge(&without_graceful_restart(&lab.edge_configuration("1s")))?;
    daemon.wait_ready(&lab, NODES.len() as u64, Duration::from_secs(30))?;

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

/// The states of the backends at ingress-2, on knode1.
fn states(lab: &Lab) -> Result<Vec<String>> {
    let rows = lab.edge_ctl(&["backend", "list"])?;
    let address = format!("{}:", ingress(2).address);
    let rows = rows.as_array().context("backend list is no array")?;
    let own = rows.iter().filter(|row| row["backend"].as_str().is_some_and(|backend| backend.starts_with(&address)));
    Ok(own.map(|row| row["state"].as_str().unwrap_or_default().to_owned()).collect())
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
