//! The entry program of each hook, and the stage that is an IPv6 packet's entry. An established packet leaves from here: by
//! its flow's slot in the cache without a hash lookup, else by the flow's entry with one. What may change a flow's state, or
//! has none, goes on in `stages`, by a tail call.

use edge_common::{
    address::{Address, Wide},
    conntrack::tcp_flag::{FIN, RST, SYN},
    flow::{TCP, UDP},
    icmp::{ICMP, ICMPV6},
    maps::{
        place,
        stages::{IPV6, VLAN, VLAN_V6},
    },
    verdict::{Reason, Verdict},
};
use network_types::eth::EtherType;

use crate::{
    cache, events,
    extensions::{self, Upper},
    family::Family,
    forward::{self, MISSED, TOO_LATE},
    maps::{self, Table},
    packet::Packet,
    parse::{self, Ip, Parsed},
    stages,
    stats::because,
    vlan as tags,
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
        packet.enter(VLAN);
        // No such stage: tagged frames are the stack's.
        return Verdict::PASS;
    }
    parse::fetch(packet);
    match parse::ether_type(packet) {
        Some(kind) if kind == u16::from(EtherType::Ipv4) => ipv4(packet),
        Some(kind) if kind == u16::from(EtherType::Ipv6) => ipv6_by_slot(packet),
        Some(kind) if tags::follows(kind) => {
            packet.enter(VLAN);
            Verdict::PASS
        }
        _ => Verdict::PASS,
    }
}

/// The stage of a frame with VLAN tags: without them it is as any other.
#[inline(always)]
pub fn vlan<P: Packet>(packet: &mut P) -> Verdict {
    packet.pull(parse::IP + tags::LEN);
    match tags::take(packet) {
        tags::NONE => return Verdict::PASS,
        tags::TAKEN => {}
        _ => return Verdict::DROP,
    }
    parse::fetch(packet);
    match parse::ether_type(packet) {
        Some(kind) if kind == u16::from(EtherType::Ipv4) => ipv4(packet),
        Some(kind) if kind == u16::from(EtherType::Ipv6) => {
            packet.enter(VLAN_V6);
            Verdict::PASS
        }
        _ => Verdict::PASS,
    }
}

/// What is not ours, and what a slot serves, leaves without a tail call.
#[inline(always)]
fn ipv6_by_slot<P: Packet>(packet: &mut P) -> Verdict {
    let Some(ip) = parse::ipv6(packet) else {
        return Verdict::PASS;
    };
    if prefilter(ip.src, ip.dst).is_none() && ip.protocol != ICMPV6 {
        return Verdict::PASS;
    }
    if (ip.protocol == TCP || ip.protocol == UDP)
        && let Some(parsed) = parse::transport(packet, &ip)
    {
        let words = Wide::words(&parsed.key);
        let verdict = by_slot(packet, &parsed, &words, place::<Wide>(&words));
        if verdict != MISSED {
            return verdict;
        }
    }
    packet.enter(IPV6);
    // No such stage: the host's own IPv6 goes on.
    Verdict::PASS
}

/// Serves a packet by its flow's slot, or answers [`MISSED`].
#[inline(always)]
fn by_slot<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>, words: &A::Words, place: u64) -> Verdict {
    if parsed.flags & (SYN | FIN | RST) != 0 || parsed.lacks_checksum {
        return MISSED;
    }
    match cache::find::<A>(words, place) {
        Some(hit) => forward::cached(packet, parsed, hit),
        None => MISSED,
    }
}

#[inline(always)]
fn ipv4<P: Packet>(packet: &mut P) -> Verdict {
    let Some(ip) = parse::ipv4(packet) else {
        return Verdict::PASS;
    };
    let Some(side) = prefilter(ip.src, ip.dst) else {
        return if ip.protocol == ICMP { stages::icmp::<u32, P>(packet) } else { Verdict::PASS };
    };
    if ip.protocol != TCP && ip.protocol != UDP {
        return if ip.protocol == ICMP { stages::icmp::<u32, P>(packet) } else { Verdict::PASS };
    }
    if ip.is_fragment() {
        return stages::fragment::<u32, P>(packet);
    }
    serve::<u32, P, true>(packet, &ip, side)
}

/// The stage of an IPv6 packet that no slot has served.
#[inline(always)]
pub fn ipv6<P: Packet>(packet: &mut P) -> Verdict {
    ipv6_asking::<P, false>(packet)
}

/// The stage of an IPv6 packet whose tags have been taken off, for which no slot has been looked for.
#[inline(always)]
pub fn untagged_ipv6<P: Packet>(packet: &mut P) -> Verdict {
    ipv6_asking::<P, true>(packet)
}

#[inline(always)]
fn ipv6_asking<P: Packet, const SLOTS: bool>(packet: &mut P) -> Verdict {
    parse::fetch(packet);
    let Some(mut ip) = parse::ipv6(packet) else {
        return Verdict::PASS;
    };
    let Some(side) = prefilter(ip.src, ip.dst) else {
        return if ip.protocol == ICMPV6 { stages::icmp::<Wide, P>(packet) } else { Verdict::PASS };
    };
    if ip.protocol != TCP && ip.protocol != UDP {
        match extensions::skip(packet, &mut ip) {
            Upper::Header if ip.protocol == TCP || ip.protocol == UDP => {}
            Upper::Header if ip.protocol == ICMPV6 => return stages::icmp::<Wide, P>(packet),
            Upper::Header => return Verdict::PASS,
            Upper::Fragment => return stages::fragment::<Wide, P>(packet),
            Upper::Stack => return because(Reason::ExtensionHeaders, 0),
            Upper::Short => return because(Reason::Malformed, 0),
        }
    }
    serve::<Wide, P, SLOTS>(packet, &ip, side)
}

/// `SLOTS`: the flow's slot is still to be looked for.
#[inline(always)]
fn serve<A: Family, P: Packet, const SLOTS: bool>(packet: &mut P, ip: &Ip<A>, side: Side) -> Verdict {
    let Some(parsed) = parse::transport(packet, ip) else {
        return because(Reason::Malformed, 0);
    };
    if parsed.flags & (SYN | FIN | RST) == 0 && !parsed.lacks_checksum {
        let words = A::words(&parsed.key);
        let place = place::<A>(&words);
        if SLOTS {
            let verdict = by_slot(packet, &parsed, &words, place);
            if verdict != MISSED {
                return verdict;
            }
        }
        let generation = maps::generation_first(place);
        if let Some(flow) = maps::flow(Table::Established, &parsed.key) {
            cache::settle(flow);
            let verdict = forward::established(packet, &parsed, flow);
            if verdict.is_sent() {
                cache::fill(&parsed.key, flow, generation);
                return verdict;
            }
            if verdict.question().is_some() {
                return stages::question(packet, parsed, side, verdict);
            }
            if verdict != TOO_LATE {
                return events::sampled(&parsed, verdict);
            }
        }
    }
    stages::begin(packet, parsed, side)
}

/// The interface a packet came in by.
#[inline(always)]
pub fn ingress<P: Packet>(packet: &P) -> u32 {
    packet.ingress()
}

/// The side of a packet with these addresses; `None` where neither can be ours.
#[inline(always)]
pub fn prefilter<A: Address>(src: A, dst: A) -> Option<Side> {
    let filter = maps::address_filter()?;
    let (destination, source) = (dst.filter_bit(), src.filter_bit());
    if filter.destinations[(destination >> 6) as usize] >> (destination & 63) & 1 != 0 {
        Some(Side::ToUs)
    } else if filter.sources[(source >> 6) as usize] >> (source & 63) & 1 != 0 {
        Some(Side::FromBackend)
    } else {
        None
    }
}
