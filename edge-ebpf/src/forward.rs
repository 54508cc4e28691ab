//! From a flow entry to the wire: next hop, length, TTL, rewrite, counters, egress.

use edge_common::{
    conntrack::{due, tcp_flag::SYN, ticks},
    maps::{BYTES_MAX, Control, Flow, NextHop, capture::side, flow_flag, next_hop_flag, slot_flag},
    verdict::{Action, Question, Reason, Verdict},
};

use crate::{
    cache::Hit,
    capture,
    conntrack::{self, touched},
    family::Family,
    fib::{self, resolution},
    maps, mss,
    packet::{Packet, set_word},
    parse::Parsed,
    protect, rewrite,
    stats::{because, count_cached, count_packet},
};

/// The flow had been idle for too long to be one of this packet.
pub const TOO_LATE: Verdict = Verdict::UNDECIDED;

/// The flow's entry has to be asked; the packet is as it came.
pub const MISSED: Verdict = Verdict::UNDECIDED;

/// Sends a packet on its way as a good copy of its flow's entry says. Everything unusual is the entry's: [`MISSED`].
#[inline(always)]
pub fn cached<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>, hit: Hit<A>) -> Verdict {
    let Hit { slot, now } = hit;
    let Some(control) = maps::control() else {
        return MISSED;
    };
    if slot.route_generation != control.route_generation as u16
        || due(slot.touch_due, now)
        || slot.bytes >= BYTES_MAX
        || parsed.ttl <= 1
        || control.capture_until != 0
        || slot.service & slot_flag::NO_PAYLOAD_YET != 0 && parsed.has_payload()
    {
        return MISSED;
    }
    let Some(hop) = maps::next_hop(u32::from(slot.next_hop)) else {
        return MISSED;
    };
    let same = hop.ifindex == packet.ingress();
    let via_stack = !P::REDIRECTS_ANYWHERE && !same && hop.flags & next_hop_flag::VIA_STACK != 0;
    if via_stack || fib::length(packet, parsed) > hop.mtu as usize {
        return MISSED;
    }
    if !rewrite::apply(packet, parsed, slot) {
        return because(Reason::Malformed, u32::from(slot.service & slot_flag::SERVICE));
    }
    slot.last_seen = now;
    count_cached(slot, parsed);
    leave(packet, hop, u32::from(slot.next_hop), same, u32::from(slot.service & slot_flag::SERVICE))
}

/// Sends a packet of an established flow on its way, or answers [`TOO_LATE`].
#[inline(always)]
pub fn established<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>, flow: &mut Flow<A>) -> Verdict {
    let before = flow.next_hop;
    let verdict = by_entry(packet, parsed, flow);
    if flow.next_hop != before {
        maps::changed(&parsed.key);
    }
    verdict
}

#[inline(always)]
fn by_entry<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>, flow: &mut Flow<A>) -> Verdict {
    let now = maps::now();
    if due(flow.touch_due, ticks(now)) {
        match conntrack::touch(parsed, flow, now) {
            touched::DONE => {}
            touched::TOO_LATE => return TOO_LATE,
            _ => return because(Reason::TwinTaken, flow.service),
        }
    }
    if flow.flags & flow_flag::PACKET_LIMIT != 0 && !protect::packet_admitted(parsed.key.src, flow) {
        return because(Reason::SourcePacketRate, flow.service);
    }
    send(packet, parsed, flow, now)
}

/// As [`established`], for entries of every table, without the touch; a function of its own off the hot path. What was done to the
/// MSS is noted in `lowered`.
#[inline(never)]
pub fn any<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>, flow: &mut Flow<A>, lowered: &mut u32) -> Verdict {
    if parsed.flags & SYN != 0 {
        *lowered = mss::clamp(packet, parsed, flow.service);
    }
    send(packet, parsed, flow, maps::now())
}

#[inline(always)]
fn send<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>, flow: &mut Flow<A>, now: u64) -> Verdict {
    if parsed.ttl <= 1 {
        return Verdict::answer(Question::TimeExceeded, flow.service, 0);
    }
    let Some(control) = maps::control() else {
        return because(Reason::NotReady, flow.service);
    };
    let capturing = control.capture_until != 0;
    if capturing {
        capture::copy(packet, flow, side::BEFORE);
    }
    let verdict = deliver(packet, parsed, flow, now, control);
    if capturing && !matches!(verdict.action(), Action::Drop) {
        capture::copy(packet, flow, side::AFTER);
    }
    verdict
}

#[inline(always)]
fn deliver<A: Family, P: Packet>(
    packet: &mut P,
    parsed: &Parsed<A>,
    flow: &mut Flow<A>,
    now: u64,
    control: &Control,
) -> Verdict {
    if flow.next_hop == 0 || flow.route_generation != control.route_generation {
        let resolved = fib::resolve(packet, parsed, flow, control.route_generation);
        if resolved as u32 != resolution::RESOLVED {
            return unlisted(packet, parsed, flow, now, resolved);
        }
    }
    let Some(hop) = maps::next_hop(flow.next_hop) else {
        return because(Reason::NotReady, flow.service);
    };
    if fib::length(packet, parsed) > hop.mtu as usize {
        return too_long(packet, parsed, flow, now, hop.mtu);
    }
    let same = hop.ifindex == packet.ingress();
    if !P::REDIRECTS_ANYWHERE && !same && hop.flags & next_hop_flag::VIA_STACK != 0 {
        return to_stack(packet, parsed, flow, now, Reason::ViaStack);
    }
    egress(packet, parsed, flow, now, hop, same)
}

#[inline(always)]
fn egress<A: Family, P: Packet>(
    packet: &mut P,
    parsed: &Parsed<A>,
    flow: &mut Flow<A>,
    now: u64,
    hop: &NextHop,
    same: bool,
) -> Verdict {
    if !translate(packet, parsed, flow, now) {
        return because(Reason::Malformed, flow.service);
    }
    leave(packet, hop, flow.next_hop, same, flow.service)
}

#[inline(always)]
fn leave<P: Packet>(packet: &mut P, hop: &NextHop, number: u32, same: bool, service: u32) -> Verdict {
    let Some(addresses) = packet.header::<[u16; 6]>(0) else {
        return because(Reason::Malformed, service);
    };
    let [first, second, third] = maps::link_addresses(hop);
    set_word::<0, _>(addresses, first);
    set_word::<4, _>(addresses, second);
    set_word::<8, _>(addresses, third);
    if hop.tags[0] != 0 {
        return Verdict::tagged(number, same);
    }
    if same { Verdict::TRANSMIT } else { Verdict::redirect(hop.ifindex) }
}

/// A packet whose route gave no next-hop number.
#[inline(never)]
fn unlisted<A: Family, P: Packet>(
    packet: &mut P,
    parsed: &Parsed<A>,
    flow: &mut Flow<A>,
    now: u64,
    resolved: u64,
) -> Verdict {
    match resolved as u32 {
        resolution::NO_NEIGHBOUR => to_stack(packet, parsed, flow, now, Reason::NeighbourUnresolved),
        resolution::STACK => to_stack(packet, parsed, flow, now, Reason::ViaStack),
        resolution::TOO_LONG => too_long(packet, parsed, flow, now, (resolved >> 32) as u32),
        resolution::DIRECT if translate(packet, parsed, flow, now) => {
            let ifindex = (resolved >> 32) as u32;
            if ifindex == packet.ingress() { Verdict::TRANSMIT } else { Verdict::redirect(ifindex) }
        }
        resolution::DIRECT => because(Reason::Malformed, flow.service),
        _ => because(Reason::NoRoute, flow.service),
    }
}

/// The stack fragments what may be fragmented.
#[inline(always)]
fn too_long<A: Family, P: Packet>(
    packet: &mut P,
    parsed: &Parsed<A>,
    flow: &mut Flow<A>,
    now: u64,
    mtu: u32,
) -> Verdict {
    if parsed.must_not_fragment {
        Verdict::answer(Question::TooBig, flow.service, mtu)
    } else {
        to_stack(packet, parsed, flow, now, Reason::ViaStack)
    }
}

#[inline(never)]
fn to_stack<A: Family, P: Packet>(
    packet: &mut P,
    parsed: &Parsed<A>,
    flow: &mut Flow<A>,
    now: u64,
    reason: Reason,
) -> Verdict {
    if !translate(packet, parsed, flow, now) {
        return because(Reason::Malformed, flow.service);
    }
    because(reason, flow.service)
}

#[inline(always)]
fn translate<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>, flow: &mut Flow<A>, now: u64) -> bool {
    if !rewrite::apply(packet, parsed, flow) {
        return false;
    }
    flow.last_seen = now;
    count_packet(flow, parsed);
    true
}
