//! Which backends that an administrator drains have no flow left. Pure: the orders and the counts come in.
//!
//! | drains by order | flows left | |
//! |---|---|---|
//! | yes | some, or not known now | draining |
//! | yes | none | drained, told once; stays so, since it gets no new flow |
//! | no more | | forgotten: another drain starts anew |

use std::collections::BTreeSet;

use crate::model::{AdminOrders, AdminState, HealthKey};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Drains {
    drained: BTreeSet<HealthKey>,
}

impl Drains {
    /// Those that have no flow left.
    pub fn drained(&self) -> &BTreeSet<HealthKey> {
        &self.drained
    }

    /// Takes in the orders as they are now.
    pub fn orders(&mut self, orders: &AdminOrders) {
        self.drained.retain(|key| orders.get(key).is_some_and(|order| order.state == AdminState::Drain));
    }

    /// Asks `remaining` for the flows of those that still drain (`None`: not known now); returns who has just drained.
    pub fn look(
        &mut self,
        orders: &AdminOrders,
        mut remaining: impl FnMut(&HealthKey) -> Option<usize>,
    ) -> Vec<HealthKey> {
        let draining = orders.iter().filter(|(_, order)| order.state == AdminState::Drain).map(|(key, _)| key);
        let waiting = draining.filter(|key| !self.drained.contains(*key));
        let ended: Vec<HealthKey> = waiting.filter(|key| remaining(key) == Some(0)).cloned().collect();
        self.drained.extend(ended.iter().cloned());
        ended
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::model::AdminOrder;

    fn key(host: u8) -> HealthKey {
        ("web".to_owned(), ([10, 1, 0, host], 443).into())
    }

    #[derive(Clone, Debug)]
    enum Event {
        Order(u8, AdminState),
        Flows(u8, Option<usize>),
        Look,
    }

    fn event() -> impl Strategy<Value = Event> {
        let state = prop_oneof![Just(AdminState::Up), Just(AdminState::Down), Just(AdminState::Drain)];
        prop_oneof![
            (1_u8..4, state).prop_map(|(host, state)| Event::Order(host, state)),
            (1_u8..4, proptest::option::of(0_usize..3)).prop_map(|(host, flows)| Event::Flows(host, flows)),
            Just(Event::Look),
        ]
    }

    proptest! {
        #[test]
        fn a_drain_ends_once_and_only_when_no_flow_is_known_to_be_left(
            events in proptest::collection::vec(event(), 1..100),
        ) {
            let (mut drains, mut orders) = (Drains::default(), AdminOrders::new());
            let mut flows: BTreeMap<HealthKey, Option<usize>> = BTreeMap::new();
            let mut told: BTreeSet<HealthKey> = BTreeSet::new();
            for event in events {
                match event {
                    Event::Order(host, state) => {
                        orders.insert(key(host), AdminOrder { state, ..AdminOrder::default() });
                        drains.orders(&orders);
                        told.retain(|key| orders[key].state == AdminState::Drain);
                    }
                    Event::Flows(host, count) => drop(flows.insert(key(host), count)),
                    Event::Look => {
                        let remaining = |key: &HealthKey| flows.get(key).copied().flatten();
                        for ended in drains.look(&orders, remaining) {
                            prop_assert_eq!(orders[&ended].state, AdminState::Drain);
                            prop_assert_eq!(flows.get(&ended).copied().flatten(), Some(0));
                            prop_assert!(told.insert(ended), "told twice");
                        }
                        for (key, order) in &orders {
                            let is_over = order.state == AdminState::Drain && flows.get(key) == Some(&Some(0));
                            prop_assert!(!is_over || drains.drained().contains(key));
                        }
                    }
                }
                prop_assert_eq!(drains.drained(), &told);
            }
        }
    }
}
