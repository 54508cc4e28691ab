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
        BackendSource, Balance, Frontend, Mode, PathAttributes, PoolMember, PoolSnapshot, PoolState, Protocol,
        RouteSet, Service, Snat, within,
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
    /// True while the program is attached to every interface it should be: no VIP is announced otherwise.
    pub datapath_ready: bool,
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
    /// No BGP route and no connected or static prefix covers it.
    NoRoute,
    /// full-nat without a known source address towards it.
    NoSnatAddress,
}

impl fmt::Display for Exclusion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
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
    let mut state = DesiredState::default();
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
        allowed.map(|member| build_backend(inputs, service, known, member, source)).collect::<Vec<_>>()
    });
    let eligible = pool.iter().flatten().filter(|backend| backend.eligible()).count();
    let announced = match &service.announce {
        Some(announce) if config.bgp.is_some() => {
            let wanted = announce.min_backends;
            match (inputs.datapath_ready, eligible >= wanted) {
                (false, _) => Announced::NoDatapath,
                (true, false) => Announced::TooFew { eligible, wanted },
                (true, true) => Announced::Yes,
            }
        }
        _ => Announced::Off,
    };
    DesiredFrontend {
        service: service.name.clone(),
        mode: service.mode,
        balance: service.balance,
        snat: service.snat.clone(),
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

fn build_backend(
    inputs: &Inputs<'_>,
    service: &Service,
    adopted: &[AdoptedBackend],
    member: PoolMember,
    source: &'static str,
) -> DesiredBackend {
    let address = member.address.ip();
    let before = adopted.iter().find(|backend| backend.address == member.address);
    let route = inputs.routes.lookup(address).filter(|(prefix, _)| prefix.prefix_len() > 0);
    let covered = route.is_some()
        || inputs.kernel_prefixes.iter().any(|prefix| prefix.prefix_len() > 0 && prefix.contains(&address))
        || (!inputs.routes_settled && before.is_some_and(|backend| backend.eligible));
    let snat_address = inputs.snat_sources.get(&address).copied().or(before.and_then(|backend| backend.snat_address));
    let needs_source = service.mode == Mode::FullNat && service.snat.addresses.is_empty();
    let excluded = if !covered {
        Some(Exclusion::NoRoute)
    } else if needs_source && snat_address.is_none() {
        Some(Exclusion::NoSnatAddress)
    } else {
        None
    };
    let node = route.and_then(|(_, hops)| hops.iter().find_map(|hop| inputs.nodes.get(hop).cloned()));
    DesiredBackend { address: member.address, weight: member.weight, excluded, node, source, snat_address }
}
