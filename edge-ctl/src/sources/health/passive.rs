//! What real traffic says about the backends of one service. Pure: counters and time come in, ejections come out.
//!
//! | backend | counters over `window` reach both thresholds | ejection has lasted | stays good for a whole window |
//! |---|---|---|---|
//! | in use | ejected, where `limit` of the pool allows | | its back-off starts again |
//! | ejected | nothing: it has no new flows | in use again, on probation | |
//!
//! An ejection lasts `eject`; one that follows before a good window has passed lasts twice as long as the one before, up
//! to `eject_most`. Counters that go back (the maps are new) start a new window.

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    time::Duration,
};

use crate::model::{Passive, PassiveCounters};

/// The backends of one service.
#[derive(Clone, Debug, Default)]
pub struct PassiveHealth {
    backends: BTreeMap<SocketAddr, Watched>,
}

#[derive(Clone, Debug, Default)]
struct Watched {
    /// Counters as they were, oldest first, the first of them at the start of the window or before.
    samples: VecDeque<(Duration, PassiveCounters)>,
    ejected_until: Option<Duration>,
    /// Ejections in a row.
    row: u32,
    /// Ejections so far.
    ejections: u64,
    /// When the last ejection ended.
    returned: Option<Duration>,
}

/// A change of one backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It gets no new flows.
    Ejected {
        /// Which.
        backend: SocketAddr,
        /// For how long.
        lasts: Duration,
        /// Failures of the window, and new flows in it.
        failures: (u64, u64),
    },
    /// It gets new flows again.
    Returned {
        /// Which.
        backend: SocketAddr,
    },
    /// It should be ejected, but too much of the pool already is.
    Spared {
        /// Which.
        backend: SocketAddr,
    },
}

impl PassiveHealth {
    /// True while it is ejected.
    pub fn is_ejected(&self, backend: SocketAddr) -> bool {
        self.backends.get(&backend).is_some_and(|watched| watched.ejected_until.is_some())
    }

    /// How often it was ejected since it is known.
    pub fn ejections(&self, backend: SocketAddr) -> u64 {
        self.backends.get(&backend).map_or(0, |watched| watched.ejections)
    }

    /// Takes in the counters of all backends of the pool at `now`; those that are absent have left it and are forgotten.
    pub fn step(
        &mut self,
        now: Duration,
        settings: &Passive,
        counters: &BTreeMap<SocketAddr, PassiveCounters>,
    ) -> Vec<Change> {
        self.backends.retain(|backend, _| counters.contains_key(backend));
        let mut changes = Vec::new();
        for (backend, counted) in counters {
            let watched = self.backends.entry(*backend).or_default();
            if watched.ejected_until.is_some_and(|until| until <= now) {
                watched.ejected_until = None;
                watched.returned = Some(now);
                // What failed before the ejection must not eject again.
                watched.samples.clear();
                changes.push(Change::Returned { backend: *backend });
            }
            watched.sample(now, settings.window, *counted);
        }
        let most = counters.len() * usize::from(settings.limit) / 100;
        let mut ejected = self.backends.values().filter(|watched| watched.ejected_until.is_some()).count();
        for (backend, watched) in &mut self.backends {
            let Some(failures) = watched.failing(settings).filter(|_| watched.ejected_until.is_none()) else {
                continue;
            };
            if ejected >= most {
                changes.push(Change::Spared { backend: *backend });
                continue;
            }
            ejected += 1;
            let lasts = watched.eject(now, settings);
            changes.push(Change::Ejected { backend: *backend, lasts, failures });
        }
        changes
    }
}

impl Watched {
    fn sample(&mut self, now: Duration, window: Duration, counters: PassiveCounters) {
        if self.samples.back().is_some_and(|(_, last)| counters.opened < last.opened) {
            self.samples.clear();
        }
        self.samples.push_back((now, counters));
        // The newest sample that is a window old is the window's start.
        while self.samples.get(1).is_some_and(|(at, _)| now.saturating_sub(*at) >= window) {
            self.samples.pop_front();
        }
    }

    /// Failures and new flows of the window, where both thresholds are reached.
    fn failing(&self, settings: &Passive) -> Option<(u64, u64)> {
        let ((_, first), (_, last)) = (self.samples.front()?, self.samples.back()?);
        let bad = |counters: &PassiveCounters| counters.syn_unanswered.saturating_add(counters.reset_before_data);
        let failures = bad(last).saturating_sub(bad(first));
        let opened = last.opened.saturating_sub(first.opened);
        let enough = failures >= u64::from(settings.failures.max(1));
        let share = failures.saturating_mul(100) >= opened.saturating_mul(u64::from(settings.share));
        (enough && share).then_some((failures, opened))
    }

    fn eject(&mut self, now: Duration, settings: &Passive) -> Duration {
        let again = self.returned.is_some_and(|at| now.saturating_sub(at) < settings.window);
        self.row = if again { self.row.saturating_add(1) } else { 0 };
        let factor = 1_u32.checked_shl(self.row).unwrap_or(u32::MAX);
        let lasts = settings.eject.saturating_mul(factor).min(settings.eject_most);
        self.ejections += 1;
        self.ejected_until = Some(now.saturating_add(lasts));
        self.samples.clear();
        lasts
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SETTINGS: Passive = Passive {
        failures: 5,
        share: 50,
        window: Duration::from_secs(10),
        eject: Duration::from_secs(30),
        eject_most: Duration::from_secs(100),
        limit: 50,
    };

    fn backend(number: u8) -> SocketAddr {
        ([10, 1, 0, number], 80).into()
    }

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn counters(all: &[(u64, u64)]) -> BTreeMap<SocketAddr, PassiveCounters> {
        let one = |(number, &(opened, syn_unanswered)): (usize, &(u64, u64))| {
            let counted = PassiveCounters { opened, syn_unanswered, reset_before_data: 0 };
            (backend(u8::try_from(number + 1).unwrap()), counted)
        };
        all.iter().enumerate().map(one).collect()
    }

    #[test]
    fn a_backend_is_ejected_where_both_thresholds_are_reached_and_returns_when_its_time_is_over() {
        let mut health = PassiveHealth::default();
        assert!(health.step(secs(0), &SETTINGS, &counters(&[(0, 0), (0, 0)])).is_empty());
        assert!(health.step(secs(1), &SETTINGS, &counters(&[(4, 4), (0, 0)])).is_empty(), "too few");
        assert!(health.step(secs(2), &SETTINGS, &counters(&[(20, 6), (0, 0)])).is_empty(), "too small a share");
        let ejected = Change::Ejected { backend: backend(1), lasts: secs(30), failures: (12, 22) };
        assert_eq!(health.step(secs(3), &SETTINGS, &counters(&[(22, 12), (0, 0)])), [ejected]);
        assert!(health.is_ejected(backend(1)));
        assert!(health.step(secs(32), &SETTINGS, &counters(&[(22, 12), (0, 0)])).is_empty());
        let returned = [Change::Returned { backend: backend(1) }];
        assert_eq!(health.step(secs(33), &SETTINGS, &counters(&[(22, 12), (0, 0)])), returned);
        assert!(!health.is_ejected(backend(1)));
    }

    #[test]
    fn failures_older_than_the_window_do_not_count() {
        let mut health = PassiveHealth::default();
        for (at, failed) in [(0, 0), (1, 3), (20, 4), (31, 6)] {
            assert!(health.step(secs(at), &SETTINGS, &counters(&[(failed, failed), (0, 0)])).is_empty(), "{at}");
        }
    }

    #[test]
    fn ejections_in_a_row_last_twice_as_long_each_up_to_the_most_and_a_good_window_forgives() {
        let mut health = PassiveHealth::default();
        let (mut now, mut failed, mut lasted) = (0, 0, Vec::new());
        for round in 0..5 {
            health.step(secs(now), &SETTINGS, &counters(&[(failed, failed), (0, 0)]));
            failed += 10;
            now += if round == 4 { 11 } else { 1 };
            // The last round comes after a window without a failure.
            if round == 4 {
                health.step(secs(now), &SETTINGS, &counters(&[(failed - 10, failed - 10), (0, 0)]));
                now += 1;
            }
            let changes = health.step(secs(now), &SETTINGS, &counters(&[(failed, failed), (0, 0)]));
            let [Change::Ejected { lasts, .. }] = changes[..] else { panic!("{round}: {changes:?}") };
            lasted.push(lasts.as_secs());
            now += lasts.as_secs();
        }
        assert_eq!(lasted, [30, 60, 100, 100, 30]);
    }

    #[test]
    fn no_more_of_a_pool_is_ejected_than_the_limit_allows() {
        let mut health = PassiveHealth::default();
        health.step(secs(0), &SETTINGS, &counters(&[(0, 0), (0, 0), (0, 0)]));
        let changes = health.step(secs(1), &SETTINGS, &counters(&[(9, 9), (9, 9), (9, 9)]));
        let spared = changes.iter().filter(|change| matches!(change, Change::Spared { .. })).count();
        assert_eq!((changes.len(), spared), (3, 2), "50 % of 3 is 1: {changes:?}");
    }

    #[test]
    fn counters_that_begin_again_eject_nobody() {
        let mut health = PassiveHealth::default();
        health.step(secs(0), &SETTINGS, &counters(&[(100, 50), (0, 0)]));
        assert!(health.step(secs(1), &SETTINGS, &counters(&[(60, 60), (0, 0)])).is_empty());
    }

    proptest! {
        #[test]
        fn whatever_is_counted_the_limit_holds_and_every_ejection_ends(
            limit in 0u8..=100,
            steps in proptest::collection::vec((1u64..40, proptest::collection::vec((0u64..20, 0u64..20), 6)), 1..60),
        ) {
            let settings = Passive { limit, ..SETTINGS };
            let (mut health, mut now) = (PassiveHealth::default(), 0);
            let mut sums = vec![(0, 0); 6];
            let mut since: BTreeMap<SocketAddr, u64> = BTreeMap::new();
            for (pause, more) in steps {
                now += pause;
                for (sum, (opened, failed)) in sums.iter_mut().zip(more) {
                    *sum = (sum.0 + opened + failed, sum.1 + failed);
                }
                health.step(secs(now), &settings, &counters(&sums));
                let ejected: Vec<SocketAddr> = (1..=6).map(backend).filter(|one| health.is_ejected(*one)).collect();
                prop_assert!(ejected.len() <= 6 * usize::from(limit) / 100);
                since.retain(|backend, _| ejected.contains(backend));
                for backend in ejected {
                    let start = *since.entry(backend).or_insert(now);
                    prop_assert!(now - start <= settings.eject_most.as_secs() + 40);
                }
            }
        }
    }
}
