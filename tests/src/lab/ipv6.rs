//! The same network once more in IPv6. Every IPv4 address has a counterpart, of which this file derives everything: the
//! bytes of the one are the last four words of the other.

use std::{
    fmt::Write as _,
    fs,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};

use super::{
    Lab,
    exec::{self, ip_batch, wait_for},
    netns,
    pods::{SERVICE_NAME, TCP_ECHO, UDP_ECHO, in_parallel},
    topology::{ASN, CLIENT, CLIENT2, EDGE, HOSTS, NODES, Node, Pod, ROUTER, cali, ingress, interface, node},
};

/// The pod networks of all nodes.
pub const PODS: &str = "fd00::a:1:0:0/96";
/// The link-local address that a pod's gateway has from its MAC address.
const GATEWAY: &str = "fe80::ecee:eeff:feee:eeee";

/// The IPv6 address of who has this IPv4 address.
pub const fn ipv6(address: Ipv4Addr) -> Ipv6Addr {
    let [a, b, c, d] = address.octets();
    Ipv6Addr::new(0xfd00, 0, 0, 0, a as u16, b as u16, c as u16, d as u16)
}

/// A port of the IPv6 VIP.
pub fn vip6(port: u16) -> SocketAddr {
    (ipv6(EDGE), port).into()
}

/// The pod network of a node.
fn block(node: Node) -> String {
    format!("{}/112", ipv6(Ipv4Addr::new(10, 1, node.index, 0)))
}

fn addresses(host: &str) -> Vec<(Ipv4Addr, &'static str)> {
    match host {
        "client" => vec![(CLIENT, "eth0")],
        "client2" => vec![(CLIENT2, "eth0")],
        "router" => vec![(ROUTER, "eth0"), (Ipv4Addr::new(203, 0, 113, 1), "eth1")],
        "edge" => vec![(EDGE, interface(host))],
        _ => node(host).map(|node| (node.address(), "eth0")).into_iter().collect(),
    }
}

fn host_commands(host: &str) -> Vec<String> {
    let behind_router = format!("{}/112", ipv6(Ipv4Addr::new(203, 0, 113, 0)));
    let mut lines: Vec<String> = addresses(host)
        .into_iter()
        .map(|(address, interface)| format!("addr add {}/112 dev {interface} nodad", ipv6(address)))
        .collect();
    match host {
        "client" | "router" => lines.push(format!("route add {PODS} via {}", ipv6(EDGE))),
        "edge" => lines.push(format!("route add {behind_router} via {}", ipv6(ROUTER))),
        "client2" => lines.push(format!("route add default via {}", ipv6(Ipv4Addr::new(203, 0, 113, 1)))),
        _ => lines.push(format!("route add {behind_router} via {}", ipv6(EDGE))),
    }
    lines
}

/// BIRD with one session to the edge. Its IPv4 sessions are another BIRD's.
fn bird_configuration(node: Node) -> String {
    let (local, edge, block) = (ipv6(node.address()), ipv6(EDGE), block(node));
    format!(
        r#"router id {id};
log stderr all;
protocol device {{ scan time 2; }}
protocol static pods {{ ipv6; route {block} blackhole; }}
protocol bgp edge {{
  local {local} as {ASN};
  neighbor {edge} as {ASN};
  multihop;
  graceful restart;
  connect delay time 1;
  connect retry time 2;
  error wait time 1, 5;
  ipv6 {{ import none; export where net = {block}; next hop self; }};
}}
"#,
        id = node.address(),
    )
}

impl Lab {
    /// Gives every host and the pods that run IPv6 addresses, routes, servers and BGP sessions beside those of IPv4, and
    /// the cluster's DNS AAAA records.
    ///
    /// # Errors
    /// Where something is refused or does not come up.
    pub fn add_ipv6(&mut self) -> Result<()> {
        let lab: &Self = self;
        in_parallel(&HOSTS, |host| lab.host_ipv6(host))?;
        let pods: Vec<Pod> = lab.state.pods.iter().map(|number| ingress(*number)).collect();
        in_parallel(&pods, |pod| lab.pod_ipv6(pod))?;
        in_parallel(&NODES, |node| lab.bird_ipv6(*node))?;
        self.change_zone(|zone| zone.dual_stack = true)
    }

    fn host_ipv6(&self, host: &str) -> Result<()> {
        let namespace = self.namespace(host);
        if host == "edge" || host == "router" || node(host).is_some() {
            netns::within(&namespace, || {
                fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").context("let it forward IPv6")
            })?;
        }
        ip_batch(Some(&namespace), &host_commands(host)).with_context(|| format!("IPv6 of {host}"))
    }

    fn pod_ipv6(&self, pod: &Pod) -> Result<()> {
        let (address, cali, namespace) = (ipv6(pod.address), cali(pod), self.namespace(&pod.name));
        let gateway =
            [format!("addr add {GATEWAY}/64 dev {cali} nodad"), format!("route add {address}/128 dev {cali}")];
        let node = self.namespace(pod.node.name);
        // The kernel has given the interface that address by itself, where it was left to.
        netns::within(&node, || {
            let path = format!("/proc/sys/net/ipv6/conf/{cali}/addr_gen_mode");
            fs::write(&path, "1").with_context(|| format!("set {path}"))
        })?;
        ip_batch(Some(&node), &["addr flush dev CALI scope link".replace("CALI", &cali)])?;
        ip_batch(Some(&node), &gateway)?;
        let commands =
            [format!("addr add {address}/128 dev eth0 nodad"), format!("route add default via {GATEWAY} dev eth0")];
        ip_batch(Some(&namespace), &commands)?;
        for (kind, port) in [("udp-echo", UDP_ECHO), ("tcp-echo", TCP_ECHO)] {
            let mut echo = Command::new(exec::product("edge-lab", "EDGE_LAB")?);
            echo.args([kind, "--listen", &format!("[{address}]:{port}"), "--name", &pod.name]);
            self.serve(&pod.name, &format!("{kind}-6"), &mut echo)?;
        }
        Ok(())
    }

    fn bird_ipv6(&self, node: Node) -> Result<()> {
        let file = |suffix: &str| self.folder().join(format!("{}.bird6.{suffix}", node.name));
        fs::write(file("conf"), bird_configuration(node)).context("write BIRD's configuration")?;
        let mut command = Command::new(exec::program("bird", "bird2")?);
        command.arg("-f").arg("-c").arg(file("conf")).arg("-s").arg(file("ctl")).arg("-P").arg(file("pid"));
        self.serve(node.name, "bird6", &mut command)?;
        wait_for(&format!("the second BIRD on {}", node.name), Duration::from_secs(5), || Ok(file("ctl").exists()))?;
        Ok(())
    }

    /// What the daemon's configuration needs besides that of [`Lab::edge_configuration`]: the sessions, and services on
    /// [`vip6`] like those on the IPv4 VIP.
    pub fn edge_configuration_ipv6(&self, valid: &str) -> String {
        let mut text = self
            .edge_configuration(valid)
            .replace("pod_networks = [\"10.1.0.0/16\"]", &format!("pod_networks = [\"10.1.0.0/16\", \"{PODS}\"]"));
        let _ = write!(text, "\n[bgp.group.calico6]\nremote_asn = {ASN}\nimport = [\"{PODS} le 128\"]\n");
        for node in NODES {
            let _ = write!(text, "\n[[bgp.peer]]\naddress = \"{}\"\ngroup = \"calico6\"\n", ipv6(node.address()));
        }
        for (name, port, protocol, target, mode) in [
            ("http6", super::edge::vip::HTTP, "tcp", 80, "full-nat"),
            ("http6-dnat", super::edge::vip::HTTP_DNAT, "tcp", 80, "dnat"),
            ("echo6", super::edge::vip::ECHO, "tcp", TCP_ECHO, "full-nat"),
            ("echo6-udp", super::edge::vip::UDP, "udp", UDP_ECHO, "full-nat"),
        ] {
            let _ = write!(
                text,
                "\n[service.{name}]\nlisten = [\"{}/{protocol}\"]\nbackends = {{ dns = \"{SERVICE_NAME}\", port = {target}, \
                 resolver = \"kube-dns\", record = \"aaaa\" }}\nmode = \"{mode}\"\n",
                vip6(port)
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pods_counterparts_lie_in_their_networks() {
        assert_eq!(ipv6(Ipv4Addr::new(10, 1, 2, 4)).to_string(), "fd00::a:1:2:4");
        assert_eq!(block(NODES[2]), "fd00::a:1:2:0/112");
        assert_eq!(vip6(80).to_string(), "[fd00::ac:10:1:58]:80");
    }
}
