//! Headers to a flow key. Only the address prefilter decides what is ours, so it sits between the two steps here.

use edge_common::{
    conntrack::Segment,
    flow::{FlowKeyV4, TCP},
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

/// The IPv4 header's facts. Small, as is [`Parsed`]: both live on the program's 512 bytes of stack.
#[derive(Clone, Copy)]
pub struct Ipv4 {
    /// Source, network order.
    pub src: u32,
    /// Destination, network order.
    pub dst: u32,
    /// Length from the IP header on, as the header says.
    pub total_len: u16,
    /// Flags and fragment offset, host order.
    fragment: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Time to live.
    pub ttl: u8,
    /// Type of service.
    pub tos: u8,
    /// Header length, bytes.
    pub header_len: u8,
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

    /// Part of a fragmented packet, without its ports.
    #[inline(always)]
    pub fn is_later_fragment(&self) -> bool {
        self.fragment & FRAGMENT_OFFSET != 0
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
    /// TCP sequence number, host order.
    pub seq: u32,
    /// TCP acknowledgement number, host order.
    pub ack: u32,
    /// Length from the IP header on, as the header says.
    pub total_len: u16,
    /// TCP flags; 0 for UDP.
    pub flags: u8,
    /// Time to live.
    pub ttl: u8,
    /// Type of service.
    pub tos: u8,
    /// IPv4 header length, bytes.
    pub header_len: u8,
    /// Layer-4 header length, bytes.
    pub l4_len: u8,
    /// Routers must not fragment it.
    pub must_not_fragment: bool,
}

/// No packet, to be filled.
pub const NOTHING: Parsed = Parsed {
    key: FlowKeyV4::new(0, 0, 0, 0, 0),
    seq: 0,
    ack: 0,
    total_len: 0,
    flags: 0,
    ttl: 0,
    tos: 0,
    header_len: 0,
    l4_len: 0,
    must_not_fragment: false,
};

impl Parsed {
    /// Offset of the layer-4 header.
    #[inline(always)]
    pub fn l4(&self) -> usize {
        IP + usize::from(self.header_len)
    }

    /// True where it carries more than headers.
    #[inline(always)]
    pub fn has_payload(&self) -> bool {
        self.total_len > u16::from(self.header_len) + u16::from(self.l4_len)
    }

    /// What it says to connection tracking.
    #[inline(always)]
    pub fn segment(&self) -> Segment {
        Segment { protocol: self.key.protocol, flags: self.flags, seq: self.seq, ack: self.ack }
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
        header_len: (ip.vihl & 0xf) << 2,
        total_len: u16::from_be_bytes(ip.tot_len),
        fragment: u16::from_be_bytes(ip.frags),
    })
}

/// The layer-4 header of an unfragmented TCP or UDP packet; `None` where the headers are cut short or contradict
/// each other.
#[inline(always)]
pub fn transport<P: Packet>(packet: &mut P, ip: Ipv4) -> Option<Parsed> {
    let (header_len, total_len) = (usize::from(ip.header_len), usize::from(ip.total_len));
    if header_len < Ipv4Hdr::LEN || !packet.holds(IP + total_len) {
        return None;
    }
    let payload = total_len.checked_sub(header_len)?;
    let mut parsed = Parsed {
        key: FlowKeyV4::new(ip.src, ip.dst, 0, 0, ip.protocol),
        seq: 0,
        ack: 0,
        total_len: ip.total_len,
        flags: 0,
        ttl: ip.ttl,
        tos: ip.tos,
        header_len: ip.header_len,
        l4_len: UdpHdr::LEN as u8,
        must_not_fragment: ip.must_not_fragment(),
    };
    if ip.protocol == TCP {
        let tcp = packet.header::<[u8; TcpHdr::LEN]>(IP + header_len)?;
        parsed.l4_len = (tcp[12] >> 4) << 2;
        if usize::from(parsed.l4_len) < TcpHdr::LEN {
            return None;
        }
        parsed.key.src_port = word(tcp, 0);
        parsed.key.dst_port = word(tcp, 2);
        parsed.seq = long(tcp, 4);
        parsed.ack = long(tcp, 8);
        parsed.flags = tcp[13];
    } else {
        let udp = packet.header::<UdpHdr>(IP + header_len)?;
        parsed.key.src_port = u16::from_ne_bytes(udp.src);
        parsed.key.dst_port = u16::from_ne_bytes(udp.dst);
    }
    (usize::from(parsed.l4_len) <= payload).then_some(parsed)
}

#[inline(always)]
fn word(bytes: &[u8; TcpHdr::LEN], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

#[inline(always)]
fn long(bytes: &[u8; TcpHdr::LEN], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
