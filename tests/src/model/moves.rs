//! Steps that are no packets: applied to the model, then written into the maps.

use std::collections::BTreeMap;

use anyhow::Result;
use edge_common::maps::name;

use super::{
    connections::expired,
    dice::Dice,
    flow::{Flow, Key},
    generate::Move,
    kernel::Kernel,
    network::Network,
    protect,
    state::{Load, SECOND, State, TABLES, Table},
    world::{self, write_backend_state, write_control},
};

/// A next-hop or service number that no map has.
const NO_NUMBER: u32 = 9999;

/// The map of a table.
pub fn map_name(table: Table) -> &'static str {
    match table {
        Table::Established => name::ESTABLISHED,
        Table::HalfOpen => name::HALF_OPEN,
        Table::Closing => name::CLOSING,
    }
}

/// Applies a step to both.
///
/// # Errors
/// Where the kernel refuses a write.
pub fn apply(state: &mut State, kernel: &Kernel, network: &mut Network, change: &Move, now: u64) -> Result<()> {
    match change {
        Move::Packet { .. } => {}
        Move::Age(by) => {
            for table in TABLES {
                for flow in state.table_mut(table).values_mut() {
                    age(flow, *by);
                    kernel.set_flow(map_name(table), flow)?;
                }
            }
            for (key, first) in &mut state.fragments {
                first.seen = first.seen.saturating_sub(*by);
                kernel.map(name::FRAGMENTS)?.set(key, first)?;
            }
            let config = state.config.clone();
            for (source, spent) in &mut state.sources {
                if let Some((service, _)) = config.services.get(&source.service) {
                    protect::age(spent, service, *by);
                }
                kernel.map(name::SOURCES)?.set(source, spent)?;
            }
            for (backend, load) in &mut state.loads {
                load.pending.tick = load.pending.tick.wrapping_sub((by >> 30) as u32);
                kernel.set_load(*backend, load)?;
            }
            for (home, entry) in &mut state.homes {
                entry.seen = entry.seen.wrapping_sub((by / SECOND) as u32);
                kernel.map(name::AFFINITY)?.set(home, entry)?;
            }
        }
        Move::Home(home, None) => {
            state.homes.remove(home);
            kernel.map(name::AFFINITY)?.delete(home);
        }
        Move::Home(home, Some(backend)) => {
            if let Some(entry) = state.homes.get_mut(home) {
                entry.backend = *backend;
                kernel.map(name::AFFINITY)?.set(home, entry)?;
            }
        }
        Move::Load(backend, flows) => {
            let load = state.loads.entry(*backend).or_default();
            set_active(load, *flows);
            kernel.set_load(*backend, load)?;
        }
        Move::Protect(number, seed, clients) => {
            world::protection(state.configure(), *number, &mut Dice(*seed), clients);
            world::write_protection(state, kernel, *number)?;
        }
        Move::Eligible(backend, eligible) => {
            state.configure().eligible.insert(*backend, *eligible);
            write_backend_state(&state.config, kernel, *backend)?;
        }
        Move::Forget(table, key) => forget(state, kernel, *table, key)?,
        Move::Sweep => {
            for key in over(state, now) {
                forget(state, kernel, Table::Established, &key)?;
            }
            // The daemon counts those, and at the end of its walk knows whom else the counters have missed.
            let established = state.table(Table::Established).clone();
            for (backend, load) in &mut state.loads {
                set_active(load, clients_of(&established, *backend));
                kernel.set_load(*backend, load)?;
            }
        }
        Move::Generation => {
            state.configure().generation += 1;
            write_control(&state.config, kernel)?;
        }
        Move::Redirectable(yes) => {
            state.configure().redirectable = vec![network.uplink];
            state.configure().redirectable.extend(yes.then_some(network.pods));
            write_control(&state.config, kernel)?;
        }
        Move::Spoil(table, key, next_hop) => {
            let generation = state.config.generation;
            if let Some(flow) = state.table_mut(*table).get_mut(key) {
                if *next_hop {
                    (flow.next_hop, flow.route_generation) = (NO_NUMBER, generation);
                } else {
                    flow.service = NO_NUMBER;
                }
                kernel.set_flow(map_name(*table), flow)?;
            }
        }
        Move::Network(shape) => {
            network.become_(*shape)?;
            state.configure().routes = network.routes();
        }
    }
    Ok(())
}

fn forget(state: &mut State, kernel: &Kernel, table: Table, key: &Key) -> Result<()> {
    state.table_mut(table).remove(key);
    kernel.end_flow(map_name(table), key)?;
    Ok(())
}

/// Flows that a backend has: their clients' halves that are established.
fn clients_of(established: &BTreeMap<Key, Flow>, backend: u32) -> i32 {
    established.values().filter(|flow| flow.backend == backend && flow.direction == 0).count() as i32
}

/// Sets what expired so that a backend has so many flows; the counter has run over a few times.
fn set_active(load: &mut Load, flows: i32) {
    let ended = load.live.wrapping_sub(flows.cast_unsigned());
    load.expired = ((load.expired >> 32) + 1) << 32 | u64::from(ended);
}

/// As if the entry's times were that much longer ago.
fn age(flow: &mut Flow, by: u64) {
    flow.last_seen = flow.last_seen.saturating_sub(by);
    flow.created = flow.created.saturating_sub(by);
    flow.touch_due = flow.touch_due.wrapping_sub((by >> 20) as u32);
}

/// Established entries that the daemon would end: both directions' time is over.
fn over(state: &State, now: u64) -> Vec<Key> {
    let flows = state.table(Table::Established).values();
    let over = flows.filter(|flow| {
        let timeout = state.config.services.get(&flow.service).map_or(0, |(service, _)| service.established_timeout);
        expired(flow.last_seen, timeout, now)
    });
    over.map(|flow| flow.key).collect()
}
