//! A stateful stand-in for the maps: it stores what the kernel would, chunk by chunk, counts writes, and can fail at any
//! of them. For tests of everything above the port.

use std::collections::BTreeMap;

use edge_common::maps::{BackendEntry, Chunk, ServiceEntry, ServiceKey, SourceKey};

use super::selection;
use crate::reconcile::ports::{
    Action, BackendSlot, Capacity, DatapathPort, DatapathState, FilterBits, FlowCounts, NumberSets, PortError,
    ServiceSlot,
};

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct FakeDatapath {
    /// The frontend index.
    pub index: BTreeMap<ServiceKey, u32>,
    /// Services by number.
    pub services: BTreeMap<u32, ServiceEntry>,
    /// Labels by service number.
    pub labels: BTreeMap<u32, String>,
    /// Backends by number.
    pub backends: BTreeMap<u32, BackendEntry>,
    /// State words by backend number.
    pub states: BTreeMap<u32, u32>,
    /// The dnat index.
    pub backend_index: BTreeMap<ServiceKey, u32>,
    /// Selection chunks.
    pub chunks: BTreeMap<u32, Chunk>,
    /// Source ranges.
    pub ranges: BTreeMap<SourceKey, u32>,
    /// The prefilter.
    pub filter: FilterBits,
    /// Flows, set by the test.
    pub flows: FlowCounts,
    /// Sizes.
    pub capacity: Capacity,
    /// Writes so far.
    pub writes: u64,
    /// Fails every write after this many.
    pub fail_after: Option<u64>,
}

impl FakeDatapath {
    fn write(&mut self) -> Result<(), PortError> {
        if self.fail_after.is_some_and(|limit| self.writes >= limit) {
            return Err(PortError::new("fake write", "told to fail"));
        }
        self.writes += 1;
        Ok(())
    }
}

impl DatapathPort for FakeDatapath {
    fn snapshot(&mut self) -> Result<DatapathState, PortError> {
        let mut state = DatapathState {
            index: self.index.clone(),
            backend_index: self.backend_index.clone().into(),
            ranges: self.ranges.clone(),
            filter: self.filter.clone().into(),
            capacity: self.capacity,
            ..DatapathState::default()
        };
        for (number, entry) in self.services.iter().filter(|(_, entry)| entry.protocol != 0) {
            let label = self.labels.get(number).cloned().unwrap_or_default();
            let active = self.flows.services.get(number).copied().unwrap_or(0);
            state.services.insert(*number, ServiceSlot { entry: *entry, label, active });
            let region = selection::decode(entry.selection, |chunk| self.chunks.get(&chunk).copied());
            if let Some(region) = region.filter(|_| entry.selection != 0) {
                state.regions.insert(entry.selection, region.into());
            }
        }
        for (number, entry) in self.backends.iter().filter(|(_, entry)| entry.protocol != 0) {
            let word = self.states.get(number).copied().unwrap_or(0);
            let active = self.flows.backends.get(number).copied().unwrap_or(0);
            state.backends.insert(*number, BackendSlot { entry: *entry, state: word, active });
        }
        Ok(state)
    }

    fn flow_counts(&mut self, of: &NumberSets) -> Result<FlowCounts, PortError> {
        let mut flows = self.flows.clone();
        flows.services.retain(|number, _| of.services.contains(number));
        flows.backends.retain(|number, _| of.backends.contains(number));
        Ok(flows)
    }

    fn apply(&mut self, action: &Action) -> Result<u64, PortError> {
        let before = self.writes;
        match action {
            Action::WriteRegion { first_chunk, region } => {
                for (number, chunk) in selection::encode(*first_chunk, region) {
                    self.write()?;
                    self.chunks.insert(number, chunk);
                }
            }
            Action::FreeBackend { number } => {
                self.write()?;
                self.states.remove(number);
                self.write()?;
                self.backends.remove(number);
            }
            _ => {
                self.write()?;
                match action {
                    Action::RemoveIndex { key } => drop(self.index.remove(key)),
                    Action::SetIndex { key, number } => drop(self.index.insert(*key, *number)),
                    Action::SetBackendState { number, state } => drop(self.states.insert(*number, *state)),
                    Action::PutBackend { number, entry, .. } => drop(self.backends.insert(*number, *entry)),
                    Action::SetFilter { bits } => self.filter = bits.clone(),
                    Action::PutBackendIndex { key, number } => drop(self.backend_index.insert(*key, *number)),
                    Action::RemoveBackendIndex { key } => drop(self.backend_index.remove(key)),
                    Action::PutRange { key, action } => drop(self.ranges.insert(*key, *action)),
                    Action::RemoveRange { key } => drop(self.ranges.remove(key)),
                    Action::PutLabel { number, label } => drop(self.labels.insert(*number, label.clone())),
                    Action::PutService { number, entry, .. } => drop(self.services.insert(*number, *entry)),
                    Action::FreeService { number } => drop(self.services.remove(number)),
                    _ => {}
                }
            }
        }
        Ok(self.writes - before)
    }
}
