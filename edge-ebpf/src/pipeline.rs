//! The stages, in order. An established packet takes the first five lines and one hash lookup.

use edge_common::{
    address::Address,
    conntrack::tcp_flag::{FIN, RST, SYN},
    flow::{TCP, UDP},
    verdict::{Reason, Verdict},
};

use network_types::eth::EtherType;

use crate::{
    classify::{self, NEW_FLOW},
    conntrack::{self, NO_FLOW, Past},
    create::{self, CREATED},
    events,
    family::Family,
    forward::{self, TOO_LATE},
    log,
    maps::{self, Table},
    packet::Packet,
    parse::{self, Ip, Parsed, Upper},
    protect,
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
    if packet.has_hidden_tag() {
        return Verdict::PASS;
    }
    packet.pull(parse::HEADERS);
    match parse::ether_type(packet) {
        Some(kind) if kind == u16::from(EtherType::Ipv4) => ipv4(packet),
        _ => Verdict::PASS,
    }
}

#[inline(always)]
fn ipv4<P: Packet>(packet: &mut P) -> Verdict {
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
    serve(packet, &ip, side)
}

/// A function of its own, so that IPv4 packets do not pay for it in registers and stack.
#[inline(never)]
#[allow(dead_code, reason = "its stack is not down to what the verifier takes yet")]
fn ipv6<P: Packet>(packet: &mut P) -> Verdict {
    let Some(mut ip) = parse::ipv6(packet) else {
        return Verdict::PASS;
    };
    let Some(side) = prefilter(&ip) else {
        return Verdict::PASS;
    };
    if ip.protocol != TCP && ip.protocol != UDP {
        match parse::extensions(packet, &mut ip) {
            Upper::Header if ip.protocol == TCP || ip.protocol == UDP => {}
            Upper::Header => return Verdict::PASS,
            Upper::Fragment => return because(Reason::Fragment, 0),
            Upper::Stack => return because(Reason::ExtensionHeaders, 0),
            Upper::Short => return because(Reason::Malformed, 0),
        }
    }
    serve(packet, &ip, side)
}

#[inline(always)]
fn serve<A: Family, P: Packet>(packet: &mut P, ip: &Ip<A>, side: Side) -> Verdict {
    let Some(parsed) = parse::transport(packet, ip) else {
        return because(Reason::Malformed, 0);
    };
    if parsed.flags & (SYN | FIN | RST) == 0
        && !parsed.lacks_checksum
        && let Some(flow) = maps::flow(Table::Established, &parsed.key)
    {
        let verdict = forward::established(packet, &parsed, flow);
        if verdict.is_sent() {
            return verdict;
        }
        if verdict != TOO_LATE {
            return events::sampled(&parsed, verdict);
        }
    }
    let verdict = slow(packet, &parsed, side);
    events::sampled(&parsed, verdict)
}

/// A packet that may change its flow's state, or that has no flow. The stages follow each other rather than call each
/// other, which keeps the stack flat.
#[inline(always)]
fn slow<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>, side: Side) -> Verdict {
    let mut past = Past::none();
    let mut verdict = tracked(packet, parsed, &mut past);
    if verdict == NO_FLOW {
        verdict = classify::untracked(packet, parsed, side, &mut past);
        if verdict == NEW_FLOW {
            verdict = protect::admit(parsed, past.service);
        }
        if verdict == NEW_FLOW {
            verdict = create::flow(parsed, &past);
            if verdict == CREATED {
                verdict = create::first(packet, parsed, past.service);
            }
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

#[inline(always)]
fn prefilter<A: Address>(ip: &Ip<A>) -> Option<Side> {
    let filter = maps::address_filter()?;
    let (destination, source) = (ip.dst.filter_bit(), ip.src.filter_bit());
    if filter.destinations[(destination >> 6) as usize] >> (destination & 63) & 1 != 0 {
        Some(Side::ToUs)
    } else if filter.sources[(source >> 6) as usize] >> (source & 63) & 1 != 0 {
        Some(Side::FromBackend)
    } else {
        None
    }
}

/// A packet that may change its flow's state; [`NO_FLOW`] where it has none, or none any more.
#[inline(always)]
fn tracked<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>, past: &mut Past<A>) -> Verdict {
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
