//! Route lookups: at a flow's first packet in a direction, when routes changed, and at touch; never per packet once a
//! next hop is known.

use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_NOT_FWDED, BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LKUP_RET_UNSUPP_LWT,
};
use edge_common::maps::{FlowV4, NeighbourKey, NextHop, interface_flag, next_hop_flag, notice};
use network_types::eth::EthHdr;

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
    /// Only the stack can use this route.
    pub const STACK: u32 = 2;
    /// No route, or one that refuses.
    pub const NO_ROUTE: u32 = 3;
    /// Longer than the route's MTU, which is in the upper half.
    pub const TOO_LONG: u32 = 4;
    /// There is no next-hop number for it: the link-layer addresses are in this packet already, and the egress
    /// interface is in the upper half.
    pub const DIRECT: u32 = 5;
}

/// MTU assumed where a kernel reports none.
const DEFAULT_MTU: u32 = 1500;

/// Looks the flow's route up and remembers its next hop; a [`resolution`] in the lower half.
#[inline(never)]
pub fn resolve<P: Packet>(packet: &mut P, parsed: &Parsed, flow: &mut FlowV4, generation: u32) -> u64 {
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
        return u64::from(match u32::try_from(route.result) {
            Ok(BPF_FIB_LKUP_RET_NO_NEIGH) => resolution::NO_NEIGHBOUR,
            Ok(BPF_FIB_LKUP_RET_UNSUPP_LWT) => resolution::STACK,
            // Routes of other types, local ones included: a translated packet is never for this host.
            _ => resolution::NO_ROUTE,
        });
    }
    if route.found.dmac == [0; 6] {
        return u64::from(resolution::NO_NEIGHBOUR);
    }
    match number(&route) {
        Some(number) => {
            flow.next_hop = number;
            u64::from(resolution::RESOLVED)
        }
        None => direct(packet, parsed, &route),
    }
}

/// One packet by its own route lookup, where next-hop numbers have run out or the gateway is an IPv6 one.
#[inline(always)]
fn direct<P: Packet>(packet: &mut P, parsed: &Parsed, route: &Route) -> u64 {
    let ifindex = route.found.ifindex;
    if !P::REDIRECTS_ANYWHERE && ifindex != packet.ingress() && !redirectable(ifindex) {
        return u64::from(resolution::STACK);
    }
    if length(packet, parsed) > mtu(route) as usize {
        return u64::from(mtu(route)) << 32 | u64::from(resolution::TOO_LONG);
    }
    let Some(eth) = packet.header::<EthHdr>(0) else {
        return u64::from(resolution::STACK);
    };
    eth.dst_addr = route.found.dmac;
    eth.src_addr = route.found.smac;
    u64::from(ifindex) << 32 | u64::from(resolution::DIRECT)
}

/// The longest piece that a packet leaves in, from the IP header on.
#[inline(always)]
pub fn length<P: Packet>(packet: &P, parsed: &Parsed) -> usize {
    packet.segment_len(usize::from(parsed.total_len), usize::from(parsed.header_len) + usize::from(parsed.l4_len))
}

#[inline(always)]
fn redirectable(ifindex: u32) -> bool {
    maps::interface_flags(ifindex) & interface_flag::XDP_REDIRECT != 0
}

#[inline(always)]
fn mtu(route: &Route) -> u32 {
    match route.mtu() {
        0 => DEFAULT_MTU,
        mtu => mtu,
    }
}

/// The next-hop number of a route, up to date, allocated if new; `None` where none is left, or where the gateway
/// is no IPv4 neighbour.
#[inline(always)]
fn number(route: &Route) -> Option<u32> {
    let neighbour = route.neighbour()?;
    let ifindex = route.found.ifindex;
    let mut hop = NextHop {
        ifindex,
        neighbour,
        dst_mac: route.found.dmac,
        src_mac: route.found.smac,
        mtu: mtu(route),
        vlan: 0,
        flags: if redirectable(ifindex) { 0 } else { next_hop_flag::VIA_STACK },
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
    let Some(number) = maps::allocate_next_hop() else {
        maps::raise(notice::NEXT_HOPS_EXHAUSTED);
        return None;
    };
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
