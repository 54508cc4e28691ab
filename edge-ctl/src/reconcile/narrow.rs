//! A change of few services among many: the same steps as [`diff`](super::diff::diff) over all of them, found without
//! looking at the others. Pure.
//!
//! It holds only where the maps held the state before, and where what changed is who is eligible, and with which weight: the
//! same frontends with the same members, the same VIPs announced. Everything else, what has to be numbered, drained, freed or
//! filtered, concerns other services too and takes the whole diff.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
};

use edge_common::maps::{ServiceKey, backend_state};

use super::{
    diff::{Fill, Plan, Reserved, diff},
    ports::{Action, DatapathState, service_key},
};
use crate::{
    desired::{DesiredFrontend, DesiredState},
    model::Frontend,
};

/// The frontends that changed, where nothing else did; `None`: the whole diff is needed.
fn changed<'a>(before: &DesiredState, after: &'a DesiredState) -> Option<Vec<(&'a Frontend, &'a DesiredFrontend)>> {
    let same_around = before.announcements == after.announcements
        && before.addresses == after.addresses
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
    let mut desired =
        DesiredState { record_ends: after.record_ends, addresses: after.addresses.clone(), ..DesiredState::default() };
    let mut part = DatapathState { capacity: actual.capacity, ..DatapathState::default() };
    for (frontend, _) in changed {
        let (known, wanted) = (before.frontends.get(frontend)?, after.frontends.get(frontend)?);
        if addresses(known) != addresses(wanted) || known.mode != wanted.mode || known.protection != wanted.protection {
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
        for backend in members.get(&number)? {
            let slot = *actual.backends.get(backend)?;
            let entry = &slot.entry;
            let key = ServiceKey { address: entry.address, port: entry.port, protocol: entry.protocol, _pad: 0 };
            if let Some(leads) = actual.backend_index.get(&key) {
                Arc::make_mut(&mut part.backend_index).insert(key, *leads);
            }
            part.backends.insert(*backend, slot);
        }
        let own = actual.ranges.iter().filter(|(key, _)| key.source.service == number);
        part.ranges.extend(own.map(|(key, action)| (*key, *action)));
    }
    // Bits of other services would look superfluous.
    part.filter = part.needed_filter().into();
    let mut reserved = reserved.clone();
    let others = actual.regions.iter().filter(|(first, _)| !part.regions.contains_key(first));
    reserved.regions.extend(others.map(|(first, region)| (*first, region.chunks())));
    let plan = diff(&desired, &part, &reserved, fill);
    let is_narrow = |action: &Action| match action {
        Action::SetBackendState { .. } | Action::WriteRegion { .. } => true,
        Action::PutService { fresh, .. } => !fresh,
        // A limit; the number is in use already.
        Action::PutBackend { fresh, .. } => !fresh,
        _ => false,
    };
    (plan.problems.is_empty() && plan.actions.iter().all(is_narrow)).then_some(plan)
}

/// The members of a pool, eligible or not.
fn addresses(frontend: &DesiredFrontend) -> Option<Vec<SocketAddr>> {
    Some(frontend.pool.as_ref()?.iter().map(|backend| backend.address).collect())
}
