//! A RST in the VIP's name, made of the segment that it answers. It goes back the way the segment came.

use edge_common::{
    address::Wide,
    checksum::fold,
    flow::TCP,
    midflow::{Reset, reset},
    verdict::{Reason, Verdict},
};
use network_types::{eth::EthHdr, ip::Ipv4Hdr, tcp::TcpHdr};

use crate::{
    family::Family,
    maps,
    packet::Packet,
    parse::{IP, IPV6_LEN, Ipv6Header, Parsed},
    stats::because,
};

const TTL: u8 = 64;
const TCP_CHECK: usize = 16;
/// Flags of a TCP header that may be set in a RST, and its length in 32-bit words.
const WORDS: u8 = 5 << 4;

/// Turns the segment into the RST that answers it, at most as many as the pace allows; counts it either way. A header with
/// options is not answered: whether they are to be returned is for the host to know (RFC 1122, 3.2.1.8).
#[inline(never)]
pub fn send<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>, service: u32, now: u64) -> Verdict {
    let header = if A::V6 { usize::from(IPV6_LEN) } else { Ipv4Hdr::LEN };
    let Some(macs) = packet.header::<[u16; 6]>(0).map(|macs| *macs) else {
        return because(Reason::Malformed, service);
    };
    // One host sent it to one host.
    let group = macs[0] as u8 & 1 != 0 || macs[3] as u8 & 1 != 0;
    if usize::from(parsed.header_len) != header || group {
        return because(Reason::MidFlowSilent, service);
    }
    if !maps::may_send_reset(now) {
        return because(Reason::MidFlowLimited, service);
    }
    let unfinished = packet.has_unfinished_checksum(IP + header + TCP_CHECK);
    if !packet.quote(0, header + TcpHdr::LEN) {
        return because(Reason::MidFlowSilent, service);
    }
    let payload = parsed.total_len - (u32::from(parsed.header_len) + u32::from(parsed.l4_len)).min(parsed.total_len);
    let answer = reset(parsed.flags, parsed.seq, parsed.ack, payload);
    let [a, b, c, d, e, f] = macs;
    let Some(eth) = packet.header_anew::<[u16; 6]>(0) else {
        return because(Reason::Malformed, service);
    };
    *eth = [d, e, f, a, b, c];
    let written = if A::V6 { ipv6(packet, parsed) } else { ipv4(packet, parsed) };
    if !written || !tcp(packet, parsed, header, &answer, unfinished) {
        return because(Reason::Malformed, service);
    }
    because(Reason::MidFlowReset, service);
    Verdict::RETURN
}

#[inline(always)]
fn ipv4<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>) -> bool {
    let (src, dst) = (parsed.key.dst.wide()[3], parsed.key.src.wide()[3]);
    let Some(ip) = packet.header_anew::<[u16; Ipv4Hdr::LEN / 2]>(IP) else {
        return false;
    };
    // Not to be fragmented, so that the ID need not tell it from others (RFC 6864).
    *ip = [
        u16::from_ne_bytes([0x45, 0]),
        ((Ipv4Hdr::LEN + TcpHdr::LEN) as u16).to_be(),
        0,
        0x4000u16.to_be(),
        u16::from_ne_bytes([TTL, TCP]),
        0,
        src as u16,
        (src >> 16) as u16,
        dst as u16,
        (dst >> 16) as u16,
    ];
    let mut sum = 0;
    for word in ip.iter() {
        sum += u32::from(*word);
    }
    ip[5] = !fold(sum);
    true
}

#[inline(always)]
fn ipv6<A: Family, P: Packet>(packet: &mut P, parsed: &Parsed<A>) -> bool {
    let (src, dst) = (parsed.key.dst.wide(), parsed.key.src.wide());
    let Some(ip) = packet.header_anew::<Ipv6Header>(IP) else {
        return false;
    };
    ip[0] = u16::from_ne_bytes([0x60, 0]);
    ip[1] = 0;
    ip[2] = (TcpHdr::LEN as u16).to_be();
    ip[3] = u16::from_ne_bytes([TCP, TTL]);
    for word in 0..4 {
        ip[4 + 2 * word] = src[word] as u16;
        ip[5 + 2 * word] = (src[word] >> 16) as u16;
        ip[12 + 2 * word] = dst[word] as u16;
        ip[13 + 2 * word] = (dst[word] >> 16) as u16;
    }
    true
}

/// The TCP header. Where the segment's checksum was not finished yet, whoever finishes it counts on the pseudo-header's sum.
#[inline(always)]
fn tcp<A: Family, P: Packet>(
    packet: &mut P,
    parsed: &Parsed<A>,
    header: usize,
    answer: &Reset,
    unfinished: bool,
) -> bool {
    let key = &parsed.key;
    let (seq, ack) = (answer.seq.to_be(), answer.ack.to_be());
    let Some(tcp) = packet.header_anew::<[u16; TcpHdr::LEN / 2]>(IP + header) else {
        return false;
    };
    *tcp = [
        key.dst_port,
        key.src_port,
        seq as u16,
        (seq >> 16) as u16,
        ack as u16,
        (ack >> 16) as u16,
        u16::from_ne_bytes([WORDS, answer.flags]),
        0,
        0,
        0,
    ];
    let pseudo = u32::from((TcpHdr::LEN as u16).to_be())
        + u32::from(u16::from(TCP).to_be())
        + words(&key.src.wide())
        + words(&key.dst.wide());
    let mut sum = u32::from(fold(pseudo));
    if !unfinished {
        for word in tcp.iter() {
            sum += u32::from(*word);
        }
    }
    let sum = fold(sum);
    tcp[8] = if unfinished { sum } else { !sum };
    true
}

/// The sum of an address; what makes an IPv4 one mapped adds nothing to a ones'-complement sum.
#[inline(always)]
fn words(address: &Wide) -> u32 {
    let mut sum = 0;
    for word in address {
        sum += (word & 0xffff) + (word >> 16);
    }
    sum
}

const _: () = assert!(EthHdr::LEN == IP);
