//! The daemon killed under running connections, and the daemon as an ordinary user with the unit's capabilities.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        edge::{one, vip},
        pods::TCP_ECHO,
        smoke::reach,
        topology::{EDGE, NODES, ingress},
    },
    needs_namespaces,
    scenario::Traffic,
    skip::count,
};
use serde_json::Value;

#[test]
fn a_killed_daemon_leaves_every_connection_running_and_its_successor_writes_nothing() -> Result<()> {
    needs_namespaces!("a_killed_daemon_leaves_every_connection_running_and_its_successor_writes_nothing");
    let total = count("running connections", 200, 1000);
    let lab = Lab::up(Speaker::Bird, 3)?;
    let mut daemon = lab.start_ready_edge("1s")?;
    let control = lab.open_many("client", (ingress(1).address, TCP_ECHO).into(), 50)?;
    let traffic = Traffic::start(lab.open_many("client", (EDGE, vip::ECHO).into(), total)?, control);
    let (programs, routes) = (programs(&lab)?, lab.bgp_routes()?);
    ensure!(routes.len() == NODES.len(), "{routes:?}");

    daemon.kill()?;
    let spread = lab.http("client", (EDGE, vip::HTTP).into(), 100).context("while the daemon is dead")?;
    ensure!(spread.len() == 3, "while the daemon is dead: {spread:?}");
    lab.udp("client", (EDGE, vip::UDP).into(), 50).context("UDP while the daemon is dead")?;
    ensure!(lab.bgp_routes()? == routes, "the kernel's routes changed with the daemon dead");

    daemon.start(&lab)?;
    daemon.wait_ready(&lab, NODES.len() as u64, Duration::from_secs(60))?;
    ensure!(lab.bgp_routes()? == routes, "the kernel's routes changed with the restart");
    ensure!(self::programs(&lab)? == programs, "the programs are others than before");
    let status = one(lab.edge_ctl(&["status"])?)?;
    ensure!(status["map_writes"] == 0, "the restarted daemon wrote to maps: {status}");
    reach(&lab, 3)?;

    let stalls = traffic.stop()?;
    println!("{stalls:?}");
    stalls.compare()?;
    daemon.stop()
}

/// Interface, kernel id of the program and of the link.
fn programs(lab: &Lab) -> Result<Vec<(Value, Value, Value)>> {
    let rows = lab.edge_ctl(&["xdp", "status"])?;
    let rows = rows.as_array().context("xdp status is no array")?;
    let ids = rows.iter().map(|row| (row["interface"].clone(), row["program"].clone(), row["link"].clone()));
    let ids: Vec<_> = ids.collect();
    ensure!(!ids.is_empty() && ids.iter().all(|(_, program, _)| program.is_u64()), "xdp status: {rows:?}");
    Ok(ids)
}

#[test]
fn an_ordinary_user_with_the_units_capabilities_can_run_the_daemon() -> Result<()> {
    needs_namespaces!("an_ordinary_user_with_the_units_capabilities_can_run_the_daemon");
    let mut lab = Lab::up(Speaker::Bird, 2)?;
    let mut daemon = lab.start_edge_as_ordinary_user(&lab.edge_configuration("1s"))?;
    daemon.wait_ready(&lab, NODES.len() as u64, Duration::from_secs(30))?;
    let pid = daemon.pid().context("the daemon has no process id")?;
    let process = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| process.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    ensure!(field("Uid:").is_some_and(|ids| !ids.split_whitespace().any(|id| id == "0")), "{process}");
    // CAP_NET_BIND_SERVICE 10, CAP_NET_ADMIN 12, CAP_NET_RAW 13, CAP_PERFMON 38, CAP_BPF 39, and nothing else.
    let capabilities: u64 = [10, 12, 13, 38, 39].iter().map(|bit| 1_u64 << bit).sum();
    ensure!(field("CapEff:") == Some(&*format!("{capabilities:016x}")), "{process}");
    ensure!(field("CapBnd:") == Some(&*format!("{capabilities:016x}")), "{process}");
    reach(&lab, 2)?;
    lab.scale(3)?;
    edge_tests::lab::exec::wait_for("three pods", Duration::from_secs(2), || edge_tests::lab::smoke::reached(&lab, 3))?;
    daemon.stop()
}
