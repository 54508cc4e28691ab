//! Route lookups: at a flow's first packet in a direction, when routes changed, and at touch; never per packet once a
//! next hop is known.

use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_NOT_FWDED, BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LKUP_RET_UNSUPP_LWT,
};
use edge_common::maps::{FlowV4, NeighbourKey, NextHop, interface_flag, next_hop_flag};

use crate::{
    maps,
    packet::{Packet, Query, Route},
    parse::Parsed,
};

/// Where a flow's packets go now; a number, so that a BPF function can return it.
pub mod resolution {
    /// `FlowV4::next_hop` is set.
    pub const RESOLVED: u32 = 0;
    /// The neighbour has no link-layer address yet: the stack finds it.
    pub const NO_NEIGHBOUR: u32 = 1;
    /// A kind of route that only the stack can use.
    pub const STACK: u32 = 2;
    /// No route, or one that refuses.
    pub const NO_ROUTE: u32 = 3;
}

/// MTU assumed where a kernel reports none.
const DEFAULT_MTU: u32 = 1500;

/// Looks the flow's route up and remembers its next hop; a [`resolution`].
#[inline(never)]
pub fn resolve<P: Packet>(packet: &mut P, parsed: &Parsed, flow: &mut FlowV4, generation: u32) -> u32 {
    let query = Query {
        src: flow.new_src,
        dst: flow.new_dst,
        src_port: flow.new_src_port,
        dst_port: flow.new_dst_port,
        protocol: flow.key.protocol,
        tos: parsed.tos,
        ingress: packet.ingress(),
    };
    let route = packet.route(query.encode());
    flow.next_hop = 0;
    flow.route_generation = generation;
    if route.result != i64::from(BPF_FIB_LKUP_RET_SUCCESS) {
        return match u32::try_from(route.result) {
            Ok(BPF_FIB_LKUP_RET_NO_NEIGH) => resolution::NO_NEIGHBOUR,
            Ok(BPF_FIB_LKUP_RET_UNSUPP_LWT) => resolution::STACK,
            // Routes of other types, local ones included: a translated packet is never for this host.
            _ => resolution::NO_ROUTE,
        };
    }
    if route.found.dmac == [0; 6] {
        return resolution::NO_NEIGHBOUR;
    }
    match number(&route) {
        Some(number) => {
            flow.next_hop = number;
            resolution::RESOLVED
        }
        None => resolution::STACK,
    }
}

/// The next-hop number of a route, up to date, allocated if new; `None` where none is left, or where the gateway
/// is no IPv4 neighbour.
#[inline(always)]
fn number(route: &Route) -> Option<u32> {
    let neighbour = route.neighbour()?;
    let ifindex = route.found.ifindex;
    let redirectable = maps::interface_flags(ifindex) & interface_flag::XDP_REDIRECT != 0;
    let mtu = if route.mtu() == 0 { DEFAULT_MTU } else { route.mtu() };
    let mut hop = NextHop {
        ifindex,
        neighbour,
        dst_mac: route.found.dmac,
        src_mac: route.found.smac,
        mtu,
        vlan: 0,
        flags: if redirectable { 0 } else { next_hop_flag::VIA_STACK },
        generation: 0,
    };
    let key = NeighbourKey { ifindex, address: neighbour };
    if let Some(number) = maps::next_hop_number(&key) {
        let known = maps::next_hop(number)?;
        hop.generation = known.generation;
        if *known != hop {
            *known = hop;
        }
        return Some(number);
    }
    let number = maps::allocate_next_hop()?;
    *maps::next_hop(number)? = hop;
    match maps::add_next_hop(&key, number) {
        Ok(()) => Some(number),
        // Another CPU was first; this number stays unused.
        Err(_) => maps::next_hop_number(&key),
    }
}

/// True where the packet, as it is, would be forwarded: its destination is not this host.
#[inline(never)]
pub fn leads_away<P: Packet>(packet: &mut P, parsed: &Parsed) -> bool {
    let query = Query {
        src: parsed.key.src,
        dst: parsed.key.dst,
        src_port: parsed.key.src_port,
        dst_port: parsed.key.dst_port,
        protocol: parsed.key.protocol,
        tos: parsed.tos,
        ingress: packet.ingress(),
    };
    packet.route(query.encode()).result != i64::from(BPF_FIB_LKUP_RET_NOT_FWDED)
}
