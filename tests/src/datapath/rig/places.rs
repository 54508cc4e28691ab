//! Who is where around a rig: addresses, MACs, and the two links.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;
use edge_common::address::Wide;
use edge_ctl::reconcile::ports::wire as wide;

use crate::{datapath::namespace::sysctl, lab::exec::ip_batch};

/// Which IP the packets of a test are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    #[default]
    V4,
    /// IPv6.
    V6,
}

/// Both, for tests that go over them.
pub const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

impl Family {
    /// The address of this family.
    pub fn of(self, v4: Ipv4Addr, v6: Ipv6Addr) -> IpAddr {
        match self {
            Self::V4 => v4.into(),
            Self::V6 => v6.into(),
        }
    }

    /// [`VIP`] or [`VIP6`].
    pub fn vip(self) -> IpAddr {
        self.of(VIP, VIP6)
    }

    /// [`SNAT`] or [`SNAT6`].
    pub fn snat(self) -> IpAddr {
        self.of(SNAT, SNAT6)
    }

    /// [`CLIENT`] or [`CLIENT6`].
    pub fn client(self) -> IpAddr {
        self.of(CLIENT, CLIENT6)
    }

    /// [`OWN`] or [`OWN6`].
    pub fn own(self) -> [IpAddr; 2] {
        [0, 1].map(|n: usize| self.of(OWN[n], OWN6[n]))
    }

    /// The address of pod `n`.
    pub fn pod(self, n: u8) -> IpAddr {
        self.of(pod(n), pod6(n))
    }

    /// Bytes of a plain IP header.
    pub fn header_len(self) -> usize {
        match self {
            Self::V4 => 20,
            Self::V6 => 40,
        }
    }

    /// The layer-4 protocol of ICMP in this family.
    pub fn icmp(self) -> u8 {
        match self {
            Self::V4 => 1,
            Self::V6 => 58,
        }
    }
}

/// The edge's address towards clients, and its VIP.
pub const VIP: Ipv4Addr = Ipv4Addr::new(172, 16, 1, 88);
/// The edge's address towards pods: what full-nat uses as source.
pub const SNAT: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);
/// What the edge signs its ICMP messages with: towards clients, and towards pods.
pub const OWN: [Ipv4Addr; 2] = [Ipv4Addr::new(172, 16, 1, 2), Ipv4Addr::new(10, 1, 0, 2)];
/// The IPv6 twins of [`OWN`].
pub const OWN6: [Ipv6Addr; 2] =
    [Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2), Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 2)];
/// A client on the edge's own network.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(172, 16, 1, 10);
/// The IPv6 twin of [`VIP`].
pub const VIP6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x88);
/// The IPv6 twin of [`SNAT`].
pub const SNAT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 1);
/// The IPv6 twin of [`CLIENT`].
pub const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0xa, 0xb, 0xc, 0x10);
/// The client's MAC.
pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 1, 10];
/// The first pod; pod `n` has the address after the pod before it.
pub const POD: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 4);
/// Permanent neighbours that pods have.
pub const PODS: u8 = 16;
/// The edge's MAC on `uplink`.
pub const UPLINK_MAC: [u8; 6] = [2, 0, 0, 0, 9, 1];
/// The edge's MAC on `pods`.
pub const PODS_MAC: [u8; 6] = [2, 0, 0, 0, 9, 2];

/// The address of pod `n`.
pub fn pod(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 1, 0, 4 + n)
}

/// The IPv6 address of pod `n`.
pub fn pod6(n: u8) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0xfe, 0xed, 0, 4 + u16::from(n))
}

/// The MAC of pod `n`.
pub fn pod_mac(n: u8) -> [u8; 6] {
    [2, 0, 0, 0, 2, 4 + n]
}

/// An address as maps hold it.
pub fn wire(address: impl Into<IpAddr>) -> Wide {
    wide(address.into())
}

/// A MAC as `ip` writes it.
pub fn mac(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// The two links, with addresses and permanent neighbours, in this thread's namespace.
pub(crate) fn links() -> Result<()> {
    let mut lines = vec![
        "link add uplink type veth peer name uplink-peer".to_owned(),
        "link add pods type veth peer name pods-peer".to_owned(),
    ];
    for (name, address, mac_address) in [("uplink", VIP, UPLINK_MAC), ("pods", SNAT, PODS_MAC)] {
        lines.push(format!("link set {name} address {} up", mac(mac_address)));
        lines.push(format!("link set {name}-peer up"));
        lines.push(format!("address add {address}/24 dev {name}"));
    }
    for (name, address) in [("uplink", VIP6), ("pods", SNAT6)] {
        lines.push(format!("address add {address}/64 dev {name} nodad"));
    }
    let clients = [IpAddr::from(CLIENT), CLIENT6.into()].map(|address| (address, CLIENT_MAC, "uplink"));
    let pods =
        (0..PODS).flat_map(|n| [IpAddr::from(pod(n)), pod6(n).into()].map(|address| (address, pod_mac(n), "pods")));
    for (address, neighbour, device) in clients.into_iter().chain(pods) {
        lines.push(format!("neigh replace {address} lladdr {} dev {device} nud permanent", mac(neighbour)));
    }
    sysctl("ipv4/ip_forward", "1")?;
    sysctl("ipv6/conf/all/forwarding", "1")?;
    ip_batch(None, &lines)
}
