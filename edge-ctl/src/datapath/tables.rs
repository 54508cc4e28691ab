//! The pinned maps, read and decoded. Shared by the reconciler's port, the sweep and every view, so that all of them mean
//! the same by a number.

use std::collections::BTreeMap;

use edge_common::{
    filter,
    maps::{
        BackendEntry, BackendSignals, Chunk, Control, PortSet, ServiceEntry, ServiceStats, SourceKey, SourceRange, name,
    },
    verdict::REASONS,
};

use super::{
    pins::{Pins, Reader},
    selection,
    sys::{Cursor, from_bytes, to_bytes},
};
use crate::reconcile::ports::{
    BackendSlot, Capacity, DatapathState, FilterBits, FlowCounts, PortError, Region, ServiceSlot,
};

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
        let counts = self.flow_counts()?;
        let labels = self.labels()?;
        let states = self.array::<u32>(name::BACKEND_STATE)?;
        let mut state = DatapathState { filter: self.filter()?, ..DatapathState::default() };
        for (number, entry) in self.array::<ServiceEntry>(name::SERVICES)? {
            if entry.protocol != 0 {
                let label = labels.get(&number).cloned().unwrap_or_default();
                let active = counts.services.get(&number).copied().unwrap_or(0);
                state.services.insert(number, ServiceSlot { entry, label, active });
            }
        }
        for (number, entry) in self.array::<BackendEntry>(name::BACKENDS)? {
            if entry.protocol != 0 {
                let active = counts.backends.get(&number).copied().unwrap_or(0);
                let word = states.get(&number).copied().unwrap_or(0);
                state.backends.insert(number, BackendSlot { entry, state: word, active });
            }
        }
        state.index = self.hash(name::SERVICE_INDEX)?;
        state.ranges = self.ranges()?.into_iter().map(|(key, range)| (key, range.action)).collect();
        state.backend_index = self.hash(name::BACKEND_INDEX)?;
        for slot in state.services.values().filter(|slot| slot.entry.selection != 0) {
            if let Some(region) = self.region(slot.entry.selection)? {
                state.regions.insert(slot.entry.selection, region.into());
            }
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
            let active = |number: &u32, stats: &ServiceStats| {
                let gone = stats.closed.saturating_add(expired.get(number).copied().unwrap_or(0));
                stats.opened.saturating_sub(gone)
            };
            stats.iter().map(|(number, stats)| (*number, active(number, stats))).collect()
        };
        let (services, backends) = self.numbers()?;
        Ok(FlowCounts {
            services: active(self.service_stats(services)?, self.first(name::SERVICE_EXPIRED, services)?),
            backends: active(self.backend_stats(backends)?, self.first(name::BACKEND_EXPIRED, backends)?),
        })
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
        let reader = self.reader(map)?;
        let mut all = BTreeMap::new();
        reader.for_first(length(end), |key, value| {
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
        let mut failure = None;
        let region = selection::decode(first_chunk, |number| match reader.get(&number.to_ne_bytes()) {
            Ok(bytes) => bytes.and_then(|bytes| from_bytes::<Chunk>(&bytes)),
            Err(error) => {
                failure = Some(error);
                None
            }
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
