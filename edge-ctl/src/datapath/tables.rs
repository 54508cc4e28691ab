//! The pinned maps, read and decoded. Shared by the reconciler's port, the sweep and every view, so that all of them mean
//! the same by a number.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    ops::Range,
    sync::Arc,
};

use edge_common::{
    filter,
    maps::{
        BackendEntry, BackendSignals, Chunk, Control, Label, PortSet, ServiceEntry, ServiceStats, SourceKey,
        SourceRange, name,
    },
    verdict::REASONS,
};

use super::{
    pins::{Pins, Reader},
    selection,
    sys::{Cursor, from_bytes, to_bytes},
};
use crate::reconcile::ports::{
    BackendSlot, Capacity, DatapathState, FilterBits, FlowCounts, NumberSets, PortError, Region, ServiceSlot,
    socket_address,
};

/// Chunks of the selection map read in one call: most regions whole.
const CHUNKS_AHEAD: usize = 40;

/// Every map, open for reading.
#[derive(Debug)]
pub struct Tables {
    readers: BTreeMap<&'static str, Reader>,
}

impl Tables {
    /// Opens the pins.
    ///
    /// # Errors
    /// Where one is missing: no daemon of this version has run here.
    pub fn open(pins: &Pins) -> Result<Self, PortError> {
        let mut readers = BTreeMap::new();
        for map in pins.layouts().keys() {
            readers.insert(*map, Reader::open(pins, map)?);
        }
        Ok(Self { readers })
    }

    /// One map.
    ///
    /// # Errors
    /// Where there is no map of that name.
    pub fn reader(&self, map: &str) -> Result<&Reader, PortError> {
        self.readers.get(map).ok_or_else(|| {
            let names: Vec<_> = self.readers.keys().copied().collect();
            PortError::new(format!("map `{map}`"), format!("no such map; there are {}", names.join(", ")))
        })
    }

    /// Everything the reconciler knows, but for announcements.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn state(&self) -> Result<DatapathState, PortError> {
        let mut state = self.numbered()?;
        state.filter = self.filter()?.into();
        state.ranges = self.ranges()?.into_iter().map(|(key, range)| (key, range.action)).collect();
        state.backend_index = Arc::new(self.hash(name::BACKEND_INDEX)?);
        for slot in state.services.values().filter(|slot| slot.entry.selection != 0) {
            if let Some(region) = self.region(slot.entry.selection)? {
                state.regions.insert(slot.entry.selection, region.into());
            }
        }
        Ok(state)
    }

    /// As [`Tables::state`], but only what the index leads to, what has a number, and sizes.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn numbered(&self) -> Result<DatapathState, PortError> {
        let counts = self.flow_counts()?;
        let labels = self.labels()?;
        let mut states = self.array::<u32>(name::BACKEND_STATE)?;
        states.retain(|_, word| *word != 0);
        let mut state = DatapathState { index: self.hash(name::SERVICE_INDEX)?, ..DatapathState::default() };
        let active = |counts: &BTreeMap<u32, u64>, number: &u32| counts.get(number).copied().unwrap_or(0);
        for (number, entry) in self.services()? {
            let label = labels.get(&number).cloned().unwrap_or_default();
            state.services.insert(number, ServiceSlot { entry, label, active: active(&counts.services, &number) });
        }
        for (number, entry) in self.backends()? {
            let word = states.get(&number).copied().unwrap_or(0);
            state
                .backends
                .insert(number, BackendSlot { entry, state: word, active: active(&counts.backends, &number) });
        }
        state.capacity = Capacity {
            services: self.capacity(name::SERVICES)?,
            backends: self.capacity(name::BACKENDS)?,
            chunks: self.capacity(name::SELECTION)?,
            ranges: self.capacity(name::SOURCE_RANGES)?,
        };
        Ok(state)
    }

    /// Services by number, those that only drain included.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn services(&self) -> Result<BTreeMap<u32, ServiceEntry>, PortError> {
        let mut services = self.array::<ServiceEntry>(name::SERVICES)?;
        services.retain(|_, entry| entry.protocol != 0);
        Ok(services)
    }

    /// Backends by number, those that only drain included.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn backends(&self) -> Result<BTreeMap<u32, BackendEntry>, PortError> {
        let mut backends = self.array::<BackendEntry>(name::BACKENDS)?;
        backends.retain(|_, entry| entry.protocol != 0);
        Ok(backends)
    }

    /// Ports that SNAT may use on the host's addresses.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn snat_ports(&self) -> Result<PortSet, PortError> {
        let bytes = self.reader(name::SNAT_PORTS)?.get(&0_u32.to_ne_bytes())?;
        Ok(bytes.and_then(|bytes| from_bytes(&bytes)).unwrap_or(PortSet([0; 1024])))
    }

    /// Source ranges with their counters.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn ranges(&self) -> Result<BTreeMap<SourceKey, SourceRange>, PortError> {
        self.hash(name::SOURCE_RANGES)
    }

    /// The control element.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn control(&self) -> Result<Control, PortError> {
        let bytes = self.reader(name::CONTROL)?.get(&0_u32.to_ne_bytes())?;
        Ok(bytes.and_then(|bytes| from_bytes(&bytes)).unwrap_or_default())
    }

    /// One more than the highest service number and than the highest backend number in use. Numbers are given out from
    /// the lowest free one on, so that reading counters up to here is far less than reading a value for each CPU and
    /// each number that could be in use.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn numbers(&self) -> Result<(u32, u32), PortError> {
        let end = |last: Option<u32>| last.map_or(0, |last| last.saturating_add(1));
        let (mut services, mut backends) = (None, None);
        self.reader(name::SERVICES)?.for_each(|key, value| {
            if from_bytes::<ServiceEntry>(value).is_some_and(|entry| entry.protocol != 0) {
                services = services.max(from_bytes(key));
            }
        })?;
        self.reader(name::BACKENDS)?.for_each(|key, value| {
            if from_bytes::<BackendEntry>(value).is_some_and(|entry| entry.protocol != 0) {
                backends = backends.max(from_bytes(key));
            }
        })?;
        Ok((end(services), end(backends)))
    }

    /// Counters of the services with a number below `end` that have any, by number, summed over CPUs.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn service_stats(&self, end: u32) -> Result<BTreeMap<u32, ServiceStats>, PortError> {
        self.stats(name::SERVICE_STATS, end)
    }

    /// As [`Tables::service_stats`], of backends.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn backend_stats(&self, end: u32) -> Result<BTreeMap<u32, ServiceStats>, PortError> {
        self.stats(name::BACKEND_STATS, end)
    }

    /// As [`Tables::backend_stats`], of the numbers in this range.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn backend_stats_in(&self, range: &Range<u32>) -> Result<BTreeMap<u32, ServiceStats>, PortError> {
        self.stats_in(name::BACKEND_STATS, range)
    }

    /// Signals of the backends with a number below `end`, by number, summed over CPUs.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn backend_signals(&self, end: u32) -> Result<BTreeMap<u32, BackendSignals>, PortError> {
        let reader = self.reader(name::BACKEND_SIGNALS)?;
        let mut all = BTreeMap::new();
        reader.for_first(length(end), |key, value| {
            let Some(number) = from_bytes::<u32>(key) else { return };
            let each = per_cpu::<BackendSignals>(value, reader.cpus);
            all.insert(number, each.fold(BackendSignals::default(), BackendSignals::plus));
        })?;
        Ok(all)
    }

    /// Packets by service number and reason number, non-zero ones, of services with a number below `end`. Number 0 counts
    /// what belongs to no service.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn reasons(&self, end: u32) -> Result<BTreeMap<(u32, u32), u64>, PortError> {
        let reader = self.reader(name::REASONS)?;
        let mut reasons = BTreeMap::new();
        reader.for_first(length(end.max(1).saturating_mul(REASONS)), |key, value| {
            let Some(slot) = from_bytes::<u32>(key) else { return };
            let sum = per_cpu::<u64>(value, reader.cpus).fold(0_u64, u64::wrapping_add);
            if sum != 0 {
                reasons.insert((slot / REASONS, slot % REASONS), sum);
            }
        })?;
        Ok(reasons)
    }

    /// Established flows by service and backend number: opened less closed less expired.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn flow_counts(&self) -> Result<FlowCounts, PortError> {
        let active = |stats: BTreeMap<u32, ServiceStats>, expired: BTreeMap<u32, u64>| {
            let of = |number: &u32, stats| active(stats, expired.get(number).copied().unwrap_or(0));
            stats.iter().map(|(number, stats)| (*number, of(number, stats))).collect()
        };
        let (services, backends) = self.numbers()?;
        Ok(FlowCounts {
            services: active(self.service_stats(services)?, self.first(name::SERVICE_EXPIRED, services)?),
            backends: active(self.backend_stats(backends)?, self.first(name::BACKEND_EXPIRED, backends)?),
        })
    }

    /// As [`Tables::flow_counts`], of these numbers alone.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn flow_counts_of(&self, of: &NumberSets) -> Result<FlowCounts, PortError> {
        let read = |numbers: &BTreeSet<u32>, stats: &str, expired: &str| -> Result<BTreeMap<u32, u64>, PortError> {
            let one = |number: &u32| {
                let gone = self.lookup::<u32, u64>(expired, number)?.unwrap_or(0);
                Ok((*number, active(&self.stats_of(stats, *number)?, gone)))
            };
            numbers.iter().map(one).collect()
        };
        Ok(FlowCounts {
            services: read(&of.services, name::SERVICE_STATS, name::SERVICE_EXPIRED)?,
            backends: read(&of.backends, name::BACKEND_STATS, name::BACKEND_EXPIRED)?,
        })
    }

    /// The counters of one number, summed over CPUs.
    fn stats_of(&self, map: &str, number: u32) -> Result<ServiceStats, PortError> {
        let reader = self.reader(map)?;
        let bytes = reader.get(&number.to_ne_bytes())?.unwrap_or_default();
        Ok(per_cpu::<ServiceStats>(&bytes, reader.cpus).fold(ServiceStats::default(), add))
    }

    /// One backend as the reconciler knows it; `None` where the number is free.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn backend(&self, number: u32) -> Result<Option<BackendSlot>, PortError> {
        let entry = self.lookup::<u32, BackendEntry>(name::BACKENDS, &number)?;
        let Some(entry) = entry.filter(|entry| entry.protocol != 0) else { return Ok(None) };
        let state = self.lookup::<u32, u32>(name::BACKEND_STATE, &number)?.unwrap_or(0);
        let counts = self.flow_counts_of(&NumberSets { backends: [number].into(), ..NumberSets::default() })?;
        Ok(Some(BackendSlot { entry, state, active: counts.backends.get(&number).copied().unwrap_or(0) }))
    }

    /// The numbers of a service's backend, one for each of its listen addresses.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn backend_numbers(&self, service: &str, backend: SocketAddr) -> Result<BTreeSet<u32>, PortError> {
        let labels = self.labels()?;
        let mut numbers = BTreeSet::new();
        self.reader(name::BACKENDS)?.for_each(|key, value| {
            let (Some(number), Some(entry)) = (from_bytes::<u32>(key), from_bytes::<BackendEntry>(value)) else {
                return;
            };
            let is_it = entry.protocol != 0 && socket_address(entry.address, entry.port) == backend;
            if is_it && labels.get(&entry.service).is_some_and(|label| label == service) {
                numbers.insert(number);
            }
        })?;
        Ok(numbers)
    }

    /// One service as the reconciler knows it, but for its flows; `None` where the number is free.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn service(&self, number: u32) -> Result<Option<(ServiceEntry, String)>, PortError> {
        let entry = self.lookup::<u32, ServiceEntry>(name::SERVICES, &number)?;
        let Some(entry) = entry.filter(|entry| entry.protocol != 0) else { return Ok(None) };
        let label = self.lookup::<u32, Label>(name::SERVICE_LABELS, &number)?;
        Ok(Some((entry, label.map(|label| label_text(&label.0)).unwrap_or_default())))
    }

    /// Counters and signals of one backend, summed over CPUs.
    ///
    /// # Errors
    /// Where a map cannot be read.
    pub fn backend_counters(&self, number: u32) -> Result<(ServiceStats, BackendSignals), PortError> {
        let reader = self.reader(name::BACKEND_SIGNALS)?;
        let bytes = reader.get(&number.to_ne_bytes())?.unwrap_or_default();
        let signals =
            per_cpu::<BackendSignals>(&bytes, reader.cpus).fold(BackendSignals::default(), BackendSignals::plus);
        Ok((self.stats_of(name::BACKEND_STATS, number)?, signals))
    }

    /// Counts a map's entries page by page.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn count(&self, map: &str) -> Result<u64, PortError> {
        let reader = self.reader(map)?;
        let (mut cursor, mut entries) = (Cursor::default(), 0_u64);
        while !cursor.is_finished() {
            let page = reader.page(&mut cursor, 4096)?;
            entries += (page.keys.len() / reader.shape.key.max(1)) as u64;
        }
        Ok(entries)
    }

    fn stats(&self, map: &str, end: u32) -> Result<BTreeMap<u32, ServiceStats>, PortError> {
        self.stats_in(map, &(0..end))
    }

    fn stats_in(&self, map: &str, range: &Range<u32>) -> Result<BTreeMap<u32, ServiceStats>, PortError> {
        let reader = self.reader(map)?;
        let mut all = BTreeMap::new();
        reader.for_range(range.start, range.len(), |key, value| {
            let Some(number) = from_bytes::<u32>(key) else { return };
            let sum = per_cpu::<ServiceStats>(value, reader.cpus).fold(ServiceStats::default(), add);
            if sum != ServiceStats::default() {
                all.insert(number, sum);
            }
        })?;
        Ok(all)
    }

    fn capacity(&self, map: &str) -> Result<u32, PortError> {
        let info = self.reader(map)?.data().info();
        Ok(info.map_err(|error| PortError::new(format!("map {map}"), error))?.max_entries())
    }

    fn array<V: aya::Pod>(&self, map: &str) -> Result<BTreeMap<u32, V>, PortError> {
        self.hash(map)
    }

    /// The elements of an array below `end`.
    fn first<V: aya::Pod>(&self, map: &str, end: u32) -> Result<BTreeMap<u32, V>, PortError> {
        self.elements(map, length(end))
    }

    fn hash<K: aya::Pod + Ord, V: aya::Pod>(&self, map: &str) -> Result<BTreeMap<K, V>, PortError> {
        self.elements(map, usize::MAX)
    }

    fn elements<K: aya::Pod + Ord, V: aya::Pod>(&self, map: &str, count: usize) -> Result<BTreeMap<K, V>, PortError> {
        let mut all = BTreeMap::new();
        self.reader(map)?.for_first(count, |key, value| {
            if let (Some(key), Some(value)) = (from_bytes(key), from_bytes(value)) {
                all.insert(key, value);
            }
        })?;
        Ok(all)
    }

    /// The operator's names of services, by number.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn labels(&self) -> Result<BTreeMap<u32, String>, PortError> {
        let labels = self.array::<[u8; 64]>(name::SERVICE_LABELS)?;
        Ok(labels.into_iter().map(|(number, bytes)| (number, label_text(&bytes))).collect())
    }

    fn filter(&self) -> Result<FilterBits, PortError> {
        let bytes = self.reader(name::ADDRESS_FILTER)?.get(&0_u32.to_ne_bytes())?.unwrap_or_default();
        let words: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect();
        let bits = |words: &[u64]| {
            let set = (0_u32..).zip(words).flat_map(|(index, word)| {
                (0..64).filter(move |bit| word & (1 << bit) != 0).map(move |bit| index * 64 + bit)
            });
            set.collect()
        };
        let (destinations, sources) = words.split_at(words.len().min(filter::WORDS));
        Ok(FilterBits { destinations: bits(destinations), sources: bits(sources) })
    }

    fn region(&self, first_chunk: u32) -> Result<Option<Region>, PortError> {
        let reader = self.reader(name::SELECTION)?;
        let (mut failure, mut ahead) = (None, BTreeMap::new());
        let region = selection::decode(first_chunk, |number| {
            if !ahead.contains_key(&number) {
                // A region's chunks follow each other.
                ahead.clear();
                let read = reader.for_range(number, CHUNKS_AHEAD, |key, value| {
                    if let (Some(key), Some(chunk)) = (from_bytes::<u32>(key), from_bytes::<Chunk>(value)) {
                        ahead.insert(key, chunk);
                    }
                });
                failure = failure.take().or(read.err());
            }
            ahead.get(&number).copied()
        });
        failure.map_or(Ok(region), Err)
    }

    /// The value of one key of a hash, for point lookups.
    ///
    /// # Errors
    /// Where the map cannot be read.
    pub fn lookup<K: aya::Pod, V: aya::Pod>(&self, map: &str, key: &K) -> Result<Option<V>, PortError> {
        Ok(self.reader(map)?.get(&to_bytes(key))?.and_then(|bytes| from_bytes(&bytes)))
    }
}

/// Flows that are open: opened less closed less expired.
fn active(stats: &ServiceStats, expired: u64) -> u64 {
    stats.opened.saturating_sub(stats.closed.saturating_add(expired))
}

fn length(end: u32) -> usize {
    usize::try_from(end).unwrap_or(usize::MAX)
}

/// The values of all CPUs in a per-CPU map's element.
pub fn per_cpu<V: aya::Pod>(value: &[u8], cpus: usize) -> impl Iterator<Item = V> {
    let each = value.len() / cpus.max(1);
    value.chunks_exact(each.max(1)).filter_map(from_bytes)
}

fn add(a: ServiceStats, b: ServiceStats) -> ServiceStats {
    ServiceStats {
        packets_in: a.packets_in.wrapping_add(b.packets_in),
        bytes_in: a.bytes_in.wrapping_add(b.bytes_in),
        packets_out: a.packets_out.wrapping_add(b.packets_out),
        bytes_out: a.bytes_out.wrapping_add(b.bytes_out),
        half_opened: a.half_opened.wrapping_add(b.half_opened),
        opened: a.opened.wrapping_add(b.opened),
        closed: a.closed.wrapping_add(b.closed),
    }
}

/// The text of a zero-padded label.
pub fn label_text(bytes: &[u8; 64]) -> String {
    let length = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..length).unwrap_or_default()).into_owned()
}

/// A text as a label: cut at 64 bytes, between characters.
pub fn label_bytes(text: &str) -> [u8; 64] {
    let mut bytes = [0; 64];
    let mut end = text.len().min(64);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    for (to, from) in bytes.iter_mut().zip(text.as_bytes().iter().take(end)) {
        *to = *from;
    }
    bytes
}
