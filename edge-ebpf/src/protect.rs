//! What a source may do: source ranges, rates and quotas of a service. Looked at where a flow starts; only a packet rate
//! looks at the packets of a flow, too, and only at those of services that have one.

use edge_common::{
    conntrack::Direction,
    limit::{self, HalfOpen},
    maps::{Flow, RangeSource, ServiceEntry, SourceId, range_action, service_flag},
    verdict::{Reason, Verdict},
};

use crate::{classify::NEW_FLOW, family::Family, maps, parse::Parsed, stats::because};

const ADMITTED: u32 = 0;

/// [`NEW_FLOW`] where this client may start a flow of `service`; else the packet is dropped. `counted`: the packet has ended a flow,
/// and kept to the packet rate there.
#[inline(never)]
pub fn admit<A: Family>(parsed: &Parsed<A>, service: u32, counted: bool) -> Verdict {
    let Some(entry) = maps::service(service) else {
        return because(Reason::NotReady, service);
    };
    if !lets_in(parsed, entry, service) {
        return because(Reason::SourceDenied, service);
    }
    if entry.source_flow_rate | entry.source_packet_rate | entry.source_half_open == 0 {
        return NEW_FLOW;
    }
    match within_limits(parsed, service, entry, counted) {
        ADMITTED => NEW_FLOW,
        HALF_OPEN => because(Reason::SourceHalfOpen, service),
        FLOW_RATE => because(Reason::SourceFlowRate, service),
        _ => because(Reason::SourcePacketRate, service),
    }
}

/// True where the source ranges of the service let this client in.
#[inline(always)]
pub fn lets_in<A: Family>(parsed: &Parsed<A>, entry: &ServiceEntry, service: u32) -> bool {
    entry.flags & service_flag::SOURCE_RANGES == 0 || in_ranges(parsed, service, entry.flags)
}

#[inline(never)]
fn in_ranges<A: Family>(parsed: &Parsed<A>, service: u32, flags: u16) -> bool {
    match maps::range_action(RangeSource { service, address: parsed.key.src.wide() }) {
        Some(action) => action == range_action::ALLOW,
        None => flags & service_flag::SOURCES_REFUSED_BY_DEFAULT == 0,
    }
}

const HALF_OPEN: u32 = 1;
const FLOW_RATE: u32 = 2;
const PACKET_RATE: u32 = 3;

/// A refused flow takes no token, of either bucket.
#[inline(never)]
fn within_limits<A: Family>(parsed: &Parsed<A>, service: u32, entry: &ServiceEntry, counted: bool) -> u32 {
    let id = source_of(parsed.key.src, service);
    // A full map is no reason to refuse anybody.
    let Some(used) = maps::source_use(&id) else {
        return ADMITTED;
    };
    let now = maps::precise_now();
    if entry.source_half_open != 0 {
        let window = HalfOpen::window(maps::now(), entry.half_open_timeout);
        if used.half_open.count(window) >= entry.source_half_open {
            return HALF_OPEN;
        }
    }
    let Some(flows) = limit::take(used.flows, now, entry.source_flow_rate, entry.source_flow_burst) else {
        return FLOW_RATE;
    };
    if !counted {
        match limit::take(used.packets, now, entry.source_packet_rate, entry.source_packet_burst) {
            Some(next) => used.packets = next,
            None => return PACKET_RATE,
        }
    }
    used.flows = flows;
    ADMITTED
}

/// True where a packet of `flow` keeps to the packet rate of its source; those of backends do not count.
#[inline(never)]
pub fn packet_admitted<A: Family>(client: A, flow: &Flow<A>) -> bool {
    if flow.direction != Direction::Forward as u8 {
        return true;
    }
    let Some(entry) = maps::service(flow.service) else {
        return true;
    };
    if entry.source_packet_rate == 0 {
        return true;
    }
    let Some(used) = maps::source_use(&source_of(client, flow.service)) else {
        return true;
    };
    match limit::take(used.packets, maps::precise_now(), entry.source_packet_rate, entry.source_packet_burst) {
        Some(next) => {
            used.packets = next;
            true
        }
        None => false,
    }
}

/// Counts a flow of `client` that entered half-open, where the service has a quota.
#[inline(never)]
pub fn half_opened<A: Family>(client: A, service: u32) {
    let Some(entry) = maps::service(service) else { return };
    if entry.source_half_open == 0 {
        return;
    }
    if let Some(used) = maps::source_use(&source_of(client, service)) {
        used.half_open.opened(HalfOpen::window(maps::now(), entry.half_open_timeout));
    }
}

/// Counts a flow that was promoted or closed while it was half-open.
#[inline(never)]
pub fn half_open_ended<A: Family>(flow: &Flow<A>) {
    let Some(entry) = maps::service(flow.service) else { return };
    if entry.source_half_open == 0 {
        return;
    }
    let client = if flow.direction == Direction::Forward as u8 { flow.key.src } else { flow.new_dst };
    if let Some(used) = maps::known_source_use(&source_of(client, flow.service)) {
        let opened = HalfOpen::window(flow.created, entry.half_open_timeout);
        used.half_open.ended(opened, HalfOpen::window(maps::now(), entry.half_open_timeout));
    }
}

#[inline(always)]
fn source_of<A: Family>(client: A, service: u32) -> SourceId {
    SourceId { address: limit::source(client.wide()), service }
}
