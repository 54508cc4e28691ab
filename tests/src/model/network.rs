//! The routes and neighbours of the world: a base that every world starts from, and the few things that change in it.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    process::Command,
};

use anyhow::Result;
use edge_ctl::reconcile::ports::socket_address;

use super::state::Route;
use crate::{
    datapath::{
        namespace::{ifindex, ip, sysctl},
        rig::{CLIENT, CLIENT_MAC, PODS_MAC, UPLINK_MAC, mac, pod, pod_mac, wire},
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

/// What changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Last byte of the MAC of pod [`CHANGING`]; 0: unresolved.
    pub mac: u8,
    /// MTU of the route to [`NARROW_POD`].
    pub mtu: u32,
    /// [`MOVING_POD`] is reached by `uplink`.
    pub moved: bool,
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
        ip(&format!("link set stub address {} up", mac(STUB_MAC)))?;
        ip("link set stub-peer up")?;
        for (address, mac_address, device) in [
            (GATEWAY.to_string(), GATEWAY_MAC, "uplink"),
            (NEAR.to_string(), NEAR_MAC, "uplink"),
            (STUB_POD.to_string(), STUB_POD_MAC, "stub"),
            ("fe80::66".to_owned(), FOREIGN_MAC, "pods"),
        ] {
            ip(&format!("neigh replace {address} lladdr {} dev {device} nud permanent", mac(mac_address)))?;
        }
        for route in [
            format!("{FAR} via {GATEWAY}"),
            format!("{FAR_NARROW} via {GATEWAY} mtu lock 600"),
            format!("unreachable {REFUSED}"),
            format!("blackhole {REFUSED_POD}"),
            format!("{FOREIGN_POD} via inet6 fe80::66 dev pods"),
            format!("{STUB_POD} dev stub"),
        ] {
            ip(&format!("route add {route}"))?;
        }
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
        let changing = pod(CHANGING);
        if shape.mac != self.shape.mac {
            match shape.mac {
                0 => ip(&format!("neigh del {changing} dev pods"))?,
                last => {
                    let address = mac([2, 0, 0, 0, 7, last]);
                    ip(&format!("neigh replace {changing} lladdr {address} dev pods nud permanent"))?;
                }
            }
        }
        if shape.mtu != self.shape.mtu {
            ip(&format!("route replace {NARROW_POD} via {} dev pods mtu lock {}", pod(0), shape.mtu))?;
        }
        if shape.moved != self.shape.moved {
            let by = if shape.moved { GATEWAY } else { pod(1) };
            ip(&format!("route replace {MOVING_POD} via {by}"))?;
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
        let expected = self.routes().into_iter().filter_map(|(_, _, route)| match route {
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

    /// The routes that the kernel has, as its lookup answers them.
    pub fn routes(&self) -> Vec<(u32, u8, Route)> {
        let by = |ifindex, address: Ipv4Addr, dst_mac, src_mac, mtu| Route::Neighbour {
            ifindex,
            address: wire(address),
            dst_mac,
            src_mac,
            mtu,
        };
        let uplink = |address, dst_mac, mtu| by(self.uplink, address, dst_mac, UPLINK_MAC, mtu);
        let pods = |address, dst_mac, mtu| by(self.pods, address, dst_mac, PODS_MAC, mtu);
        let mut routes = vec![
            (Ipv4Addr::new(172, 16, 1, 0), 24, Route::Unresolved),
            (Ipv4Addr::new(10, 1, 0, 0), 24, Route::Unresolved),
            (Ipv4Addr::new(172, 16, 1, 88), 32, Route::NotForwarded),
            (Ipv4Addr::new(172, 16, 1, 255), 32, Route::NotForwarded),
            (Ipv4Addr::new(10, 1, 0, 1), 32, Route::NotForwarded),
            (Ipv4Addr::new(10, 1, 0, 255), 32, Route::NotForwarded),
            (CLIENT, 32, uplink(CLIENT, CLIENT_MAC, 1500)),
            (NEAR, 32, uplink(NEAR, NEAR_MAC, 1500)),
            (GATEWAY, 32, uplink(GATEWAY, GATEWAY_MAC, 1500)),
            (FAR, 32, uplink(GATEWAY, GATEWAY_MAC, 1500)),
            (FAR_NARROW, 32, uplink(GATEWAY, GATEWAY_MAC, 600)),
            (REFUSED, 32, Route::Refused),
            (REFUSED_POD, 32, Route::Refused),
            (NARROW_POD, 32, pods(pod(0), pod_mac(0), self.shape.mtu)),
            (STUB_POD, 32, by(self.stub, STUB_POD, STUB_POD_MAC, STUB_MAC, 1500)),
        ];
        let foreign = Route::Neighbour {
            ifindex: self.pods,
            address: wire(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x66)),
            dst_mac: FOREIGN_MAC,
            src_mac: PODS_MAC,
            mtu: 1500,
        };
        routes.push((FOREIGN_POD, 32, foreign));
        for n in (0..16).filter(|n| *n != CHANGING) {
            routes.push((pod(n), 32, pods(pod(n), pod_mac(n), 1500)));
        }
        if self.shape.mac != 0 {
            routes.push((pod(CHANGING), 32, pods(pod(CHANGING), [2, 0, 0, 0, 7, self.shape.mac], 1500)));
        }
        let moving = if self.shape.moved { uplink(GATEWAY, GATEWAY_MAC, 1500) } else { pods(pod(1), pod_mac(1), 1500) };
        routes.push((MOVING_POD, 32, moving));
        routes.into_iter().map(|(network, len, route)| (u32::from(network), len, route)).collect()
    }
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
