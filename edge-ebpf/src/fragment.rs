//! Fragmented packets: the first fragment has the ports, goes the way of any packet, and leaves an entry by which the rest
//! follow it, in any order after it. A later fragment that comes before the first is somebody else's as far as can be
//! known here, and passes untouched.

mod pieces;

use edge_common::{
    conntrack::{due, ticks},
    flow::FlowKey,
    fragment::LIFETIME,
    hash::scatter,
    maps::{Flow, Fragment, FragmentKey},
    verdict::{Action, Question, Reason, Verdict},
};

use network_types::ip::Ipv4Hdr;
pub use pieces::{FIRST, Piece, Pieces};

use crate::{
    conntrack,
    family::Family,
    maps::{self, Table},
    onward,
    packet::Packet,
    parse::{self, Ip, Parsed},
    stats::{because, count_packet},
};

/// Remembers the first fragment of a packet of `flow`, which was translated, and gives it the ID that the rest will get.
/// `at`: offset of the header with the ID.
#[inline(never)]
pub fn remember<A: Family, P: Packet>(packet: &mut P, key: &FlowKey<A>, flow: &Flow<A>, at: u16) -> u32 {
    let Some(old) = A::id(packet, at) else {
        return 0;
    };
    // Where several senders become one, two of them may have chosen the same ID.
    let new = if flow.new_src == key.src { old } else { fresh_id(flow).unwrap_or(old) };
    if !A::write_id(packet, at, old, new) {
        return 0;
    }
    let entry = Fragment {
        seen: maps::now(),
        src_port: key.src_port,
        dst_port: key.dst_port,
        id: new,
        protocol: key.protocol,
        _pad: [0; 7],
    };
    u32::from(maps::remember_fragment(&name(key.src, key.dst, old, A::kind(key.protocol)), &entry))
}

/// What makes the packet a fragment, in the form that [`Piece::unpack`] takes, or 0; `parsed` becomes its facts, without ports.
#[inline(never)]
pub fn read<A: Family, P: Packet>(packet: &mut P, parsed: &mut Parsed<A>) -> u64 {
    let Some((ip, piece)) = A::piece(packet) else {
        return 0;
    };
    describe(&ip, parsed);
    piece.pack()
}

/// The headers of a first fragment into `parsed`; [`FIRST`], or what becomes of a packet that has none of ours.
#[inline(never)]
pub fn first<A: Family, P: Packet>(packet: &mut P, parsed: &mut Parsed<A>) -> Verdict {
    let Some((mut ip, piece)) = A::piece(packet) else {
        return because(Reason::Malformed, 0);
    };
    let verdict = A::upper(packet, &mut ip, &piece);
    if verdict != FIRST {
        return verdict;
    }
    let Some(found) = parse::transport(packet, &ip) else {
        return because(Reason::Malformed, 0);
    };
    *parsed = found;
    parse::sequence(packet, parsed);
    FIRST
}

/// A later fragment, of which `parsed` gets the ports of the first. Untouched where its sender is to be told.
#[inline(never)]
pub fn follow<A: Family, P: Packet>(packet: &mut P, piece: &Piece, parsed: &mut Parsed<A>) -> Verdict {
    let key = &parsed.key;
    let first = match maps::fragment(&name(key.src, key.dst, piece.id, A::kind(key.protocol))) {
        Some(first) if maps::now().wrapping_sub(first.seen) < LIFETIME => first,
        _ => return because(Reason::Fragment, 0),
    };
    (parsed.key.src_port, parsed.key.dst_port) = (first.src_port, first.dst_port);
    parsed.key.protocol = first.protocol;
    let Some(flow) = find(&parsed.key) else {
        return because(Reason::FragmentWithoutFlow, 0);
    };
    // As of any packet; what is not whole would be quoted with bytes that its sender never sent.
    if usize::from(parsed.header_len) < Ipv4Hdr::LEN
        || parsed.total_len < u32::from(parsed.header_len)
        || !packet.holds(parse::IP + parsed.total_len as usize)
    {
        return because(Reason::Malformed, flow.service);
    }
    if parsed.ttl <= 1 {
        // Nobody is told about a later fragment of IPv4 (RFC 1812, 4.3.2.7); RFC 4443, 2.4 (e) makes no such exception.
        let told = Verdict::answer(Question::TimeExceeded, flow.service, 0);
        return if A::V6 { told } else { because(Reason::IcmpUnanswered, flow.service) };
    }
    let verdict = onward::send(packet, parsed, flow);
    if verdict.question().is_some() {
        return if A::V6 { verdict } else { because(Reason::IcmpUndeliverable, flow.service) };
    }
    if verdict.action() == Action::Drop {
        return verdict;
    }
    if !A::rewrite_header(packet, flow) || !A::write_id(packet, piece.at, piece.id, first.id) {
        return because(Reason::Malformed, flow.service);
    }
    if A::V6 {
        // No checksum of its own makes up for the addresses in what the NIC may have summed up.
        packet.add_to_sum(flow.address_delta);
    }
    flow.last_seen = maps::now();
    count_packet(flow, parsed);
    verdict
}

/// What a later fragment says of itself.
#[inline(always)]
fn describe<A: Family>(ip: &Ip<A>, parsed: &mut Parsed<A>) {
    parsed.key.src = ip.src;
    parsed.key.dst = ip.dst;
    parsed.key.src_port = 0;
    parsed.key.dst_port = 0;
    parsed.key.protocol = ip.protocol;
    parsed.key._pad = [0; 3];
    parsed.seq = 0;
    parsed.ack = 0;
    parsed.flags = 0;
    parsed.l4_len = 0;
    parsed.lacks_checksum = false;
    parsed.total_len = ip.total_len;
    parsed.header_len = ip.header_len;
    parsed.ttl = ip.ttl;
    parsed.tos = ip.tos;
    parsed.must_not_fragment = ip.must_not_fragment();
}

/// The established path leaves a first fragment to the slow one, which does not touch: a flow of nothing but fragments
/// would lose its silent half. What comes too late, or belongs to another flow by now, the slow path sees by itself.
#[inline(always)]
pub fn touch<A: Family>(parsed: &Parsed<A>) {
    let now = maps::now();
    if let Some(flow) = maps::flow(Table::Established, &parsed.key)
        && due(flow.touch_due, ticks(now))
    {
        conntrack::touch(parsed, flow, now);
    }
}

#[inline(always)]
fn find<A: Family>(key: &FlowKey<A>) -> Option<&'static mut Flow<A>> {
    for table in [Table::Established, Table::HalfOpen, Table::Closing] {
        let found = maps::flow(table, key);
        if found.is_some() {
            return found;
        }
    }
    None
}

#[inline(always)]
fn fresh_id<A: Family>(flow: &Flow<A>) -> Option<u32> {
    let control = maps::control()?;
    let pair = flow.new_src.mixed().wrapping_mul(0x9e37_79b1) ^ flow.new_dst.mixed();
    let counter = scatter(pair ^ u32::from(flow.key.protocol) ^ control.seed[0] as u32);
    // A counter for each pair of addresses, as far as they go round; its order is the pair's own.
    let count = maps::next_fragment_id(counter)?;
    Some(A::new_id(control.seed[1] ^ u64::from(counter), count))
}

#[inline(always)]
fn name<A: Family>(src: A, dst: A, id: u32, protocol: u8) -> FragmentKey {
    FragmentKey { src: src.wide(), dst: dst.wide(), id, protocol: u32::from(protocol) }
}
