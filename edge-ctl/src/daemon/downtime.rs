//! How long each backend could not be used although it should have been, as NGINX Plus's `downtime`. Pure: time comes in.
//!
//! | excluded for | counts |
//! |---|---|
//! | anything else: no route, no source address, checks, ejection | yes |
//! | an administrator's order (down, drain) | no |
//! | nothing: eligible | no |
//!
//! A backend that leaves its pool is forgotten; it comes back as a new one.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    desired::{DesiredState, Exclusion},
    model::Frontend,
};

/// A backend of a frontend.
pub(super) type Key = (Frontend, SocketAddr);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Downtimes {
    backends: BTreeMap<Key, Downtime>,
    /// Frontends as they were last looked at: most of them are the same from one look to the next.
    seen: Arc<DesiredState>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Downtime {
    before: Duration,
    /// Since when it is down, where it is.
    since: Option<Instant>,
}

impl Downtimes {
    /// Takes in who is excluded from `now` on.
    pub fn look(&mut self, now: Instant, state: &Arc<DesiredState>) {
        let seen = Arc::clone(&self.seen);
        for (frontend, desired) in state.changed_since(&seen) {
            let pool = desired.pool.iter().flatten();
            let down: BTreeMap<SocketAddr, bool> = pool.map(|b| (b.address, counts(b.excluded))).collect();
            let known = self.backends.range((*frontend, least())..).take_while(|((of, _), _)| of == frontend);
            let gone: Vec<Key> =
                known.map(|(key, _)| *key).filter(|(_, address)| !down.contains_key(address)).collect();
            for key in gone {
                self.backends.remove(&key);
            }
            for (address, is_down) in down {
                let known = self.backends.get(&(*frontend, address)).is_some_and(|known| known.since.is_some());
                // Those that never were down need no memory.
                if known != is_down {
                    self.backends.entry((*frontend, address)).or_default().turn(now, is_down);
                }
            }
        }
        if !state.has_frontends_of(&seen) {
            self.backends.retain(|(frontend, _), _| state.frontends.contains_key(frontend));
        }
        self.seen = Arc::clone(state);
    }

    /// A backend's downtime until `now`.
    pub fn of(&self, now: Instant, key: &Key) -> Duration {
        self.backends.get(key).map_or(Duration::ZERO, |known| known.until(now))
    }
}

impl Downtime {
    fn until(&self, now: Instant) -> Duration {
        self.before + self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    fn turn(&mut self, now: Instant, is_down: bool) {
        *self = Self { before: self.until(now), since: is_down.then_some(now) };
    }
}

/// The lowest address of all.
fn least() -> SocketAddr {
    ([0, 0, 0, 0], 0).into()
}

fn counts(excluded: Option<Exclusion>) -> bool {
    match excluded {
        None | Some(Exclusion::Down | Exclusion::Draining) => false,
        Some(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        desired::{Announced, DesiredBackend, DesiredFrontend, Facts, Timeouts},
        model::{Balance, Mode, Protection, Protocol, Selection, Snat, Tier, Verdict},
    };

    fn frontend() -> Frontend {
        "172.16.1.88:443/tcp".parse().unwrap()
    }

    fn address(host: u8) -> SocketAddr {
        ([10, 1, 0, host], 443).into()
    }

    fn state(backends: &[(u8, Option<Exclusion>)]) -> Arc<DesiredState> {
        let backend = |(host, excluded): &(u8, Option<Exclusion>)| DesiredBackend {
            address: address(*host),
            weight: 1,
            limit: None,
            share: 100,
            tier: Tier::Primary,
            excluded: *excluded,
            facts: Facts::favourable("static"),
            node: None,
            source: "static",
            snat_address: None,
        };
        let desired = DesiredFrontend {
            service: "web".to_owned(),
            mode: Mode::FullNat,
            balance: Balance::Maglev,
            selection: Selection::default(),
            snat: Snat::default(),
            timeouts: Timeouts::of(Protocol::Tcp),
            pool: Some(backends.iter().map(backend).collect()),
            announced: Announced::Off,
            dedicated: false,
            panic: None,
            protection: Protection::default(),
        };
        DesiredState { frontends: BTreeMap::from([(frontend(), desired.into())]), ..DesiredState::default() }.into()
    }

    fn exclusion() -> impl Strategy<Value = Option<Exclusion>> {
        prop_oneof![
            Just(None),
            Just(Some(Exclusion::Down)),
            Just(Some(Exclusion::Draining)),
            Just(Some(Exclusion::NoRoute)),
            Just(Some(Exclusion::NoSnatAddress)),
            Just(Some(Exclusion::Unhealthy(Verdict::Down))),
            Just(Some(Exclusion::Unhealthy(Verdict::Ejected))),
        ]
    }

    proptest! {
        /// The model adds up every interval on its own.
        #[test]
        fn downtime_is_the_sum_of_the_intervals_in_which_something_else_than_an_order_kept_it_out(
            steps in proptest::collection::vec(
                (0_u64..100, proptest::collection::btree_map(1_u8..5, exclusion(), 0..5)), 1..60),
        ) {
            let start = Instant::now();
            let (mut now, mut downtimes) = (start, Downtimes::default());
            let mut model: BTreeMap<u8, (Duration, bool)> = BTreeMap::new();
            for (passes, pool) in steps {
                let passes = Duration::from_secs(passes);
                now += passes;
                for (sum, is_down) in model.values_mut() {
                    *sum += if *is_down { passes } else { Duration::ZERO };
                }
                model.retain(|host, _| pool.contains_key(host));
                for (host, excluded) in &pool {
                    model.entry(*host).or_default().1 =
                        matches!(excluded, Some(Exclusion::NoRoute | Exclusion::NoSnatAddress | Exclusion::Unhealthy(_)));
                }
                let pool: Vec<_> = pool.into_iter().collect();
                downtimes.look(now, &state(&pool));
                for host in 1..5 {
                    let expected = model.get(&host).map_or(Duration::ZERO, |(sum, _)| *sum);
                    prop_assert_eq!(downtimes.of(now, &(frontend(), address(host))), expected);
                }
            }
            downtimes.look(now, &Arc::default());
            prop_assert!(downtimes.backends.is_empty(), "a frontend that is gone is forgotten");
        }
    }
}
