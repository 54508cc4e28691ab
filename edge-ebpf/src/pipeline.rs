//! The stages, in order. An established packet takes the first five lines and one hash lookup.

use edge_common::{
    conntrack::tcp_flag::{FIN, RST, SYN},
    filter,
    flow::{TCP, UDP},
    verdict::{Reason, Verdict},
};

use crate::{
    classify, conntrack, forward,
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

/// Decides about a packet, and rewrites it where the verdict is not to pass it untouched.
#[inline(always)]
pub fn run<P: Packet>(packet: &mut P) -> Verdict {
    packet.pull(parse::HEADERS);
    let Some(ip) = parse::ipv4(packet) else {
        return Verdict::PASS;
    };
    let Some(side) = prefilter(&ip) else {
        return Verdict::PASS;
    };
    if ip.protocol != TCP && ip.protocol != UDP {
        return Verdict::PASS;
    }
    if ip.is_fragment() {
        return because(Reason::Fragment, 0);
    }
    let Some(parsed) = parse::transport(packet, ip) else {
        return because(Reason::Malformed, 0);
    };
    match maps::flow(Table::Established, &parsed.key) {
        Some(flow) if parsed.segment.flags & (SYN | FIN | RST) == 0 => forward::established(packet, &parsed, flow),
        Some(flow) => conntrack::track(packet, &parsed, flow, Table::Established),
        None => young_or_old(packet, &parsed, side),
    }
}

/// The interface a packet came in by.
#[inline(always)]
pub fn ingress<P: Packet>(packet: &P) -> u32 {
    packet.ingress()
}

#[inline(always)]
fn prefilter(ip: &Ipv4) -> Option<Side> {
    let filter = maps::address_filter()?;
    let (destination, source) = (filter::bit(ip.dst), filter::bit(ip.src));
    if filter.destinations[(destination >> 6) as usize] >> (destination & 63) & 1 != 0 {
        Some(Side::ToUs)
    } else if filter.sources[(source >> 6) as usize] >> (source & 63) & 1 != 0 {
        Some(Side::FromBackend)
    } else {
        None
    }
}

/// Not established: half-open, closing, or without a flow.
#[inline(never)]
fn young_or_old<P: Packet>(packet: &mut P, parsed: &Parsed, side: Side) -> Verdict {
    if let Some(flow) = maps::flow(Table::HalfOpen, &parsed.key) {
        return conntrack::track(packet, parsed, flow, Table::HalfOpen);
    }
    match maps::flow(Table::Closing, &parsed.key) {
        Some(flow) => conntrack::track(packet, parsed, flow, Table::Closing),
        None => classify::untracked(packet, parsed, side),
    }
}
