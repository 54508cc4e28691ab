//! Headers to a flow key. Only the address prefilter decides what is ours, so it sits between the two steps here.

use edge_common::{
    conntrack::Segment,
    flow::{FlowKeyV4, TCP, UDP},
};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::Ipv4Hdr,
    tcp::TcpHdr,
    udp::UdpHdr,
};

use crate::packet::Packet;

/// Bytes that may hold headers: Ethernet, IPv4 with all options, TCP without.
pub const HEADERS: usize = EthHdr::LEN + 60 + TcpHdr::LEN;
/// Offset of the IPv4 header.
pub const IP: usize = EthHdr::LEN;

/// The IPv4 header's facts.
pub struct Ipv4 {
    /// Source, network order.
    pub src: u32,
    /// Destination, network order.
    pub dst: u32,
    /// IP protocol number.
    pub protocol: u8,
    /// Time to live.
    pub ttl: u8,
    /// Type of service.
    pub tos: u8,
    /// Header length, bytes.
    pub header_len: usize,
    /// Length from the IP header on, as the header says.
    pub total_len: usize,
    /// Flags and fragment offset, host order.
    fragment: u16,
}

const DONT_FRAGMENT: u16 = 0x4000;
const MORE_FRAGMENTS: u16 = 0x2000;
const FRAGMENT_OFFSET: u16 = 0x1fff;

impl Ipv4 {
    /// Part of a fragmented packet.
    #[inline(always)]
    pub fn is_fragment(&self) -> bool {
        self.fragment & (MORE_FRAGMENTS | FRAGMENT_OFFSET) != 0
    }

    /// Routers must not fragment it.
    #[inline(always)]
    pub fn must_not_fragment(&self) -> bool {
        self.fragment & DONT_FRAGMENT != 0
    }
}

/// A TCP or UDP packet over IPv4.
pub struct Parsed {
    /// Its tuple.
    pub key: FlowKeyV4,
    /// What it says to connection tracking.
    pub segment: Segment,
    /// Layer-4 header length, bytes.
    pub l4_len: usize,
    /// The IP header.
    pub ip: Ipv4,
}

impl Parsed {
    /// Offset of the layer-4 header.
    #[inline(always)]
    pub fn l4(&self) -> usize {
        IP + self.ip.header_len
    }
}

/// The IPv4 header, or `None` for anything else and for a header cut short: the stack's business, whoever it is for.
#[inline(always)]
pub fn ipv4<P: Packet>(packet: &mut P) -> Option<Ipv4> {
    let eth = packet.header::<EthHdr>(0)?;
    if eth.ether_type != u16::from(EtherType::Ipv4) {
        return None;
    }
    let ip = packet.header::<Ipv4Hdr>(IP)?;
    if ip.vihl >> 4 != 4 {
        return None;
    }
    Some(Ipv4 {
        src: u32::from_ne_bytes(ip.src_addr),
        dst: u32::from_ne_bytes(ip.dst_addr),
        protocol: ip.proto,
        ttl: ip.ttl,
        tos: ip.tos,
        header_len: usize::from(ip.vihl & 0xf) << 2,
        total_len: usize::from(u16::from_be_bytes(ip.tot_len)),
        fragment: u16::from_be_bytes(ip.frags),
    })
}

/// The layer-4 header of an unfragmented TCP or UDP packet; `None` where the headers are cut short or contradict
/// each other.
#[inline(always)]
pub fn transport<P: Packet>(packet: &mut P, ip: Ipv4) -> Option<Parsed> {
    if ip.header_len < Ipv4Hdr::LEN || IP + ip.total_len > packet.len() {
        return None;
    }
    let payload = ip.total_len.checked_sub(ip.header_len)?;
    let l4 = IP + ip.header_len;
    if ip.protocol == TCP {
        let tcp = packet.header::<[u8; TcpHdr::LEN]>(l4)?;
        let l4_len = usize::from(tcp[12] >> 4) << 2;
        if l4_len < TcpHdr::LEN || l4_len > payload {
            return None;
        }
        let key = FlowKeyV4::new(ip.src, ip.dst, word(tcp, 0), word(tcp, 2), TCP);
        let segment = Segment { protocol: TCP, flags: tcp[13], seq: long(tcp, 4), ack: long(tcp, 8) };
        Some(Parsed { key, segment, l4_len, ip })
    } else {
        let udp = packet.header::<UdpHdr>(l4)?;
        if payload < UdpHdr::LEN {
            return None;
        }
        let key =
            FlowKeyV4::new(ip.src, ip.dst, u16::from_ne_bytes(udp.src), u16::from_ne_bytes(udp.dst), UDP);
        let segment = Segment { protocol: UDP, flags: 0, seq: 0, ack: 0 };
        Some(Parsed { key, segment, l4_len: UdpHdr::LEN, ip })
    }
}

#[inline(always)]
fn word(bytes: &[u8; TcpHdr::LEN], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

#[inline(always)]
fn long(bytes: &[u8; TcpHdr::LEN], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
