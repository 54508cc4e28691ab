//! What the datapath and BGP should look like, from the configuration, the pools, and the routes. Pure: no I/O, no clock.
//!
//! A backend is eligible when it lies in `pod_networks` and a BGP route or a connected or static prefix covers it; a
//! default route says nothing about pods and does not count. The check runs on every input, so a withdrawn route makes
//! its backends ineligible in the same step, before DNS or a health check could notice.
//!
//! After a restart the maps still hold the pools of the previous run ([`Inputs::adopted`]). Until a source has answered,
//! the adopted pool stands in for its answer; until routes have settled, a backend that was eligible stays so. A restart
//! with unchanged inputs therefore builds exactly the state that the maps already hold.

pub mod eligibility;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;

use self::eligibility::{Admin, Checks, Route, SourceAddress};
pub use self::eligibility::{Exclusion, Facts};
use crate::{
    config::valid::Config,
    model::{
        ANY_PORT, AdminOrders, AdminState, BackendSource, Balance, Check, Frontend, HostFault, Lifetimes, Mode,
        PathAttributes, PoolMember, PoolSnapshot, PoolState, Protection, Protocol, RecordType, RouteSet, Selection,
        Service, Snat, StaticBackend, Tier, Verdict, scope, within,
    },
    sources::health::{Target, Targets, Verdicts, panic::panics},
};

/// Everything that [`build`] looks at besides the configuration.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// What each source last said.
    pub pools: &'a BTreeMap<BackendSource, PoolSnapshot>,
    /// BGP best routes. At start, until peers have sent their routes, this also holds the BGP routes that the previous
    /// run left in the kernel.
    pub routes: &'a RouteSet,
    /// Connected and static prefixes of the kernel; default routes among them are ignored.
    pub kernel_prefixes: &'a [IpNet],
    /// Node names (peer descriptions) by BGP next hop.
    pub nodes: &'a BTreeMap<IpAddr, String>,
    /// The host's own address that the kernel would use towards each backend address.
    pub snat_sources: &'a BTreeMap<IpAddr, IpAddr>,
    /// The pools found in the maps at start, by frontend.
    pub adopted: &'a BTreeMap<Frontend, Vec<AdoptedBackend>>,
    /// False from start until BGP peers have sent their routes (End-of-RIB) or were given up: until then a missing
    /// route is not news.
    pub routes_settled: bool,
    /// Backends that were covered at some time since the start: that their route is missing now is news, whether routes
    /// have settled or not.
    pub covered_before: &'a BTreeSet<IpAddr>,
    /// True while the program is attached to every interface it should be: no VIP is announced otherwise.
    pub datapath_ready: bool,
    /// VIPs that the host does not hold although it should: they are not announced.
    pub unheld: &'a BTreeSet<IpAddr>,
    /// Addresses on interfaces of the host other than `lo`: a frontend of every port would take what is meant for the host.
    pub own: &'a BTreeSet<IpAddr>,
    /// What settings of the host break: what they concern is not announced.
    pub host_faults: &'a BTreeSet<HostFault>,
    /// What checks say.
    pub verdicts: &'a Verdicts,
    /// What administrators ordered.
    pub orders: &'a AdminOrders,
}

/// A backend that the maps held at start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdoptedBackend {
    /// Address and port.
    pub address: SocketAddr,
    /// Weight it was selected with.
    pub weight: u16,
    /// Share of that weight, percent; less than 100 while it started slowly.
    pub share: u8,
    /// When it was used.
    pub tier: Tier,
    /// Whether it was given new flows.
    pub eligible: bool,
    /// SNAT source address it had, if one was known.
    pub snat_address: Option<IpAddr>,
}

/// What the datapath and BGP should look like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DesiredState {
    /// Every listen address of every service. What has not changed is shared with the state before, so that two states are
    /// compared as fast as they differ.
    pub frontends: BTreeMap<Frontend, Arc<DesiredFrontend>>,
    /// VIP prefixes (/32, /128) to announce; only those with enough eligible backends. The unconditional prefixes of
    /// `[bgp] networks` are not among them.
    pub announcements: BTreeMap<IpNet, PathAttributes>,
    /// Addresses of all frontends: what the host must hold so that the kernel answers for their other ports.
    pub addresses: BTreeSet<IpAddr>,
    /// The program reports every flow that ends.
    pub record_ends: bool,
}

impl DesiredState {
    /// True where both have the same frontends, whatever these are like.
    pub fn has_frontends_of(&self, other: &Self) -> bool {
        self.frontends.len() == other.frontends.len() && self.frontends.keys().eq(other.frontends.keys())
    }

    /// The frontends that are new or not as they were in `before`. Those that are shared cost one comparison of pointers.
    pub fn changed_since<'a>(&'a self, before: &Self) -> Vec<(&'a Frontend, &'a Arc<DesiredFrontend>)> {
        if self.has_frontends_of(before) {
            let pairs = self.frontends.iter().zip(before.frontends.values());
            return pairs.filter(|((_, new), old)| new != old).map(|(frontend, _)| frontend).collect();
        }
        self.frontends.iter().filter(|(key, new)| before.frontends.get(key) != Some(*new)).collect()
    }
}

/// One listen address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredFrontend {
    /// Service name.
    pub service: String,
    /// How addresses are rewritten.
    pub mode: Mode,
    /// How backends are chosen.
    pub balance: Balance,
    /// What else decides about it.
    pub selection: Selection,
    /// SNAT settings.
    pub snat: Snat,
    /// What its sources may do.
    pub protection: Protection,
    /// Idle timeouts.
    pub timeouts: Timeouts,
    /// Backends by address; `None`: nothing was ever learnt, so the maps keep what they have for this frontend.
    pub pool: Option<Vec<DesiredBackend>>,
    /// Whether its VIP is announced, and why not.
    pub announced: Announced,
    /// The host holds its VIP on `lo` and for nothing else: the kernel answers what has no flow.
    pub dedicated: bool,
    /// Too few backends are healthy, so health is ignored: how many are, of how many.
    pub panic: Option<(usize, usize)>,
}

impl DesiredFrontend {
    /// Eligible backends.
    pub fn eligible(&self) -> usize {
        self.pool.iter().flatten().filter(|backend| backend.eligible()).count()
    }
}

/// One backend of one frontend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredBackend {
    /// Address and port.
    pub address: SocketAddr,
    /// Relative weight, at least 1.
    pub weight: u16,
    /// Share of its weight that it has by now, percent; 100 but while it starts slowly.
    pub share: u8,
    /// When it is used.
    pub tier: Tier,
    /// Connections it may have at once; `None`: no limit.
    pub limit: Option<u32>,
    /// `None`: eligible; else why it gets no new flows: what [`eligibility::judge`] says of `facts`.
    pub excluded: Option<Exclusion>,
    /// What that rests on.
    pub facts: Facts,
    /// Node it runs on, by the BGP next hop.
    pub node: Option<String>,
    /// `dns`, `static`, or `adopted`.
    pub source: &'static str,
    /// The host's address towards it; `None`: not known yet.
    pub snat_address: Option<IpAddr>,
}

impl DesiredBackend {
    /// True where it may be given new flows.
    pub fn eligible(&self) -> bool {
        self.excluded.is_none()
    }
}

/// Whether a frontend's VIP is announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Announced {
    /// `announce` is off, or there is no `[bgp]`.
    Off,
    /// It is.
    Yes,
    /// The program is not attached everywhere it should be.
    NoDatapath,
    /// A setting of the host keeps its packets from being forwarded.
    HostSetting,
    /// The host does not hold the address, so that nobody would answer for its other ports.
    NotHeld,
    /// Enough backends are eligible, but not for long enough yet.
    Settling,
    /// Too few eligible backends.
    TooFew {
        /// How many there are.
        eligible: usize,
        /// How many `min_backends` asks for.
        wanted: usize,
    },
}

impl fmt::Display for Announced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("no"),
            Self::Yes => f.write_str("yes"),
            Self::NoDatapath => f.write_str("no: the program is not attached"),
            Self::HostSetting => f.write_str("no: a setting of the host is wrong"),
            Self::NotHeld => f.write_str("no: the address is not on lo"),
            Self::Settling => f.write_str("no: not eligible for `after` yet"),
            Self::TooFew { eligible, wanted } => write!(f, "no: {eligible} of {wanted} backends eligible"),
        }
    }
}

/// Idle timeouts of a frontend's flows, seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// An established flow.
    pub established: u32,
    /// A half-open flow.
    pub half_open: u32,
    /// A closed flow, and its SNAT port after it.
    pub closing: u32,
    /// UDP: a flow ends with the backend's first answer.
    pub one_reply: bool,
}

impl Timeouts {
    /// TCP: established 2 h 4 min (RFC 5382 REQ-5), half-open 60 s, a closed flow's port rests 60 s (the backend's
    /// TIME_WAIT). UDP: 5 min (RFC 4787 REQ-5), 30 s before the first reply, 60 s rest.
    pub const fn of(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Tcp => Self { established: 7440, half_open: 60, closing: 60, one_reply: false },
            Protocol::Udp => Self { established: 300, half_open: 30, closing: 60, one_reply: false },
        }
    }

    /// As [`Timeouts::of`], where the service does not say otherwise.
    pub fn configured(protocol: Protocol, lifetimes: &Lifetimes) -> Self {
        let default = Self::of(protocol);
        let (established, half_open) = match protocol {
            Protocol::Tcp => (lifetimes.established, lifetimes.half_open),
            Protocol::Udp => (lifetimes.udp, lifetimes.udp_unanswered),
        };
        Self {
            established: established.unwrap_or(default.established),
            half_open: half_open.unwrap_or(default.half_open),
            closing: lifetimes.closing.unwrap_or(default.closing),
            one_reply: lifetimes.one_reply && protocol == Protocol::Udp,
        }
    }
}

/// Builds the desired state.
pub fn build(config: &Config, inputs: &Inputs<'_>) -> DesiredState {
    rebuild(config, inputs, &DesiredState::default(), None)
}

/// As [`build`], where `before` was built of the same configuration and inputs but for what concerns these services; `None`:
/// whatever may have changed. Only their frontends are built, and those that come out as they were are shared with `before`.
pub fn rebuild(
    config: &Config,
    inputs: &Inputs<'_>,
    before: &DesiredState,
    services: Option<&BTreeSet<String>>,
) -> DesiredState {
    let Some(services) = services else {
        let mut state = DesiredState { record_ends: config.access_log.is_some(), ..DesiredState::default() };
        for service in config.services.values() {
            rebuild_service(config, inputs, before, service, &mut state);
        }
        state.announcements = announcements(config, &state.frontends);
        return state;
    };
    let mut state = before.clone();
    let concerned = services.iter().filter_map(|name| config.services.get(name));
    for service in concerned.clone() {
        rebuild_service(config, inputs, before, service, &mut state);
    }
    if concerned.into_iter().any(|service| service.announce.is_some()) {
        state.announcements = announcements(config, &state.frontends);
    }
    state
}

/// Builds a service's frontends into `state`; those that come out as they were are shared with `before`.
fn rebuild_service(
    config: &Config,
    inputs: &Inputs<'_>,
    before: &DesiredState,
    service: &Service,
    state: &mut DesiredState,
) {
    for frontend in &service.listen {
        if frontend.takes_what_is_the_hosts(inputs.own) {
            state.frontends.remove(frontend);
            continue;
        }
        let built = build_frontend(config, inputs, service, frontend);
        let known = before.frontends.get(frontend).filter(|known| ***known == built);
        state.addresses.insert(frontend.address.ip());
        state.frontends.insert(*frontend, known.map_or_else(|| Arc::new(built), Arc::clone));
    }
}

/// What is announced of these frontends. Several services may share a VIP, or an aggregate: it is announced while any of
/// them can serve, with the attributes of the first by name.
pub fn announcements(
    config: &Config,
    frontends: &BTreeMap<Frontend, Arc<DesiredFrontend>>,
) -> BTreeMap<IpNet, PathAttributes> {
    let mut announcements = BTreeMap::new();
    for service in config.services.values() {
        let Some(announce) = &service.announce else { continue };
        for frontend in &service.listen {
            let Some(desired) = frontends.get(frontend).filter(|it| it.announced == Announced::Yes) else { continue };
            let total = desired.pool.iter().flatten().count();
            let prefix = announce.prefix(frontend.address.ip());
            announcements.entry(prefix).or_insert_with(|| announce.attributes(desired.eligible(), total));
        }
    }
    announcements
}

fn build_frontend(config: &Config, inputs: &Inputs<'_>, service: &Service, frontend: &Frontend) -> DesiredFrontend {
    let pool = members(inputs, service, frontend).map(|(members, source)| {
        let allowed = members.into_iter().filter(|member| within(&config.edge.pod_networks, member.address.ip()));
        let known = inputs.adopted.get(frontend).map_or(&[][..], Vec::as_slice);
        let vip = frontend.address.ip();
        let mut pool: Vec<_> =
            allowed.map(|member| build_backend(inputs, service, vip, known, member, source)).collect();
        // It stays as long as nothing changes.
        pool.shrink_to_fit();
        pool
    });
    let (pool, panic) = match pool {
        Some(pool) => {
            let (pool, panic) = ignore_health_in_panic(service, pool);
            (Some(pool), panic)
        }
        None => (None, None),
    };
    let eligible = pool.iter().flatten().filter(|backend| backend.eligible()).count();
    let announced = match &service.announce {
        Some(announce) if config.bgp.is_some() => {
            let wanted = announce.min_backends;
            if !inputs.datapath_ready {
                Announced::NoDatapath
            } else if inputs.host_faults.iter().any(|fault| fault.concerns(service.mode, frontend.address.ip())) {
                Announced::HostSetting
            } else if inputs.unheld.contains(&frontend.address.ip()) {
                Announced::NotHeld
            } else if eligible < wanted {
                Announced::TooFew { eligible, wanted }
            } else {
                Announced::Yes
            }
        }
        _ => Announced::Off,
    };
    let vip = frontend.address.ip();
    let dedicated = service.announce.is_some() && !inputs.unheld.contains(&vip) && !inputs.own.contains(&vip);
    DesiredFrontend {
        service: service.name.clone(),
        mode: service.mode,
        balance: service.balance,
        selection: service.selection,
        snat: service.snat.clone(),
        protection: service.protection.clone(),
        timeouts: Timeouts::configured(frontend.protocol, &service.lifetimes),
        pool,
        announced,
        dedicated,
        panic,
    }
}

/// Where too few of those that could serve are healthy, health is no reason any more.
fn ignore_health_in_panic(
    service: &Service,
    mut pool: Vec<DesiredBackend>,
) -> (Vec<DesiredBackend>, Option<(usize, usize)>) {
    let Some(health) = &service.health else { return (pool, None) };
    let candidates = || pool.iter().filter(|backend| eligibility::judge(&backend.facts.in_panic()).is_none());
    let (total, healthy) = (candidates().count(), candidates().filter(|backend| backend.eligible()).count());
    if !panics(healthy, total, health.panic) {
        return (pool, None);
    }
    for backend in &mut pool {
        backend.facts = backend.facts.in_panic();
        backend.excluded = eligibility::judge(&backend.facts);
    }
    (pool, Some((healthy, total)))
}

/// Who is to be checked, and how: every member of a pool whose service has `health`; of these services alone, where they
/// are named.
pub fn targets(config: &Config, state: &DesiredState, services: Option<&BTreeSet<String>>) -> Targets {
    let mut targets = Targets::new();
    let wanted = |name: &String| services.is_none_or(|services| services.contains(name));
    for service in config.services.values().filter(|service| wanted(&service.name)) {
        let Some(health) = &service.health else { continue };
        let health = Arc::new(health.clone());
        let frontends = service.listen.iter().filter_map(|frontend| state.frontends.get(frontend));
        for backend in frontends.flat_map(|frontend| frontend.pool.iter().flatten()) {
            let target = Target {
                health: Arc::clone(&health),
                source: service.snat.addresses.first().copied().or(backend.snat_address),
                start: backend.facts.start,
                reachable: backend.facts.route != Route::Missing,
            };
            targets.insert((service.name.clone(), backend.address), target);
        }
    }
    targets
}

/// The members of a frontend's pool, by address, one entry for each address (the heaviest where a source lists several),
/// and where they come from; `None` where nothing is known and the maps hold nothing either.
fn members(inputs: &Inputs<'_>, service: &Service, frontend: &Frontend) -> Option<(Vec<PoolMember>, &'static str)> {
    let (members, source): (Vec<PoolMember>, _) = match (&service.backends, inputs.pools.get(&service.backends)) {
        (BackendSource::Dns { record, .. }, Some(snapshot)) if snapshot.state != PoolState::Unknown => {
            // No service is at port 0 (RFC 2782 leaves it free), which would mean every port here.
            let has_port = |member: &&PoolMember| *record != RecordType::Srv || member.address.port() != ANY_PORT;
            (snapshot.members.iter().filter(has_port).copied().collect(), "dns")
        }
        (BackendSource::Static(_), Some(snapshot)) if snapshot.state != PoolState::Unknown => {
            (snapshot.members.iter().copied().collect(), "static")
        }
        (BackendSource::Static(backends), _) => {
            let member = |b: &StaticBackend| PoolMember { address: b.address, weight: b.weight, tier: b.tier };
            (backends.iter().map(member).collect(), "static")
        }
        (BackendSource::Dns { .. }, _) => {
            let adopted = inputs.adopted.get(frontend)?;
            let eligible = adopted.iter().filter(|backend| backend.eligible);
            let member = |b: &AdoptedBackend| PoolMember { address: b.address, weight: b.weight, tier: b.tier };
            (eligible.map(member).collect(), "adopted")
        }
    };
    let mut known: BTreeMap<SocketAddr, PoolMember> = BTreeMap::new();
    for member in members {
        let weight = member.weight.max(1);
        let known = known.entry(member.address).or_insert(PoolMember { weight, ..member });
        known.weight = weight.max(known.weight);
        known.tier = member.tier.min(known.tier);
    }
    Some((known.into_values().collect(), source))
}

/// True where a BGP route or a connected or static prefix covers the address; default routes do not count.
pub fn is_covered(routes: &RouteSet, kernel_prefixes: &[IpNet], address: IpAddr) -> bool {
    routes.lookup(address).is_some_and(|(prefix, _)| prefix.prefix_len() > 0)
        || kernel_prefixes.iter().any(|prefix| prefix.prefix_len() > 0 && prefix.contains(&address))
}

/// The node at a next hop: by its address, or by the link that it was found on.
fn node_name(nodes: &BTreeMap<IpAddr, String>, hop: IpAddr) -> Option<String> {
    nodes.get(&hop).or_else(|| nodes.get(&scope::link(hop)?)).cloned()
}

fn build_backend(
    inputs: &Inputs<'_>,
    service: &Service,
    vip: IpAddr,
    adopted: &[AdoptedBackend],
    member: PoolMember,
    source: &'static str,
) -> DesiredBackend {
    let address = member.address.ip();
    let same_family = |other: &IpAddr| other.is_ipv4() == address.is_ipv4();
    let before = adopted.iter().find(|backend| backend.address == member.address);
    let route = inputs.routes.lookup(address).filter(|(prefix, _)| prefix.prefix_len() > 0);
    let benefit_of_doubt = !inputs.routes_settled && !inputs.covered_before.contains(&address);
    let covered = is_covered(inputs.routes, inputs.kernel_prefixes, address)
        || (benefit_of_doubt && before.is_some_and(|backend| backend.eligible));
    let snat_address = inputs.snat_sources.get(&address).copied().or(before.and_then(|backend| backend.snat_address));
    let needs_source = service.mode == Mode::FullNat && !service.snat.addresses.iter().any(same_family);
    let starts_as = match (&service.health, before) {
        (None, _) => Verdict::Up,
        // What got no flows before a restart has to show that it may have some, where there is a check to show it.
        (Some(health), Some(backend)) if !backend.eligible && health.check != Check::None => Verdict::Down,
        (Some(health), None) if health.mandatory => Verdict::Checking,
        (Some(_), _) => Verdict::Up,
    };
    let key = (service.name.clone(), member.address);
    let order = inputs.orders.get(&key).copied().unwrap_or_default();
    let facts = Facts {
        source,
        start: starts_as,
        same_family: same_family(&vip),
        route: match route {
            _ if !covered => Route::Missing,
            Some((prefix, _)) => Route::Bgp(prefix),
            None if is_covered(inputs.routes, inputs.kernel_prefixes, address) => Route::Kernel,
            None => Route::BeforeRestart,
        },
        source_address: match (needs_source, snat_address) {
            (true, None) => SourceAddress::Missing,
            (true, Some(address)) => SourceAddress::Known(address),
            (false, _) => SourceAddress::NotNeeded,
        },
        checks: match &service.health {
            None => Checks::None,
            Some(_) => Checks::Say(inputs.verdicts.get(&key).copied().unwrap_or(starts_as)),
        },
        admin: match order.state {
            AdminState::Up => Admin::Up,
            AdminState::Down => Admin::Down,
            AdminState::Drain => Admin::Drain,
        },
    };
    let node = route.and_then(|(_, hops)| hops.iter().find_map(|hop| node_name(inputs.nodes, *hop)));
    let PoolMember { address, weight, tier } = member;
    DesiredBackend {
        address,
        weight: order.weight.unwrap_or(weight),
        share: 100,
        tier,
        limit: order.limit.or(service.selection.max_connections),
        excluded: eligibility::judge(&facts),
        facts,
        node,
        source,
        snat_address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::valid::{Bgp, Edge, Hook, Tables},
        model::{Announce, Lifetimes, OnDown, RouteUpdate},
    };

    const SOURCE: &str = "ingress.cluster.local";

    fn source() -> BackendSource {
        BackendSource::Dns {
            name: SOURCE.to_owned(),
            port: Some(443),
            resolver: "kube-dns".to_owned(),
            record: crate::model::RecordType::A,
        }
    }

    fn config() -> Config {
        let service = Service {
            name: "ingress".to_owned(),
            listen: vec!["172.16.1.88:8443/tcp".parse().unwrap()],
            backends: source(),
            mode: Mode::FullNat,
            balance: Balance::Maglev,
            selection: Selection::default(),
            snat: Snat::default(),
            announce: Some(Announce::default()),
            health: None,
            on_down: OnDown::default(),
            lifetimes: Lifetimes::default(),
            protection: Protection::default(),
        };
        Config {
            access_log: None,
            edge: Edge {
                interfaces: vec!["eth0".to_owned()],
                hook: Hook::Auto,
                pod_networks: vec!["10.1.0.0/16".parse().unwrap()],
                pin_path: "/sys/fs/bpf/edge".into(),
                socket: "/run/edge/edge.sock".into(),
                state_dir: "/var/lib/edge".into(),
                seed_file: None,
                tables: Tables::default(),
            },
            http: None,
            resolvers: BTreeMap::new(),
            bgp: Some(Bgp {
                asn: 64512,
                router_id: "172.16.1.88".parse().unwrap(),
                listen_port: Some(179),
                networks: Vec::new(),
                peers: BTreeMap::new(),
                ranges: Vec::new(),
                links: BTreeMap::new(),
                transit: false,
                next_hops: Default::default(),
                drain: None,
                guard: Default::default(),
            }),
            services: BTreeMap::from([("ingress".to_owned(), service)]),
        }
    }

    struct World {
        config: Config,
        pools: BTreeMap<BackendSource, PoolSnapshot>,
        routes: RouteSet,
        prefixes: Vec<IpNet>,
        nodes: BTreeMap<IpAddr, String>,
        snat: BTreeMap<IpAddr, IpAddr>,
        adopted: BTreeMap<Frontend, Vec<AdoptedBackend>>,
        settled: bool,
        ready: bool,
        covered_before: BTreeSet<IpAddr>,
        unheld: BTreeSet<IpAddr>,
        own: BTreeSet<IpAddr>,
        host_faults: BTreeSet<HostFault>,
        verdicts: Verdicts,
        orders: AdminOrders,
    }

    impl World {
        fn new() -> Self {
            let mut world = Self {
                config: config(),
                pools: BTreeMap::new(),
                routes: RouteSet::default(),
                prefixes: Vec::new(),
                nodes: BTreeMap::from([("172.16.1.80".parse().unwrap(), "kcontrol".to_owned())]),
                snat: BTreeMap::new(),
                adopted: BTreeMap::new(),
                settled: true,
                ready: true,
                covered_before: BTreeSet::new(),
                unheld: BTreeSet::new(),
                own: BTreeSet::new(),
                host_faults: BTreeSet::new(),
                verdicts: Verdicts::new(),
                orders: AdminOrders::new(),
            };
            for address in ["10.1.0.4", "10.1.1.5", "192.0.2.1"] {
                world.snat.insert(address.parse().unwrap(), "172.16.1.88".parse().unwrap());
            }
            world
        }

        fn pool(&mut self, members: &[&str], state: PoolState) {
            let member = |text: &&str| PoolMember::new(text.parse().unwrap(), 1);
            let snapshot = PoolSnapshot { source: source(), members: members.iter().map(member).collect(), state };
            self.pools.insert(source(), snapshot);
        }

        fn route(&mut self, prefix: &str, hops: &[&str]) {
            let next_hops = hops.iter().map(|hop| hop.parse().unwrap()).collect();
            self.routes.apply(RouteUpdate { prefix: prefix.parse().unwrap(), next_hops, internal: false });
        }

        fn build(&self) -> DesiredState {
            self.rebuild(&DesiredState::default(), None)
        }

        fn rebuild(&self, before: &DesiredState, services: Option<&BTreeSet<String>>) -> DesiredState {
            rebuild(
                &self.config,
                &Inputs {
                    pools: &self.pools,
                    routes: &self.routes,
                    kernel_prefixes: &self.prefixes,
                    nodes: &self.nodes,
                    snat_sources: &self.snat,
                    adopted: &self.adopted,
                    routes_settled: self.settled,
                    covered_before: &self.covered_before,
                    datapath_ready: self.ready,
                    unheld: &self.unheld,
                    own: &self.own,
                    host_faults: &self.host_faults,
                    verdicts: &self.verdicts,
                    orders: &self.orders,
                },
                before,
                services,
            )
        }

        fn adopt(&mut self, eligible: bool) {
            let backend = AdoptedBackend {
                address: "10.1.0.4:443".parse().unwrap(),
                weight: 7,
                share: 100,
                tier: Tier::Primary,
                eligible,
                snat_address: Some("172.16.1.88".parse().unwrap()),
            };
            self.adopted.insert("172.16.1.88:8443/tcp".parse().unwrap(), vec![backend]);
        }
    }

    fn only(state: &DesiredState) -> &DesiredFrontend {
        state.frontends.values().next().unwrap()
    }

    fn verdicts(state: &DesiredState) -> Vec<(String, Option<Exclusion>)> {
        only(state).pool.iter().flatten().map(|b| (b.address.to_string(), b.excluded)).collect()
    }

    #[test]
    fn timeouts_of_a_service_count_for_the_protocol_that_they_are_of() {
        let lifetimes = Lifetimes {
            established: Some(3600),
            half_open: Some(10),
            closing: Some(30),
            udp: None,
            udp_unanswered: Some(5),
            one_reply: true,
        };
        let of = |protocol| Timeouts::configured(protocol, &lifetimes);
        let tcp = Timeouts { established: 3600, half_open: 10, closing: 30, one_reply: false };
        let udp = Timeouts { established: 300, half_open: 5, closing: 30, one_reply: true };
        assert_eq!((of(Protocol::Tcp), of(Protocol::Udp)), (tcp, udp));
    }

    #[test]
    fn a_route_makes_a_backend_eligible_names_its_node_and_its_loss_excludes_it_at_once() {
        let mut world = World::new();
        world.pool(&["10.1.0.4:443"], PoolState::Fresh);
        world.route("10.1.0.0/24", &["172.16.1.80"]);
        let state = world.build();
        assert_eq!(verdicts(&state), [("10.1.0.4:443".to_owned(), None)]);
        assert_eq!(only(&state).pool.as_ref().unwrap()[0].node.as_deref(), Some("kcontrol"));
        assert_eq!(state.announcements.len(), 1);
        world.route("10.1.0.0/24", &[]);
        let state = world.build();
        assert_eq!(verdicts(&state), [("10.1.0.4:443".to_owned(), Some(Exclusion::NoRoute))]);
        assert_eq!(only(&state).announced.to_string(), "no: 0 of 1 backends eligible");
        assert!(state.announcements.is_empty());
    }

    #[test]
    fn only_the_services_that_are_named_are_built_anew_and_only_what_changed_is_not_shared() {
        let mut world = World::new();
        for number in 0_u8..100 {
            let mut service = world.config.services["ingress"].clone();
            service.name = format!("s{number}");
            service.listen = vec![format!("172.16.1.88:{}/tcp", 9000 + u16::from(number)).parse().unwrap()];
            service.backends = BackendSource::Static(vec![StaticBackend::new("10.1.0.4:443".parse().unwrap())]);
            world.config.services.insert(service.name.clone(), service);
        }
        world.route("10.1.0.0/24", &["172.16.1.80"]);
        let before = world.build();
        // News about all of them, so that a look at one that is not named would show.
        let down = crate::model::AdminOrder { state: AdminState::Down, ..crate::model::AdminOrder::default() };
        world.orders = (0..100).map(|number| ((format!("s{number}"), "10.1.0.4:443".parse().unwrap()), down)).collect();
        let named = BTreeSet::from(["s7".to_owned(), "ingress".to_owned(), "gone".to_owned()]);
        let after = world.rebuild(&before, Some(&named));
        let changed = after.frontends.iter().filter(|(key, frontend)| !Arc::ptr_eq(frontend, &before.frontends[key]));
        let changed: Vec<_> = changed.map(|(_, frontend)| frontend.service.as_str()).collect();
        assert_eq!(changed, ["s7"], "ingress has no order, the others were not looked at");
        assert_eq!(world.rebuild(&after, None), world.build());
    }

    #[test]
    fn a_vip_is_dedicated_where_it_is_announced_and_the_host_holds_it_on_lo_alone() {
        let mut world = World::new();
        let vip: IpAddr = "172.16.1.88".parse().unwrap();
        assert!(world.config.services["ingress"].announce.is_some() && only(&world.build()).dedicated);
        world.own.insert(vip);
        assert!(!only(&world.build()).dedicated, "other ports are the host's");
        world.own.clear();
        world.unheld.insert(vip);
        assert!(!only(&world.build()).dedicated, "nobody would answer");
        world.unheld.clear();
        world.config.services.get_mut("ingress").unwrap().announce = None;
        assert!(!only(&world.build()).dedicated);
    }

    #[test]
    fn a_service_of_every_port_is_served_unless_its_address_is_the_hosts_own() {
        let mut world = World::new();
        let service = world.config.services.get_mut("ingress").unwrap();
        service.listen = vec!["203.0.113.10:*/tcp".parse().unwrap(), "203.0.113.10:443/tcp".parse().unwrap()];
        service.backends = BackendSource::Static(vec![StaticBackend::new("10.1.0.4:443".parse().unwrap())]);
        world.route("10.1.0.0/24", &["172.16.1.80"]);
        let served = |state: &DesiredState| state.frontends.keys().map(ToString::to_string).collect::<Vec<_>>();
        let before = world.build();
        assert_eq!(served(&before), ["203.0.113.10:*/tcp", "203.0.113.10:443/tcp"]);
        // Somebody gives the address to an interface.
        world.own.insert("203.0.113.10".parse().unwrap());
        assert_eq!(served(&world.build()), ["203.0.113.10:443/tcp"]);
        let named = BTreeSet::from(["ingress".to_owned()]);
        assert_eq!(served(&world.rebuild(&before, Some(&named))), ["203.0.113.10:443/tcp"]);
        world.own = BTreeSet::from(["203.0.113.11".parse().unwrap()]);
        assert_eq!(served(&world.build()), served(&before));
    }

    #[test]
    fn a_backend_of_every_port_is_one_that_the_configuration_names_and_never_an_srv_answer_without_a_port() {
        for (record, port, expected) in
            [(RecordType::A, Some(ANY_PORT), &["10.1.0.4:0"][..]), (RecordType::Srv, None, &["10.1.1.5:443"])]
        {
            let mut world = World::new();
            let source = BackendSource::Dns { name: SOURCE.to_owned(), port, resolver: "kube-dns".to_owned(), record };
            world.config.services.get_mut("ingress").unwrap().backends = source.clone();
            let addresses = if port.is_some() { &["10.1.0.4:0"][..] } else { &["10.1.0.4:0", "10.1.1.5:443"] };
            let members = addresses.iter().map(|text| PoolMember::new(text.parse().unwrap(), 1)).collect();
            world.pools.insert(source.clone(), PoolSnapshot { source, members, state: PoolState::Fresh });
            let found: Vec<_> = verdicts(&world.build()).into_iter().map(|(address, _)| address).collect();
            assert_eq!(found, expected, "{record}");
        }
    }

    #[test]
    fn a_default_route_covers_no_backend_but_a_connected_prefix_does() {
        let mut world = World::new();
        world.pool(&["10.1.0.4:443"], PoolState::Fresh);
        world.route("0.0.0.0/0", &["172.16.1.1"]);
        world.prefixes = vec!["0.0.0.0/0".parse().unwrap()];
        assert_eq!(verdicts(&world.build())[0].1, Some(Exclusion::NoRoute));
        world.prefixes.push("10.1.0.0/24".parse().unwrap());
        assert_eq!(verdicts(&world.build())[0].1, None);
    }

    #[test]
    fn an_address_outside_the_pod_networks_never_gets_into_a_pool() {
        let mut world = World::new();
        world.pool(&["192.0.2.1:443", "10.1.0.4:443"], PoolState::Fresh);
        world.route("0.0.0.0/1", &["172.16.1.80"]);
        world.route("192.0.2.0/24", &["172.16.1.80"]);
        assert_eq!(verdicts(&world.build()), [("10.1.0.4:443".to_owned(), None)]);
    }

    #[test]
    fn full_nat_without_a_source_address_excludes_and_dnat_does_not_need_one() {
        let mut world = World::new();
        world.pool(&["10.1.0.4:443"], PoolState::Fresh);
        world.route("10.1.0.0/24", &["172.16.1.80"]);
        world.snat.clear();
        assert_eq!(verdicts(&world.build())[0].1, Some(Exclusion::NoSnatAddress));
        world.config.services.get_mut("ingress").unwrap().mode = Mode::Dnat;
        assert_eq!(verdicts(&world.build())[0].1, None);
    }

    #[test]
    fn before_the_first_answer_the_adopted_pool_stands_in_and_without_one_nothing_is_known() {
        let mut world = World::new();
        world.pool(&[], PoolState::Unknown);
        assert_eq!(only(&world.build()).pool, None);
        world.adopt(true);
        world.settled = false;
        let state = world.build();
        let backend = &only(&state).pool.as_ref().unwrap()[0];
        assert_eq!((backend.weight, backend.eligible(), backend.source), (7, true, "adopted"));
        assert_eq!(only(&state).announced, Announced::Yes, "a restart does not withdraw the VIP");
        world.adopt(false);
        assert_eq!(only(&world.build()).pool, Some(vec![]), "what was draining does not come back by a restart");
    }

    #[test]
    fn a_restart_does_not_exclude_what_worked_before_until_routes_have_settled() {
        let mut world = World::new();
        world.adopt(true);
        world.snat.clear();
        world.pool(&["10.1.0.4:443", "10.1.1.5:443"], PoolState::Fresh);
        world.settled = false;
        let expected = [("10.1.0.4:443".to_owned(), None), ("10.1.1.5:443".to_owned(), Some(Exclusion::NoRoute))];
        assert_eq!(verdicts(&world.build()), expected);
        world.settled = true;
        assert_eq!(verdicts(&world.build())[0].1, Some(Exclusion::NoRoute));
    }

    #[test]
    fn no_vip_is_announced_while_the_program_is_not_attached_or_without_bgp() {
        let mut world = World::new();
        world.pool(&["10.1.0.4:443"], PoolState::Fresh);
        world.route("10.1.0.0/24", &["172.16.1.80"]);
        world.ready = false;
        let state = world.build();
        assert!(state.announcements.is_empty());
        assert_eq!(only(&state).announced, Announced::NoDatapath);
        world.ready = true;
        world.config.bgp = None;
        assert_eq!(only(&world.build()).announced, Announced::Off);
    }

    #[test]
    fn a_vip_that_the_host_does_not_hold_is_not_announced() {
        let mut world = World::new();
        world.pool(&["10.1.0.4:443"], PoolState::Fresh);
        world.route("10.1.0.0/24", &["172.16.1.80"]);
        world.unheld.insert("172.16.1.88".parse().unwrap());
        let state = world.build();
        assert!(state.announcements.is_empty());
        assert_eq!(only(&state).announced, Announced::NotHeld);
    }

    #[test]
    fn a_wrong_setting_of_the_host_withdraws_what_it_breaks_and_nothing_else() {
        let mut world = World::new();
        world.pool(&["10.1.0.4:443"], PoolState::Fresh);
        world.route("10.1.0.0/24", &["172.16.1.80"]);
        for (fault, mode, expected) in [
            (HostFault::Ipv4, Mode::FullNat, Announced::HostSetting),
            (HostFault::Ipv4, Mode::Dnat, Announced::HostSetting),
            (HostFault::FullNat, Mode::FullNat, Announced::HostSetting),
            (HostFault::FullNat, Mode::Dnat, Announced::Yes),
            (HostFault::Ipv6, Mode::FullNat, Announced::Yes),
        ] {
            world.host_faults = BTreeSet::from([fault]);
            world.config.services.get_mut("ingress").unwrap().mode = mode;
            let state = world.build();
            assert_eq!(only(&state).announced, expected, "{fault:?} {mode:?}");
            assert_eq!(state.announcements.is_empty(), expected != Announced::Yes, "{fault:?} {mode:?}");
            assert_eq!(only(&state).eligible(), 1, "its backends stay: flows that run go on");
        }
    }

    fn health(panic: u8, mandatory: bool) -> crate::model::Health {
        let second = std::time::Duration::from_secs(1);
        crate::model::Health {
            check: crate::model::Check::Tcp(crate::model::Exchange::default()),
            interval: second,
            fast_interval: second,
            jitter: 0,
            timeout: second,
            fall: 1,
            rise: 1,
            port: None,
            mandatory,
            panic,
            passive: None,
        }
    }

    fn checked(panic: u8, mandatory: bool) -> World {
        let mut world = World::new();
        world.pool(&["10.1.0.4:443", "10.1.1.5:443"], PoolState::Fresh);
        world.route("10.1.0.0/16", &["172.16.1.80"]);
        world.config.services.get_mut("ingress").unwrap().health = Some(health(panic, mandatory));
        world
    }

    fn say(world: &mut World, backend: &str, verdict: Verdict) {
        world.verdicts.insert(("ingress".to_owned(), backend.parse().unwrap()), verdict);
    }

    #[test]
    fn an_unhealthy_backend_is_excluded_and_the_vip_withdrawn_with_the_last_healthy_one() {
        let mut world = checked(0, false);
        say(&mut world, "10.1.0.4:443", Verdict::Down);
        let state = world.build();
        assert_eq!(verdicts(&state)[0].1, Some(Exclusion::Unhealthy(Verdict::Down)));
        assert_eq!((only(&state).eligible(), state.announcements.len()), (1, 1));
        say(&mut world, "10.1.1.5:443", Verdict::Down);
        assert!(world.build().announcements.is_empty());
    }

    #[test]
    fn in_a_panic_health_is_ignored_but_neither_orders_nor_routes() {
        let mut world = checked(60, false);
        say(&mut world, "10.1.0.4:443", Verdict::Down);
        let state = world.build();
        assert_eq!((only(&state).eligible(), only(&state).panic), (2, Some((1, 2))), "50 % are below 60 %");
        let key = ("ingress".to_owned(), "10.1.1.5:443".parse().unwrap());
        let order = crate::model::AdminOrder { state: AdminState::Down, ..crate::model::AdminOrder::default() };
        world.orders.insert(key, order);
        let state = world.build();
        assert_eq!(verdicts(&state)[1].1, Some(Exclusion::Down));
        assert_eq!(only(&state).panic, Some((0, 1)), "who is down on purpose does not count");
    }

    #[test]
    fn a_new_backend_waits_for_its_first_check_only_where_that_is_mandatory_and_one_of_before_the_restart_does_not() {
        assert_eq!(only(&checked(0, false).build()).eligible(), 2);
        let mut world = checked(0, true);
        assert_eq!(verdicts(&world.build())[0].1, Some(Exclusion::Unhealthy(Verdict::Checking)));
        world.adopt(true);
        assert_eq!(verdicts(&world.build())[0].1, None, "it served before the restart");
        world.adopt(false);
        assert_eq!(verdicts(&world.build())[0].1, Some(Exclusion::Unhealthy(Verdict::Down)), "it did not");
    }

    #[test]
    fn every_backend_of_a_checked_service_is_a_target_and_checks_leave_from_where_traffic_does() {
        let mut world = checked(0, false);
        world.route("10.1.0.0/16", &[]);
        world.route("10.1.0.0/24", &["172.16.1.80"]);
        let found = targets(&world.config, &world.build(), None);
        let rows: Vec<_> = found.values().map(|target| (target.reachable, target.source)).collect();
        let host = Some("172.16.1.88".parse().unwrap());
        assert_eq!(rows, [(true, host), (false, host)]);
        world.config.services.get_mut("ingress").unwrap().health = None;
        assert!(targets(&world.config, &world.build(), None).is_empty());
    }

    #[test]
    fn a_shared_vip_is_announced_while_any_of_its_services_can_serve() {
        let mut world = World::new();
        world.pool(&["10.1.0.4:443"], PoolState::Fresh);
        world.route("10.1.0.0/24", &["172.16.1.80"]);
        let mut other = world.config.services["ingress"].clone();
        other.name = "other".to_owned();
        other.listen = vec!["172.16.1.88:8080/tcp".parse().unwrap()];
        other.backends = BackendSource::Static(vec![StaticBackend::new("10.1.9.9:80".parse().unwrap())]);
        world.config.services.insert("other".to_owned(), other);
        let state = world.build();
        assert_eq!(state.frontends.values().map(|frontend| frontend.eligible()).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(state.announcements.keys().map(ToString::to_string).collect::<Vec<_>>(), ["172.16.1.88/32"]);
    }
}
