//! A change of few services among many: the same steps as [`diff`](super::diff::diff) over all of them, found without
//! looking at the others. Pure.
//!
//! It holds only where the maps held the state before, and where what changed is who is in a pool, who of it is eligible, and
//! with which weight, and which VIPs are announced: the same frontends in the same modes. Everything else, what has to be
//! numbered anew, freed or taken out of the filter, concerns other services too and takes the whole diff; so do members of two
//! dnat services, since the dnat index leads to one of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
};

use edge_common::maps::backend_state;

use super::{
    diff::{Fill, Plan, Reserved, backend_key, diff_among},
    ports::{Action, DatapathState, service_key},
};
use crate::{
    desired::{DesiredFrontend, DesiredState},
    model::{Frontend, Mode},
};

/// The frontends that changed, where nothing else did; `None`: the whole diff is needed.
fn changed<'a>(before: &DesiredState, after: &'a DesiredState) -> Option<Vec<(&'a Frontend, &'a DesiredFrontend)>> {
    let same_around = before.addresses == after.addresses
        && before.record_ends == after.record_ends
        && after.has_frontends_of(before);
    same_around.then(|| after.changed_since(before).into_iter().map(|(key, new)| (key, new.as_ref())).collect())
}

/// The first writes of a change: each backend that is not eligible any more is excluded, by one write, before anything
/// else is looked at, whatever else changes with it (the last one takes its VIP's route along).
pub fn exclusions(before: &DesiredState, after: &DesiredState, actual: &DatapathState) -> Vec<Action> {
    let mut actions = Vec::new();
    for (frontend, desired) in after.changed_since(before) {
        let Some(pool) = desired.pool.as_ref().filter(|_| before.frontends.contains_key(frontend)) else { continue };
        let eligible: BTreeSet<_> = pool.iter().filter(|backend| backend.eligible()).map(|b| b.address).collect();
        for number in numbers(actual, frontend) {
            let Some(slot) = actual.backends.get(&number) else { continue };
            if slot.eligible() && !eligible.contains(&slot.address()) {
                actions.push(Action::SetBackendState { number, state: slot.state & !backend_state::ELIGIBLE });
            }
        }
    }
    actions
}

/// The backends that a frontend's selection table names.
fn numbers(actual: &DatapathState, frontend: &Frontend) -> Vec<u32> {
    let number = actual.index.get(&service_key(frontend.address, frontend.protocol));
    let region = number
        .and_then(|number| actual.services.get(number))
        .and_then(|slot| actual.regions.get(&slot.entry.selection));
    region.map(|region| region.numbers().collect()).unwrap_or_default()
}

/// The steps from `before`, which the maps hold, to `after`; `None`: the whole diff is needed. `members` are the backend
/// numbers of each service number in `actual`.
pub fn narrow(
    before: &DesiredState,
    after: &DesiredState,
    actual: &DatapathState,
    members: &BTreeMap<u32, BTreeSet<u32>>,
    reserved: &Reserved,
    fill: &Fill<'_>,
) -> Option<Plan> {
    let changed = changed(before, after)?;
    let mut desired = DesiredState {
        record_ends: after.record_ends,
        addresses: after.addresses.clone(),
        announcements: after.announcements.clone(),
        ..DesiredState::default()
    };
    let mut part = DatapathState {
        capacity: actual.capacity,
        filter: actual.filter.clone(),
        announced: actual.announced.clone(),
        ..DatapathState::default()
    };
    for (frontend, _) in changed {
        let (known, wanted) = (before.frontends.get(frontend)?, after.frontends.get(frontend)?);
        let is_alike = known.mode == wanted.mode && known.protection == wanted.protection;
        if !is_alike || wanted.pool.is_none() || known.pool.is_none() {
            return None;
        }
        desired.frontends.insert(*frontend, wanted.clone());
        let key = service_key(frontend.address, frontend.protocol);
        let number = *actual.index.get(&key)?;
        let slot = actual.services.get(&number)?.clone();
        if let Some(region) = actual.regions.get(&slot.entry.selection) {
            part.regions.insert(slot.entry.selection, region.clone());
        }
        part.index.insert(key, number);
        part.services.insert(number, slot);
        let numbers = members.get(&number);
        for backend in numbers.into_iter().flatten() {
            let slot = *actual.backends.get(backend)?;
            let key = backend_key(&slot.entry);
            match actual.backend_index.get(&key) {
                Some(leads) if numbers.is_some_and(|numbers| numbers.contains(leads)) => {
                    Arc::make_mut(&mut part.backend_index).insert(key, *leads);
                }
                Some(_) if wanted.mode == Mode::Dnat => return None,
                _ => {}
            }
            part.backends.insert(*backend, slot);
        }
        if wanted.mode == Mode::Dnat && !is_alone(frontend, &moved(known, wanted), after, actual, numbers) {
            return None;
        }
        let own = actual.ranges.iter().filter(|(key, _)| key.source.service == number);
        part.ranges.extend(own.map(|(key, action)| (*key, *action)));
    }
    let mut reserved = reserved.clone();
    let others = actual.regions.iter().filter(|(first, _)| !part.regions.contains_key(first));
    reserved.regions.extend(others.map(|(first, region)| (*first, region.chunks())));
    // What has left drains first; freeing it takes the whole diff.
    reserved.backends.extend(part.backends.keys());
    reserved.others = actual.backends.clone();
    let plan = diff_among(&desired, Some(after), &part, &reserved, fill);
    let is_narrow = |action: &Action| match action {
        Action::SetBackendState { .. }
        | Action::PutBackend { .. }
        | Action::SetFilter { .. }
        | Action::PutBackendIndex { .. }
        | Action::WriteRegion { .. }
        | Action::Withdraw { .. }
        | Action::Announce { .. } => true,
        Action::PutService { fresh, .. } => !fresh,
        _ => false,
    };
    (plan.problems.is_empty() && plan.actions.iter().all(is_narrow)).then_some(plan)
}

/// Who came and who went.
fn moved(before: &DesiredFrontend, after: &DesiredFrontend) -> BTreeSet<SocketAddr> {
    let addresses = |of: &DesiredFrontend| -> BTreeSet<SocketAddr> {
        of.pool.iter().flatten().map(|backend| backend.address).collect()
    };
    addresses(before).symmetric_difference(&addresses(after)).copied().collect()
}

/// True where no other dnat service has, or had, a backend at any of these addresses.
fn is_alone(
    frontend: &Frontend,
    moved: &BTreeSet<SocketAddr>,
    after: &DesiredState,
    actual: &DatapathState,
    numbers: Option<&BTreeSet<u32>>,
) -> bool {
    let is_own = |number: &u32| numbers.is_some_and(|numbers| numbers.contains(number));
    let mut leads =
        moved.iter().filter_map(|address| actual.backend_index.get(&service_key(*address, frontend.protocol)));
    let others = after.frontends.iter().filter(|(key, other)| *key != frontend && other.mode == Mode::Dnat);
    let mut others = others.flat_map(|(_, other)| other.pool.iter().flatten());
    moved.is_empty() || leads.all(is_own) && !others.any(|backend| moved.contains(&backend.address))
}
