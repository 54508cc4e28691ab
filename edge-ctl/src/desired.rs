//! What the datapath and BGP should look like, from the configuration, the pools, and the routes. Pure: no I/O, no clock.
//!
//! A backend is eligible when it lies in `pod_networks` and a BGP route or a connected or static prefix covers it; a
//! default route says nothing about pods and does not count. The check runs on every input, so a withdrawn route makes
//! its backends ineligible in the same step, before DNS or a health check could notice.
//!
//! After a restart the maps still hold the pools of the previous run ([`Inputs::adopted`]). Until a source has answered,
//! the adopted pool stands in for its answer; until routes have settled, a backend that was eligible stays so. A restart
//! with unchanged inputs therefore builds exactly the state that the maps already hold.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;

use crate::{
    config::valid::Config,
    model::{
        BackendSource, Balance, Frontend, Mode, PathAttributes, PoolMember, PoolSnapshot, PoolState, Protection,
        Protocol, RouteSet, Service, Snat, within,
    },
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
}

/// A backend that the maps held at start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdoptedBackend {
    /// Address and port.
    pub address: SocketAddr,
    /// Weight it was selected with.
    pub weight: u16,
    /// Whether it was given new flows.
    pub eligible: bool,
    /// SNAT source address it had, if one was known.
    pub snat_address: Option<IpAddr>,
}

/// What the datapath and BGP should look like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DesiredState {
    /// Every listen address of every service.
    pub frontends: BTreeMap<Frontend, DesiredFrontend>,
    /// VIP prefixes (/32, /128) to announce; only those with enough eligible backends. The unconditional prefixes of
    /// `[bgp] networks` are not among them.
    pub announcements: BTreeMap<IpNet, PathAttributes>,
    /// Addresses of all frontends: what the host must hold so that the kernel answers for their other ports.
    pub addresses: BTreeSet<IpAddr>,
    /// The program reports every flow that ends.
    pub record_ends: bool,
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
    /// `None`: eligible; else why it gets no new flows.
    pub excluded: Option<Exclusion>,
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

/// Why a member of a pool gets no new flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exclusion {
    /// Its address is of another family than the VIP: nothing translates between IPv4 and IPv6.
    OtherFamily,
    /// No BGP route and no connected or static prefix covers it.
    NoRoute,
    /// full-nat without a known source address towards it.
    NoSnatAddress,
}

impl fmt::Display for Exclusion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OtherFamily => "other-family",
            Self::NoRoute => "no-route",
            Self::NoSnatAddress => "no-source-address",
        })
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
    /// The host does not hold the address, so that nobody would answer for its other ports.
    NotHeld,
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
            Self::NotHeld => f.write_str("no: the address is not on lo"),
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
}

impl Timeouts {
    /// TCP: established 2 h 4 min (RFC 5382 REQ-5), half-open 60 s, a closed flow's port rests 60 s (the backend's
    /// TIME_WAIT). UDP: 5 min (RFC 4787 REQ-5), 30 s before the first reply, 60 s rest.
    pub const fn of(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Tcp => Self { established: 7440, half_open: 60, closing: 60 },
            Protocol::Udp => Self { established: 300, half_open: 30, closing: 60 },
        }
    }
}

/// Builds the desired state.
pub fn build(config: &Config, inputs: &Inputs<'_>) -> DesiredState {
    let mut state = DesiredState { record_ends: config.access_log.is_some(), ..DesiredState::default() };
    for service in config.services.values() {
        for frontend in &service.listen {
            let desired = build_frontend(config, inputs, service, frontend);
            if let (Announced::Yes, Some(announce)) = (desired.announced, &service.announce) {
                // Several services may share a VIP: it is announced while any of them can serve, with the
                // attributes of the first by name.
                let prefix = IpNet::from(frontend.address.ip());
                state.announcements.entry(prefix).or_insert_with(|| announce.attributes.clone());
            }
            state.addresses.insert(frontend.address.ip());
            state.frontends.insert(*frontend, desired);
        }
    }
    state
}

fn build_frontend(config: &Config, inputs: &Inputs<'_>, service: &Service, frontend: &Frontend) -> DesiredFrontend {
    let pool = members(inputs, service, frontend).map(|(members, source)| {
        let allowed = members.into_iter().filter(|member| within(&config.edge.pod_networks, member.address.ip()));
        let known = inputs.adopted.get(frontend).map_or(&[][..], Vec::as_slice);
        let vip = frontend.address.ip();
        allowed.map(|member| build_backend(inputs, service, vip, known, member, source)).collect::<Vec<_>>()
    });
    let eligible = pool.iter().flatten().filter(|backend| backend.eligible()).count();
    let announced = match &service.announce {
        Some(announce) if config.bgp.is_some() => {
            let wanted = announce.min_backends;
            if !inputs.datapath_ready {
                Announced::NoDatapath
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
    DesiredFrontend {
        service: service.name.clone(),
        mode: service.mode,
        balance: service.balance,
        snat: service.snat.clone(),
        protection: service.protection.clone(),
        timeouts: Timeouts::of(frontend.protocol),
        pool,
        announced,
    }
}

/// The members of a frontend's pool, by address, one entry for each address (the heaviest where a source lists several),
/// and where they come from; `None` where nothing is known and the maps hold nothing either.
fn members(inputs: &Inputs<'_>, service: &Service, frontend: &Frontend) -> Option<(Vec<PoolMember>, &'static str)> {
    let (members, source): (Vec<PoolMember>, _) = match (&service.backends, inputs.pools.get(&service.backends)) {
        (BackendSource::Dns { .. }, Some(snapshot)) if snapshot.state != PoolState::Unknown => {
            (snapshot.members.iter().copied().collect(), "dns")
        }
        (BackendSource::Static(_), Some(snapshot)) if snapshot.state != PoolState::Unknown => {
            (snapshot.members.iter().copied().collect(), "static")
        }
        (BackendSource::Static(addresses), _) => {
            (addresses.iter().map(|&address| PoolMember { address, weight: 1 }).collect(), "static")
        }
        (BackendSource::Dns { .. }, _) => {
            let adopted = inputs.adopted.get(frontend)?;
            let eligible = adopted.iter().filter(|backend| backend.eligible);
            (eligible.map(|b| PoolMember { address: b.address, weight: b.weight }).collect(), "adopted")
        }
    };
    let mut weights = BTreeMap::new();
    for member in members {
        let weight = weights.entry(member.address).or_insert(1);
        *weight = member.weight.max(*weight);
    }
    Some((weights.into_iter().map(|(address, weight)| PoolMember { address, weight }).collect(), source))
}

/// True where a BGP route or a connected or static prefix covers the address; default routes do not count.
pub fn is_covered(routes: &RouteSet, kernel_prefixes: &[IpNet], address: IpAddr) -> bool {
    routes.lookup(address).is_some_and(|(prefix, _)| prefix.prefix_len() > 0)
        || kernel_prefixes.iter().any(|prefix| prefix.prefix_len() > 0 && prefix.contains(&address))
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
    let excluded = if !same_family(&vip) {
        Some(Exclusion::OtherFamily)
    } else if !covered {
        Some(Exclusion::NoRoute)
    } else if needs_source && snat_address.is_none() {
        Some(Exclusion::NoSnatAddress)
    } else {
        None
    };
    let node = route.and_then(|(_, hops)| hops.iter().find_map(|hop| inputs.nodes.get(hop).cloned()));
    DesiredBackend { address: member.address, weight: member.weight, excluded, node, source, snat_address }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::valid::{Bgp, Edge, Hook, Tables},
        model::{Announce, RouteUpdate},
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
            snat: Snat::default(),
            announce: Some(Announce { min_backends: 1, attributes: PathAttributes::default() }),
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
            };
            for address in ["10.1.0.4", "10.1.1.5", "192.0.2.1"] {
                world.snat.insert(address.parse().unwrap(), "172.16.1.88".parse().unwrap());
            }
            world
        }

        fn pool(&mut self, members: &[&str], state: PoolState) {
            let member = |text: &&str| PoolMember { address: text.parse().unwrap(), weight: 1 };
            let snapshot = PoolSnapshot { source: source(), members: members.iter().map(member).collect(), state };
            self.pools.insert(source(), snapshot);
        }

        fn route(&mut self, prefix: &str, hops: &[&str]) {
            let next_hops = hops.iter().map(|hop| hop.parse().unwrap()).collect();
            self.routes.apply(RouteUpdate { prefix: prefix.parse().unwrap(), next_hops });
        }

        fn build(&self) -> DesiredState {
            build(
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
                },
            )
        }

        fn adopt(&mut self, eligible: bool) {
            let backend = AdoptedBackend {
                address: "10.1.0.4:443".parse().unwrap(),
                weight: 7,
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
    fn a_shared_vip_is_announced_while_any_of_its_services_can_serve() {
        let mut world = World::new();
        world.pool(&["10.1.0.4:443"], PoolState::Fresh);
        world.route("10.1.0.0/24", &["172.16.1.80"]);
        let mut other = world.config.services["ingress"].clone();
        other.name = "other".to_owned();
        other.listen = vec!["172.16.1.88:8080/tcp".parse().unwrap()];
        other.backends = BackendSource::Static(vec!["10.1.9.9:80".parse().unwrap()]);
        world.config.services.insert("other".to_owned(), other);
        let state = world.build();
        assert_eq!(state.frontends.values().map(DesiredFrontend::eligible).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(state.announcements.keys().map(ToString::to_string).collect::<Vec<_>>(), ["172.16.1.88/32"]);
    }
}
