//! What a DNS outcome means for a pool. Pure: time comes in, a snapshot and the delay of the next query come out.
//!
//! | outcome | pool | next query after |
//! |---|---|---|
//! | answer with addresses inside the pod networks | those addresses, at once, however many left | `valid`, else TTL |
//! | answer with addresses, all outside | kept | retry |
//! | timeout, SERVFAIL, REFUSED, truncated and TCP failed, ... | kept | retry |
//! | NXDOMAIN or NODATA | kept for the hold time, then empty | `valid`, else SOA TTL; at the end of the hold time |

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use ipnet::IpNet;

use crate::model::{BackendSource, PoolMember, PoolSnapshot, PoolState, within};

/// Shortest interval between good answers: a TTL of 0 must not become a busy loop.
const MIN_INTERVAL: Duration = Duration::from_secs(1);

/// Intervals of a tracker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Overrides the TTL of answers.
    pub valid: Option<Duration>,
    /// How soon a failed query is repeated, whatever `valid` says.
    pub retry: Duration,
    /// How long NXDOMAIN or NODATA must last before the pool becomes empty; `valid` where that is longer. CoreDNS says
    /// NXDOMAIN for a headless service without a ready pod, and passingly while it starts.
    pub hold: Duration,
}

impl Timing {
    fn interval(&self, ttl: Option<Duration>) -> Duration {
        self.valid.or(ttl).unwrap_or(MIN_INTERVAL).max(MIN_INTERVAL)
    }

    fn hold(&self) -> Duration {
        self.hold.max(self.valid.unwrap_or_default())
    }
}

/// How one query ended, over all servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Addresses, with port and weight; and the shortest TTL among their records.
    Answer {
        /// At least one member.
        members: BTreeSet<PoolMember>,
        /// TTL.
        ttl: Duration,
    },
    /// The server knows that there are none (NXDOMAIN, or NOERROR without records).
    Negative {
        /// What it said, for users.
        reason: String,
        /// Negative TTL (RFC 2308 section 5), where there was an SOA.
        ttl: Option<Duration>,
    },
    /// No server gave an answer that can be used.
    Failure {
        /// Why, for users.
        reason: String,
    },
}

/// What to do after an outcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Members or state changed: to be sent on.
    pub snapshot: Option<PoolSnapshot>,
    /// Delay of the next query.
    pub next: Duration,
    /// Addresses outside the pod networks, those not already seen in the answer before.
    pub newly_refused: Vec<IpAddr>,
}

/// The pool of one DNS source through time.
#[derive(Clone, Debug)]
pub struct PoolTracker {
    timing: Timing,
    networks: Vec<IpNet>,
    snapshot: PoolSnapshot,
    /// When the first negative answer since the last good one came.
    negative_since: Option<Duration>,
    last_good: Option<Duration>,
    error: Option<String>,
    refused_addresses: u64,
    refused_last: BTreeSet<IpAddr>,
}

impl PoolTracker {
    /// A pool about which nothing is known.
    pub fn new(source: BackendSource, timing: Timing, networks: Vec<IpNet>) -> Self {
        let snapshot = PoolSnapshot { source, members: BTreeSet::new(), state: PoolState::Unknown };
        Self {
            timing,
            networks,
            snapshot,
            negative_since: None,
            last_good: None,
            error: None,
            refused_addresses: 0,
            refused_last: BTreeSet::new(),
        }
    }

    /// Takes in how a query ended at `now`, a time on any clock that never goes back.
    pub fn step(&mut self, now: Duration, outcome: Outcome) -> Step {
        let before = self.snapshot.clone();
        let mut newly_refused = Vec::new();
        let next = match outcome {
            Outcome::Answer { members, ttl } => self.answer(now, members, ttl, &mut newly_refused),
            Outcome::Negative { reason, ttl } => self.negative(now, reason, ttl),
            Outcome::Failure { reason } => self.failure(reason),
        };
        Step { snapshot: (self.snapshot != before).then(|| self.snapshot.clone()), next, newly_refused }
    }

    /// Changes intervals and networks; the snapshot, where members had to go.
    pub fn reconfigure(&mut self, timing: Timing, networks: Vec<IpNet>) -> Option<PoolSnapshot> {
        self.timing = timing;
        self.networks = networks;
        let before = self.snapshot.members.len();
        let networks = &self.networks;
        self.snapshot.members.retain(|member| within(networks, member.address.ip()));
        (self.snapshot.members.len() != before).then(|| self.snapshot.clone())
    }

    /// The pool as it is.
    pub fn snapshot(&self) -> &PoolSnapshot {
        &self.snapshot
    }

    /// When the last good answer came.
    pub fn last_good(&self) -> Option<Duration> {
        self.last_good
    }

    /// Why the last query brought no addresses, if it did not.
    pub fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    /// Addresses refused so far because they lay outside the pod networks, counted in every answer.
    pub fn refused_addresses(&self) -> u64 {
        self.refused_addresses
    }

    fn answer(
        &mut self,
        now: Duration,
        members: BTreeSet<PoolMember>,
        ttl: Duration,
        newly_refused: &mut Vec<IpAddr>,
    ) -> Duration {
        let (inside, outside): (BTreeSet<PoolMember>, BTreeSet<PoolMember>) =
            members.into_iter().partition(|member| within(&self.networks, member.address.ip()));
        let outside: BTreeSet<IpAddr> = outside.iter().map(|member| member.address.ip()).collect();
        self.refused_addresses += outside.len() as u64;
        newly_refused.extend(outside.difference(&self.refused_last));
        let refused = outside.len();
        self.refused_last = outside;
        if inside.is_empty() {
            return self.failure(format!("all {refused} addresses of the answer lie outside pod_networks"));
        }
        self.negative_since = None;
        self.last_good = Some(now);
        self.error = None;
        self.snapshot.members = one_weight_each(inside);
        self.snapshot.state = PoolState::Fresh;
        self.timing.interval(Some(ttl))
    }

    fn negative(&mut self, now: Duration, reason: String, ttl: Option<Duration>) -> Duration {
        let since = *self.negative_since.get_or_insert(now);
        let held = now.saturating_sub(since);
        let interval = self.timing.interval(ttl);
        self.error = Some(reason.clone());
        if held >= self.timing.hold() {
            self.snapshot.members.clear();
            self.snapshot.state = PoolState::Fresh;
            return interval;
        }
        self.doubt(reason);
        interval.min(self.timing.hold() - held)
    }

    fn failure(&mut self, reason: String) -> Duration {
        self.error = Some(reason.clone());
        self.doubt(reason);
        self.timing.retry
    }

    /// Keeps the members. What was never known stays unknown.
    fn doubt(&mut self, reason: String) {
        if self.snapshot.state != PoolState::Unknown {
            self.snapshot.state = PoolState::LastGood { reason };
        }
    }
}

/// An SRV answer may list the same address and port twice; the pool has it once, with the larger weight.
fn one_weight_each(members: BTreeSet<PoolMember>) -> BTreeSet<PoolMember> {
    let mut single: std::collections::BTreeMap<SocketAddr, u16> = std::collections::BTreeMap::new();
    for member in members {
        let weight = single.entry(member.address).or_insert(member.weight);
        *weight = (*weight).max(member.weight);
    }
    single.into_iter().map(|(address, weight)| PoolMember::new(address, weight)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::RecordType;

    const HOLD: Duration = Duration::from_secs(10);
    const RETRY: Duration = Duration::from_secs(1);

    fn tracker(valid: Option<u64>) -> PoolTracker {
        let source = BackendSource::Dns {
            name: "nginx-ingress-svc.nginx-ingress.svc.cluster.local".into(),
            port: Some(443),
            resolver: "kube-dns".into(),
            record: RecordType::A,
        };
        let timing = Timing { valid: valid.map(Duration::from_secs), retry: RETRY, hold: HOLD };
        PoolTracker::new(source, timing, vec!["10.1.0.0/16".parse().unwrap()])
    }

    fn members(hosts: &[&str]) -> BTreeSet<PoolMember> {
        hosts.iter().map(|host| PoolMember::new(format!("{host}:443").parse().unwrap(), 1)).collect()
    }

    fn good(hosts: &[&str]) -> Outcome {
        Outcome::Answer { members: members(hosts), ttl: Duration::from_secs(5) }
    }

    fn nxdomain() -> Outcome {
        Outcome::Negative { reason: "NXDOMAIN".into(), ttl: Some(Duration::from_secs(5)) }
    }

    fn failure() -> Outcome {
        Outcome::Failure { reason: "SERVFAIL".into() }
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn valid_overrides_the_ttl_and_without_it_a_ttl_of_zero_becomes_one_second() {
        assert_eq!(tracker(Some(10)).step(at(0), good(&["10.1.0.4"])).next, at(10));
        assert_eq!(tracker(None).step(at(0), good(&["10.1.0.4"])).next, at(5));
        let zero = Outcome::Answer { members: members(&["10.1.0.4"]), ttl: Duration::ZERO };
        assert_eq!(tracker(None).step(at(0), zero).next, at(1));
    }

    #[test]
    fn identical_answers_are_reported_once() {
        let mut pool = tracker(Some(10));
        assert!(pool.step(at(0), good(&["10.1.0.4", "10.1.1.4"])).snapshot.is_some());
        assert!(pool.step(at(10), good(&["10.1.1.4", "10.1.0.4"])).snapshot.is_none());
    }

    #[test]
    fn a_shrink_of_more_than_half_is_applied_at_once() {
        let mut pool = tracker(Some(10));
        pool.step(at(0), good(&["10.1.0.4", "10.1.1.4", "10.1.2.4"]));
        let snapshot = pool.step(at(10), good(&["10.1.1.4"])).snapshot.unwrap();
        assert_eq!(snapshot.members, members(&["10.1.1.4"]));
    }

    #[test]
    fn a_failure_keeps_the_pool_and_is_retried_soon_whatever_valid_says() {
        let mut pool = tracker(Some(3600));
        pool.step(at(0), good(&["10.1.0.4"]));
        let step = pool.step(at(3600), failure());
        assert_eq!(step.next, RETRY);
        let snapshot = step.snapshot.unwrap();
        assert_eq!(snapshot.members, members(&["10.1.0.4"]));
        assert_eq!(snapshot.state, PoolState::LastGood { reason: "SERVFAIL".into() });
        assert_eq!(pool.step(at(3601), good(&["10.1.0.4"])).snapshot.unwrap().state, PoolState::Fresh);
    }

    #[test]
    fn a_failure_before_the_first_answer_leaves_the_pool_unknown_and_sends_nothing() {
        let mut pool = tracker(Some(10));
        assert_eq!(pool.step(at(0), failure()).snapshot, None);
        assert_eq!(pool.snapshot().state, PoolState::Unknown);
        assert_eq!(pool.error(), Some("SERVFAIL"));
    }

    #[test]
    fn addresses_outside_the_pod_networks_are_counted_and_never_in_the_pool() {
        let mut pool = tracker(Some(10));
        let step = pool.step(at(0), good(&["10.1.0.4", "192.0.2.66"]));
        assert_eq!(step.snapshot.unwrap().members, members(&["10.1.0.4"]));
        assert_eq!(step.newly_refused, ["192.0.2.66".parse::<IpAddr>().unwrap()]);
        let again = pool.step(at(10), good(&["10.1.0.4", "192.0.2.66"]));
        assert_eq!(again.newly_refused, Vec::<IpAddr>::new());
        assert_eq!(pool.refused_addresses(), 2);
    }

    #[test]
    fn an_answer_wholly_outside_the_pod_networks_keeps_the_last_good_pool() {
        let mut pool = tracker(Some(10));
        pool.step(at(0), good(&["10.1.0.4"]));
        let step = pool.step(at(10), good(&["192.0.2.66"]));
        let snapshot = step.snapshot.unwrap();
        assert_eq!(snapshot.members, members(&["10.1.0.4"]));
        assert!(matches!(snapshot.state, PoolState::LastGood { .. }));
        assert_eq!(step.next, RETRY);
    }

    #[test]
    fn nxdomain_empties_the_pool_only_after_the_hold_time() {
        let mut pool = tracker(None);
        pool.step(at(0), good(&["10.1.0.4"]));
        assert_eq!(pool.step(at(5), nxdomain()).snapshot.unwrap().members, members(&["10.1.0.4"]));
        let held = pool.step(at(10), nxdomain());
        assert_eq!((held.snapshot, held.next), (None, at(5)));
        let emptied = pool.step(at(15), nxdomain()).snapshot.unwrap();
        assert_eq!((emptied.members.len(), emptied.state), (0, PoolState::Fresh));
    }

    #[test]
    fn the_hold_time_is_never_shorter_than_valid_and_is_asked_again_at_its_end() {
        let mut pool = tracker(Some(30));
        pool.step(at(0), good(&["10.1.0.4"]));
        assert_eq!(pool.step(at(30), nxdomain()).next, at(30));
        assert_eq!(pool.step(at(40), nxdomain()).next, at(20));
        assert!(!pool.snapshot().members.is_empty());
        pool.step(at(60), nxdomain());
        assert!(pool.snapshot().members.is_empty());
    }

    #[test]
    fn a_good_answer_ends_the_hold_and_the_next_nxdomain_starts_another() {
        let mut pool = tracker(None);
        pool.step(at(0), good(&["10.1.0.4"]));
        pool.step(at(1), nxdomain());
        pool.step(at(6), good(&["10.1.0.4"]));
        pool.step(at(12), nxdomain());
        assert!(!pool.snapshot().members.is_empty());
    }

    #[test]
    fn a_server_that_fails_at_the_end_of_the_hold_does_not_empty_the_pool() {
        let mut pool = tracker(None);
        pool.step(at(0), good(&["10.1.0.4"]));
        pool.step(at(5), nxdomain());
        pool.step(at(20), failure());
        assert!(!pool.snapshot().members.is_empty());
    }

    #[test]
    fn other_networks_take_members_out_at_once() {
        let mut pool = tracker(Some(10));
        pool.step(at(0), good(&["10.1.0.4", "10.1.1.4"]));
        let timing = Timing { valid: None, retry: RETRY, hold: HOLD };
        let changed = pool.reconfigure(timing, vec!["10.1.1.0/24".parse().unwrap()]).unwrap();
        assert_eq!(changed.members, members(&["10.1.1.4"]));
    }

    fn outcome() -> impl Strategy<Value = Outcome> {
        let host = (0u8..4, 1u8..6, any::<bool>()).prop_map(|(net, host, inside)| {
            let address = if inside { format!("10.1.{net}.{host}:443") } else { format!("192.0.2.{host}:443") };
            PoolMember::new(address.parse().unwrap(), 1)
        });
        prop_oneof![
            3 => (proptest::collection::btree_set(host, 1..5), 0u64..60)
                .prop_map(|(members, ttl)| Outcome::Answer { members, ttl: Duration::from_secs(ttl) }),
            1 => Just(failure()),
            1 => Just(nxdomain()),
        ]
    }

    proptest! {
        #[test]
        fn whatever_happens_members_lie_inside_and_only_good_or_lasting_negative_answers_change_them(
            valid in proptest::option::of(1u64..30),
            steps in proptest::collection::vec((outcome(), 0u64..8), 1..60),
        ) {
            let mut pool = tracker(valid);
            let (mut now, mut sent) = (Duration::ZERO, pool.snapshot().clone());
            let mut negative_since: Option<Duration> = None;
            let hold = HOLD.max(Duration::from_secs(valid.unwrap_or(0)));
            for (outcome, pause) in steps {
                now += Duration::from_secs(pause);
                let before = pool.snapshot().members.clone();
                let step = pool.step(now, outcome.clone());
                let after = pool.snapshot().clone();
                prop_assert!(after.members.iter().all(|member| member.address.ip().to_string().starts_with("10.1.")));
                prop_assert!(step.next > Duration::ZERO);
                prop_assert!(step.next <= Duration::from_secs(valid.unwrap_or(60).max(1)));
                prop_assert_eq!(step.snapshot.is_some(), after != sent);
                match outcome {
                    Outcome::Answer { members, .. } => {
                        let inside: BTreeSet<PoolMember> =
                            members.into_iter().filter(|member| member.address.ip().to_string().starts_with("10.1.")).collect();
                        if inside.is_empty() {
                            prop_assert_eq!(&after.members, &before);
                        } else {
                            prop_assert_eq!(&after.members, &inside);
                            negative_since = None;
                        }
                    }
                    Outcome::Failure { .. } => prop_assert_eq!(&after.members, &before),
                    Outcome::Negative { .. } => {
                        let since = *negative_since.get_or_insert(now);
                        if now - since < hold {
                            prop_assert_eq!(&after.members, &before);
                        } else {
                            prop_assert!(after.members.is_empty());
                        }
                    }
                }
                sent = after;
            }
        }
    }
}
