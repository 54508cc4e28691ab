//! Next-hop tracking: whether a path's next hop can be reached, through which gateways, and how far it is. Pure.
//!
//! A next hop is looked up in the kernel's connected and static routes, and in what BGP itself has learnt (RFC 4271
//! 9.1.2.1); the longest prefix wins, the kernel's where both have one. A default route resolves nothing: with it every
//! address would count as reachable. What BGP learnt resolves a next hop only through gateways on a connected network, so
//! that routes can never resolve each other in a circle.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

/// The kernel's routes that BGP did not install: prefix and gateway, `None` for a connected network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kernel(BTreeMap<IpNet, Option<IpAddr>>);

impl Kernel {
    /// Takes a reading over; a connected network wins over a route to the same prefix.
    pub fn new(routes: impl IntoIterator<Item = (IpNet, Option<IpAddr>)>) -> Self {
        let mut table = BTreeMap::new();
        for (prefix, gateway) in routes {
            let kept = table.entry(prefix).or_insert(gateway);
            if gateway.is_none() {
                *kept = None;
            }
        }
        Self(table)
    }

    /// Networks on our interfaces.
    pub fn connected(&self) -> BTreeSet<IpNet> {
        self.0.iter().filter(|(_, gateway)| gateway.is_none()).map(|(prefix, _)| *prefix).collect()
    }

    /// The longest prefix with `address` in it, default routes aside, and its gateway.
    fn lookup(&self, address: IpAddr) -> Option<(IpNet, Option<IpAddr>)> {
        covering(address).find_map(|prefix| self.0.get(&prefix).map(|gateway| (prefix, *gateway)))
    }

    /// True where `address` is a neighbour on one of our networks.
    fn is_on_link(&self, address: IpAddr) -> bool {
        self.lookup(address).is_some_and(|(_, gateway)| gateway.is_none())
    }
}

/// Every prefix with `address` in it, the longest first, without the default route.
pub fn covering(address: IpAddr) -> impl Iterator<Item = IpNet> {
    let longest = if address.is_ipv4() { 32 } else { 128 };
    (1..=longest).rev().filter_map(move |length| Some(IpNet::new(address, length).ok()?.trunc()))
}

/// How a next hop is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// Neighbours that packets are handed to.
    pub gateways: Vec<IpAddr>,
    /// 0: on a connected network; 1: by a route of the kernel; 2: by a route of BGP.
    pub cost: u32,
    /// The prefix that it was found in.
    pub by: IpNet,
}

/// Looks `hop` up. `learnt` gives the gateways of BGP's own best route to exactly that prefix, unless it goes by `hop`
/// itself.
pub fn resolve(kernel: &Kernel, hop: IpAddr, learnt: impl Fn(&IpNet) -> Option<Vec<IpAddr>>) -> Option<Resolved> {
    let of_kernel = kernel.lookup(hop);
    let shortest = of_kernel.map_or(0, |(prefix, _)| prefix.prefix_len());
    let longer = covering(hop).take_while(|prefix| prefix.prefix_len() > shortest);
    for prefix in longer {
        let Some(mut gateways) = learnt(&prefix) else { continue };
        gateways.retain(|gateway| kernel.is_on_link(*gateway));
        if !gateways.is_empty() {
            return Some(Resolved { gateways, cost: 2, by: prefix });
        }
    }
    match of_kernel? {
        (by, None) => Some(Resolved { gateways: vec![hop], cost: 0, by }),
        (by, Some(gateway)) => kernel.is_on_link(gateway).then(|| Resolved { gateways: vec![gateway], cost: 1, by }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn kernel(routes: &[(&str, Option<&str>)]) -> Kernel {
        Kernel::new(routes.iter().map(|(prefix, gateway)| (prefix.parse().unwrap(), gateway.map(ip))))
    }

    fn found(kernel: &Kernel, hop: &str, learnt: &[(&str, &str)]) -> Option<(Vec<String>, u32)> {
        let learnt = |prefix: &IpNet| {
            let of = learnt.iter().find(|(candidate, _)| candidate.parse::<IpNet>().unwrap() == *prefix);
            of.map(|(_, gateway)| vec![ip(gateway)])
        };
        let resolved = resolve(kernel, ip(hop), learnt)?;
        Some((resolved.gateways.iter().map(IpAddr::to_string).collect(), resolved.cost))
    }

    #[test]
    fn a_neighbour_is_its_own_gateway_and_a_routed_hop_has_the_routes() {
        let kernel = kernel(&[("172.16.1.0/24", None), ("10.5.0.0/16", Some("172.16.1.1"))]);
        assert_eq!(found(&kernel, "172.16.1.80", &[]), Some((vec!["172.16.1.80".into()], 0)));
        assert_eq!(found(&kernel, "10.5.9.9", &[]), Some((vec!["172.16.1.1".into()], 1)));
        assert_eq!(found(&kernel, "10.6.9.9", &[]), None);
    }

    #[test]
    fn a_default_route_resolves_nothing() {
        let kernel = kernel(&[("0.0.0.0/0", Some("172.16.1.1")), ("172.16.1.0/24", None)]);
        assert_eq!(found(&kernel, "10.6.9.9", &[]), None);
        assert_eq!(found(&kernel, "172.16.1.80", &[]), Some((vec!["172.16.1.80".into()], 0)));
    }

    #[test]
    fn the_longest_prefix_wins_whoever_has_it_and_the_kernel_where_both_do() {
        let kernel = kernel(&[("172.16.1.0/24", None), ("10.5.0.0/16", Some("172.16.1.1"))]);
        assert_eq!(
            found(&kernel, "10.5.9.9", &[("10.5.9.0/24", "172.16.1.81")]),
            Some((vec!["172.16.1.81".into()], 2))
        );
        assert_eq!(found(&kernel, "10.5.9.9", &[("10.5.0.0/16", "172.16.1.81")]), Some((vec!["172.16.1.1".into()], 1)));
    }

    #[test]
    fn a_learnt_route_through_a_gateway_on_no_link_resolves_nothing() {
        let kernel = kernel(&[("172.16.1.0/24", None)]);
        assert_eq!(found(&kernel, "10.5.9.9", &[("10.5.9.0/24", "10.5.9.9")]), None, "a circle of one");
        assert_eq!(found(&kernel, "10.5.9.9", &[("10.5.9.0/24", "192.0.2.1")]), None);
    }
}
