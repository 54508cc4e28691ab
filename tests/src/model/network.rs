//! The routes and neighbours of the world: a base that every world starts from, and the few things that change in it.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    process::Command,
};

use anyhow::Result;
use edge_common::address::Wide;
use edge_ctl::reconcile::ports::socket_address;

use super::state::Route;
use crate::{
    datapath::{
        namespace::{ifindex, ip, sysctl},
        rig::{
            CLIENT, CLIENT_MAC, CLIENT6, FAMILIES, Family, PODS, PODS_MAC, SNAT, UPLINK_MAC, VIP, VIP6, mac, pod,
            pod_mac, pod6, wire,
        },
    },
    lab::exec::run,
};

/// A host behind a gateway on `uplink`.
pub const FAR: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
/// As [`FAR`], by a route with a small MTU.
pub const FAR_NARROW: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 200);
/// Another host on `uplink`.
pub const NEAR: Ipv4Addr = Ipv4Addr::new(172, 16, 1, 11);
/// A host on `uplink` whose MAC is not known.
pub const SILENT: Ipv4Addr = Ipv4Addr::new(172, 16, 1, 99);
/// A host whose route refuses.
pub const REFUSED: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 5);
/// A host without a route.
pub const NOWHERE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// A pod whose MAC is not known.
pub const SILENT_POD: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 200);
/// A pod behind a node, by a route whose MTU changes.
pub const NARROW_POD: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 1);
/// A pod whose route refuses.
pub const REFUSED_POD: Ipv4Addr = Ipv4Addr::new(10, 3, 0, 1);
/// A pod behind an IPv6 gateway.
pub const FOREIGN_POD: Ipv4Addr = Ipv4Addr::new(10, 4, 0, 1);
/// A pod behind an interface that XDP cannot redirect to.
pub const STUB_POD: Ipv4Addr = Ipv4Addr::new(10, 5, 0, 1);
/// A pod whose route changes its interface.
pub const MOVING_POD: Ipv4Addr = Ipv4Addr::new(10, 6, 0, 1);
/// The pod whose MAC changes, and which may be unresolved.
pub const CHANGING: u8 = 2;

const GATEWAY: Ipv4Addr = Ipv4Addr::new(172, 16, 1, 1);
const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 1, 1];
const NEAR_MAC: [u8; 6] = [2, 0, 0, 0, 1, 11];
const STUB_MAC: [u8; 6] = [2, 0, 0, 0, 9, 3];
const STUB_POD_MAC: [u8; 6] = [2, 0, 0, 0, 5, 1];
const FOREIGN_MAC: [u8; 6] = [2, 0, 0, 0, 6, 6];

/// Where a host is in the world of this family: each place has an IPv4 address, by which it is named here, and an IPv6 one.
pub fn at(family: Family, place: Ipv4Addr) -> IpAddr {
    family.of(place, twin(place))
}

fn twin(place: Ipv4Addr) -> Ipv6Addr {
    let network = match place.octets() {
        _ if place == CLIENT => return CLIENT6,
        _ if place == VIP => return VIP6,
        [10, 1, 0, last] if last >= 4 && last - 4 < PODS => return pod6(last - 4),
        [172, 16, ..] => 1,
        [10, 1, ..] => 2,
        [10, second, ..] => 0x20 + u16::from(second),
        [198, ..] => 0xf,
        [203, ..] => 0xe,
        _ => 0xd,
    };
    Ipv6Addr::new(0x2001, 0xdb8, network, 0, 0, 0, 0, place.octets()[3].into())
}

/// MTU of the route to [`FAR_NARROW`].
fn narrow(family: Family) -> u32 {
    // IPv6 has none below 1280.
    if family == Family::V6 { 1300 } else { 600 }
}

/// What changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Last byte of the MAC of pod [`CHANGING`]; 0: unresolved.
    pub mac: u8,
    /// MTU of the route to [`NARROW_POD`]; IPv6 has none below 1280, and takes twice as much.
    pub mtu: u32,
    /// [`MOVING_POD`] is reached by `uplink`.
    pub moved: bool,
}

impl Shape {
    fn mtu(self, family: Family) -> u32 {
        if family == Family::V6 { self.mtu.max(650) * 2 } else { self.mtu }
    }
}

/// What every world starts with.
pub const BASE: Shape = Shape { mac: 77, mtu: 600, moved: false };

/// The namespace's network.
pub struct Network {
    /// Towards clients.
    pub uplink: u32,
    /// Towards pods.
    pub pods: u32,
    /// An interface that XDP cannot redirect to.
    pub stub: u32,
    shape: Shape,
}

impl Network {
    /// Adds what a rig's two links lack.
    ///
    /// # Errors
    /// Where `ip` refuses something.
    pub fn new() -> Result<Self> {
        for interface in ["uplink", "pods"] {
            sysctl(&format!("ipv6/conf/{interface}/disable_ipv6"), "0")?;
        }
        ip("link add stub type veth peer name stub-peer")?;
        sysctl("ipv6/conf/stub/disable_ipv6", "0")?;
        ip(&format!("link set stub address {} up", mac(STUB_MAC)))?;
        ip("link set stub-peer up")?;
        let mut lines = vec![format!("neigh replace fe80::66 lladdr {} dev pods nud permanent", mac(FOREIGN_MAC))];
        for family in FAMILIES {
            let at = |place| at(family, place);
            for (place, mac_address, device) in
                [(GATEWAY, GATEWAY_MAC, "uplink"), (NEAR, NEAR_MAC, "uplink"), (STUB_POD, STUB_POD_MAC, "stub")]
            {
                let mac_address = mac(mac_address);
                lines.push(format!("neigh replace {} lladdr {mac_address} dev {device} nud permanent", at(place)));
            }
            let (gateway, inet6) = (at(GATEWAY), if family == Family::V4 { "inet6 " } else { "" });
            for route in [
                format!("{} via {gateway}", at(FAR)),
                format!("{} via {gateway} mtu lock {}", at(FAR_NARROW), narrow(family)),
                format!("unreachable {}", at(REFUSED)),
                format!("blackhole {}", at(REFUSED_POD)),
                format!("{} via {inet6}fe80::66 dev pods", at(FOREIGN_POD)),
                format!("{} dev stub", at(STUB_POD)),
            ] {
                lines.push(format!("{} route add {route}", option(family)));
            }
        }
        lines.iter().try_for_each(|line| ip(line))?;
        let (uplink, pods, stub) = (ifindex("uplink")?, ifindex("pods")?, ifindex("stub")?);
        let mut network = Self { uplink, pods, stub, shape: Shape { mac: 1, mtu: 1, moved: true } };
        network.become_(BASE)?;
        Ok(network)
    }

    /// What it is now.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Changes what differs.
    ///
    /// # Errors
    /// Where `ip` refuses something.
    pub fn become_(&mut self, shape: Shape) -> Result<()> {
        for family in FAMILIES {
            let (changing, ip) = (at(family, pod(CHANGING)), |line: String| ip(&format!("{} {line}", option(family))));
            if shape.mac != self.shape.mac {
                match shape.mac {
                    0 => ip(format!("neigh del {changing} dev pods"))?,
                    last => {
                        let address = mac([2, 0, 0, 0, 7, last]);
                        ip(format!("neigh replace {changing} lladdr {address} dev pods nud permanent"))?;
                    }
                }
            }
            if shape.mtu != self.shape.mtu {
                let (pod, by) = (at(family, NARROW_POD), at(family, pod(0)));
                ip(format!("route replace {pod} via {by} dev pods mtu lock {}", shape.mtu(family)))?;
            }
            if shape.moved != self.shape.moved {
                let by = at(family, if shape.moved { GATEWAY } else { pod(1) });
                ip(format!("route replace {} via {by}", at(family, MOVING_POD)))?;
            }
        }
        self.shape = shape;
        Ok(())
    }

    /// Next hops that the kernel should know and does not: where there are any, a difference between program and model says
    /// nothing about the program. All of them are permanent, which no shortage of the host-wide neighbour table takes away.
    ///
    /// # Errors
    /// Where `ip` fails.
    pub fn lost(&self) -> Result<Vec<String>> {
        let mut known = String::new();
        for family in ["-4", "-6"] {
            known += &run(Command::new("ip").args([family, "neigh", "show", "nud", "permanent"]))?;
        }
        let expected = self.routes().into_iter().filter_map(|(_, _, _, route)| match route {
            Route::Neighbour { address, dst_mac, .. } => {
                let address = socket_address(address, 0).ip();
                Some((format!("{address} "), format!("lladdr {} ", mac(dst_mac))))
            }
            _ => None,
        });
        let is_lost = |(address, lladdr): &(String, String)| {
            !known.lines().any(|line| line.starts_with(address) && line.contains(lladdr))
        };
        Ok(expected.filter(is_lost).map(|(address, lladdr)| address + &lladdr).collect())
    }

    /// The routes that the kernel has, as its lookup answers them: IPv6 or not, network and length in the form of 16 bytes.
    pub fn routes(&self) -> Vec<(bool, Wide, u8, Route)> {
        FAMILIES.into_iter().flat_map(|family| self.routes_of(family)).collect()
    }

    fn routes_of(&self, family: Family) -> Vec<(bool, Wide, u8, Route)> {
        let by = |ifindex, place: Ipv4Addr, dst_mac, src_mac, mtu| Route::Neighbour {
            ifindex,
            address: wire(at(family, place)),
            dst_mac,
            src_mac,
            mtu,
        };
        let uplink = |place, dst_mac, mtu| by(self.uplink, place, dst_mac, UPLINK_MAC, mtu);
        let pods = |place, dst_mac, mtu| by(self.pods, place, dst_mac, PODS_MAC, mtu);
        let foreign = Route::Neighbour {
            ifindex: self.pods,
            address: wire(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x66)),
            dst_mac: FOREIGN_MAC,
            src_mac: PODS_MAC,
            mtu: 1500,
        };
        let mut hosts = vec![
            (VIP, Route::NotForwarded),
            (SNAT, Route::NotForwarded),
            (CLIENT, uplink(CLIENT, CLIENT_MAC, 1500)),
            (NEAR, uplink(NEAR, NEAR_MAC, 1500)),
            (GATEWAY, uplink(GATEWAY, GATEWAY_MAC, 1500)),
            (FAR, uplink(GATEWAY, GATEWAY_MAC, 1500)),
            (FAR_NARROW, uplink(GATEWAY, GATEWAY_MAC, narrow(family))),
            (REFUSED, Route::Refused),
            (REFUSED_POD, Route::Refused),
            (NARROW_POD, pods(pod(0), pod_mac(0), self.shape.mtu(family))),
            (STUB_POD, by(self.stub, STUB_POD, STUB_POD_MAC, STUB_MAC, 1500)),
            (FOREIGN_POD, foreign),
        ];
        for n in (0..PODS).filter(|n| *n != CHANGING) {
            hosts.push((pod(n), pods(pod(n), pod_mac(n), 1500)));
        }
        if self.shape.mac != 0 {
            hosts.push((pod(CHANGING), pods(pod(CHANGING), [2, 0, 0, 0, 7, self.shape.mac], 1500)));
        }
        let moving = if self.shape.moved { uplink(GATEWAY, GATEWAY_MAC, 1500) } else { pods(pod(1), pod_mac(1), 1500) };
        hosts.push((MOVING_POD, moving));
        let v6 = family == Family::V6;
        let mut routes: Vec<_> =
            hosts.into_iter().map(|(place, route)| (v6, wire(at(family, place)), 128, route)).collect();
        let connected = |place| (v6, wire(at(family, place)), if v6 { 64 } else { 96 + 24 }, Route::Unresolved);
        routes.extend([connected(VIP), connected(SNAT)]);
        // Broadcasts; of IPv6 the routers' own anycast addresses (RFC 4291, 2.6.1).
        for network in [VIP, SNAT] {
            let [a, b, c, _] = network.octets();
            let last = if v6 { 0 } else { 255 };
            routes.push((v6, wire(at(family, Ipv4Addr::new(a, b, c, last))), 128, Route::NotForwarded));
        }
        routes
    }
}

/// What `ip` calls the family.
fn option(family: Family) -> &'static str {
    if family == Family::V6 { "-6" } else { "-4" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        datapath::{namespace::in_namespace, rig::links},
        skip,
    };

    #[test]
    fn a_next_hop_that_the_kernel_has_forgotten_is_told() -> Result<()> {
        if let Some(why) = skip::namespaces_missing() {
            skip::skipped("a_next_hop_that_the_kernel_has_forgotten_is_told", why);
            return Ok(());
        }
        in_namespace(|| {
            links()?;
            let mut network = Network::new()?;
            network.become_(Shape { mac: 0, mtu: 700, moved: true })?;
            assert_eq!(network.lost()?, [""; 0]);
            ip(&format!("neigh del {NEAR} dev uplink"))?;
            assert_eq!(network.lost()?, [format!("{NEAR} lladdr {} ", mac(NEAR_MAC))]);
            Ok(())
        })
    }
}
