//! The way to the resolver: its servers are followed as they move, and names are asked at once when BGP brings their
//! network back.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        dns::HeadlessService,
        dns_faults::Fault,
        edge::{vip, without_graceful_restart},
        exec::wait_for,
        pods::SERVICE_NAME,
        topology::{DNS_PODS, EDGE, NODES, ingress},
    },
    needs_namespaces,
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(20);
/// The service of the DNS servers themselves.
const DNS_SERVICE: &str = "kube-dns-pods.kube-system";

fn addresses(lab: &Lab, name: &str) -> Result<Vec<String>> {
    let rows = lab.edge_ctl(&["dns", "list"])?;
    let row = rows.as_array().and_then(|rows| rows.iter().find(|row| row["name"] == name).cloned());
    let row = row.with_context(|| format!("{name} is not in {rows}"))?;
    Ok(row["addresses"].as_array().into_iter().flatten().filter_map(|one| Some(one.as_str()?.to_owned())).collect())
}

fn followed(lab: &Lab, replicas: usize) -> Result<()> {
    let mut wanted: Vec<String> = (1..=replicas).map(|pod| ingress(pod).address.to_string()).collect();
    wanted.sort();
    wait_for(&format!("{replicas} pods to be known"), SOON, || {
        let mut known = addresses(lab, SERVICE_NAME)?;
        known.sort();
        ensure!(known == wanted, "{known:?}");
        Ok(true)
    })
    .map(drop)
}

/// Servers with the way they came.
fn servers(lab: &Lab) -> Result<Vec<(String, String)>> {
    let rows = lab.edge_ctl(&["dns", "servers"])?;
    let text = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
    Ok(rows.as_array().into_iter().flatten().map(|row| (text(row, "server"), text(row, "source"))).collect())
}

fn wait_servers(lab: &Lab, wanted: &[(std::net::Ipv4Addr, &str)]) -> Result<()> {
    let wanted: Vec<_> = wanted.iter().map(|(server, how)| (format!("{server}:53"), (*how).to_owned())).collect();
    wait_for(&format!("the servers to be {wanted:?}"), SOON, || {
        let now = servers(lab)?;
        ensure!(now == wanted, "{now:?}");
        Ok(true)
    })
    .map(drop)
}

#[test]
fn a_resolvers_servers_are_followed_as_their_service_moves_them() -> Result<()> {
    needs_namespaces!("a_resolvers_servers_are_followed_as_their_service_moves_them");
    let mut lab = Lab::up(Speaker::Bird, 2)?;
    let serve = |lab: &Lab, pods: &[std::net::Ipv4Addr]| {
        let service = HeadlessService { ports: BTreeMap::new(), addresses: pods.to_vec() };
        lab.change_zone(|zone| drop(zone.services.insert(DNS_SERVICE.to_owned(), service)))
    };
    serve(&lab, &DNS_PODS)?;
    // Only one of the two is configured, as one that an administrator knew once.
    let listed = format!("servers = [\"{}\", \"{}\"]", DNS_PODS[0], DNS_PODS[1]);
    let base = lab.edge_configuration("1s");
    ensure!(base.contains(&listed), "the lab's configuration lacks `{listed}`");
    let follow = format!(
        "servers = [\"{}\"]\nhold = \"1s\"\nshrink_hold = \"1s\"\nfollow = {{ dns = \"{DNS_SERVICE}.svc.cluster.local\" }}",
        DNS_PODS[0]
    );
    let mut daemon = lab.start_edge(&base.replace(&listed, &follow))?;
    daemon.wait_ready(&lab, NODES.len() as u64, Duration::from_secs(30))?;
    wait_servers(&lab, &[(DNS_PODS[0], "followed"), (DNS_PODS[1], "followed")])?;

    // The configured one falls silent: the one that was found serves.
    lab.change_zone(|zone| drop(zone.faults.insert(DNS_PODS[0].to_string(), Fault::Drop)))?;
    lab.scale(3)?;
    followed(&lab, 3)?;
    // The service leaves it out: it is asked last from then on.
    serve(&lab, &DNS_PODS[1..])?;
    wait_servers(&lab, &[(DNS_PODS[1], "followed"), (DNS_PODS[0], "configured")])?;
    // The service has nobody for a while: whoever was known is asked.
    serve(&lab, &[])?;
    lab.scale(2)?;
    followed(&lab, 2)?;
    // It never follows anybody outside of the pods' networks.
    serve(&lab, &[std::net::Ipv4Addr::new(192, 0, 2, 53)])?;
    lab.scale(3)?;
    followed(&lab, 3)?;
    ensure!(!servers(&lab)?.iter().any(|(server, _)| server.starts_with("192.0.2.")), "{:?}", servers(&lab)?);
    daemon.stop()
}

#[test]
fn names_are_asked_at_once_when_bgp_brings_the_servers_network_back() -> Result<()> {
    needs_namespaces!("names_are_asked_at_once_when_bgp_brings_the_servers_network_back");
    let mut lab = Lab::up(Speaker::Bird, 2)?;
    // An answer is good for an hour: whoever asks earlier has another reason than its end.
    let mut daemon = lab.start_edge(&without_graceful_restart(&lab.edge_configuration("1h")))?;
    daemon.wait_ready(&lab, NODES.len() as u64, Duration::from_secs(30))?;
    followed(&lab, 2)?;
    lab.kill_bgp("kcontrol")?;
    wait_for("the way to the servers to be lost", SOON, || {
        let routes = lab.bgp_routes()?;
        ensure!(routes.len() == NODES.len() - 1, "{routes:?}");
        Ok(true)
    })?;
    lab.scale(3)?;
    // The pool of before serves meanwhile, but for the pod behind the lost route.
    let spread = lab.http("client", (EDGE, vip::HTTP).into(), 20).context("without the servers")?;
    ensure!(spread.len() == 1 && spread.contains_key("ingress-2"), "{spread:?}");
    ensure!(addresses(&lab, SERVICE_NAME)?.len() == 2, "it was asked although nobody answers");
    lab.start_bgp("kcontrol")?;
    followed(&lab, 3).context("asked again when the route came back")?;
    wait_for("all three to serve", SOON, || Ok(lab.http("client", (EDGE, vip::HTTP).into(), 30)?.len() == 3))?;
    daemon.stop()
}
