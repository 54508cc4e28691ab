//! What differs between ICMP (RFC 792) and ICMPv6 (RFC 4443): which messages are errors, what a quoted packet looks like,
//! what the checksum covers, and how a message of our own begins.

use edge_common::{
    address::Wide,
    checksum::{self, add, fold},
    flow::{FlowKey, TCP, UDP},
    icmp::{self, FRAGMENTATION_NEEDED, ICMP, ICMPV6, kind, kind_v6},
    maps::OwnAddresses,
    verdict::Question,
};
use network_types::{eth::EtherType, ip::Ipv4Hdr};

use crate::{
    extensions::{self, FRAGMENT_LEN, Place, Upper},
    family,
    maps::FlowTables,
    packet::Packet,
    parse::{self, IP, IPV6_LEN, Ip, Ipv6Header, ipv6_field},
};

/// ICMP of one family.
pub trait Message: FlowTables {
    /// Its IP protocol number.
    const NUMBER: u8;
    /// Bytes of a plain IP header.
    const HEADER: usize;
    /// Bytes of the quoted headers that are looked at at once, a layer-4 header's first included.
    const QUOTED: usize;
    /// Most bytes of a packet that a message of our own quotes.
    const QUOTE: usize;
    /// The Ethernet type.
    const ETHER_TYPE: u16;

    /// The IP header of an unfragmented ICMP packet.
    fn icmp<P: Packet>(packet: &mut P) -> Option<Ip<Self>>;

    /// True for a message about a packet, which it quotes.
    fn is_error(kind: u8) -> bool;

    /// Reads the quoted IP header at `at`: addresses and protocol of TCP or UDP into `key`; the offset of its layer-4 header,
    /// or 0 where there is none, as in a later fragment.
    fn quoted<P: Packet>(packet: &mut P, at: usize, key: &mut FlowKey<Self>) -> usize;

    /// True for an address that means nothing beyond its link.
    fn is_link_local(self) -> bool;

    /// Writes addresses into the IP header at `at`, which change its sum by `delta`, and takes `hops` from its TTL; false
    /// where the packet turned out to be too short.
    fn readdress<P: Packet>(packet: &mut P, at: usize, src: Self, dst: Self, delta: u16, hops: u8) -> bool;

    /// What the ICMP checksum changes by, where the addresses outside change by `outside` and those inside by `addresses`,
    /// the ports inside by `ports`, and the checksum inside so that it stays right, if `checked`.
    fn change(outside: u16, addresses: u16, ports: u16, checked: bool) -> u16;

    /// The address that messages to an interface are signed with; all zero where there is none.
    fn own(own: &OwnAddresses) -> Self;

    /// True for an address that a single host may have.
    fn is_host(self) -> bool;

    /// Writes the IP header of a message of `len` bytes, ICMP header and quote; what it adds to the ICMP checksum, and to the sum of the
    /// whole packet.
    fn begin<P: Packet>(packet: &mut P, from: Self, to: Self, len: u16) -> Option<(u16, u16)>;

    /// The ICMP header, its checksum zero.
    fn head(question: Question, mtu: u32) -> [u16; icmp::HEADER / 2];
}

/// TTL or hop limit of messages of our own.
const TTL: u8 = 64;
/// Network control, as routers send their messages (RFC 1812, 4.3.2.5).
const NETWORK_CONTROL: u8 = 0xc0;
const OFFSET: u16 = 0x1fff;

impl Message for u32 {
    const NUMBER: u8 = ICMP;
    const HEADER: usize = Ipv4Hdr::LEN;
    const QUOTED: usize = 60 + 18;
    const QUOTE: usize = icmp::QUOTE;
    const ETHER_TYPE: u16 = EtherType::Ipv4 as u16;

    #[inline(always)]
    fn icmp<P: Packet>(packet: &mut P) -> Option<Ip<Self>> {
        parse::ipv4(packet).filter(|ip| ip.protocol == ICMP && !ip.is_fragment())
    }

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        icmp::is_error(kind)
    }

    #[inline(always)]
    fn quoted<P: Packet>(packet: &mut P, at: usize, key: &mut FlowKey<Self>) -> usize {
        let Some(ip) = packet.header_anew::<Ipv4Hdr>(at) else {
            return 0;
        };
        let (length, protocol) = (usize::from(ip.vihl & 0xf) << 2, ip.proto);
        if ip.vihl >> 4 != 4
            || length < Ipv4Hdr::LEN
            || u16::from_be_bytes(ip.frags) & OFFSET != 0
            || (protocol != TCP && protocol != UDP)
        {
            return 0;
        }
        let (src, dst) = (u32::from_ne_bytes(ip.src_addr), u32::from_ne_bytes(ip.dst_addr));
        *key = FlowKey::new(src, dst, 0, 0, protocol);
        at + length
    }

    #[inline(always)]
    fn is_link_local(self) -> bool {
        false
    }

    #[inline(always)]
    fn readdress<P: Packet>(packet: &mut P, at: usize, src: Self, dst: Self, delta: u16, hops: u8) -> bool {
        let Some(ip) = packet.header_anew::<Ipv4Hdr>(at) else {
            return false;
        };
        ip.ttl -= hops;
        ip.src_addr = src.to_ne_bytes();
        ip.dst_addr = dst.to_ne_bytes();
        let delta = if hops == 0 { delta } else { add(delta, checksum::TTL_DECREMENT) };
        ip.check = checksum::apply(u16::from_ne_bytes(ip.check), delta).to_ne_bytes();
        true
    }

    /// The header inside has a checksum of its own, which makes up for its addresses; the header outside is not covered.
    #[inline(always)]
    fn change(_outside: u16, addresses: u16, ports: u16, checked: bool) -> u16 {
        if checked { !addresses } else { ports }
    }

    #[inline(always)]
    fn own(own: &OwnAddresses) -> Self {
        own.v4[3]
    }

    #[inline(always)]
    fn is_host(self) -> bool {
        let first = self.to_ne_bytes()[0];
        first != 0 && first != 127 && first < 224
    }

    #[inline(always)]
    fn begin<P: Packet>(packet: &mut P, from: Self, to: Self, len: u16) -> Option<(u16, u16)> {
        let ip = packet.header_anew::<[u16; Ipv4Hdr::LEN / 2]>(IP)?;
        // Not to be fragmented, so that the ID need not tell it from others (RFC 6864).
        *ip = [
            u16::from_ne_bytes([0x45, NETWORK_CONTROL]),
            len.wrapping_add(Ipv4Hdr::LEN as u16).to_be(),
            0,
            0x4000u16.to_be(),
            u16::from_ne_bytes([TTL, ICMP]),
            0,
            from as u16,
            (from >> 16) as u16,
            to as u16,
            (to >> 16) as u16,
        ];
        ip[5] = !sum(ip);
        // Its own checksum makes the header add up to nothing.
        Some((0, 0))
    }

    #[inline(always)]
    fn head(question: Question, mtu: u32) -> [u16; icmp::HEADER / 2] {
        match question {
            Question::TimeExceeded => [u16::from_ne_bytes([kind::TIME_EXCEEDED, 0]), 0, 0, 0],
            Question::TooBig => {
                [u16::from_ne_bytes([kind::UNREACHABLE, FRAGMENTATION_NEEDED]), 0, 0, (mtu as u16).to_be()]
            }
        }
    }
}

impl Message for Wide {
    const NUMBER: u8 = ICMPV6;
    const HEADER: usize = IPV6_LEN as usize;
    const QUOTED: usize = IPV6_LEN as usize + 18;
    const QUOTE: usize = icmp::QUOTE_V6;
    const ETHER_TYPE: u16 = EtherType::Ipv6 as u16;

    #[inline(always)]
    fn icmp<P: Packet>(packet: &mut P) -> Option<Ip<Self>> {
        parse::fetch(packet);
        let mut ip = parse::ipv6(packet)?;
        let upper = if ip.protocol == ICMPV6 { Upper::Header } else { extensions::skip(packet, &mut ip) };
        (upper == Upper::Header && ip.protocol == ICMPV6).then_some(ip)
    }

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        icmp::is_error_v6(kind)
    }

    #[inline(always)]
    fn quoted<P: Packet>(packet: &mut P, at: usize, key: &mut FlowKey<Self>) -> usize {
        let Some(ip) = packet.header_anew::<Ipv6Header>(at) else {
            return 0;
        };
        if u16::from_be(ip[ipv6_field::VERSION]) >> 12 != 6 {
            return 0;
        }
        let [next, _] = ip[ipv6_field::NEXT_AND_HOPS].to_ne_bytes();
        key.src = parse::address(ip, ipv6_field::SRC);
        key.dst = parse::address(ip, ipv6_field::DST);
        let mut place = Place { next, offset: at as u16 + IPV6_LEN };
        if next != TCP && next != UDP {
            let mut upper = extensions::walk(packet, &mut place);
            if upper == Upper::Fragment {
                match extensions::fragment(packet, place.offset()) {
                    Some(first) if !first.later => {
                        place = Place { next: first.next, offset: place.offset + FRAGMENT_LEN };
                        upper = extensions::walk(packet, &mut place);
                    }
                    _ => return 0,
                }
            }
            if upper != Upper::Header || (place.next != TCP && place.next != UDP) {
                return 0;
            }
        }
        key.protocol = place.next;
        place.offset()
    }

    #[inline(always)]
    fn is_link_local(self) -> bool {
        self[0] & 0xffc0_0000_u32.to_be() == 0xfe80_0000_u32.to_be()
    }

    #[inline(always)]
    fn readdress<P: Packet>(packet: &mut P, at: usize, src: Self, dst: Self, _delta: u16, hops: u8) -> bool {
        let Some(ip) = packet.header_anew::<Ipv6Header>(at) else {
            return false;
        };
        let [next, limit] = ip[ipv6_field::NEXT_AND_HOPS].to_ne_bytes();
        ip[ipv6_field::NEXT_AND_HOPS] = u16::from_ne_bytes([next, limit.wrapping_sub(hops)]);
        family::write(ip, ipv6_field::SRC, &src);
        family::write(ip, ipv6_field::DST, &dst);
        true
    }

    /// Covers both pairs of addresses (RFC 8200, section 8.1); the checksum inside makes up for those inside and the ports.
    #[inline(always)]
    fn change(outside: u16, addresses: u16, ports: u16, checked: bool) -> u16 {
        if checked { outside } else { add(outside, add(addresses, ports)) }
    }

    #[inline(always)]
    fn own(own: &OwnAddresses) -> Self {
        own.v6
    }

    /// Neither multicast nor among those that begin with 96 zeroes: the unspecified one, loopback.
    #[inline(always)]
    fn is_host(self) -> bool {
        self[0].to_ne_bytes()[0] != 0xff && self[0] | self[1] | self[2] != 0
    }

    #[inline(always)]
    fn begin<P: Packet>(packet: &mut P, from: Self, to: Self, len: u16) -> Option<(u16, u16)> {
        let ip = packet.header_anew::<Ipv6Header>(IP)?;
        ip[ipv6_field::VERSION] = 0x6000u16.to_be();
        ip[ipv6_field::VERSION + 1] = 0;
        ip[ipv6_field::PAYLOAD] = len.to_be();
        ip[ipv6_field::NEXT_AND_HOPS] = u16::from_ne_bytes([ICMPV6, TTL]);
        family::write(ip, ipv6_field::SRC, &from);
        family::write(ip, ipv6_field::DST, &to);
        let whole = sum(ip);
        // The pseudo-header has no version and no hop limit, and the number of ICMPv6 by itself.
        let only_in_header = add(ip[ipv6_field::VERSION], ip[ipv6_field::NEXT_AND_HOPS]);
        let pseudo = add(add(whole, !only_in_header), u16::from(ICMPV6).to_be());
        Some((pseudo, whole))
    }

    #[inline(always)]
    fn head(question: Question, mtu: u32) -> [u16; icmp::HEADER / 2] {
        match question {
            Question::TimeExceeded => [u16::from_ne_bytes([kind_v6::TIME_EXCEEDED, 0]), 0, 0, 0],
            Question::TooBig => {
                let [high, low] = [(mtu >> 16) as u16, mtu as u16];
                [u16::from_ne_bytes([kind_v6::TOO_BIG, 0]), 0, high.to_be(), low.to_be()]
            }
        }
    }
}

/// The ones'-complement sum of a header's words.
#[inline(always)]
fn sum<const N: usize>(words: &[u16; N]) -> u16 {
    let mut sum = 0;
    for word in words {
        sum += u32::from(*word);
    }
    fold(sum)
}
