//! Ends established flows that were idle beyond their service's timeout. Half-open and closing flows need no sweep: they
//! live in LRU tables, and the program checks their age itself.
//!
//! The table is walked in bounded steps. A flow ends when *both* halves are idle: the program refreshes the twin only now
//! and then. What was ended is counted in maps of its own, since the per-CPU counters belong to the program. At the end of
//! a walk during which nothing opened or closed, the counters are set right by what was seen: a daemon killed between
//! removing a flow and counting it would otherwise leave a backend draining for ever.
//!
//! On its way the walk counts what each flow table holds, and the SNAT ports in use ([`super::snat`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use aya::maps::{Array, HashMap, MapData, MapError};
use edge_common::{
    address::{Address, Wide},
    flow::FlowKey,
    maps::{Flow, FlowEnd, ServiceEntry, ServiceStats, Slot, events::End, name, service_flag},
};

use super::{
    cache::{FlowCache, Part},
    pins::{Pins, chain, open},
    snat::{Census as Ports, SnatUse},
    sys::{Cursor, from_bytes, monotonic_ns},
    tables::Tables,
};
use crate::reconcile::ports::PortError;

const SECOND: u64 = 1_000_000_000;
/// Fill, in thousandths, from which idle timeouts shrink.
const CROWDED: u64 = 900;
/// `conntrack::Direction` of packets from the client.
pub(super) const FORWARD: u8 = 0;
/// Idle timeout of a flow whose service is gone, seconds.
const NO_SERVICE_TIMEOUT: u32 = 300;

/// What one step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SweepReport {
    /// Entries looked at.
    pub scanned: u64,
    /// Flows ended.
    pub expired: u64,
    /// True where the walk has reached the end of the table; the next step starts anew.
    pub finished: bool,
    /// Entries of its capacity, in thousandths, of the fuller family's table, as of the last full walk or what this one
    /// has seen.
    pub fill: u64,
}

/// What a whole walk found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pass {
    /// When it ended, ns of CLOCK_MONOTONIC.
    pub at: u64,
    /// Entries of each flow table, by name.
    pub entries: BTreeMap<&'static str, u64>,
    /// SNAT ports in use.
    pub snat: Vec<SnatUse>,
}

/// See the module. Both families' tables are walked one after the other.
pub struct Sweeper {
    tables: Tables,
    v4: FlowTable<u32>,
    v6: FlowTable<Wide>,
    service_expired: Array<MapData, u64>,
    backend_expired: Array<MapData, u64>,
    cache: Arc<FlowCache>,
    walk: Walk,
    /// Where the established tables of this walk have been read, and the others have not.
    waiting: bool,
    last: Option<Pass>,
    ended: Vec<FlowEnd>,
}

/// One family's established table, and how far the walk over it has come.
struct FlowTable<A: Address>
where
    FlowKey<A>: aya::Pod,
    Flow<A>: aya::Pod,
{
    name: &'static str,
    flows: HashMap<MapData, FlowKey<A>, Flow<A>>,
    capacity: u64,
    cursor: Cursor,
    /// Entries seen by this walk.
    entries: u64,
    /// Entries seen by the last one.
    last_entries: u64,
}

/// One walk over both tables.
#[derive(Debug, Default)]
struct Walk {
    begun: bool,
    timeouts: BTreeMap<u32, u32>,
    /// Services whose ended flows are reported.
    recorded: BTreeSet<u32>,
    services: Census,
    backends: Census,
    ports: Ports,
}

/// Counters as they were when the walk began, and the flows seen since.
#[derive(Debug, Default)]
struct Census {
    before: BTreeMap<u32, ServiceStats>,
    seen: BTreeMap<u32, u64>,
}

/// What a step reads, and when, ns.
struct Sources<'a> {
    tables: &'a Tables,
    cache: &'a FlowCache,
    now: u64,
}

/// Flows ended by one step, by number.
#[derive(Debug, Default)]
struct Expired {
    services: BTreeMap<u32, u64>,
    backends: BTreeMap<u32, u64>,
    records: Vec<FlowEnd>,
}

impl Sweeper {
    /// Opens the pins.
    ///
    /// # Errors
    /// Where one is missing.
    pub fn open(pins: &Pins, cache: Arc<FlowCache>) -> Result<Self, PortError> {
        let tables = Tables::open(pins)?;
        Ok(Self {
            v4: FlowTable::open(pins, &tables, name::ESTABLISHED)?,
            v6: FlowTable::open(pins, &tables, name::ESTABLISHED_V6)?,
            tables,
            service_expired: open(pins, name::SERVICE_EXPIRED)?,
            backend_expired: open(pins, name::BACKEND_EXPIRED)?,
            cache,
            walk: Walk::default(),
            waiting: false,
            last: None,
            ended: Vec::new(),
        })
    }

    /// Looks at about `budget` entries of the established table, and at half as many of the others.
    ///
    /// # Errors
    /// Where a map cannot be read or written; the next step goes on from there.
    pub fn step(&mut self, budget: usize) -> Result<SweepReport, PortError> {
        self.step_at(monotonic_ns(), budget)
    }

    /// Records of the flows ended since the last call, of services whose ends are reported.
    pub fn take_ended(&mut self) -> Vec<FlowEnd> {
        std::mem::take(&mut self.ended)
    }

    /// What the last whole walk found; `None` before the first has ended.
    pub fn last_pass(&self) -> Option<&Pass> {
        self.last.as_ref()
    }

    fn step_at(&mut self, now: u64, budget: usize) -> Result<SweepReport, PortError> {
        let mut report = if self.waiting { SweepReport::default() } else { self.established(now, budget)? };
        self.walk.ports.step(&self.tables, now, budget / 2)?;
        if self.waiting && self.walk.ports.is_finished() {
            report.finished = true;
            self.waiting = false;
            let ports = std::mem::take(&mut self.walk.ports);
            let mut entries = ports.entries().clone();
            entries.insert(name::ESTABLISHED, self.v4.last_entries);
            entries.insert(name::ESTABLISHED_V6, self.v6.last_entries);
            self.last = Some(Pass { at: now, entries, snat: ports.finish(&self.tables)? });
        }
        report.fill = self.v4.fill().max(self.v6.fill());
        Ok(report)
    }

    /// A step in the established tables.
    fn established(&mut self, now: u64, budget: usize) -> Result<SweepReport, PortError> {
        if !self.walk.begun {
            self.begin()?;
        }
        let mut expired = Expired::default();
        let mut report = SweepReport::default();
        let mut walked = Ok(());
        let from = Sources { tables: &self.tables, cache: &self.cache, now };
        if !self.v4.cursor.is_finished() {
            walked = self.v4.step(&from, &mut self.walk, budget, &mut report, &mut expired);
        }
        let left = budget.saturating_sub(usize::try_from(report.scanned).unwrap_or(budget));
        if walked.is_ok() && self.v4.cursor.is_finished() && left > 0 {
            walked = self.v6.step(&from, &mut self.walk, left, &mut report, &mut expired);
        }
        // What was ended before a failure is counted, too.
        self.ended.append(&mut expired.records);
        add(&mut self.service_expired, &expired.services)?;
        add(&mut self.backend_expired, &expired.backends)?;
        walked?;
        if self.v4.cursor.is_finished() && self.v6.cursor.is_finished() {
            self.waiting = true;
            self.finish()?;
        }
        Ok(report)
    }

    fn begin(&mut self) -> Result<(), PortError> {
        let state = self.tables.services()?;
        let (services, backends) = self.tables.numbers()?;
        let is_recorded = |entry: &ServiceEntry| entry.flags & service_flag::RECORD_ENDS != 0;
        let recorded = state.iter().filter(|(_, entry)| is_recorded(entry)).map(|(number, _)| *number).collect();
        self.walk = Walk {
            begun: true,
            ports: Ports::begin(&state),
            recorded,
            timeouts: state.into_iter().map(|(number, entry)| (number, entry.established_timeout)).collect(),
            services: Census { before: self.tables.service_stats(services)?, seen: BTreeMap::new() },
            backends: Census { before: self.tables.backend_stats(backends)?, seen: BTreeMap::new() },
        };
        Ok(())
    }

    fn finish(&mut self) -> Result<(), PortError> {
        let mut walk = std::mem::take(&mut self.walk);
        self.walk.ports = std::mem::take(&mut walk.ports);
        self.v4.rewind();
        self.v6.rewind();
        let (services, backends) = self.tables.numbers()?;
        correct(&mut self.service_expired, &walk.services, &self.tables.service_stats(services)?)?;
        correct(&mut self.backend_expired, &walk.backends, &self.tables.backend_stats(backends)?)
    }
}

impl<A: Part> FlowTable<A>
where
    FlowKey<A>: aya::Pod,
    Flow<A>: aya::Pod,
    Slot<A>: aya::Pod,
{
    fn open(pins: &Pins, tables: &Tables, name: &'static str) -> Result<Self, PortError> {
        let info = tables.reader(name)?.data().info();
        let capacity = info.map_err(|error| PortError::new(format!("the map {name}"), error))?.max_entries();
        Ok(Self {
            name,
            flows: open(pins, name)?,
            capacity: u64::from(capacity.max(1)),
            cursor: Cursor::default(),
            entries: 0,
            last_entries: 0,
        })
    }

    /// Entries of the capacity, in thousandths, as of the last full walk or what this one has seen.
    fn fill(&self) -> u64 {
        self.last_entries.max(self.entries).saturating_mul(1000) / self.capacity
    }

    fn rewind(&mut self) {
        self.cursor = Cursor::default();
        self.last_entries = std::mem::take(&mut self.entries);
    }

    fn step(
        &mut self,
        from: &Sources<'_>,
        walk: &mut Walk,
        budget: usize,
        report: &mut SweepReport,
        expired: &mut Expired,
    ) -> Result<(), PortError> {
        let (fill, now) = (self.fill(), from.now);
        let reader = from.tables.reader(self.name)?;
        let page = reader.page(&mut self.cursor, budget)?;
        for (_, value) in page.iter(reader.shape) {
            let Some(flow) = from_bytes::<Flow<A>>(value) else { continue };
            report.scanned += 1;
            self.entries += 1;
            let timeout = walk.timeouts.get(&flow.service).copied().unwrap_or(NO_SERVICE_TIMEOUT);
            let limit = u64::from(shortened(timeout, fill)).saturating_mul(SECOND);
            let is_idle = |flow: &Flow<A>| now.saturating_sub(flow.last_seen) > limit;
            let mut record = FlowEnd::default();
            let ended = match is_idle(&flow) {
                true => end(&mut self.flows, Some(from.cache), &flow, is_idle, &mut record)?,
                false => Ended::Nothing,
            };
            if ended == Ended::Flow && walk.recorded.contains(&flow.service) {
                expired.records.push(record);
            }
            if ended == Ended::Flow {
                *expired.services.entry(flow.service).or_default() += 1;
                *expired.backends.entry(flow.backend).or_default() += 1;
                report.expired += 1;
                continue;
            }
            if ended == Ended::Nothing {
                walk.ports.see(&flow);
            }
            if ended == Ended::Nothing && flow.direction == FORWARD {
                *walk.services.seen.entry(flow.service).or_default() += 1;
                *walk.backends.seen.entry(flow.backend).or_default() += 1;
            }
        }
        Ok(())
    }
}

/// The idle timeout at this fill, both in their units: in full up to 90 %, then in proportion to what is free, down to a
/// sixteenth.
fn shortened(timeout: u32, fill: u64) -> u32 {
    if fill <= CROWDED {
        return timeout;
    }
    let free = 1000_u64.saturating_sub(fill);
    let shorter = u64::from(timeout).saturating_mul(free) / (1000 - CROWDED);
    u32::try_from(shorter).unwrap_or(timeout).max(timeout / 16)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// A half is still in use.
    Nothing,
    /// No flow to count: it was gone, or only a reply half was left of it.
    Rest,
    /// A flow.
    Flow,
}

/// Removes both halves of a flow if both are idle, and writes what they were into `record`. `cache`: what holds copies of the
/// table's entries, and may know of later packets than they do.
pub(super) fn end<A: Part>(
    established: &mut HashMap<MapData, FlowKey<A>, Flow<A>>,
    cache: Option<&FlowCache>,
    flow: &Flow<A>,
    is_idle: impl Fn(&Flow<A>) -> bool,
    record: &mut FlowEnd,
) -> Result<Ended, PortError>
where
    FlowKey<A>: aya::Pod,
    Flow<A>: aya::Pod,
    Slot<A>: aya::Pod,
{
    let error = |error: &MapError| PortError::new("ending an idle flow", chain(error));
    let get = |established: &HashMap<MapData, FlowKey<A>, Flow<A>>, key: &FlowKey<A>| match established.get(key, 0) {
        Ok(mut flow) => {
            if let Some(cache) = cache {
                cache.tell(&mut flow);
            }
            Ok(Some(flow))
        }
        Err(MapError::KeyNotFound) => Ok(None),
        Err(cause) => Err(error(&cause)),
    };
    let twin = get(established, &flow.twin())?.filter(|twin| twin.twin() == flow.key);
    // The page may be old by now: the twin stood before it, or the flow has closed.
    let Some(own) = get(established, &flow.key)? else { return Ok(Ended::Rest) };
    if !is_idle(&own) || own.sequence != flow.sequence || twin.is_some_and(|twin| !is_idle(&twin)) {
        return Ok(Ended::Nothing);
    }
    describe(record, &own, twin.as_ref());
    let mut remove = |key: &FlowKey<A>| match established.remove(key) {
        Ok(()) => Ok(true),
        Err(MapError::KeyNotFound) => Ok(false),
        Err(MapError::SyscallError(cause)) if cause.io_error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(cause) => Err(error(&cause)),
    };
    let mut remove = |key: &FlowKey<A>| {
        let removed = remove(key);
        if let Some(cache) = cache {
            cache.changed(key);
        }
        removed
    };
    let removed_own = remove(&flow.key)?;
    let removed_twin = match twin {
        Some(twin) => remove(&twin.key)?,
        None => false,
    };
    let from_client = flow.direction == FORWARD;
    let removed_client = if from_client { removed_own } else { removed_twin };
    Ok(if removed_client { Ended::Flow } else { Ended::Rest })
}

fn describe<A: Address>(record: &mut FlowEnd, own: &Flow<A>, twin: Option<&Flow<A>>) {
    if own.direction == FORWARD {
        record.describe(own);
    } else {
        record.describe_reversed(own);
    }
    record.count(own);
    if let Some(twin) = twin {
        record.count(twin);
    }
    record.end = End::Idle as u8;
    record.ended = twin.map_or(own.last_seen, |twin| twin.last_seen.max(own.last_seen));
}

pub(super) fn add(map: &mut Array<MapData, u64>, counts: &BTreeMap<u32, u64>) -> Result<(), PortError> {
    for (number, count) in counts {
        let error = |error: MapError| PortError::new("counting expired flows", chain(&error));
        let before = map.get(number, 0).map_err(error)?;
        map.set(*number, before.wrapping_add(*count), 0).map_err(error)?;
    }
    Ok(())
}

/// Sets `expired` right where nothing opened or closed during the walk, so that active equals what was seen.
fn correct(
    map: &mut Array<MapData, u64>,
    census: &Census,
    after: &BTreeMap<u32, ServiceStats>,
) -> Result<(), PortError> {
    for (number, stats) in after {
        let quiet = census.before.get(number).is_some_and(|b| (b.opened, b.closed) == (stats.opened, stats.closed));
        if !quiet {
            continue;
        }
        let error = |error: MapError| PortError::new("correcting expired flows", chain(&error));
        let seen = census.seen.get(number).copied().unwrap_or(0);
        let expired = stats.opened.saturating_sub(stats.closed).saturating_sub(seen);
        if map.get(number, 0).map_err(error)? != expired {
            map.set(*number, expired, 0).map_err(error)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_whole_up_to_ninety_percent_and_shrink_to_a_sixteenth() {
        assert_eq!(shortened(7440, 0), 7440);
        assert_eq!(shortened(7440, 900), 7440);
        assert_eq!(shortened(7440, 950), 3720);
        assert_eq!(shortened(7440, 1000), 465);
        assert!((900..1000).all(|fill| shortened(300, fill + 1) <= shortened(300, fill)));
    }
}
