//! Pods found by DNS over routes learnt by BGP, load balanced by XDP: with BIRD on the nodes, and once with FRR.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        client::{Spread, deviation},
        edge::{one, vip},
        pods::SERVICE_NAME,
        topology::{CLIENT2, DNS_PODS, EDGE, NODES, ingress},
    },
    needs_namespaces,
};

/// Enough for the spread over three pods to stay within 15 % by more than five standard deviations.
const REQUESTS: usize = 3000;

#[test]
fn pods_behind_bird_nodes_are_learnt_and_served_evenly() -> Result<()> {
    needs_namespaces!("pods_behind_bird_nodes_are_learnt_and_served_evenly");
    main_job(Speaker::Bird)
}

#[test]
fn pods_behind_frr_nodes_are_learnt_and_served_evenly() -> Result<()> {
    needs_namespaces!("pods_behind_frr_nodes_are_learnt_and_served_evenly");
    main_job(Speaker::Frr)
}

fn main_job(speaker: Speaker) -> Result<()> {
    let lab = Lab::up(speaker, 3)?;
    let mut daemon = lab.start_ready_edge("1s")?;
    sessions_are_up(&lab)?;
    routes_are_in_the_kernel(&lab)?;
    names_are_resolved_at_pod_addresses(&lab)?;
    requests_reach_every_pod(&lab)?;
    counters_have_counted(&lab)?;
    ensure!(one(lab.edge_ctl(&["status"])?)?["state"] == "ok", "status is not ok");
    daemon.stop()
}

fn sessions_are_up(lab: &Lab) -> Result<()> {
    let summary = lab.edge_ctl(&["bgp", "summary"])?;
    for node in NODES {
        let rows = summary.as_array().context("bgp summary is no array")?;
        let row = rows.iter().find(|row| row["neighbor"] == node.address().to_string());
        let row = row.with_context(|| format!("{} is not in {summary}", node.name))?;
        ensure!(row["state"] == "Established" && row["pfx_rcd"] == 1 && row["desc"] == node.name, "{row}");
        let theirs = lab.established_peers(node.name)?;
        ensure!(theirs.contains(&EDGE.to_string()), "{} sees {theirs:?}", node.name);
    }
    Ok(())
}

fn routes_are_in_the_kernel(lab: &Lab) -> Result<()> {
    let wanted: Vec<String> = NODES.iter().map(|node| format!("{} via {}", node.block(), node.address())).collect();
    ensure!(lab.bgp_routes()? == wanted, "kernel has {:?}, expected {wanted:?}", lab.bgp_routes()?);
    Ok(())
}

fn names_are_resolved_at_pod_addresses(lab: &Lab) -> Result<()> {
    let answer = lab.resolve_from("edge", (DNS_PODS[1], 53).into()).context("ask a kube-dns pod from the edge")?;
    ensure!(answer.len() == 3, "kube-dns answered {answer:?}");
    let names = lab.edge_ctl(&["dns", "list"])?;
    let row = names.as_array().and_then(|rows| rows.iter().find(|row| row["name"] == SERVICE_NAME));
    let row = row.with_context(|| format!("{SERVICE_NAME} is not in {names}"))?;
    // Shown with the port of the service that asked, or without.
    let bare =
        |text: &'_ serde_json::Value| text.as_str().map(|text| text.split(':').next().unwrap_or(text).to_owned());
    let addresses: BTreeSet<String> = row["addresses"].as_array().into_iter().flatten().filter_map(bare).collect();
    let wanted: Vec<String> = (1..=3).map(|number| ingress(number).address.to_string()).collect();
    ensure!(addresses == wanted.into_iter().collect(), "{row}");
    ensure!(row["state"] == "fresh", "{row}");
    Ok(())
}

fn requests_reach_every_pod(lab: &Lab) -> Result<()> {
    let half = REQUESTS / 2;
    let mut spread = lab.http("client", (EDGE, vip::HTTP).into(), half).context("port 8080")?;
    for (pod, count) in lab.https("client", (EDGE, vip::HTTPS).into(), half).context("port 8443")? {
        *spread.entry(pod).or_default() += count;
    }
    within_15_percent(&spread, "8080 and 8443")?;
    let dnat = lab.http("client2", (EDGE, vip::HTTP_DNAT).into(), REQUESTS / 3).context("dnat")?;
    ensure!(dnat.len() == 3, "dnat: {dnat:?}");
    let udp = lab.udp("client", (EDGE, vip::UDP).into(), REQUESTS / 3).context("UDP")?;
    ensure!(udp.len() == 3, "UDP: {udp:?}");
    let seen = lab.seen_address("client", (EDGE, vip::HTTP).into())?;
    ensure!(seen == EDGE.to_string(), "full-nat: the pod saw {seen}");
    let seen = lab.seen_address("client2", (EDGE, vip::HTTP_DNAT).into())?;
    ensure!(seen == CLIENT2.to_string(), "dnat: the pod saw {seen}");
    Ok(())
}

fn within_15_percent(spread: &Spread, what: &str) -> Result<()> {
    let off = deviation(spread, 3);
    println!("{what}: {spread:?}, at most {:.1} % from equal", off * 100.0);
    ensure!(off <= 0.15, "{what}: {spread:?}");
    Ok(())
}

fn counters_have_counted(lab: &Lab) -> Result<()> {
    let services = lab.edge_ctl(&["service", "list"])?;
    let named = |name| services.as_array().and_then(|rows| rows.iter().find(|row| row["name"] == name));
    for name in ["ingress-http", "ingress-https", "ingress-http-dnat", "echo-udp"] {
        let row = named(name).with_context(|| format!("{name} is not in {services}"))?;
        ensure!(row["backends"] == "3/3", "{row}");
        // A flow of one datagram each way is never established, so UDP is judged by its packets.
        let column = if name == "echo-udp" { "packets_in" } else { "connections" };
        let counted = row[column].as_u64().unwrap_or_default();
        ensure!(counted >= (REQUESTS / 3) as u64, "{name} counted {counted} {column}: {row}");
        ensure!(row["packets_out"].as_u64() > Some(0) && row["bytes_in"].as_u64() > Some(0), "{row}");
    }
    Ok(())
}
