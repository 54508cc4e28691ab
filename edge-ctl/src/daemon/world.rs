//! What the daemon knows of the world at this moment: the inputs of `desired::build`, kept up to date event by event.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use crate::{
    config::valid::Config,
    desired::{self, AdoptedBackend, DesiredState, Inputs},
    model::{BackendSource, Frontend, PoolSnapshot, RouteSet, RouteUpdate},
};

/// Inputs of the desired state, owned.
#[derive(Debug, Default)]
pub struct World {
    /// What each source last said.
    pub pools: BTreeMap<BackendSource, PoolSnapshot>,
    /// BGP's best routes as taught in this life.
    learnt: RouteSet,
    /// The same over the BGP routes that an earlier life left in the kernel; serves until routes have settled.
    with_stale: RouteSet,
    /// False until BGP has converged.
    pub routes_settled: bool,
    /// True while the program is attached to every configured interface.
    pub datapath_ready: bool,
    /// Connected and static prefixes of the kernel, with their gateways.
    pub kernel_routes: Vec<(IpNet, Option<IpAddr>)>,
    /// Our own address towards each backend address.
    pub snat_sources: BTreeMap<IpAddr, IpAddr>,
    /// The pools found in the maps at start.
    pub adopted: BTreeMap<Frontend, Vec<AdoptedBackend>>,
}

impl World {
    /// The world at start: nothing heard yet, the kernel's leftover BGP routes still trusted.
    pub fn new(adopted: BTreeMap<Frontend, Vec<AdoptedBackend>>, stale: RouteSet) -> Self {
        Self { adopted, with_stale: stale, ..Self::default() }
    }

    /// The routes in force: the learnt ones, and the stale ones until routes have settled.
    pub fn routes(&self) -> &RouteSet {
        if self.routes_settled { &self.learnt } else { &self.with_stale }
    }

    /// Only what BGP taught in this life.
    pub fn learnt(&self) -> &RouteSet {
        &self.learnt
    }

    /// Takes over a batch of route changes; true where one of them changes the way to a backend. After a restart peers
    /// send again what the kernel still has, which changes nothing.
    pub fn apply_routes(&mut self, updates: &[RouteUpdate]) -> bool {
        let backends = self.backend_addresses();
        let mut moved = false;
        for update in updates {
            let changed = self.with_stale.apply(update.clone());
            self.learnt.apply(update.clone());
            moved |= changed && backends.iter().any(|backend| update.prefix.contains(backend));
        }
        moved
    }

    /// Drops pools of sources that no service names any more.
    pub fn retain_sources(&mut self, config: &Config) {
        let used: BTreeSet<_> = config.services.values().map(|service| &service.backends).collect();
        self.pools.retain(|source, _| used.contains(source));
    }

    /// Every address that is, or at start was, a backend.
    pub fn backend_addresses(&self) -> BTreeSet<IpAddr> {
        let members = self.pools.values().flat_map(|pool| pool.members.iter().map(|member| member.address.ip()));
        let adopted = self.adopted.values().flatten().map(|backend| backend.address.ip());
        members.chain(adopted).collect()
    }

    /// The desired state of this world under `config`.
    pub fn desired(&self, config: &Config) -> DesiredState {
        let nodes = node_names(config);
        let kernel_prefixes: Vec<IpNet> = self.kernel_routes.iter().map(|(prefix, _)| *prefix).collect();
        desired::build(
            config,
            &Inputs {
                pools: &self.pools,
                routes: self.routes(),
                kernel_prefixes: &kernel_prefixes,
                nodes: &nodes,
                snat_sources: &self.snat_sources,
                adopted: &self.adopted,
                routes_settled: self.routes_settled,
                datapath_ready: self.datapath_ready,
            },
        )
    }
}

/// Node names by BGP next hop: the description of the peer with that address.
fn node_names(config: &Config) -> BTreeMap<IpAddr, String> {
    let peers = config.bgp.iter().flat_map(|bgp| bgp.peers.values());
    peers.filter(|peer| !peer.description.is_empty()).map(|peer| (peer.address, peer.description.clone())).collect()
}
