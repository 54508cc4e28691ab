//! The entry program of each hook. An established packet takes the first five lines and one hash lookup, and leaves from
//! here; what may change a flow's state, or has none, goes on in `stages`, by a tail call.

use edge_common::{
    conntrack::tcp_flag::{FIN, RST, SYN},
    filter,
    flow::{TCP, UDP},
    icmp::ICMP,
    verdict::{Reason, Verdict},
};

use crate::{
    events,
    forward::{self, TOO_LATE},
    maps::{self, Table},
    packet::Packet,
    parse, stages,
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
    if packet.has_hidden_tag() {
        return Verdict::PASS;
    }
    packet.pull(parse::HEADERS);
    let Some(ip) = parse::ipv4(packet) else {
        return Verdict::PASS;
    };
    let Some(side) = prefilter(ip.src, ip.dst) else {
        return if ip.protocol == ICMP { stages::icmp(packet) } else { Verdict::PASS };
    };
    if ip.protocol != TCP && ip.protocol != UDP {
        return if ip.protocol == ICMP { stages::icmp(packet) } else { Verdict::PASS };
    }
    if ip.is_fragment() {
        return stages::fragment(packet);
    }
    let Some(parsed) = parse::transport(packet, ip) else {
        return because(Reason::Malformed, 0);
    };
    if parsed.flags & (SYN | FIN | RST) == 0
        && let Some(flow) = maps::flow(Table::Established, &parsed.key)
    {
        let verdict = forward::established(packet, &parsed, flow);
        if verdict.is_sent() {
            return verdict;
        }
        if verdict.question().is_some() {
            return stages::question(packet, parsed, side, verdict);
        }
        if verdict != TOO_LATE {
            return events::sampled(&parsed, verdict);
        }
    }
    stages::begin(packet, parsed, side)
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
