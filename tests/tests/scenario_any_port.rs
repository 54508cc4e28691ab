//! A service of every port of its VIP, through the daemon: real servers on several ports of real pods, both modes, and the views.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        client::{Echo, exchange_all},
        edge::{EdgeDaemon, dedicated_service, one, tor_peer},
        exec::{run, wait_for},
        pods::{SERVICE_NAME, TCP_ECHO, UDP_ECHO},
        topology::{CLIENT2, DEDICATED_VIP, EDGE, NODES},
    },
    needs_namespaces,
    unknown_flows::{counted, end_quiet_time, is_reset},
};
use serde_json::Value;

/// Beside [`DEDICATED_VIP`], for the service in dnat mode.
const DNAT_VIP: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 11);
/// Nodes and the router.
const PEERS: u64 = NODES.len() as u64 + 1;
const SOON: Duration = Duration::from_secs(20);
const POD: &str = "10.1.0.4";

fn every_port(name: &str, vip: Ipv4Addr, mode: &str) -> String {
    format!(
        "\n[service.{name}]\nlisten = [\"{vip}:*/tcp\", \"{vip}:*/udp\"]\nbackends = {{ dns = \"{}\", port = \"*\", \
         resolver = \"kube-dns\" }}\nmode = \"{mode}\"\nannounce = true\nhealth = {{ tcp = {{}}, interval = \"1s\", port = 80 }}\n",
        SERVICE_NAME
    )
}

fn configuration(lab: &Lab) -> String {
    [
        lab.edge_configuration("1s"),
        tor_peer(),
        every_port("all", DEDICATED_VIP, "full-nat"),
        every_port("all-dnat", DNAT_VIP, "dnat"),
        // Port 81 of the VIP, which no pod listens on, is another service's.
        dedicated_service("one-port", 81, 80, "full-nat"),
    ]
    .concat()
}

fn ready(lab: &Lab, daemon: &mut EdgeDaemon) -> Result<()> {
    daemon.wait_ready(lab, PEERS, Duration::from_secs(30))?;
    for vip in [DEDICATED_VIP, DNAT_VIP] {
        wait_for("the router to know the way", SOON, || {
            let mut command = lab.command("router", "ip")?;
            let text = run(command.args(["route", "show", &format!("{vip}/32")]))?;
            Ok(text.contains(&format!("via {EDGE}")))
        })?;
    }
    Ok(())
}

/// What the pods serve is reached at their own ports, and a port that none listens on is refused by the pod.
fn each_port_is_served(lab: &Lab, vip: Ipv4Addr) -> Result<()> {
    let at = |port: u16| SocketAddr::from((vip, port));
    lab.http("client2", at(80), 10).context("HTTP")?;
    lab.https("client2", at(443), 5).context("HTTPS")?;
    lab.udp("client2", at(UDP_ECHO), 5).context("UDP")?;
    exchange_all(&mut lab.open_many("client2", at(TCP_ECHO), 5)?)?;
    lab.ping("client2", vip).context("the kernel answers ping")?;
    let closed = lab.http("client2", at(9999), 1);
    let refused = closed.as_ref().is_err_and(|error| format!("{error:#}").contains("refused"));
    ensure!(refused, "a port that no pod listens on: {closed:?}");
    Ok(())
}

fn rows(lab: &Lab, view: &str, service: &str) -> Result<Vec<Value>> {
    let of = |row: &Value| [&row["name"], &row["service"]].contains(&&Value::from(service));
    let rows = lab.edge_ctl(&[view, "list"])?;
    Ok(rows.as_array().context("no rows")?.iter().filter(|row| of(row)).cloned().collect())
}

fn shown_with_a_star(lab: &Lab) -> Result<()> {
    let vip = format!("{DEDICATED_VIP}:*");
    let services = rows(lab, "service", "all")?;
    ensure!(services.len() == 2 && services.iter().all(|row| row["vip"] == vip), "{services:?}");
    ensure!(services.iter().all(|row| row["announced"] == "yes"), "{services:?}");
    let backends = rows(lab, "backend", "all")?;
    let star = |row: &Value| row["backend"].as_str().is_some_and(|text| text.ends_with(":*"));
    ensure!(!backends.is_empty() && backends.iter().all(|row| star(row) && row["vip"] == vip), "{backends:?}");
    ensure!(
        backends.iter().any(|row| row["backend"] == format!("{POD}:*") && row["node"] == "kcontrol"),
        "{backends:?}"
    );
    Ok(())
}

fn state_of_the_pod(lab: &Lab) -> Result<String> {
    let row = rows(lab, "backend", "all")?.into_iter().find(|row| row["backend"] == format!("{POD}:*"));
    Ok(row.context("no such backend")?["state"].as_str().unwrap_or_default().to_owned())
}

/// Orders and selections take the name that the views show.
fn orders_take_the_star(lab: &Lab) -> Result<()> {
    let backend = format!("{POD}:*");
    let mut on_the_pod = Vec::new();
    for echo in lab.open_many("client2", (DEDICATED_VIP, TCP_ECHO).into(), 12)? {
        if echo.pod == "ingress-1" {
            on_the_pod.push(echo);
        }
    }
    ensure!(!on_the_pod.is_empty(), "12 connections, and none to the pod on kcontrol");
    lab.edge_ctl(&["backend", "drain", "all", &backend])?;
    wait_for("the pod to drain", SOON, || Ok(state_of_the_pod(lab)? == "draining"))?;
    let elsewhere = lab.http("client2", (DEDICATED_VIP, 80).into(), 20)?;
    ensure!(!elsewhere.contains_key("ingress-1"), "{elsewhere:?}");
    exchange_all(&mut on_the_pod).context("connections to a backend that drains")?;
    let killed = one(lab.edge_ctl(&["flow", "kill", "all", "--backend", &backend])?)?;
    ensure!(killed["flows"].as_u64() >= Some(on_the_pod.len() as u64), "{killed}");
    the_kernel_ends_what_nobody_knows(lab, &mut on_the_pod[0])?;
    wait_for("the pod to be drained", SOON, || Ok(state_of_the_pod(lab)? == "drained"))?;
    lab.edge_ctl(&["backend", "undrain", "all", &backend])?;
    wait_for("the pod to be back", SOON, || Ok(state_of_the_pod(lab)? == "up"))?;
    Ok(())
}

/// The host holds the VIP for nothing else, so that its own TCP answers a packet in mid-flow.
fn the_kernel_ends_what_nobody_knows(lab: &Lab, connection: &mut Echo) -> Result<()> {
    end_quiet_time(lab)?;
    is_reset(connection.exchange())?;
    let [passed, answered] = counted(lab, "all", ["no-flow", "mid-flow-reset"])?;
    ensure!(passed > 0 && answered == 0, "{passed} segments passed to the kernel, {answered} answered by the program");
    Ok(())
}

#[test]
fn every_port_of_a_vip_reaches_the_pods_there_and_a_restart_changes_nothing() -> Result<()> {
    needs_namespaces!("every_port_of_a_vip_reaches_the_pods_there_and_a_restart_changes_nothing");
    let lab = Lab::up(Speaker::Bird, 3)?;
    lab.start_tor()?;
    let mut daemon = lab.start_edge(&configuration(&lab))?;
    ready(&lab, &mut daemon)?;
    for vip in [DEDICATED_VIP, DNAT_VIP] {
        each_port_is_served(&lab, vip).with_context(|| vip.to_string())?;
    }
    let seen = lab.seen_address("client2", (DNAT_VIP, 80).into())?;
    ensure!(seen == CLIENT2.to_string(), "in dnat mode a pod sees {seen}");
    // The exact listen address wins: its service maps port 81 to 80, where the other would have kept it.
    lab.http("client2", (DEDICATED_VIP, 81).into(), 3).context("the service of one port")?;
    shown_with_a_star(&lab)?;
    orders_take_the_star(&lab)?;

    let mut connections = lab.open_many("client2", (DEDICATED_VIP, TCP_ECHO).into(), 5)?;
    connections.extend(lab.open_many("client2", (DNAT_VIP, TCP_ECHO).into(), 5)?);
    let maps = |name: &str| lab.edge_ctl(&["map", "dump", name]);
    let before = [maps("SERVICE_INDEX")?, maps("BACKENDS")?, maps("BACKEND_INDEX")?];
    daemon.kill()?;
    exchange_all(&mut connections).context("while the daemon is dead")?;
    daemon.start(&lab)?;
    ready(&lab, &mut daemon)?;
    ensure!(
        before == [maps("SERVICE_INDEX")?, maps("BACKENDS")?, maps("BACKEND_INDEX")?],
        "a restart changed the maps"
    );
    exchange_all(&mut connections).context("after a restart")?;
    each_port_is_served(&lab, DEDICATED_VIP).context("after a restart")?;

    the_hosts_own_address_stays_the_hosts(&lab, &daemon)?;
    daemon.stop()
}

/// A service of every port of the edge's own address would take the BGP sessions with it.
fn the_hosts_own_address_stays_the_hosts(lab: &Lab, daemon: &EdgeDaemon) -> Result<()> {
    daemon.configure(&(configuration(lab) + &every_port("greedy", EDGE, "full-nat")))?;
    let reloaded = daemon.reload()?;
    ensure!(reloaded.status.success(), "{}", String::from_utf8_lossy(&reloaded.stderr));
    let mut told = Value::Null;
    wait_for("the refusal to be told", SOON, || {
        told = one(lab.edge_ctl(&["status"])?)?["problems"].take();
        let problems = told.as_array().cloned().unwrap_or_default();
        Ok(problems
            .iter()
            .any(|it| it.as_str().is_some_and(|text| text.contains("service greedy") && text.contains("not served"))))
    })
    .with_context(|| format!("problems are {told}"))?;
    ensure!(rows(lab, "service", "greedy")?.is_empty(), "it is in the maps");
    let peers = lab.edge_ctl(&["bgp", "summary"])?;
    let up = |row: &Value| row["state/pfx_rcd"].as_u64().is_some() || row["state"] == "Established";
    ensure!(peers.as_array().is_some_and(|rows| !rows.is_empty()), "{peers}");
    let status = one(lab.edge_ctl(&["status"])?)?;
    ensure!(
        status["peers_established"] == PEERS,
        "{peers} {}",
        peers.as_array().map_or(0, |rows| rows.iter().filter(|row| up(row)).count())
    );
    Ok(())
}
