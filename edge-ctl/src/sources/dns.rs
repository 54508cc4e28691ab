//! Pools read from DNS: one task for each distinct source, over what [`tracker`] decides.

mod query;
pub mod tracker;

use std::{
    collections::{BTreeMap, BTreeSet},
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

pub use self::query::{Class, Counts};
use self::{
    query::Servers,
    tracker::{Outcome, PoolTracker, Timing},
};
use crate::model::{BackendSource, PoolSnapshot, PoolState, RecordType, Resolver, view::DnsRow};

/// Timings that the configuration does not name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DnsOptions {
    /// How long one server may take before the next is asked.
    pub server_timeout: Duration,
    /// How soon a failed query is repeated.
    pub retry: Duration,
    /// How long NXDOMAIN or NODATA must last before a pool becomes empty; `valid` where that is longer.
    pub hold: Duration,
}

impl Default for DnsOptions {
    fn default() -> Self {
        Self { server_timeout: Duration::from_secs(1), retry: Duration::from_secs(1), hold: Duration::from_secs(10) }
    }
}

/// Starts asking for `sources` (those that are not DNS are left out) and sends a snapshot to `out` whenever the members
/// or the state of a pool change. Nothing is sent for a pool about which nothing is known yet.
pub fn spawn_dns(
    sources: Vec<(BackendSource, Resolver)>,
    pod_networks: Vec<IpNet>,
    out: mpsc::Sender<PoolSnapshot>,
) -> DnsHandle {
    spawn_dns_with(DnsOptions::default(), sources, pod_networks, out)
}

/// As [`spawn_dns`], with other timings.
pub fn spawn_dns_with(
    options: DnsOptions,
    sources: Vec<(BackendSource, Resolver)>,
    pod_networks: Vec<IpNet>,
    out: mpsc::Sender<PoolSnapshot>,
) -> DnsHandle {
    let handle = DnsHandle { tasks: Arc::default(), options, out };
    handle.reconfigure(sources, pod_networks);
    handle
}

/// The way to the tasks. Cheap to clone; they end with the last handle.
#[derive(Clone)]
pub struct DnsHandle {
    tasks: Arc<Mutex<BTreeMap<BackendSource, Task>>>,
    options: DnsOptions,
    out: mpsc::Sender<PoolSnapshot>,
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
    /// Ask now: a refresh, or other settings.
    wake: Notify,
    started: Instant,
}

struct State {
    resolver: Resolver,
    networks: Vec<IpNet>,
    servers: Arc<Servers>,
    tracker: PoolTracker,
    counts: Counts,
    next_at: Option<Instant>,
    /// To be sent before the next query.
    pending: Option<PoolSnapshot>,
}

impl DnsHandle {
    /// One row for each source, by name.
    pub fn rows(&self) -> Vec<DnsRow> {
        let tasks = self.tasks();
        tasks.iter().filter_map(|(source, task)| row(source, &task.shared)).collect()
    }

    /// Queries by record type and responses by class, summed over all sources.
    pub fn counts(&self) -> Counts {
        let mut sum = Counts::default();
        for task in self.tasks().values() {
            let state = task.shared.state();
            for (kind, count) in &state.counts.requests {
                *sum.requests.entry(kind).or_default() += count;
            }
            for (class, count) in &state.counts.responses {
                *sum.responses.entry(*class).or_default() += count;
            }
        }
        sum
    }

    /// Asks for every source now, as when a route to the servers has appeared.
    pub fn refresh(&self) {
        for task in self.tasks().values() {
            task.shared.wake.notify_one();
        }
    }

    /// Takes over another set of sources, resolvers and networks. What a source has learnt stays, whatever of its
    /// settings changes; sources that are no longer named are forgotten.
    pub fn reconfigure(&self, sources: Vec<(BackendSource, Resolver)>, pod_networks: Vec<IpNet>) {
        let mut tasks = self.tasks();
        let named: BTreeSet<&BackendSource> = sources.iter().map(|(source, _)| source).collect();
        tasks.retain(|source, _| named.contains(source));
        for (source, resolver) in sources {
            if !matches!(source, BackendSource::Dns { .. }) {
                continue;
            }
            match tasks.get(&source) {
                Some(task) => self.change(&task.shared, resolver, &pod_networks),
                None => {
                    let task = self.start(source.clone(), resolver, pod_networks.clone());
                    tasks.insert(source, task);
                }
            }
        }
    }

    fn timing(&self, resolver: &Resolver) -> Timing {
        Timing { valid: resolver.valid, retry: self.options.retry, hold: self.options.hold }
    }

    fn servers(&self, resolver: &Resolver) -> Arc<Servers> {
        Arc::new(Servers::new(&resolver.servers, self.options.server_timeout))
    }

    fn change(&self, shared: &Shared, resolver: Resolver, networks: &[IpNet]) {
        let mut state = shared.state();
        if state.resolver == resolver && state.networks == networks {
            return;
        }
        if state.resolver.servers != resolver.servers {
            state.servers = self.servers(&resolver);
        }
        let changed = state.tracker.reconfigure(self.timing(&resolver), networks.to_vec());
        state.pending = changed.or(state.pending.take());
        state.networks = networks.to_vec();
        state.resolver = resolver;
        drop(state);
        shared.wake.notify_one();
    }

    fn start(&self, source: BackendSource, resolver: Resolver, networks: Vec<IpNet>) -> Task {
        let state = State {
            servers: self.servers(&resolver),
            tracker: PoolTracker::new(source.clone(), self.timing(&resolver), networks.clone()),
            resolver,
            networks,
            counts: Counts::default(),
            next_at: None,
            pending: None,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), wake: Notify::new(), started: Instant::now() });
        let task = tokio::spawn(ask_for_ever(source, Arc::clone(&shared), self.out.clone()));
        Task { shared, abort: task.abort_handle() }
    }

    fn tasks(&self) -> MutexGuard<'_, BTreeMap<BackendSource, Task>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks, sends what changed, waits: until the receiver of the snapshots is gone.
async fn ask_for_ever(source: BackendSource, shared: Arc<Shared>, out: mpsc::Sender<PoolSnapshot>) {
    let BackendSource::Dns { name: text, port, record, .. } = &source else { return };
    // Fully qualified: search lists and `ndots` are for hosts, not for a daemon.
    let name = Name::from_ascii(format!("{}.", text.trim_end_matches('.')));
    loop {
        let pending = shared.state().pending.take();
        if let Some(snapshot) = pending
            && out.send(snapshot).await.is_err()
        {
            return;
        }
        let (servers, mut counts) = {
            let state = shared.state();
            (Arc::clone(&state.servers), Counts::default())
        };
        let outcome = match &name {
            Ok(name) => servers.members(name, *record, *port, &mut counts).await,
            Err(error) => Outcome::Failure { reason: format!("`{text}` is not a DNS name: {error}") },
        };
        let (snapshot, next) = conclude(&shared, text, *record, outcome, counts);
        if let Some(snapshot) = snapshot
            && out.send(snapshot).await.is_err()
        {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(next) => {}
            () = shared.wake.notified() => {}
        }
    }
}

fn conclude(
    shared: &Shared,
    name: &str,
    record: RecordType,
    outcome: Outcome,
    counts: Counts,
) -> (Option<PoolSnapshot>, Duration) {
    let mut state = shared.state();
    for (kind, count) in counts.requests {
        *state.counts.requests.entry(kind).or_default() += count;
    }
    for (class, count) in counts.responses {
        *state.counts.responses.entry(class).or_default() += count;
    }
    let step = state.tracker.step(shared.started.elapsed(), outcome);
    state.next_at = Some(Instant::now() + step.next);
    for address in &step.newly_refused {
        tracing::warn!(name, %record, %address, "address outside pod_networks in a DNS answer; not used");
    }
    if let Some(snapshot) = &step.snapshot {
        let members = snapshot.members.len();
        match &snapshot.state {
            PoolState::LastGood { reason } => tracing::warn!(name, %record, members, %reason, "DNS pool kept"),
            _ => tracing::info!(name, %record, members, "DNS pool changed"),
        }
    }
    (step.snapshot, step.next)
}

fn row(source: &BackendSource, shared: &Shared) -> Option<DnsRow> {
    let BackendSource::Dns { name, resolver, record, .. } = source else { return None };
    let state = shared.state();
    let now = shared.started.elapsed();
    let tracker = &state.tracker;
    let snapshot = tracker.snapshot();
    let responses = Class::ALL
        .map(|class| (class.name().to_owned(), state.counts.responses.get(&class).copied().unwrap_or_default()));
    Some(DnsRow {
        name: name.clone(),
        kind: record.to_string(),
        resolver: resolver.clone(),
        addresses: snapshot.members.iter().map(|member| member.address.to_string()).collect(),
        state: match snapshot.state {
            PoolState::Unknown => "unknown",
            PoolState::Fresh => "fresh",
            PoolState::LastGood { .. } => "last-good",
        }
        .to_owned(),
        age: tracker.last_good().map(|at| now.saturating_sub(at).as_secs()),
        next: state.next_at.map(|at| at.saturating_duration_since(Instant::now()).as_secs()),
        error: tracker.error().map(str::to_owned),
        requests: state.counts.requests.values().sum(),
        responses: responses.into(),
        refused_addresses: tracker.refused_addresses(),
    })
}
