//! Path MTU discovery with real stacks and a router in between: 100 MB through a link of 1,300 bytes behind the edge, in both
//! modes and of both families, towards the client and towards the pods.

use std::{fs, net::SocketAddr, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use edge_tests::{
    lab::{
        Lab, Speaker,
        edge::vip,
        exec::{self, ip_batch, run, wait_for},
        ipv6::vip6,
        pods::{LARGE, http_get_path},
        topology::{EDGE, NODES, cali, ingress},
    },
    needs_namespaces,
};

const PODS: usize = 3;
/// Bytes of the file.
const LENGTH: usize = 100_000_000;
const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_file_comes_through_a_narrow_link_behind_the_edge_and_goes_through_one() -> Result<()> {
    needs_namespaces!("a_file_comes_through_a_narrow_link_behind_the_edge_and_goes_through_one");
    let mut lab = Lab::up(Speaker::Bird, PODS)?;
    lab.add_ipv6()?;
    let mut daemon = lab.start_edge(&lab.edge_configuration_ipv6("1s"))?;
    daemon.wait_ready(&lab, 2 * NODES.len() as u64, Duration::from_secs(30))?;
    let content: Vec<u8> = (0..LENGTH).map(|i| (i % 251) as u8).collect();
    fs::write(lab.folder().join(LARGE), &content)?;

    // Beyond the router: it tells the VIP, which the pod is to hear.
    ip_batch(Some(&lab.namespace("router")), &["link set eth1 mtu 1300".to_owned()])?;
    for server in servers() {
        pods_forget(&lab)?;
        told(&lab, || {
            let got = lab.folder().join("got");
            curl(&lab, &["-o", &got.display().to_string(), &url(server, LARGE)])?;
            ensure!(fs::read(&got)? == content, "the file came otherwise than it went");
            Ok(())
        })
        .with_context(|| format!("from {server}"))?;
    }

    // Beyond the nodes: they tell the edge's address or the client, which the client is to hear of the VIP.
    ip_batch(Some(&lab.namespace("router")), &["link set eth1 mtu 1500".to_owned()])?;
    for pod in (1..=PODS).map(ingress) {
        ip_batch(Some(&lab.namespace(pod.node.name)), &[format!("link set {} mtu 1300", cali(&pod))])?;
    }
    for server in servers() {
        forget(&lab, "client2")?;
        // A pod that remembers a narrow path to the client offers no larger segments in IPv6.
        pods_forget(&lab)?;
        told(&lab, || {
            let file = lab.folder().join(LARGE).display().to_string();
            // Without "Expect", so that the body comes before the answer.
            curl(&lab, &["-H", "Expect:", "-T", &file, &url(server, "upload")])
        })
        .with_context(|| format!("to {server}"))?;
    }
    daemon.stop()
}

/// Full-nat and dnat, of both families.
fn servers() -> [SocketAddr; 4] {
    [(EDGE, vip::HTTP).into(), (EDGE, vip::HTTP_DNAT).into(), vip6(vip::HTTP), vip6(vip::HTTP_DNAT)]
}

fn url(server: SocketAddr, path: &str) -> String {
    format!("http://{server}/{path}")
}

/// Runs curl on the client behind the router.
fn curl(lab: &Lab, arguments: &[&str]) -> Result<()> {
    let mut command = lab.command("client2", exec::program("curl", "curl")?)?;
    command.args(["--silent", "--show-error", "--fail", "--max-time", "120"]).args(arguments);
    run(&mut command).map(drop)
}

/// Runs `transfer`, for which the edge must have translated an ICMP error at least.
fn told(lab: &Lab, transfer: impl FnOnce() -> Result<()>) -> Result<()> {
    let before = translated(lab)?;
    transfer()?;
    let after = translated(lab)?;
    ensure!(after > before, "nobody had to be told: {before} messages before, {after} after");
    Ok(())
}

/// ICMP errors that the edge has translated.
fn translated(lab: &Lab) -> Result<u64> {
    let text = lab.within("edge", || http_get_path(([127, 0, 0, 1], 9180).into(), "/metrics", SECOND))?;
    let lines = text
        .lines()
        .filter(|line| line.starts_with("edge_reasons_total{") && line.contains("reason=\"icmp-translated\""));
    let counts = lines.map(|line| Ok(line.rsplit(' ').next().unwrap_or_default().parse::<u64>()?));
    counts.sum::<Result<u64>>().context("read edge_reasons_total")
}

fn pods_forget(lab: &Lab) -> Result<()> {
    (1..=PODS).try_for_each(|number| forget(lab, &ingress(number).name))
}

/// Has a host forget the path MTUs it was told. In IPv6 a route that a connection still ends by outlives a flush.
fn forget(lab: &Lab, host: &str) -> Result<()> {
    let ip = |family: &str, what: &str| {
        run(Command::new("ip").args([family, "-n", &lab.namespace(host), "route", what, "cache"]))
    };
    for family in ["-4", "-6"] {
        wait_for(&format!("{host} to forget"), 10 * SECOND, || {
            ip(family, "flush")?;
            Ok(ip(family, "show")?.trim().is_empty())
        })?;
    }
    Ok(())
}
