//! End to end through the lab: requests and connections per second of the edge, relative to plain routing, nft,
//! nginx stream and HAProxy, all measured in turn within the same run.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};

use super::Figure;
use crate::{
    lab::{
        Lab, Speaker,
        client::wrk,
        edge::vip,
        exec::{self, wait_for},
        pods::SERVICE,
        topology::{CLIENT, EDGE, NODES, cali, ingress},
    },
    skip::full,
};

const NFT_PORT: u16 = 18080;
const NGINX_PORT: u16 = 18081;
const HAPROXY_PORT: u16 = 18082;
/// Addresses of the one pod. Whoever rewrites the source has the edge's ports only once per backend address, and a
/// closed connection's port rests a minute: one address would measure that. One server process answers for all of
/// them, so that routing to one of them is the same work.
const ADDRESSES: u8 = 16;

/// Measures everything; about a minute.
///
/// # Errors
/// Where the lab, the daemon or one of the others does not come up.
pub fn run() -> Result<Vec<Figure>> {
    let lab = Lab::up(Speaker::Bird, 1)?;
    prepare(&lab)?;
    let mut daemon = lab.start_edge(&without_dnat(&lab.edge_configuration("1s")))?;
    daemon.wait_ready(&lab, NODES.len() as u64, Duration::from_secs(30))?;
    start_nginx(&lab)?;
    start_haproxy(&lab)?;
    let pod = SocketAddr::from((ingress(1).address, 80));
    let ways: [(&str, SocketAddr); 5] = [
        ("route", pod),
        ("edge", (EDGE, vip::HTTP).into()),
        ("nft", (EDGE, NFT_PORT).into()),
        ("nginx", (EDGE, NGINX_PORT).into()),
        ("haproxy", (EDGE, HAPROXY_PORT).into()),
    ];
    start_nft(&lab)?;
    for (name, server) in ways {
        wait_for(&format!("{name} at {server}"), Duration::from_secs(10), || {
            lab.http("client", server, 1).map(|spread| spread.contains_key("ingress-1"))
        })?;
    }
    stop_nft(&lab)?;
    let (rounds, seconds) = if full() { (9, 5) } else { (5, 2) };
    let mut figures = Vec::new();
    // Connections in short rounds: their number is what uses ports up.
    for (kind, close, seconds) in [("requests", false, seconds), ("connections", true, 1)] {
        let mut values = vec![Vec::new(); ways.len()];
        // Interleaved, so that what else the machine does meets all of them.
        for round in 0..rounds {
            eprintln!("e2e {kind}: round {} of {rounds}", round + 1);
            for ((name, server), values) in ways.iter().zip(&mut values) {
                // Only for its own turn: with a nat chain the kernel tracks plain-routed connections as well.
                let nft = *name == "nft";
                if nft {
                    start_nft(&lab)?;
                }
                values.push(
                    wrk(&lab, "client", *server, seconds, close).with_context(|| format!("wrk by way of {name}"))?,
                );
                if nft {
                    stop_nft(&lab)?;
                }
            }
        }
        let route = Figure::net("route".to_owned(), "1/s", values[0].clone(), 0.0).median;
        for ((name, _), values) in ways.iter().zip(&values) {
            let mut figure = Figure::net(format!("e2e/{name}/{kind}"), "1/s", values.clone(), 0.0);
            figure.ratio = (route > 0.0).then(|| figure.median / route);
            figures.push(figure);
        }
    }
    daemon.stop()?;
    Ok(figures)
}

/// The pod's addresses.
fn backends() -> Vec<Ipv4Addr> {
    let [a, b, c, _] = ingress(1).address.octets();
    let more = (1..ADDRESSES).map(|number| Ipv4Addr::new(a, b, c, 100 + number));
    [ingress(1).address].into_iter().chain(more).collect()
}

/// Gives the pod its addresses, leads replies back through the edge, so that plain routing takes the same way as the
/// others, and keeps connections in TIME-WAIT from being in the way of the next ones.
fn prepare(lab: &Lab) -> Result<()> {
    let pod = ingress(1);
    let node = lab.namespace(pod.node.name);
    let (mut on_pod, mut on_node) = (Vec::new(), vec![format!("route add {CLIENT}/32 via {EDGE}")]);
    for address in backends().iter().skip(1) {
        on_pod.push(format!("addr add {address}/32 dev eth0"));
        on_node.push(format!("route add {address}/32 dev {} scope link", cali(&pod)));
    }
    exec::ip_batch(Some(&lab.namespace(&pod.name)), &on_pod)?;
    exec::ip_batch(Some(&node), &on_node)?;
    lab.change_zone(|zone| zone.services.entry(SERVICE.to_owned()).or_default().addresses = backends())?;
    for host in ["client", "edge", &pod.name] {
        lab.within(host, || {
            fs::write("/proc/sys/net/ipv4/tcp_max_tw_buckets", "0").with_context(|| format!("set TIME-WAIT in {host}"))
        })?;
    }
    Ok(())
}

/// Without dnat services: their backends may send nothing past the edge that is not theirs, so plain-routed replies
/// from the same pods' ports would be dropped.
fn without_dnat(configuration: &str) -> String {
    let sections = configuration.split("\n[service.");
    sections.filter(|section| !section.contains("mode = \"dnat\"")).collect::<Vec<_>>().join("\n[service.")
}

fn start_nft(lab: &Lab) -> Result<()> {
    let map: Vec<String> = backends().iter().enumerate().map(|(slot, pod)| format!("{slot} : {pod}")).collect();
    let (count, map) = (map.len(), map.join(", "));
    let rules = format!(
        "table ip bench {{\n chain prerouting {{ type nat hook prerouting priority dstnat; ip daddr {EDGE} tcp dport \
         {NFT_PORT} dnat to numgen random mod {count} map {{ {map} }}:80; }}\n chain postrouting {{ type nat hook \
         postrouting priority srcnat; ct status dnat masquerade; }}\n}}\n"
    );
    let mut command: Command = lab.command("edge", exec::program("nft", "nftables")?)?;
    exec::run_with_input(command.args(["-f", "-"]), &rules)?;
    // A client comes back to the same port within seconds here, and the kernel's entry of the closed connection, kept for
    // two minutes, would stand in its way.
    lab.within("edge", || {
        ["fin_wait", "close_wait", "last_ack", "time_wait", "close"].into_iter().try_for_each(|state| {
            let path = format!("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_{state}");
            fs::write(&path, "1").with_context(|| format!("set {path}"))
        })
    })
}

fn stop_nft(lab: &Lab) -> Result<()> {
    let mut command: Command = lab.command("edge", exec::program("nft", "nftables")?)?;
    exec::run(command.args(["delete", "table", "ip", "bench"])).map(|_| ())
}

fn start_nginx(lab: &Lab) -> Result<()> {
    let folder = lab.folder();
    let file = folder.join("bench.nginx.conf");
    let text = format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\ndaemon off;\nmaster_process off;\n\
         pid {folder}/bench.nginx.pid;\nworker_rlimit_nofile 65536;\nevents {{ worker_connections 16384; }}\n\
         stream {{ upstream pods {{ {servers} }} server {{ listen {EDGE}:{NGINX_PORT} backlog=4096; proxy_pass pods; }} }}\n",
        folder = folder.display(),
        servers = backends().iter().map(|pod| format!("server {pod}:80;")).collect::<String>(),
    );
    fs::write(&file, text).context("write nginx's configuration")?;
    let mut command = Command::new(exec::program("nginx", "nginx")?);
    command.arg("-e").arg("stderr").arg("-p").arg(&folder).arg("-c").arg(&file);
    lab.serve("edge", "nginx", &mut command)
}

fn start_haproxy(lab: &Lab) -> Result<()> {
    let file = lab.folder().join("bench.haproxy.cfg");
    let text = format!(
        "global\n maxconn 1000\n nbthread 1\ndefaults\n mode tcp\n timeout connect 5s\n timeout client 60s\n \
         timeout server 60s\nlisten bench\n bind {EDGE}:{HAPROXY_PORT}\n{servers}",
        servers = backends().iter().map(|pod| format!(" server {pod} {pod}:80\n")).collect::<String>(),
    );
    fs::write(&file, text).context("write HAProxy's configuration")?;
    let mut command = Command::new(exec::program("haproxy", "haproxy")?);
    command.arg("-db").arg("-f").arg(&file);
    lab.serve("edge", "haproxy", &mut command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_sections_of_dnat_services_are_left_out() {
        let text =
            "[edge]\n\n[service.a]\nmode = \"full-nat\"\n\n[service.b]\nmode = \"dnat\"\n\n[service.c]\nlisten = []\n";
        let kept = without_dnat(text);
        assert!(kept.starts_with("[edge]\n") && kept.contains("[service.a]") && kept.contains("[service.c]"), "{kept}");
        assert!(!kept.contains("service.b") && !kept.contains("dnat"), "{kept}");
    }
}
