//! The packet that an ICMP error is about, as far as it quotes it.

use edge_common::{
    flow::{FlowKeyV4, TCP, UDP},
    icmp,
};
use network_types::ip::Ipv4Hdr;

use crate::{
    packet::Packet,
    parse::{self, IP, Ip, Parsed},
};

/// What the error's bytes say. Offsets are from the start of the frame.
pub struct Quote {
    /// The error itself; its ports are 0.
    pub outer: Parsed<u32>,
    /// The tuple of the quoted packet.
    pub key: FlowKeyV4,
    /// Offset of the ICMP header.
    pub icmp: u8,
    /// Offset of the quoted IP header.
    pub ip: u8,
    /// Offset of the quoted layer-4 header.
    pub l4: u8,
    /// The quote is long enough to hold the layer-4 checksum: UDP's always is, TCP's beyond the 8 bytes of RFC 792.
    pub has_check: bool,
}

/// Bytes of a quoted layer-4 header that an error must have (RFC 792).
const MINIMUM: usize = 8;
/// Bytes of a TCP header up to its checksum's end.
const TCP_CHECKED: usize = 18;
/// Everything of an error that is read or written: all options outside and inside.
const DEPTH: usize = IP + 60 + icmp::HEADER + 60 + TCP_CHECKED;
const OFFSET: u16 = 0x1fff;

impl Quote {
    /// To be filled by [`read`].
    pub const NOTHING: Self =
        Self { outer: parse::NOTHING, key: FlowKeyV4::new(0, 0, 0, 0, 0), icmp: 0, ip: 0, l4: 0, has_check: false };
}

/// Reads an unfragmented ICMP packet; false where it is no error, or does not quote the ports of a TCP or UDP packet, as
/// one about a later fragment does not. Its checksum is left to the receiver, who sees it changed by differences only.
#[inline(never)]
pub fn read<P: Packet>(packet: &mut P, ip: &Ip<u32>, quote: &mut Quote) -> bool {
    packet.pull(DEPTH);
    let header_len = usize::from(ip.header_len as u8);
    let end = IP + ip.total_len as usize;
    if header_len < Ipv4Hdr::LEN || end > packet.frame_len() {
        return false;
    }
    let icmp = IP + header_len;
    let Some(message) = packet.header_anew::<[u8; icmp::HEADER]>(icmp) else {
        return false;
    };
    if !icmp::is_error(message[0]) {
        return false;
    }
    let inner_at = icmp + icmp::HEADER;
    let Some(inner) = packet.header_anew::<Ipv4Hdr>(inner_at) else {
        return false;
    };
    let inner_len = usize::from(inner.vihl & 0xf) << 2;
    let protocol = inner.proto;
    if inner.vihl >> 4 != 4
        || inner_len < Ipv4Hdr::LEN
        || u16::from_be_bytes(inner.frags) & OFFSET != 0
        || (protocol != TCP && protocol != UDP)
    {
        return false;
    }
    let (src, dst) = (u32::from_ne_bytes(inner.src_addr), u32::from_ne_bytes(inner.dst_addr));
    let l4 = inner_at + inner_len;
    if l4 + MINIMUM > end {
        return false;
    }
    let Some(ports) = packet.header_anew::<[u16; MINIMUM / 2]>(l4) else {
        return false;
    };
    quote.key = FlowKeyV4::new(src, dst, ports[0], ports[1], protocol);
    quote.outer.key = FlowKeyV4::new(ip.src, ip.dst, 0, 0, icmp::ICMP);
    quote.outer.total_len = ip.total_len;
    quote.outer.header_len = ip.header_len;
    quote.outer.ttl = ip.ttl;
    quote.outer.tos = ip.tos;
    quote.outer.l4_len = icmp::HEADER as u8;
    quote.outer.must_not_fragment = ip.must_not_fragment();
    quote.icmp = icmp as u8;
    quote.ip = inner_at as u8;
    quote.l4 = l4 as u8;
    quote.has_check = protocol == UDP || l4 + TCP_CHECKED <= end;
    true
}
