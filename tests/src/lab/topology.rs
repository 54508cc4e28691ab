//! The network of the first seed: names, addresses, and the `ip` commands that make it.
//!
//! ```text
//!  203.0.113.10 client2 -- router 172.16.1.1 --+
//!                      172.16.1.50 client -----+-- fabric (a bridge) --+-- kcontrol 172.16.1.80  10.1.0.0/24
//!                      172.16.1.88 edge -------+                       +-- knode1   172.16.1.81  10.1.1.0/24
//!                                                                      +-- knode2   172.16.1.82  10.1.2.0/24
//! ```
//! Every host, node and pod is a network namespace `PREFIX-NAME`.

use std::net::Ipv4Addr;

/// The hosts, fabric aside.
pub const HOSTS: [&str; 7] = ["client", "client2", "router", "edge", "kcontrol", "knode1", "knode2"];
/// The Kubernetes nodes.
pub const NODES: [Node; 3] =
    [Node { name: "kcontrol", index: 0 }, Node { name: "knode1", index: 1 }, Node { name: "knode2", index: 2 }];
/// The edge's address, and the VIP of the lab's services.
pub const EDGE: Ipv4Addr = Ipv4Addr::new(172, 16, 1, 88);
/// The edge's interface.
pub const EDGE_INTERFACE: &str = "ens33";
/// The client on the edge's own network.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(172, 16, 1, 50);
/// The client behind the router.
pub const CLIENT2: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// The router between the fabric and the second client.
pub const ROUTER: Ipv4Addr = Ipv4Addr::new(172, 16, 1, 1);
/// A VIP of its own: on no interface and in no connected network, reached only where BGP announces it.
pub const DEDICATED_VIP: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 10);
/// The AS number of everyone.
pub const ASN: u32 = 64512;
/// The AS number of the router where it runs BGP ([`super::Lab::start_tor`]).
pub const TOR_ASN: u32 = 64513;
/// The link-layer address Calico gives to every pod's gateway.
pub const CALI_MAC: &str = "ee:ee:ee:ee:ee:ee";
/// The addresses of the kube-dns pods, both on kcontrol.
pub const DNS_PODS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 1, 0, 41), Ipv4Addr::new(10, 1, 0, 42)];
/// Most ingress pods: three to a last octet, from .4 up to the kube-dns pods.
pub const MOST_PODS: usize = 3 * 37;

/// A Kubernetes node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// Host name.
    pub name: &'static str,
    /// Third octet of its pod network.
    pub index: u8,
}

impl Node {
    /// Address on the fabric.
    pub const fn address(self) -> Ipv4Addr {
        Ipv4Addr::new(172, 16, 1, 80 + self.index)
    }

    /// Its pod network.
    pub fn block(self) -> String {
        format!("10.1.{}.0/24", self.index)
    }
}

/// The node of this name.
pub fn node(name: &str) -> Option<Node> {
    NODES.into_iter().find(|node| node.name == name)
}

/// A pod: a namespace behind a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Name, unique in the lab.
    pub name: String,
    /// The node it runs on.
    pub node: Node,
    /// Its address.
    pub address: Ipv4Addr,
}

/// Ingress pod `number`, from 1: one per node, then the next address on each.
pub fn ingress(number: usize) -> Pod {
    let node = NODES[(number - 1) % NODES.len()];
    let last = 4 + u8::try_from((number - 1) / NODES.len()).unwrap_or(u8::MAX - 4);
    Pod { name: format!("ingress-{number}"), node, address: Ipv4Addr::new(10, 1, node.index, last) }
}

/// kube-dns pod `index`, 0 or 1.
pub fn kube_dns(index: usize) -> Pod {
    Pod { name: format!("kube-dns-{}", index + 1), node: NODES[0], address: DNS_PODS[index] }
}

/// The commands for the fabric's namespace: the bridge, and one veth pair to each host on it.
pub fn fabric_commands(prefix: &str) -> Vec<String> {
    let mut lines = vec!["link add br0 type bridge".to_owned(), "link set br0 up".to_owned()];
    for host in HOSTS.iter().filter(|host| **host != "client2") {
        let interface = interface(host);
        lines.push(format!("link add p-{host} type veth peer name {interface} netns {prefix}-{host}"));
        lines.push(format!("link set p-{host} master br0 up"));
    }
    lines
}

/// The interface of a host towards the fabric.
pub fn interface(host: &str) -> &'static str {
    if host == "edge" { EDGE_INTERFACE } else { "eth0" }
}

/// The commands inside a host's namespace, once the fabric has given it its interface.
pub fn host_commands(prefix: &str, host: &str) -> Vec<String> {
    let lines: &[&str] = match host {
        // Pod networks by way of the edge: the plain-routed connections that scenarios compare with.
        "client" => &["addr add 172.16.1.50/24 dev eth0", "link set eth0 up", "route add 10.1.0.0/16 via 172.16.1.88"],
        "router" => &[
            "addr add 172.16.1.1/24 dev eth0",
            "link set eth0 up",
            "link add eth1 type veth peer name eth0 netns {prefix}-client2",
            "addr add 203.0.113.1/24 dev eth1",
            "link set eth1 up",
            "route add 10.1.0.0/16 via 172.16.1.88",
        ],
        "edge" => {
            &["addr add 172.16.1.88/24 dev ens33", "link set ens33 up", "route add 203.0.113.0/24 via 172.16.1.1"]
        }
        "client2" => &["addr add 203.0.113.10/24 dev eth0", "link set eth0 up", "route add default via 203.0.113.1"],
        _ => &[],
    };
    let mut lines: Vec<String> = lines.iter().map(|line| line.replace("{prefix}", prefix)).collect();
    if let Some(node) = node(host) {
        lines.push(format!("addr add {}/24 dev eth0", node.address()));
        lines.extend(node_link_commands());
    }
    lines.push("link set lo up".to_owned());
    lines
}

/// What a node needs again after its link has been down. The route to the clients behind the router leads back
/// through the edge, which dnat services need; a real edge announces it by BGP, here it is static.
pub fn node_link_commands() -> Vec<String> {
    vec!["link set eth0 up".to_owned(), format!("route replace 203.0.113.0/24 via {EDGE}")]
}

/// The commands on a pod's node: the veth pair and the /32 route, as Calico makes them.
pub fn pod_node_commands(prefix: &str, pod: &Pod) -> Vec<String> {
    let (name, address) = (&pod.name, pod.address);
    let cali = cali(pod);
    vec![
        format!("link add {cali} address {CALI_MAC} type veth peer name eth0 netns {prefix}-{name}"),
        format!("link set {cali} up"),
        format!("route add {address}/32 dev {cali} scope link"),
    ]
}

/// The node's end of a pod's veth pair.
pub fn cali(pod: &Pod) -> String {
    format!("cali{}", pod.name.replace("ingress-", "i").replace("kube-dns-", "d"))
}

/// The commands inside a pod. Calico answers ARP for 169.254.1.1 by proxy; a permanent neighbour says the same.
pub fn pod_commands(pod: &Pod) -> Vec<String> {
    vec![
        "link set lo up".to_owned(),
        format!("addr add {}/32 dev eth0", pod.address),
        "link set eth0 up".to_owned(),
        format!("neigh add 169.254.1.1 lladdr {CALI_MAC} dev eth0 nud permanent"),
        "route add 169.254.1.1/32 dev eth0 scope link".to_owned(),
        "route add default via 169.254.1.1 dev eth0".to_owned(),
    ]
}

/// Kernel settings of a host, as paths under /proc/sys/net/ipv4.
pub fn sysctls(host: &str) -> Vec<(String, &'static str)> {
    let own = |key: &str, value| {
        let interface = interface(host);
        [format!("conf/all/{key}"), format!("conf/default/{key}"), format!("conf/{interface}/{key}")]
            .map(|p| (p, value))
    };
    let mut settings = Vec::new();
    match host {
        // full-nat sends packets whose source is the edge's own address through the edge's stack.
        "edge" => {
            settings.extend(own("rp_filter", "2"));
            settings.extend(own("accept_local", "1"));
            settings.extend(own("send_redirects", "0"));
            settings.push(("ip_forward".to_owned(), "1"));
        }
        // New namespaces inherit the machine's settings, so the permissive ones are said too.
        _ => settings.extend(own("rp_filter", "0")),
    }
    if host == "router" || node(host).is_some() {
        settings.extend(own("send_redirects", "0"));
        settings.push(("ip_forward".to_owned(), "1"));
    }
    settings
}
