//! Which addresses may become backends at all. Pure.
//!
//! DNS is not trusted to name arbitrary hosts: an address counts only inside the configured pod networks, and never where
//! a packet sent there would come back to the edge or reach nobody in particular, however wide those networks are.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;

use crate::model::within;

/// What decides about an address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Guard {
    /// The networks that backends lie in.
    pub pod_networks: Vec<IpNet>,
    /// Listen addresses: a backend there would be the edge's own service again.
    pub vips: BTreeSet<IpAddr>,
    /// Addresses of this host.
    pub own: BTreeSet<IpAddr>,
}

impl From<Vec<IpNet>> for Guard {
    fn from(pod_networks: Vec<IpNet>) -> Self {
        Self { pod_networks, ..Self::default() }
    }
}

/// Why an address is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    /// 0.0.0.0, ::, 255.255.255.255, and the rest of 0/8 (RFC 1122 3.2.1.3) and 240/4 (RFC 1112).
    NoHost,
    /// 127/8, ::1.
    Loopback,
    /// 169.254/16, fe80::/10.
    LinkLocal,
    /// 224/4, ff00::/8.
    Multicast,
    /// A listen address of a service.
    Vip,
    /// An address of this host.
    Own,
    /// None of the configured networks holds it.
    Outside,
}

impl Refusal {
    /// Every reason, in the order in which they are tried.
    pub const ALL: [Self; 7] =
        [Self::NoHost, Self::Loopback, Self::LinkLocal, Self::Multicast, Self::Vip, Self::Own, Self::Outside];
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoHost => "no host's address",
            Self::Loopback => "loopback",
            Self::LinkLocal => "link-local",
            Self::Multicast => "multicast",
            Self::Vip => "a VIP of this edge",
            Self::Own => "an address of this host",
            Self::Outside => "outside pod_networks",
        })
    }
}

impl Guard {
    /// `None`: it may be a backend.
    pub fn refuses(&self, address: IpAddr) -> Option<Refusal> {
        // ::ffff:127.0.0.1 is 127.0.0.1 to whoever connects to it.
        let address = address.to_canonical();
        let special = match address {
            IpAddr::V4(address) => special_v4(address),
            IpAddr::V6(address) => special_v6(address),
        };
        match special {
            Some(refusal) => Some(refusal),
            None if self.vips.contains(&address) => Some(Refusal::Vip),
            None if self.own.contains(&address) => Some(Refusal::Own),
            None if !within(&self.pod_networks, address) => Some(Refusal::Outside),
            None => None,
        }
    }
}

fn special_v4(address: Ipv4Addr) -> Option<Refusal> {
    match address.octets() {
        [0, ..] | [240..=255, ..] => Some(Refusal::NoHost),
        [127, ..] => Some(Refusal::Loopback),
        [169, 254, ..] => Some(Refusal::LinkLocal),
        [224..=239, ..] => Some(Refusal::Multicast),
        _ => None,
    }
}

fn special_v6(address: Ipv6Addr) -> Option<Refusal> {
    match address {
        _ if address.is_unspecified() => Some(Refusal::NoHost),
        _ if address.is_loopback() => Some(Refusal::Loopback),
        _ if address.is_multicast() => Some(Refusal::Multicast),
        _ if address.is_unicast_link_local() => Some(Refusal::LinkLocal),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// As wide as it can be, so that only the special rules are left to refuse.
    fn guard() -> Guard {
        Guard {
            pod_networks: vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()],
            vips: [ip("10.1.9.9")].into(),
            own: [ip("10.1.0.1"), ip("2001:db8::1")].into(),
        }
    }

    #[test]
    fn special_addresses_are_refused_even_inside_the_widest_networks() {
        for (text, refusal) in [
            ("0.0.0.0", Refusal::NoHost),
            ("0.1.2.3", Refusal::NoHost),
            ("255.255.255.255", Refusal::NoHost),
            ("240.0.0.1", Refusal::NoHost),
            ("127.0.0.53", Refusal::Loopback),
            ("::1", Refusal::Loopback),
            ("::ffff:127.0.0.1", Refusal::Loopback),
            ("169.254.169.254", Refusal::LinkLocal),
            ("fe80::1", Refusal::LinkLocal),
            ("224.0.0.5", Refusal::Multicast),
            ("ff02::1", Refusal::Multicast),
            ("::", Refusal::NoHost),
            ("10.1.9.9", Refusal::Vip),
            ("::ffff:10.1.9.9", Refusal::Vip),
            ("10.1.0.1", Refusal::Own),
            ("2001:db8::1", Refusal::Own),
        ] {
            assert_eq!(guard().refuses(ip(text)), Some(refusal), "{text}");
        }
        assert_eq!(guard().refuses(ip("10.1.0.2")), None);
        assert_eq!(guard().refuses(ip("2001:db8::2")), None);
    }

    #[test]
    fn an_address_outside_the_pod_networks_is_refused() {
        let guard = Guard::from(vec!["10.1.0.0/16".parse().unwrap()]);
        assert_eq!(guard.refuses(ip("10.2.0.1")), Some(Refusal::Outside));
        assert_eq!(guard.refuses(ip("10.1.255.1")), None);
    }
}
