//! What administrators ordered at run time: kept in a file, so that it outlives the daemon, and followed until it is
//! carried out.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde::{Deserialize, Serialize};
use tracing::info;

use super::drains::Drains;
use crate::{
    config::valid::Config,
    datapath::{answer::answer_from_pins, kernel_view::KernelView},
    model::{
        AdminOrder, AdminOrders, BackendVerb, Endpoint, HealthKey,
        query::{Answer, Query, ViewError},
    },
    reconcile::ports::NumberSets,
    state_file::{StateFile, StateFileError},
};

/// Name in `state_dir`.
const FILE: &str = "backends.json";
/// Format of the file.
const VERSION: u32 = 1;

/// By service, then backend: JSON has no keys of two parts.
#[derive(Default, Serialize, Deserialize)]
struct Stored(BTreeMap<String, BTreeMap<Endpoint, AdminOrder>>);

/// Orders in force.
pub struct Orders {
    file: StateFile,
    orders: AdminOrders,
    drains: Drains,
}

impl Orders {
    /// Those of the daemon's earlier life.
    ///
    /// # Errors
    /// Where the file is there and cannot be read.
    pub fn load(state_dir: &Path) -> Result<Self, StateFileError> {
        let file = StateFile::new(state_dir, FILE, VERSION);
        let Stored(stored) = file.read()?.unwrap_or_default();
        let flat = stored.into_iter().flat_map(|(service, backends)| {
            backends.into_iter().map(move |(Endpoint(backend), order)| ((service.clone(), backend), order))
        });
        Ok(Self { orders: flat.collect(), drains: Drains::default(), file })
    }

    /// All of them.
    pub fn all(&self) -> &AdminOrders {
        &self.orders
    }

    /// Those that drain and have no flow left.
    pub fn drained(&self) -> &BTreeSet<HealthKey> {
        self.drains.drained()
    }

    /// Takes an order: it is on disk before it is in force.
    ///
    /// # Errors
    /// Where it cannot be written; nothing has changed then.
    pub fn give(&mut self, key: &HealthKey, verb: BackendVerb) -> Result<(), ViewError> {
        let mut orders = self.orders.clone();
        let order = orders.get(key).copied().unwrap_or_default().after(verb);
        if order == AdminOrder::default() {
            orders.remove(key);
        } else {
            orders.insert(key.clone(), order);
        }
        self.replace(orders).map_err(|error| ViewError::Internal(format!("the order was not kept: {error}")))?;
        info!(service = key.0, backend = %Endpoint(key.1), ?order, "order for a backend");
        Ok(())
    }

    /// Forgets orders for services that are no longer configured.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn forget_others(&mut self, config: &Config) -> Result<(), StateFileError> {
        let mut orders = self.orders.clone();
        orders.retain(|(service, _), _| config.services.contains_key(service));
        if orders == self.orders { Ok(()) } else { self.replace(orders) }
    }

    fn replace(&mut self, orders: AdminOrders) -> Result<(), StateFileError> {
        let mut stored = Stored::default();
        for ((service, backend), order) in &orders {
            stored.0.entry(service.clone()).or_default().insert(Endpoint(*backend), *order);
        }
        self.file.write(&stored)?;
        self.orders = orders;
        self.drains.orders(&self.orders);
        Ok(())
    }

    /// Looks whether flows are left where backends drain. Half-open flows count: their clients may be about to send.
    pub fn look(&mut self, kernel: &KernelView) {
        for (service, backend) in self.drains.look(&self.orders, |key| remaining(kernel, key)) {
            info!(service, backend = %Endpoint(backend), "backend is drained: no flow is left");
        }
    }
}

/// Flows of a backend, half-open and established; `None`: not known now.
fn remaining(kernel: &KernelView, (service, backend): &HealthKey) -> Option<usize> {
    let backends = kernel.tables().backend_numbers(service, *backend).ok()?;
    let counts = kernel.tables().flow_counts_of(&NumberSets { backends, ..NumberSets::default() }).ok()?;
    let established: u64 = counts.backends.values().sum();
    if established > 0 {
        return usize::try_from(established).ok();
    }
    // Only now is the walk over the tables worth its price.
    let query = Query::Flows { service: Some(service.clone()), limit: usize::MAX };
    let Ok(Answer::Flows(flows)) = answer_from_pins(kernel, &query) else { return None };
    let is_with = |text: &str| text.parse().is_ok_and(|address| Endpoint(*backend).covers(address));
    Some(flows.iter().filter(|flow| is_with(&flow.backend) && flow.state != "closing").count())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::AdminState;

    fn key() -> HealthKey {
        ("web".to_owned(), "10.1.0.4:443".parse().unwrap())
    }

    #[test]
    fn orders_outlive_the_daemon_and_one_that_changes_nothing_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let mut orders = Orders::load(folder.path()).unwrap();
        orders.give(&key(), BackendVerb::Drain).unwrap();
        orders.give(&key(), BackendVerb::Weight(Some(5))).unwrap();
        let again = Orders::load(folder.path()).unwrap();
        let expected = AdminOrder { state: AdminState::Drain, weight: Some(5), limit: None };
        assert_eq!(again.all(), &AdminOrders::from([(key(), expected)]));
        orders.give(&key(), BackendVerb::Up).unwrap();
        orders.give(&key(), BackendVerb::Weight(None)).unwrap();
        assert!(Orders::load(folder.path()).unwrap().all().is_empty());
    }

    #[test]
    fn an_order_that_cannot_be_kept_is_not_in_force() {
        let folder = tempfile::tempdir().unwrap();
        let mut orders = Orders::load(&folder.path().join("missing")).unwrap();
        let error = orders.give(&key(), BackendVerb::Down).unwrap_err().to_string();
        assert!(error.contains("state_dir"), "{error}");
        assert!(orders.all().is_empty());
    }
}
