//! End to end through the lab: requests and connections per second of the edge, relative to plain routing, nft,
//! nginx stream and HAProxy, all measured in turn within the same run.
//!
//! `e2e/edge` is what `hook = "auto"` makes of the lab's veth: TC. `e2e/edge-xdp` is native XDP there, which a second part of the run
//! measures beside `e2e/route-xdp`: plain routing past the same program. On a veth it costs every packet, plain-routed ones too, a
//! copy on arrival (`veth_convert_skb_to_xdp_buff`) and a new skb on departure, which NICs do not ask for.
//!
//! CPU per request: what the whole machine was busy for (`/proc/stat`: user, system, interrupts; no steal) in a round of requests,
//! by the requests, less the same for `direct`: the same client's requests to the same pod from the pod's own node. What is left is
//! the way over the fabric and the edge: forwarding, and whatever the edge's program or process does. Needs a machine that does
//! nothing else.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    process::Command,
    time::{Duration, Instant},
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
/// The way that does not leave the pod's node.
const DIRECT: &str = "direct";
/// Addresses of the one pod. Whoever rewrites the source has the edge's ports only once per backend address, and a
/// closed connection's port rests a minute: one address would measure that. One server process answers for all of
/// them, so that routing to one of them is the same work.
const ADDRESSES: u8 = 16;

/// What requests go by, and to where.
struct Way {
    name: &'static str,
    /// Where the client runs.
    host: &'static str,
    server: SocketAddr,
}

/// Rounds of each way, and seconds of one.
struct Length {
    rounds: u32,
    seconds: u32,
}

/// Measures everything; about three minutes.
///
/// # Errors
/// Where the lab, the daemon or one of the others does not come up.
pub fn run() -> Result<Vec<Figure>> {
    let lab = Lab::up(Speaker::Bird, 1)?;
    prepare(&lab)?;
    start_nginx(&lab)?;
    start_haproxy(&lab)?;
    let length = if full() { Length { rounds: 9, seconds: 5 } } else { Length { rounds: 7, seconds: 2 } };
    let way = |name, server: SocketAddr| Way { name, host: "client", server };
    let pod: SocketAddr = (ingress(1).address, 80).into();
    let edge: SocketAddr = (EDGE, vip::HTTP).into();
    let ways = [
        way("route", pod),
        way("edge", edge),
        way("nft", (EDGE, NFT_PORT).into()),
        way("nginx", (EDGE, NGINX_PORT).into()),
        way("haproxy", (EDGE, HAPROXY_PORT).into()),
        Way { name: DIRECT, host: ingress(1).node.name, server: pod },
    ];
    let mut figures = with_hook(&lab, "auto", &ways, &length)?;
    figures.extend(with_hook(&lab, "xdp-native", &[way("route-xdp", pod), way("edge-xdp", edge)], &length)?);
    Ok(figures)
}

/// Measures these ways, with the daemon's program at this hook. The first is what the others are relative to.
fn with_hook(lab: &Lab, hook: &str, ways: &[Way], length: &Length) -> Result<Vec<Figure>> {
    let configuration = without_dnat(&lab.edge_configuration("1s"));
    let mut daemon = lab.start_edge(&configuration.replace("hook = \"xdp-native\"", &format!("hook = \"{hook}\"")))?;
    daemon.wait_ready(lab, NODES.len() as u64, Duration::from_secs(30))?;
    start_nft(lab)?;
    for Way { name, host, server } in ways {
        wait_for(&format!("{name} at {server}"), Duration::from_secs(10), || {
            lab.http(host, *server, 1).map(|spread| spread.contains_key("ingress-1"))
        })?;
    }
    stop_nft(lab)?;
    let requests = rounds(lab, ways, length, false)?;
    // Connections in short rounds: their number is what uses ports up.
    let connections = rounds(lab, ways, &Length { seconds: 1, ..*length }, true)?;
    daemon.stop()?;
    Ok([relative(ways, "requests", &requests), relative(ways, "connections", &connections), cpu(ways, &requests)]
        .concat())
}

/// What one turn of a way came to.
#[derive(Clone, Copy)]
struct Turn {
    /// Requests per second.
    rate: f64,
    /// CPU seconds of the whole machine for each request.
    cpu: f64,
}

/// All ways in turn, round by round, so that what else the machine does meets all of them; the turns of each way.
fn rounds(lab: &Lab, ways: &[Way], length: &Length, close: bool) -> Result<Vec<Vec<Turn>>> {
    let mut turns = vec![Vec::new(); ways.len()];
    for round in 0..length.rounds {
        eprintln!("e2e {}: round {} of {}", if close { "connections" } else { "requests" }, round + 1, length.rounds);
        for (way, turns) in ways.iter().zip(&mut turns) {
            // Only for its own turn: with a nat chain the kernel tracks plain-routed connections as well.
            let nft = way.name == "nft";
            if nft {
                start_nft(lab)?;
            }
            let (before, start) = (busy()?, Instant::now());
            let rate = wrk(lab, way.host, way.server, length.seconds, close)
                .with_context(|| format!("wrk by way of {}", way.name))?;
            let requests = rate * start.elapsed().as_secs_f64();
            turns.push(Turn { rate, cpu: (busy()? - before) / requests });
            if nft {
                stop_nft(lab)?;
            }
        }
    }
    Ok(turns)
}

/// CPU seconds that the machine has been busy for.
fn busy() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    busy_ticks(&text).map(|ticks| ticks as f64 / super::TICKS).context("/proc/stat has no line of all CPUs")
}

/// User, nice, system, interrupts and soft interrupts of all CPUs (proc(5)).
fn busy_ticks(stat: &str) -> Option<u64> {
    let all = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let fields: Vec<u64> = all.split_whitespace().map_while(|field| field.parse().ok()).collect();
    match fields[..] {
        [user, nice, system, _idle, _iowait, irq, softirq, ..] => Some(user + nice + system + irq + softirq),
        _ => None,
    }
}

/// Rates, with what they are of the first way's.
fn relative(ways: &[Way], kind: &str, turns: &[Vec<Turn>]) -> Vec<Figure> {
    let rates = |turns: &Vec<Turn>| turns.iter().map(|turn| turn.rate).collect::<Vec<_>>();
    let named = |way: &Way, turns| Figure::net(format!("e2e/{}/{kind}", way.name), "1/s", rates(turns), 0.0);
    let figures = ways.iter().zip(turns).filter(|(way, _)| way.name != DIRECT).map(|(way, turns)| named(way, turns));
    to_the_first(figures.collect())
}

/// CPU per request, less what a request takes that does not leave the node.
fn cpu(ways: &[Way], turns: &[Vec<Turn>]) -> Vec<Figure> {
    let costs = |turns: &Vec<Turn>| turns.iter().map(|turn| turn.cpu).collect::<Vec<_>>();
    let Some(direct) = ways.iter().zip(turns).find(|(way, _)| way.name == DIRECT).map(|(_, turns)| costs(turns)) else {
        return Vec::new();
    };
    let direct = Figure::net(String::new(), "cpu", direct, 0.0).median;
    let named =
        |way: &Way, turns| Figure::net(format!("e2e/{}/cpu-per-request", way.name), "cpu", costs(turns), direct);
    let figures = ways.iter().zip(turns).filter(|(way, _)| way.name != DIRECT).map(|(way, turns)| named(way, turns));
    to_the_first(figures.collect())
}

fn to_the_first(mut figures: Vec<Figure>) -> Vec<Figure> {
    let first = figures.first().map_or(0.0, |figure| figure.median);
    for figure in &mut figures {
        figure.ratio = (first > 0.0).then(|| figure.median / first);
    }
    figures
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
    fn idle_waiting_and_stolen_time_is_not_busy() {
        let stat = "cpu  1 20 300 4000 50000 600000 7000000 80000000 0 0\ncpu0 1 1 1 1 1 1 1 1 1 1\nintr 7\n";
        assert_eq!(busy_ticks(stat), Some(7_600_321));
        assert_eq!(busy_ticks("cpu0 1 1 1 1 1 1 1 1 1 1\n"), None);
    }

    #[test]
    fn only_the_sections_of_dnat_services_are_left_out() {
        let text =
            "[edge]\n\n[service.a]\nmode = \"full-nat\"\n\n[service.b]\nmode = \"dnat\"\n\n[service.c]\nlisten = []\n";
        let kept = without_dnat(text);
        assert!(kept.starts_with("[edge]\n") && kept.contains("[service.a]") && kept.contains("[service.c]"), "{kept}");
        assert!(!kept.contains("service.b") && !kept.contains("dnat"), "{kept}");
    }
}
