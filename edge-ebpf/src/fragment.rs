//! Fragmented packets: the first fragment has the ports, goes the way of any packet, and leaves an entry by which the rest
//! follow it, in any order after it. A later fragment that comes before the first is somebody else's as far as can be
//! known here, and passes untouched.

use edge_common::{
    address::mapped,
    checksum::{self, add},
    conntrack::{due, ticks},
    flow::FlowKeyV4,
    fragment::{LIFETIME, id},
    hash::scatter,
    maps::{FlowV4, Fragment, FragmentKey},
    verdict::{Reason, Verdict},
};
use network_types::ip::Ipv4Hdr;

use crate::{
    conntrack,
    maps::{self, Table},
    onward,
    packet::Packet,
    parse::{self, IP, Ip, Parsed},
    stats::{because, count_packet},
};

/// Remembers the first fragment of a packet of `flow`, and gives it the ID that the rest will get.
#[inline(never)]
pub fn remember<P: Packet>(packet: &mut P, parsed: &Parsed<u32>, flow: &FlowV4) -> u32 {
    let key = &parsed.key;
    let Some(ip) = packet.header_anew::<Ipv4Hdr>(IP) else {
        return 0;
    };
    // Not sent on: nothing for the rest to follow.
    if u32::from_ne_bytes(ip.src_addr) != flow.new_src || u32::from_ne_bytes(ip.dst_addr) != flow.new_dst {
        return 0;
    }
    let old = u16::from_ne_bytes(ip.id);
    // Where several senders become one, two of them may have chosen the same ID.
    let new = if flow.new_src == key.src { old } else { fresh_id(flow).unwrap_or(old) };
    ip.id = new.to_ne_bytes();
    ip.check = checksum::apply(u16::from_ne_bytes(ip.check), add(!old, new)).to_ne_bytes();
    let entry = Fragment { seen: maps::now(), src_port: key.src_port, dst_port: key.dst_port, id: u32::from(new) };
    u32::from(maps::remember_fragment(&name(key.src, key.dst, old, key.protocol), &entry))
}

/// A later fragment; `parsed` becomes its facts, with the ports of the first.
#[inline(never)]
pub fn follow<P: Packet>(packet: &mut P, ip: &Ip<u32>, parsed: &mut Parsed<u32>) -> Verdict {
    *parsed = parse::NOTHING;
    parsed.key = FlowKeyV4::new(ip.src, ip.dst, 0, 0, ip.protocol);
    parsed.total_len = ip.total_len;
    parsed.header_len = ip.header_len;
    parsed.tos = ip.tos;
    parsed.must_not_fragment = ip.must_not_fragment();
    let Some(header) = packet.header_anew::<Ipv4Hdr>(IP) else {
        return because(Reason::Malformed, 0);
    };
    let old = u16::from_ne_bytes(header.id);
    let first = match maps::fragment(&name(ip.src, ip.dst, old, ip.protocol)) {
        Some(first) if maps::now().wrapping_sub(first.seen) < LIFETIME => first,
        _ => return because(Reason::Fragment, 0),
    };
    (parsed.key.src_port, parsed.key.dst_port) = (first.src_port, first.dst_port);
    let Some(flow) = find(&parsed.key) else {
        return because(Reason::FragmentWithoutFlow, 0);
    };
    if ip.ttl <= 1 {
        // Nobody is told about a later fragment (RFC 1812, 4.3.2.7).
        return because(Reason::IcmpUnanswered, flow.service);
    }
    let Some(header) = packet.header_anew::<Ipv4Hdr>(IP) else {
        return because(Reason::Malformed, flow.service);
    };
    let new = first.id as u16;
    header.ttl -= 1;
    header.id = new.to_ne_bytes();
    header.src_addr = flow.new_src.to_ne_bytes();
    header.dst_addr = flow.new_dst.to_ne_bytes();
    let delta = add(add(flow.address_delta, checksum::TTL_DECREMENT), add(!old, new));
    header.check = checksum::apply(u16::from_ne_bytes(header.check), delta).to_ne_bytes();
    flow.last_seen = maps::now();
    count_packet(flow, parsed);
    onward::send(packet, parsed, flow)
}

/// The established path leaves a first fragment to the slow one, which does not touch: a flow of nothing but fragments
/// would lose its silent half. What comes too late, or belongs to another flow by now, the slow path sees by itself.
#[inline(always)]
pub fn touch(parsed: &Parsed<u32>) {
    let now = maps::now();
    if let Some(flow) = maps::flow(Table::Established, &parsed.key)
        && due(flow.touch_due, ticks(now))
    {
        conntrack::touch(parsed, flow, now);
    }
}

#[inline(always)]
fn find(key: &FlowKeyV4) -> Option<&'static mut FlowV4> {
    for table in [Table::Established, Table::HalfOpen, Table::Closing] {
        let found = maps::flow(table, key);
        if found.is_some() {
            return found;
        }
    }
    None
}

#[inline(always)]
fn fresh_id(flow: &FlowV4) -> Option<u16> {
    let control = maps::control()?;
    let pair = flow.new_src.wrapping_mul(0x9e37_79b1) ^ flow.new_dst;
    let counter = scatter(pair ^ u32::from(flow.key.protocol) ^ control.seed[0] as u32);
    // A counter for each pair of addresses, as far as they go round; its order is the pair's own.
    let count = maps::next_fragment_id(counter)? as u16;
    Some(id(control.seed[1] ^ u64::from(counter), count))
}

#[inline(always)]
fn name(src: u32, dst: u32, id: u16, protocol: u8) -> FragmentKey {
    FragmentKey { src: mapped(src), dst: mapped(dst), id: u32::from(id), protocol: u32::from(protocol) }
}
