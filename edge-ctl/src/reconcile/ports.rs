//! What the reconciler knows of the datapath, what it can do to it, and the two traits through which it does so. Plain
//! data: no I/O, no clock.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use edge_common::{
    address::{Address, Wide, filter_bit, is_none, mapped, unmapped},
    maps::{
        self, BackendEntry, POOL_PER_CHUNK, SLOTS_PER_CHUNK, ServiceEntry, ServiceKey, SourceKey, backend_state, mode,
    },
};
use ipnet::IpNet;

use super::pages::Pages;
use crate::{
    desired::AdoptedBackend,
    model::{Frontend, PathAttributes, Protocol, Tier},
};

/// The datapath's maps, and what BGP was told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DatapathState {
    /// Frontend to service number.
    pub index: BTreeMap<ServiceKey, u32>,
    /// Services by number, those that only drain included.
    pub services: Pages<ServiceSlot>,
    /// Backends by number, those that only drain included.
    pub backends: Pages<BackendSlot>,
    /// A dnat backend's address to its number.
    pub backend_index: Arc<BTreeMap<ServiceKey, u32>>,
    /// Selection regions that a service refers to, by first chunk.
    pub regions: BTreeMap<u32, Arc<Region>>,
    /// Source ranges: `range_action` numbers.
    pub ranges: BTreeMap<SourceKey, u32>,
    /// The address prefilter.
    pub filter: Arc<FilterBits>,
    /// VIP prefixes that BGP was told to announce.
    pub announced: BTreeMap<IpNet, PathAttributes>,
    /// How much the maps can hold.
    pub capacity: Capacity,
}

/// Sizes of the maps; number 0 and chunk 0 are never used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Service numbers, 0 included.
    pub services: u32,
    /// Backend numbers, 0 included.
    pub backends: u32,
    /// Selection chunks, 0 included.
    pub chunks: u32,
    /// Source ranges.
    pub ranges: u32,
}

impl Default for Capacity {
    fn default() -> Self {
        Self {
            services: maps::SERVICES,
            backends: maps::BACKENDS,
            chunks: maps::SELECTION_CHUNKS,
            ranges: maps::SOURCE_RANGES,
        }
    }
}

/// One element of the services map, and its label and flow count.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceSlot {
    /// The entry.
    pub entry: ServiceEntry,
    /// The service's name.
    pub label: String,
    /// Flows that still use it.
    pub active: u64,
}

/// One element of the backends map, and its state and flow count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendSlot {
    /// The entry.
    pub entry: BackendEntry,
    /// State word: [`backend_state`] bits, weight in the upper half.
    pub state: u32,
    /// Flows that still use it.
    pub active: u64,
}

impl BackendSlot {
    /// True where it may be given new flows.
    pub fn eligible(&self) -> bool {
        self.state & backend_state::ELIGIBLE != 0
    }

    /// Address and port.
    pub fn address(&self) -> SocketAddr {
        socket_address(self.entry.address, self.entry.port)
    }
}

/// The state word of an eligible backend with this weight, share of it in percent, and tier.
pub const fn state_word(weight: u16, share: u8, tier: Tier) -> u32 {
    let share = if share >= 100 { 0 } else { share as u32 };
    let tier = match tier {
        Tier::Primary => 0,
        Tier::Backup => backend_state::BACKUP,
    };
    ((weight as u32) << backend_state::WEIGHT_SHIFT)
        | share << backend_state::SHARE_SHIFT
        | tier
        | backend_state::ELIGIBLE
}

/// The weight in a state word, at least 1.
pub fn weight_of(state: u32) -> u16 {
    u16::try_from(state >> backend_state::WEIGHT_SHIFT).unwrap_or(u16::MAX).max(1)
}

/// The share of its weight in a state word, percent.
pub fn share_of(state: u32) -> u8 {
    let share = u8::try_from(state >> backend_state::SHARE_SHIFT & backend_state::SHARE_MASK);
    share.ok().filter(|share| (1..=99).contains(share)).unwrap_or(100)
}

/// The tier in a state word.
pub const fn tier_of(state: u32) -> Tier {
    if state & backend_state::BACKUP == 0 { Tier::Primary } else { Tier::Backup }
}

/// A pool and its selection table, as one region of the selection map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// Backend numbers.
    pub pool: Vec<u32>,
    /// Indices into `pool`.
    pub table: Arc<[u16]>,
    /// What serves while no backend of the pool can.
    pub backup: Option<Box<Region>>,
}

impl Region {
    /// Chunks it takes: one for the header, then the pool's, then the table's, then the backup's.
    pub fn chunks(&self) -> u32 {
        let backup = self.backup.as_ref().map_or(0, |backup| backup.chunks());
        region_chunks(self.pool.len(), self.table.len()).saturating_add(backup)
    }

    /// Backend numbers of both tiers.
    pub fn numbers(&self) -> impl Iterator<Item = u32> + '_ {
        self.pool.iter().chain(self.backup.iter().flat_map(|backup| &backup.pool)).copied()
    }
}

/// Chunks of a region with a pool and a table of these lengths.
pub fn region_chunks(pool: usize, table: usize) -> u32 {
    let pool = pool.div_ceil(POOL_PER_CHUNK as usize);
    let table = table.div_ceil(SLOTS_PER_CHUNK as usize);
    u32::try_from(1 + pool + table).unwrap_or(u32::MAX)
}

/// The address prefilter as sets of bit numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FilterBits {
    /// VIPs and SNAT addresses, as destinations.
    pub destinations: BTreeSet<u32>,
    /// dnat backends, as sources.
    pub sources: BTreeSet<u32>,
}

impl FilterBits {
    /// All bits of both.
    pub fn union(&self, other: &Self) -> Self {
        Self {
            destinations: self.destinations.union(&other.destinations).copied().collect(),
            sources: self.sources.union(&other.sources).copied().collect(),
        }
    }
}

/// One step towards the desired state. Every variant but `WriteRegion` is one write that packets see whole; a region is
/// written before anything refers to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Tell BGP to stop announcing a VIP.
    Withdraw {
        /// The VIP's prefix.
        prefix: IpNet,
    },
    /// Take a frontend out of the index: new flows are no longer ours.
    RemoveIndex {
        /// The frontend.
        key: ServiceKey,
    },
    /// Write a backend's state word: make it eligible, or exclude it from new flows.
    SetBackendState {
        /// Backend number.
        number: u32,
        /// State word.
        state: u32,
    },
    /// Write a backend's entry.
    PutBackend {
        /// Backend number.
        number: u32,
        /// The entry.
        entry: BackendEntry,
        /// True where the number is newly given out: its counters start from zero.
        fresh: bool,
    },
    /// Write the whole address prefilter.
    SetFilter {
        /// Its bits.
        bits: FilterBits,
    },
    /// Point a dnat backend's address at its number.
    PutBackendIndex {
        /// The backend's address, port, protocol.
        key: ServiceKey,
        /// Backend number.
        number: u32,
    },
    /// Forget a dnat backend's address.
    RemoveBackendIndex {
        /// The backend's address, port, protocol.
        key: ServiceKey,
    },
    /// Write a selection region that nothing refers to yet.
    WriteRegion {
        /// First chunk.
        first_chunk: u32,
        /// Pool and table.
        region: Arc<Region>,
    },
    /// Write a source range.
    PutRange {
        /// Service number and prefix.
        key: SourceKey,
        /// A `range_action` number.
        action: u32,
    },
    /// Forget a source range.
    RemoveRange {
        /// Service number and prefix.
        key: SourceKey,
    },
    /// Write a service's name.
    PutLabel {
        /// Service number.
        number: u32,
        /// The name.
        label: String,
    },
    /// Write a service's entry; publishes the region it refers to.
    PutService {
        /// Service number.
        number: u32,
        /// The entry.
        entry: ServiceEntry,
        /// True where the number is newly given out: its counters start from zero.
        fresh: bool,
    },
    /// Point a frontend at its service number: new flows become ours.
    SetIndex {
        /// The frontend.
        key: ServiceKey,
        /// Service number.
        number: u32,
    },
    /// Free a backend number that no flow uses.
    FreeBackend {
        /// Backend number.
        number: u32,
    },
    /// Free a service number that no flow uses.
    FreeService {
        /// Service number.
        number: u32,
    },
    /// Tell BGP to announce a VIP, or with which attributes.
    Announce {
        /// The VIP's prefix.
        prefix: IpNet,
        /// Path attributes.
        attributes: PathAttributes,
    },
}

impl Action {
    /// The name that counters and logs show.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Withdraw { .. } => "withdraw",
            Self::RemoveIndex { .. } => "remove-index",
            Self::SetBackendState { .. } => "set-backend-state",
            Self::PutBackend { .. } => "put-backend",
            Self::SetFilter { .. } => "set-filter",
            Self::PutBackendIndex { .. } => "put-backend-index",
            Self::RemoveBackendIndex { .. } => "remove-backend-index",
            Self::WriteRegion { .. } => "write-region",
            Self::PutRange { .. } => "put-range",
            Self::RemoveRange { .. } => "remove-range",
            Self::PutLabel { .. } => "put-label",
            Self::PutService { .. } => "put-service",
            Self::SetIndex { .. } => "set-index",
            Self::FreeBackend { .. } => "free-backend",
            Self::FreeService { .. } => "free-service",
            Self::Announce { .. } => "announce",
        }
    }
}

impl DatapathState {
    /// The state after one action.
    pub fn apply(&mut self, action: &Action) {
        match action {
            Action::Withdraw { prefix } => drop(self.announced.remove(prefix)),
            Action::RemoveIndex { key } => drop(self.index.remove(key)),
            Action::SetBackendState { number, state } => {
                self.backends.change(*number, |slot| slot.state = *state);
            }
            Action::PutBackend { number, entry, fresh } => self.backends.change(*number, |slot| {
                slot.entry = *entry;
                slot.active = if *fresh { 0 } else { slot.active };
            }),
            Action::SetFilter { bits } => self.filter = Arc::new(bits.clone()),
            Action::PutBackendIndex { key, number } => {
                Arc::make_mut(&mut self.backend_index).insert(*key, *number);
            }
            Action::RemoveBackendIndex { key } => {
                Arc::make_mut(&mut self.backend_index).remove(key);
            }
            Action::WriteRegion { first_chunk, region } => drop(self.regions.insert(*first_chunk, Arc::clone(region))),
            Action::PutRange { key, action } => drop(self.ranges.insert(*key, *action)),
            Action::RemoveRange { key } => drop(self.ranges.remove(key)),
            Action::PutLabel { number, label } => {
                self.services.change(*number, |slot| slot.label.clone_from(label));
            }
            Action::PutService { number, entry, fresh } => {
                let before = self.services.change(*number, |slot| {
                    slot.active = if *fresh { 0 } else { slot.active };
                    std::mem::replace(&mut slot.entry, *entry).selection
                });
                if before != entry.selection {
                    self.regions.remove(&before);
                }
            }
            Action::SetIndex { key, number } => drop(self.index.insert(*key, *number)),
            Action::FreeBackend { number } => drop(self.backends.remove(number)),
            Action::FreeService { number } => {
                // A region has one service.
                if let Some(slot) = self.services.remove(number) {
                    self.regions.remove(&slot.entry.selection);
                }
            }
            Action::Announce { prefix, attributes } => drop(self.announced.insert(*prefix, attributes.clone())),
        }
    }

    /// One more than the highest service number in use.
    pub fn services_end(&self) -> u32 {
        self.services.last_key_value().map_or(0, |(number, _)| number.saturating_add(1))
    }

    /// One more than the highest backend number in use.
    pub fn backends_end(&self) -> u32 {
        self.backends.last_key_value().map_or(0, |(number, _)| number.saturating_add(1))
    }

    /// The number of a backend of a service, if it has one.
    pub fn backend_number(&self, service: u32, address: SocketAddr, protocol: Protocol) -> Option<u32> {
        self.backends.iter().find_map(|(number, slot)| {
            let entry = &slot.entry;
            let same = entry.service == service && entry.protocol == protocol.number() && slot.address() == address;
            same.then_some(*number)
        })
    }

    /// What the maps hold for each frontend in the index, for [`crate::desired::Inputs::adopted`].
    pub fn adopted(&self) -> BTreeMap<Frontend, Vec<AdoptedBackend>> {
        let mut by_service: BTreeMap<u32, Vec<AdoptedBackend>> = BTreeMap::new();
        for slot in self.backends.values() {
            by_service.entry(slot.entry.service).or_default().push(AdoptedBackend {
                address: slot.address(),
                weight: weight_of(slot.state),
                share: share_of(slot.state),
                tier: tier_of(slot.state),
                eligible: slot.eligible(),
                snat_address: (!is_none(&slot.entry.snat_address)).then(|| ip(slot.entry.snat_address)),
            });
        }
        let frontends = self.index.iter().filter_map(|(key, number)| Some((frontend_of(key)?, number)));
        frontends.map(|(frontend, number)| (frontend, by_service.remove(number).unwrap_or_default())).collect()
    }

    /// The filter bits that the services and backends in this state need.
    pub fn needed_filter(&self) -> FilterBits {
        needed_filter(&self.services, &self.backends)
    }
}

/// The filter bits that these services and backends need.
pub fn needed_filter(services: &Pages<ServiceSlot>, backends: &Pages<BackendSlot>) -> FilterBits {
    let mut bits = FilterBits::default();
    for slot in services.values() {
        bits.destinations.insert(filter_bit(&slot.entry.address));
        let count = usize::try_from(slot.entry.snat_count).unwrap_or(usize::MAX);
        for address in slot.entry.snat_addresses.iter().take(count) {
            bits.destinations.insert(filter_bit(address));
        }
    }
    for slot in backends.values() {
        if !is_none(&slot.entry.snat_address) {
            bits.destinations.insert(filter_bit(&slot.entry.snat_address));
        }
        if services.get(&slot.entry.service).is_some_and(|service| service.entry.mode == mode::DNAT) {
            bits.sources.insert(filter_bit(&slot.entry.address));
        }
    }
    bits
}

/// Flows by number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowCounts {
    /// By service number.
    pub services: BTreeMap<u32, u64>,
    /// By backend number.
    pub backends: BTreeMap<u32, u64>,
}

/// Numbers of services and of backends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NumberSets {
    /// Of services.
    pub services: BTreeSet<u32>,
    /// Of backends.
    pub backends: BTreeSet<u32>,
}

impl NumberSets {
    /// True where there is none.
    pub fn is_empty(&self) -> bool {
        self.services.is_empty() && self.backends.is_empty()
    }
}

/// A port could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {reason}")]
pub struct PortError {
    /// What was being done.
    pub what: String,
    /// Why it failed.
    pub reason: String,
}

impl PortError {
    /// An error from what was being done and why it failed.
    pub fn new(what: impl Into<String>, reason: impl fmt::Display) -> Self {
        Self { what: what.into(), reason: reason.to_string() }
    }
}

impl From<PortError> for crate::model::query::ViewError {
    fn from(error: PortError) -> Self {
        Self::Internal(error.to_string())
    }
}

/// The datapath's maps.
pub trait DatapathPort: Send {
    /// Reads everything that [`DatapathState`] holds, but for `announced`.
    ///
    /// # Errors
    /// Where a map cannot be read.
    fn snapshot(&mut self) -> Result<DatapathState, PortError>;

    /// Reads how many flows use each of these numbers; 0 may be left out.
    ///
    /// # Errors
    /// Where a map cannot be read.
    fn flow_counts(&mut self, of: &NumberSets) -> Result<FlowCounts, PortError>;

    /// Carries out one action other than `Announce` and `Withdraw`; returns the number of map writes.
    ///
    /// # Errors
    /// Where a map cannot be written. The action may then be half done, and doing it again is safe.
    fn apply(&mut self, action: &Action) -> Result<u64, PortError>;
}

/// BGP, as far as VIPs go.
pub trait AnnouncementPort: Send {
    /// What BGP was told to announce since it started.
    fn announced(&self) -> BTreeMap<IpNet, PathAttributes>;

    /// Announces a VIP, or changes its attributes.
    ///
    /// # Errors
    /// Where BGP no longer listens.
    fn announce(&mut self, prefix: IpNet, attributes: &PathAttributes) -> Result<(), PortError>;

    /// Withdraws a VIP.
    ///
    /// # Errors
    /// Where BGP no longer listens.
    fn withdraw(&mut self, prefix: IpNet) -> Result<(), PortError>;
}

/// The map key of an address, port and protocol.
pub fn service_key(address: SocketAddr, protocol: Protocol) -> ServiceKey {
    ServiceKey { address: wire(address.ip()), port: address.port().to_be(), protocol: protocol.number(), _pad: 0 }
}

/// The frontend behind a map key; `None` where its protocol is not one of ours.
pub fn frontend_of(key: &ServiceKey) -> Option<Frontend> {
    let protocol = Protocol::from_number(key.protocol)?;
    Some(Frontend { address: socket_address(key.address, key.port), protocol })
}

/// An address as maps hold it: network order, IPv4 as v4-mapped.
pub fn wire(address: IpAddr) -> Wide {
    match address {
        IpAddr::V4(address) => mapped(u32::from_ne_bytes(address.octets())),
        IpAddr::V6(address) => {
            let mut wide = Wide::default();
            for (word, bytes) in wide.iter_mut().zip(address.octets().as_chunks::<4>().0) {
                *word = u32::from_ne_bytes(*bytes);
            }
            wide
        }
    }
}

/// An address from a map value in network order.
pub fn ip(wire: Wide) -> IpAddr {
    match unmapped(&wire) {
        Some(address) => IpAddr::V4(Ipv4Addr::from(address.to_ne_bytes())),
        None => {
            let mut octets = [0; 16];
            for (to, from) in octets.iter_mut().zip(wire.iter().flat_map(|word| word.to_ne_bytes())) {
                *to = from;
            }
            IpAddr::V6(Ipv6Addr::from(octets))
        }
    }
}

/// Address and port from map values in network order, of either form.
pub fn socket_address(address: impl Address, port: u16) -> SocketAddr {
    SocketAddr::new(ip(address.wide()), u16::from_be(port))
}

/// True where both addresses are of one family.
pub const fn same_family(a: IpAddr, b: IpAddr) -> bool {
    a.is_ipv4() == b.is_ipv4()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_both_families_read_back_from_their_map_form() {
        for text in ["172.16.1.88", "0.0.0.0", "2001:db8::1", "::", "::1"] {
            let address: IpAddr = text.parse().unwrap();
            assert_eq!(ip(wire(address)), address);
        }
        let IpAddr::V6(address) = "2001:db8::1".parse().unwrap() else { panic!("not IPv6") };
        assert_eq!(wire(address.into())[0].to_ne_bytes(), [0x20, 0x01, 0x0d, 0xb8]);
    }
}
