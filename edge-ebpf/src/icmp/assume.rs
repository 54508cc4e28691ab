//! An ICMP error about a packet of a flow that this edge has not seen: ECMP sends errors to any edge of a group. In dnat
//! mode the quoted tuple says which flow it is, since all edges choose the same backend for it. In full-nat mode only the
//! edge that chose the port knows, and its SNAT address is its own, so that such an error finds it.

use edge_common::{
    address::{Address, mapped},
    conntrack::Direction,
    flow::FlowKeyV4,
    maps::{BackendEntry, FlowV4, ServiceKey, mode},
    verdict::{Reason, Verdict},
};

use super::{quote::Quote, relay, unmatched};
use crate::{fib, maps, packet::Packet, select, stats::because};

/// Translates the error as the flow's own edge would, or passes it.
#[inline(always)]
pub fn relay<P: Packet>(packet: &mut P, quote: &Quote) -> Verdict {
    // Not on the stack, which the stages that follow need.
    let Some(flow) = maps::assumed_flow() else {
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
fn find(quoted: &FlowKeyV4, flow: &mut FlowV4) -> u32 {
    let mut client = quoted.reversed();
    // About a backend's reply, or about a client's packet as the backend was to get it: that backend, else 0.
    let (number, named) = match maps::frontend(&service_key(client.dst, client.dst_port, client.protocol)) {
        Some(number) => (number, 0),
        None => match maps::dnat_backend(&service_key(quoted.dst, quoted.dst_port, quoted.protocol)) {
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
        client =
            FlowKeyV4::new(quoted.src, u32::narrow(&service.address), quoted.src_port, service.port, quoted.protocol);
    }
    flow.service = number;
    let chosen = select::agreed(service, &client, select::NONE);
    if chosen == select::NONE && named == 0 {
        return NOTHING;
    }
    if named != 0 && named != chosen {
        return OTHER_CHOICE;
    }
    let Some(backend) = maps::backend(chosen) else {
        return NOTHING;
    };
    write(flow, &client, backend);
    if named != 0 {
        flow.turn();
    }
    FOUND
}

#[inline(always)]
fn service_key(address: u32, port: u16, protocol: u8) -> ServiceKey {
    ServiceKey { address: mapped(address), port, protocol, _pad: 0 }
}

/// The client's half of a dnat flow.
#[inline(always)]
fn write(flow: &mut FlowV4, client: &FlowKeyV4, backend: &BackendEntry) {
    flow.key = *client;
    flow.new_src = client.src;
    flow.new_src_port = client.src_port;
    flow.new_dst = u32::narrow(&backend.address);
    flow.new_dst_port = backend.port;
    flow.set_deltas();
    flow.next_hop = 0;
    flow.direction = Direction::Forward as u8;
}
