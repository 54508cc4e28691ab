//! Which backend a new flow gets: the table's, of the primary tier, then of the backup one; none that has as many flows as it
//! may have.

use super::{
    coverage::Point,
    decide::Input,
    flow::Key,
    hash::{self, Fit, Found},
    state::{Load, Pool, State},
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

/// Chooses for a new flow.
pub fn backend(state: &mut State, input: &Input, number: u32, key: &Key, avoid: u32) -> Choice {
    let config = state.config.clone();
    let Some((_, pool)) = config.services.get(&number) else { return Choice::Nobody };
    let hash = hash::tuple(config.seed, key);
    let mut look = Look::new(state, input);
    let choice = look.in_tiers(hash, pool, avoid);
    let points = look.points;
    points.into_iter().for_each(|point| state.hit(point));
    choice
}

/// The backend that every edge chooses for the client, as far as limits do not make it another.
pub fn agreed(state: &State, input: &Input, number: u32, client: &Key, avoid: u32) -> Option<u32> {
    let (_, pool) = state.config.services.get(&number)?;
    let hash = hash::tuple(state.config.seed, client);
    match Look::new(state, input).in_tiers(hash, pool, avoid) {
        Choice::Backend(backend) => Some(backend),
        Choice::Nobody | Choice::AllFull => None,
    }
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

    fn in_tiers(&mut self, hash: u64, pool: &Pool, avoid: u32) -> Choice {
        if let Some(backend) = self.in_tier(hash, pool, avoid) {
            if self.met_full {
                self.points.push(Point::FullPassedOver);
            }
            return Choice::Backend(backend);
        }
        if let Some(backup) = &pool.backup
            && let Some(backend) = self.in_tier(hash, backup, avoid)
        {
            self.points.push(if self.met_full { Point::BackupForFull } else { Point::Backup });
            return Choice::Backend(backend);
        }
        if self.met_full { Choice::AllFull } else { Choice::Nobody }
    }

    fn in_tier(&mut self, hash: u64, tier: &Pool, avoid: u32) -> Option<u32> {
        let (point, backend) = match hash::select(hash, &tier.members, &tier.table, avoid, |backend| self.fit(backend))
        {
            Found::Own(backend) => (Point::SelectedOwn, backend),
            Found::Next(backend) => (Point::SelectedNext, backend),
            Found::Scan(backend) => (Point::SelectedScan, backend),
            Found::None => return None,
        };
        self.points.push(point);
        Some(backend)
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

/// A flow has proved itself.
pub fn proved(state: &mut State, input: &Input, backend: u32) {
    pends(state, backend, input.chosen, |flows| flows.saturating_sub(1));
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
