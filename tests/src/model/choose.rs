//! Which backend a new flow gets: where its client is at home; else one of the primary tier's table, then of the backup one's, by
//! the hash of its tuple, by turns, or the less loaded of two; none that has as many flows as it may have.

use edge_common::{
    address::Wide,
    maps::{AffinityEntry, AffinityKey, ServiceEntry, balance},
};

use super::{
    coverage::Point,
    decide::Input,
    flow::{Flow, Key},
    hash::{self, Fit, Found},
    state::{Load, Pool, SECOND, State},
};

/// Half-open flows count towards a limit up to this part of it.
const PENDING_PART: u32 = 4;

/// What came of looking for a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// This one.
    Backend(u32),
    /// No backend is eligible.
    Nobody,
    /// Some are, and those that were met are full.
    AllFull,
}

/// Where to look in a table.
#[derive(Clone, Copy, Debug)]
struct Draw {
    /// The first place.
    first: u64,
    /// Another, where the less loaded of two is to be found.
    second: Option<u64>,
}

/// Chooses for a new flow.
pub fn backend(state: &mut State, input: &Input, number: u32, key: &Key, avoid: u32) -> Choice {
    let config = state.config.clone();
    let Some((service, pool)) = config.services.get(&number) else { return Choice::Nobody };
    if let Some(home) = at_home(state, input, number, service, key) {
        if home != avoid {
            state.hit(Point::AtHome);
            return Choice::Backend(home);
        }
        state.hit(Point::HomeSilent);
    }
    let hash = hashed(state, service, key);
    let draw = match service.balance {
        balance::ROUND_ROBIN => Draw { first: turn(state, number).into(), second: None },
        // The halves of the hash, changed about, are another hash.
        balance::LEAST_CONNECTIONS => Draw { first: hash, second: Some(hash.rotate_left(32)) },
        _ => Draw { first: hash, second: None },
    };
    let mut look = Look::new(state, input);
    let choice = look.in_tiers(draw, pool, avoid);
    let points = look.points;
    points.into_iter().for_each(|point| state.hit(point));
    choice
}

/// The backend that every edge chooses for the client, as far as limits do not make it another: turns and loads are an edge's own.
pub fn agreed(state: &State, input: &Input, number: u32, client: &Key, avoid: u32) -> Option<u32> {
    let (service, pool) = state.config.services.get(&number)?;
    if service.balance != balance::MAGLEV {
        return None;
    }
    let draw = Draw { first: hashed(state, service, client), second: None };
    match Look::new(state, input).in_tiers(draw, pool, avoid) {
        Choice::Backend(backend) => Some(backend),
        Choice::Nobody | Choice::AllFull => None,
    }
}

/// The hash that chooses: of the client's tuple, or with affinity of all that the client has with the frontend.
fn hashed(state: &State, service: &ServiceEntry, key: &Key) -> u64 {
    let of_client = Key { src_port: 0, dst_port: service.port, ..*key };
    hash::tuple(state.config.seed, if service.affinity_timeout == 0 { key } else { &of_client })
}

/// Takes a turn.
fn turn(state: &mut State, number: u32) -> u32 {
    state.hit(Point::Turn);
    state.touched_turns.push(number);
    let next = state.turns.entry(number).or_default();
    let turn = *next;
    *next = turn.wrapping_add(1);
    turn
}

/// Where maps hold the home of a client.
pub fn home_key(number: u32, client: Wide) -> AffinityKey {
    AffinityKey { client, service: number, _pad: 0 }
}

/// The backend that the client had before, where it may have this flow, too.
fn at_home(state: &mut State, input: &Input, number: u32, service: &ServiceEntry, key: &Key) -> Option<u32> {
    if service.affinity_timeout == 0 {
        return None;
    }
    let at = home_key(number, key.src);
    let Some(home) = state.homes.get(&at).copied() else {
        state.hit(Point::NoHome);
        return None;
    };
    state.touched_homes.push(at);
    if !is_home(state, input, number, service, &home) {
        return None;
    }
    if Look::new(state, input).fit(home.backend) != Fit::Free {
        state.hit(Point::HomeFull);
        return None;
    }
    state.homes.insert(at, AffinityEntry { seen: seconds(input.chosen), ..home });
    Some(home.backend)
}

/// True where the client has not been away for too long, and the backend is still one of the service's that may have flows: its
/// number may be another's by now.
fn is_home(state: &mut State, input: &Input, number: u32, service: &ServiceEntry, home: &AffinityEntry) -> bool {
    let away = seconds(input.chosen).wrapping_sub(home.seen).cast_signed();
    if i64::from(away) > i64::from(service.affinity_timeout) {
        state.hit(Point::AwayTooLong);
        return false;
    }
    let config = &state.config;
    let of_service = config.backends.get(&home.backend).is_some_and(|backend| backend.service == number);
    if !of_service || !config.eligible.get(&home.backend).copied().unwrap_or(false) {
        state.hit(if of_service { Point::HomeOut } else { Point::HomeOfAnother });
        return false;
    }
    true
}

/// Whole seconds.
fn seconds(at: u64) -> u32 {
    (at / SECOND) as u32
}

/// A look at tables and loads, and what was met.
struct Look<'a> {
    state: &'a State,
    at: u64,
    met_full: bool,
    points: Vec<Point>,
}

impl<'a> Look<'a> {
    fn new(state: &'a State, input: &Input) -> Self {
        Self { state, at: input.chosen, met_full: false, points: Vec::new() }
    }

    fn in_tiers(&mut self, draw: Draw, pool: &Pool, avoid: u32) -> Choice {
        if let Some(backend) = self.in_tier(draw, pool, avoid) {
            if self.met_full {
                self.points.push(Point::FullPassedOver);
            }
            return Choice::Backend(backend);
        }
        if let Some(backup) = &pool.backup
            && let Some(backend) = self.in_tier(draw, backup, avoid)
        {
            self.points.push(if self.met_full { Point::BackupForFull } else { Point::Backup });
            return Choice::Backend(backend);
        }
        if self.met_full { Choice::AllFull } else { Choice::Nobody }
    }

    fn in_tier(&mut self, draw: Draw, tier: &Pool, avoid: u32) -> Option<u32> {
        let (members, table) = (&tier.members, &tier.table);
        let (point, first) = match hash::select(draw.first, members, table, avoid, |backend| self.fit(backend)) {
            Found::Own(backend) => (Point::SelectedOwn, backend),
            Found::Next(backend) => (Point::SelectedNext, backend),
            Found::Scan(backend) => {
                self.points.push(Point::SelectedScan);
                return Some(backend);
            }
            Found::None => return None,
        };
        self.points.push(point);
        let Some(second) = draw.second else { return Some(first) };
        let Some((_, second)) = hash::in_slots(second, members, table, first, |backend| self.fit(backend)) else {
            self.points.push(Point::OneOfOne);
            return Some(first);
        };
        if second == avoid || !self.less_loaded(second, first) {
            self.points.push(Point::FirstOfTwo);
            return Some(first);
        }
        self.points.push(Point::SecondOfTwo);
        Some(second)
    }

    /// True where backend `a`, had it this flow, too, would have fewer flows for each unit of its weight than `b` had.
    fn less_loaded(&self, a: u32, b: u32) -> bool {
        let flows = |backend: u32| self.state.loads.get(&backend).map_or(0, Load::active) + 1;
        let weight = |backend: u32| self.state.config.weights.get(&backend).map_or(100, |weight| weight.hundredths());
        let load = |of: u32, by: u32| u128::from(flows(of)) * u128::from(weight(by));
        load(a, b) < load(b, a)
    }

    fn fit(&mut self, backend: u32) -> Fit {
        let config = &self.state.config;
        if !config.eligible.get(&backend).copied().unwrap_or(false) {
            return Fit::Out;
        }
        let limit = config.backends.get(&backend).map_or(0, |backend| backend.limit);
        if limit == 0 {
            return Fit::Free;
        }
        let load = self.state.loads.get(&backend).copied().unwrap_or_default();
        let (active, pending) = (load.active(), load.pending_at(tick(self.at)));
        let counted = pending.min(limit / PENDING_PART);
        if active + counted < limit {
            if active + pending >= limit {
                self.points.push(Point::PendingCapped);
            }
            return Fit::Free;
        }
        if active < limit {
            self.points.push(Point::FullByPending);
        }
        self.met_full = true;
        Fit::Full
    }
}

/// The tick, 2^30 ns, in which a moment is.
fn tick(at: u64) -> u32 {
    (at >> 30) as u32
}

/// A flow that pends has begun, at `at`.
pub fn begun(state: &mut State, backend: u32, at: u64) {
    pends(state, backend, at, |flows| flows.saturating_add(1));
}

/// A client's flow has proved itself: it pends no more, and its client is at home where it went, unless another backend was
/// first.
pub fn proved(state: &mut State, input: &Input, service: &ServiceEntry, flow: &Flow) {
    pends(state, flow.backend, input.chosen, |flows| flows.saturating_sub(1));
    if service.affinity_timeout == 0 {
        return;
    }
    let at = home_key(flow.service, flow.key.src);
    let known = state.homes.get(&at).copied();
    let stays = known.filter(|home| is_home(state, input, flow.service, service, home));
    let (point, backend) = match (known, stays) {
        (None, _) => (Point::NewHome, flow.backend),
        (_, Some(home)) if home.backend == flow.backend => (Point::SameHome, home.backend),
        (_, Some(home)) => (Point::AnotherWasFirst, home.backend),
        (Some(_), None) => (Point::Moved, flow.backend),
    };
    state.hit(point);
    state.homes.insert(at, AffinityEntry { backend, seen: seconds(input.chosen) });
    state.touched_homes.push(at);
}

/// Changes the flows of a backend with a limit that pend.
fn pends(state: &mut State, backend: u32, at: u64, change: impl Fn(u32) -> u32) {
    if state.config.backends.get(&backend).is_none_or(|backend| backend.limit == 0) {
        return;
    }
    let load = state.loads.entry(backend).or_default();
    let before = load.pending_at(tick(at));
    let halved = load.pending.flows != before && before != 0;
    (load.pending.tick, load.pending.flows) = (tick(at), change(before));
    state.touched_loads.push(backend);
    state.coverage.hit_if(Point::PendingHalved, halved);
}

/// A backend has one flow more.
pub fn opened(state: &mut State, service: u32, backend: u32) {
    state.count(service, backend, |stats| stats.opened += 1);
    live(state, backend, 1);
}

/// A backend has one flow less.
pub fn closed(state: &mut State, service: u32, backend: u32) {
    state.count(service, backend, |stats| stats.closed += 1);
    live(state, backend, u32::MAX);
}

fn live(state: &mut State, backend: u32, change: u32) {
    let load: &mut Load = state.loads.entry(backend).or_default();
    load.live = load.live.wrapping_add(change);
    state.touched_loads.push(backend);
}

#[cfg(test)]
mod tests {
    use super::*;
    use edge_common::maps::Pending;

    #[test]
    fn what_pends_is_halved_in_the_next_tick_and_gone_after_it() {
        let load = Load { pending: Pending { tick: 7, flows: 10 }, ..Load::default() };
        assert_eq!([6, 7, 8, 9].map(|tick| load.pending_at(tick)), [10, 10, 5, 0]);
    }

    #[test]
    fn flows_are_what_was_opened_less_what_was_closed_and_what_expired() {
        let active = |live, expired| Load { live, expired, ..Load::default() }.active();
        assert_eq!([active(3, 1), active(1, 3), active(1, u64::from(u32::MAX)), active(5, 1 << 40)], [2, 0, 2, 5]);
    }
}
