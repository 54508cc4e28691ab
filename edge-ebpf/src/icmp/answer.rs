//! ICMP messages of our own, made from the packet as it came: the kernel would tell the edge itself, which rewrote it.
//! They go back the way the packet came, so that no route to its sender is needed.

use edge_common::{
    checksum::{add, fold},
    flow::TCP,
    icmp::{self, FRAGMENTATION_NEEDED, kind},
    maps::OwnAddresses,
    verdict::{Question, Reason, Verdict},
};
use network_types::{eth::EthHdr, ip::Ipv4Hdr};

use crate::{maps, packet::Packet, parse::IP, stats::because};

/// Bytes put in front of the quoted packet.
const FRONT: usize = Ipv4Hdr::LEN + icmp::HEADER;
/// Network control, as routers send their messages (RFC 1812, 4.3.2.5).
const NETWORK_CONTROL: u8 = 0xc0;
const TTL: u8 = 64;
const TCP_CHECK: usize = 16;
const UDP_CHECK: usize = 6;

/// Turns the packet into the message about it, unless nobody may be told; counts it either way.
#[inline(never)]
pub fn send<P: Packet>(packet: &mut P, verdict: Verdict) -> Verdict {
    let Some((question, service, mtu)) = verdict.question() else {
        return Verdict::DROP;
    };
    let Some(from) = maps::own_addresses(packet.ingress()) else {
        return because(Reason::IcmpUnanswered, service);
    };
    let Some(about) = sender(packet, from) else {
        return because(Reason::IcmpUnanswered, service);
    };
    if !maps::may_send_icmp() {
        return because(Reason::IcmpLimited, service);
    }
    if !packet.quote(FRONT, about.quote as usize) || !write(packet, &about, question, mtu) {
        return because(Reason::IcmpUnanswered, service);
    }
    let reason = match question {
        Question::TimeExceeded => Reason::TtlExpired,
        Question::TooBig => Reason::TooBig,
    };
    because(reason, service);
    Verdict::TRANSMIT
}

/// What of the packet is needed once it has moved.
struct About {
    to: u32,
    from: u32,
    macs: [u16; 6],
    /// Bytes of it that are quoted, from the IP header on.
    quote: u32,
    /// Where its checksum is not finished yet: how many bytes of the quote it does not cover, and the sum of the others
    /// once it is. Else all of the quote, and 0.
    summed: u32,
    rest: u16,
}

/// Who is to be told, and by whom; `None` where nobody may be (RFC 1812, 4.3.2.7): the link's broadcast or multicast, a
/// sender that is no single host. Errors and later fragments do not come here.
#[inline(never)]
fn sender<P: Packet>(packet: &mut P, own: &OwnAddresses) -> Option<About> {
    let macs = *packet.header::<[u16; 6]>(0)?;
    let ip = packet.header_anew::<Ipv4Hdr>(IP)?;
    let (to, first, protocol) = (u32::from_ne_bytes(ip.src_addr), ip.src_addr[0], ip.proto);
    let (header, total) = (usize::from(ip.vihl & 0xf) << 2, usize::from(u16::from_be_bytes(ip.tot_len)));
    let from = own.v4[3];
    if macs[0] as u8 & 1 != 0 || first == 0 || first == 127 || first >= 224 || from == 0 {
        return None;
    }
    let quote = icmp::quote_len(total, icmp::QUOTE);
    let mut about = About { to, from, macs, quote: quote as u32, summed: quote as u32, rest: 0 };
    let check = IP + header + if protocol == TCP { TCP_CHECK } else { UDP_CHECK };
    if packet.has_unfinished_checksum(check) {
        // Once finished, what the checksum covers adds up to the complement of what the field holds now.
        let field = packet.header_anew::<[u8; 2]>(check)?;
        about.rest = !u16::from_ne_bytes(*field);
        about.summed = header as u32;
    }
    Some(about)
}

/// The headers in front of the quote.
#[inline(always)]
fn write<P: Packet>(packet: &mut P, about: &About, question: Question, mtu: u32) -> bool {
    let Some(eth) = packet.header_anew::<[u16; EthHdr::LEN / 2]>(0) else {
        return false;
    };
    let [a, b, c, d, e, f] = about.macs;
    *eth = [d, e, f, a, b, c, 0x0800u16.to_be()];
    let Some(ip) = packet.header_anew::<[u16; Ipv4Hdr::LEN / 2]>(IP) else {
        return false;
    };
    // Not to be fragmented, so that the ID need not tell it from others (RFC 6864).
    *ip = [
        u16::from_ne_bytes([0x45, NETWORK_CONTROL]),
        (about.quote as u16).wrapping_add(FRONT as u16).to_be(),
        0,
        0x4000u16.to_be(),
        u16::from_ne_bytes([TTL, icmp::ICMP]),
        0,
        about.from as u16,
        (about.from >> 16) as u16,
        about.to as u16,
        (about.to >> 16) as u16,
    ];
    let mut sum = 0;
    for word in ip.iter() {
        sum += u32::from(*word);
    }
    ip[5] = !fold(sum);
    let Some(quoted) = sum_of(packet, IP + FRONT, about.summed) else {
        return false;
    };
    let head = match question {
        Question::TimeExceeded => [u16::from_ne_bytes([kind::TIME_EXCEEDED, 0]), 0, 0, 0],
        Question::TooBig => [u16::from_ne_bytes([kind::UNREACHABLE, FRAGMENTATION_NEEDED]), 0, 0, (mtu as u16).to_be()],
    };
    let check = !add(add(head[0], head[3]), add(quoted, about.rest));
    let Some(field) = packet.header_anew::<[u16; icmp::HEADER / 2]>(IP + Ipv4Hdr::LEN) else {
        return false;
    };
    *field = [head[0], check, head[2], head[3]];
    packet.add_to_sum(add(add(head[0], head[3]), check));
    true
}

/// The ones'-complement sum of `len` bytes, a multiple of 4 and at most a quote.
#[inline(never)]
fn sum_of<P: Packet>(packet: &mut P, offset: usize, len: u32) -> Option<u16> {
    let mut sum = 0;
    for word in 0..icmp::QUOTE as u32 / 4 {
        if word * 4 >= len {
            break;
        }
        let pair = packet.header_anew::<[u16; 2]>(offset + word as usize * 4)?;
        sum += u32::from(pair[0]) + u32::from(pair[1]);
    }
    Some(fold(sum))
}
