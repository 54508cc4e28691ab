//! Slow start: a backend that becomes eligible gets a tenth of its weight, and the rest in nine steps. Each step is one state
//! word and one table, written by the reconciler like any other change. Pure: time comes in.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    desired::{AdoptedBackend, DesiredState},
    model::Frontend,
};

/// Steps from nothing to the full weight; the first is taken at once.
const STEPS: u32 = 10;

type Key = (Frontend, SocketAddr);

/// Who starts slowly, and since when.
#[derive(Debug, Default)]
pub struct SlowStart {
    started: BTreeMap<Key, Instant>,
    eligible: BTreeSet<Key>,
    seen: BTreeSet<Frontend>,
}

impl SlowStart {
    /// Gives each backend of `state` the share that it has at `now`, and says when the next one changes. A backend that
    /// was eligible when its frontend is first seen goes on where the maps (`adopted`) say it was: it did not just start.
    pub fn apply(
        &mut self,
        now: Instant,
        adopted: &BTreeMap<Frontend, Vec<AdoptedBackend>>,
        state: &mut DesiredState,
    ) -> Option<Instant> {
        self.seen.retain(|frontend| state.frontends.contains_key(frontend));
        let mut eligible = BTreeSet::new();
        let mut next = None;
        for (frontend, desired) in &mut state.frontends {
            let Some(period) = desired.selection.slow_start.filter(|period| !period.is_zero()) else {
                self.seen.remove(frontend);
                continue;
            };
            let desired = Arc::make_mut(desired);
            let is_first = desired.pool.is_some() && self.seen.insert(*frontend);
            for backend in desired.pool.iter_mut().flatten().filter(|backend| backend.eligible()) {
                let key = (*frontend, backend.address);
                eligible.insert(key);
                if is_first {
                    let before = adopted.get(frontend).into_iter().flatten();
                    let before = before.filter(|b| b.eligible).find(|b| b.address == backend.address);
                    if let Some(share) = before.map(|before| before.share).filter(|share| *share < 100) {
                        let done = period.saturating_mul(u32::from(share).saturating_sub(100 / STEPS)) / 100;
                        self.started.insert(key, now.checked_sub(done).unwrap_or(now));
                    }
                } else if !self.eligible.contains(&key) {
                    self.started.insert(key, now);
                }
                let Some(started) = self.started.get(&key) else { continue };
                let (share, change) = share(now.saturating_duration_since(*started), period);
                backend.share = share;
                match change {
                    Some(change) => next = Some(next.map_or(now + change, |next: Instant| next.min(now + change))),
                    None => drop(self.started.remove(&key)),
                }
            }
            if desired.pool.is_none() {
                eligible.extend(self.eligible.iter().filter(|(of, _)| of == frontend));
            }
        }
        self.started.retain(|key, _| eligible.contains(key));
        self.eligible = eligible;
        next
    }
}

/// The share in percent after this time, and how long it lasts.
fn share(elapsed: Duration, period: Duration) -> (u8, Option<Duration>) {
    let step = (period / STEPS).max(Duration::from_millis(1));
    let done = u32::try_from(elapsed.as_nanos() / step.as_nanos()).unwrap_or(u32::MAX).saturating_add(1);
    if done >= STEPS {
        return (100, None);
    }
    let percent = u8::try_from(done.saturating_mul(100 / STEPS)).unwrap_or(100);
    (percent, Some((step * done).saturating_sub(elapsed).max(Duration::from_millis(1))))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        desired::{Announced, DesiredBackend, DesiredFrontend, Exclusion, Facts, Timeouts},
        model::{Balance, Mode, Protection, Protocol, Selection, Snat, Tier},
    };

    fn frontend() -> Frontend {
        "172.16.1.88:443/tcp".parse().unwrap()
    }

    fn state(backends: &[(&str, bool)]) -> DesiredState {
        let backend = |(address, eligible): &(&str, bool)| DesiredBackend {
            address: address.parse().unwrap(),
            weight: 1,
            limit: None,
            share: 100,
            tier: Tier::Primary,
            excluded: (!eligible).then_some(Exclusion::NoRoute),
            facts: Facts::favourable("static"),
            node: None,
            source: "static",
            snat_address: None,
        };
        let desired = DesiredFrontend {
            service: "web".to_owned(),
            mode: Mode::FullNat,
            balance: Balance::Maglev,
            selection: Selection { slow_start: Some(Duration::from_secs(30)), ..Selection::default() },
            snat: Snat::default(),
            timeouts: Timeouts::of(Protocol::Tcp),
            pool: Some(backends.iter().map(backend).collect()),
            announced: Announced::Off,
            dedicated: false,
            panic: None,
            protection: Protection::default(),
        };
        DesiredState { frontends: BTreeMap::from([(frontend(), Arc::new(desired))]), ..DesiredState::default() }
    }

    fn shares(state: &DesiredState) -> Vec<u8> {
        state.frontends[&frontend()].pool.iter().flatten().map(|backend| backend.share).collect()
    }

    const A: &str = "10.1.0.4:443";
    const B: &str = "10.1.0.5:443";

    #[test]
    fn a_backend_that_joins_gets_its_weight_in_ten_steps() {
        let (mut slow, mut now) = (SlowStart::default(), Instant::now());
        let mut first = state(&[(A, true), (B, false)]);
        assert_eq!(slow.apply(now, &BTreeMap::new(), &mut first), None, "those of the start are at full weight");
        assert_eq!(shares(&first), [100, 100]);
        let mut seen = Vec::new();
        loop {
            let mut state = state(&[(A, true), (B, true)]);
            let next = slow.apply(now, &BTreeMap::new(), &mut state);
            assert_eq!(shares(&state)[0], 100);
            seen.push(shares(&state)[1]);
            let Some(next) = next else { break };
            assert!(next > now && next <= now + Duration::from_secs(3));
            now = next;
        }
        assert_eq!(seen, [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]);
    }

    #[test]
    fn a_backend_that_is_excluded_and_comes_back_starts_again() {
        let (mut slow, now) = (SlowStart::default(), Instant::now());
        slow.apply(now, &BTreeMap::new(), &mut state(&[(A, true)]));
        slow.apply(now, &BTreeMap::new(), &mut state(&[(A, false)]));
        let mut back = state(&[(A, true)]);
        assert!(slow.apply(now, &BTreeMap::new(), &mut back).is_some());
        assert_eq!(shares(&back), [10]);
    }

    #[test]
    fn a_restart_goes_on_where_the_maps_were() {
        let adopted = AdoptedBackend {
            address: A.parse().unwrap(),
            weight: 1,
            share: 40,
            tier: Tier::Primary,
            eligible: true,
            snat_address: None,
        };
        let adopted = BTreeMap::from([(frontend(), vec![adopted])]);
        let (mut slow, now) = (SlowStart::default(), Instant::now());
        let mut same = state(&[(A, true)]);
        assert!(slow.apply(now, &adopted, &mut same).is_some());
        assert_eq!(shares(&same), [40]);
        let mut later = state(&[(A, true)]);
        assert!(slow.apply(now + Duration::from_secs(18), &adopted, &mut later).is_none());
        assert_eq!(shares(&later), [100]);
    }

    #[derive(Clone, Debug)]
    enum Event {
        /// Time passes, milliseconds.
        Pass(u64),
        /// A backend becomes eligible, or not any more.
        Turn(bool, bool),
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            (0_u64..20_000).prop_map(Event::Pass),
            (any::<bool>(), any::<bool>()).prop_map(|(first, up)| Event::Turn(first, up)),
        ]
    }

    proptest! {
        /// The model knows only since when each backend has been eligible without a break.
        #[test]
        fn the_share_is_a_tenth_for_each_begun_tenth_of_the_period_and_whole_for_those_of_the_start(
            at_start in any::<(bool, bool)>(),
            events in proptest::collection::vec(event(), 1..80),
        ) {
            let start = Instant::now();
            let (mut slow, mut now) = (SlowStart::default(), start);
            let mut up = [at_start.0, at_start.1];
            // `None`: from the start, at full weight.
            let mut since: [Option<Instant>; 2] = [None; 2];
            slow.apply(now, &BTreeMap::new(), &mut state(&[(A, up[0]), (B, up[1])]));
            for event in events {
                match event {
                    Event::Pass(passes) => now += Duration::from_millis(passes),
                    Event::Turn(first, turns_up) => {
                        let which = usize::from(!first);
                        if turns_up && !up[which] {
                            since[which] = Some(now);
                        }
                        up[which] = turns_up;
                    }
                }
                let mut built = state(&[(A, up[0]), (B, up[1])]);
                let next = slow.apply(now, &BTreeMap::new(), &mut built);
                let expected = |which: usize| match since[which].filter(|_| up[which]) {
                    Some(since) => u8::try_from(((now - since).as_secs() / 3 + 1).min(10) * 10).unwrap(),
                    None => 100,
                };
                prop_assert_eq!(shares(&built), [expected(0), expected(1)]);
                let starts = (0..2).any(|which| expected(which) < 100);
                prop_assert_eq!(next.is_some(), starts, "it is looked at again exactly while somebody starts");
                prop_assert!(next.is_none_or(|next| next > now && next <= now + Duration::from_secs(3)));
            }
        }
    }
}
