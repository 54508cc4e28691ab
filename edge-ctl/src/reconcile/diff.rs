//! Which writes lead from the datapath as it is to the datapath as it should be, and in which order. Pure.
//!
//! Make before break: after every prefix of the list the datapath is valid, since the daemon may die between any two
//! writes. A frontend's index entry points to a live service; its selection region is written whole before the service
//! refers to it; the backends in it exist; its filter bits are set before it is reachable; a VIP is withdrawn before its
//! maps change for the worse and announced after they changed for the better. The order is:
//!
//! Source ranges are written before the service that turns them on, and taken out after the one that turns
//! them off, and after its frontend is gone.
//!
//! 1. withdraw VIPs; 2. exclude backends that are gone or not eligible (one in-place write each, so new flows avoid them at
//!    once); 3. write new backends, filter bits, the dnat index and state words; 4. for each frontend: region, label,
//!    service, index, those with a pool first, since another on the same VIP may just be losing its own; 5. take frontends
//!    that are gone out of the index, exclude their backends, let go of their pools; 6. free what no flow uses; 7. clear
//!    filter bits; 8. announce VIPs.
//!
//! An excluded backend stays in the Maglev table between steps 2 and 4: selection skips it from the first write on, and a
//! table without it follows in the same list. When no backend is eligible the service keeps no region at all, so that
//! new flows are dropped with their reason and established ones go on.
//!
//! A service or a backend that is gone keeps its number, its entry and its filter bits until no flow uses it (drain).
//! A frontend that changes between full-nat and dnat gets a new service number, and the old one drains.
//!
//! Numbers are the lowest free ones from 1; regions go first-fit, and never where a region was a moment ago
//! ([`Reserved`]): a packet that had just read the old reference may still be looking there.

mod regions;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use edge_common::maps::{
    BackendEntry, SNAT_ADDRESSES, ServiceEntry, ServiceKey, SourceKey, backend_state, balance, mode, service_flag,
};

use super::pages::Pages;
use super::ports::{
    Action, BackendSlot, DatapathState, FilterBits, frontend_of, needed_filter, same_family, service_key, state_word,
    wire,
};
use super::protect::{protected, ranges};
use crate::{
    desired::{Announced, DesiredBackend, DesiredFrontend, DesiredState},
    model::{Balance, Frontend, Mode, PoolMember, TableShape},
};

/// Lowest SNAT port where none is configured; which of them may be used on the host's own addresses is a bitmap of its own.
const SNAT_PORT_MIN: u16 = 1024;

/// Makes a pool's table of indices into the members, which are sorted by address; empty where there can be none.
pub type Fill<'a> = dyn Fn(&[PoolMember], TableShape) -> Arc<[u16]> + 'a;

/// What must not be given out again yet, although nothing in the maps refers to it any more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reserved {
    /// Regions that were replaced a moment ago: first chunk and number of chunks.
    pub regions: Vec<(u32, u32)>,
    /// Backend numbers that half-open flows may still carry.
    pub backends: BTreeSet<u32>,
    /// Service numbers that half-open flows may still carry.
    pub services: BTreeSet<u32>,
    /// Backends of services that are not looked at.
    pub others: Pages<BackendSlot>,
}

/// The steps, and what could not be reached by any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Steps, in order.
    pub actions: Vec<Action>,
    /// Regions that the steps replace: first chunk and number of chunks. To be [`Reserved`] for a while.
    pub retired: Vec<(u32, u32)>,
    /// What cannot be done, for users: full maps, addresses without a datapath.
    pub problems: Vec<String>,
    /// Frontends that it was made for.
    pub frontends: usize,
}

/// What all edges of a group call a backend, for the table: its address and port, never an edge's own number for it.
pub fn identity(address: SocketAddr) -> u64 {
    let fold = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    match address.ip() {
        IpAddr::V4(ip) => (u64::from(u32::from(ip)) << 16) | u64::from(address.port()),
        IpAddr::V6(ip) => ip.octets().iter().chain(&address.port().to_be_bytes()).fold(0xcbf2_9ce4_8422_2325, fold),
    }
}

/// Decides the steps. Nothing to do is an empty list.
pub fn diff(desired: &DesiredState, actual: &DatapathState, reserved: &Reserved, fill: &Fill<'_>) -> Plan {
    diff_among(desired, None, actual, reserved, fill)
}

/// As [`diff`], where `desired` and `actual` are a part of all there is, `whole` are all frontends, and nothing of the others
/// changes.
pub(super) fn diff_among(
    desired: &DesiredState,
    whole: Option<&DesiredState>,
    actual: &DatapathState,
    reserved: &Reserved,
    fill: &Fill<'_>,
) -> Plan {
    let mut planner = Planner {
        desired,
        whole,
        reserved,
        fill,
        used: regions::used(actual, reserved),
        state: actual.clone(),
        plan: Plan { frontends: desired.frontends.len(), ..Plan::default() },
        members: BTreeMap::new(),
        services: BTreeMap::new(),
        wanted: Rc::default(),
        failed: BTreeSet::new(),
    };
    for (number, slot) in actual.backends.iter() {
        planner.members.entry(slot.entry.service).or_default().insert(*number);
    }
    planner.withdraw();
    planner.number_services();
    planner.wanted = Rc::new(planner.find_wanted());
    planner.exclude_backends(Scope::Served);
    planner.add_backends();
    planner.add_filter_bits();
    planner.index_backends(&BTreeSet::new());
    planner.set_states();
    planner.add_ranges();
    planner.publish_services();
    planner.remove_frontends();
    planner.remove_ranges();
    planner.exclude_backends(Scope::All);
    planner.release_pools();
    planner.free();
    planner.trim_filter();
    planner.announce();
    planner.plan
}

/// Whose backends to look at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scope {
    /// Those of desired frontends.
    Served,
    /// Those of services that are gone, too.
    All,
}

/// Desired backends by service number, address and protocol number.
type Wanted<'a> = BTreeMap<(u32, SocketAddr, u8), &'a DesiredBackend>;

struct Planner<'a> {
    desired: &'a DesiredState,
    /// Where `desired` is only a part of it.
    whole: Option<&'a DesiredState>,
    reserved: &'a Reserved,
    fill: &'a Fill<'a>,
    /// The datapath after the steps so far.
    state: DatapathState,
    plan: Plan,
    /// Chunks that no new region may have: first one and how many.
    used: BTreeMap<u32, u32>,
    /// Backend numbers by service number, of `state`.
    members: BTreeMap<u32, BTreeSet<u32>>,
    /// Numbers of the desired frontends that have a pool.
    services: BTreeMap<Frontend, u32>,
    wanted: Rc<Wanted<'a>>,
    /// Frontends that cannot be served.
    failed: BTreeSet<Frontend>,
}

impl<'a> Planner<'a> {
    fn step(&mut self, action: Action) {
        match &action {
            Action::PutBackend { number, entry, .. } => {
                self.members.entry(entry.service).or_default().insert(*number);
            }
            Action::FreeBackend { number } => {
                let service = self.state.backends.get(number).map(|slot| slot.entry.service);
                if let Some(members) = service.and_then(|service| self.members.get_mut(&service)) {
                    members.remove(number);
                }
            }
            _ => {}
        }
        self.state.apply(&action);
        self.plan.actions.push(action);
    }

    fn fail(&mut self, frontend: &Frontend, problem: String) {
        self.plan.problems.push(problem);
        self.failed.insert(*frontend);
    }

    /// Frontends with a known pool and a number, in order.
    fn served(&self) -> Vec<(&'a Frontend, &'a DesiredFrontend, u32)> {
        let desired = self.desired;
        let number = |frontend| self.services.get(frontend).copied();
        desired.frontends.iter().filter_map(|(key, value)| Some((key, value.as_ref(), number(key)?))).collect()
    }

    fn withdraw(&mut self) {
        let gone: Vec<_> =
            self.state.announced.keys().filter(|p| !self.desired.announcements.contains_key(p)).copied().collect();
        for prefix in gone {
            self.step(Action::Withdraw { prefix });
        }
    }

    fn remove_frontends(&mut self) {
        let desired = |key: &ServiceKey| frontend_of(key).is_some_and(|f| self.desired.frontends.contains_key(&f));
        let gone: Vec<_> = self.state.index.keys().filter(|key| !desired(key)).copied().collect();
        for key in gone {
            self.step(Action::RemoveIndex { key });
        }
    }

    /// Finds each frontend's number: the one in the index, a draining one of the same frontend and mode, or a free one.
    fn number_services(&mut self) {
        let mut taken: BTreeSet<u32> = self.state.services.keys().copied().collect();
        taken.extend(self.state.index.values());
        taken.extend(&self.reserved.services);
        let mut claimed = BTreeSet::new();
        let desired = self.desired;
        for (frontend, wanted) in desired.frontends.iter().filter(|(_, wanted)| wanted.pool.is_some()) {
            let key = service_key(frontend.address, frontend.protocol);
            let is_same = |entry: &ServiceEntry| same_frontend(entry, &key) && entry.mode == mode_number(wanted.mode);
            let indexed = self.state.index.get(&key).copied();
            let indexed = indexed.filter(|n| self.state.services.get(n).is_some_and(|slot| is_same(&slot.entry)));
            let draining = || {
                let mut slots = self.state.services.iter();
                slots.find(|(number, slot)| is_same(&slot.entry) && !claimed.contains(*number)).map(|(n, _)| *n)
            };
            let number = indexed
                .or_else(draining)
                .or_else(|| (1..self.state.capacity.services).find(|number| !taken.contains(number)));
            match number {
                Some(number) => {
                    taken.insert(number);
                    claimed.insert(number);
                    self.services.insert(*frontend, number);
                }
                None => self.fail(frontend, format!("{frontend}: the services map is full")),
            }
        }
    }

    /// The desired backends of a service number, by address and protocol number: those of its VIP's family, since nothing
    /// translates between the two.
    fn find_wanted(&self) -> Wanted<'a> {
        let mut wanted = BTreeMap::new();
        for (frontend, service, number) in self.served() {
            let vip = frontend.address.ip();
            for backend in service.pool.iter().flatten().filter(|b| same_family(b.address.ip(), vip)) {
                wanted.insert((number, backend.address, frontend.protocol.number()), backend);
            }
        }
        wanted
    }

    fn wanted(&self) -> Rc<Wanted<'a>> {
        Rc::clone(&self.wanted)
    }

    /// Service numbers whose frontend keeps what the maps have.
    fn kept(&self) -> BTreeSet<u32> {
        let keeps = |key: &ServiceKey| {
            let frontend = frontend_of(key).and_then(|frontend| self.desired.frontends.get(&frontend));
            frontend.is_some_and(|frontend| frontend.pool.is_none())
        };
        self.state.index.iter().filter(|(key, _)| keeps(key)).map(|(_, number)| *number).collect()
    }

    fn exclude_backends(&mut self, scope: Scope) {
        let (wanted, kept) = (self.wanted(), self.kept());
        let served: BTreeSet<u32> = self.services.values().copied().collect();
        let mut excluded = Vec::new();
        for (number, slot) in self.state.backends.iter() {
            let entry = &slot.entry;
            let eligible = wanted.get(&(entry.service, slot.address(), entry.protocol)).is_some_and(|b| b.eligible());
            let in_scope = scope == Scope::All || served.contains(&entry.service);
            if in_scope && slot.eligible() && !eligible && !kept.contains(&entry.service) {
                excluded.push((*number, slot.state & !backend_state::ELIGIBLE));
            }
        }
        for (number, state) in excluded {
            self.step(Action::SetBackendState { number, state });
        }
    }

    fn add_backends(&mut self) {
        let mut known = BTreeMap::new();
        for (number, slot) in self.state.backends.iter() {
            known.insert((slot.entry.service, slot.address(), slot.entry.protocol), *number);
        }
        let wanted = self.wanted();
        let fresh = wanted.keys().filter(|key| !known.contains_key(key)).count();
        let mut free = self.free_backends(fresh).into_iter();
        let mut overflow = 0_usize;
        for (key @ (service, _, protocol), backend) in wanted.iter() {
            let number = known.get(key).copied();
            let before = number.and_then(|number| self.state.backends.get(&number)).map(|slot| slot.entry);
            let mut entry = backend_entry(*service, *protocol, backend, before);
            entry.limit = backend.limit.unwrap_or(0);
            match number.or_else(|| free.next()) {
                Some(_) if before == Some(entry) => {}
                Some(number) => self.step(Action::PutBackend { number, entry, fresh: before.is_none() }),
                None => overflow += 1,
            }
        }
        if overflow > 0 {
            self.plan.problems.push(format!("the backends map is full: {overflow} backends are left out"));
        }
    }

    /// The lowest `count` numbers that may be given out.
    fn free_backends(&self, count: usize) -> Vec<u32> {
        let is_taken = |number: &u32| {
            let in_use = self.state.backends.contains_key(number) || self.reserved.others.contains_key(number);
            in_use || self.reserved.backends.contains(number)
        };
        (1..self.state.capacity.backends).filter(|number| !is_taken(number)).take(count).collect()
    }

    fn add_filter_bits(&mut self) {
        let mut planned = self.state.services.clone();
        for (frontend, service, number) in self.served() {
            let entry = self.service_entry(frontend, service, 0);
            planned.change(number, |slot| slot.entry = entry);
        }
        // Bits for what is there before and after: entries may still change in between.
        let needed = needed_filter(&planned, &self.state.backends).union(&self.state.needed_filter());
        self.set_filter(self.state.filter.union(&needed));
    }

    fn set_filter(&mut self, bits: FilterBits) {
        if bits != *self.state.filter {
            self.step(Action::SetFilter { bits });
        }
    }

    /// Points each dnat backend's address at its number: the wanted one first, else one that still drains, but none that
    /// is about to be freed.
    fn index_backends(&mut self, leaving: &BTreeSet<u32>) {
        let desired: BTreeMap<u32, Mode> = self.served().into_iter().map(|(_, s, number)| (number, s.mode)).collect();
        let wanted = self.wanted();
        let mut claims: BTreeMap<ServiceKey, (bool, u32)> = BTreeMap::new();
        for (number, slot) in self.state.backends.iter().filter(|(number, _)| !leaving.contains(number)) {
            let entry = &slot.entry;
            let old = self.state.services.get(&entry.service).map(|service| service.entry.mode == mode::DNAT);
            let dnat = desired.get(&entry.service).map_or(old == Some(true), |mode| *mode == Mode::Dnat);
            if dnat {
                let drains = !wanted.contains_key(&(entry.service, slot.address(), entry.protocol));
                let claim = (drains, *number);
                let best = claims.entry(backend_key(entry)).or_insert(claim);
                *best = claim.min(*best);
            }
        }
        for (key, (_, number)) in claims {
            if self.state.backend_index.get(&key) != Some(&number) {
                self.step(Action::PutBackendIndex { key, number });
            }
        }
    }

    fn set_states(&mut self) {
        let wanted = self.wanted();
        let mut changes = Vec::new();
        for (number, slot) in self.state.backends.iter() {
            let backend = wanted.get(&(slot.entry.service, slot.address(), slot.entry.protocol));
            let Some(backend) = backend.filter(|backend| backend.eligible()) else { continue };
            let state = state_word(backend.weight, backend.share, backend.tier);
            if slot.state != state {
                changes.push((*number, state));
            }
        }
        for (number, state) in changes {
            self.step(Action::SetBackendState { number, state });
        }
    }

    fn wanted_ranges(&self) -> BTreeMap<SourceKey, u32> {
        let of = |(frontend, service, number): (&Frontend, &DesiredFrontend, u32)| {
            ranges(number, frontend.address.ip(), &service.protection)
        };
        self.served().into_iter().flat_map(of).collect()
    }

    fn add_ranges(&mut self) {
        let wanted = self.wanted_ranges();
        let missing: Vec<_> =
            wanted.into_iter().filter(|(key, action)| self.state.ranges.get(key) != Some(action)).collect();
        let room = usize::try_from(self.state.capacity.ranges).unwrap_or(usize::MAX);
        let mut overflow = 0_usize;
        for (key, action) in missing {
            if self.state.ranges.contains_key(&key) || self.state.ranges.len() < room {
                self.step(Action::PutRange { key, action });
            } else {
                overflow += 1;
            }
        }
        if overflow > 0 {
            self.plan.problems.push(format!("the map of source ranges is full: {overflow} are left out"));
        }
    }

    /// Ranges of frontends that keep what the maps have stay.
    fn remove_ranges(&mut self) {
        let (wanted, kept) = (self.wanted_ranges(), self.kept());
        let gone =
            self.state.ranges.keys().filter(|key| !wanted.contains_key(key) && !kept.contains(&key.source.service));
        for key in gone.copied().collect::<Vec<_>>() {
            self.step(Action::RemoveRange { key });
        }
    }

    fn publish_services(&mut self) {
        let mut served = self.served();
        served.sort_by_key(|(_, service, _)| service.eligible() == 0);
        for (frontend, service, number) in served {
            let key = service_key(frontend.address, frontend.protocol);
            let before = self.state.services.get(&number).map(|slot| slot.entry).unwrap_or_default();
            let Some(selection) = self.publish_region(frontend, service, number, before.selection) else { continue };
            let entry = self.service_entry(frontend, service, selection);
            let fresh = !same_frontend(&before, &key);
            if self.state.services.get(&number).is_none_or(|slot| slot.label != service.service) {
                self.step(Action::PutLabel { number, label: service.service.clone() });
            }
            if before != entry {
                self.retire(before.selection);
                self.step(Action::PutService { number, entry, fresh });
            }
            if self.state.index.get(&key) != Some(&number) {
                self.step(Action::SetIndex { key, number });
            }
        }
    }

    /// Services that no frontend leads to let go of their pool, so that its backends can be freed as they drain.
    fn release_pools(&mut self) {
        let live: BTreeSet<u32> = self.state.index.values().copied().collect();
        let draining = self.state.services.iter().filter(|(n, slot)| !live.contains(n) && slot.entry.selection != 0);
        let draining: Vec<_> = draining.map(|(number, slot)| (*number, slot.entry)).collect();
        for (number, entry) in draining {
            self.retire(entry.selection);
            let entry = ServiceEntry { selection: 0, ..entry };
            self.step(Action::PutService { number, entry, fresh: false });
        }
    }

    fn free(&mut self) {
        let (wanted, kept) = (self.wanted(), self.kept());
        let referenced: BTreeSet<u32> = self.state.regions.values().flat_map(|region| region.numbers()).collect();
        let mut idle = Vec::new();
        for (number, slot) in self.state.backends.iter() {
            let is_wanted = wanted.contains_key(&(slot.entry.service, slot.address(), slot.entry.protocol));
            let in_use = slot.active > 0 || referenced.contains(number) || self.reserved.backends.contains(number);
            if !is_wanted && !in_use && !kept.contains(&slot.entry.service) {
                idle.push((*number, backend_key(&slot.entry)));
            }
        }
        // Another service may have the same backend.
        self.index_backends(&idle.iter().map(|(number, _)| *number).collect());
        for (number, key) in idle {
            if self.state.backend_index.get(&key) == Some(&number) {
                self.step(Action::RemoveBackendIndex { key });
            }
            self.step(Action::FreeBackend { number });
        }
        self.drop_stale_backend_keys();
        let live: BTreeSet<u32> = self.state.index.values().copied().collect();
        let used: BTreeSet<u32> = self.state.backends.values().map(|slot| slot.entry.service).collect();
        let services = self.state.services.iter().filter(|(number, slot)| {
            let gone = !live.contains(number) && !used.contains(number);
            gone && slot.active == 0 && !self.reserved.services.contains(number)
        });
        let services: Vec<_> = services.map(|(number, _)| *number).collect();
        for number in services {
            self.step(Action::FreeService { number });
        }
    }

    /// Keys of the dnat index that no longer lead to a backend with that address.
    fn drop_stale_backend_keys(&mut self) {
        let leads = |key: &ServiceKey, number: &u32| {
            self.state.backends.get(number).is_some_and(|slot| backend_key(&slot.entry) == *key)
        };
        let stale: Vec<_> =
            self.state.backend_index.iter().filter(|(key, number)| !leads(key, number)).map(|(key, _)| *key).collect();
        for key in stale {
            self.step(Action::RemoveBackendIndex { key });
        }
    }

    /// What is needed is known only where all is looked at.
    fn trim_filter(&mut self) {
        if self.whole.is_none() {
            self.set_filter(self.state.needed_filter());
        }
    }

    fn announce(&mut self) {
        for (prefix, attributes) in &self.desired.announcements {
            let whole = self.whole.unwrap_or(self.desired);
            let mut frontends = whole.frontends.iter().filter(|(f, _)| prefix.contains(&f.address.ip()));
            let ready = frontends.any(|(f, d)| d.announced == Announced::Yes && !self.failed.contains(f));
            if ready && self.state.announced.get(prefix) != Some(attributes) {
                self.step(Action::Announce { prefix: *prefix, attributes: attributes.clone() });
            }
        }
    }

    fn service_entry(&self, frontend: &Frontend, service: &DesiredFrontend, selection: u32) -> ServiceEntry {
        let key = service_key(frontend.address, frontend.protocol);
        let mut snat_addresses = [[0; 4]; SNAT_ADDRESSES];
        let mut snat_count = 0;
        let vip = frontend.address.ip();
        let configured =
            service.snat.addresses.iter().filter(|address| same_family(**address, vip)).map(|address| wire(*address));
        for (slot, address) in snat_addresses.iter_mut().zip(configured) {
            *slot = address;
            snat_count += 1;
        }
        let (snat_port_min, snat_port_max) = service.snat.ports.unwrap_or((SNAT_PORT_MIN, u16::MAX));
        let entry = ServiceEntry {
            address: key.address,
            port: key.port,
            protocol: key.protocol,
            mode: mode_number(service.mode),
            selection,
            snat_count,
            snat_addresses,
            snat_port_min,
            snat_port_max,
            established_timeout: service.timeouts.established,
            half_open_timeout: service.timeouts.half_open,
            closing_timeout: service.timeouts.closing,
            flags: if self.desired.record_ends { service_flag::RECORD_ENDS } else { 0 }
                | if service.timeouts.one_reply { service_flag::ONE_REPLY } else { 0 }
                | if service.dedicated { service_flag::DEDICATED } else { 0 },
            affinity_timeout: service.selection.affinity.map_or(0, seconds),
            balance: balance_number(service.balance),
            ..ServiceEntry::default()
        };
        protected(entry, &service.protection)
    }
}

fn same_frontend(entry: &ServiceEntry, key: &ServiceKey) -> bool {
    (entry.address, entry.port, entry.protocol) == (key.address, key.port, key.protocol)
}

const fn mode_number(mode: Mode) -> u8 {
    match mode {
        Mode::FullNat => mode::FULL_NAT,
        Mode::Dnat => mode::DNAT,
    }
}

fn seconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_secs()).unwrap_or(u32::MAX)
}

const fn balance_number(balance: Balance) -> u8 {
    match balance {
        Balance::Maglev => balance::MAGLEV,
        Balance::RoundRobin => balance::ROUND_ROBIN,
        Balance::LeastConnections => balance::LEAST_CONNECTIONS,
    }
}

/// Under which the dnat index knows a backend.
pub(super) const fn backend_key(entry: &BackendEntry) -> ServiceKey {
    ServiceKey { address: entry.address, port: entry.port, protocol: entry.protocol, _pad: 0 }
}

/// The entry of a backend; a SNAT address that is not known now stays as it was.
fn backend_entry(service: u32, protocol: u8, backend: &DesiredBackend, before: Option<BackendEntry>) -> BackendEntry {
    let address = backend.address;
    let snat_address = match backend.snat_address {
        Some(source) if same_family(source, address.ip()) => wire(source),
        _ => before.map(|entry| entry.snat_address).unwrap_or_default(),
    };
    BackendEntry {
        address: wire(address.ip()),
        port: address.port().to_be(),
        protocol,
        service,
        snat_address,
        ..BackendEntry::default()
    }
}
