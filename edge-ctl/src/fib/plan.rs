//! What to change in the kernel's main table so that it agrees with BGP. Pure: dumps in, changes out.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use crate::model::{RouteSet, scope};

/// `RTPROT_BGP`: marks the routes that belong to BGP in the kernel's table.
pub const PROTOCOL_BGP: u8 = 186;
/// Kernel metric of routes learnt from external peers: the administrative distance that operators know of eBGP.
pub const METRIC: u32 = 20;
/// Kernel metric of routes learnt inside our AS: the distance of iBGP.
pub const METRIC_INTERNAL: u32 = 200;

/// One next hop of a route in the kernel.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NextHop {
    /// The gateway; `None`: the destination is on the link itself.
    pub gateway: Option<IpAddr>,
    /// Kernel index of the interface.
    pub ifindex: u32,
}

/// A unicast route of the kernel's main table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelRoute {
    /// Destination.
    pub prefix: IpNet,
    /// Kernel metric (`RTA_PRIORITY`); IPv6 routes without one have 1024.
    pub metric: u32,
    /// `rtm_protocol`.
    pub protocol: u8,
    /// Next hops, sorted.
    pub next_hops: Vec<NextHop>,
}

impl KernelRoute {
    /// True for a route installed by a BGP speaker.
    pub fn is_bgp(&self) -> bool {
        self.protocol == PROTOCOL_BGP
    }

    /// True where the destination is reached without a gateway.
    pub fn is_connected(&self) -> bool {
        !self.next_hops.is_empty() && self.next_hops.iter().all(|hop| hop.gateway.is_none())
    }

    fn is_ours(&self) -> bool {
        self.is_bgp() && [METRIC, METRIC_INTERNAL].contains(&self.metric)
    }
}

/// One change of the main table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RouteChange {
    /// Create the route, or change the one of the same prefix and metric in one step.
    Replace {
        /// Destination.
        prefix: IpNet,
        /// Kernel metric.
        metric: u32,
        /// At least one next hop, each with a gateway, sorted.
        next_hops: Vec<NextHop>,
    },
    /// Delete the BGP route of this prefix and metric.
    Delete {
        /// Destination.
        prefix: IpNet,
        /// Kernel metric.
        metric: u32,
    },
}

impl RouteChange {
    /// The prefix it is about.
    pub fn prefix(&self) -> IpNet {
        match self {
            Self::Replace { prefix, .. } | Self::Delete { prefix, .. } => *prefix,
        }
    }
}

/// The kernel's main table as it was last read, indexed for planning.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    routes: BTreeMap<IpNet, Vec<KernelRoute>>,
    /// Kernel indexes of interfaces by the number of their names ([`scope::number`]).
    interfaces: BTreeMap<u32, u32>,
}

impl Table {
    /// Indexes a dump.
    pub fn new(routes: impl IntoIterator<Item = KernelRoute>) -> Self {
        let mut table = Self::default();
        for route in routes {
            table.routes.entry(route.prefix).or_default().push(route);
        }
        for same in table.routes.values_mut() {
            same.sort_by_key(|route| (route.metric, route.protocol));
        }
        table
    }

    /// With the names of interfaces: link-local next hops are on the one that they name.
    #[must_use]
    pub fn with_interfaces<'a>(mut self, links: impl IntoIterator<Item = (u32, &'a str)>) -> Self {
        self.interfaces = links.into_iter().map(|(ifindex, name)| (scope::number(name), ifindex)).collect();
        self
    }

    /// All routes, by prefix.
    pub fn iter(&self) -> impl Iterator<Item = &KernelRoute> {
        self.routes.values().flatten()
    }

    /// Routes that BGP did not install.
    pub fn others(&self) -> impl Iterator<Item = &KernelRoute> {
        self.iter().filter(|route| !route.is_bgp())
    }

    /// Our own route of this prefix; while it moves from one metric to the other, the one that the kernel uses.
    pub fn ours(&self, prefix: &IpNet) -> Option<&KernelRoute> {
        self.all_ours(prefix).min_by_key(|route| route.metric)
    }

    fn all_ours(&self, prefix: &IpNet) -> impl Iterator<Item = &KernelRoute> {
        self.routes.get(prefix).into_iter().flatten().filter(|route| route.is_ours())
    }

    /// Takes over a change that the kernel accepted.
    pub fn apply(&mut self, change: &RouteChange) {
        match change {
            RouteChange::Replace { prefix, metric, next_hops } => {
                let same = self.routes.entry(*prefix).or_default();
                same.retain(|route| route.metric != *metric);
                let route = KernelRoute {
                    prefix: *prefix,
                    metric: *metric,
                    protocol: PROTOCOL_BGP,
                    next_hops: next_hops.clone(),
                };
                same.push(route);
            }
            RouteChange::Delete { prefix, metric } => {
                if let Some(same) = self.routes.get_mut(prefix) {
                    same.retain(|route| !(route.is_bgp() && route.metric == *metric));
                    if same.is_empty() {
                        self.routes.remove(prefix);
                    }
                }
            }
        }
    }

    /// Interface of the connected network that `address` lies in; the longest prefix wins. A link-local address says
    /// nothing about its interface unless it names one, so that it has one only where a single link carries such addresses.
    pub fn on_link(&self, address: IpAddr) -> Option<u32> {
        if let Some(number) = scope::number_of(address) {
            return self.interfaces.get(&number).copied().filter(|ifindex| self.link_local().contains(ifindex));
        }
        if matches!(address, IpAddr::V6(address) if address.is_unicast_link_local()) {
            return self.only_link_local();
        }
        let longest = if address.is_ipv4() { 32 } else { 128 };
        (1..=longest).rev().find_map(|length| {
            let prefix = IpNet::new(address, length).ok()?.trunc();
            let routes = self.routes.get(&prefix)?;
            let route = routes.iter().find(|route| !route.is_bgp() && route.is_connected())?;
            route.next_hops.first().map(|hop| hop.ifindex)
        })
    }

    /// Interfaces with link-local addresses.
    fn link_local(&self) -> BTreeSet<u32> {
        let connected = self.others().filter(|route| route.is_connected());
        connected
            .filter(|route| matches!(route.prefix, IpNet::V6(prefix) if prefix.addr().is_unicast_link_local()))
            .flat_map(|route| route.next_hops.iter().map(|hop| hop.ifindex))
            .collect()
    }

    fn only_link_local(&self) -> Option<u32> {
        let mut links = self.link_local();
        let only = links.pop_first()?;
        links.is_empty().then_some(only)
    }
}

/// What a plan says: changes in an order in which every prefix of the list is valid, and what cannot be installed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Changes to make; empty where the kernel already agrees.
    pub changes: Vec<RouteChange>,
    /// Prefixes that are not installed as BGP wants them, and why.
    pub errors: BTreeMap<IpNet, String>,
}

/// Compares what BGP wants with what the kernel has, for `prefixes` only.
///
/// * A next hop must lie in a connected network (RFC 4271 5.1.3 leaves recursion to the RIB; the kernel refuses others).
///   Hops that do not are left out and reported; a route without any is deleted.
/// * A prefix that is not desired is deleted, unless `keep` says that it may still come back (restart).
/// * A route of somebody else with our metric is never replaced: reported instead.
pub fn plan<'a>(
    desired: &RouteSet,
    keep: &BTreeSet<IpNet>,
    table: &Table,
    prefixes: impl IntoIterator<Item = &'a IpNet>,
) -> Plan {
    let mut plan = Plan::default();
    let mut deletions = Vec::new();
    let mut links = BTreeMap::new();
    for prefix in prefixes {
        let Some(gateways) = desired.get(prefix) else {
            if !keep.contains(prefix) {
                deletions.extend(table.all_ours(prefix).map(delete));
            }
            continue;
        };
        let metric = if desired.is_internal(prefix) { METRIC_INTERNAL } else { METRIC };
        let present = table.all_ours(prefix).find(|route| route.metric == metric);
        let other = table.all_ours(prefix).find(|route| route.metric != metric);
        if let Some(foreign) = conflict(table, prefix, metric) {
            plan.errors.insert(*prefix, foreign);
            continue;
        }
        let (next_hops, off_link) = resolve(table, gateways, &mut links);
        if !off_link.is_empty() {
            plan.errors.insert(*prefix, off_link_text(&off_link));
        }
        // The new one stands before the old one of the other metric goes.
        deletions.extend(other.map(delete));
        if next_hops.is_empty() {
            deletions.extend(present.map(delete));
        } else if present.map(|route| &route.next_hops) != Some(&next_hops) {
            plan.changes.push(RouteChange::Replace { prefix: *prefix, metric, next_hops });
        }
    }
    // Longer prefixes may move to a covering one: what is added comes before what is removed.
    plan.changes.extend(deletions);
    plan
}

fn delete(route: &KernelRoute) -> RouteChange {
    RouteChange::Delete { prefix: route.prefix, metric: route.metric }
}

fn conflict(table: &Table, prefix: &IpNet, metric: u32) -> Option<String> {
    let route = table.routes.get(prefix)?.iter().find(|route| !route.is_bgp() && route.metric == metric)?;
    Some(format!(
        "a route of protocol {} with metric {metric} already stands in the main table; delete it or give it another metric",
        super::protocol_name(route.protocol),
    ))
}

/// `links` remembers what was looked up: many prefixes have few gateways.
fn resolve(
    table: &Table,
    gateways: &[IpAddr],
    links: &mut BTreeMap<IpAddr, Option<u32>>,
) -> (Vec<NextHop>, Vec<IpAddr>) {
    let mut next_hops = BTreeSet::new();
    let mut off_link = Vec::new();
    for gateway in gateways {
        match *links.entry(*gateway).or_insert_with(|| table.on_link(*gateway)) {
            Some(ifindex) => {
                next_hops.insert(NextHop { gateway: Some(scope::bare(*gateway)), ifindex });
            }
            None => off_link.push(*gateway),
        }
    }
    (next_hops.into_iter().collect(), off_link)
}

fn off_link_text(off_link: &[IpAddr]) -> String {
    let hops: Vec<String> = off_link.iter().map(|hop| scope::shown(*hop)).collect();
    format!(
        "next hop {} is in no connected network (or is link-local with several links): check the interface and its address",
        hops.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::RouteUpdate;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn connected(prefix: &str, ifindex: u32) -> KernelRoute {
        let next_hops = vec![NextHop { gateway: None, ifindex }];
        KernelRoute { prefix: net(prefix), metric: 0, protocol: 2, next_hops }
    }

    fn bgp(prefix: &str, gateways: &[&str]) -> KernelRoute {
        let next_hops =
            gateways.iter().map(|hop| NextHop { gateway: Some(hop.parse().unwrap()), ifindex: 2 }).collect();
        KernelRoute { prefix: net(prefix), metric: METRIC, protocol: PROTOCOL_BGP, next_hops }
    }

    fn set(routes: &[(&str, &[&str])]) -> RouteSet {
        let mut set = RouteSet::default();
        for (prefix, hops) in routes {
            let next_hops = hops.iter().map(|hop| hop.parse().unwrap()).collect();
            set.apply(RouteUpdate { prefix: net(prefix), next_hops, internal: false });
        }
        set
    }

    fn all(desired: &RouteSet, table: &Table) -> BTreeSet<IpNet> {
        desired.iter().map(|(prefix, _)| *prefix).chain(table.iter().map(|route| route.prefix)).collect()
    }

    fn run(desired: &RouteSet, table: &Table) -> Plan {
        plan(desired, &BTreeSet::new(), table, &all(desired, table))
    }

    #[test]
    fn a_kernel_that_agrees_gets_no_change() {
        let desired = set(&[("10.1.0.0/24", &["172.16.1.80", "172.16.1.81"])]);
        let table = Table::new([connected("172.16.1.0/24", 2), bgp("10.1.0.0/24", &["172.16.1.80", "172.16.1.81"])]);
        assert_eq!(run(&desired, &table), Plan::default());
    }

    #[test]
    fn new_routes_come_before_deletions() {
        let desired = set(&[("10.1.0.0/16", &["172.16.1.80"])]);
        let table = Table::new([connected("172.16.1.0/24", 2), bgp("10.1.0.0/24", &["172.16.1.80"])]);
        let changes = run(&desired, &table).changes;
        assert!(matches!(changes[0], RouteChange::Replace { .. }));
        assert_eq!(changes[1], RouteChange::Delete { prefix: net("10.1.0.0/24"), metric: METRIC });
    }

    #[test]
    fn a_next_hop_off_the_link_is_left_out_and_named() {
        let desired = set(&[("10.1.0.0/24", &["172.16.1.80", "192.0.2.1"])]);
        let table = Table::new([connected("172.16.1.0/24", 2)]);
        let plan = run(&desired, &table);
        let hops = vec![NextHop { gateway: Some("172.16.1.80".parse().unwrap()), ifindex: 2 }];
        assert_eq!(
            plan.changes,
            [RouteChange::Replace { prefix: net("10.1.0.0/24"), metric: METRIC, next_hops: hops }]
        );
        assert!(plan.errors[&net("10.1.0.0/24")].contains("192.0.2.1"));
    }

    #[test]
    fn a_route_whose_every_next_hop_left_the_link_is_deleted() {
        let desired = set(&[("10.1.0.0/24", &["172.16.1.80"])]);
        let table = Table::new([bgp("10.1.0.0/24", &["172.16.1.80"])]);
        assert_eq!(run(&desired, &table).changes, [RouteChange::Delete { prefix: net("10.1.0.0/24"), metric: METRIC }]);
    }

    #[test]
    fn somebody_elses_route_with_our_metric_is_reported_and_left_alone() {
        let desired = set(&[("10.1.0.0/24", &["172.16.1.80"])]);
        let mut foreign = bgp("10.1.0.0/24", &["172.16.1.99"]);
        foreign.protocol = 4;
        let table = Table::new([connected("172.16.1.0/24", 2), foreign]);
        let plan = run(&desired, &table);
        assert!(plan.changes.is_empty());
        assert!(plan.errors[&net("10.1.0.0/24")].contains("static"));
    }

    #[test]
    fn a_stale_route_is_kept_while_bgp_has_not_converged() {
        let table = Table::new([connected("172.16.1.0/24", 2), bgp("10.1.0.0/24", &["172.16.1.80"])]);
        let desired = RouteSet::default();
        let keep = BTreeSet::from([net("10.1.0.0/24")]);
        assert!(plan(&desired, &keep, &table, &all(&desired, &table)).changes.is_empty());
        assert_eq!(run(&desired, &table).changes.len(), 1);
    }

    #[test]
    fn a_default_route_does_not_make_a_next_hop_on_link() {
        let table = Table::new([connected("0.0.0.0/0", 2)]);
        assert_eq!(table.on_link("192.0.2.1".parse().unwrap()), None);
    }

    #[test]
    fn a_link_local_next_hop_is_on_link_only_where_a_single_link_has_such_addresses() {
        let hop = "fe80::1".parse().unwrap();
        assert_eq!(Table::new([connected("fe80::/64", 2)]).on_link(hop), Some(2));
        assert_eq!(Table::new([connected("fe80::/64", 2), connected("fe80::/64", 3)]).on_link(hop), None);
    }

    proptest! {
        #[test]
        fn applying_a_plan_leaves_nothing_to_plan(
            want in proptest::collection::btree_map(0u8..16, proptest::collection::btree_set(1u8..6, 1..4), 0..12),
            have in proptest::collection::btree_map(0u8..16, proptest::collection::btree_set(1u8..6, 1..4), 0..12),
        ) {
            let hop = |n: &u8| format!("172.16.1.{n}");
            let mut desired = RouteSet::default();
            for (n, hops) in &want {
                let next_hops = hops.iter().map(|n| hop(n).parse().unwrap()).collect();
                desired.apply(RouteUpdate { prefix: net(&format!("10.1.{n}.0/24")), next_hops, internal: false });
            }
            let mut routes = vec![connected("172.16.1.0/30", 2)];
            for (n, hops) in &have {
                let hops: Vec<String> = hops.iter().map(hop).collect();
                let hops: Vec<&str> = hops.iter().map(String::as_str).collect();
                routes.push(bgp(&format!("10.1.{n}.0/24"), &hops));
            }
            let mut table = Table::new(routes);
            let first = run(&desired, &table);
            for change in &first.changes {
                table.apply(change);
            }
            prop_assert_eq!(run(&desired, &table).changes, vec![]);
            // Nothing but on-link next hops (172.16.1.0/30) of desired prefixes is left.
            for route in table.iter().filter(|route| route.is_bgp()) {
                prop_assert!(desired.iter().any(|(prefix, _)| *prefix == route.prefix));
                prop_assert!(route.next_hops.iter().all(|hop| table.on_link(hop.gateway.unwrap()).is_some()));
            }
        }
    }
}
