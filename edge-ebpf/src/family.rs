//! What differs between IPv4 and IPv6 in the stages: the flow tables (see `maps`), the stages' numbers, and the IP header's rewriting.

use edge_common::{
    address::Wide,
    checksum,
    maps::{Flow, FlowV4, FlowV6, stages},
};

use crate::{
    fragment,
    maps::{self, FlowCache, FlowTables},
    packet::{Packet, set_word},
    parse::{IP, Ipv4Header, Ipv6Header, Parsed, ipv4_field, ipv6_field},
    rewrite::Translation,
    stages::Handover,
};

/// IPv4 or IPv6, by its type of address.
pub trait Family: FlowTables + FlowCache {
    /// Number of the stage that tracks a packet's flow.
    const TRACK: u32;
    /// Number of the stage of packets without a flow.
    const CREATE: u32;
    /// Number of the stage that sends a packet.
    const SEND: u32;

    /// Remembers a first fragment that was sent on by `flow`, so that the rest follow it.
    fn remember_fragment<P: Packet>(packet: &mut P, parsed: &Parsed<Self>, flow: &Flow<Self>);

    /// This CPU's room for what the stages of one hook leave each other.
    fn handover(hook: u32) -> Option<&'static mut Handover<Self>>;

    /// Decrements the TTL or hop limit and writes the flow's addresses; false where the packet turned out to be too
    /// short, which parsing excludes.
    fn rewrite_header<P: Packet>(packet: &mut P, flow: &impl Translation<Self>) -> bool;
}

impl Family for u32 {
    const TRACK: u32 = stages::TRACK;
    const CREATE: u32 = stages::CREATE;
    const SEND: u32 = stages::SEND;

    #[inline(always)]
    fn remember_fragment<P: Packet>(packet: &mut P, parsed: &Parsed<Self>, flow: &FlowV4) {
        fragment::remember(packet, parsed, flow);
    }

    #[inline(always)]
    fn handover(hook: u32) -> Option<&'static mut Handover<Self>> {
        maps::stages::handover(hook)
    }

    #[inline(always)]
    fn rewrite_header<P: Packet>(packet: &mut P, flow: &impl Translation<Self>) -> bool {
        let Some(ip) = packet.header::<Ipv4Header>(IP) else {
            return false;
        };
        // The TTL is the first byte of its word, and more than one.
        ip[ipv4_field::TTL_AND_PROTOCOL] -= u16::from_ne_bytes([1, 0]);
        let delta = checksum::add(flow.deltas().0, checksum::TTL_DECREMENT);
        ip[ipv4_field::CHECK] = checksum::apply(ip[ipv4_field::CHECK], delta);
        let (src, dst) = flow.addresses();
        set_word::<{ ipv4_field::SRC }, _>(ip, *src);
        set_word::<{ ipv4_field::DST }, _>(ip, *dst);
        true
    }
}

impl Family for Wide {
    const TRACK: u32 = stages::TRACK_V6;
    const CREATE: u32 = stages::CREATE_V6;
    const SEND: u32 = stages::SEND_V6;

    #[inline(always)]
    fn remember_fragment<P: Packet>(_packet: &mut P, _parsed: &Parsed<Self>, _flow: &FlowV6) {}

    #[inline(always)]
    fn handover(hook: u32) -> Option<&'static mut Handover<Self>> {
        maps::stages::handover_v6(hook)
    }

    #[inline(always)]
    fn rewrite_header<P: Packet>(packet: &mut P, flow: &impl Translation<Self>) -> bool {
        let Some(ip) = packet.header::<Ipv6Header>(IP) else {
            return false;
        };
        // The hop limit is the second byte of its word, and more than one.
        ip[ipv6_field::NEXT_AND_HOPS] -= u16::from_ne_bytes([0, 1]);
        let (src, dst) = flow.addresses();
        set_word::<{ ipv6_field::SRC }, _>(ip, src[0]);
        set_word::<{ ipv6_field::SRC + 4 }, _>(ip, src[1]);
        set_word::<{ ipv6_field::SRC + 8 }, _>(ip, src[2]);
        set_word::<{ ipv6_field::SRC + 12 }, _>(ip, src[3]);
        set_word::<{ ipv6_field::DST }, _>(ip, dst[0]);
        set_word::<{ ipv6_field::DST + 4 }, _>(ip, dst[1]);
        set_word::<{ ipv6_field::DST + 8 }, _>(ip, dst[2]);
        set_word::<{ ipv6_field::DST + 12 }, _>(ip, dst[3]);
        true
    }
}
