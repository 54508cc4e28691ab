//! The RIB's view of next hops: each one resolved once, and again when the kernel's routes or BGP's own change.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;

use super::{
    super::nexthop::{self, Kernel, Resolved},
    Entry, Hops, Rib,
};

/// Rounds of routes that move next hops that move routes; resolution is at most two deep, so that two suffice.
const ROUNDS: usize = 8;

#[derive(Clone, Debug)]
struct Hop {
    resolved: Option<Resolved>,
    /// What a route through this hop alone says, external and internal.
    alone: [Option<Arc<Hops>>; 2],
}

impl Hop {
    fn new(resolved: Option<Resolved>) -> Self {
        let alone = |internal| {
            let mut gateways = resolved.as_ref()?.gateways.clone();
            gateways.sort_unstable();
            gateways.dedup();
            Some(Arc::new(Hops { gateways, internal }))
        };
        Self { alone: [alone(false), alone(true)], resolved }
    }
}

#[derive(Clone, Debug, Default)]
pub(super) struct Reach {
    /// `None`: the kernel is not known, and every next hop counts as a neighbour.
    kernel: Option<Kernel>,
    hops: BTreeMap<IpAddr, Hop>,
    /// Next hops to look up again.
    unsettled: BTreeSet<IpAddr>,
    clean_at: usize,
}

impl Reach {
    pub(super) fn reachable(&self, hop: IpAddr) -> bool {
        self.hops.get(&hop).is_some_and(|hop| hop.resolved.is_some())
    }

    pub(super) fn resolved(&self, hop: IpAddr) -> Option<&Resolved> {
        self.hops.get(&hop)?.resolved.as_ref()
    }

    pub(super) fn cost(&self, hop: IpAddr) -> u32 {
        self.resolved(hop).map_or(u32::MAX, |resolved| resolved.cost)
    }

    pub(super) fn gateways(&self, hop: IpAddr) -> impl Iterator<Item = IpAddr> {
        self.resolved(hop).into_iter().flat_map(|resolved| resolved.gateways.iter().copied())
    }

    pub(super) fn alone(&self, hop: IpAddr, internal: bool) -> Option<Arc<Hops>> {
        self.hops.get(&hop)?.alone[usize::from(internal)].clone()
    }

    /// A route of BGP changed: next hops inside its prefix may be reached otherwise now.
    pub(super) fn route_changed(&mut self, prefix: &IpNet) {
        if self.kernel.is_some() && prefix.prefix_len() > 0 {
            let inside = self.hops.range(prefix.network()..=prefix.broadcast()).map(|(hop, _)| *hop);
            self.unsettled.extend(inside);
        }
    }
}

impl Rib {
    /// The kernel's connected and static routes; next hops are resolved by them from now on.
    pub fn kernel(&mut self, routes: impl IntoIterator<Item = (IpNet, Option<IpAddr>)>) {
        let kernel = Kernel::new(routes);
        if self.reach.kernel.as_ref() == Some(&kernel) {
            return;
        }
        let connected = kernel.connected();
        self.reach.kernel = Some(kernel);
        self.reach.unsettled.extend(self.reach.hops.keys().copied());
        if self.local.connected != connected {
            self.local.connected = connected;
            self.evaluate_all();
        }
        self.settle();
    }

    /// Takes note of a next hop.
    pub(super) fn know(&mut self, hop: IpAddr) {
        if self.reach.hops.contains_key(&hop) {
            return;
        }
        if self.reach.hops.len() >= self.reach.clean_at {
            let used: BTreeSet<IpAddr> =
                self.table.iter().flat_map(|(_, entry)| entry.paths.iter().map(|path| path.used().next_hop)).collect();
            self.reach.hops.retain(|hop, _| used.contains(hop));
            self.reach.clean_at = (self.reach.hops.len() * 2).max(1024);
        }
        let resolved = self.resolve(hop);
        self.reach.hops.insert(hop, Hop::new(resolved));
    }

    /// Looks up again what has to be, and decides again who depends on it.
    pub(super) fn settle(&mut self) {
        for _ in 0..ROUNDS {
            let hops = std::mem::take(&mut self.reach.unsettled);
            let mut changed = BTreeSet::new();
            for hop in hops {
                let new = self.resolve(hop);
                let Some(known) = self.reach.hops.get_mut(&hop) else { continue };
                if known.resolved != new {
                    *known = Hop::new(new);
                    changed.insert(hop);
                }
            }
            if changed.is_empty() {
                return;
            }
            let by = |entry: &Entry| entry.paths.iter().any(|path| changed.contains(&path.used().next_hop));
            let prefixes: Vec<IpNet> =
                self.table.iter().filter(|(_, entry)| by(entry)).map(|(prefix, _)| prefix).collect();
            prefixes.into_iter().for_each(|prefix| self.decide(prefix));
        }
        self.reach.unsettled.clear();
    }

    fn resolve(&self, hop: IpAddr) -> Option<Resolved> {
        let Some(kernel) = &self.reach.kernel else {
            return Some(Resolved { gateways: vec![hop], cost: 0, by: IpNet::from(hop) });
        };
        nexthop::resolve(kernel, hop, |prefix| {
            let entry = self.table.get(prefix)?;
            let hops = entry.installed.as_ref()?;
            // Only what the kernel itself resolves may resolve others: no circles.
            let by_kernel = |address: IpAddr| address != hop && self.reach.cost(address) < 2;
            let usable = entry.paths.iter().filter(|path| self.usable(path));
            usable.into_iter().all(|path| by_kernel(path.used().next_hop)).then(|| hops.gateways.clone())
        })
    }
}
