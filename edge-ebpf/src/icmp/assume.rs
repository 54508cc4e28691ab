//! An ICMP error about a packet of a flow that this edge has not seen: ECMP sends errors to any edge of a group. In dnat
//! mode the quoted tuple says which flow it is, since all edges choose the same backend for it. In full-nat mode only the
//! edge that chose the port knows, and its SNAT address is its own, so that such an error finds it.

use edge_common::{
    conntrack::Direction,
    flow::FlowKey,
    maps::{ANY_PORT, BackendEntry, Flow, mode},
    verdict::{Reason, Verdict},
};

use super::{quote::Quote, relay, unmatched};
use crate::{
    classify::{is_of, lookup},
    family::Family,
    fib, maps,
    packet::Packet,
    select,
    stats::because,
};

/// Translates the error as the flow's own edge would, or passes it.
#[inline(always)]
pub fn relay<A: Family, P: Packet>(packet: &mut P, quote: &Quote<A>) -> Verdict {
    // Not on the stack, which the stages that follow need.
    let Some(flow) = A::assumed_flow() else {
        return unmatched();
    };
    match find(&quote.key, flow) {
        FOUND => relay::along(packet, quote, flow),
        // From a backend of ours about somebody else's choice: it would show the client an address it never asked.
        OTHER_CHOICE if fib::leads_away(packet, &quote.outer) => because(Reason::ReplyWithoutFlow, flow.service),
        _ => unmatched(),
    }
}

const NOTHING: u32 = 0;
const FOUND: u32 = 1;
const OTHER_CHOICE: u32 = 2;

/// The flow that would answer the quoted packet, next hop and all that only a running flow has left out.
#[inline(never)]
fn find<A: Family>(quoted: &FlowKey<A>, flow: &mut Flow<A>) -> u32 {
    // The client's tuple, written where it is to be: the stack is short.
    set_key(flow, quoted.dst, quoted.src, quoted.dst_port, quoted.src_port);
    flow.key.protocol = quoted.protocol;
    // About a backend's reply, or about a client's packet as the backend was to get it: that backend, else 0.
    let (number, named) = match lookup(quoted.src, quoted.src_port, quoted.protocol, maps::frontend) {
        Some(number) => (number, 0),
        None => match lookup(quoted.dst, quoted.dst_port, quoted.protocol, maps::dnat_backend) {
            Some(named) => (maps::backend(named).map_or(0, |backend| backend.service), named),
            None => return NOTHING,
        },
    };
    let Some(service) = maps::service(number) else {
        return NOTHING;
    };
    if service.mode != mode::DNAT {
        return NOTHING;
    }
    if named != 0 {
        let port = service.port_of(quoted.dst_port);
        set_key(flow, quoted.src, A::narrow(&service.address), quoted.src_port, port);
    }
    flow.service = number;
    if named != 0 && service.port == ANY_PORT && !is_of(&flow.key, number) {
        return OTHER_CHOICE;
    }
    let chosen = select::agreed(service, &flow.key, select::NONE);
    if chosen == select::NONE && named == 0 {
        return NOTHING;
    }
    if named != 0 && named != chosen {
        return OTHER_CHOICE;
    }
    let Some(backend) = maps::backend(chosen) else {
        return NOTHING;
    };
    write(flow, backend);
    if named != 0 {
        flow.turn();
    }
    FOUND
}

#[inline(always)]
fn set_key<A: Family>(flow: &mut Flow<A>, src: A, dst: A, src_port: u16, dst_port: u16) {
    flow.key.src = src;
    flow.key.dst = dst;
    flow.key.src_port = src_port;
    flow.key.dst_port = dst_port;
}

/// The client's half of a dnat flow, which has its key.
#[inline(always)]
fn write<A: Family>(flow: &mut Flow<A>, backend: &BackendEntry) {
    flow.new_src = flow.key.src;
    flow.new_src_port = flow.key.src_port;
    flow.new_dst = A::narrow(&backend.address);
    flow.new_dst_port = backend.port_for(flow.key.dst_port);
    flow.set_deltas();
    flow.next_hop = 0;
    flow.direction = Direction::Forward as u8;
}
