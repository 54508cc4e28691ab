//! What the maps will cost, before they are made: the kernel's own arithmetic (kernel/bpf/{hashtab,arraymap}.c) over the
//! layouts of `edge_common::maps`.

use edge_common::{
    address::Wide,
    flow::{FlowKeyV4, FlowKeyV6},
    maps::{self, name},
};

use super::valid::Tables;

/// `struct htab_elem` without key and value, bytes (64-bit kernels 5.15 to 6.18).
const HASH_ELEMENT: u64 = 48;
/// `struct bucket`, bytes.
const BUCKET: u64 = 16;

/// One map's share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapMemory {
    /// Map name.
    pub name: &'static str,
    /// Capacity.
    pub entries: u32,
    /// Kernel memory, bytes.
    pub bytes: u64,
}

/// Every map's share on a machine with `cpus` possible CPUs, in the order of `maps::name::ALL`.
pub fn estimate(tables: &Tables, cpus: u32) -> Vec<MapMemory> {
    name::ALL
        .iter()
        .chain([&name::EVENTS])
        .map(|name| {
            let (entries, bytes) = one(name, tables, cpus);
            MapMemory { name, entries, bytes }
        })
        .collect()
}

fn one(name: &str, tables: &Tables, cpus: u32) -> (u32, u64) {
    let flow = |entries| (entries, hash::<FlowKeyV4, maps::FlowV4>(entries, cpus));
    let flow_v6 = |entries| (entries, hash::<FlowKeyV6, maps::FlowV6>(entries, cpus));
    match name {
        name::ESTABLISHED => flow(tables.established),
        name::HALF_OPEN => flow(tables.half_open),
        name::CLOSING => flow(tables.closing),
        name::ESTABLISHED_V6 => flow_v6(tables.established_v6),
        name::HALF_OPEN_V6 => flow_v6(tables.half_open_v6),
        name::CLOSING_V6 => flow_v6(tables.closing_v6),
        name::SERVICE_INDEX => (maps::SERVICES, hash::<maps::ServiceKey, u32>(maps::SERVICES, cpus)),
        name::BACKEND_INDEX => (tables.backends, hash::<maps::ServiceKey, u32>(tables.backends, cpus)),
        name::NEXT_HOP_INDEX => (maps::NEXT_HOPS, hash::<maps::NeighbourKey, u32>(maps::NEXT_HOPS, cpus)),
        name::INTERFACES => (maps::INTERFACES, hash::<u32, u32>(maps::INTERFACES, cpus)),
        name::VLANS => (maps::VLANS, hash::<maps::Port, maps::Port>(maps::VLANS, cpus)),
        name::SERVICES => (maps::SERVICES, array::<maps::ServiceEntry>(maps::SERVICES)),
        name::SERVICE_LABELS => (maps::SERVICES, array::<maps::Label>(maps::SERVICES)),
        name::BACKENDS => (tables.backends, array::<maps::BackendEntry>(tables.backends)),
        name::BACKEND_STATE | name::BACKEND_CURSOR | name::BACKEND_LIVE => {
            (tables.backends, array::<u32>(tables.backends))
        }
        name::BACKEND_PENDING => (tables.backends, array::<maps::Pending>(tables.backends)),
        name::BACKEND_EXPIRED => (tables.backends, array::<u64>(tables.backends)),
        name::SERVICE_CURSOR => (maps::SERVICES, array::<u32>(maps::SERVICES)),
        name::SELECTION_MET_FULL => (1, per_cpu::<u32>(1, cpus)),
        name::AFFINITY => {
            let entries = maps::AFFINITY_ENTRIES;
            (entries, hash::<maps::AffinityKey, maps::AffinityEntry>(entries, cpus))
        }
        name::SELECTION => (tables.selection, array::<maps::Chunk>(tables.selection)),
        name::NEXT_HOPS => (maps::NEXT_HOPS, array::<maps::NextHop>(maps::NEXT_HOPS)),
        name::NEXT_HOP_CURSOR | name::NOTICES => (1, array::<u32>(1)),
        name::OWN_ADDRESSES => (maps::INTERFACES, hash::<u32, maps::OwnAddresses>(maps::INTERFACES, cpus)),
        name::FRAGMENTS => {
            (maps::FRAGMENT_ENTRIES, hash::<maps::FragmentKey, maps::Fragment>(maps::FRAGMENT_ENTRIES, cpus))
        }
        name::FRAGMENT_IDS => (maps::FRAGMENT_COUNTERS, array::<u32>(maps::FRAGMENT_COUNTERS)),
        name::FLOW_CACHE | name::FLOW_CACHE_V6 => cache(name, tables),
        name::CACHE_WINDOWS => (maps::CACHE_CPUS, array::<maps::CacheWindow>(maps::CACHE_CPUS)),
        name::FLOW_GENERATIONS => (1, array::<maps::Generations>(1)),
        name::ASSUMED_FLOW => (1, per_cpu::<maps::FlowV4>(1, cpus)),
        name::ANSWERS_FROM => (1, 8),
        name::RESET_PACE | name::PROMOTION_PACE => (1, per_cpu::<u64>(1, cpus)),
        name::ASSUMED_FLOW_V6 => (1, per_cpu::<maps::FlowV6>(1, cpus)),
        name::ICMP_PACE => (1, per_cpu::<u64>(1, cpus)),
        name::ADDRESS_FILTER => (1, array::<maps::AddressFilter>(1)),
        name::SNAT_PORTS => (1, array::<maps::PortSet>(1)),
        name::CONTROL => (1, array::<maps::Control>(1)),
        name::SERVICE_STATS => (maps::SERVICES, per_cpu::<maps::ServiceStats>(maps::SERVICES, cpus)),
        name::BACKEND_STATS => (tables.backends, per_cpu::<maps::BackendStats>(tables.backends, cpus)),
        name::REASONS => (maps::REASON_SLOTS, per_cpu::<u64>(maps::REASON_SLOTS, cpus)),
        name::SOURCE_RANGES => (maps::SOURCE_RANGES, trie::<maps::RangeSource, maps::SourceRange>(maps::SOURCE_RANGES)),
        name::SOURCES => (maps::SOURCES, hash::<maps::SourceId, maps::SourceUse>(maps::SOURCES, cpus)),
        name::BACKEND_SIGNALS => (tables.backends, per_cpu::<maps::BackendSignals>(tables.backends, cpus)),
        name::EVENTS_LOST => (1, per_cpu::<u64>(1, cpus)),
        // Entries are bytes here; the kernel adds three pages of its own (kernel/bpf/ringbuf.c).
        name::EVENTS => (maps::events::EVENTS_BYTES, u64::from(maps::events::EVENTS_BYTES) + 3 * 4096),
        _ => (0, 0),
    }
}

/// A preallocated hash: one spare element for each CPU, and a power of two of buckets.
fn hash<K, V>(entries: u32, cpus: u32) -> u64 {
    let element = HASH_ELEMENT + round8(size_of::<K>()) + round8(size_of::<V>());
    let buckets = u64::from(entries).next_power_of_two();
    (u64::from(entries) + u64::from(cpus)) * element + buckets * BUCKET
}

/// Sets of a cache, whole pages of them.
fn cache(name: &str, tables: &Tables) -> (u32, u64) {
    let [v4, v6] = tables.cache_sets();
    let (sets, set) = if name == maps::name::FLOW_CACHE {
        (v4, size_of::<maps::CacheSet<u32>>())
    } else {
        (v6, size_of::<maps::CacheSet<Wide>>())
    };
    (sets.max(1), (u64::from(sets.max(1)) * set as u64).next_multiple_of(4096))
}

/// A trie at its fullest, `struct lpm_trie_node`: not preallocated, and as many branches as entries.
fn trie<K, V>(entries: u32) -> u64 {
    const NODE: u64 = 40;
    let key = NODE + size_of::<K>() as u64;
    u64::from(entries) * (round_slab(key + size_of::<V>() as u64) + round_slab(key))
}

/// The allocator's sizes between 32 and 192 bytes.
fn round_slab(bytes: u64) -> u64 {
    bytes.next_multiple_of(32)
}

fn array<V>(entries: u32) -> u64 {
    u64::from(entries) * round8(size_of::<V>())
}

fn per_cpu<V>(entries: u32, cpus: u32) -> u64 {
    let pointer = 8;
    u64::from(entries) * (round8(size_of::<V>()) * u64::from(cpus) + pointer)
}

fn round8(bytes: usize) -> u64 {
    (bytes as u64).next_multiple_of(8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_map_has_a_share() {
        for map in estimate(&Tables::default(), 2) {
            assert!(map.bytes > 0 && map.entries > 0, "{} is not in the estimate", map.name);
        }
    }

    #[test]
    fn an_established_entry_costs_about_what_the_design_says() {
        let shares = estimate(&Tables::default(), 2);
        for (name, expected) in [(name::ESTABLISHED, 160..=200), (name::ESTABLISHED_V6, 220..=260)] {
            let map = shares.iter().find(|map| map.name == name).unwrap();
            let each = map.bytes / u64::from(map.entries);
            assert!(expected.contains(&each), "{name}: {each}");
        }
    }
}
