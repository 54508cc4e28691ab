//! What real traffic says about backends, read from the program's counters and told to the health checks.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::{sync::watch, time::interval};
use tracing::warn;

use super::{SharedState, lock};
use crate::{
    datapath::kernel_view::KernelView,
    model::{HealthKey, PassiveCounters, PassiveSignals},
    reconcile::{
        actor::ReconcilerStatus,
        ports::{DatapathState, PortError},
    },
    sources::health::HealthHandle,
};

/// Between two looks at the counters.
const TICK: Duration = Duration::from_secs(1);

/// The counters of the backends in `state`.
struct Counted<'a> {
    kernel: &'a KernelView,
    state: &'a DatapathState,
}

impl Counted<'_> {
    /// Summed over the listen addresses of a service: a pod that fails on one of them fails.
    fn read(&self) -> Result<BTreeMap<HealthKey, PassiveCounters>, PortError> {
        let (tables, end) = (self.kernel.tables(), self.state.backends_end());
        let (stats, signals) = (tables.backend_stats(end)?, tables.backend_signals(end)?);
        let mut all: BTreeMap<HealthKey, PassiveCounters> = BTreeMap::new();
        for (number, slot) in self.state.backends.iter() {
            let Some(service) = self.state.services.get(&slot.entry.service) else { continue };
            let counted = all.entry((service.label.clone(), slot.address())).or_default();
            if let Some(stats) = stats.get(number) {
                counted.opened = counted.opened.saturating_add(stats.half_opened);
            }
            if let Some(signals) = signals.get(number) {
                let silent = signals.unanswered.saturating_add(signals.refused);
                counted.syn_unanswered = counted.syn_unanswered.saturating_add(silent);
                counted.reset_before_data = counted.reset_before_data.saturating_add(signals.reset_early);
            }
        }
        Ok(all)
    }
}

impl PassiveSignals for Counted<'_> {
    fn passive_counters(&self) -> BTreeMap<HealthKey, PassiveCounters> {
        self.read().unwrap_or_else(|error| {
            warn!(%error, "what real traffic says about backends could not be read");
            BTreeMap::new()
        })
    }
}

/// Tells `health` the counters, for as long as there is somebody to tell; services without `passive` cost nothing.
pub(super) async fn watch(
    shared: SharedState,
    kernel: Arc<KernelView>,
    reconciler: watch::Receiver<ReconcilerStatus>,
    health: HealthHandle,
) {
    let mut tick = interval(TICK);
    loop {
        tick.tick().await;
        let is_watched = {
            let shared = lock(&shared);
            let mut settings = shared.config.0.services.values().filter_map(|service| service.health.as_ref());
            settings.any(|health| health.passive.is_some())
        };
        if !is_watched {
            continue;
        }
        let state = Arc::clone(&reconciler.borrow().state);
        let counters = Counted { kernel: &kernel, state: &state }.passive_counters();
        // Without counters backends would look as if they had left.
        if !counters.is_empty() {
            health.passive(&counters);
        }
    }
}
