//! The packet that an ICMP error is about, as far as it quotes it.

use edge_common::{
    flow::{FlowKey, UDP},
    icmp,
};
use network_types::ip::Ipv4Hdr;

use crate::{
    family::Family,
    packet::Packet,
    parse::{self, IP, Parsed},
};

/// What the error's bytes say. Offsets are from the start of the frame.
pub struct Quote<A> {
    /// The error itself; its ports are 0.
    pub outer: Parsed<A>,
    /// The tuple of the quoted packet.
    pub key: FlowKey<A>,
    /// Offset of the ICMP header.
    icmp: u16,
    /// Offset of the quoted layer-4 header.
    l4: u16,
    /// The quote is long enough to hold the layer-4 checksum: UDP's always is, TCP's beyond the 8 bytes of RFC 792.
    pub has_check: bool,
}

/// Bytes of a quoted layer-4 header that an error must have (RFC 792).
const MINIMUM: usize = 8;
/// Bytes of a TCP header up to its checksum's end.
const TCP_CHECKED: usize = 18;

impl<A: Family> Quote<A> {
    /// Offset of the ICMP header, with a bound that the verifier sees.
    #[inline(always)]
    pub fn icmp(&self) -> usize {
        place::<A>(self.icmp)
    }

    /// Offset of the quoted IP header.
    #[inline(always)]
    pub fn ip(&self) -> usize {
        self.icmp() + icmp::HEADER
    }

    /// Offset of the quoted layer-4 header.
    #[inline(always)]
    pub fn l4(&self) -> usize {
        place::<A>(self.l4)
    }
}

#[inline(always)]
fn place<A: Family>(offset: u16) -> usize {
    usize::from(if A::V6 { offset & 0x7fff } else { offset & 0xff })
}

/// Reads an ICMP packet; false where it is a fragment, it is no error, or does not quote the ports of a TCP or UDP packet, as
/// one about a later fragment does not. Its checksum is left to the receiver, who sees it changed by differences only.
#[inline(never)]
pub fn read<A: Family, P: Packet>(packet: &mut P, quote: &mut Quote<A>) -> bool {
    let Some(ip) = A::icmp(packet) else {
        return false;
    };
    let header_len = parse::header_len::<A>(ip.header_len);
    let icmp = IP + header_len;
    let end = IP + ip.total_len as usize;
    if header_len < Ipv4Hdr::LEN || !packet.holds(end) {
        return false;
    }
    packet.pull_anew(icmp + icmp::HEADER + A::QUOTED);
    let Some(message) = packet.header_anew::<[u8; icmp::HEADER]>(icmp) else {
        return false;
    };
    if !A::is_error(message[0]) {
        return false;
    }
    let l4 = A::quoted(packet, icmp + icmp::HEADER, &mut quote.key);
    if l4 == 0 || l4 + MINIMUM > end {
        return false;
    }
    let Some(ports) = packet.header_anew::<[u16; MINIMUM / 2]>(l4) else {
        return false;
    };
    (quote.key.src_port, quote.key.dst_port) = (ports[0], ports[1]);
    quote.outer.key = FlowKey::new(ip.src, ip.dst, 0, 0, A::NUMBER);
    quote.outer.total_len = ip.total_len;
    quote.outer.header_len = ip.header_len;
    quote.outer.ttl = ip.ttl;
    quote.outer.tos = ip.tos;
    quote.outer.l4_len = icmp::HEADER as u8;
    quote.outer.must_not_fragment = ip.must_not_fragment();
    quote.icmp = icmp as u16;
    quote.l4 = l4 as u16;
    quote.has_check = quote.key.protocol == UDP || l4 + TCP_CHECKED <= end;
    true
}
