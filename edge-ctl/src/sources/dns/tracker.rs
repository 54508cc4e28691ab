//! What a DNS outcome means for a pool. Pure: time comes in, a pool and the delay of the next query come out.
//!
//! | outcome | pool | next query after |
//! |---|---|---|
//! | answer with addresses that may be backends | those addresses, at once | `valid`, else TTL |
//! | the same, but more than `shrink_limit` percent fewer | they and the missing ones, until every missing one is found dead by checks or such answers have lasted for `shrink_hold` | the same; at the end of the hold |
//! | answer with addresses, all refused | kept | retry |
//! | timeout, SERVFAIL, REFUSED, malformed, lame, truncated and TCP failed, ... | kept | retry |
//! | NXDOMAIN or NODATA | kept for `hold`, and while checks find a member alive; then empty | `valid`, else SOA TTL; at the end of the hold |

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use super::{
    evidence::Evidence,
    guard::{Guard, Refusal},
};
use crate::model::{PoolMember, PoolState};

/// Shortest interval between good answers: a TTL of 0 must not become a busy loop.
const MIN_INTERVAL: Duration = Duration::from_secs(1);
/// Longest: a TTL of years must not end discovery.
const MAX_INTERVAL: Duration = Duration::from_secs(3600);

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
    /// How long an answer must last that takes more than `shrink_limit` of the pool; zero: it counts at once.
    pub shrink_hold: Duration,
    /// Most that an answer may take at once, percent of the members.
    pub shrink_limit: u8,
}

impl Timing {
    fn interval(&self, ttl: Option<Duration>) -> Duration {
        self.valid.unwrap_or_else(|| ttl.unwrap_or(MIN_INTERVAL).clamp(MIN_INTERVAL, MAX_INTERVAL)).max(MIN_INTERVAL)
    }

    fn hold(&self) -> Duration {
        self.hold.max(self.valid.unwrap_or_default())
    }

    fn shrinks_too_much(&self, from: usize, to: usize) -> bool {
        !self.shrink_hold.is_zero() && from.saturating_sub(to) * 100 > from * usize::from(self.shrink_limit)
    }
}

/// How one query ended, over all servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Addresses, with port, weight and tier; and the shortest TTL among their records.
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

/// The members of a name and how far they can be trusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Members that the guard lets in.
    pub members: BTreeSet<PoolMember>,
    /// How far they can be trusted.
    pub state: PoolState,
}

/// A change that is not made yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Since when answers have asked for it.
    pub since: Duration,
    /// What it is and what it waits for, for users.
    pub reason: String,
    /// Members that stay although the answer left them out.
    pub kept: BTreeSet<SocketAddr>,
    /// Members when it began.
    from: usize,
    /// The answer left nothing.
    empty: bool,
}

/// What to do after an outcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Members or state changed: to be sent on.
    pub changed: bool,
    /// Delay of the next query.
    pub next: Duration,
    /// Addresses refused, those not already seen in the answer before.
    pub newly_refused: Vec<(IpAddr, Refusal)>,
    /// A hold began.
    pub hold_began: bool,
}

/// The pool of one name through time.
#[derive(Clone, Debug)]
pub struct PoolTracker {
    timing: Timing,
    guard: Guard,
    evidence: Evidence,
    pool: Pool,
    /// Survives failures: an answer that cannot be had neither ends a hold nor makes it come true.
    held: Option<Held>,
    last_good: Option<Duration>,
    error: Option<String>,
    refused: BTreeMap<IpAddr, (Refusal, Duration)>,
    counts: TrackerCounts,
}

/// What happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrackerCounts {
    /// Addresses refused, counted in every answer.
    pub refused: u64,
    /// Changes of the members.
    pub changes: u64,
    /// Changes that were held.
    pub holds: u64,
}

impl PoolTracker {
    /// A pool about which nothing is known.
    pub fn new(timing: Timing, guard: Guard) -> Self {
        Self {
            timing,
            guard,
            evidence: Evidence::default(),
            pool: Pool { members: BTreeSet::new(), state: PoolState::Unknown },
            held: None,
            last_good: None,
            error: None,
            refused: BTreeMap::new(),
            counts: TrackerCounts::default(),
        }
    }

    /// Takes in the members that serve although no answer has come in this life: what the first answer leaves out of
    /// them is held as from any pool.
    pub fn adopt(&mut self, members: BTreeSet<PoolMember>) {
        if self.pool.state == PoolState::Unknown {
            self.pool.members.extend(members.into_iter().filter(|one| self.guard.refuses(one.address.ip()).is_none()));
        }
    }

    /// Takes in how a query ended at `now`, a time on any clock that never goes back.
    pub fn step(&mut self, now: Duration, outcome: Outcome) -> Step {
        let (before, held) = (self.pool.clone(), self.held.is_some());
        let mut newly_refused = Vec::new();
        let next = match outcome {
            Outcome::Answer { members, ttl } => self.answer(now, members, ttl, &mut newly_refused),
            Outcome::Negative { reason, ttl } => self.negative(now, reason, ttl),
            Outcome::Failure { reason } => self.failure(reason),
        };
        let hold_began = self.held.is_some() && !held;
        self.counts.holds += u64::from(hold_began);
        self.counts.changes += u64::from(self.pool.members != before.members);
        Step { changed: self.pool != before, next, newly_refused, hold_began }
    }

    /// Takes in what checks say. True where a held change now has the agreement that it waited for: to be asked again at
    /// once, since only an answer makes it come true.
    pub fn heed(&mut self, evidence: Evidence) -> bool {
        let agreed = |held: &Held, evidence: &Evidence| held.kept.is_subset(&evidence.dead);
        let before = self.held.as_ref().is_some_and(|held| agreed(held, &self.evidence));
        self.evidence = evidence;
        !before && self.held.as_ref().is_some_and(|held| agreed(held, &self.evidence))
    }

    /// Changes intervals and what may be a backend. True where members had to go.
    pub fn reconfigure(&mut self, timing: Timing, guard: Guard) -> bool {
        self.timing = timing;
        self.guard = guard;
        let before = self.pool.members.len();
        let guard = &self.guard;
        self.pool.members.retain(|member| guard.refuses(member.address.ip()).is_none());
        if let Some(held) = &mut self.held {
            held.kept.retain(|member| guard.refuses(member.ip()).is_none());
        }
        let changed = self.pool.members.len() != before;
        self.counts.changes += u64::from(changed);
        changed
    }

    /// What may be a backend.
    pub fn guard(&self) -> &Guard {
        &self.guard
    }

    /// The pool as it is.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// When the last good answer came.
    pub fn last_good(&self) -> Option<Duration> {
        self.last_good
    }

    /// Why the last query brought no addresses, if it did not.
    pub fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    /// The change that waits, if one does.
    pub fn held(&self) -> Option<&Held> {
        self.held.as_ref()
    }

    /// Addresses that the last answer held and that may not be backends, with the time since when.
    pub fn refused(&self) -> &BTreeMap<IpAddr, (Refusal, Duration)> {
        &self.refused
    }

    /// What happened so far.
    pub fn counts(&self) -> TrackerCounts {
        self.counts
    }

    fn answer(
        &mut self,
        now: Duration,
        members: BTreeSet<PoolMember>,
        ttl: Duration,
        newly_refused: &mut Vec<(IpAddr, Refusal)>,
    ) -> Duration {
        let inside = self.let_in(now, members, newly_refused);
        if inside.is_empty() {
            return self.failure(format!("all {} addresses of the answer are refused", self.refused.len()));
        }
        self.last_good = Some(now);
        self.error = None;
        let answer = one_each(inside);
        let interval = self.timing.interval(Some(ttl));
        let Some(held) = self.shrink(now, &answer) else {
            self.held = None;
            self.pool = Pool { members: answer, state: PoolState::Fresh };
            return interval;
        };
        let kept = self.pool.members.iter().filter(|member| held.kept.contains(&member.address)).copied();
        let members = one_each(kept.chain(answer).collect());
        self.pool = Pool { members, state: PoolState::LastGood { reason: held.reason.clone() } };
        let left = self.timing.shrink_hold.saturating_sub(now.saturating_sub(held.since));
        self.held = Some(held);
        interval.min(left.max(MIN_INTERVAL))
    }

    /// Members that may be backends; takes note of the others.
    fn let_in(
        &mut self,
        now: Duration,
        members: BTreeSet<PoolMember>,
        newly_refused: &mut Vec<(IpAddr, Refusal)>,
    ) -> BTreeSet<PoolMember> {
        let mut refused = BTreeMap::new();
        let mut inside = BTreeSet::new();
        for member in members {
            let address = member.address.ip();
            match self.guard.refuses(address) {
                None => drop(inside.insert(member)),
                Some(refusal) => {
                    let since = self.refused.get(&address).map_or(now, |(_, since)| *since);
                    refused.insert(address, (refusal, since));
                }
            }
        }
        self.counts.refused += refused.len() as u64;
        let new = refused.iter().filter(|(address, _)| !self.refused.contains_key(*address));
        newly_refused.extend(new.map(|(address, (refusal, _))| (*address, *refusal)));
        self.refused = refused;
        inside
    }

    /// The hold that `answer` begins or goes on with; `None`: it counts.
    fn shrink(&self, now: Duration, answer: &BTreeSet<PoolMember>) -> Option<Held> {
        let going_on = self.held.as_ref().filter(|held| !held.empty);
        let from = going_on.map_or(self.pool.members.len(), |held| held.from);
        let since = going_on.map_or(now, |held| held.since);
        let named: BTreeSet<SocketAddr> = answer.iter().map(|member| member.address).collect();
        let missing = self.pool.members.iter().map(|member| member.address).filter(|known| !named.contains(known));
        let kept: BTreeSet<SocketAddr> = missing.filter(|missing| !self.evidence.dead.contains(missing)).collect();
        let over = now.saturating_sub(since) >= self.timing.shrink_hold;
        if over || kept.is_empty() || !self.timing.shrinks_too_much(from, named.len()) {
            return None;
        }
        let reason = format!(
            "the answer has {} of {from} members; the missing ones stay until checks find them down, or for {:?}",
            named.len(),
            self.timing.shrink_hold
        );
        Some(Held { since, reason, kept, from, empty: false })
    }

    fn negative(&mut self, now: Duration, reason: String, ttl: Option<Duration>) -> Duration {
        let since = self.held.as_ref().filter(|held| held.empty).map_or(now, |held| held.since);
        let age = now.saturating_sub(since);
        let interval = self.timing.interval(ttl);
        self.error = Some(reason.clone());
        if self.pool.members.is_empty() && self.pool.state == PoolState::Fresh {
            return interval;
        }
        let kept: BTreeSet<SocketAddr> = self.pool.members.iter().map(|member| member.address).collect();
        let agreed = !self.evidence.checked || kept.is_subset(&self.evidence.dead);
        if age >= self.timing.hold() && agreed {
            self.held = None;
            self.pool = Pool { members: BTreeSet::new(), state: PoolState::Fresh };
            return interval;
        }
        let waits = match age < self.timing.hold() {
            true => format!("kept for {:?}", self.timing.hold()),
            false => "kept while checks find a member alive".to_owned(),
        };
        self.held = Some(Held { since, reason: format!("{reason}; {waits}"), from: kept.len(), kept, empty: true });
        self.doubt(reason);
        match self.timing.hold().saturating_sub(age) {
            Duration::ZERO => interval,
            left => interval.min(left),
        }
    }

    fn failure(&mut self, reason: String) -> Duration {
        self.error = Some(reason.clone());
        self.doubt(reason);
        self.timing.retry
    }

    /// Keeps the members. What was never known stays unknown.
    fn doubt(&mut self, reason: String) {
        if self.pool.state != PoolState::Unknown {
            self.pool.state = PoolState::LastGood { reason };
        }
    }
}

/// An answer may list the same address and port twice; the pool has it once, with the larger weight and the first tier.
fn one_each(members: BTreeSet<PoolMember>) -> BTreeSet<PoolMember> {
    let mut single: BTreeMap<SocketAddr, PoolMember> = BTreeMap::new();
    for member in members {
        let known = single.entry(member.address).or_insert(member);
        known.weight = known.weight.max(member.weight);
        known.tier = known.tier.min(member.tier);
    }
    single.into_values().collect()
}

#[cfg(test)]
mod tests;
