//! Which backend gets a new flow. A client with affinity goes where it was before. Else the method says at which slot of
//! the table to look: Maglev's is the keyed tuple hash, a round robin's is the shared cursor, and for the fewest
//! connections two slots are drawn by the hash and the less loaded backend of the two is taken. Where a backend is
//! excluded or has as many connections as it may have, a deterministic walk goes on from there; the backup tier is asked
//! once the primary one has nobody.

use edge_common::{
    flow::FlowKey,
    hash, maglev,
    maps::{
        AffinityEntry, AffinityKey, POOL_PER_CHUNK, Pending, SLOTS_PER_CHUNK, SelectionHeader, ServiceEntry,
        backend_state, balance, less_loaded,
    },
};

use crate::{family::Family, maps};

/// Table slots tried after the first: spreads an excluded backend's share over the others.
const NEXT_SLOTS: u32 = 16;
/// Pool entries tried after those: finds the one that is left where nearly all are excluded.
const POOL_SCAN: u32 = 256;

/// No backend is eligible.
pub const NONE: u32 = 0;
/// Backends are eligible, but all of those met are full. No backend has this number.
pub const FULL: u32 = u32::MAX;

/// Where to look in a tier's table.
struct Draw {
    first: u64,
    second: u64,
    two: bool,
}

/// The number of a backend for a new flow of `service`, or [`NONE`] or [`FULL`]; `avoid` only where there is no other, and
/// [`NONE`] to avoid nobody.
#[inline(never)]
pub fn backend<A: Family>(number: u32, service: &ServiceEntry, key: &FlowKey<A>, avoid: u32) -> u32 {
    let now = maps::now();
    if service.affinity_timeout != 0 {
        let kept = at_home(number, service.affinity_timeout, key, now);
        if kept != NONE && kept != avoid {
            return kept;
        }
    }
    let Some(control) = maps::control() else {
        return NONE;
    };
    let hash = hash::tuple(control.seed, &chosen_by(service, key));
    let first = if service.balance == balance::ROUND_ROBIN { u64::from(maps::next_turn(number)) } else { hash };
    let draw = Draw { first, second: hash.rotate_left(32), two: service.balance == balance::LEAST_CONNECTIONS };
    maps::set_met_full(0);
    let mut region = service.selection;
    for _tier in 0..2 {
        let Some(header) = header(region) else {
            break;
        };
        let found = in_tier(&header, &draw, Pending::tick(now), avoid);
        if found != NONE {
            return found;
        }
        region = header.backup;
    }
    // Being told that all are full is worth more than that there is none.
    if maps::met_full() { FULL } else { NONE }
}

/// The backend that every edge chooses for a new flow of `key`, or [`NONE`] where they need not agree: only Maglev's choice
/// follows from the tuple alone. What only one edge knows (a client's home, a full backend) may make its choice another.
/// With the choice as `avoid` it is the next one, which a client gets whom the first does not answer.
#[inline(never)]
pub fn agreed<A: Family>(service: &ServiceEntry, key: &FlowKey<A>, avoid: u32) -> u32 {
    if service.balance != balance::MAGLEV {
        return NONE;
    }
    let Some(control) = maps::control() else {
        return NONE;
    };
    let hash = hash::tuple(control.seed, &chosen_by(service, key));
    let draw = Draw { first: hash, second: hash, two: false };
    let tick = Pending::tick(maps::now());
    let mut region = service.selection;
    for _tier in 0..2 {
        let Some(header) = header(region) else {
            break;
        };
        let found = in_tier(&header, &draw, tick, avoid);
        if found != NONE {
            return found;
        }
        region = header.backup;
    }
    NONE
}

/// The tuple whose hash chooses. With affinity all connections of a client to the frontend, to all of its ports where it has
/// many, agree before one of them is remembered, as do all edges.
#[inline(always)]
fn chosen_by<A: Family>(service: &ServiceEntry, key: &FlowKey<A>) -> FlowKey<A> {
    let (from, to) = if service.affinity_timeout == 0 { (key.src_port, key.dst_port) } else { (0, service.port) };
    FlowKey::new(key.src, key.dst, from, to, key.protocol)
}

/// Counts a flow that is about to begin towards the limit of its backend.
#[inline(always)]
pub fn begun(backend: u32, limit: u32, now: u64) {
    if limit != 0
        && let Some(pending) = maps::backend_pending(backend)
    {
        *pending = pending.begun(Pending::tick(now));
    }
}

/// A flow has proved itself: it no longer pends, and its client is at home there from now on, unless another backend that
/// may still be used was first.
#[inline(never)]
pub fn promoted<A: Family>(number: u32, affinity_timeout: u32, client: A, backend: u32) {
    let now = maps::now();
    if maps::backend(backend).is_some_and(|entry| entry.limit != 0)
        && let Some(pending) = maps::backend_pending(backend)
    {
        *pending = pending.promoted(Pending::tick(now));
    }
    if affinity_timeout == 0 {
        return;
    }
    let (key, now) = (AffinityKey::new(number, client.wide()), seconds(now));
    if let Some(home) = maps::affinity(&key) {
        let stays = !home.is_over(affinity_timeout, now) && is_member(number, home.backend);
        if !stays {
            home.backend = backend;
        }
        home.seen = now;
        return;
    }
    maps::remember(&key, &AffinityEntry { backend, seen: now });
}

/// The backend that the client had before, where it may still be used; else [`NONE`].
#[inline(never)]
fn at_home<A: Family>(number: u32, timeout: u32, key: &FlowKey<A>, now: u64) -> u32 {
    let Some(home) = maps::affinity(&AffinityKey::new(number, key.src.wide())) else {
        return NONE;
    };
    let backend = home.backend;
    if home.is_over(timeout, seconds(now)) || !is_member(number, backend) || !usable(backend, Pending::tick(now)) {
        return NONE;
    }
    home.seen = seconds(now);
    backend
}

/// True for an eligible backend of the service: its number may be another's by now.
#[inline(always)]
fn is_member(service: u32, backend: u32) -> bool {
    maps::backend_state(backend) & backend_state::ELIGIBLE != 0
        && maps::backend(backend).is_some_and(|entry| entry.service == service)
}

#[inline(always)]
fn seconds(now: u64) -> u32 {
    (now / 1_000_000_000) as u32
}

#[inline(always)]
fn header(region: u32) -> Option<SelectionHeader> {
    if region == 0 {
        return None;
    }
    let header = SelectionHeader {
        pool_len: maps::selection_u32(region, 0)?,
        table_len: maps::selection_u32(region, 1)?,
        pool_chunk: maps::selection_u32(region, 2)?,
        table_chunk: maps::selection_u32(region, 3)?,
        backup: maps::selection_u32(region, 4)?,
    };
    if header.pool_len == 0 || header.table_len == 0 { None } else { Some(header) }
}

/// A backend of one tier, or [`NONE`].
#[inline(never)]
fn in_tier(header: &SelectionHeader, draw: &Draw, tick: u32, avoid: u32) -> u32 {
    let first = walk(header, draw.first, avoid, tick);
    if first == NONE {
        return scan(header, draw.first, tick);
    }
    if !draw.two {
        return first;
    }
    let second = walk(header, draw.second, first, tick);
    if second != NONE && second != avoid && less_loaded(load(second), load(first)) { second } else { first }
}

#[inline(always)]
fn load(backend: u32) -> (u32, u32) {
    (maps::backend_active(backend), maps::backend_state(backend))
}

/// The first usable backend but `other` in the slots from that of `hash` on.
#[inline(never)]
fn walk(header: &SelectionHeader, hash: u64, other: u32, tick: u32) -> u32 {
    // `header` sees to it; the compiler must, too, or it makes a call of the panic.
    let table_len = header.table_len;
    if table_len == 0 {
        return NONE;
    }
    let start = maglev::slot(hash, table_len);
    // Remainders rather than a wrap to 0: the verifier then sees one path per step.
    for step in 0..=NEXT_SLOTS {
        let Some(index) = pool_index(header, (start + step) % table_len) else {
            return NONE;
        };
        let number = number(header, index);
        if number != other && usable(number, tick) {
            return number;
        }
    }
    NONE
}

/// The first eligible backend of the pool after that in the slot of `hash`.
#[inline(never)]
fn scan(header: &SelectionHeader, hash: u64, tick: u32) -> u32 {
    let (pool_len, table_len) = (header.pool_len, header.table_len);
    if pool_len == 0 || table_len == 0 {
        return NONE;
    }
    let Some(start) = pool_index(header, maglev::slot(hash, table_len)) else {
        return NONE;
    };
    for step in 1..=POOL_SCAN {
        let number = number(header, (start + step) % pool_len);
        if maps::backend_state(number) & backend_state::ELIGIBLE != 0 {
            // Its limit is looked at once, not in every step: the verifier walks them all.
            return if has_room(number, tick) { number } else { NONE };
        }
    }
    NONE
}

#[inline(always)]
fn pool_index(header: &SelectionHeader, slot: u32) -> Option<u32> {
    maps::selection_u16(header.table_chunk + slot / SLOTS_PER_CHUNK, slot % SLOTS_PER_CHUNK).map(u32::from)
}

#[inline(always)]
fn number(header: &SelectionHeader, index: u32) -> u32 {
    maps::selection_u32(header.pool_chunk + index / POOL_PER_CHUNK, index % POOL_PER_CHUNK).unwrap_or(NONE)
}

/// Whether a backend may be given a flow now.
#[inline(always)]
fn usable(number: u32, tick: u32) -> bool {
    maps::backend_state(number) & backend_state::ELIGIBLE != 0 && has_room(number, tick)
}

/// Whether a backend has fewer flows than it may have.
#[inline(never)]
fn has_room(number: u32, tick: u32) -> bool {
    let limit = maps::backend(number).map_or(0, |entry| entry.limit);
    if limit == 0 {
        return true;
    }
    let pending = maps::backend_pending(number).map_or(0, |pending| pending.counted(limit, tick));
    if maps::backend_active(number).saturating_add(pending) < limit {
        return true;
    }
    maps::set_met_full(1);
    false
}
