//! An ICMP error about a flow's packet: rewritten outside and inside, and sent to the end that sent that packet.

use edge_common::{
    checksum::{self, add},
    conntrack::Direction,
    flow::UDP,
    maps::Flow,
    verdict::{Reason, Verdict},
};

use super::{quote::Quote, unmatched};
use crate::{family::Family, onward, packet::Packet, parse::IP, stats::because};

const ICMP_CHECK: usize = 2;
const TCP_CHECK: usize = 16;
const UDP_CHECK: usize = 6;

/// Translates the error as packets of `flow` are, which is keyed by the reverse of the quoted packet. Neither keeps the
/// flow alive nor changes its state. Nobody is told about an error that goes nowhere.
#[inline(never)]
pub fn along<A: Family, P: Packet>(packet: &mut P, quote: &Quote<A>, flow: &mut Flow<A>) -> Verdict {
    // A router answers the sender of what it quotes; anything else is not about this flow.
    if quote.outer.key.dst != flow.key.dst {
        return unmatched();
    }
    if quote.outer.ttl <= 1 {
        return because(Reason::IcmpUndeliverable, flow.service);
    }
    if !translate(packet, quote, flow) {
        return because(Reason::Malformed, flow.service);
    }
    because(Reason::IcmpTranslated, flow.service);
    let verdict = onward::send(packet, &quote.outer, flow);
    if verdict.question().is_some() {
        return because(Reason::IcmpUndeliverable, flow.service);
    }
    verdict
}

/// Rewrites the error outside and inside; false where the packet turned out to be too short.
#[inline(never)]
fn translate<A: Family, P: Packet>(packet: &mut P, quote: &Quote<A>, flow: &Flow<A>) -> bool {
    let outer = &quote.outer.key;
    let (src, dst) = (source(quote, flow), flow.new_dst);
    let outside = checksum::address_delta(outer.src, outer.dst, src, dst);
    A::readdress(packet, IP, src, dst, outside, 1) && inside(packet, quote, flow, outside)
}

/// Who the error comes from, as its receiver may know: the flow's other end under the name that the receiver has for it.
/// A router in between keeps its name towards clients, whose traceroute shows it, unless that name stays on its link;
/// towards a full-nat backend it is the edge, which is all that such a backend is to see, and whose address its network
/// expects from here.
#[inline(always)]
fn source<A: Family>(quote: &Quote<A>, flow: &Flow<A>) -> A {
    let src = quote.outer.key.src;
    let to_backend = flow.direction == Direction::Forward as u8;
    let merged = to_backend && flow.new_src != flow.key.src;
    if merged || src == flow.key.src || src.is_link_local() { flow.new_src } else { src }
}

/// Changes the quoted layer-4 checksum; false where there is none, as UDP over IPv4 may send.
#[inline(never)]
fn fix_quoted<A: Family, P: Packet>(packet: &mut P, quote: &Quote<A>, delta: u16) -> bool {
    let udp = quote.key.protocol == UDP;
    let Some(field) = packet.header_anew::<[u8; 2]>(quote.l4() + if udp { UDP_CHECK } else { TCP_CHECK }) else {
        return false;
    };
    let check = u16::from_ne_bytes(*field);
    if udp && check == 0 {
        return false;
    }
    let check = if udp { checksum::apply_udp(check, delta) } else { checksum::apply(check, delta) };
    *field = check.to_ne_bytes();
    true
}

/// The quoted packet as its sender sent it. All of it is under the ICMP checksum, which changes by what the quote and, in
/// IPv6, the addresses outside change by. The whole message thus sums up to what it did, so that a sum the NIC took
/// (`CHECKSUM_COMPLETE`) stays right at TC, too.
#[inline(always)]
fn inside<A: Family, P: Packet>(packet: &mut P, quote: &Quote<A>, flow: &Flow<A>, outside: u16) -> bool {
    if !A::readdress(packet, quote.ip(), flow.new_dst, flow.new_src, flow.address_delta, 0) {
        return false;
    }
    let Some(ports) = packet.header_anew::<[u16; 2]>(quote.l4()) else {
        return false;
    };
    *ports = [flow.new_dst_port, flow.new_src_port];

    let checked = quote.has_check && fix_quoted(packet, quote, add(flow.address_delta, flow.port_delta));
    let delta = A::change(outside, flow.address_delta, flow.port_delta, checked);
    let Some(field) = packet.header_anew::<[u8; 2]>(quote.icmp() + ICMP_CHECK) else {
        return false;
    };
    *field = checksum::apply(u16::from_ne_bytes(*field), delta).to_ne_bytes();
    true
}
