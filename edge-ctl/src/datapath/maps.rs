//! The reconciler's port to the pinned maps: one action, one or a few map writes.

use aya::maps::{Array, HashMap, LpmTrie, MapData, MapError, PerCpuArray, PerCpuValues, lpm_trie::Key};
use edge_common::{
    filter,
    maps::{
        AddressFilter, BackendEntry, BackendSignals, Chunk, Label, RangeSource, ServiceEntry, ServiceKey, ServiceStats,
        SourceRange, name,
    },
    verdict::REASONS,
};

use super::{
    pins::{Pins, chain, open},
    selection,
    tables::{Tables, label_bytes},
};
use crate::reconcile::ports::{Action, DatapathPort, DatapathState, FilterBits, FlowCounts, NumberSets, PortError};

/// The maps that the reconciler writes. One owner: nothing else writes them.
pub struct Maps {
    tables: Tables,
    index: HashMap<MapData, ServiceKey, u32>,
    services: Array<MapData, ServiceEntry>,
    labels: Array<MapData, Label>,
    backends: Array<MapData, BackendEntry>,
    states: Array<MapData, u32>,
    backend_index: HashMap<MapData, ServiceKey, u32>,
    selection: Array<MapData, Chunk>,
    ranges: LpmTrie<MapData, RangeSource, SourceRange>,
    filter: Array<MapData, AddressFilter>,
    service_stats: PerCpuArray<MapData, ServiceStats>,
    backend_stats: PerCpuArray<MapData, ServiceStats>,
    backend_signals: PerCpuArray<MapData, BackendSignals>,
    reasons: PerCpuArray<MapData, u64>,
    service_expired: Array<MapData, u64>,
    backend_expired: Array<MapData, u64>,
    backend_live: Array<MapData, u32>,
}

impl Maps {
    /// Opens the pins.
    ///
    /// # Errors
    /// Where one is missing or has another layout.
    pub fn open(pins: &Pins) -> Result<Self, PortError> {
        Ok(Self {
            tables: Tables::open(pins)?,
            index: open(pins, name::SERVICE_INDEX)?,
            services: open(pins, name::SERVICES)?,
            labels: open(pins, name::SERVICE_LABELS)?,
            backends: open(pins, name::BACKENDS)?,
            states: open(pins, name::BACKEND_STATE)?,
            backend_index: open(pins, name::BACKEND_INDEX)?,
            selection: open(pins, name::SELECTION)?,
            ranges: open(pins, name::SOURCE_RANGES)?,
            filter: open(pins, name::ADDRESS_FILTER)?,
            service_stats: open(pins, name::SERVICE_STATS)?,
            backend_stats: open(pins, name::BACKEND_STATS)?,
            backend_signals: open(pins, name::BACKEND_SIGNALS)?,
            reasons: open(pins, name::REASONS)?,
            service_expired: open(pins, name::SERVICE_EXPIRED)?,
            backend_expired: open(pins, name::BACKEND_EXPIRED)?,
            backend_live: open(pins, name::BACKEND_LIVE)?,
        })
    }

    fn write(&mut self, action: &Action) -> Result<u64, MapError> {
        match action {
            Action::RemoveIndex { key } => absent_is_fine(self.index.remove(key)),
            Action::SetIndex { key, number } => self.index.insert(key, number, 0).map(|()| 1),
            Action::SetBackendState { number, state } => self.states.set(*number, state, 0).map(|()| 1),
            Action::PutBackend { number, entry, fresh } => {
                let cleared = if *fresh { self.clear_backend_counters(*number)? } else { 0 };
                self.backends.set(*number, entry, 0)?;
                Ok(cleared + 1)
            }
            Action::FreeBackend { number } => {
                self.states.set(*number, 0, 0)?;
                self.backends.set(*number, BackendEntry::default(), 0)?;
                Ok(2)
            }
            Action::SetFilter { bits } => self.filter.set(0, filter_value(bits), 0).map(|()| 1),
            Action::PutBackendIndex { key, number } => self.backend_index.insert(key, number, 0).map(|()| 1),
            Action::RemoveBackendIndex { key } => absent_is_fine(self.backend_index.remove(key)),
            Action::WriteRegion { first_chunk, region } => {
                let chunks = selection::encode(*first_chunk, region);
                for (number, chunk) in &chunks {
                    self.selection.set(*number, chunk, 0)?;
                }
                Ok(chunks.len() as u64)
            }
            Action::PutRange { key, action } => {
                let range = SourceRange { action: *action, ..SourceRange::default() };
                self.ranges.insert(&Key::new(key.prefix_len, key.source), range, 0).map(|()| 1)
            }
            Action::RemoveRange { key } => absent_is_fine(self.ranges.remove(&Key::new(key.prefix_len, key.source))),
            Action::PutLabel { number, label } => self.labels.set(*number, Label(label_bytes(label)), 0).map(|()| 1),
            Action::PutService { number, entry, fresh } => {
                let cleared = if *fresh { self.clear_service_counters(*number)? } else { 0 };
                self.services.set(*number, entry, 0)?;
                Ok(cleared + 1)
            }
            Action::FreeService { number } => self.services.set(*number, ServiceEntry::default(), 0).map(|()| 1),
            Action::Announce { .. } | Action::Withdraw { .. } => Ok(0),
        }
    }

    /// Counters of a number that is given out anew start from zero. Returns the writes, none where they are zero.
    fn clear_backend_counters(&mut self, number: u32) -> Result<u64, MapError> {
        let cleared = clear(&mut self.backend_stats, number)? + clear(&mut self.backend_signals, number)?;
        let live = clear_one(&mut self.backend_live, number)?;
        Ok(cleared + live + clear_one(&mut self.backend_expired, number)?)
    }

    fn clear_service_counters(&mut self, number: u32) -> Result<u64, MapError> {
        let mut cleared = clear(&mut self.service_stats, number)?;
        cleared += clear_one(&mut self.service_expired, number)?;
        for reason in 0..REASONS {
            cleared += clear(&mut self.reasons, number.saturating_mul(REASONS).saturating_add(reason))?;
        }
        Ok(cleared)
    }
}

impl DatapathPort for Maps {
    fn snapshot(&mut self) -> Result<DatapathState, PortError> {
        self.tables.state()
    }

    fn flow_counts(&mut self, of: &NumberSets) -> Result<FlowCounts, PortError> {
        self.tables.flow_counts_of(of)
    }

    fn apply(&mut self, action: &Action) -> Result<u64, PortError> {
        self.write(action).map_err(|error| PortError::new(format!("map write `{}`", action.kind()), chain(&error)))
    }
}

fn absent_is_fine(removed: Result<(), MapError>) -> Result<u64, MapError> {
    match removed {
        Ok(()) => Ok(1),
        Err(MapError::KeyNotFound) => Ok(0),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == std::io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error),
    }
}

fn clear<V: aya::Pod + Default + PartialEq>(map: &mut PerCpuArray<MapData, V>, number: u32) -> Result<u64, MapError> {
    let values = map.get(&number, 0)?;
    if values.iter().all(|value| *value == V::default()) {
        return Ok(0);
    }
    let zeros: Vec<V> = values.iter().map(|_| V::default()).collect();
    map.set(number, PerCpuValues::try_from(zeros).map_err(MapError::IoError)?, 0)?;
    Ok(1)
}

fn clear_one<V: aya::Pod + Default + PartialEq>(map: &mut Array<MapData, V>, number: u32) -> Result<u64, MapError> {
    if map.get(&number, 0)? == V::default() {
        return Ok(0);
    }
    map.set(number, V::default(), 0)?;
    Ok(1)
}

/// The map value of a set of filter bits.
pub fn filter_value(bits: &FilterBits) -> AddressFilter {
    let mut value = AddressFilter { destinations: [0; filter::WORDS], sources: [0; filter::WORDS] };
    for (set, words) in [(&bits.destinations, &mut value.destinations), (&bits.sources, &mut value.sources)] {
        for bit in set {
            if let Some(word) = words.get_mut((bit / 64) as usize) {
                *word |= 1 << (bit % 64);
            }
        }
    }
    value
}
