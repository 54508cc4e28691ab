//! Routes as BGP decides them and the FIB installs them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

/// A change of the best routes towards one prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteUpdate {
    /// The prefix.
    pub prefix: IpNet,
    /// Equal-cost gateways, sorted; empty: the prefix is gone.
    pub next_hops: Vec<IpAddr>,
    /// The best path was learnt inside our AS.
    pub internal: bool,
}

/// Path attributes of a prefix that we originate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PathAttributes {
    /// Communities of all kinds.
    pub communities: Vec<super::Community>,
    /// MULTI_EXIT_DISC.
    pub med: Option<u32>,
    /// LOCAL_PREF, to iBGP peers only; `None`: 100.
    pub local_pref: Option<u32>,
    /// How many times more than once our AS number stands in the path towards external peers.
    pub prepend: u8,
}

/// How routes say where they lead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NextHopStyle {
    /// By next-hop objects, one for each gateway, and groups of them (Linux 5.3).
    #[default]
    Objects,
    /// So too, with resilient groups: flows keep their way where others go (Linux 5.13).
    Resilient,
    /// Each by itself.
    Inline,
}

/// Best routes by prefix, with longest-prefix lookup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteSet {
    routes: BTreeMap<IpNet, Vec<IpAddr>>,
    /// Those learnt inside our AS.
    internal: BTreeSet<IpNet>,
}

impl RouteSet {
    /// Applies one update; true where it changed anything.
    pub fn apply(&mut self, update: RouteUpdate) -> bool {
        if update.next_hops.is_empty() {
            self.internal.remove(&update.prefix);
            return self.routes.remove(&update.prefix).is_some();
        }
        let moved = match update.internal {
            true => self.internal.insert(update.prefix),
            false => self.internal.remove(&update.prefix),
        };
        match self.routes.get_mut(&update.prefix) {
            Some(before) if *before == update.next_hops => moved,
            Some(before) => {
                *before = update.next_hops;
                true
            }
            None => {
                self.routes.insert(update.prefix, update.next_hops);
                true
            }
        }
    }

    /// True where the route of exactly this prefix was learnt inside our AS.
    pub fn is_internal(&self, prefix: &IpNet) -> bool {
        self.internal.contains(prefix)
    }

    /// Next hops of exactly this prefix.
    pub fn get(&self, prefix: &IpNet) -> Option<&[IpAddr]> {
        self.routes.get(prefix).map(Vec::as_slice)
    }

    /// The longest prefix that covers `address`, and its next hops.
    pub fn lookup(&self, address: IpAddr) -> Option<(IpNet, &[IpAddr])> {
        let longest = if address.is_ipv4() { 32 } else { 128 };
        (0..=longest).rev().find_map(|length| {
            let prefix = IpNet::new(address, length).ok()?.trunc();
            self.routes.get(&prefix).map(|hops| (prefix, hops.as_slice()))
        })
    }

    /// All routes, by prefix.
    pub fn iter(&self) -> impl Iterator<Item = (&IpNet, &[IpAddr])> {
        self.routes.iter().map(|(prefix, hops)| (prefix, hops.as_slice()))
    }

    /// Number of prefixes.
    pub fn len(&self) -> usize {
        self.routes.len()
    }

    /// True where there is none.
    pub fn is_empty(&self) -> bool {
        self.routes.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn update(prefix: &str, hops: &[&str]) -> RouteUpdate {
        RouteUpdate {
            prefix: prefix.parse().unwrap(),
            next_hops: hops.iter().map(|hop| hop.parse().unwrap()).collect(),
            internal: false,
        }
    }

    #[test]
    fn the_longest_prefix_wins_and_a_withdrawal_uncovers_the_next() {
        let mut routes = RouteSet::default();
        routes.apply(update("10.1.0.0/16", &["172.16.1.1"]));
        routes.apply(update("10.1.2.0/24", &["172.16.1.82"]));
        let pod = "10.1.2.7".parse().unwrap();
        assert_eq!(routes.lookup(pod).unwrap().0.to_string(), "10.1.2.0/24");
        assert!(routes.apply(update("10.1.2.0/24", &[])));
        assert_eq!(routes.lookup(pod).unwrap().0.to_string(), "10.1.0.0/16");
        assert!(routes.lookup("10.2.0.1".parse().unwrap()).is_none());
    }

    #[test]
    fn the_same_update_twice_changes_nothing_the_second_time() {
        let mut routes = RouteSet::default();
        assert!(routes.apply(update("10.1.0.0/24", &["172.16.1.80"])));
        assert!(!routes.apply(update("10.1.0.0/24", &["172.16.1.80"])));
    }
}
