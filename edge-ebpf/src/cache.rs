//! The flow cache (see `edge_common::maps::cache`): where a packet's slot is, filling one from an entry, and telling the entry
//! what its slot has counted.

use edge_common::{
    conntrack::{Direction, State, ticks},
    flow::FlowKey,
    maps::{
        BACKENDS, CacheSet, CacheWindow, Flow, NEXT_HOPS, SERVICES, Slot, WAYS, flow_flag, home, place, set_of,
        slot_flag, way,
    },
};

use crate::{
    family::Family,
    maps::{self, Table},
};

/// A slot that is as good as its flow's entry.
pub struct Hit<A: Family> {
    /// The slot.
    pub slot: &'static mut Slot<A>,
    /// The time, in ticks.
    pub now: u32,
}

/// This CPU's slot of a tuple, if it is as good as the flow's entry.
#[inline(always)]
pub fn find<A: Family>(words: &A::Words, place: u64) -> Option<Hit<A>> {
    let window = maps::cache_window()?;
    let set = set::<A>(window, place)?;
    let generation = maps::generation(place)?;
    maps::fetch(&set.ways[way(home(place), 1)]);
    let slot = slot_of(set, words, place)?;
    // Without a clock yet: a slot that was another CPU's.
    if slot.generation != generation || window.clock == 0 {
        return None;
    }
    window.hits += 1;
    Some(Hit { slot, now: ticks(time_of_ticks(window).wrapping_add(window.clock)) })
}

#[inline(always)]
fn time_of_ticks(window: &CacheWindow) -> u64 {
    maps::jiffies().wrapping_mul(window.tick)
}

/// Sets a window's clock, unless it is right to some ticks: both clocks move with the kernel's tick, not in the same instant, and
/// a slot's should not go back.
#[inline(always)]
fn set_clock(window: &mut CacheWindow, now: u64) {
    let clock = now.wrapping_sub(time_of_ticks(window));
    let off = clock.wrapping_sub(window.clock).wrapping_add(4 * window.tick);
    if off > 8 * window.tick {
        window.clock = clock;
    }
}

#[inline(always)]
fn set<A: Family>(window: &CacheWindow, place: u64) -> Option<&'static mut CacheSet<A>> {
    let part = A::part(window);
    if part == 0 {
        return None;
    }
    A::cache_set(set_of(part, place))
}

#[inline(always)]
fn slot_of<A: Family>(set: &'static mut CacheSet<A>, words: &A::Words, place: u64) -> Option<&'static mut Slot<A>> {
    position(set, words, place).map(|at| &mut set.ways[at & (WAYS - 1)])
}

/// Which slot is the tuple's.
#[inline(always)]
fn position<A: Family>(set: &CacheSet<A>, words: &A::Words, place: u64) -> Option<usize> {
    for step in 0..WAYS {
        let at = way(home(place), step);
        if set.ways[at].is_of(words) {
            return Some(at);
        }
    }
    None
}

/// As [`position`], off the hot path; [`WAYS`]: none.
#[inline(never)]
fn seek<A: Family>(set: &CacheSet<A>, words: &A::Words, place: u64) -> usize {
    position(set, words, place).unwrap_or(WAYS)
}

/// The slot that a tuple which has none is to get: its home or another that is empty, else the one that was used longest ago.
#[inline(never)]
fn oldest<A: Family>(set: &CacheSet<A>, place: u64) -> usize {
    let mut best = home(place);
    for step in 1..WAYS {
        let at = way(home(place), step);
        if is_older(&set.ways[at], &set.ways[best & (WAYS - 1)]) {
            best = at;
        }
    }
    best
}

/// Tells an established entry what this CPU's slot has counted, whether or not that is still good. To be called before the
/// entry's counters or its age are looked at.
#[inline(never)]
pub fn settle<A: Family>(flow: &mut Flow<A>) -> u32 {
    let Some(window) = maps::cache_window() else {
        return 0;
    };
    let words = &A::words(&flow.key);
    let place = place::<A>(words);
    let Some(set) = set::<A>(window, place) else {
        return 0;
    };
    let at = seek(set, words, place);
    if at >= WAYS {
        return 0;
    }
    let slot = &mut set.ways[at & (WAYS - 1)];
    slot.tell(flow, maps::now());
    slot.packets = 0;
    slot.bytes = 0;
    1
}

/// Copies the entry of `key`, which was looked up after its generation had been read, into a slot of this CPU.
#[inline(never)]
pub fn fill<A: Family>(key: &FlowKey<A>, flow: &Flow<A>, generation: u32) -> u32 {
    let Some(window) = maps::cache_window() else {
        return 0;
    };
    window.misses += 1;
    let words = &A::words(key);
    let place = place::<A>(words);
    let Some(set) = set::<A>(window, place) else {
        return 0;
    };
    let now = maps::now();
    set_clock(window, now);
    // A packet rate is counted where the entry is.
    // So are all others that a slot has no room for, of which the maps have none.
    let number = |number: u32, limit: u32| number != 0 && number < limit;
    if flow.flags & flow_flag::PACKET_LIMIT != 0
        || flow.state != State::Established as u8
        || !(number(flow.next_hop, NEXT_HOPS) && number(flow.service, SERVICES) && flow.backend < BACKENDS)
    {
        return 0;
    }
    let mut at = seek(set, words, place);
    if at >= WAYS {
        at = oldest(set, place);
        let slot = &set.ways[at & (WAYS - 1)];
        if !slot.is_empty() {
            window.displaced += 1;
            window.told += u64::from(displace(slot));
        }
    }
    let slot = &mut set.ways[at & (WAYS - 1)];
    write(slot, flow, generation, ticks(now));
    slot.key = if maps::still_of(flow, key) { *words } else { Default::default() };
    1
}

#[inline(always)]
fn is_older<A: Family>(first: &Slot<A>, second: &Slot<A>) -> bool {
    !second.is_empty() && (first.is_empty() || (first.last_seen.wrapping_sub(second.last_seen) as i32) < 0)
}

/// Tells the entry of a slot that another flow is to have; where the flow has ended, its record has been completed. How many
/// lookups that took.
#[inline(never)]
fn displace<A: Family>(slot: &Slot<A>) -> u32 {
    if slot.packets == 0 {
        return 0;
    }
    if let Some(flow) = maps::flow(Table::Established, maps::slot_key(slot)) {
        slot.tell(flow, maps::now());
    }
    1
}

#[inline(always)]
fn write<A: Family>(slot: &mut Slot<A>, flow: &Flow<A>, generation: u32, now: u32) {
    let reply = flow.direction != Direction::Forward as u8;
    slot.service = flow.service as u16;
    if reply {
        slot.service |= slot_flag::REPLY | if flow.first_byte_after == 0 { slot_flag::NO_PAYLOAD_YET } else { 0 };
    }
    slot.next_hop = flow.next_hop as u16;
    slot.new_src = flow.new_src;
    slot.new_dst = flow.new_dst;
    slot.new_src_port = flow.new_src_port;
    slot.new_dst_port = flow.new_dst_port;
    slot.address_delta = flow.address_delta;
    slot.port_delta = flow.port_delta;
    slot.generation = generation;
    slot.route_generation = flow.route_generation as u16;
    slot.backend = flow.backend as u16;
    slot.touch_due = flow.touch_due;
    slot.born = flow.created as u32;
    slot.last_seen = now;
    slot.packets = 0;
    slot.bytes = 0;
}
