//! Flows that are to be ended: those of backends that went down in a service with `on_down`, and those that an operator
//! names. One order at a time, in bounded steps, from the thread of the sweep ([`super::sweep`]).

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant},
};

use tokio::sync::oneshot;
use tracing::{info, warn};

use super::recorder::Ended;
use crate::{
    config::valid::Config,
    datapath::flow_ends::{FlowEnder, Progress, Walk},
    desired::{DesiredState, Exclusion},
    model::{
        FlowSelector, HealthKey, OnDown, Protocol, Verdict,
        query::{KilledRow, ViewError},
    },
};

/// Entries looked at in one step.
const BUDGET: usize = 8192;
/// Until the maps are asked again whether they exclude a backend.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Until an order that failed is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// Backends that are down in a service that ends flows then, and of which protocol only.
pub type Down = BTreeMap<HealthKey, Option<Protocol>>;

/// Whoever asked for an order.
pub type Reply = oneshot::Sender<Result<KilledRow, ViewError>>;

struct Order {
    selector: FlowSelector,
    /// Goes down: to be carried out once the maps exclude the backend, and dropped if it comes back before.
    down: Option<HealthKey>,
    walk: Walk,
    reply: Option<Reply>,
}

/// See the module.
pub struct FlowEnds {
    ender: FlowEnder,
    orders: VecDeque<Order>,
    /// Backends whose flows were ended, or are about to be.
    down: BTreeSet<HealthKey>,
    /// Nothing is done before: the maps are read for each look.
    rests_until: Option<Instant>,
}

impl FlowEnds {
    /// Nothing is to be ended.
    pub fn new(ender: FlowEnder) -> Self {
        Self { ender, orders: VecDeque::new(), down: BTreeSet::new(), rests_until: None }
    }

    /// True where there is something to do.
    pub fn is_busy(&self) -> bool {
        !self.orders.is_empty()
    }

    /// Orders the end of the flows of those that are down now and were not before.
    pub fn look(&mut self, down: Down) {
        self.orders.retain(|order| order.down.as_ref().is_none_or(|key| down.contains_key(key)));
        for (key, protocol) in &down {
            if !self.down.contains(key) {
                let selector = FlowSelector {
                    service: key.0.clone(),
                    backend: Some(key.1),
                    protocol: *protocol,
                    ..FlowSelector::default()
                };
                let walk = Walk::default();
                self.orders.push_back(Order { selector, down: Some(key.clone()), walk, reply: None });
            }
        }
        self.down = down.into_keys().collect();
    }

    /// An operator's order.
    pub fn kill(&mut self, selector: FlowSelector, reply: Reply) {
        self.orders.push_back(Order { selector, down: None, walk: Walk::default(), reply: Some(reply) });
    }

    /// One bounded step of the first order. One whose backend is not excluded yet lets the others pass.
    pub fn step(&mut self, ended: &Ended) {
        if self.rests_until.is_some_and(|until| Instant::now() < until) {
            return;
        }
        let Some(mut order) = self.orders.pop_front() else { return };
        let progress = self.ender.step(&order.selector, order.down.is_some(), &mut order.walk, BUDGET);
        ended.write(self.ender.take_ended());
        let FlowSelector { service, backend, .. } = &order.selector;
        match progress {
            Ok(Progress::Waits) => {
                self.rests_until = Some(Instant::now() + LOOK_AGAIN);
                self.orders.push_back(order);
            }
            Ok(Progress::Goes) => self.orders.push_front(order),
            Ok(Progress::Done) => {
                let flows = order.walk.ended;
                info!(service, ?backend, flows, "flows were ended on order");
                if let Some(reply) = order.reply {
                    // Whoever asked may have gone.
                    drop(reply.send(Ok(KilledRow { service: service.clone(), flows })));
                }
            }
            Err(error) => {
                warn!(%error, service, ?backend, "flows could not be ended");
                match order.reply.take() {
                    Some(reply) => drop(reply.send(Err(ViewError::Internal(error.to_string())))),
                    // Nobody orders it anew while it stays down.
                    None => {
                        order.walk = Walk::default();
                        self.rests_until = Some(Instant::now() + TRY_AGAIN);
                        self.orders.push_back(order);
                    }
                }
            }
        }
    }
}

/// Who is down where that ends flows.
pub fn down(config: &Config, desired: &DesiredState) -> Down {
    let mut down = BTreeMap::new();
    for service in config.services.values() {
        let protocol = match service.on_down {
            OnDown::Keep => continue,
            OnDown::Reset => None,
            OnDown::Reselect => Some(Protocol::Udp),
        };
        let pools = service.listen.iter().filter_map(|frontend| desired.frontends.get(frontend)?.pool.as_ref());
        for backend in pools.flatten().filter(|backend| ends_flows(backend.excluded)) {
            down.insert((service.name.clone(), backend.address), protocol);
        }
    }
    down
}

/// Not what drains or was ejected by what clients saw: that still serves, perhaps.
fn ends_flows(excluded: Option<Exclusion>) -> bool {
    matches!(excluded, Some(Exclusion::Down | Exclusion::NoRoute | Exclusion::Unhealthy(Verdict::Down)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_serve_ends_its_flows_and_what_drains_or_was_ejected_does_not() {
        for excluded in [Exclusion::Down, Exclusion::NoRoute, Exclusion::Unhealthy(Verdict::Down)] {
            assert!(ends_flows(Some(excluded)), "{excluded}");
        }
        let others = [
            None,
            Some(Exclusion::Draining),
            Some(Exclusion::NoSnatAddress),
            Some(Exclusion::Unhealthy(Verdict::Ejected)),
            Some(Exclusion::Unhealthy(Verdict::Checking)),
        ];
        assert!(!others.into_iter().any(ends_flows));
    }
}
