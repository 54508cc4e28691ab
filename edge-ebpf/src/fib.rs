//! Route lookups: at a flow's first packet in a direction, when routes changed, and at touch; never per packet once a
//! next hop is known.

use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_NOT_FWDED, BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LKUP_RET_UNSUPP_LWT,
};
use edge_common::maps::{Flow, NeighbourKey, NextHop, Port, interface_flag, next_hop_flag, notice};
use network_types::eth::EthHdr;

use crate::{
    family::Family,
    maps,
    packet::{Packet, Query, Route},
    parse::Parsed,
    vlan,
};

/// Where a flow's packets go now; a number, so that a BPF function can return it.
pub mod resolution {
    /// `Flow::next_hop` is set.
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

/// What a lookup works on, in the scratch memory.
#[repr(C)]
pub struct Lookup {
    /// The question to the kernel's FIB, and then its answer.
    pub route: Route,
    hop: NextHop,
    key: NeighbourKey,
    port: Port,
}

/// MTU assumed where a kernel reports none.
const DEFAULT_MTU: u32 = 1500;

/// Looks the flow's route up and remembers its next hop; a [`resolution`] in the lower half.
#[inline(never)]
pub fn resolve<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>, flow: &mut Flow<A>, generation: u32) -> u64 {
    let Some(Lookup { route, hop, key, port }) = maps::scratch::lookup() else {
        return u64::from(resolution::NO_ROUTE);
    };
    let query = Query {
        src: flow.new_src,
        dst: flow.new_dst,
        src_port: flow.new_src_port,
        dst_port: flow.new_dst_port,
        protocol: flow.key.protocol,
        tos: parsed.tos,
        ingress: vlan::ingress(packet, port),
    };
    query.encode(route);
    let result = packet.route(route);
    flow.next_hop = 0;
    flow.route_generation = generation;
    if result != i64::from(BPF_FIB_LKUP_RET_SUCCESS) {
        return u64::from(match u32::try_from(result) {
            Ok(BPF_FIB_LKUP_RET_NO_NEIGH) => resolution::NO_NEIGHBOUR,
            Ok(BPF_FIB_LKUP_RET_UNSUPP_LWT) => resolution::STACK,
            // Routes of other types, local ones included: a translated packet is never for this host.
            _ => resolution::NO_ROUTE,
        });
    }
    if route.0.dmac == [0; 6] {
        return u64::from(resolution::NO_NEIGHBOUR);
    }
    match number(route, hop, key, port) {
        Some(number) => {
            flow.next_hop = number;
            u64::from(resolution::RESOLVED)
        }
        None => direct(packet, parsed, route),
    }
}

/// One packet by its own route lookup, where next-hop numbers have run out.
#[inline(always)]
fn direct<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>, route: &Route) -> u64 {
    let ifindex = route.0.ifindex;
    if !P::REDIRECTS_ANYWHERE && ifindex != packet.ingress() && !redirectable(ifindex) {
        return u64::from(resolution::STACK);
    }
    if length(packet, parsed) > mtu(route) as usize {
        return u64::from(mtu(route)) << 32 | u64::from(resolution::TOO_LONG);
    }
    let Some(eth) = packet.header::<EthHdr>(0) else {
        return u64::from(resolution::STACK);
    };
    eth.dst_addr = route.0.dmac;
    eth.src_addr = route.0.smac;
    u64::from(ifindex) << 32 | u64::from(resolution::DIRECT)
}

/// The longest piece that a packet leaves in, from the IP header on.
#[inline(always)]
pub fn length<A: Family, P: Packet>(packet: &P, parsed: &Parsed<A>) -> usize {
    packet.segment_len(parsed.total_len as usize, usize::from(parsed.header_len) + usize::from(parsed.l4_len))
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

/// The next-hop number of a route, up to date, allocated if new; `None` where none is left.
#[inline(always)]
fn number(route: &Route, hop: &mut NextHop, key: &mut NeighbourKey, port: &mut Port) -> Option<u32> {
    let neighbour = route.neighbour();
    let device = route.0.ifindex;
    *port = Port::untagged(device);
    let lower = maps::other_side(port).map_or(*port, |lower| *lower);
    let ifindex = lower.ifindex;
    // Field by field, in place: a whole value would be made on the stack first.
    hop.ifindex = ifindex;
    hop.neighbour = neighbour;
    hop.dst_mac = route.0.dmac;
    hop.src_mac = route.0.smac;
    hop.mtu = mtu(route);
    hop.tags = lower.tags;
    hop._pad = 0;
    hop.flags = if redirectable(ifindex) { 0 } else { next_hop_flag::VIA_STACK };
    hop.generation = 0;
    key.ifindex = device;
    key.address = neighbour;
    if let Some(number) = maps::next_hop_number(key) {
        let known = maps::next_hop(number)?;
        hop.generation = known.generation;
        if *known != *hop {
            *known = *hop;
        }
        return Some(number);
    }
    let Some(number) = maps::allocate_next_hop() else {
        maps::raise(notice::NEXT_HOPS_EXHAUSTED);
        return None;
    };
    *maps::next_hop(number)? = *hop;
    match maps::add_next_hop(key, number) {
        Ok(()) => Some(number),
        // Another CPU was first; this number stays unused.
        Err(_) => maps::next_hop_number(key),
    }
}

/// True where the packet, as it is, would be forwarded: its destination is not this host.
#[inline(never)]
pub fn leads_away<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>) -> bool {
    let Some(Lookup { route, port, .. }) = maps::scratch::lookup() else {
        return false;
    };
    let query = Query {
        src: parsed.key.src,
        dst: parsed.key.dst,
        src_port: parsed.key.src_port,
        dst_port: parsed.key.dst_port,
        protocol: parsed.key.protocol,
        tos: parsed.tos,
        ingress: vlan::ingress(packet, port),
    };
    query.encode(route);
    packet.route(route) != i64::from(BPF_FIB_LKUP_RET_NOT_FWDED)
}
