//! End to end through the lab: requests and connections per second of the edge, relative to plain routing, nft,
//! nginx stream and HAProxy, all measured in turn within the same run.

use std::{fs, net::SocketAddr, process::Command, time::Duration};

use anyhow::{Context, Result};

use super::Figure;
use crate::{
    lab::{
        Lab, Speaker,
        client::wrk,
        edge::vip,
        exec::{self, wait_for},
        topology::{CLIENT, EDGE, NODES, ingress},
    },
    skip::full,
};

const NFT_PORT: u16 = 18080;
const NGINX_PORT: u16 = 18081;
const HAPROXY_PORT: u16 = 18082;

/// Measures everything; about a minute.
///
/// # Errors
/// Where the lab, the daemon or one of the others does not come up.
pub fn run() -> Result<Vec<Figure>> {
    let lab = Lab::up(Speaker::Bird, 1)?;
    // Replies to the client go back through the edge, so that plain routing takes the same way as the others.
    let node = lab.namespace(NODES[0].name);
    exec::ip_batch(Some(&node), &[format!("route add {CLIENT}/32 via {EDGE}")])?;
    let mut daemon = lab.start_edge(&without_dnat(&lab.edge_configuration("1s")))?;
    daemon.wait_ready(&lab, NODES.len() as u64, Duration::from_secs(30))?;
    start_nft(&lab)?;
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
    for (name, server) in ways {
        wait_for(&format!("{name} at {server}"), Duration::from_secs(10), || {
            lab.http("client", server, 1).map(|spread| spread.contains_key("ingress-1"))
        })?;
    }
    let (rounds, seconds) = if full() { (9, 5) } else { (5, 2) };
    let mut figures = Vec::new();
    for (kind, close) in [("requests", false), ("connections", true)] {
        let mut values = vec![Vec::new(); ways.len()];
        // Interleaved, so that what else the machine does meets all of them.
        for round in 0..rounds {
            eprintln!("e2e {kind}: round {} of {rounds}", round + 1);
            for ((name, server), values) in ways.iter().zip(&mut values) {
                values.push(
                    wrk(&lab, "client", *server, seconds, close).with_context(|| format!("wrk by way of {name}"))?,
                );
            }
        }
        let route = Figure::of("route", "1/s", &values[0], 0.0).median;
        for ((name, _), values) in ways.iter().zip(&values) {
            let mut figure = Figure::of(format!("e2e/{name}/{kind}"), "1/s", values, 0.0);
            figure.ratio = (route > 0.0).then(|| figure.median / route);
            figures.push(figure);
        }
    }
    daemon.stop()?;
    Ok(figures)
}

/// Without dnat services: their backends may send nothing past the edge that is not theirs, so plain-routed replies
/// from the same pods' ports would be dropped.
fn without_dnat(configuration: &str) -> String {
    let sections = configuration.split("\n[service.");
    sections.filter(|section| !section.contains("mode = \"dnat\"")).collect::<Vec<_>>().join("\n[service.")
}

fn start_nft(lab: &Lab) -> Result<()> {
    let pod = ingress(1).address;
    let rules = format!(
        "table ip bench {{\n chain prerouting {{ type nat hook prerouting priority dstnat; ip daddr {EDGE} tcp dport \
         {NFT_PORT} dnat to {pod}:80; }}\n chain postrouting {{ type nat hook postrouting priority srcnat; ip daddr \
         {pod} ct status dnat masquerade; }}\n}}\n"
    );
    let mut command: Command = lab.command("edge", exec::program("nft", "nftables")?)?;
    exec::run_with_input(command.args(["-f", "-"]), &rules).map(|_| ())
}

fn start_nginx(lab: &Lab) -> Result<()> {
    let folder = lab.folder();
    let file = folder.join("bench.nginx.conf");
    let text = format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\ndaemon off;\nmaster_process off;\n\
         pid {folder}/bench.nginx.pid;\nworker_rlimit_nofile 65536;\nevents {{ worker_connections 16384; }}\n\
         stream {{ server {{ listen {EDGE}:{NGINX_PORT} backlog=4096; proxy_pass {pod}:80; }} }}\n",
        folder = folder.display(),
        pod = ingress(1).address,
    );
    fs::write(&file, text).context("write nginx's configuration")?;
    let mut command = Command::new(exec::program("nginx", "nginx")?);
    command.arg("-e").arg("stderr").arg("-p").arg(&folder).arg("-c").arg(&file);
    lab.serve("edge", "nginx", &mut command)
}

fn start_haproxy(lab: &Lab) -> Result<()> {
    let file = lab.folder().join("bench.haproxy.cfg");
    let text = format!(
        "global\n maxconn 20000\n nbthread 1\ndefaults\n mode tcp\n timeout connect 5s\n timeout client 60s\n \
         timeout server 60s\nlisten bench\n bind {EDGE}:{HAPROXY_PORT}\n server pod {pod}:80\n",
        pod = ingress(1).address,
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
