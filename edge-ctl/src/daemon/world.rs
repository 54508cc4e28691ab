//! What the daemon knows of the world at this moment: the inputs of `desired::build`, kept up to date event by event.
//!
//! A route that goes counts at once; one that comes counts when the kernel has it, since a flow made earlier would leave
//! by the default route. What the kernel has yet to be told waits here, newest change of each prefix only, so that a
//! full table is installed piece by piece between other events.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{Arc, OnceLock},
};

use ipnet::IpNet;

use crate::{
    config::valid::Config,
    desired::{self, AdoptedBackend, DesiredFrontend, DesiredState, Inputs},
    model::{AdminOrders, BackendSource, Frontend, HostFault, PoolSnapshot, RouteSet, RouteUpdate},
    sources::health::Verdicts,
};

/// So many sources towards backends may be known without a look at which are gone.
const FEW_SOURCES: usize = 1024;

/// Inputs of the desired state, owned.
#[derive(Debug, Default)]
pub struct World {
    /// What each source last said.
    pools: BTreeMap<BackendSource, PoolSnapshot>,
    /// Every address in these and among the adopted, found when it is asked for.
    addresses: OnceLock<Arc<BTreeSet<IpAddr>>>,
    /// BGP's best routes as taught in this life, as far as the kernel has them.
    learnt: RouteSet,
    /// The same over the BGP routes that an earlier life left in the kernel; serves until routes have settled. `None`: it
    /// left none.
    with_stale: Option<RouteSet>,
    /// Route changes that the kernel has yet to be told.
    waiting: BTreeMap<IpNet, RouteUpdate>,
    /// True while it is being told of some.
    telling: bool,
    converged: bool,
    routes_settled: bool,
    /// Backends that a route or prefix covered at some time since the start, kept until routes have settled.
    covered: BTreeSet<IpAddr>,
    /// True while the program is attached to every configured interface.
    pub datapath_ready: bool,
    /// VIPs that the host does not hold although it should.
    pub unheld: BTreeSet<IpAddr>,
    /// Addresses of the host's own, on other interfaces than `lo`.
    pub own: BTreeSet<IpAddr>,
    /// What settings of the host break.
    pub host_faults: BTreeSet<HostFault>,
    /// Connected and static prefixes of the kernel, with their gateways.
    pub kernel_routes: Vec<(IpNet, Option<IpAddr>)>,
    /// Our own address towards each backend address.
    pub snat_sources: BTreeMap<IpAddr, IpAddr>,
    /// How many of those there may be before those that are gone are looked for.
    most_sources: usize,
    /// What checks last said.
    pub verdicts: Arc<Verdicts>,
    /// What administrators ordered.
    pub orders: AdminOrders,
    /// The pools in the maps at start, or at the last reload.
    adopted: BTreeMap<Frontend, Vec<AdoptedBackend>>,
    /// The state that was built last.
    built: DesiredState,
    /// That state has every service of the configuration in force.
    is_whole: bool,
}

impl World {
    /// The world at start: nothing heard yet, the kernel's leftover BGP routes still trusted.
    pub fn new(adopted: BTreeMap<Frontend, Vec<AdoptedBackend>>, stale: RouteSet) -> Self {
        Self { adopted, with_stale: Some(stale).filter(|stale| !stale.is_empty()), ..Self::default() }
    }

    /// The routes in force: the learnt ones, and the stale ones until routes have settled.
    fn routes(&self) -> &RouteSet {
        self.with_stale.as_ref().unwrap_or(&self.learnt)
    }

    /// Only what BGP taught in this life.
    pub fn learnt(&self) -> &RouteSet {
        &self.learnt
    }

    /// Takes note of route changes. Those that go count from now on; returns the backends behind them. The kernel is to
    /// be told of all of them: [`World::next_changes`].
    pub fn hear(&mut self, updates: Vec<RouteUpdate>) -> BTreeSet<IpAddr> {
        let backends = self.backend_addresses();
        let mut lost = BTreeSet::new();
        for update in updates {
            if update.next_hops.is_empty() && self.take_over(&update) {
                lost.extend(behind(&backends, &update.prefix));
            }
            self.waiting.insert(update.prefix, update);
        }
        lost
    }

    /// Up to `limit` changes that the kernel is to be told next; [`World::in_kernel`] says that it was.
    pub fn next_changes(&mut self, limit: usize) -> Vec<RouteUpdate> {
        let mut changes = Vec::new();
        while changes.len() < limit
            && let Some((_, update)) = self.waiting.pop_first()
        {
            changes.push(update);
        }
        self.telling = !changes.is_empty();
        changes
    }

    /// True while the kernel is to be told of changes, and is not being told of others.
    pub fn has_changes(&self) -> bool {
        !self.waiting.is_empty() && !self.telling
    }

    /// The kernel has these: from now on they count, but for those about which something newer has been heard. Returns the
    /// backends to which the way has changed. After a restart peers send again what the kernel still has, which changes
    /// nothing.
    pub fn in_kernel(&mut self, changes: &[RouteUpdate]) -> BTreeSet<IpAddr> {
        self.telling = false;
        let backends = self.backend_addresses();
        let mut moved = BTreeSet::new();
        for change in changes {
            if self.waiting.contains_key(&change.prefix) {
                continue;
            }
            // A withdrawal has counted since it was heard, but only now is the kernel's route gone.
            if self.take_over(change) || change.next_hops.is_empty() {
                moved.extend(behind(&backends, &change.prefix));
            }
        }
        moved
    }

    /// True where it changes the routes in force.
    fn take_over(&mut self, update: &RouteUpdate) -> bool {
        let of_learnt = self.learnt.apply(update.clone());
        self.with_stale.as_mut().map_or(of_learnt, |routes| routes.apply(update.clone()))
    }

    /// BGP says that it has converged: routes settle as soon as the kernel has all of them.
    pub fn converged(&mut self) {
        self.converged = true;
    }

    /// Once, when BGP has converged and the kernel has its routes: from now on only learnt routes count. Returns the
    /// backends to which the way has changed by that.
    pub fn settle(&mut self) -> Option<BTreeSet<IpAddr>> {
        if !self.converged || self.routes_settled || self.telling || !self.waiting.is_empty() {
            return None;
        }
        let mut moved = BTreeSet::new();
        if let Some(stale) = self.with_stale.take() {
            moved = (*self.backend_addresses()).clone();
            moved.retain(|backend| stale.lookup(*backend) != self.learnt.lookup(*backend));
        }
        self.routes_settled = true;
        self.covered.clear();
        Some(moved)
    }

    /// Takes over what a source says, where a service still asks it: an answer may have been under way during a reload.
    pub fn hear_pool(&mut self, config: &Config, pool: PoolSnapshot) {
        if config.services.values().any(|service| service.backends == pool.source) {
            self.set_pool(pool);
        }
    }

    /// Takes over what a source says.
    pub fn set_pool(&mut self, pool: PoolSnapshot) {
        self.addresses.take();
        self.pools.insert(pool.source.clone(), pool);
    }

    /// Another configuration is in force. Drops the pools of sources that no service names any more, and adopts the pools
    /// that serve now (`current`): they stand in where a frontend has a source that has not answered yet.
    pub fn reconfigure(&mut self, config: &Config, current: &DesiredState) {
        self.addresses.take();
        let used: BTreeSet<_> = config.services.values().map(|service| &service.backends).collect();
        self.pools.retain(|source, _| used.contains(source));
        for (frontend, desired) in &current.frontends {
            let Some(pool) = &desired.pool else { continue };
            let adopt = |backend: &desired::DesiredBackend| AdoptedBackend {
                address: backend.address,
                weight: backend.weight,
                share: backend.share,
                tier: backend.tier,
                eligible: backend.eligible(),
                snat_address: backend.snat_address,
            };
            self.adopted.insert(*frontend, pool.iter().map(adopt).collect());
        }
        self.is_whole = false;
        let listens: BTreeSet<_> = config.services.values().flat_map(|service| &service.listen).collect();
        self.adopted.retain(|frontend, _| listens.contains(frontend));
    }

    /// The pools found in the maps at start, or that served before the last reload.
    pub fn adopted(&self) -> &BTreeMap<Frontend, Vec<AdoptedBackend>> {
        &self.adopted
    }

    /// True where addresses of backends that are gone may make up half of those with a known source.
    pub fn has_many_sources(&self) -> bool {
        self.snat_sources.len() > self.most_sources.max(FEW_SOURCES)
    }

    /// Forgets the sources towards backends that are gone.
    pub fn forget_sources(&mut self) {
        let backends = self.backend_addresses();
        self.snat_sources.retain(|backend, _| backends.contains(backend));
        self.most_sources = self.snat_sources.len().saturating_mul(2);
    }

    /// Every address that is, or at start was, a backend.
    pub fn backend_addresses(&self) -> Arc<BTreeSet<IpAddr>> {
        let find = || {
            let members = self.pools.values().flat_map(|pool| pool.members.iter().map(|member| member.address.ip()));
            let adopted = self.adopted.values().flatten().map(|backend| backend.address.ip());
            members.chain(adopted).collect::<BTreeSet<_>>().into()
        };
        Arc::clone(self.addresses.get_or_init(find))
    }

    /// The desired state of this world under `config`.
    #[cfg(test)]
    pub fn desired(&mut self, config: &Config) -> DesiredState {
        self.desired_of(config, None)
    }

    /// Services with a backend at one of these addresses, as of the state that was built last.
    pub fn services_at(&self, addresses: &BTreeSet<IpAddr>) -> BTreeSet<String> {
        let has = |frontend: &&Arc<DesiredFrontend>| {
            frontend.pool.iter().flatten().any(|backend| addresses.contains(&backend.address.ip()))
        };
        self.built.frontends.values().filter(has).map(|frontend| frontend.service.clone()).collect()
    }

    /// These addresses by the most specific route that covers them; the default route's, and no route's, together.
    pub fn by_route(&self, addresses: BTreeSet<IpAddr>) -> Vec<Vec<IpAddr>> {
        let mut groups: BTreeMap<Option<IpNet>, Vec<IpAddr>> = BTreeMap::new();
        for address in addresses {
            groups.entry(self.route(address).map(|(prefix, _)| prefix)).or_default().push(address);
        }
        groups.into_values().collect()
    }

    /// True where the next hop towards an address is a router, which many addresses have in common.
    pub fn is_behind_gateway(&self, address: IpAddr) -> bool {
        self.route(address).is_some_and(|(_, gateway)| gateway)
    }

    /// The most specific route to an address but the default route, and whether it leads by way of a router.
    fn route(&self, address: IpAddr) -> Option<(IpNet, bool)> {
        let learnt = self.routes().lookup(address).map(|(prefix, hops)| (prefix, !hops.is_empty()));
        let kernel = self.kernel_routes.iter().filter(|(prefix, _)| prefix.contains(&address));
        let kernel = kernel.map(|(prefix, gateway)| (*prefix, gateway.is_some()));
        kernel.chain(learnt).max_by_key(|(prefix, _)| prefix.prefix_len())
    }

    /// The services to build anew where only these have changed; `None`: all of them.
    pub fn concerned<'a>(&self, services: Option<&'a BTreeSet<String>>) -> Option<&'a BTreeSet<String>> {
        // Until routes have settled the doubt that backends are given depends on more than their own services.
        services.filter(|_| self.routes_settled && self.is_whole)
    }

    /// The desired state of this world under `config`, where since the last time only what concerns these services has
    /// changed; `None`: whatever may have.
    pub fn desired_of(&mut self, config: &Config, services: Option<&BTreeSet<String>>) -> DesiredState {
        let kernel_prefixes: Vec<IpNet> = self.kernel_routes.iter().map(|(prefix, _)| *prefix).collect();
        if !self.routes_settled {
            let backends = self.backend_addresses();
            let routes = self.with_stale.as_ref().unwrap_or(&self.learnt);
            let covered =
                backends.iter().copied().filter(|backend| desired::is_covered(routes, &kernel_prefixes, *backend));
            self.covered.extend(covered);
        }
        let nodes = node_names(config);
        let services = self.concerned(services);
        let built = desired::rebuild(
            config,
            &Inputs {
                pools: &self.pools,
                routes: self.routes(),
                kernel_prefixes: &kernel_prefixes,
                nodes: &nodes,
                snat_sources: &self.snat_sources,
                adopted: &self.adopted,
                routes_settled: self.routes_settled,
                covered_before: &self.covered,
                datapath_ready: self.datapath_ready,
                unheld: &self.unheld,
                own: &self.own,
                host_faults: &self.host_faults,
                verdicts: &self.verdicts,
                orders: &self.orders,
            },
            &self.built,
            services,
        );
        self.built = built.clone();
        self.is_whole = true;
        built
    }
}

/// Services of which a verdict came, went or changed.
pub fn services_of_changes(before: &Verdicts, after: &Verdicts) -> BTreeSet<String> {
    let changed = |one: &Verdicts, other: &Verdicts| -> BTreeSet<String> {
        let differs = one.iter().filter(|(key, verdict)| other.get(*key) != Some(*verdict));
        differs.map(|((service, _), _)| service.clone()).collect()
    };
    let mut services = changed(before, after);
    services.extend(changed(after, before));
    services
}

/// The addresses in a prefix.
fn behind<'a>(backends: &'a BTreeSet<IpAddr>, prefix: &IpNet) -> impl Iterator<Item = &'a IpAddr> {
    backends.range(prefix.network()..=prefix.broadcast())
}

/// Node names by BGP next hop: the description of the peer with that address, or of whoever is found on its link.
fn node_names(config: &Config) -> BTreeMap<IpAddr, String> {
    let peers = config.bgp.iter().flat_map(|bgp| bgp.peers.values().chain(bgp.links.values()));
    peers.filter(|peer| !peer.description.is_empty()).map(|peer| (peer.address, peer.description.clone())).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{
        config,
        desired::{DesiredBackend, Exclusion},
        model::{PoolMember, PoolState},
    };

    const CONFIG: &str = r#"
        [edge]
        interfaces = ["ens33"]
        pod_networks = ["10.1.0.0/16"]
        [resolver.kube-dns]
        servers = ["10.1.0.41"]
        [bgp]
        asn = 64512
        router_id = "172.16.1.88"
        [[bgp.peer]]
        address = "172.16.1.80"
        remote_asn = 64512
        description = "kcontrol"
        [service.web]
        listen = ["172.16.1.88:443/tcp"]
        backends = { dns = "web.cluster.local", port = 443, resolver = "kube-dns" }
        announce = true
    "#;
    const HOST: &str = "172.16.1.88";

    fn config(text: &str) -> Config {
        config::parse(text, Path::new("edge.toml")).unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn update(prefix: &str, hops: &[&str]) -> RouteUpdate {
        RouteUpdate {
            prefix: prefix.parse().unwrap(),
            next_hops: hops.iter().map(|hop| ip(hop)).collect(),
            internal: false,
        }
    }

    fn member(text: &str) -> PoolMember {
        PoolMember::new(text.parse().unwrap(), 1)
    }

    fn pool(config: &Config, members: &[&str]) -> PoolSnapshot {
        let source = config.services["web"].backends.clone();
        PoolSnapshot { source, members: members.iter().map(|text| member(text)).collect(), state: PoolState::Fresh }
    }

    /// A world whose backends are reached from the host's address.
    fn world(adopted: &[&str], stale: &[&str]) -> World {
        let backend = |text: &&str| AdoptedBackend {
            address: text.parse().unwrap(),
            weight: 1,
            share: 100,
            tier: crate::model::Tier::Primary,
            eligible: true,
            snat_address: Some(ip(HOST)),
        };
        let frontend = config(CONFIG).services["web"].listen[0];
        let mut routes = RouteSet::default();
        for prefix in stale {
            routes.apply(update(prefix, &["172.16.1.80"]));
        }
        let adopted = match adopted {
            [] => BTreeMap::new(),
            some => BTreeMap::from([(frontend, some.iter().map(backend).collect())]),
        };
        let mut world = World::new(adopted, routes);
        world.datapath_ready = true;
        for last in 0..4 {
            for third in 0..4 {
                world.snat_sources.insert(IpAddr::from([10, 1, third, last]), ip(HOST));
            }
        }
        world
    }

    /// What the loop does between two events.
    fn install(world: &mut World) {
        while world.has_changes() {
            let changes = world.next_changes(2);
            world.in_kernel(&changes);
        }
    }

    fn backends(state: &DesiredState) -> &[DesiredBackend] {
        state.frontends.values().next().and_then(|frontend| frontend.pool.as_deref()).unwrap_or_default()
    }

    fn eligible(state: &DesiredState) -> Vec<String> {
        backends(state).iter().filter(|b| b.eligible()).map(|b| b.address.to_string()).collect()
    }

    #[test]
    fn a_new_route_counts_when_the_kernel_has_it_and_a_lost_one_at_once() {
        let config = config(CONFIG);
        let mut world = world(&[], &[]);
        world.converged();
        world.settle();
        world.hear_pool(&config, pool(&config, &["10.1.0.1:443"]));
        assert!(world.hear(vec![update("10.1.0.0/24", &["172.16.1.80"])]).is_empty());
        assert_eq!(eligible(&world.desired(&config)), [""; 0], "its packets would leave by the default route");
        let changes = world.next_changes(10);
        assert_eq!(world.in_kernel(&changes), BTreeSet::from([ip("10.1.0.1")]));
        assert_eq!(eligible(&world.desired(&config)), ["10.1.0.1:443"]);
        assert_eq!(world.hear(vec![update("10.1.0.0/24", &[])]), BTreeSet::from([ip("10.1.0.1")]));
        assert_eq!(eligible(&world.desired(&config)), [""; 0]);
        assert_eq!(world.next_changes(10), [update("10.1.0.0/24", &[])]);
    }

    #[test]
    fn changes_that_wait_for_the_kernel_are_one_per_prefix_however_much_it_flaps() {
        let mut world = world(&[], &[]);
        for _ in 0..100 {
            world.hear(vec![update("10.1.0.0/24", &["172.16.1.80"]), update("10.1.1.0/24", &["172.16.1.81"])]);
            world.hear(vec![update("10.1.0.0/24", &[])]);
        }
        assert_eq!(world.next_changes(10), [update("10.1.0.0/24", &[]), update("10.1.1.0/24", &["172.16.1.81"])]);
        assert!(!world.has_changes());
    }

    #[test]
    fn a_route_that_is_lost_while_the_kernel_is_told_of_it_never_counts() {
        let config = config(CONFIG);
        let mut world = world(&[], &[]);
        world.converged();
        world.settle();
        world.hear_pool(&config, pool(&config, &["10.1.0.1:443"]));
        world.hear(vec![update("10.1.0.0/24", &["172.16.1.80"])]);
        let coming = world.next_changes(10);
        world.hear(vec![update("10.1.0.0/24", &[])]);
        assert!(!world.has_changes(), "one after the other, or the kernel would keep it");
        assert!(world.in_kernel(&coming).is_empty());
        assert_eq!(eligible(&world.desired(&config)), [""; 0]);
        let going = world.next_changes(10);
        assert_eq!(going, [update("10.1.0.0/24", &[])]);
        assert_eq!(world.in_kernel(&going), BTreeSet::from([ip("10.1.0.1")]));
        assert_eq!(eligible(&world.desired(&config)), [""; 0]);
    }

    #[test]
    fn a_route_lost_while_others_have_yet_to_settle_is_news_even_for_an_adopted_backend() {
        let config = config(CONFIG);
        let mut world = world(&["10.1.0.1:443", "10.1.1.1:443"], &["10.1.0.0/24"]);
        assert_eq!(world.desired(&config).frontends.values().next().unwrap().eligible(), 2, "none is news yet");
        world.hear(vec![update("10.1.0.0/24", &[])]);
        let state = world.desired(&config);
        assert_eq!(eligible(&state), ["10.1.1.1:443"]);
        assert_eq!(backends(&state)[0].excluded, Some(Exclusion::NoRoute));
    }

    #[test]
    fn routes_settle_when_the_kernel_has_what_bgp_converged_on_and_not_before() {
        let config = config(CONFIG);
        let mut world = world(&["10.1.0.1:443", "10.1.1.1:443"], &["10.1.0.0/24", "10.1.1.0/24"]);
        world.hear(vec![update("10.1.0.0/24", &["172.16.1.80"])]);
        world.converged();
        assert_eq!(world.settle(), None);
        install(&mut world);
        assert_eq!(world.settle(), Some(BTreeSet::from([ip("10.1.1.1")])), "its stale route goes");
        assert_eq!(world.settle(), None, "once");
        assert_eq!(eligible(&world.desired(&config)), ["10.1.0.1:443"]);
    }

    #[test]
    fn a_route_that_left_with_the_settling_and_comes_back_is_a_change() {
        let mut world = world(&["10.1.1.1:443"], &["10.1.1.0/24"]);
        world.converged();
        world.settle();
        world.hear(vec![update("10.1.1.0/24", &["172.16.1.80"])]);
        let changes = world.next_changes(10);
        assert_eq!(world.in_kernel(&changes), BTreeSet::from([ip("10.1.1.1")]));
    }

    #[test]
    fn a_restart_with_unchanged_routes_changes_the_way_to_nobody() {
        let mut world = world(&["10.1.0.1:443"], &["10.1.0.0/24"]);
        world.hear(vec![update("10.1.0.0/24", &["172.16.1.80"])]);
        let changes = world.next_changes(10);
        assert!(world.in_kernel(&changes).is_empty());
        world.converged();
        assert_eq!(world.settle(), Some(BTreeSet::new()));
    }

    #[test]
    fn a_source_that_changes_by_a_reload_leaves_the_pool_of_today_in_place_not_that_of_the_start() {
        let old = config(CONFIG);
        let mut world = world(&["10.1.0.1:443"], &["10.1.0.0/16"]);
        world.hear(vec![update("10.1.0.0/16", &["172.16.1.80"])]);
        install(&mut world);
        world.converged();
        world.settle();
        world.hear_pool(&old, pool(&old, &["10.1.2.2:443"]));
        let today = world.desired(&old);
        let new = config(&CONFIG.replace("web.cluster.local", "web2.cluster.local"));
        world.reconfigure(&new, &today);
        let state = world.desired(&new);
        assert_eq!(eligible(&state), ["10.1.2.2:443"]);
        assert_eq!(state.announcements, today.announcements, "the VIP is not withdrawn meanwhile");
        world.hear_pool(&new, pool(&old, &["10.1.3.3:443"]));
        assert_eq!(eligible(&world.desired(&new)), ["10.1.2.2:443"], "an answer of the old source comes too late");
        world.hear_pool(&new, pool(&new, &["10.1.0.2:443"]));
        assert_eq!(eligible(&world.desired(&new)), ["10.1.0.2:443"]);
    }

    #[test]
    fn a_frontend_that_was_removed_and_comes_back_does_not_bring_its_old_pool() {
        let with = config(CONFIG);
        let without = config(&CONFIG.replace("172.16.1.88:443/tcp", "172.16.1.88:444/tcp"));
        let mut world = world(&["10.1.0.1:443"], &["10.1.0.0/16"]);
        let state = world.desired(&with);
        world.reconfigure(&without, &state);
        let state = world.desired(&without);
        world.reconfigure(&with, &state);
        assert_eq!(world.desired(&with).frontends.values().next().unwrap().pool, None);
    }

    /// xorshift64*: the same sequence in every run.
    struct Random(u64);

    impl Random {
        fn below(&mut self, limit: u64) -> u64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
        }

        fn prefix(&mut self) -> IpNet {
            let third = u8::try_from(self.below(4)).unwrap();
            let length = [0, 16, 24, 24, 24, 32][usize::try_from(self.below(6)).unwrap()];
            IpNet::new(IpAddr::from([10, 1, third, 1]), length).unwrap().trunc()
        }

        fn member(&mut self) -> PoolMember {
            let address = IpAddr::from([10, 1, u8::try_from(self.below(4)).unwrap(), 1]);
            PoolMember::new((address, 443).into(), u16::try_from(1 + self.below(3)).unwrap())
        }

        fn routes(&mut self) -> Vec<RouteUpdate> {
            let hop = |random: &mut Self| IpAddr::from([172, 16, 1, 80 + u8::try_from(random.below(3)).unwrap()]);
            let mut update = |_| {
                let hops = self.below(3);
                RouteUpdate {
                    prefix: self.prefix(),
                    next_hops: (0..hops).map(|_| hop(self)).collect(),
                    internal: false,
                }
            };
            (0..3).map(&mut update).collect()
        }
    }

    /// What the kernel has of BGP, kept apart from the world.
    #[derive(Default)]
    struct Model {
        kernel: RouteSet,
        heard: RouteSet,
        settled: bool,
    }

    impl Model {
        fn covers(&self, world: &World, address: IpAddr) -> bool {
            let real = |routes: &RouteSet| {
                routes.iter().any(|(prefix, _)| prefix.prefix_len() > 0 && prefix.contains(&address))
            };
            let connected = world.kernel_routes.iter().any(|(p, _)| p.prefix_len() > 0 && p.contains(&address));
            connected || (real(&self.kernel) && real(&self.heard))
        }
    }

    fn random_event(random: &mut Random, config: &Config, world: &mut World, model: &mut Model) {
        match random.below(8) {
            0..=2 => {
                let updates = random.routes();
                for update in &updates {
                    model.heard.apply(update.clone());
                }
                world.hear(updates);
            }
            3 | 4 => {
                let changes = world.next_changes(2);
                for change in &changes {
                    model.kernel.apply(change.clone());
                }
                world.in_kernel(&changes);
            }
            5 => {
                let count = random.below(4);
                let members = (0..count).map(|_| random.member()).collect();
                let source = config.services["web"].backends.clone();
                world.hear_pool(config, PoolSnapshot { source, members, state: PoolState::Fresh });
            }
            6 => {
                let count = random.below(2);
                world.kernel_routes = (0..count).map(|_| (random.prefix(), None)).collect();
            }
            _ => {
                if random.below(4) == 0 {
                    world.converged();
                }
                model.settled |= world.settle().is_some();
            }
        }
    }

    #[test]
    fn no_order_of_events_makes_a_backend_eligible_without_cover_once_routes_have_settled() {
        let config = config(CONFIG);
        let mut checked = 0_u32;
        for seed in 1..=300 {
            let (mut random, mut model) = (Random(seed), Model::default());
            let mut world = world(&["10.1.0.1:443", "10.1.1.1:443"], &["10.1.0.0/24", "10.1.2.0/24"]);
            for step in 0..60 {
                random_event(&mut random, &config, &mut world, &mut model);
                let state = world.desired(&config);
                for backend in backends(&state).iter().filter(|backend| model.settled && backend.eligible()) {
                    checked += 1;
                    let address = backend.address;
                    assert!(model.covers(&world, address.ip()), "seed {seed}, step {step}: {address}");
                }
            }
        }
        assert!(checked > 1000, "{checked} eligible backends are too few to prove anything");
    }

    /// The pools of a state, as they are found in the maps.
    fn found(state: &DesiredState) -> BTreeMap<Frontend, Vec<AdoptedBackend>> {
        let adopt = |backend: &DesiredBackend| AdoptedBackend {
            address: backend.address,
            weight: backend.weight,
            share: backend.share,
            tier: backend.tier,
            eligible: backend.eligible(),
            snat_address: backend.snat_address,
        };
        let pools = state.frontends.iter().filter_map(|(key, frontend)| Some((*key, frontend.pool.as_ref()?)));
        pools.map(|(key, pool)| (key, pool.iter().map(adopt).collect())).collect()
    }

    #[test]
    fn a_restart_hears_everything_again_in_any_order_and_selects_the_same_backends_throughout() {
        let config = config(CONFIG);
        let selected = |state: &DesiredState| -> Vec<(std::net::SocketAddr, u16)> {
            backends(state).iter().filter(|b| b.eligible()).map(|b| (b.address, b.weight)).collect()
        };
        for seed in 1..=300 {
            let (mut random, mut model) = (Random(seed), Model::default());
            let mut before = world(&[], &[]);
            for _ in 0..40 {
                random_event(&mut random, &config, &mut before, &mut model);
            }
            install(&mut before);
            before.converged();
            before.settle();
            let old = before.desired(&config);
            let mut after = World::new(found(&old), before.learnt().clone());
            after.datapath_ready = true;
            after.kernel_routes.clone_from(&before.kernel_routes);
            assert_eq!(selected(&after.desired(&config)), selected(&old), "seed {seed}: nothing heard yet");
            assert_eq!(after.desired(&config).announcements, old.announcements, "seed {seed}");
            let routes = before.learnt().iter().map(|(prefix, hops)| (*prefix, hops.to_vec()));
            let mut routes: Vec<_> =
                routes.map(|(prefix, next_hops)| RouteUpdate { prefix, next_hops, internal: false }).collect();
            let mut pools: Vec<_> = before.pools.values().cloned().collect();
            while !routes.is_empty() || !pools.is_empty() {
                match (random.below(2), pools.pop()) {
                    (0, Some(pool)) => after.hear_pool(&config, pool),
                    (_, pool) => {
                        pools.extend(pool);
                        if let Some(route) = routes.pop() {
                            after.hear(vec![route]);
                            install(&mut after);
                        }
                    }
                }
                assert_eq!(selected(&after.desired(&config)), selected(&old), "seed {seed}");
            }
            after.snat_sources.clone_from(&before.snat_sources);
            after.converged();
            assert_eq!(after.settle(), Some(BTreeSet::new()), "seed {seed}: no way has changed");
            assert_eq!(after.desired(&config), old, "seed {seed}");
        }
    }
}
