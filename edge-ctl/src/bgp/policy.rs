//! What is accepted from a peer and what is announced to it, what is changed on the way, and in which words a refusal is
//! told.
//!
//! Order of an import: what can never be used (loops, impossible next hops, martians), then the peer's terms, then the
//! guard of what nobody meant to import: a default route, an address that we serve, a connected network. The guard is
//! satisfied by a term that names exactly that prefix, so that a wide list alone never lets such a route in.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use ipnet::IpNet;

use super::wire::{Attributes, Community};
use crate::{
    config::valid::{Changes, NextHop, Term},
    model::{bgp_session::Role, scope},
};

/// The lists of a peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// The peer is in our AS.
    pub internal: bool,
    /// Accepted from it; `None`: nothing from an external peer (RFC 8212), pod networks from an internal one.
    pub import: Option<Arc<Vec<Term>>>,
    /// Announced to it; `None`: nothing to an external peer, what we originate to an internal one.
    pub export: Option<Arc<Vec<Term>>>,
    /// Announced to it alone, as if we originated them, whatever `export` says.
    pub client_networks: Arc<[IpNet]>,
    /// Our role towards it, and its AS number; `None`: ONLY_TO_CUSTOMER is passed on and not looked at.
    pub role: Option<(Role, u32)>,
}

/// Why a received path does not take part in route selection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// No import list: RFC 8212.
    NoImportList,
    /// The import list has no term that matches.
    ImportList,
    /// This term, counted from 1, refuses it.
    Denied(usize),
    /// No import list, and outside the pod networks.
    OutsidePodNetworks,
    /// A default route that no term names.
    DefaultRoute,
    /// An address that we serve, and that no term names.
    OwnVip,
    /// A network that we are connected to, and that no term names.
    Connected,
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
    /// A route leak: customers of this AS alone may have the path, and the peer is none (RFC 9234 5).
    Leak(u32),
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoImportList => f.write_str("no import list for this eBGP peer (RFC 8212)"),
            Self::ImportList => f.write_str("no term of the import list matches"),
            Self::Denied(term) => write!(f, "refused by term {term} of the import list"),
            Self::OutsidePodNetworks => f.write_str("outside pod_networks, and there is no import list"),
            Self::DefaultRoute => f.write_str("a default route is imported only where `import` names it exactly"),
            Self::OwnVip => f.write_str("a VIP of ours is imported only where `import` names it exactly"),
            Self::Connected => f.write_str("a connected network is imported only where `import` names it exactly"),
            Self::OwnAs(asn) => write!(f, "our own AS {asn} is in the AS path"),
            Self::OwnRouterId => f.write_str("originated by our own router id"),
            Self::OwnNextHop(address) => write!(f, "next hop {} is our own address", scope::shown(*address)),
            Self::BadNextHop(address) => write!(f, "next hop {address} is not a neighbour's unicast address"),
            Self::Martian => f.write_str("not a routable unicast prefix"),
            Self::Leak(asn) => write!(f, "a route leak: only customers of AS {asn} may have it (RFC 9234 5)"),
        }
    }
}

/// Who we are, as far as it makes us refuse a path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Local {
    /// Our AS number.
    pub asn: u32,
    /// Our BGP identifier.
    pub router_id: Option<Ipv4Addr>,
    /// Our addresses, as far as sessions have shown them.
    pub addresses: BTreeSet<IpAddr>,
    /// Networks that pods are numbered from; `None`: not known, nothing is refused for it.
    pub pod_networks: Option<Vec<IpNet>>,
    /// Addresses that we serve.
    pub vips: BTreeSet<IpAddr>,
    /// Networks on our interfaces.
    pub connected: BTreeSet<IpNet>,
}

/// What a list says of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permit<'a> {
    /// The term that permits it, counted from 1; `None`: there is no list.
    pub term: Option<usize>,
    /// What it changes.
    pub changes: Option<&'a Changes>,
    /// The term names the prefix itself.
    exact: bool,
}

/// Why a list does not let a path through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    NoMatch,
    Denied(usize),
}

/// The first term that matches decides.
fn judge<'a>(terms: &'a [Term], prefix: &IpNet, attributes: &Attributes) -> Result<Permit<'a>, Refusal> {
    // Shown to patterns only, and seldom needed.
    let mut path = None;
    for (number, term) in (1..).zip(terms) {
        let rule = term.prefixes.iter().find(|rule| rule.matches(prefix));
        if (rule.is_none() && !term.prefixes.is_empty())
            || !term.communities.iter().all(|community| attributes.has_community(*community))
        {
            continue;
        }
        if let Some(pattern) = &term.as_path {
            let path = path.get_or_insert_with(|| attributes.as_path.to_string());
            if !pattern.matches(path) {
                continue;
            }
        }
        if term.deny {
            return Err(Refusal::Denied(number));
        }
        let exact = term.prefixes.iter().any(|rule| rule.is_exactly(prefix));
        let changes = Some(&term.set).filter(|set| !set.is_empty());
        return Ok(Permit { term: Some(number), changes, exact });
    }
    Err(Refusal::NoMatch)
}

impl Policy {
    /// Judges one received path.
    ///
    /// # Errors
    /// Why it does not take part in selection.
    pub fn import(
        &self,
        local: &Local,
        prefix: &IpNet,
        attributes: &Attributes,
        next_hop: IpAddr,
    ) -> Result<Permit<'_>, Rejection> {
        if attributes.as_path.contains(local.asn) {
            return Err(Rejection::OwnAs(local.asn));
        }
        if attributes.originator_id.is_some() && attributes.originator_id == local.router_id {
            return Err(Rejection::OwnRouterId);
        }
        if martian(prefix) {
            return Err(Rejection::Martian);
        }
        if let Some(asn) = self.leaked(attributes) {
            return Err(Rejection::Leak(asn));
        }
        if !neighbour(next_hop) {
            return Err(Rejection::BadNextHop(next_hop));
        }
        if local.addresses.contains(&next_hop) {
            return Err(Rejection::OwnNextHop(next_hop));
        }
        let permit = match &self.import {
            Some(terms) => judge(terms, prefix, attributes).map_err(|refusal| match refusal {
                Refusal::NoMatch => Rejection::ImportList,
                Refusal::Denied(term) => Rejection::Denied(term),
            })?,
            None if !self.internal => return Err(Rejection::NoImportList),
            None => Permit { term: None, changes: None, exact: false },
        };
        if !permit.exact {
            guard(local, prefix)?;
        }
        if permit.term.is_none()
            && let Some(pods) = &local.pod_networks
            && !pods.iter().any(|network| network.contains(prefix))
        {
            return Err(Rejection::OutsidePodNetworks);
        }
        Ok(permit)
    }

    /// Judges a path that could be announced to the peer.
    ///
    /// # Errors
    /// Why it is not.
    pub fn export(&self, prefix: &IpNet, attributes: &Attributes, learnt: bool) -> Result<Permit<'_>, Withheld> {
        if !learnt && self.client_networks.contains(prefix) {
            return Ok(Permit { term: None, changes: None, exact: true });
        }
        match &self.export {
            Some(terms) => judge(terms, prefix, attributes).map_err(|refusal| match refusal {
                Refusal::NoMatch => Withheld::ExportList,
                Refusal::Denied(term) => Withheld::Denied(term),
            }),
            None if self.internal && !learnt => Ok(Permit { term: None, changes: None, exact: false }),
            None => Err(Withheld::NoExportList),
        }
    }

    /// RFC 9234 5, ingress, rules 1 and 2: who should not have passed the path on, by its ONLY_TO_CUSTOMER.
    fn leaked(&self, attributes: &Attributes) -> Option<u32> {
        let ((ours, remote), asn) = (self.role?, attributes.only_to_customer?);
        match ours {
            Role::Provider | Role::RouteServer => Some(asn),
            Role::Peer => (asn != remote).then_some(asn),
            Role::Customer | Role::RouteServerClient => None,
        }
    }

    /// RFC 9234 5, ingress, rule 3: the mark that a path from above, or from the side, gets where it has none.
    pub fn mark_received(&self, attributes: &Attributes) -> Option<u32> {
        let (ours, remote) = self.role.filter(|_| attributes.only_to_customer.is_none())?;
        matches!(ours, Role::Customer | Role::RouteServerClient | Role::Peer).then_some(remote)
    }

    /// RFC 9234 5, egress: a marked path goes to customers alone, and what goes to them, or to the side, is marked.
    ///
    /// # Errors
    /// [`Withheld::OnlyToCustomers`].
    pub fn mark_sent(&self, attributes: &mut Attributes, own_asn: u32) -> Result<(), Withheld> {
        let Some((ours, _)) = self.role else { return Ok(()) };
        if let Some(asn) = attributes.only_to_customer
            && matches!(ours, Role::Customer | Role::RouteServerClient | Role::Peer)
        {
            return Err(Withheld::OnlyToCustomers(asn));
        }
        if matches!(ours, Role::Provider | Role::RouteServer | Role::Peer) {
            attributes.only_to_customer.get_or_insert(own_asn);
        }
        Ok(())
    }
}

/// Why a path is not announced to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Withheld {
    /// No export list: RFC 8212, and nothing learnt goes anywhere without one.
    NoExportList,
    /// The export list has no term that matches.
    ExportList,
    /// This term, counted from 1, refuses it.
    Denied(usize),
    /// `transit` is off.
    NoTransit,
    /// Learnt from an internal peer, and this one is internal too.
    InternalToInternal,
    /// Learnt from this very peer.
    Sender,
    /// The peer's AS number is in the path already.
    Loop(u32),
    /// A well-known community of the path forbids it.
    Community(Community),
    /// The session does not carry this family.
    Family,
    /// Only customers of this AS may have it, and the peer is none (RFC 9234 5).
    OnlyToCustomers(u32),
}

impl fmt::Display for Withheld {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoExportList => f.write_str("no export list for it (RFC 8212; learnt routes always need one)"),
            Self::ExportList => f.write_str("no term of the export list matches"),
            Self::Denied(term) => write!(f, "refused by term {term} of the export list"),
            Self::NoTransit => f.write_str("learnt, and `transit` is off"),
            Self::InternalToInternal => f.write_str("learnt by iBGP, never announced by iBGP"),
            Self::Sender => f.write_str("learnt from this peer"),
            Self::Loop(asn) => write!(f, "the peer's AS {asn} is in the AS path"),
            Self::Community(community) => write!(f, "carries {community}"),
            Self::Family => f.write_str("the session does not carry this address family"),
            Self::OnlyToCustomers(asn) => write!(f, "only customers of AS {asn} may have it (RFC 9234 5)"),
        }
    }
}

/// Carries out a term's changes. `own` is what `next_hop = "self"` means.
pub fn apply(changes: &Changes, attributes: &mut Attributes, next_hop: &mut IpAddr, own: IpAddr, asn: u32) {
    if changes.local_pref.is_some() {
        attributes.local_pref = changes.local_pref;
    }
    if changes.med.is_some() {
        attributes.med = changes.med;
    }
    changes.remove.iter().for_each(|community| attributes.remove_community(*community));
    changes.add.iter().for_each(|community| attributes.add_community(*community));
    attributes.as_path.prepend(asn, usize::from(changes.prepend));
    match changes.next_hop {
        Some(NextHop::Own) => *next_hop = own,
        Some(NextHop::Address(address)) if address.is_ipv4() == next_hop.is_ipv4() => *next_hop = address,
        Some(NextHop::Address(_) | NextHop::Unchanged) | None => {}
    }
}

fn guard(local: &Local, prefix: &IpNet) -> Result<(), Rejection> {
    if prefix.prefix_len() == 0 {
        return Err(Rejection::DefaultRoute);
    }
    if prefix.prefix_len() == prefix.max_prefix_len() && local.vips.contains(&prefix.addr()) {
        return Err(Rejection::OwnVip);
    }
    if local.connected.contains(prefix) {
        return Err(Rejection::Connected);
    }
    Ok(())
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

/// True where `address` can be a gateway: a link-local one with its interface, which the session gives it.
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
                || (address.is_unicast_link_local() && scope::number_of(address.into()).is_none())
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
    use crate::config::valid::{AsPathPattern, PrefixRule};

    fn local() -> Local {
        Local {
            asn: 64512,
            router_id: Some(Ipv4Addr::new(172, 16, 1, 88)),
            addresses: ["172.16.1.88".parse().unwrap()].into(),
            ..Local::default()
        }
    }

    fn rule(prefix: &str, min_length: u8, max_length: u8) -> Term {
        PrefixRule { prefix: prefix.parse().unwrap(), min_length, max_length }.into()
    }

    fn list(terms: Vec<Term>) -> Option<Arc<Vec<Term>>> {
        Some(Arc::new(terms))
    }

    fn exports(policy: &Policy, prefix: &str) -> bool {
        policy.export(&prefix.parse().unwrap(), &Attributes::default(), false).is_ok()
    }

    fn judge(policy: &Policy, prefix: &str, next_hop: &str) -> Result<(), Rejection> {
        let next_hop = next_hop.parse().unwrap();
        policy.import(&local(), &prefix.parse().unwrap(), &Attributes::default(), next_hop).map(|_| ())
    }

    #[test]
    fn without_lists_an_internal_peer_may_say_everything_and_an_external_one_nothing() {
        let internal = Policy { internal: true, ..Policy::default() };
        let external = Policy::default();
        assert_eq!(judge(&internal, "10.1.0.0/24", "172.16.1.80"), Ok(()));
        assert_eq!(judge(&external, "10.1.0.0/24", "172.16.1.80"), Err(Rejection::NoImportList));
        assert!(exports(&internal, "10.9.0.1/32"));
        assert!(!exports(&external, "10.9.0.1/32"));
    }

    #[test]
    fn a_list_bounds_the_prefix_length_and_an_empty_list_matches_nothing() {
        let policy = Policy {
            internal: true,
            import: list(vec![rule("10.1.0.0/16", 24, 26)]),
            export: list(vec![]),
            ..Policy::default()
        };
        assert_eq!(judge(&policy, "10.1.2.0/26", "172.16.1.80"), Ok(()));
        assert_eq!(judge(&policy, "10.1.0.0/16", "172.16.1.80"), Err(Rejection::ImportList));
        assert_eq!(judge(&policy, "10.1.2.3/32", "172.16.1.80"), Err(Rejection::ImportList));
        assert_eq!(judge(&policy, "10.2.0.0/24", "172.16.1.80"), Err(Rejection::ImportList));
        assert!(!exports(&policy, "10.9.0.1/32"));
    }

    #[test]
    fn a_rule_of_one_family_does_not_match_the_other() {
        let policy = Policy { import: list(vec![rule("0.0.0.0/0", 0, 32)]), ..Policy::default() };
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
        let attributes = Attributes { originator_id: local().router_id, ..Attributes::default() };
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
    fn prefixes_that_are_never_routed_are_refused() {
        let policy = Policy { internal: true, ..Policy::default() };
        for prefix in ["224.0.0.0/4", "127.0.0.0/8", "169.254.0.0/16", "ff00::/8", "fe80::/64"] {
            assert_eq!(judge(&policy, prefix, "172.16.1.80"), Err(Rejection::Martian), "{prefix}");
        }
    }

    #[test]
    fn a_default_route_a_vip_and_a_connected_network_come_in_only_by_their_name() {
        let local = Local {
            vips: ["10.9.0.1".parse().unwrap()].into(),
            connected: ["172.16.1.0/24".parse().unwrap()].into(),
            ..local()
        };
        let said = |terms: Vec<Term>, prefix: &str| {
            let policy = Policy { import: list(terms), ..Policy::default() };
            let attributes = Attributes::default();
            let hop = "172.16.1.80".parse().unwrap();
            policy.import(&local, &prefix.parse().unwrap(), &attributes, hop).map(|permit| permit.term)
        };
        let any = || rule("0.0.0.0/0", 0, 32);
        assert_eq!(said(vec![any()], "0.0.0.0/0"), Err(Rejection::DefaultRoute));
        assert_eq!(said(vec![any()], "10.9.0.1/32"), Err(Rejection::OwnVip));
        assert_eq!(said(vec![any()], "172.16.1.0/24"), Err(Rejection::Connected));
        assert_eq!(said(vec![any()], "172.16.2.0/24"), Ok(Some(1)));
        for (prefix, length) in [("0.0.0.0/0", 0), ("10.9.0.1/32", 32), ("172.16.1.0/24", 24)] {
            assert_eq!(said(vec![rule(prefix, length, length), any()], prefix), Ok(Some(1)), "{prefix}");
        }
    }

    #[test]
    fn without_a_list_an_internal_peer_may_only_say_pod_networks_where_they_are_known() {
        let local = Local { pod_networks: Some(vec!["10.1.0.0/16".parse().unwrap()]), ..local() };
        let policy = Policy { internal: true, ..Policy::default() };
        let said = |policy: &Policy, prefix: &str| {
            let hop = "172.16.1.80".parse().unwrap();
            policy.import(&local, &prefix.parse().unwrap(), &Attributes::default(), hop).map(|_| ())
        };
        assert_eq!(said(&policy, "10.1.2.0/26"), Ok(()));
        assert_eq!(said(&policy, "10.0.0.0/8"), Err(Rejection::OutsidePodNetworks));
        assert_eq!(said(&policy, "10.96.0.0/12"), Err(Rejection::OutsidePodNetworks));
        let listed = Policy { import: list(vec![rule("10.96.0.0/12", 12, 32)]), ..policy };
        assert_eq!(said(&listed, "10.96.0.0/12"), Ok(()), "a list says what is meant");
    }

    #[test]
    fn the_first_term_that_matches_in_every_condition_decides() {
        let terms = vec![
            Term { deny: true, communities: vec!["64512:666".parse().unwrap()], ..Term::default() },
            Term {
                as_path: Some(AsPathPattern::new("^65001_").unwrap()),
                set: Changes { local_pref: Some(200), ..Changes::default() },
                ..rule("10.1.0.0/16", 16, 32)
            },
            rule("10.1.0.0/16", 16, 24),
        ];
        let policy = Policy { import: list(terms), ..Policy::default() };
        let said = |prefix: &str, path: &[u32], communities: Vec<u32>| {
            let as_path = AsPath(vec![Segment::Sequence(path.to_vec())]);
            let attributes = Attributes { as_path, communities, ..Attributes::default() };
            let hop = "172.16.1.80".parse().unwrap();
            let permit = policy.import(&local(), &prefix.parse().unwrap(), &attributes, hop);
            permit.map(|permit| (permit.term, permit.changes.and_then(|changes| changes.local_pref)))
        };
        assert_eq!(said("10.1.2.0/26", &[65001], vec![]), Ok((Some(2), Some(200))));
        assert_eq!(said("10.1.2.0/24", &[65002], vec![]), Ok((Some(3), None)));
        assert_eq!(said("10.1.2.0/26", &[65002], vec![]), Err(Rejection::ImportList));
        assert_eq!(said("10.1.2.0/26", &[65001], vec![64512 << 16 | 666]), Err(Rejection::Denied(1)));
    }

    #[test]
    fn changes_are_carried_out_removals_before_additions() {
        let changes = Changes {
            local_pref: Some(50),
            med: Some(7),
            add: vec!["64512:1".parse().unwrap(), "64512:1:2".parse().unwrap(), "rt:64512:3".parse().unwrap()],
            remove: vec!["64512:9".parse().unwrap(), "64512:1".parse().unwrap()],
            prepend: 2,
            next_hop: Some(NextHop::Own),
        };
        let mut attributes =
            Attributes { communities: vec![64512 << 16 | 9, 64512 << 16 | 1], ..Attributes::default() };
        let mut hop: IpAddr = "172.16.1.80".parse().unwrap();
        apply(&changes, &mut attributes, &mut hop, "172.16.1.88".parse().unwrap(), 64512);
        assert_eq!((attributes.local_pref, attributes.med), (Some(50), Some(7)));
        assert_eq!(attributes.community_texts(), ["64512:1", "64512:1:2", "rt:64512:3"]);
        assert_eq!(attributes.as_path.to_string(), "64512 64512");
        assert_eq!(hop.to_string(), "172.16.1.88");
    }

    /// The marks of RFC 9234 5, by our role: received bare, with the peer's own mark, with another's; sent bare, marked.
    #[test]
    fn only_to_customer_is_set_refused_and_withheld_by_role() {
        use Role::{Customer, Peer, Provider, RouteServer, RouteServerClient};
        let marked = |asn| Attributes { only_to_customer: asn, ..Attributes::default() };
        for (ours, by_peer, by_other, adds, sends_marked, marks_sent) in [
            (Provider, false, false, false, true, true),
            (RouteServer, false, false, false, true, true),
            (Peer, true, false, true, false, true),
            (Customer, true, true, true, false, false),
            (RouteServerClient, true, true, true, false, false),
        ] {
            let policy = Policy { role: Some((ours, 65001)), ..Policy::default() };
            let accepted = |asn| policy.leaked(&marked(asn)).is_none();
            assert_eq!(
                (accepted(None), accepted(Some(65001)), accepted(Some(65009))),
                (true, by_peer, by_other),
                "{ours}"
            );
            assert_eq!(policy.mark_received(&marked(None)), adds.then_some(65001), "{ours}");
            assert_eq!(policy.mark_received(&marked(Some(65009))), None, "{ours}: a mark is never changed");
            let sent = |asn| {
                let mut attributes = marked(asn);
                policy.mark_sent(&mut attributes, 64512).map(|()| attributes.only_to_customer)
            };
            assert_eq!(sent(None), Ok(marks_sent.then_some(64512)), "{ours}");
            let withheld = Err(Withheld::OnlyToCustomers(65009));
            assert_eq!(sent(Some(65009)), if sends_marked { Ok(Some(65009)) } else { withheld }, "{ours}");
        }
        let none = Policy::default();
        assert_eq!((none.leaked(&marked(Some(1))), none.mark_received(&marked(None))), (None, None));
    }
}
