//! The flow cache (see `edge_common::maps::cache`): where a packet's slot is, filling one from an entry, and telling the entry
//! what its slot has counted.

use edge_common::{
    conntrack::{Direction, State, ticks},
    flow::FlowKey,
    maps::{BACKENDS, CacheSet, CacheWindow, Flow, NEXT_HOPS, SERVICES, Slot, flow_flag, place, set_of, slot_flag},
};

use crate::{
    family::Family,
    maps::{self, Table},
};

/// This CPU's slot of a tuple, if it is as good as the flow's entry.
#[inline(always)]
pub fn find<A: Family>(words: &A::Words, place: u64) -> Option<&'static mut Slot<A>> {
    let window = maps::cache_window()?;
    let set = set::<A>(window, place)?;
    let generation = maps::generation(place)?;
    let slot = way(set, words)?;
    if slot.generation != generation {
        return None;
    }
    window.hits += 1;
    Some(slot)
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
fn way<A: Family>(set: &'static mut CacheSet<A>, words: &A::Words) -> Option<&'static mut Slot<A>> {
    let [first, second] = &mut set.ways;
    if first.is_of(words) {
        Some(first)
    } else if second.is_of(words) {
        Some(second)
    } else {
        None
    }
}

/// Tells an established entry what this CPU's slot has counted, whether or not that is still good. To be called before the
/// entry's counters or its age are looked at.
#[inline(never)]
pub fn settle<A: Family>(flow: &mut Flow<A>) -> u32 {
    let Some(window) = maps::cache_window() else {
        return 0;
    };
    let words = &A::words(&flow.key);
    let Some(slot) = set::<A>(window, place::<A>(words)).and_then(|set| way(set, words)) else {
        return 0;
    };
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
    let Some(set) = set::<A>(window, place::<A>(words)) else {
        return 0;
    };
    // A packet rate is counted where the entry is.
    // So are all others that a slot has no room for, of which the maps have none.
    let number = |number: u32, limit: u32| number != 0 && number < limit;
    if flow.flags & flow_flag::PACKET_LIMIT != 0
        || flow.state != State::Established as u8
        || !(number(flow.next_hop, NEXT_HOPS) && number(flow.service, SERVICES) && flow.backend < BACKENDS)
    {
        return 0;
    }
    let now = ticks(maps::now());
    let [first, second] = &mut set.ways;
    let slot = if first.is_of(words) {
        first
    } else if second.is_of(words) {
        second
    } else {
        let slot = if is_older(first, second, now) { first } else { second };
        if !slot.is_empty() {
            window.displaced += 1;
            window.told += u64::from(displace(slot));
        }
        slot
    };
    write(slot, flow, generation, now);
    slot.key = if maps::still_of(flow, key) { *words } else { Default::default() };
    1
}

#[inline(always)]
fn is_older<A: Family>(first: &Slot<A>, second: &Slot<A>, now: u32) -> bool {
    first.is_empty() || !second.is_empty() && now.wrapping_sub(first.last_seen) > now.wrapping_sub(second.last_seen)
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
