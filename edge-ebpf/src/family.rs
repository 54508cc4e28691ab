//! What differs between IPv4 and IPv6 in the stages: the flow tables (see `maps`), the stages' numbers, and the IP header's rewriting.

use edge_common::{
    address::Wide,
    checksum,
    maps::{Flow, FlowV4, FlowV6, stages},
};

use crate::{
    fragment::Pieces,
    icmp::{message::Message, quote::Quote},
    maps::{self, FlowCache, FlowTables},
    packet::{Packet, set_word},
    parse::{IP, Ipv4Header, Ipv6Header, ipv4_field, ipv6_field},
    rewrite::Translation,
    stages::Handover,
};

/// IPv4 or IPv6, by its type of address.
pub trait Family: FlowTables + FlowCache + Message + Pieces {
    /// Number of the stage that tracks a packet's flow.
    const TRACK: u32;
    /// Number of the stage of packets without a flow.
    const CREATE: u32;
    /// Number of the stage that sends a packet.
    const SEND: u32;
    /// Number of the stage of packets in the middle of a flow that is not known.
    const MID_FLOW: u32;

    /// Number of the stage of ICMP packets.
    const RELAY: u32;
    /// Number of the stage of packets whose sender is told what became of them.
    const ANSWER: u32;
    /// Number of the stage of fragments.
    const FRAG: u32;

    /// This CPU's room for what the stages of one hook leave each other.
    fn handover(hook: u32) -> Option<&'static mut Handover<Self>>;

    /// This CPU's room for what an ICMP error quotes.
    fn quote() -> Option<&'static mut Quote<Self>>;

    /// This CPU's place for a flow that is in no table.
    fn assumed_flow() -> Option<&'static mut Flow<Self>>;

    /// Decrements the TTL or hop limit and writes the flow's addresses; false where the packet turned out to be too
    /// short, which parsing excludes.
    fn rewrite_header<P: Packet>(packet: &mut P, flow: &impl Translation<Self>) -> bool;
}

impl Family for u32 {
    const TRACK: u32 = stages::TRACK;
    const CREATE: u32 = stages::CREATE;
    const SEND: u32 = stages::SEND;
    const MID_FLOW: u32 = stages::MID_FLOW;
    const RELAY: u32 = stages::RELAY;
    const ANSWER: u32 = stages::ANSWER;
    const FRAG: u32 = stages::FRAG;

    #[inline(always)]
    fn handover(hook: u32) -> Option<&'static mut Handover<Self>> {
        maps::stages::handover(hook)
    }

    #[inline(always)]
    fn quote() -> Option<&'static mut Quote<Self>> {
        maps::scratch::quote()
    }

    #[inline(always)]
    fn assumed_flow() -> Option<&'static mut FlowV4> {
        maps::assumed_flow()
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
    const MID_FLOW: u32 = stages::MID_FLOW_V6;
    const RELAY: u32 = stages::RELAY_V6;
    const ANSWER: u32 = stages::ANSWER_V6;
    const FRAG: u32 = stages::FRAG_V6;

    #[inline(always)]
    fn handover(hook: u32) -> Option<&'static mut Handover<Self>> {
        maps::stages::handover_v6(hook)
    }

    #[inline(always)]
    fn quote() -> Option<&'static mut Quote<Self>> {
        maps::scratch::quote_v6()
    }

    #[inline(always)]
    fn assumed_flow() -> Option<&'static mut FlowV6> {
        maps::assumed_flow_v6()
    }

    #[inline(always)]
    fn rewrite_header<P: Packet>(packet: &mut P, flow: &impl Translation<Self>) -> bool {
        let Some(ip) = packet.header::<Ipv6Header>(IP) else {
            return false;
        };
        // The hop limit is the second byte of its word, and more than one.
        ip[ipv6_field::NEXT_AND_HOPS] -= u16::from_ne_bytes([0, 1]);
        let (src, dst) = flow.addresses();
        set_word::<{ 2 * ipv6_field::SRC }, _>(ip, src[0]);
        set_word::<{ 2 * ipv6_field::SRC + 4 }, _>(ip, src[1]);
        set_word::<{ 2 * ipv6_field::SRC + 8 }, _>(ip, src[2]);
        set_word::<{ 2 * ipv6_field::SRC + 12 }, _>(ip, src[3]);
        set_word::<{ 2 * ipv6_field::DST }, _>(ip, dst[0]);
        set_word::<{ 2 * ipv6_field::DST + 4 }, _>(ip, dst[1]);
        set_word::<{ 2 * ipv6_field::DST + 8 }, _>(ip, dst[2]);
        set_word::<{ 2 * ipv6_field::DST + 12 }, _>(ip, dst[3]);
        packet.add_to_sum(checksum::HOP_LIMIT_DECREMENT);
        true
    }
}

/// Writes an address into the header, from one of [`ipv6_field`]'s words on.
#[inline(always)]
pub fn write(ip: &mut Ipv6Header, at: usize, address: &Wide) {
    ip[at] = address[0] as u16;
    ip[at + 1] = (address[0] >> 16) as u16;
    ip[at + 2] = address[1] as u16;
    ip[at + 3] = (address[1] >> 16) as u16;
    ip[at + 4] = address[2] as u16;
    ip[at + 5] = (address[2] >> 16) as u16;
    ip[at + 6] = address[3] as u16;
    ip[at + 7] = (address[3] >> 16) as u16;
}
