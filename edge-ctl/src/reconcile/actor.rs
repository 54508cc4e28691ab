//! The loop that keeps the datapath at the desired state: newest desired state, [`diff`](super::diff::diff), writes.
//!
//! It remembers what it wrote, so that a change costs only its own writes; an audit reads the maps back from time to
//! time, and what differs from memory is logged and repaired. After a failed write nothing is believed: the maps are read
//! again and the rest of the way is planned from there.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::watch, time};
use tracing::{debug, info, warn};

use super::{
    diff::{Plan, Reserved, diff},
    memo::Memo,
    narrow,
    ports::{
        Action, AnnouncementPort, BackendSlot, DatapathPort, DatapathState, FlowCounts, NumberSets, PortError,
        service_key,
    },
};
use crate::{
    desired::{AdoptedBackend, DesiredFrontend, DesiredState, Timeouts},
    model::{Frontend, PoolMember, Protocol, TableShape},
};

/// Intervals of the loop.
#[derive(Clone, Copy, Debug)]
pub struct Intervals {
    /// Between audits.
    pub audit: Duration,
    /// Between looks at what still drains.
    pub drain: Duration,
    /// After an error.
    pub retry: Duration,
    /// How long a replaced selection region is left alone: far longer than a packet takes through the program.
    pub region_rest: Duration,
    /// How long a number is kept after its last new flow: as long as a half-open flow may still name it.
    pub number_rest: Duration,
}

impl Default for Intervals {
    fn default() -> Self {
        Self {
            audit: Duration::from_secs(30),
            drain: Duration::from_secs(1),
            retry: Duration::from_secs(1),
            region_rest: Duration::from_secs(1),
            number_rest: Duration::from_secs(Timeouts::of(Protocol::Tcp).half_open as u64),
        }
    }
}

/// What the loop did and where it stands.
#[derive(Clone, Debug, Default)]
pub struct ReconcilerStatus {
    /// Desired states applied in full.
    pub applied: u64,
    /// Listen addresses that plans were made for since start: a change counts those that it concerns.
    pub planned: u64,
    /// Map writes since start.
    pub map_writes: u64,
    /// Actions since start, by kind.
    pub actions: BTreeMap<String, u64>,
    /// What the last round could not do.
    pub problems: Vec<String>,
    /// The error that the next attempt will try to get past.
    pub error: Option<String>,
    /// True where the maps hold the newest desired state.
    pub in_sync: bool,
    /// Audits made.
    pub audits: u64,
    /// Audits that found a difference.
    pub audit_findings: u64,
    /// The datapath as last known.
    pub state: Arc<DatapathState>,
}

/// A [`Fill`] that the loop owns.
pub type OwnedFill = Box<dyn Fn(&[PoolMember], TableShape) -> Arc<[u16]> + Send>;

/// See the module.
pub struct Reconciler<D, A> {
    datapath: D,
    announcements: A,
    fill: Memo,
    intervals: Intervals,
    /// The maps as last read and written; `None`: to be read again.
    memory: Option<DatapathState>,
    /// What `memory` holds, where it holds all of it; `None`: not known.
    reached: Option<Arc<DesiredState>>,
    /// Backend numbers by service number, of `memory` as of the last round over all services.
    members: BTreeMap<u32, BTreeSet<u32>>,
    /// Those of `memory` that nobody wants any more and that are freed once nothing uses them, as of the same round.
    leaving: NumberSets,
    retired: Vec<(Instant, (u32, u32))>,
    resting_backends: BTreeMap<u32, Instant>,
    resting_services: BTreeMap<u32, Instant>,
    status: ReconcilerStatus,
}

impl<D: DatapathPort, A: AnnouncementPort> Reconciler<D, A> {
    /// Reads the maps, and adopts what they hold.
    ///
    /// # Errors
    /// Where the maps cannot be read.
    pub fn new(mut datapath: D, announcements: A, fill: OwnedFill, intervals: Intervals) -> Result<Self, PortError> {
        let memory = datapath.snapshot()?;
        let now = Instant::now();
        let mut reconciler = Self {
            datapath,
            announcements,
            fill: Memo::new(fill),
            intervals,
            memory: None,
            reached: None,
            members: BTreeMap::new(),
            leaving: NumberSets::default(),
            retired: Vec::new(),
            resting_backends: BTreeMap::new(),
            resting_services: BTreeMap::new(),
            status: ReconcilerStatus { state: Arc::new(memory.clone()), ..ReconcilerStatus::default() },
        };
        // When these were excluded is not known: they rest from now on.
        let excluded = memory.backends.iter().filter(|(_, slot)| !slot.eligible());
        reconciler.resting_backends = excluded.map(|(number, _)| (*number, now)).collect();
        let indexed: BTreeSet<u32> = memory.index.values().copied().collect();
        let gone = memory.services.keys().filter(|number| !indexed.contains(number));
        reconciler.resting_services = gone.map(|number| (*number, now)).collect();
        reconciler.memory = Some(memory);
        Ok(reconciler)
    }

    /// The pools that the maps hold, for [`crate::desired::Inputs::adopted`].
    pub fn adopted(&self) -> BTreeMap<Frontend, Vec<AdoptedBackend>> {
        self.memory.as_ref().map(DatapathState::adopted).unwrap_or_default()
    }

    /// Runs until `desired` has no sender any more. Changes that arrive during a round are applied together in the next.
    /// Returning leaves the datapath as it is.
    pub async fn run(
        mut self,
        mut desired: watch::Receiver<Option<Arc<DesiredState>>>,
        status: watch::Sender<ReconcilerStatus>,
    ) {
        let mut audit = time::interval(self.intervals.audit);
        audit.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        audit.reset();
        loop {
            let newest = desired.borrow_and_update().clone();
            if let Some(newest) = &newest {
                self.round(newest);
                status.send_replace(self.status.clone());
            }
            let pause = self.pause(newest.as_deref());
            tokio::select! {
                changed = desired.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
                _ = audit.tick() => self.audit(),
                () = time::sleep(pause) => self.look_at_drains(),
            }
        }
    }

    /// One round: plan from memory, and write. Errors end up in the status.
    pub fn round(&mut self, desired: &Arc<DesiredState>) {
        match self.try_round(desired) {
            Ok(()) => {
                self.status.error = None;
                self.status.in_sync = true;
            }
            Err(error) => {
                warn!(%error, "the datapath could not be brought to the desired state; trying again");
                self.status.error = Some(error.to_string());
                self.status.in_sync = false;
                self.memory = None;
                self.reached = None;
            }
        }
        if let Some(memory) = &self.memory {
            self.status.state = Arc::new(memory.clone());
        }
    }

    /// What the loop did so far.
    pub fn status(&self) -> &ReconcilerStatus {
        &self.status
    }

    fn try_round(&mut self, desired: &Arc<DesiredState>) -> Result<(), PortError> {
        let mut memory = match self.memory.take() {
            Some(memory) => memory,
            None => self.datapath.snapshot()?,
        };
        memory.announced = self.announcements.announced();
        let reached = self.reached.take();
        let mut steps = 0;
        // New flows avoid whoever is out from here on; how the rest changes is worked out after that.
        let excluded = reached.iter().flat_map(|reached| narrow::exclusions(reached, desired, &memory));
        for action in excluded.collect::<Vec<_>>() {
            self.step(&action, &mut memory)?;
            steps += 1;
        }
        let reserved = self.reserved(Instant::now());
        let reached = reached.filter(|_| self.status.problems.is_empty());
        let narrow = reached.as_ref().and_then(|reached| {
            let fill = |members: &[PoolMember], shape| self.fill.table(members, shape);
            narrow::narrow(reached, desired, &memory, &self.members, &reserved, &fill)
        });
        let changed = narrow.as_ref().and(reached).map(|reached| desired.changed_since(&reached));
        let plan = match narrow {
            Some(plan) => plan,
            None => self.whole_plan(desired, &mut memory, reserved)?,
        };
        for problem in plan.problems.iter().filter(|problem| !self.status.problems.contains(problem)) {
            warn!(%problem, "part of the configuration has no datapath");
        }
        self.status.problems = plan.problems;
        self.status.planned += plan.frontends as u64;
        for action in &plan.actions {
            self.step(action, &mut memory)?;
        }
        steps += plan.actions.len();
        let now = Instant::now();
        self.retired.extend(plan.retired.into_iter().map(|region| (now, region)));
        if steps > 0 {
            info!(actions = steps, "datapath brought to the desired state");
        }
        self.status.applied += 1;
        match changed {
            Some(changed) => changed.into_iter().for_each(|(frontend, wanted)| self.recount(frontend, wanted, &memory)),
            None => {
                self.members.clear();
                for (number, slot) in memory.backends.iter() {
                    self.members.entry(slot.entry.service).or_default().insert(*number);
                }
                self.leaving = leaving(desired, &memory);
            }
        }
        self.reached = Some(Arc::clone(desired));
        self.memory = Some(memory);
        Ok(())
    }

    /// The steps that all services need.
    fn whole_plan(
        &mut self,
        desired: &DesiredState,
        memory: &mut DatapathState,
        mut reserved: Reserved,
    ) -> Result<Plan, PortError> {
        // What takes flows now may hold some that nobody has counted yet: it is freed in a later round at the earliest.
        reserved.services.extend(memory.index.values());
        let live = memory.backends.iter().filter(|(_, slot)| slot.eligible());
        reserved.backends.extend(live.map(|(number, _)| *number));
        self.fill.begin();
        let whole = |memory: &_| diff(desired, memory, &reserved, &|members, shape| self.fill.table(members, shape));
        let mut plan = whole(memory);
        let freed = freed(&plan);
        if !freed.is_empty() {
            let counts = self.datapath.flow_counts(&freed)?;
            refresh_counts(&freed, &counts, memory);
            plan = whole(memory);
        }
        self.fill.end();
        Ok(plan)
    }

    /// Who leaves a frontend whose members have changed.
    fn recount(&mut self, frontend: &Frontend, wanted: &DesiredFrontend, memory: &DatapathState) {
        let number = memory.index.get(&service_key(frontend.address, frontend.protocol));
        let Some(members) = number.and_then(|number| self.members.get(number)) else { return };
        let stays: BTreeSet<SocketAddr> = wanted.pool.iter().flatten().map(|backend| backend.address).collect();
        for number in members {
            let slot = memory.backends.get(number);
            if slot.is_some_and(|slot| !slot.eligible() && !stays.contains(&slot.address())) {
                self.leaving.backends.insert(*number);
            } else {
                self.leaving.backends.remove(number);
            }
        }
    }

    fn step(&mut self, action: &Action, memory: &mut DatapathState) -> Result<(), PortError> {
        self.carry_out(action)?;
        self.note(action, memory);
        memory.apply(action);
        Ok(())
    }

    fn carry_out(&mut self, action: &Action) -> Result<(), PortError> {
        debug!(?action, "step");
        match action {
            Action::Announce { prefix, attributes } => self.announcements.announce(*prefix, attributes)?,
            Action::Withdraw { prefix } => self.announcements.withdraw(*prefix)?,
            _ => self.status.map_writes += self.datapath.apply(action)?,
        }
        *self.status.actions.entry(action.kind().to_owned()).or_default() += 1;
        Ok(())
    }

    /// Remembers since when a number gets no new flows, and whose it is.
    fn note(&mut self, action: &Action, before: &DatapathState) {
        let now = Instant::now();
        match action {
            Action::PutBackend { number, entry, .. } => {
                self.members.entry(entry.service).or_default().insert(*number);
            }
            Action::SetBackendState { number, state } => {
                if state & edge_common::maps::backend_state::ELIGIBLE == 0 {
                    self.resting_backends.insert(*number, now);
                } else {
                    self.resting_backends.remove(number);
                }
            }
            Action::RemoveIndex { key } => {
                if let Some(number) = before.index.get(key) {
                    self.resting_services.insert(*number, now);
                }
            }
            Action::SetIndex { key, number } => {
                self.resting_services.remove(number);
                if let Some(old) = before.index.get(key).filter(|old| *old != number) {
                    self.resting_services.insert(*old, now);
                }
            }
            _ => {}
        }
    }

    fn reserved(&mut self, now: Instant) -> Reserved {
        let Intervals { region_rest, number_rest, .. } = self.intervals;
        self.retired.retain(|(since, _)| now.duration_since(*since) < region_rest);
        self.resting_backends.retain(|_, since| now.duration_since(*since) < number_rest);
        self.resting_services.retain(|_, since| now.duration_since(*since) < number_rest);
        Reserved {
            regions: self.retired.iter().map(|(_, region)| *region).collect(),
            backends: self.resting_backends.keys().copied().collect(),
            services: self.resting_services.keys().copied().collect(),
            ..Reserved::default()
        }
    }

    /// How long to sleep: until the next attempt, until the next look at what drains, or until something happens.
    fn pause(&self, desired: Option<&DesiredState>) -> Duration {
        if desired.is_some() && self.status.error.is_some() {
            return self.intervals.retry;
        }
        let drains = self.memory.is_some() && !self.leaving.is_empty();
        if drains { self.intervals.drain } else { self.intervals.audit }
    }

    /// What has drained is freed by a look at everything, which is worth its price only then.
    fn look_at_drains(&mut self) {
        let Some(memory) = &mut self.memory else { return };
        if self.leaving.is_empty() {
            return;
        }
        match self.datapath.flow_counts(&self.leaving) {
            Ok(counts) => refresh_counts(&self.leaving, &counts, memory),
            Err(error) => warn!(%error, "flow counters could not be read"),
        }
        let rests = |since: Option<&Instant>| since.is_some_and(|since| since.elapsed() < self.intervals.number_rest);
        let is_idle = |number: &u32| memory.backends.get(number).is_some_and(|slot| slot.active == 0);
        let has_members = |number: &u32| self.members.get(number).is_some_and(|members| !members.is_empty());
        let is_over = |number: &u32| {
            let is_idle = memory.services.get(number).is_some_and(|slot| slot.active == 0);
            is_idle && !has_members(number) && !rests(self.resting_services.get(number))
        };
        let mut backends = self.leaving.backends.iter();
        let backend = backends.any(|number| is_idle(number) && !rests(self.resting_backends.get(number)));
        if backend || self.leaving.services.iter().any(is_over) {
            self.reached = None;
        }
    }

    /// Reads the maps back. What differs is logged; the round that follows repairs it.
    fn audit(&mut self) {
        self.status.audits += 1;
        let snapshot = match self.datapath.snapshot() {
            Ok(snapshot) => snapshot,
            Err(error) => {
                warn!(%error, "the maps could not be read for the audit");
                return;
            }
        };
        let Some(memory) = &mut self.memory else {
            self.memory = Some(snapshot);
            return;
        };
        let differences = differences(memory, &snapshot);
        if differences.is_empty() {
            // It shares its tables with the memo, and its pages with those who look at it.
            recall_counts(&snapshot, memory);
            return;
        }
        self.status.audit_findings += 1;
        self.reached = None;
        warn!(maps = ?differences, "the maps differ from what was written to them; repairing");
        self.memory = Some(snapshot);
    }
}

/// What nobody wants any more: services that no frontend leads to, backends that are in no pool and get no new flows.
fn leaving(desired: &DesiredState, memory: &DatapathState) -> NumberSets {
    let indexed: BTreeSet<u32> = memory.index.values().copied().collect();
    let number = |frontend: &Frontend| memory.index.get(&service_key(frontend.address, frontend.protocol)).copied();
    let pools: BTreeMap<u32, _> =
        desired.frontends.iter().filter_map(|(key, wanted)| Some((number(key)?, wanted.pool.as_deref()))).collect();
    let stays = |slot: &BackendSlot| match pools.get(&slot.entry.service) {
        Some(Some(pool)) => pool.iter().any(|backend| backend.address == slot.address()),
        // Nothing is known of its pool.
        Some(None) => true,
        None => false,
    };
    let gone = memory.backends.iter().filter(|(_, slot)| !slot.eligible() && !stays(slot));
    NumberSets {
        services: memory.services.keys().filter(|number| !indexed.contains(number)).copied().collect(),
        backends: gone.map(|(number, _)| *number).collect(),
    }
}

/// The numbers that a plan frees.
fn freed(plan: &Plan) -> NumberSets {
    let mut freed = NumberSets::default();
    for action in &plan.actions {
        match action {
            Action::FreeBackend { number } => drop(freed.backends.insert(*number)),
            Action::FreeService { number } => drop(freed.services.insert(*number)),
            _ => {}
        }
    }
    freed
}

/// Brings the counts of flows of these numbers up to date; nothing may be freed on older ones.
fn refresh_counts(of: &NumberSets, counts: &FlowCounts, memory: &mut DatapathState) {
    for number in &of.services {
        if let Some(slot) = memory.services.get_mut(number) {
            slot.active = counts.services.get(number).copied().unwrap_or(0);
        }
    }
    for number in &of.backends {
        if let Some(slot) = memory.backends.get_mut(number) {
            slot.active = counts.backends.get(number).copied().unwrap_or(0);
        }
    }
}

/// Takes over the counts of flows of a snapshot that is the same but for them.
fn recall_counts(snapshot: &DatapathState, memory: &mut DatapathState) {
    let counts = |state: &DatapathState| -> Vec<u64> { state.backends.values().map(|slot| slot.active).collect() };
    if counts(snapshot) != counts(memory) {
        memory.backends = snapshot.backends.clone();
    }
    let counts = |state: &DatapathState| -> Vec<u64> { state.services.values().map(|slot| slot.active).collect() };
    if counts(snapshot) != counts(memory) {
        memory.services = snapshot.services.clone();
    }
}

/// Names of the parts in which two states differ, flow counts and announcements aside.
fn differences(memory: &DatapathState, snapshot: &DatapathState) -> Vec<&'static str> {
    let services = |state: &DatapathState| -> Vec<_> {
        state.services.iter().map(|(number, slot)| (*number, slot.entry, slot.label.clone())).collect()
    };
    let backends = |state: &DatapathState| -> Vec<_> {
        state.backends.iter().map(|(number, slot)| (*number, slot.entry, slot.state)).collect()
    };
    let parts = [
        ("frontend index", memory.index == snapshot.index),
        ("services", services(memory) == services(snapshot)),
        ("backends", backends(memory) == backends(snapshot)),
        ("dnat index", memory.backend_index == snapshot.backend_index),
        ("selection", memory.regions == snapshot.regions),
        ("address filter", memory.filter == snapshot.filter),
    ];
    parts.into_iter().filter(|(_, same)| !same).map(|(name, _)| name).collect()
}
