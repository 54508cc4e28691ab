//! The edge as the top-of-rack router of a Calico cluster that advertises service addresses: each advertised range goes to
//! all nodes, a service with local endpoints to its own, and the kernel and its packets follow.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first broken assumption")]

mod common;

use std::{
    collections::BTreeSet,
    fs,
    net::{SocketAddr, TcpStream},
};

use common::{
    Daemon, Namespace,
    bgp::{Edge, PATIENCE, config, peer, rule},
    eventually, run,
    speakers::missing,
};
use edge_ctl::{
    config::valid,
    fib::{self, FibHandle, FibOptions},
    model::RouteUpdate,
};
use tempfile::TempDir;
use tokio::sync::mpsc;

const HOSTS: [u8; 3] = [10, 11, 12];
/// A service of the cluster's range, and one of the external range.
const SERVICE: &str = "10.49.62.131";
const EXTERNAL: &str = "192.168.3.7";

const RANGE: &str = "10.49.0.0/16";
const EXTERNAL_RANGE: &str = "192.168.3.0/24";

/// The router 192.168.1.1 and three nodes on one network.
struct Rack {
    _switch: Namespace,
    router: Namespace,
    nodes: Vec<Namespace>,
    folder: TempDir,
    daemons: Vec<Daemon>,
}

impl Rack {
    fn new() -> Self {
        let (switch, router) = (Namespace::new("switch"), Namespace::new("router"));
        switch.ip("link add br0 type bridge");
        switch.ip("link set br0 up");
        let plug = |namespace: &Namespace, port: &str, host: u8| {
            run(
                "ip",
                &[
                    "-n",
                    &switch.name,
                    "link",
                    "add",
                    port,
                    "type",
                    "veth",
                    "peer",
                    "name",
                    "eth2",
                    "netns",
                    &namespace.name,
                ],
            );
            switch.ip(&format!("link set {port} master br0 up"));
            namespace.ip("link set eth2 up");
            namespace.ip(&format!("addr add 192.168.1.{host}/24 dev eth2"));
        };
        plug(&router, "router", 1);
        let node = |host: &u8| {
            let node = Namespace::new("node");
            plug(&node, &format!("node{host}"), *host);
            // What kube-proxy would answer for.
            for address in [SERVICE, EXTERNAL] {
                node.ip(&format!("addr add {address}/32 dev lo"));
            }
            node
        };
        let nodes = HOSTS.iter().map(node).collect();
        // By ports too, so that connections of one client spread.
        let policy = ["-q", "-w", "net.ipv4.fib_multipath_hash_policy=1"];
        assert!(router.command("sysctl").args(policy).status().unwrap().success());
        Self { _switch: switch, router, nodes, folder: TempDir::new().unwrap(), daemons: vec![] }
    }

    /// A node's BIRD with each advertisement as a protocol that can be turned on and off.
    fn bird(&mut self, host: u8) {
        let body = format!(
            "router id 192.168.1.{host};\nprotocol device {{}}\n\
             protocol static of_cluster {{ ipv4; route 10.49.0.0/16 blackhole; }}\n\
             protocol static of_local {{ disabled; ipv4; route {SERVICE}/32 blackhole; }}\n\
             protocol static of_external {{ disabled; ipv4; route 192.168.3.0/24 blackhole; }}\n\
             protocol bgp tor {{ local 192.168.1.{host} as 64512; neighbor 192.168.1.1 as 64512; strict bind yes; \
             graceful restart on; connect delay time 1; connect retry time 1; error wait time 1, 1; \
             ipv4 {{ import all; export where source = RTS_STATIC; next hop self; }}; }}\n"
        );
        let path = |suffix: &str| self.folder.path().join(format!("{host}.{suffix}"));
        fs::write(path("conf"), body).unwrap();
        let mut command = self.nodes[usize::from(host - HOSTS[0])].command("bird");
        command.arg("-f").arg("-c").arg(path("conf")).arg("-s").arg(path("ctl")).arg("-P").arg(path("pid"));
        let daemon = Daemon::start(&mut command, &path("log"));
        self.daemons.push(daemon);
        eventually("BIRD answers", PATIENCE, || {
            let answer = self.birdc(host, "show status");
            if answer.contains("Daemon is up") { Ok(()) } else { Err(answer) }
        });
    }

    fn birdc(&self, host: u8, command: &str) -> String {
        let mut birdc = std::process::Command::new("birdc");
        let output =
            birdc.arg("-s").arg(self.folder.path().join(format!("{host}.ctl"))).args(command.split(' ')).output();
        String::from_utf8_lossy(&output.unwrap().stdout).into_owned()
    }

    /// The last octets of the next hops that the router's kernel has for exactly this prefix.
    fn hops(&self, prefix: &str) -> BTreeSet<String> {
        let output =
            self.router.command("ip").args(["route", "show", "exact", prefix, "proto", "bgp"]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.split("via 192.168.1.").skip(1).filter_map(|rest| rest.split(' ').next()).map(str::to_owned).collect()
    }

    /// Packets to the service that each node has taken, of many connections from many ports.
    fn takers(&self, service: &str) -> BTreeSet<u8> {
        let before = self.taken();
        self.router.block_on(|| async {
            let address: SocketAddr = format!("{service}:9").parse().unwrap();
            for _ in 0..90 {
                // Nobody listens: the node's refusal shows that the packet has arrived.
                assert!(TcpStream::connect_timeout(&address, PATIENCE).is_err());
            }
        });
        let after = self.taken();
        let counts = before.iter().zip(&after).map(|(before, after)| after - before);
        assert_eq!(counts.clone().sum::<u64>(), 90, "every connection reached one node");
        HOSTS.into_iter().zip(counts).filter(|(_, count)| *count > 0).map(|(host, _)| host).collect()
    }

    /// Resets sent by each node's kernel.
    fn taken(&self) -> Vec<u64> {
        let count = |node: &Namespace| {
            let output = node.command("nstat").args(["-az", "--json", "TcpOutRsts"]).output().unwrap();
            let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            value["kernel"]["TcpOutRsts"].as_u64().unwrap()
        };
        self.nodes.iter().map(count).collect()
    }
}

/// The speaker's decisions as they stand, in the kernel.
async fn install(edge: &Edge, fib: &FibHandle) {
    let update = |prefix: &str| RouteUpdate {
        prefix: prefix.parse().unwrap(),
        next_hops: edge.hops(prefix).iter().map(|hop| hop.parse().unwrap()).collect(),
        internal: true,
    };
    fib.apply([RANGE, "10.49.62.131/32", EXTERNAL_RANGE].map(update).to_vec()).await;
}

fn octets(hosts: &[u8]) -> BTreeSet<String> {
    hosts.iter().map(u8::to_string).collect()
}

fn addresses(hosts: &[u8]) -> Vec<String> {
    hosts.iter().map(|host| format!("192.168.1.{host}")).collect()
}

#[test]
fn service_ranges_of_a_calico_cluster_go_to_all_nodes_and_a_local_service_to_its_own_and_packets_follow() {
    let name = "service_ranges_of_a_calico_cluster_go_to_all_nodes_and_a_local_service_to_its_own_and_packets_follow";
    if missing(name, &["bird", "birdc", "nstat"]) {
        return;
    }
    let mut rack = Rack::new();
    HOSTS.into_iter().for_each(|host| rack.bird(host));
    let import = || Some(vec![rule(RANGE, 16, 32), rule(EXTERNAL_RANGE, 24, 32)]);
    let node = |host: &u8| valid::Peer { import: import(), ..peer(&format!("192.168.1.{host}"), 64512) };
    rack.router.block_on(|| async {
        let (events, mut inbox) = mpsc::channel(64);
        tokio::spawn(async move { while inbox.recv().await.is_some() {} });
        let fib = fib::spawn(FibOptions::default(), events).await.unwrap();
        let bgp = valid::Bgp { router_id: "192.168.1.1".parse().unwrap(), ..config(HOSTS.iter().map(node)) };
        let mut edge = Edge::start(bgp).await;
        let agrees =
            |prefix: &'static str, hosts: &'static [u8]| move |edge: &Edge| edge.hops(prefix) == addresses(hosts);
        let in_kernel = |prefix: &str, hosts: &[u8]| {
            let wanted = octets(hosts);
            eventually("the kernel", PATIENCE, || match rack.hops(prefix) {
                found if found == wanted => Ok(()),
                found => Err(format!("{prefix}: {found:?} instead of {wanted:?}")),
            });
        };
        // The cluster's range: every node.
        edge.until("three next hops", agrees(RANGE, &HOSTS)).await;
        install(&edge, &fib).await;
        in_kernel(RANGE, &HOSTS);
        assert_eq!(rack.takers(SERVICE), HOSTS.into());
        // The service with local endpoints on two of them, beside the range.
        [11, 12].into_iter().for_each(|host| drop(rack.birdc(host, "enable of_local")));
        edge.until("two next hops", agrees("10.49.62.131/32", &[11, 12])).await;
        install(&edge, &fib).await;
        in_kernel("10.49.62.131/32", &[11, 12]);
        in_kernel(RANGE, &HOSTS);
        assert_eq!(rack.takers(SERVICE), [11, 12].into());
        // The external range in place of the cluster's.
        for host in HOSTS {
            for order in ["enable of_external", "disable of_cluster", "disable of_local"] {
                rack.birdc(host, order);
            }
        }
        edge.until("the external range", agrees(EXTERNAL_RANGE, &HOSTS)).await;
        edge.until("nothing of the cluster's", |edge| edge.routes.len() == 1).await;
        install(&edge, &fib).await;
        in_kernel(EXTERNAL_RANGE, &HOSTS);
        in_kernel(RANGE, &[]);
        in_kernel("10.49.62.131/32", &[]);
        assert_eq!(rack.takers(EXTERNAL), HOSTS.into());
    });
}
