//! What the last walk of the sweep found, for the views, and the alarms that follow from it.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use tracing::{info, warn};

use crate::{
    datapath::{snat::SnatUse, sweep::Pass, tables::Tables},
    model::{Endpoint, SnatAlarms, SnatLevel, SnatRow},
    reconcile::ports::{PortError, ip, socket_address},
};

/// A backend number and a SNAT address in network order.
type Key = (u32, edge_common::address::Wide);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Swept {
    counted: Option<(Instant, BTreeMap<&'static str, u64>)>,
    snat: BTreeMap<Key, SnatUse>,
    alarms: SnatAlarms<Key>,
    problems: Vec<String>,
}

impl Swept {
    /// Takes a walk's result over, and logs alarms that were raised or cleared. `tables` give the names.
    ///
    /// # Errors
    /// Where a map cannot be read; what was found is kept.
    pub fn take(&mut self, pass: &Pass, tables: &Tables, now: Instant) -> Result<(), PortError> {
        self.counted = Some((now, pass.entries.clone()));
        self.snat = pass.snat.iter().map(|found| ((found.backend, found.address), *found)).collect();
        let fills = self.snat.iter().map(|(key, found)| (*key, u64::from(found.used), u64::from(found.allowed)));
        let changes = self.alarms.update(fills);
        let alarming = self.snat.iter().filter(|(key, _)| self.alarms.level(key) != SnatLevel::Ok);
        let alarming: Vec<Key> = alarming.map(|(key, _)| *key).collect();
        self.problems.clear();
        if changes.is_empty() && alarming.is_empty() {
            return Ok(());
        }
        let names = self.names(tables)?;
        let name = |key: &Key| names.get(key).map_or("-", String::as_str);
        for (key, _, level) in &changes {
            match level {
                SnatLevel::Ok => info!("{}: enough are free again", name(key)),
                _ => warn!(%level, "{}: new flows will soon find none", name(key)),
            }
        }
        let told = alarming.iter().map(|key| {
            let level = self.alarms.level(key);
            format!("{} ({level}): give the service more `snat` addresses or ports", name(key))
        });
        self.problems = told.collect();
        Ok(())
    }

    /// The fills in words.
    fn names(&self, tables: &Tables) -> Result<BTreeMap<Key, String>, PortError> {
        let (labels, backends) = (tables.labels()?, tables.backends()?);
        let name = |(key, found): (&Key, &SnatUse)| {
            let service = labels.get(&found.service).map_or("-", String::as_str);
            let backend = backends.get(&found.backend).map(|entry| socket_address(entry.address, entry.port));
            let backend = backend.map_or_else(|| "-".to_owned(), |address| Endpoint(address).to_string());
            let SnatUse { address, used, allowed, .. } = *found;
            (
                *key,
                format!("SNAT ports of {} towards {backend} of {service}: {used} of {allowed} are in use", ip(address)),
            )
        };
        Ok(self.snat.iter().map(name).collect())
    }

    /// What is alarming, in words.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// The SNAT ports towards a backend, by source address.
    pub fn snat(&self, backend: u32) -> Vec<SnatRow> {
        let row = |(key, found): (&Key, &SnatUse)| SnatRow {
            address: ip(found.address).to_string(),
            used: found.used.into(),
            allowed: found.allowed.into(),
            level: self.alarms.level(key),
        };
        self.snat.range((backend, [0; 4])..=(backend, [u32::MAX; 4])).map(row).collect()
    }

    /// Entries of the flow tables, and how long ago they were counted; `None` before the first walk has ended.
    pub fn counted(&self, now: Instant) -> Option<(Duration, BTreeMap<&'static str, u64>)> {
        self.counted.as_ref().map(|(at, entries)| (now.saturating_duration_since(*at), entries.clone()))
    }
}
