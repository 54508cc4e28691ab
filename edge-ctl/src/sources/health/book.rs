//! All checked backends: who is to be checked when, what was found, and what changed. Pure: the shell brings time, random
//! numbers and outcomes, and makes the checks that it is told to make.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use super::{
    passive::{Change, PassiveHealth},
    state::{Checked, Outcome},
};
use crate::model::{
    Check, Endpoint, Health, HealthKey, PassiveCounters, Verdict,
    view::{HealthEventRow, HealthRow},
};

/// State changes that are remembered.
const HISTORY: usize = 1024;
/// Between the first checks of backends that come together: 5,000 are started within a second.
const FIRST_CHECKS_APART: Duration = Duration::from_micros(200);

/// One backend that should be checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// How.
    pub health: Arc<Health>,
    /// Address that checks leave from: the one that traffic has towards this backend. `None`: the kernel's choice.
    pub source: Option<IpAddr>,
    /// What it counts as until checks have spoken.
    pub start: Verdict,
    /// False while no route leads there: a check would leave by the default route, to whom it may concern.
    pub reachable: bool,
}

/// Backends to be checked.
pub type Targets = BTreeMap<HealthKey, Target>;
/// What checks say, for every target.
pub type Verdicts = BTreeMap<HealthKey, Verdict>;

/// Those of one service.
pub fn of_service<'a>(targets: &'a Targets, service: &'a str) -> impl Iterator<Item = (&'a HealthKey, &'a Target)> {
    let first = (service.to_owned(), SocketAddr::from(([0, 0, 0, 0], 0)));
    targets.range(first..).take_while(move |((name, _), _)| name == service)
}

/// A check to be made now.
#[derive(Clone, Debug)]
pub struct Order {
    /// Where.
    pub address: SocketAddr,
    /// From which address.
    pub source: Option<IpAddr>,
    /// How.
    pub health: Arc<Health>,
}

/// A state change, for logs and `health history`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// When.
    pub at: Duration,
    /// Whose.
    pub key: HealthKey,
    /// Before.
    pub from: Verdict,
    /// From then on.
    pub to: Verdict,
    /// The result that decided, in words.
    pub reason: String,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Book {
    entries: HashMap<u64, Entry>,
    numbers: BTreeMap<HealthKey, u64>,
    last_number: u64,
    passive: BTreeMap<String, PassiveHealth>,
    history: VecDeque<Event>,
}

#[derive(Debug)]
struct Entry {
    key: HealthKey,
    target: Target,
    checked: Checked,
    due: Duration,
    /// It has a turn: a target without checks has none.
    scheduled: bool,
}

impl Entry {
    /// Other settings. Where no check is made any more, none can take back what the last ones said.
    fn change(&mut self, now: Duration, target: &Target) {
        if target.health.check == Check::None && self.target.health.check != Check::None {
            self.checked = Checked::new(now, Verdict::Up);
        }
        self.target = target.clone();
    }
}

impl Book {
    /// Takes over another set of targets; what is known of those that stay is kept. Returns the number and time of the
    /// first check of each new one. A target whose settings changed keeps its verdict and its turn.
    pub fn retarget(&mut self, now: Duration, targets: &Targets) -> Vec<(u64, Duration)> {
        let (entries, numbers) = (&mut self.entries, &mut self.numbers);
        numbers.retain(|key, number| {
            let stays = targets.contains_key(key);
            if !stays {
                entries.remove(number);
            }
            stays
        });
        self.passive.retain(|service, _| of_service(targets, service).next().is_some());
        let mut first = Vec::new();
        for (key, target) in targets {
            if let Some((number, entry)) = numbers.get(key).and_then(|number| Some((number, entries.get_mut(number)?)))
            {
                if entry.target != *target {
                    entry.change(now, target);
                }
                if !entry.scheduled && target.health.check != Check::None {
                    (entry.scheduled, entry.due) = (true, now);
                    first.push((*number, now));
                }
                continue;
            }
            self.last_number += 1;
            let apart = FIRST_CHECKS_APART.saturating_mul(u32::try_from(first.len()).unwrap_or(u32::MAX));
            let due = now + apart.min(target.health.interval);
            let checked = Checked::new(now, target.start);
            numbers.insert(key.clone(), self.last_number);
            let scheduled = target.health.check != Check::None;
            let entry = Entry { key: key.clone(), target: target.clone(), checked, due, scheduled };
            entries.insert(self.last_number, entry);
            if scheduled {
                first.push((self.last_number, due));
            }
        }
        first
    }

    /// The check of this number, which is due; `Err`: it is not reachable and has another turn then; `None`: it is gone,
    /// or there is nothing to check any more.
    pub fn order(&mut self, now: Duration, number: u64, random: u32) -> Option<Result<Order, Duration>> {
        let entry = self.entries.get_mut(&number)?;
        if entry.target.health.check == Check::None {
            entry.scheduled = false;
            return None;
        }
        if !entry.target.reachable {
            entry.due = next_turn(entry, now, random);
            return Some(Err(entry.due));
        }
        let (_, mut address) = entry.key;
        address.set_port(entry.target.health.port.unwrap_or(address.port()));
        Some(Ok(Order { address, source: entry.target.source, health: Arc::clone(&entry.target.health) }))
    }

    /// When the check of this number was to be made.
    pub fn due(&self, number: u64) -> Option<Duration> {
        self.entries.get(&number).map(|entry| entry.due)
    }

    /// A check has ended: returns when the next one is due, and what changed. `None`: its backend is gone.
    pub fn finish(
        &mut self,
        now: Duration,
        number: u64,
        outcome: Outcome,
        random: u32,
    ) -> Option<(Duration, Option<Event>)> {
        let entry = self.entries.get_mut(&number)?;
        let transition = entry.checked.step(now, &entry.target.health, outcome);
        entry.due = next_turn(entry, now, random);
        let due = entry.due;
        let event = transition.map(|change| Event {
            at: now,
            key: entry.key.clone(),
            from: change.from,
            to: change.to,
            reason: change.reason,
        });
        self.remember(event.iter().cloned());
        Some((due, event))
    }

    /// Counters of real traffic: ejects and takes back. Services without `passive` and backends without counters are left
    /// out.
    pub fn passive(&mut self, now: Duration, counters: &BTreeMap<HealthKey, PassiveCounters>) -> Vec<Event> {
        let mut by_service: BTreeMap<&str, (Arc<Health>, BTreeMap<SocketAddr, PassiveCounters>)> = BTreeMap::new();
        for (key, number) in &self.numbers {
            let (Some(entry), Some(counted)) = (self.entries.get(number), counters.get(key)) else { continue };
            let group = by_service.entry(&key.0).or_insert_with(|| (Arc::clone(&entry.target.health), BTreeMap::new()));
            group.1.insert(key.1, *counted);
        }
        let mut events = Vec::new();
        for (service, (health, counters)) in by_service {
            let Some(settings) = &health.passive else { continue };
            let watched = self.passive.entry(service.to_owned()).or_default();
            for change in watched.step(now, settings, &counters) {
                let (backend, from, to, reason) = match change {
                    Change::Ejected { backend, lasts, failures: (failed, opened) } => {
                        let why = format!("{failed} of {opened} new flows failed; ejected for {} s", lasts.as_secs());
                        (backend, Verdict::Up, Verdict::Ejected, why)
                    }
                    Change::Returned { backend } => {
                        (backend, Verdict::Ejected, Verdict::Up, "the ejection is over".to_owned())
                    }
                    Change::Spared { .. } => continue,
                };
                events.push(Event { at: now, key: (service.to_owned(), backend), from, to, reason });
            }
        }
        self.remember(events.iter().cloned());
        events
    }

    /// What checks and traffic say of every target.
    pub fn verdicts(&self) -> Verdicts {
        let verdict = |number: &u64| self.entries.get(number).map(|entry| self.verdict(entry));
        self.numbers.iter().filter_map(|(key, number)| Some((key.clone(), verdict(number)?))).collect()
    }

    fn verdict(&self, entry: &Entry) -> Verdict {
        let ejected = || self.passive.get(&entry.key.0).is_some_and(|passive| passive.is_ejected(entry.key.1));
        match entry.checked.verdict() {
            Verdict::Up if entry.target.health.passive.is_some() && ejected() => Verdict::Ejected,
            verdict => verdict,
        }
    }

    /// One row for each target.
    pub fn rows(&self, now: Duration) -> Vec<HealthRow> {
        let entries = self.numbers.values().filter_map(|number| self.entries.get(number));
        entries.map(|entry| self.row(now, entry)).collect()
    }

    /// The row of one target.
    pub fn row_of(&self, now: Duration, key: &HealthKey) -> Option<HealthRow> {
        let entry = self.numbers.get(key).and_then(|number| self.entries.get(number));
        entry.map(|entry| self.row(now, entry))
    }

    fn row(&self, now: Duration, entry: &Entry) -> HealthRow {
        let (Entry { key, target, checked, due, scheduled }, health) = (entry, &entry.target.health);
        HealthRow {
            service: key.0.clone(),
            backend: Endpoint(key.1).to_string(),
            check: match (&health.check, health.port) {
                (check, Some(port)) => format!("{check}:{port}"),
                (Check::Http(http, _), None) => format!("{} {}", health.check, http.path),
                (check, None) => check.to_string(),
            },
            state: self.verdict(entry).to_string(),
            since: now.saturating_sub(checked.since).as_secs(),
            checks: checked.counts.checks,
            fails: checked.counts.fails,
            unavail: checked.counts.unavailable,
            ejections: self.passive.get(&key.0).map_or(0, |passive| passive.ejections(key.1)),
            inconclusive: checked.counts.local,
            last_check: checked.last.map(|at| now.saturating_sub(at).as_secs()),
            next: (target.reachable && *scheduled).then(|| due.saturating_sub(now).as_secs()),
            connect: checked.connect.map(|connect| connect.as_secs_f64() * 1000.0),
            source: target.source.map_or_else(|| "-".to_owned(), |source| source.to_string()),
            error: checked.error.clone(),
        }
    }

    /// State changes, newest first.
    pub fn history(&self, now: Duration) -> Vec<HealthEventRow> {
        let row = |event: &Event| HealthEventRow {
            age: now.saturating_sub(event.at).as_secs(),
            service: event.key.0.clone(),
            backend: Endpoint(event.key.1).to_string(),
            from: event.from.to_string(),
            to: event.to.to_string(),
            reason: event.reason.clone(),
        };
        self.history.iter().rev().map(row).collect()
    }

    fn remember(&mut self, events: impl Iterator<Item = Event>) {
        self.history.extend(events);
        let surplus = self.history.len().saturating_sub(HISTORY);
        self.history.drain(..surplus);
    }
}

/// Turns follow each other from due time to due time, so that lateness does not add up; a turn that would lie in the past
/// is now.
fn next_turn(entry: &Entry, now: Duration, random: u32) -> Duration {
    (entry.due + entry.checked.pause(&entry.target.health, random)).max(now)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Exchange, Passive};

    const MIDDLE: u32 = u32::MAX / 2;

    fn health() -> Health {
        Health {
            check: Check::Tcp(Exchange::default()),
            interval: Duration::from_secs(5),
            fast_interval: Duration::from_secs(5),
            jitter: 0,
            timeout: Duration::from_secs(1),
            fall: 2,
            rise: 1,
            port: None,
            mandatory: false,
            panic: 0,
            passive: Some(Passive {
                failures: 1,
                share: 1,
                window: Duration::from_secs(10),
                eject: Duration::from_secs(30),
                eject_most: Duration::from_secs(60),
                limit: 100,
            }),
        }
    }

    fn key(number: u8) -> HealthKey {
        ("web".to_owned(), ([10, 1, 0, number], 80).into())
    }

    fn targets(numbers: &[u8]) -> Targets {
        let target = Target { health: Arc::new(health()), source: None, start: Verdict::Up, reachable: true };
        numbers.iter().map(|number| (key(*number), target.clone())).collect()
    }

    fn fail() -> Outcome {
        Outcome::Fail { reason: "refused".to_owned() }
    }

    #[test]
    fn targets_that_stay_keep_what_is_known_and_those_that_go_are_forgotten() {
        let mut book = Book::default();
        let first = book.retarget(Duration::ZERO, &targets(&[1, 2]));
        assert_eq!(first.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [1, 2]);
        for _ in 0..2 {
            book.finish(Duration::from_secs(1), 1, fail(), MIDDLE);
        }
        assert!(book.retarget(Duration::from_secs(2), &targets(&[1])).is_empty());
        assert_eq!(book.verdicts(), BTreeMap::from([(key(1), Verdict::Down)]));
        assert_eq!(book.finish(Duration::from_secs(2), 2, fail(), MIDDLE), None, "a late result of one that is gone");
        let again = book.retarget(Duration::from_secs(3), &targets(&[1, 2]));
        assert_eq!(again, [(3, Duration::from_secs(3))], "it comes back as a new one");
        assert_eq!(book.verdicts()[&key(2)], Verdict::Up);
    }

    #[test]
    fn turns_follow_from_due_time_to_due_time_and_never_lie_in_the_past() {
        let mut book = Book::default();
        book.retarget(Duration::ZERO, &targets(&[1]));
        let passed = || Outcome::Pass { connect: Duration::from_millis(1) };
        let due = |book: &mut Book, at| book.finish(Duration::from_millis(at), 1, passed(), MIDDLE).unwrap().0;
        assert_eq!(due(&mut book, 700), Duration::from_secs(5));
        assert_eq!(due(&mut book, 5900), Duration::from_secs(10));
        assert_eq!(due(&mut book, 17_000), Duration::from_secs(17));
    }

    #[test]
    fn the_checked_port_is_the_one_configured_and_a_target_without_a_route_waits() {
        let mut book = Book::default();
        let mut wanted = targets(&[1]);
        let target = wanted.get_mut(&key(1)).unwrap();
        target.health = Arc::new(Health { port: Some(8081), ..health() });
        book.retarget(Duration::ZERO, &wanted);
        let order = book.order(Duration::ZERO, 1, MIDDLE).unwrap().unwrap();
        assert_eq!(order.address, "10.1.0.1:8081".parse().unwrap());
        wanted.get_mut(&key(1)).unwrap().reachable = false;
        book.retarget(Duration::ZERO, &wanted);
        assert_eq!(book.order(Duration::ZERO, 1, MIDDLE).unwrap().unwrap_err(), Duration::from_secs(5));
        assert!(book.order(Duration::ZERO, 9, MIDDLE).is_none());
    }

    #[test]
    fn a_backend_that_real_traffic_ejects_says_so_and_its_history_is_told_newest_first() {
        let mut book = Book::default();
        book.retarget(Duration::ZERO, &targets(&[1]));
        let counted = |failed| {
            let counters = PassiveCounters { opened: failed, syn_unanswered: failed, reset_before_data: 0 };
            BTreeMap::from([(key(1), counters)])
        };
        assert!(book.passive(Duration::ZERO, &counted(0)).is_empty());
        assert_eq!(book.passive(Duration::from_secs(1), &counted(3)).len(), 1);
        assert_eq!(book.verdicts()[&key(1)], Verdict::Ejected);
        book.passive(Duration::from_secs(31), &counted(3));
        assert_eq!(book.verdicts()[&key(1)], Verdict::Up);
        assert_eq!(book.rows(Duration::from_secs(31))[0].ejections, 1, "it is counted although it is over");
        let history: Vec<_> = book.history(Duration::from_secs(40)).into_iter().map(|row| (row.age, row.to)).collect();
        assert_eq!(history, [(9, "up".to_owned()), (39, "ejected".to_owned())]);
    }
}
