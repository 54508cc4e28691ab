//! What is accepted from a peer and what is announced to it, and in which words a refusal is told.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr},
};

use ipnet::IpNet;

use super::wire::Attributes;
use crate::config::valid::PrefixRule;

/// Prefix lists of a peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// The peer is in our AS.
    pub internal: bool,
    /// Accepted from it; `None`: nothing from an external peer (RFC 8212), everything from an internal one.
    pub import: Option<Vec<PrefixRule>>,
    /// Announced to it; `None` as for `import`.
    pub export: Option<Vec<PrefixRule>>,
}

/// Why a received path does not take part in route selection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// No import list: RFC 8212.
    NoImportList,
    /// The import list has no element that matches.
    ImportList,
    /// Our AS number is in the path (RFC 4271 9.1.2).
    OwnAs(u32),
    /// We are the originator of the reflected route (RFC 4456 8).
    OwnRouterId,
    /// The next hop is one of our own addresses.
    OwnNextHop(IpAddr),
    /// The next hop is not a unicast address of a neighbour: unspecified, loopback, multicast, broadcast, link-local.
    BadNextHop(IpAddr),
    /// The prefix is not one that is routed: multicast, loopback, link-local.
    Martian,
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoImportList => f.write_str("no import list for this eBGP peer (RFC 8212)"),
            Self::ImportList => f.write_str("no element of the import list matches"),
            Self::OwnAs(asn) => write!(f, "our own AS {asn} is in the AS path"),
            Self::OwnRouterId => f.write_str("originated by our own router id"),
            Self::OwnNextHop(address) => write!(f, "next hop {address} is our own address"),
            Self::BadNextHop(address) => write!(f, "next hop {address} is not a neighbour's unicast address"),
            Self::Martian => f.write_str("not a routable unicast prefix"),
        }
    }
}

/// Who we are, as far as it makes us refuse a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Local {
    /// Our AS number.
    pub asn: u32,
    /// Our BGP identifier.
    pub router_id: Ipv4Addr,
    /// Our addresses, as far as sessions have shown them.
    pub addresses: BTreeSet<IpAddr>,
}

fn listed(rules: Option<&Vec<PrefixRule>>, internal: bool, prefix: &IpNet) -> bool {
    rules.map_or(internal, |rules| rules.iter().any(|rule| rule.matches(prefix)))
}

impl Policy {
    /// Judges one received path.
    pub fn import(
        &self,
        local: &Local,
        prefix: &IpNet,
        attributes: &Attributes,
        next_hop: IpAddr,
    ) -> Result<(), Rejection> {
        if attributes.as_path.contains(local.asn) {
            return Err(Rejection::OwnAs(local.asn));
        }
        if attributes.originator_id == Some(local.router_id) {
            return Err(Rejection::OwnRouterId);
        }
        if martian(prefix) {
            return Err(Rejection::Martian);
        }
        if !neighbour(next_hop) {
            return Err(Rejection::BadNextHop(next_hop));
        }
        if local.addresses.contains(&next_hop) {
            return Err(Rejection::OwnNextHop(next_hop));
        }
        if listed(self.import.as_ref(), self.internal, prefix) {
            Ok(())
        } else if self.import.is_none() {
            Err(Rejection::NoImportList)
        } else {
            Err(Rejection::ImportList)
        }
    }

    /// True where a prefix of ours is announced to the peer.
    pub fn exports(&self, prefix: &IpNet) -> bool {
        listed(self.export.as_ref(), self.internal, prefix)
    }
}

/// The default route is unicast; everything inside these ranges is not routed between hosts (RFC 6890).
fn martian(prefix: &IpNet) -> bool {
    if prefix.prefix_len() == 0 {
        return false;
    }
    match prefix {
        IpNet::V4(net) => {
            let address = net.network();
            address.is_multicast() || address.is_loopback() || address.is_link_local() || address.octets()[0] == 0
        }
        IpNet::V6(net) => {
            let address = net.network();
            address.is_multicast() || address.is_loopback() || address.is_unicast_link_local()
        }
    }
}

/// True where `address` can be a gateway. A link-local one would need an interface, which a path does not carry.
fn neighbour(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            !(address.octets()[0] == 0
                || address.is_loopback()
                || address.is_multicast()
                || address.is_broadcast()
                || address.octets()[0] >= 240)
        }
        IpAddr::V6(address) => {
            !(address.is_unspecified()
                || address.is_loopback()
                || address.is_multicast()
                || address.is_unicast_link_local()
                || address.to_ipv4_mapped().is_some())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::wire::{AsPath, Segment},
        *,
    };

    fn local() -> Local {
        Local {
            asn: 64512,
            router_id: Ipv4Addr::new(172, 16, 1, 88),
            addresses: ["172.16.1.88".parse().unwrap()].into(),
        }
    }

    fn rule(prefix: &str, min_length: u8, max_length: u8) -> PrefixRule {
        PrefixRule { prefix: prefix.parse().unwrap(), min_length, max_length }
    }

    fn judge(policy: &Policy, prefix: &str, next_hop: &str) -> Result<(), Rejection> {
        policy.import(&local(), &prefix.parse().unwrap(), &Attributes::default(), next_hop.parse().unwrap())
    }

    #[test]
    fn without_lists_an_internal_peer_may_say_everything_and_an_external_one_nothing() {
        let internal = Policy { internal: true, ..Policy::default() };
        let external = Policy::default();
        assert_eq!(judge(&internal, "10.1.0.0/24", "172.16.1.80"), Ok(()));
        assert_eq!(judge(&external, "10.1.0.0/24", "172.16.1.80"), Err(Rejection::NoImportList));
        assert!(internal.exports(&"10.9.0.1/32".parse().unwrap()));
        assert!(!external.exports(&"10.9.0.1/32".parse().unwrap()));
    }

    #[test]
    fn a_list_bounds_the_prefix_length_and_an_empty_list_matches_nothing() {
        let policy = Policy { internal: true, import: Some(vec![rule("10.1.0.0/16", 24, 26)]), export: Some(vec![]) };
        assert_eq!(judge(&policy, "10.1.2.0/26", "172.16.1.80"), Ok(()));
        assert_eq!(judge(&policy, "10.1.0.0/16", "172.16.1.80"), Err(Rejection::ImportList));
        assert_eq!(judge(&policy, "10.1.2.3/32", "172.16.1.80"), Err(Rejection::ImportList));
        assert_eq!(judge(&policy, "10.2.0.0/24", "172.16.1.80"), Err(Rejection::ImportList));
        assert!(!policy.exports(&"10.9.0.1/32".parse().unwrap()));
    }

    #[test]
    fn a_rule_of_one_family_does_not_match_the_other() {
        let policy = Policy { import: Some(vec![rule("0.0.0.0/0", 0, 32)]), ..Policy::default() };
        assert_eq!(judge(&policy, "2001:db8::/48", "2001:db8::1"), Err(Rejection::ImportList));
    }

    #[test]
    fn our_own_as_anywhere_in_the_path_is_a_loop() {
        let policy = Policy { internal: true, ..Policy::default() };
        let attributes =
            Attributes { as_path: AsPath(vec![Segment::Sequence(vec![65001, 64512])]), ..Attributes::default() };
        let verdict =
            policy.import(&local(), &"10.1.0.0/24".parse().unwrap(), &attributes, "172.16.1.80".parse().unwrap());
        assert_eq!(verdict, Err(Rejection::OwnAs(64512)));
    }

    #[test]
    fn a_route_we_originated_ourselves_and_a_reflector_returns_is_refused() {
        let policy = Policy { internal: true, ..Policy::default() };
        let attributes = Attributes { originator_id: Some(local().router_id), ..Attributes::default() };
        let verdict =
            policy.import(&local(), &"10.1.0.0/24".parse().unwrap(), &attributes, "172.16.1.80".parse().unwrap());
        assert_eq!(verdict, Err(Rejection::OwnRouterId));
    }

    #[test]
    fn next_hops_that_cannot_be_gateways_are_refused() {
        let policy = Policy { internal: true, ..Policy::default() };
        for hop in
            ["0.0.0.0", "127.0.0.1", "224.0.0.5", "255.255.255.255", "240.0.0.1", "::", "::1", "ff02::1", "fe80::1"]
        {
            let hop: IpAddr = hop.parse().unwrap();
            assert_eq!(judge(&policy, "10.1.0.0/24", &hop.to_string()), Err(Rejection::BadNextHop(hop)));
        }
        let own: IpAddr = "172.16.1.88".parse().unwrap();
        assert_eq!(judge(&policy, "10.1.0.0/24", "172.16.1.88"), Err(Rejection::OwnNextHop(own)));
    }

    #[test]
    fn prefixes_that_are_never_routed_are_refused_and_a_default_route_is_not() {
        let policy = Policy { internal: true, ..Policy::default() };
        for prefix in ["224.0.0.0/4", "127.0.0.0/8", "169.254.0.0/16", "ff00::/8", "fe80::/64"] {
            assert_eq!(judge(&policy, prefix, "172.16.1.80"), Err(Rejection::Martian), "{prefix}");
        }
        assert_eq!(judge(&policy, "0.0.0.0/0", "172.16.1.80"), Ok(()));
    }
}
