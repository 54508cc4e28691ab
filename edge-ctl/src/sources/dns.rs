//! Pools read from DNS: one task for each distinct question, over what [`tracker`] decides. Services that ask the same
//! question share its answers, whatever their ports.

mod evidence;
mod guard;
mod query;
mod show;
pub mod tracker;
mod zone;

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{BuildHasher, Hasher},
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hickory_resolver::proto::rr::Name;
use ipnet::IpNet;
use tokio::{
    sync::{Notify, mpsc},
    task::AbortHandle,
    time::Instant,
};

pub use self::{
    evidence::{Evidence, gather},
    guard::{Guard, Refusal},
    query::{Class, Counts},
};
use self::{
    tracker::{Outcome, PoolTracker, Step, Timing},
    zone::Zone,
};
use crate::model::{BackendSource, PoolMember, PoolSnapshot, PoolState, RecordType, Resolver};

/// Timings that the configuration does not name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DnsOptions {
    /// How long one server may take before the next is asked.
    pub server_timeout: Duration,
    /// How soon a failed query is repeated.
    pub retry: Duration,
}

impl Default for DnsOptions {
    fn default() -> Self {
        Self { server_timeout: Duration::from_secs(1), retry: Duration::from_secs(1) }
    }
}

/// Longest that one refresh of a name may take, over all servers, aliases and SRV targets.
const LONGEST_REFRESH: Duration = Duration::from_secs(30);
/// Refreshes come up to a tenth early, so that names asked for together do not stay together.
const JITTER_PARTS: u32 = 10;

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Question {
    /// The name, as configured.
    pub name: String,
    /// Name of the `[resolver.NAME]` table.
    pub resolver: String,
    /// Record type.
    pub record: RecordType,
}

impl Question {
    /// What a source asks; `None`: it is not DNS.
    pub fn of(source: &BackendSource) -> Option<Self> {
        match source {
            BackendSource::Dns { name, resolver, record, .. } => {
                Some(Self { name: name.clone(), resolver: resolver.clone(), record: *record })
            }
            BackendSource::Static(_) => None,
        }
    }

    /// What a resolver asks itself about its servers; `None`: they are as configured.
    fn of_servers(resolver: &Resolver) -> Option<Self> {
        let follow = resolver.policy.follow.as_ref()?;
        Some(Self { name: follow.name.clone(), resolver: resolver.name.clone(), record: follow.record })
    }

    /// A backend's address as the answer names it: SRV brings ports, the others do not.
    pub fn as_member(&self, backend: SocketAddr) -> SocketAddr {
        match self.record {
            RecordType::Srv => backend,
            RecordType::A | RecordType::Aaaa => SocketAddr::new(backend.ip(), 0),
        }
    }
}

/// Starts asking for `sources` (those that are not DNS are left out) and sends a snapshot to `out` whenever the members
/// or the state of a pool change. Nothing is sent for a pool about which nothing is known yet.
pub fn spawn_dns(
    sources: Vec<(BackendSource, Resolver)>,
    guard: impl Into<Guard>,
    out: mpsc::Sender<PoolSnapshot>,
) -> DnsHandle {
    spawn_dns_with(DnsOptions::default(), sources, guard, out)
}

/// As [`spawn_dns`], with other timings.
pub fn spawn_dns_with(
    options: DnsOptions,
    sources: Vec<(BackendSource, Resolver)>,
    guard: impl Into<Guard>,
    out: mpsc::Sender<PoolSnapshot>,
) -> DnsHandle {
    let handle = DnsHandle { book: Arc::default(), options, out };
    handle.reconfigure(sources, guard);
    handle
}

/// The way to the tasks. Cheap to clone; they end with the last handle.
#[derive(Clone)]
pub struct DnsHandle {
    book: Arc<Mutex<Book>>,
    options: DnsOptions,
    out: mpsc::Sender<PoolSnapshot>,
}

/// What runs.
#[derive(Default)]
struct Book {
    tasks: BTreeMap<Question, Task>,
    /// Resolvers that are asked, by name.
    zones: BTreeMap<String, Arc<Zone>>,
}

/// Aborts its task when dropped.
struct Task {
    shared: Arc<Shared>,
    abort: AbortHandle,
}

impl Drop for Task {
    fn drop(&mut self) {
        self.abort.abort();
    }
}

struct Shared {
    state: Mutex<State>,
    zone: Arc<Zone>,
    /// Ask now: a refresh, or other settings.
    wake: Notify,
    started: Instant,
}

struct State {
    resolver: Resolver,
    /// Who asks.
    sources: BTreeSet<BackendSource>,
    /// Those that are to be told of the pool before the next query.
    untold: BTreeSet<BackendSource>,
    tracker: PoolTracker,
    /// Where the resolver has search domains: the name that was found, which is asked from then on.
    found: Option<Name>,
    counts: Counts,
    next_at: Option<Instant>,
}

impl State {
    /// The snapshot for one of those that ask.
    fn snapshot(&self, source: &BackendSource) -> PoolSnapshot {
        let pool = self.tracker.pool();
        let port = match source {
            BackendSource::Dns { port, .. } => *port,
            BackendSource::Static(_) => None,
        };
        let with_port = |member: &PoolMember| match port {
            Some(port) => PoolMember { address: SocketAddr::new(member.address.ip(), port), ..*member },
            None => *member,
        };
        PoolSnapshot {
            source: source.clone(),
            members: pool.members.iter().map(with_port).collect(),
            state: pool.state.clone(),
        }
    }
}

impl DnsHandle {
    /// Asks for every name now, or for one; how many that are.
    pub fn refresh(&self, name: Option<&str>) -> usize {
        let book = self.book();
        let wanted = |question: &&Question| name.is_none_or(|name| same_name(&question.name, name));
        let woken = book.tasks.keys().filter(wanted).filter_map(|question| book.tasks.get(question));
        woken.map(|task| task.shared.wake.notify_one()).count()
    }

    /// The way to these networks has changed: connections to servers there are made anew, and their names asked now.
    pub fn rerouted(&self, prefixes: &[IpNet]) {
        let book = self.book();
        for task in book.tasks.values() {
            let servers = task.shared.zone.addresses();
            if servers.iter().any(|server| prefixes.iter().any(|prefix| prefix.contains(&server.ip()))) {
                task.shared.zone.reconnect(&servers, self.options.server_timeout);
                task.shared.wake.notify_one();
            }
        }
    }

    /// Takes in what checks say of members. A name whose held change they agree to is asked at once.
    pub fn heed(&self, mut evidence: BTreeMap<Question, Evidence>) {
        for (question, task) in &self.book().tasks {
            if task.shared.state().tracker.heed(evidence.remove(question).unwrap_or_default()) {
                task.shared.wake.notify_one();
            }
        }
    }

    /// The pool that serves `source` from an earlier life: see [`PoolTracker::adopt`].
    pub fn adopt(&self, source: &BackendSource, members: impl IntoIterator<Item = PoolMember>) {
        let Some(question) = Question::of(source) else { return };
        if let Some(task) = self.book().tasks.get(&question) {
            let named = |member: PoolMember| PoolMember { address: question.as_member(member.address), ..member };
            task.shared.state().tracker.adopt(members.into_iter().map(named).collect());
        }
    }

    /// This host's addresses are others.
    pub fn own_addresses(&self, own: &BTreeSet<IpAddr>) {
        for task in self.book().tasks.values() {
            let mut state = task.shared.state();
            if state.tracker.guard().own == *own {
                continue;
            }
            let guard = Guard { own: own.clone(), ..state.tracker.guard().clone() };
            let timing = self.timing(&state.resolver);
            if state.tracker.reconfigure(timing, guard) {
                state.untold = state.sources.clone();
                task.shared.wake.notify_one();
            }
        }
    }

    /// Takes over another set of sources, resolvers and rules. What a name has learnt stays, whatever of its settings
    /// changes; names that are no longer asked for are forgotten.
    pub fn reconfigure(&self, sources: Vec<(BackendSource, Resolver)>, guard: impl Into<Guard>) {
        let guard = guard.into();
        let mut asked: BTreeMap<Question, (Resolver, BTreeSet<BackendSource>)> = BTreeMap::new();
        for (_, resolver) in &sources {
            if let Some(question) = Question::of_servers(resolver) {
                asked.entry(question).or_insert_with(|| (resolver.clone(), BTreeSet::new()));
            }
        }
        for (source, resolver) in sources {
            if let Some(question) = Question::of(&source) {
                asked.entry(question).or_insert_with(|| (resolver, BTreeSet::new())).1.insert(source);
            }
        }
        let mut book = self.book();
        book.tasks.retain(|question, _| asked.contains_key(question));
        book.zones.retain(|name, _| asked.keys().any(|question| question.resolver == *name));
        for (question, (resolver, sources)) in asked {
            let timeout = self.options.server_timeout;
            let zone =
                book.zones.entry(resolver.name.clone()).or_insert_with(|| Arc::new(Zone::new(&resolver, timeout)));
            zone.reconfigure(&resolver, timeout);
            let zone = Arc::clone(zone);
            match book.tasks.get(&question) {
                Some(task) => self.change(&task.shared, resolver, sources, &guard),
                None => {
                    let task = self.start(question.clone(), resolver, sources, zone, guard.clone());
                    book.tasks.insert(question, task);
                }
            }
        }
    }

    fn timing(&self, resolver: &Resolver) -> Timing {
        Timing {
            valid: resolver.valid,
            retry: self.options.retry,
            hold: resolver.policy.hold,
            shrink_hold: resolver.policy.shrink_hold,
            shrink_limit: resolver.policy.shrink_limit,
        }
    }

    fn change(&self, shared: &Shared, resolver: Resolver, sources: BTreeSet<BackendSource>, guard: &Guard) {
        let mut state = shared.state();
        let new: Vec<BackendSource> = sources.difference(&state.sources).cloned().collect();
        if new.is_empty() && state.sources == sources && state.resolver == resolver && state.tracker.guard() == guard {
            return;
        }
        state.untold.extend(new);
        state.sources = sources;
        if state.resolver.policy.search != resolver.policy.search {
            state.found = None;
        }
        let timing = self.timing(&resolver);
        if state.tracker.reconfigure(timing, guard.clone()) {
            state.untold = state.sources.clone();
        }
        state.resolver = resolver;
        drop(state);
        shared.wake.notify_one();
    }

    fn start(
        &self,
        question: Question,
        resolver: Resolver,
        sources: BTreeSet<BackendSource>,
        zone: Arc<Zone>,
        guard: Guard,
    ) -> Task {
        let state = State {
            tracker: PoolTracker::new(self.timing(&resolver), guard),
            resolver,
            sources,
            untold: BTreeSet::new(),
            found: None,
            counts: Counts::default(),
            next_at: None,
        };
        let shared = Shared { state: Mutex::new(state), zone, wake: Notify::new(), started: Instant::now() };
        let shared = Arc::new(shared);
        let task =
            tokio::spawn(ask_for_ever(question, Arc::clone(&shared), self.out.clone(), self.options.server_timeout));
        Task { shared, abort: task.abort_handle() }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Names are equal whatever their case and final dot (RFC 4343).
fn same_name(one: &str, other: &str) -> bool {
    one.trim_end_matches('.').eq_ignore_ascii_case(other.trim_end_matches('.'))
}

/// Asks, sends what changed, waits: until the receiver of the snapshots is gone.
async fn ask_for_ever(question: Question, shared: Arc<Shared>, out: mpsc::Sender<PoolSnapshot>, timeout: Duration) {
    loop {
        if tell(&shared, &out).await.is_none() {
            return;
        }
        let mut counts = Counts::default();
        let refresh = tokio::time::timeout(LONGEST_REFRESH, ask(&question, &shared, &mut counts)).await;
        let outcome = refresh.unwrap_or_else(|_| Outcome::Failure {
            reason: format!("aliases and SRV targets took longer than {LONGEST_REFRESH:?}"),
        });
        let next = conclude(&shared, &question, outcome, &counts);
        follow(&shared, &question, timeout);
        if tell(&shared, &out).await.is_none() {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(next) => {}
            () = shared.wake.notified() => {}
        }
    }
}

/// Sends what those that ask do not know yet; `None` where nobody listens any more.
async fn tell(shared: &Shared, out: &mpsc::Sender<PoolSnapshot>) -> Option<()> {
    let snapshots: Vec<PoolSnapshot> = {
        let mut state = shared.state();
        let untold = std::mem::take(&mut state.untold);
        let known = state.tracker.pool().state != PoolState::Unknown;
        untold.iter().filter(|_| known).map(|source| state.snapshot(source)).collect()
    };
    for snapshot in snapshots {
        out.send(snapshot).await.ok()?;
    }
    Some(())
}

/// One refresh. With search domains the first name that exists is taken, and asked from then on: that it has no records
/// for a while must not make another one's the pool.
async fn ask(question: &Question, shared: &Shared, counts: &mut Counts) -> Outcome {
    let (candidates, known) = {
        let state = shared.state();
        match &state.found {
            Some(found) => (vec![Ok(found.clone())], true),
            None => (candidates(&question.name, &state.resolver.policy.search), false),
        }
    };
    let several = candidates.len() > 1;
    let mut last = Outcome::Failure { reason: "no name to ask for".into() };
    for name in candidates {
        let name = match name {
            Ok(name) => name,
            Err(reason) => return Outcome::Failure { reason },
        };
        last = shared.zone.members(&name, question.record, counts).await;
        match &last {
            Outcome::Negative { .. } => {}
            Outcome::Failure { .. } => break,
            Outcome::Answer { .. } => {
                if several && !known {
                    tracing::info!(name = question.name, found = %name, "the name was found by search domain");
                    shared.state().found = Some(name);
                }
                break;
            }
        }
    }
    last
}

/// What is asked in turn: the name under each search domain, then as it stands.
fn candidates(name: &str, search: &[String]) -> Vec<Result<Name, String>> {
    let absolute = |text: &str| {
        let text = format!("{}.", text.trim_end_matches('.'));
        Name::from_ascii(&text).map_err(|error| format!("`{text}` is not a DNS name: {error}"))
    };
    let under = search.iter().filter(|_| !name.ends_with('.'));
    under.map(|domain| absolute(&format!("{name}.{domain}"))).chain([absolute(name)]).collect()
}

fn conclude(shared: &Shared, question: &Question, outcome: Outcome, counts: &Counts) -> Duration {
    let mut state = shared.state();
    state.counts.add(counts);
    let step = state.tracker.step(shared.started.elapsed(), outcome);
    let next = match state.tracker.held() {
        Some(_) => step.next,
        None => early(step.next, random()),
    };
    state.next_at = Some(Instant::now() + next);
    report(question, &state.tracker, &step);
    if step.changed {
        state.untold = state.sources.clone();
    }
    next
}

/// Where this pool is the resolver's own servers, they are asked from now on. An empty pool leaves them as they are: somebody
/// has to be asked when they are back.
fn follow(shared: &Shared, question: &Question, timeout: Duration) {
    let state = shared.state();
    let Some(follow) = state.resolver.policy.follow.as_ref() else { return };
    let members = &state.tracker.pool().members;
    if Question::of_servers(&state.resolver).as_ref() != Some(question) || members.is_empty() {
        return;
    }
    let address = |member: &PoolMember| match member.address {
        address if address.port() == 0 => SocketAddr::new(address.ip(), follow.port),
        address => address,
    };
    shared.zone.follow(members.iter().map(address).collect(), &state.resolver, timeout);
}

fn report(question: &Question, tracker: &PoolTracker, step: &Step) {
    let (name, record) = (&question.name, question.record);
    for (address, refusal) in &step.newly_refused {
        tracing::warn!(name, %record, %address, reason = %refusal, "address in a DNS answer refused; not used");
    }
    if let (true, Some(held)) = (step.hold_began, tracker.held()) {
        tracing::warn!(name, %record, members = held.kept.len(), reason = held.reason, "change of a DNS pool held");
    }
    if step.changed {
        let members = tracker.pool().members.len();
        match &tracker.pool().state {
            PoolState::LastGood { reason } => tracing::warn!(name, %record, members, %reason, "DNS pool kept"),
            _ => tracing::info!(name, %record, members, "DNS pool changed"),
        }
    }
}

/// An interval less up to a tenth of it.
fn early(interval: Duration, random: u32) -> Duration {
    interval - (interval / JITTER_PARTS).mul_f64(f64::from(random) / f64::from(u32::MAX))
}

/// Good enough to spread load: the key of a new hasher is random.
fn random() -> u32 {
    let bits = std::collections::hash_map::RandomState::new().build_hasher().finish();
    (bits >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refresh_comes_up_to_a_tenth_early_and_never_late() {
        let interval = Duration::from_secs(10);
        assert_eq!(early(interval, 0), interval);
        assert_eq!(early(interval, u32::MAX), Duration::from_secs(9));
    }

    #[test]
    fn search_domains_are_tried_in_order_before_the_name_itself_and_a_final_dot_rules_them_out() {
        let search = ["svc.cluster.local".to_owned(), "cluster.local".to_owned()];
        let names =
            |name| candidates(name, &search).into_iter().map(|name| name.unwrap().to_ascii()).collect::<Vec<_>>();
        assert_eq!(names("web.prod"), ["web.prod.svc.cluster.local.", "web.prod.cluster.local.", "web.prod."]);
        assert_eq!(names("web.example.com."), ["web.example.com."]);
        assert_eq!(candidates("web.prod", &[]).len(), 1);
    }
}
