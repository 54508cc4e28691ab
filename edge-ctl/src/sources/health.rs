//! Health of backends. What results mean is decided in [`state`], [`passive`], [`panic`] and [`book`]; this is the shell:
//! one task with a timer for each backend and a bounded number of checks on their way.

pub mod book;
pub mod panic;
pub mod passive;
pub mod probe;
pub mod state;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    hash::{BuildHasher, RandomState},
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{FutureExt, StreamExt};
use tokio::{
    sync::watch,
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep_until},
};
use tokio_util::time::DelayQueue;
use tracing::{info, warn};

pub use book::{Target, Targets, Verdicts};

use self::{
    book::{Book, Event},
    probe::tls::{self, Connector},
    state::Outcome,
};
use crate::model::{
    Check, Endpoint, Health, HealthKey, PassiveCounters, Tls,
    view::{HealthEventRow, HealthRow},
};

/// Most checks on their way at once, descriptors permitting.
const MOST_CHECKS: usize = 4096;
/// Where the limit of descriptors cannot be read.
const FEW_CHECKS: usize = 256;
/// Changes that come within this time are told together: the state is built once for all of them.
const TOLD_TOGETHER: Duration = Duration::from_millis(10);

/// How punctual checks are, and what they use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Checks on their way now.
    pub running: usize,
    /// Most at once since the start.
    pub most_running: usize,
    /// Checks started, by how late they were: bucket n holds those less than 2^n microseconds late.
    pub lateness: [u64; 32],
}

impl Load {
    fn note(&mut self, late: Duration) {
        let micros = u64::try_from(late.as_micros()).unwrap_or(u64::MAX);
        let bucket = usize::try_from(u64::BITS - micros.leading_zeros()).unwrap_or(0);
        if let Some(count) = self.lateness.get_mut(bucket.min(31)) {
            *count += 1;
        }
    }

    /// Upper bound of the bucket in which `share` (0 to 1) of all checks have started; zero where there were none.
    pub fn lateness(&self, share: f64) -> Duration {
        let all: u64 = self.lateness.iter().sum();
        let mut seen = 0;
        for (bucket, count) in self.lateness.iter().enumerate() {
            seen += count;
            if all > 0 && seen as f64 >= all as f64 * share {
                return Duration::from_micros(1 << bucket);
            }
        }
        Duration::ZERO
    }
}

/// The way to the task. Cheap to clone; it ends with the last handle.
#[derive(Clone)]
pub struct HealthHandle {
    shared: Arc<Shared>,
    targets: Arc<watch::Sender<Arc<Targets>>>,
    verdicts: watch::Receiver<Arc<Verdicts>>,
    _task: Arc<Task>,
}

/// Aborts its task when dropped.
struct Task(AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Shared {
    start: Instant,
    state: Mutex<(Book, Load)>,
    tell: watch::Sender<Arc<Verdicts>>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, (Book, Load)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }
}

/// Starts without targets.
pub fn spawn() -> HealthHandle {
    let (targets, inbox) = watch::channel(Arc::default());
    let (tell, verdicts) = watch::channel(Arc::default());
    let shared = Arc::new(Shared { start: Instant::now(), state: Mutex::default(), tell });
    let checker = Checker {
        shared: Arc::clone(&shared),
        queue: DelayQueue::new(),
        running: JoinSet::new(),
        connectors: HashMap::new(),
        random: Random(RandomState::new().hash_one(std::process::id()) | 1),
        most: most_checks(),
        tell_at: None,
    };
    let task = tokio::spawn(checker.run(inbox));
    HealthHandle { shared, targets: Arc::new(targets), verdicts, _task: Arc::new(Task(task.abort_handle())) }
}

impl HealthHandle {
    /// Checks these from now on, in place of all others, or of the others of these services, where they are named.
    pub fn retarget(&self, targets: Targets, services: Option<&BTreeSet<String>>) {
        self.targets.send_if_modified(|current| {
            let changed = match services {
                None => **current != targets,
                Some(services) => !services.iter().flat_map(|name| book::of_service(current, name)).eq(&targets),
            };
            if changed {
                let mut all = targets;
                if let Some(services) = services {
                    let others = current.iter().filter(|((name, _), _)| !services.contains(name));
                    all.extend(others.map(|(key, target)| (key.clone(), target.clone())));
                }
                *current = Arc::new(all);
            }
            changed
        });
    }

    /// Told anew whenever a verdict changes or a target comes or goes.
    pub fn verdicts(&self) -> watch::Receiver<Arc<Verdicts>> {
        self.verdicts.clone()
    }

    /// One row for each target.
    pub fn rows(&self) -> Vec<HealthRow> {
        self.shared.state().0.rows(self.shared.now())
    }

    /// The row of one target.
    pub fn row(&self, key: &HealthKey) -> Option<HealthRow> {
        self.shared.state().0.row_of(self.shared.now(), key)
    }

    /// State changes, newest first.
    pub fn history(&self) -> Vec<HealthEventRow> {
        self.shared.state().0.history(self.shared.now())
    }

    /// How punctual checks are.
    pub fn load(&self) -> Load {
        self.shared.state().1
    }

    /// Takes in what the dataplane counted ([`crate::model::PassiveSignals`]).
    pub fn passive(&self, counters: &BTreeMap<HealthKey, PassiveCounters>) {
        let mut state = self.shared.state();
        let events = state.0.passive(self.shared.now(), counters);
        events.iter().for_each(log);
        if !events.is_empty() {
            self.shared.tell.send_replace(Arc::new(state.0.verdicts()));
        }
    }
}

/// The loop's own state.
struct Checker {
    shared: Arc<Shared>,
    queue: DelayQueue<u64>,
    running: JoinSet<(u64, Outcome)>,
    connectors: HashMap<(Tls, bool), Arc<Result<Connector, String>>>,
    random: Random,
    most: usize,
    tell_at: Option<Instant>,
}

impl Checker {
    async fn run(mut self, mut targets: watch::Receiver<Arc<Targets>>) {
        loop {
            let tell_at = self.tell_at;
            tokio::select! {
                changed = targets.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let targets = Arc::clone(&targets.borrow_and_update());
                    self.retarget(&targets);
                }
                Some(due) = self.queue.next(), if self.running.len() < self.most => self.begin(due.into_inner()),
                Some(ended) = self.running.join_next() => {
                    // Cancelled only where the whole task is; a panic is caught in it.
                    if let Ok((number, outcome)) = ended {
                        self.finish(number, outcome);
                    }
                }
                () = sleep_until(tell_at.unwrap_or_else(Instant::now)), if tell_at.is_some() => self.tell(),
            }
        }
    }

    fn retarget(&mut self, targets: &Targets) {
        // Read again when next needed: `ca` files may have changed with the configuration.
        self.connectors.clear();
        let first = self.shared.state().0.retarget(self.shared.now(), targets);
        for (number, due) in first {
            self.schedule(number, due);
        }
        self.tell();
    }

    fn schedule(&mut self, number: u64, due: Duration) {
        self.queue.insert_at(number, self.shared.start + due);
    }

    fn begin(&mut self, number: u64) {
        let (now, random) = (self.shared.now(), self.random.next());
        let order = {
            let mut state = self.shared.state();
            let due = state.0.due(number);
            let order = state.0.order(now, number, random);
            if let (Some(due), Some(Ok(_))) = (due, &order) {
                state.1.note(now.saturating_sub(due));
                state.1.running = self.running.len() + 1;
                state.1.most_running = state.1.most_running.max(state.1.running);
            }
            order
        };
        match order {
            None => {}
            Some(Err(later)) => self.schedule(number, later),
            Some(Ok(order)) => {
                let connector = self.connector(&order.health);
                self.running.spawn(async move {
                    let probe = probe::probe(&order, connector.as_deref());
                    let outcome = AssertUnwindSafe(probe).catch_unwind().await;
                    let defect = |_| Outcome::Local { reason: "the check panicked, which is a defect".to_owned() };
                    (number, outcome.unwrap_or_else(defect))
                });
            }
        }
    }

    fn connector(&mut self, health: &Health) -> Option<Arc<Result<Connector, String>>> {
        let key = match &health.check {
            Check::Tls(tls) | Check::Http(_, Some(tls)) => (tls.clone(), false),
            Check::Grpc { tls: Some(tls), .. } => (tls.clone(), true),
            _ => return None,
        };
        let made = self.connectors.entry(key);
        let made = made.or_insert_with_key(|(tls, http2)| Arc::new(tls::connector(tls, *http2)));
        Some(Arc::clone(made))
    }

    fn finish(&mut self, number: u64, outcome: Outcome) {
        let (now, random) = (self.shared.now(), self.random.next());
        let finished = {
            let mut state = self.shared.state();
            state.1.running = self.running.len();
            state.0.finish(now, number, outcome, random)
        };
        let Some((due, event)) = finished else { return };
        self.schedule(number, due);
        if let Some(event) = event {
            log(&event);
            self.tell_at.get_or_insert_with(|| Instant::now() + TOLD_TOGETHER);
        }
    }

    fn tell(&mut self) {
        self.tell_at = None;
        let verdicts = self.shared.state().0.verdicts();
        self.shared.tell.send_replace(Arc::new(verdicts));
    }
}

fn log(event: &Event) {
    let Event { key: (service, backend), from, to, reason, .. } = event;
    let backend = Endpoint(*backend);
    if to.is_healthy() {
        info!(service, %backend, %from, reason, "backend is healthy");
    } else {
        warn!(service, %backend, %from, %to, reason, "backend is not healthy");
    }
}

/// Half of the descriptors that this process may have: the rest is for maps, sessions and users.
fn most_checks() -> usize {
    let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    let soft = line.and_then(|line| line.split_whitespace().next()).and_then(|number| number.parse::<usize>().ok());
    soft.map_or(FEW_CHECKS, |soft| (soft / 2).clamp(1, MOST_CHECKS))
}

/// xorshift64*: spreads checks, protects nothing.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        u32::try_from(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lateness_is_told_as_the_upper_bound_of_its_bucket() {
        let mut load = Load::default();
        assert_eq!(load.lateness(0.99), Duration::ZERO);
        for micros in [0, 1, 3, 900] {
            load.note(Duration::from_micros(micros));
        }
        assert_eq!(load.lateness(0.5), Duration::from_micros(2));
        assert_eq!(load.lateness(1.0), Duration::from_micros(1024));
    }
}
