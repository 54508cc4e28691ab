//! The ends of a rig's flows, and the routers between them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use edge_common::maps::mode;

use super::rig::{Action, CLIENT_MAC, FAMILIES, Family, HOOKS, Hook, PODS_MAC, UPLINK_MAC, pod_mac};

/// Both modes, for tests that go over them.
pub const MODES: [u8; 2] = [mode::FULL_NAT, mode::DNAT];
/// Destination and source MAC of what goes to the client.
pub const TO_CLIENT: ([u8; 6], [u8; 6]) = (CLIENT_MAC, UPLINK_MAC);

/// Destination and source MAC of what goes to pod `n`.
pub fn to_pod(n: u8) -> ([u8; 6], [u8; 6]) {
    (pod_mac(n), PODS_MAC)
}

/// The client's end of a flow.
pub fn client(family: Family) -> SocketAddr {
    SocketAddr::new(family.client(), 40_000)
}

/// Where clients send to.
pub fn vip(family: Family) -> SocketAddr {
    SocketAddr::new(family.vip(), 8443)
}

/// The end of a flow at the first pod.
pub fn backend(family: Family) -> SocketAddr {
    SocketAddr::new(family.pod(0), 443)
}

/// A router between the edge and the pods.
pub fn inside_router(family: Family) -> IpAddr {
    family.of(Ipv4Addr::new(10, 1, 0, 200), Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 0x200))
}

/// A router between the edge and its clients.
pub fn outside_router(family: Family) -> IpAddr {
    family.of(Ipv4Addr::new(172, 16, 1, 200), Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x200))
}

/// Hooks, modes and families.
pub fn cases() -> impl Iterator<Item = (Hook, u8, Family)> {
    let modes = || MODES.into_iter().flat_map(|mode| FAMILIES.map(|family| (mode, family)));
    HOOKS.into_iter().flat_map(move |hook| modes().map(move |(mode, family)| (hook, mode, family)))
}

/// Hooks and families.
pub fn hooks_and_families() -> impl Iterator<Item = (Hook, Family)> {
    HOOKS.into_iter().flat_map(|hook| FAMILIES.map(|family| (hook, family)))
}

/// How a hook sends a packet back out of the interface it came in by.
pub fn back(hook: Hook) -> Action {
    if hook == Hook::Xdp { Action::Transmit } else { Action::Redirect }
}
