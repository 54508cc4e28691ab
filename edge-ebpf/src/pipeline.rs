//! The stages, in order. An established packet takes the first five lines and one hash lookup.

use edge_common::{
    conntrack::tcp_flag::{FIN, RST, SYN},
    filter,
    flow::{TCP, UDP},
    icmp::ICMP,
    verdict::{Reason, Verdict},
};

use crate::{
    classify::{self, NEW_FLOW},
    conntrack::{self, NO_FLOW, Past},
    create,
    forward::{self, TOO_LATE},
    fragment, icmp, log,
    maps::{self, Table},
    packet::Packet,
    parse::{self, Ipv4, Parsed},
    stats::because,
};

/// Which side of the prefilter a packet met.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Its destination is a VIP or a SNAT address.
    ToUs,
    /// Its source is a dnat backend.
    FromBackend,
}

/// Decides about a packet, and rewrites it where the verdict is not to pass it untouched, or turns it into an ICMP message
/// to its sender.
#[inline(always)]
pub fn run<P: Packet>(packet: &mut P) -> Verdict {
    let verdict = decide(packet);
    if verdict.question().is_some() { icmp::answer::send(packet, verdict) } else { verdict }
}

#[inline(always)]
fn decide<P: Packet>(packet: &mut P) -> Verdict {
    if packet.has_hidden_tag() {
        return Verdict::PASS;
    }
    packet.pull(parse::HEADERS);
    let Some(ip) = parse::ipv4(packet) else {
        return Verdict::PASS;
    };
    let Some(side) = prefilter(ip.src, ip.dst) else {
        return if ip.protocol == ICMP { icmp::other(packet, &ip) } else { Verdict::PASS };
    };
    if ip.protocol != TCP && ip.protocol != UDP {
        return icmp::other(packet, &ip);
    }
    if ip.is_fragment() {
        return fragmented(packet, ip, side);
    }
    let Some(parsed) = parse::transport(packet, ip) else {
        return because(Reason::Malformed, 0);
    };
    if parsed.flags & (SYN | FIN | RST) == 0
        && let Some(flow) = maps::flow(Table::Established, &parsed.key)
    {
        let verdict = forward::established(packet, &parsed, flow);
        if verdict != TOO_LATE {
            return verdict;
        }
    }
    slow(packet, &parsed, side)
}

/// As [`decide`] for fragments, whose entries and IDs cost what other packets need not pay.
#[inline(always)]
fn fragmented<P: Packet>(packet: &mut P, ip: Ipv4, side: Side) -> Verdict {
    if ip.is_later_fragment() {
        return fragment::follow(packet, &ip);
    }
    let Some(parsed) = parse::transport(packet, ip) else {
        return because(Reason::Malformed, 0);
    };
    fragment::touch(&parsed);
    let verdict = slow(packet, &parsed, side);
    fragment::remember(packet, &parsed);
    verdict
}

/// A packet that may change its flow's state, or that has no flow. The stages follow each other rather than call each
/// other, which keeps the stack flat.
#[inline(always)]
fn slow<P: Packet>(packet: &mut P, parsed: &Parsed, side: Side) -> Verdict {
    let mut past = Past::NONE;
    let mut verdict = tracked(packet, parsed, &mut past);
    if verdict == NO_FLOW {
        verdict = classify::untracked(packet, parsed, side, &mut past);
        if verdict == NEW_FLOW {
            verdict = create::flow(packet, parsed, &past);
        }
    }
    log::notices();
    verdict
}

/// The interface a packet came in by.
#[inline(always)]
pub fn ingress<P: Packet>(packet: &P) -> u32 {
    packet.ingress()
}

/// The side of a packet with these addresses (network order); `None` where neither can be ours.
#[inline(always)]
pub fn prefilter(src: u32, dst: u32) -> Option<Side> {
    let filter = maps::address_filter()?;
    let (destination, source) = (filter::bit(dst), filter::bit(src));
    if filter.destinations[(destination >> 6) as usize] >> (destination & 63) & 1 != 0 {
        Some(Side::ToUs)
    } else if filter.sources[(source >> 6) as usize] >> (source & 63) & 1 != 0 {
        Some(Side::FromBackend)
    } else {
        None
    }
}

/// A packet that may change its flow's state; [`NO_FLOW`] where it has none, or none any more.
#[inline(never)]
fn tracked<P: Packet>(packet: &mut P, parsed: &Parsed, past: &mut Past) -> Verdict {
    let key = &parsed.key;
    if let Some(flow) = maps::flow(Table::Established, key) {
        return conntrack::track(packet, parsed, flow, Table::Established, past);
    }
    if let Some(flow) = maps::flow(Table::HalfOpen, key) {
        return conntrack::track(packet, parsed, flow, Table::HalfOpen, past);
    }
    match maps::flow(Table::Closing, key) {
        Some(flow) => conntrack::track(packet, parsed, flow, Table::Closing, past),
        None => NO_FLOW,
    }
}
