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
    single.into_iter().map(|(address, weight)| PoolMember { address, weight }).collect()
}
