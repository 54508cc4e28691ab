//! Headers to a flow key. Only the address prefilter decides what is ours, so it sits between the two steps here.

use edge_common::{
    address::Wide,
    checksum,
    conntrack::Segment,
    flow::{FlowKey, TCP, UDP},
};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::Ipv4Hdr,
    tcp::TcpHdr,
    udp::UdpHdr,
};

use crate::{
    family::Family,
    packet::{Packet, word},
};

/// Bytes that may hold headers: Ethernet, IPv4 with all options, TCP without.
const HEADERS: usize = EthHdr::LEN + 60 + TcpHdr::LEN;
/// Offset of the IP header.
pub const IP: usize = EthHdr::LEN;

/// The IP header's facts. Small, as is [`Parsed`]: both live on the program's 512 bytes of stack.
#[derive(Clone, Copy)]
pub struct Ip<A> {
    /// Source, network order.
    pub src: A,
    /// Destination, network order.
    pub dst: A,
    /// Length from the IP header on, bytes, as the header says.
    pub total_len: u32,
    /// Length of the header, with options or extension headers, bytes.
    pub header_len: u16,
    /// Flags and fragment offset of IPv4, host order; routers must not fragment IPv6.
    fragment: u16,
    /// IP protocol number; of IPv6, the next header's.
    pub protocol: u8,
    /// Time to live, or hop limit.
    pub ttl: u8,
    /// Type of service, or traffic class.
    pub tos: u8,
}

const DONT_FRAGMENT: u16 = 0x4000;
const MORE_FRAGMENTS: u16 = 0x2000;
const FRAGMENT_OFFSET: u16 = 0x1fff;

impl<A> Ip<A> {
    /// Routers must not fragment it.
    #[inline(always)]
    pub fn must_not_fragment(&self) -> bool {
        self.fragment & DONT_FRAGMENT != 0
    }
}

impl Ip<u32> {
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
}

/// A TCP or UDP packet.
pub struct Parsed<A> {
    /// Its tuple.
    pub key: FlowKey<A>,
    /// TCP sequence number, host order; from [`sequence`] on.
    pub seq: u32,
    /// TCP acknowledgement number, host order; as above.
    pub ack: u32,
    /// Length from the IP header on, bytes, as the header says.
    pub total_len: u32,
    /// IP header length, with options or extension headers, bytes.
    pub header_len: u16,
    /// TCP flags; 0 for UDP.
    pub flags: u8,
    /// Time to live, or hop limit.
    pub ttl: u8,
    /// Type of service, or traffic class.
    pub tos: u8,
    /// Layer-4 header length, bytes.
    pub l4_len: u8,
    /// Routers must not fragment it.
    pub must_not_fragment: bool,
    /// UDP over IPv6 without a checksum, which a receiver discards (RFC 8200, section 8.1; what RFC 6935 excepts are
    /// tunnels, and no service is one). Dropped where it is a service's, since the host may well end a tunnel.
    pub lacks_checksum: bool,
}

impl<A: Family> Parsed<A> {
    /// Offset of the layer-4 header.
    #[inline(always)]
    pub fn l4(&self) -> usize {
        IP + header_len::<A>(self.header_len)
    }

    /// True where it carries more than headers.
    #[inline(always)]
    pub fn has_payload(&self) -> bool {
        self.total_len > u32::from(self.header_len) + u32::from(self.l4_len)
    }

    /// The sum of its pseudo-header (RFC 9293, section 3.1; RFC 8200, section 8.1), as it came.
    #[inline(always)]
    pub fn pseudo_header(&self) -> u16 {
        let len = self.total_len - u32::from(self.header_len);
        checksum::pseudo_header(self.key.src, self.key.dst, self.key.protocol, len as u16)
    }

    /// What it says to connection tracking.
    #[inline(always)]
    pub fn segment(&self) -> Segment {
        Segment { protocol: self.key.protocol, flags: self.flags, seq: self.seq, ack: self.ack }
    }
}

/// Brings headers to where they can be read. Of most packets they are there; where only the data of a packet lies elsewhere, none of
/// that is brought with them, which would cost a memory block and a copy.
#[inline(always)]
pub fn fetch<P: Packet>(packet: &mut P) {
    if !packet.has_in_place(HEADERS) {
        let len = headers_len(packet);
        packet.pull(len as usize);
    }
}

/// Bytes up to the end of the headers, as far as what is in place tells; at most [`HEADERS`].
#[inline(never)]
fn headers_len<P: Packet>(packet: &mut P) -> u32 {
    let upper = |protocol: u8| match protocol {
        TCP => TcpHdr::LEN as u32,
        UDP => UdpHdr::LEN as u32,
        // Extension headers and what is not ours look for themselves.
        _ => 0,
    };
    match ether_type(packet) {
        Some(kind) if kind == u16::from(EtherType::Ipv4) => {
            let Some(ip) = packet.header_anew::<[u8; Ipv4Hdr::LEN]>(IP) else {
                return HEADERS as u32;
            };
            IP as u32 + u32::from((ip[0] & 0xf) << 2) + upper(ip[PROTOCOL])
        }
        Some(kind) if kind == u16::from(EtherType::Ipv6) => {
            let Some(ip) = packet.header_anew::<[u8; IPV6_LEN as usize]>(IP) else {
                return HEADERS as u32;
            };
            IP as u32 + u32::from(IPV6_LEN) + upper(ip[NEXT_HEADER])
        }
        _ => HEADERS as u32,
    }
}

/// Bytes of the IPv4 header's protocol and the IPv6 header's next header.
const PROTOCOL: usize = 9;
const NEXT_HEADER: usize = 6;

/// The Ethernet header's type, as loaded from the packet; `None` for a frame cut short.
#[inline(always)]
pub fn ether_type<P: Packet>(packet: &mut P) -> Option<u16> {
    Some(packet.header::<EthHdr>(0)?.ether_type)
}

/// The IPv4 header, or `None` where it is cut short or none: the stack's business, whoever it is for.
#[inline(always)]
pub fn ipv4<P: Packet>(packet: &mut P) -> Option<Ip<u32>> {
    let ip = packet.header::<Ipv4Header>(IP)?;
    let [version, tos] = ip[ipv4_field::VERSION].to_ne_bytes();
    if version >> 4 != 4 {
        return None;
    }
    let [ttl, protocol] = ip[ipv4_field::TTL_AND_PROTOCOL].to_ne_bytes();
    Some(Ip {
        src: word::<{ ipv4_field::SRC }, _>(ip),
        dst: word::<{ ipv4_field::DST }, _>(ip),
        protocol,
        ttl,
        tos,
        header_len: u16::from((version & 0xf) << 2),
        total_len: u32::from(u16::from_be(ip[ipv4_field::LENGTH])),
        fragment: u16::from_be(ip[ipv4_field::FRAGMENT]),
    })
}

/// The IPv4 header without options as 16-bit words, network order: all that its alignment in a frame allows.
pub type Ipv4Header = [u16; Ipv4Hdr::LEN / 2];

/// Words of an [`Ipv4Header`], and the addresses' offsets in bytes.
pub mod ipv4_field {
    /// Version and header length, then type of service.
    pub const VERSION: usize = 0;
    /// Total length.
    pub const LENGTH: usize = 1;
    /// Flags and fragment offset.
    pub const FRAGMENT: usize = 3;
    /// Time to live, then protocol.
    pub const TTL_AND_PROTOCOL: usize = 4;
    /// Header checksum.
    pub const CHECK: usize = 5;
    /// Source address, bytes.
    pub const SRC: usize = 12;
    /// Destination address, bytes.
    pub const DST: usize = 16;
}

/// The IPv6 header as 16-bit words, network order: all that its alignment in a frame allows.
pub type Ipv6Header = [u16; 20];

/// Words of an [`Ipv6Header`].
pub mod ipv6_field {
    /// Version and traffic class, and the first of the flow label.
    pub const VERSION: usize = 0;
    /// Length of what follows the header.
    pub const PAYLOAD: usize = 2;
    /// Next header, then hop limit.
    pub const NEXT_AND_HOPS: usize = 3;
    /// First of the source's eight.
    pub const SRC: usize = 4;
    /// First of the destination's eight.
    pub const DST: usize = 12;
}

/// The fixed IPv6 header, or `None` where it is cut short or none.
#[inline(always)]
pub fn ipv6<P: Packet>(packet: &mut P) -> Option<Ip<Wide>> {
    let ip = packet.header::<Ipv6Header>(IP)?;
    let version = u16::from_be(ip[ipv6_field::VERSION]);
    if version >> 12 != 6 {
        return None;
    }
    let [protocol, ttl] = ip[ipv6_field::NEXT_AND_HOPS].to_ne_bytes();
    Some(Ip {
        src: [
            word::<{ 2 * ipv6_field::SRC }, _>(ip),
            word::<{ 2 * ipv6_field::SRC + 4 }, _>(ip),
            word::<{ 2 * ipv6_field::SRC + 8 }, _>(ip),
            word::<{ 2 * ipv6_field::SRC + 12 }, _>(ip),
        ],
        dst: [
            word::<{ 2 * ipv6_field::DST }, _>(ip),
            word::<{ 2 * ipv6_field::DST + 4 }, _>(ip),
            word::<{ 2 * ipv6_field::DST + 8 }, _>(ip),
            word::<{ 2 * ipv6_field::DST + 12 }, _>(ip),
        ],
        protocol,
        ttl,
        tos: (version >> 4) as u8,
        header_len: IPV6_LEN,
        total_len: u32::from(u16::from_be(ip[ipv6_field::PAYLOAD])) + u32::from(IPV6_LEN),
        fragment: DONT_FRAGMENT,
    })
}

/// A header length with a bound that the verifier sees: 60 bytes are an IPv4 header's most, and [`EXTENSIONS`] headers of
/// 2 KiB an IPv6 one's. It keeps track of offsets into a packet below 64 KiB only.
#[inline(always)]
pub fn header_len<A: Family>(header_len: u16) -> usize {
    if A::V6 { usize::from(header_len & 0x7fff) } else { usize::from(header_len as u8) }
}

/// Length of the fixed IPv6 header.
pub const IPV6_LEN: u16 = 40;

/// The address from one of [`ipv6_field`]'s words on.
#[inline(always)]
pub fn address(ip: &Ipv6Header, at: usize) -> Wide {
    let word = |at: usize| u32::from(ip[at]) | u32::from(ip[at + 1]) << 16;
    [word(at), word(at + 2), word(at + 4), word(at + 6)]
}

/// The layer-4 header of a TCP or UDP packet, or of its first fragment; `None` where the headers are cut short or contradict
/// each other.
#[inline(always)]
pub fn transport<A: Family, P: Packet>(packet: &mut P, ip: &Ip<A>) -> Option<Parsed<A>> {
    let (header_len, total_len) = (header_len::<A>(ip.header_len), ip.total_len as usize);
    if header_len < Ipv4Hdr::LEN || !packet.holds(IP + total_len) {
        return None;
    }
    let payload = total_len.checked_sub(header_len)?;
    let mut parsed = Parsed {
        key: FlowKey::new(ip.src, ip.dst, 0, 0, ip.protocol),
        seq: 0,
        ack: 0,
        total_len: ip.total_len,
        flags: 0,
        ttl: ip.ttl,
        tos: ip.tos,
        header_len: ip.header_len,
        l4_len: UdpHdr::LEN as u8,
        must_not_fragment: ip.must_not_fragment(),
        lacks_checksum: false,
    };
    if ip.protocol == TCP {
        let tcp = packet.header::<TcpHeader>(IP + header_len)?;
        let [offset, flags] = tcp[6].to_ne_bytes();
        parsed.l4_len = (offset >> 4) << 2;
        if usize::from(parsed.l4_len) < TcpHdr::LEN {
            return None;
        }
        let ports = word::<0, _>(tcp);
        parsed.key.src_port = ports as u16;
        parsed.key.dst_port = (ports >> 16) as u16;
        parsed.flags = flags;
    } else {
        let udp = packet.header::<[u16; UdpHdr::LEN / 2]>(IP + header_len)?;
        let ports = word::<0, _>(udp);
        parsed.key.src_port = ports as u16;
        parsed.key.dst_port = (ports >> 16) as u16;
        parsed.lacks_checksum = A::V6 && udp[3] == 0;
    }
    (usize::from(parsed.l4_len) <= payload).then_some(parsed)
}

/// The TCP header without options as 16-bit words, network order.
type TcpHeader = [u16; TcpHdr::LEN / 2];

/// The numbers of a TCP packet, which only packets that may change their flow's state need.
#[inline(always)]
pub fn sequence<A: Family, P: Packet>(packet: &mut P, parsed: &mut Parsed<A>) {
    if parsed.key.protocol != TCP {
        return;
    }
    if let Some(tcp) = packet.header::<TcpHeader>(parsed.l4()) {
        parsed.seq = u32::from_be(word::<4, _>(tcp));
        parsed.ack = u32::from_be(word::<8, _>(tcp));
    }
}
